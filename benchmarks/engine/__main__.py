"""Runs the benchmark and prints its table; see benchmarks/engine/README.md."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.engine import table
from benchmarks.engine.cases import CASES
from benchmarks.engine.compare import problem
from benchmarks.engine.machine import description
from benchmarks.engine.runner import Launcher, run_again, run_case

_DEFAULT = [name for name, case in CASES.items() if case.by_default]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine")
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=CASES,
        default=_DEFAULT,
        metavar="CASE",
        help=f"of: {', '.join(CASES)}",
    )
    backends = sorted({name for case in CASES.values() for name in case.backends})
    parser.add_argument(
        "--backends",
        nargs="*",
        choices=backends,
        metavar="BACKEND",
        help=f"only these; ours alone if none is named; of: {', '.join(backends)}",
    )
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument(
        "--cold", action="store_true", help="time the first fit of a process, too"
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--num-data", type=int, help="at most, to try it out")
    parser.add_argument("--timeout", type=float, default=900.0, help="of a process, s")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    print(f"{description(options.device)}, laplace-torch {version('laplace-torch')}")
    print(f"medians of up to {options.pairs} pairs; seconds, GB beyond the imports")
    print(table.HEADER, flush=True)
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        warm = Launcher(Path(folder), options.timeout, device=str(options.device))
        cold = replace(warm, cold=True)
        for name in options.cases:
            case = CASES[name]
            if options.num_data is not None:
                case = case.smaller(options.num_data)
            warm.prepare(case)
            report = run_case(case, options.backends, options.pairs, warm)
            reports = {"": report}
            if options.cold and case.work == "fit-predict":
                reports["cold, "] = run_again(report, options.pairs, cold)
            for way, each in reports.items():
                print(way + table.block(each), flush=True)
                problems.append(problem(case, each.rows))
    found = [text for text in problems if text is not None]
    if found:
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
