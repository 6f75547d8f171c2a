"""The command line: runs experiments, or makes tables and pictures of what was run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.harness import digest
from benchmarks.harness.journal import read
from benchmarks.harness.runner import Only, run
from benchmarks.harness.task import Experiment, Row, Settings

DATA = "PYRO_SUBNET_DATA"
REPORT = "report"


def parse(
    program: str, names: Sequence[str], arguments: Sequence[str] | None = None
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {program}")
    parser.add_argument(
        "experiments",
        nargs="+",
        choices=[*names, "all", REPORT],
        metavar="EXPERIMENT",
        help=f"{', '.join(names)}, all; or {REPORT}, for the tables and pictures",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=os.environ.get(DATA),
        help=f"holds uci/, mnist/, fashion-mnist/, cifar10/; else ${DATA}",
    )
    parser.add_argument("--seeds", type=int, default=3, help="or splits, how many")
    parser.add_argument("--first", type=int, default=0, help="of the seeds, or splits")
    parser.add_argument("--scale", choices=("smoke", "small", "paper"), default="small")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="else all")
    parser.add_argument("--networks", nargs="+", metavar="NETWORK", help="else all")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(arguments)


# What all experiments together show, from the rows of each by its name; pictures go to
# the folder.
Opening = Callable[[Mapping[str, Sequence[Row]], Path], str]


def main(
    program: str,
    experiments: Mapping[str, Experiment],
    arguments: Sequence[str] | None = None,
    opening: Opening | None = None,
) -> int:
    """Runs the experiments that are named, or reports; 1 if something failed."""
    options = parse(program, list(experiments), arguments)
    if REPORT in options.experiments:
        print(report(experiments, options.out, opening))
        return 0
    everything = "all" in options.experiments
    wanted = experiments if everything else options.experiments
    chosen = {name: experiments[name] for name in wanted}
    settings = Settings(
        data_dir=options.data_dir,
        out=options.out,
        scale=options.scale,
        seeds=options.seeds,
        first=options.first,
        device=options.device,
    )
    only = Only(options.methods, options.networks)
    failures = run(chosen, settings, only, options.workers)
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


def report(
    experiments: Mapping[str, Experiment],
    folder: Path,
    opening: Opening | None = None,
) -> str:
    """Tables of every experiment's digest; pictures beside them.

    A digest is made anew where there is a journal.
    """
    parts, found = [], {}
    for name, experiment in experiments.items():
        if measured := read(folder / f"{name}.jsonl"):
            digest.write(measured, folder, name)
        if rows := digest.read(folder, name):
            parts.append(experiment.report(rows, folder))
            found[name] = rows
    if opening is not None and found:
        parts.insert(0, opening(found, folder))
    return "\n\n".join(parts)
