"""Tables and pictures of image experiments."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.harness.looks import look
from benchmarks.harness.reporting import mean_and_error, saved
from benchmarks.harness.task import Row
from benchmarks.paper.images.case import ON_SHIFT, OWN_PRIOR, WITHIN_ERRORS
from benchmarks.paper.images.methods import METHODS, SIZED, SIZES
from pyro_subnet.plotting.style import frame

# Mean and standard error of a method at each position.
Lines = dict[str, list[tuple[float, float, float]]]
_BASE = "MAP"
# Tuned by nothing, and shown beside whatever is.
_UNTUNED = (_BASE, "deep ensemble")
# How titles of tables and names of methods tell ways of tuning apart.
_ENDS = {
    "": "",
    ", prior of the MAP": OWN_PRIOR,
    ", prior of the MAP within two errors": WITHIN_ERRORS,
    ON_SHIFT: ON_SHIFT,
}
_PANELS = {
    "tuned on images like those trained on": "",
    "not tuned: the prior of the MAP": OWN_PRIOR,
    "tuned on images turned a little": ON_SHIFT,
}
# Methods that pictures tell apart; the other subnets lie among these.
_DRAWN = (
    "MAP",
    "MAP with temperature",
    "deep ensemble",
    "MC dropout",
    "SWAG",
    "subnet LargestVariance",
    "subnet LargestVariance (alive)",
    "subnet RandomSubnet",
    "subnet LastLayer",
    "subnet PredictiveVariance",
    "diagonal Laplace",
    "ensemble of subnets (PredictiveVariance)",
)


class Column(NamedTuple):
    """A number of each method.

    Attributes:
        shift: Shifts to average over; ``*`` stands for anything.
        metric: It.
        to_map: Whether to show the difference from the MAP, seed by seed.
    """

    shift: str
    metric: str
    to_map: bool = False

    @property
    def head(self) -> str:
        words = self.shift.replace("=*", "").replace("*", "all").replace("=", " ")
        return f"{self.metric} {words}".strip() + (", to MAP" if self.to_map else "")


def by_seed(rows: Sequence[Row], method: str, column: Column) -> list[float]:
    """A method's mean over the shifts, of each seed."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if (row["method"], row["metric"]) == (method, column.metric):
            if fnmatchcase(row["shift"], column.shift):
                found.setdefault(row["seed"], []).append(row["value"])
    means = {seed: statistics.fmean(found[seed]) for seed in sorted(found)}
    if not column.to_map:
        return list(means.values())
    own = [row for row in rows if row["seed"] in means]
    base = by_seed(own, _BASE, column._replace(to_map=False))
    if len(base) != len(means):
        return []
    return [mean - other for mean, other in zip(means.values(), base, strict=True)]


def methods_of(rows: Sequence[Row]) -> list[str]:
    """In the order of the table of methods."""
    there = {row["method"] for row in rows}
    order = [f"{name}{end}" for end in _ENDS.values() for name in METHODS]
    return [name for name in order if name in there]


def groups(methods: Sequence[str]) -> dict[str, list[str]]:
    """Methods by how they are tuned, each with the two that are not."""
    sized = {f"{name}{ON_SHIFT}" for name in SIZES}
    usual = {f"{name}{ON_SHIFT}" for name in SIZED}
    found = {
        words: [
            name
            for name in methods
            if name in _UNTUNED or (_suffix(name) == suffix and name not in sized)
        ]
        for words, suffix in _ENDS.items()
    }
    if sized & set(methods):
        sizes = [name for name in methods if name in sized | usual]
        found[f"{ON_SHIFT}, by size"] = [_BASE, *sizes]
    return {words: names for words, names in found.items() if set(names) - {*_UNTUNED}}


def _suffix(method: str) -> str:
    return next((end for end in _ENDS.values() if end and method.endswith(end)), "")


class Block(NamedTuple):
    """Columns of a table, all of one data set.

    Attributes:
        head: What each column is headed by first.
        columns: Of the table.
        rows: Of the data set.
    """

    head: str
    columns: Sequence[Column]
    rows: Sequence[Row]


def table(title: str, columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """A table for each way of tuning."""
    return side_by_side(title, [Block("", columns, rows)])


def side_by_side(title: str, parts: Sequence[Block]) -> str:
    """The same of several data sets, in the same rows."""
    methods = methods_of([row for part in parts for row in part.rows])
    return "\n\n".join(
        _table(f"{title}{words}", names, parts)
        for words, names in groups(methods).items()
    )


def _table(title: str, methods: Sequence[str], parts: Sequence[Block]) -> str:
    """Mean and standard error over seeds, in Markdown; how many, where not all."""
    seeds = [len({row["seed"] for row in part.rows}) for part in parts]
    heads = [f"{part.head} {column.head}" for part in parts for column in part.columns]
    found = [["method", *(head.strip() for head in heads)]]
    found.append(["---"] * len(found[0]))
    for method in methods:
        own = [
            len({row["seed"] for row in part.rows if row["method"] == method})
            for part in parts
        ]
        name = method.removesuffix(_suffix(method))
        if own != seeds:
            counts = ", ".join(map(str, sorted(set(own))))
            name = f"{name} ({counts} of {max(seeds)} seeds)"
        cells = [
            mean_and_error(by_seed(part.rows, method, column))
            for part in parts
            for column in part.columns
        ]
        found.append([name, *cells])
    heading = f"**{title}** ({max(seeds)} seed{'s' if max(seeds) > 1 else ''})"
    return "\n".join([heading, "", *("| " + " | ".join(row) + " |" for row in found)])


def lines(
    rows: Sequence[Row], positions: Sequence[tuple[float, str]], metric: str = "nll"
) -> Lines:
    """What a picture draws: mean and error of each method at each position."""
    found: Lines = {}
    for method in methods_of(rows):
        for position, shift in positions:
            values = by_seed(rows, method, Column(shift, metric))
            if values:
                spread = statistics.stdev(values) if values[1:] else 0.0
                point = statistics.fmean(values), spread / len(values) ** 0.5
                found.setdefault(method, []).append((position, *point))
    return found


def picture(found: Lines, path: Path, label: str) -> str:
    """Draws NLL by position, and names the picture.

    A panel for each way of tuning that there is; what is not tuned is in all of them.
    """
    panels = {
        title: end
        for title, end in _PANELS.items()
        if not end or any(f"{base}{end}" in found for base in _DRAWN)
    }
    size = 1 + 4.2 * len(panels), 5
    figure = Figure(figsize=size, layout="constrained")
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    handles = {}
    for axes, (title, end) in zip(row, panels.items(), strict=True):
        for base in _DRAWN:
            method = base if base in _UNTUNED else f"{base}{end}"
            if method in found:
                at, means, errors = zip(*found[method], strict=True)
                handles[base] = axes.errorbar(at, means, errors, **look(base))
        axes.set_title(title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        frame(axes, label, "NLL, nats")
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=8,
    )
    return saved(row, path, f"NLL of each method by {label}")
