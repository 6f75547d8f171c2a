"""Runs the paper's experiments, or makes the tables and pictures of what was run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.paper import digest
from benchmarks.paper.experiments import EXPERIMENTS
from benchmarks.paper.journal import read
from benchmarks.paper.runner import run
from benchmarks.paper.task import Settings

DATA = "PYRO_SUBNET_DATA"
REPORT = "report"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper")
    parser.add_argument(
        "experiments",
        nargs="+",
        choices=[*EXPERIMENTS, "all", REPORT],
        metavar="EXPERIMENT",
        help=f"{', '.join(EXPERIMENTS)}, all; or {REPORT}, for the tables and pictures",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=os.environ.get(DATA),
        help=f"holds uci/, mnist/, fashion-mnist/, cifar10/; else ${DATA}",
    )
    parser.add_argument("--seeds", type=int, default=3, help="or splits, how many")
    parser.add_argument("--scale", choices=("smoke", "small", "paper"), default="small")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="else all")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if REPORT in options.experiments:
        print(report(options.out))
        return 0
    everything = "all" in options.experiments
    names = list(EXPERIMENTS) if everything else options.experiments
    settings = Settings(
        data_dir=options.data_dir,
        out=options.out,
        scale=options.scale,
        seeds=options.seeds,
        device=options.device,
    )
    failures = run(names, settings, options.methods, options.workers)
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


def report(folder: Path) -> str:
    """Tables of every experiment that has results; pictures and digests beside them."""
    parts = []
    for name, experiment in EXPERIMENTS.items():
        rows = read(folder / f"{name}.jsonl") or digest.read(folder, name)
        if rows:
            digest.write(rows, folder, name)
            parts.append(experiment.report(rows, folder))
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
