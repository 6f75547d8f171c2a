"""Results on disk: one JSON line a score, a method's lines written at once.

A killed run loses the method in progress and nothing else: every line says how many its
method has, so that a write that was cut is told from a whole one.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import pyro
import torch

from benchmarks.harness.task import Row, Scale, Score, Task
from pyro_subnet import __version__

KEY = ("experiment", "dataset", "seed", "variant", "method", "scale")
VERSIONS = (
    f"pyro_subnet {__version__}, torch {torch.__version__}, pyro {pyro.__version__}, "
    f"python {platform.python_version()}"
)


def key(row: Row) -> tuple[object, ...]:
    """What a method's lines have in common."""
    return tuple(row[part] for part in KEY)


def read(path: Path) -> list[Row]:
    """Rows of a file, without those of a method whose write was cut."""
    return _whole(path)[0]


class Journal:
    """The file of one experiment's scores.

    Attributes:
        path: The file, a JSON object a line.
        scale: Of this run.
        done: Keys of the methods that it holds.
    """

    def __init__(self, path: Path, scale: Scale) -> None:
        self.path, self.scale = path, scale
        path.parent.mkdir(parents=True, exist_ok=True)
        rows, size = _whole(path)
        if path.exists():
            os.truncate(path, size)
        self.done = {key(row) for row in rows}

    def todo(self, task: Task) -> list[str]:
        """Methods of a task that are not done yet."""
        return [
            method
            for method in task.methods
            if (*task.name, method, self.scale) not in self.done
        ]

    def write(
        self, task: Task, method: str, scores: Sequence[Score], seconds: float
    ) -> None:
        """Adds all scores of one method of one task, in one write."""
        head = dict(zip(KEY, (*task.name, method, self.scale), strict=True))
        tail = {"seconds": round(seconds, 3), "scores": len(scores)}
        lines = [
            json.dumps({**head, **score._asdict(), **tail, "versions": VERSIONS}) + "\n"
            for score in scores
        ]
        with self.path.open("ab", buffering=0) as file:
            file.write("".join(lines).encode())
        self.done.add(key(head))


def _whole(path: Path) -> tuple[list[Row], int]:
    """Rows of the methods that are there in full, and how many bytes they take."""
    rows: list[Row] = []
    if not path.exists():
        return rows, 0
    size, block, length = 0, list[Row](), 0
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        block.append(json.loads(line))
        length += len(line)
        if len(block) == block[0]["scores"]:
            rows += block
            size += length
            block, length = [], 0
    return rows, size
