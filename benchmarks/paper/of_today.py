"""The library's default beside ELLA and VaLLA under shift: gains, and seconds."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from benchmarks.harness.digest import SECONDS
from benchmarks.harness.reporting import Cell, Found, collected, estimate, shown, table
from benchmarks.harness.task import Row
from benchmarks.paper import uci
from benchmarks.paper.images.case import OWN_PRIOR
from benchmarks.paper.images.methods import DEFAULT
from benchmarks.paper.images.reporting import Column, means
from benchmarks.paper.regression import RIVALS
from benchmarks.paper.toy_report import at
from benchmarks.paper.uci_report import SHORT, cell, sets_of

IMAGES = {"mnist": "MNIST", "fashion": "FashionMNIST"}
_OURS = "default"


class _Line(NamedTuple):
    """A line of the table: numbers of ours and of each rival, by seed or split.

    Attributes:
        head: What is predicted.
        losses: NLL, nats.
        seconds: Of the processor.
    """

    head: str
    losses: Mapping[str, Mapping[int, float]]
    seconds: Mapping[str, Mapping[int, float]]

    def gain(self, rival: str) -> str:
        """Of ours on a rival, on the seeds that have both; of one without an error."""
        own, other = self.losses[_OURS], self.losses[rival]
        gains = [other[seed] - own[seed] for seed in own if seed in other]
        if len(gains) == 1:
            return f"{gains[0]:+.3f}"
        return shown(estimate(gains), sign=True)

    def median(self, name: str) -> str:
        values = self.seconds[name].values()
        return f"{statistics.median(values):.3g}" if values else "-"


def report(rows: Mapping[str, Sequence[Row]]) -> str:
    """One table; none where no rival was run.

    Args:
        rows: Of each experiment, by its name.

    Returns:
        The table, in Markdown.
    """
    lines = [*_toy(rows), *_uci(rows), *_images(rows)]
    cells = [
        [line.head, *map(line.gain, RIVALS), *map(line.median, (_OURS, *RIVALS))]
        for line in lines
        if any(line.losses[name] for name in RIVALS)
    ]
    if not cells:
        return ""
    heads = ["NLL of", *(f"gain on {name}" for name in RIVALS)]
    heads += [f"seconds, {name}" for name in (_OURS, *RIVALS)]
    return table("What the default gains on ELLA and VaLLA under shift", heads, cells)


def _toy(rows: Mapping[str, Sequence[Row]]) -> Iterator[_Line]:
    found = collected(rows.get("toy", ()))
    own = at("2x50 tanh", "subnet PredictiveVariance, greedy 5.0%", "gap", "nll")
    yield _of_regression("one-dimensional toy, in the gap", found, own, 1)


def _uci(rows: Mapping[str, Sequence[Row]]) -> Iterator[_Line]:
    found = collected(rows.get("uci", ()))
    for name in sets_of(found, "gap"):
        own = cell(name, "gap", uci.ENDS[1], f"{uci.DEFAULT}{uci.OWN_PRIOR}")
        # Its metric is the log likelihood.
        yield _of_regression(f"{SHORT.get(name, name)}, gap splits", found, own, -1)


def _of_regression(head: str, found: Found, own: Cell, sign: int) -> _Line:
    cells = {_OURS: own} | {name: own._replace(method=name) for name in RIVALS}
    losses = {
        name: {seed: sign * value for seed, value in found.get(each, {}).items()}
        for name, each in cells.items()
    }
    seconds = {
        name: found.get(each._replace(shift="", metric=SECONDS), {})
        for name, each in cells.items()
    }
    return _Line(head, losses, seconds)


def _images(rows: Mapping[str, Sequence[Row]]) -> Iterator[_Line]:
    """Under the prior that the network was trained with; VaLLA learns its own."""
    methods = {_OURS: f"{DEFAULT}{OWN_PRIOR}", "ELLA": f"ELLA{OWN_PRIOR}"}
    methods |= {name: name for name in RIVALS if name not in methods}
    for dataset, title in IMAGES.items():
        own = [row for row in rows.get("rotated", ()) if row["dataset"] == dataset]
        columns = Column("rotation=*", "nll"), Column("", "seconds_fit")
        losses, seconds = (
            {name: means(own, each, column) for name, each in methods.items()}
            for column in columns
        )
        yield _Line(f"{title}, turned by 0 to 180 degrees", losses, seconds)
