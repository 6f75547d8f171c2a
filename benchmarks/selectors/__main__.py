"""Measures the selectors, or prints the tables of what was measured."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.selectors.data import (
    UCI_SETS,
    Split,
    digits_split,
    gap_features,
    uci_split,
)
from benchmarks.selectors.measure import KEY, Plan, key, read, run
from benchmarks.selectors.methods import METHODS
from benchmarks.selectors.report import tables

DATA = "PYRO_SUBNET_DATA"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selectors")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("uci", "digits"):
        command = commands.add_parser(name)
        command.add_argument("--out", type=Path, required=True, help="JSON lines")
        command.add_argument("--seeds", type=int, default=3, help="or splits, how many")
        command.add_argument("--sizes", type=float, nargs="+", default=[0.05])
        command.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD")
        command.add_argument("--num-hidden", type=int, default=50)
        command.add_argument("--num-steps", type=int, default=1000)
        command.add_argument("--most", type=int, default=None, help="data of a part")
        if name == "digits":
            command.add_argument(
                "--tilted", action="store_true", help="tune on tilted digits"
            )
        else:
            command.add_argument(
                "--data-dir",
                type=Path,
                default=os.environ.get(DATA),
                help=f"holds uci/ and uci_gap/; else ${DATA}",
            )
            command.add_argument("--sets", nargs="+", default=UCI_SETS)
            command.add_argument(
                "--noise", choices=("fitted", "held-out"), default="fitted"
            )
    report = commands.add_parser("report")
    report.add_argument("files", type=Path, nargs="+")
    report.add_argument("--share", type=float, default=0.05, help="of subnets")
    options = parser.parse_args(arguments)
    if options.command == "uci" and options.data_dir is None:
        parser.error(f"--data-dir or ${DATA} must name the folder of the data")
    return options


def splits(options: argparse.Namespace) -> Iterator[Split]:
    """What is to be run."""
    if options.command == "digits":
        for seed in range(options.seeds):
            yield digits_split(seed, tilted=options.tilted, most=options.most)
        return
    folder, most = options.data_dir, options.most or 500
    for index in range(options.seeds):
        for name in options.sets:
            yield uci_split(folder, name, "standard", index, most=most)
            gaps = list(gap_features(folder, name))
            if index < len(gaps):
                yield uci_split(folder, name, "gap", gaps[index], most=most)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.command == "report":
        rows = [row for path in options.files for row in read(path)]
        print(tables(rows, options.share))
        return
    torch.set_num_threads(1)  # more would wait for each other on layers this small
    plan = Plan(
        sizes=options.sizes,
        names=options.methods or tuple(METHODS),
        noise=getattr(options, "noise", "fitted"),
        num_hidden=options.num_hidden,
        num_steps=options.num_steps,
        swag_steps=options.num_steps // 2,
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    done = {key(row) for row in read(options.out)}
    with options.out.open("a") as out:
        for split in splits(options):
            for row in run(split, plan, done):
                out.write(json.dumps(row) + "\n")
                out.flush()
                print(*(row[part] for part in KEY), row.get("failed", ""), flush=True)


if __name__ == "__main__":
    main()
