"""Results in a tenth of the journal's size, to be kept beside what they show.

A line has one number of one method at every seed, to six digits. The seconds that a
method took, judging included, are one of its numbers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.task import Row

_HEAD = ("experiment", "scale", "versions")
_CELL = ("dataset", "variant", "method", "shift", "metric")
# The metric's name; its shift is that of data in distribution.
SECONDS = "seconds in all"


def path_of(folder: Path, name: str) -> Path:
    """Where an experiment's digest is."""
    return folder / f"{name}.digest.jsonl"


def write(rows: Sequence[Row], folder: Path, name: str) -> None:
    """A line of what all have in common, then a line of each number."""
    found: dict[tuple[str, ...], dict[str, dict[str, float]]] = {}
    for row in rows:
        head = tuple(row[part] for part in _HEAD)
        cells = found.setdefault(head, {})
        numbers = {(row["shift"], row["metric"]): row["value"]}
        if "seconds" in row:
            numbers["", SECONDS] = row["seconds"]
        for place, value in numbers.items():
            cell = json.dumps([*(row[part] for part in _CELL[:3]), *place])
            values = cells.setdefault(cell, {})
            values[str(row["seed"])] = float(f"{value:.6g}")
    with path_of(folder, name).open("w") as file:
        for head, cells in found.items():
            print(json.dumps(dict(zip(_HEAD, head, strict=True))), file=file)
            for cell, values in cells.items():
                print(json.dumps([*json.loads(cell), values]), file=file)


def read(folder: Path, name: str) -> list[Row]:
    """The rows again, and the seconds as rows of their own; none if there are none."""
    path, rows = path_of(folder, name), list[Row]()
    if not path.exists():
        return rows
    head: Row = {}
    for line in path.read_text().splitlines():
        content = json.loads(line)
        if isinstance(content, dict):
            head = content
            continue
        *cell, values = content
        own = head | dict(zip(_CELL, cell, strict=True))
        rows += [
            {**own, "seed": int(seed), "value": value} for seed, value in values.items()
        ]
    return rows
