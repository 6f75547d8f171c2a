"""Strong scaling of a fit: one process with two cores, or two ranks with one each.

The engine's CNN, S = 2,000, on 1,000 images; medians in seconds::

    .venv/bin/python -m benchmarks.distributed

Each row is a group of processes of its own. Rank 0's time counts, from a barrier to the
posterior that all ranks have.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as td
import torch.multiprocessing as mp

from benchmarks.engine import ours
from benchmarks.engine.cases import CASES
from benchmarks.engine.machine import description
from benchmarks.engine.prepare import prepare
from benchmarks.engine.process import Task

_REPEATS = 3
_BATCH_SIZE = 100
# Ranks, and threads of each.
WAYS = ((1, 1), (1, 2), (2, 1))


def _measure(rank: int, size: int, threads: int, folder: str, case_name: str) -> None:
    """One rank's part of a row; rank 0 writes the median."""
    torch.set_num_threads(threads)
    store = f"file://{folder}/store"
    td.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    case = CASES[case_name]
    task = Task(case, "ours", prepare(case), 1, 1)
    model, (x, y) = ours.make_model(task), task.prepared.train
    ours.warm_up(task, model)
    subnet = ours.chosen(task.prepared.net, ours.subnet_positions(task))
    guide = ours.make_guide(task, model, subnet, (x, y))
    mine = torch.arange(len(x))[rank::size]
    batches = [(x[at], y[at]) for at in mine.split(_BATCH_SIZE)]
    seconds = list[float]()
    for _ in range(_REPEATS):
        td.barrier()
        start = time.perf_counter()
        guide.laplace_approximation_from(batches, process_group=True)
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        Path(folder, "seconds").write_text(str(statistics.median(seconds)))
    td.barrier()  # the other may still be in a collective with this one
    td.destroy_process_group()


def measured(size: int, threads: int, case_name: str) -> float:
    """Median seconds of a fit by so many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_measure, (size, threads, folder, case_name), nprocs=size)
        return float(Path(folder, "seconds").read_text())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed")
    parser.add_argument("--case", choices=CASES, default="cnn")
    options: Any = parser.parse_args(arguments)
    print(description())
    print("ranks  threads of each    seconds  times one core")
    found = dict[tuple[int, int], float]()
    for size, threads in WAYS:
        found[size, threads] = measured(size, threads, options.case)
        gain = found[WAYS[0]] / found[size, threads]
        seconds = f"{found[size, threads]:.3f}"
        print(f"{size:>5}  {threads:>15}  {seconds:>9}  {gain:>14.2f}", flush=True)


if __name__ == "__main__":
    main()
