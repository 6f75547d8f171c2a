"""Tables and pictures of image experiments."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.harness.looks import look
from benchmarks.harness.reporting import mean_and_error, saved
from benchmarks.harness.task import Row
from benchmarks.paper.images.case import (
    BY_EVIDENCE,
    CURVE,
    ON_SHIFT,
    OWN_PRIOR,
    WITHIN_ERRORS,
    at_temperature,
)
from benchmarks.paper.images.methods import DEFAULT, METHODS, SIZED, SIZES
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
    BY_EVIDENCE: BY_EVIDENCE,
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
    "ELLA",
    DEFAULT,
    "subnet LargestVariance",
    "subnet RandomSubnet",
    "subnet LastLayer",
    "subnet PredictiveVariance",
    "diagonal Laplace",
    "ensemble of subnets (PredictiveVariance)",
)


# Drawn alike: where there are both it is the latter.
_SMALL = "subnet PredictiveVariance", DEFAULT


class Column(NamedTuple):
    """A number of each method.

    Attributes:
        shift: Shifts to average over; ``*`` stands for anything.
        metric: It.
        to_map: Whether to show the difference from the MAP, seed by seed.
        to_temperature: Whether to show the difference from one temperature of the MAP
            that costs as much in distribution, seed by seed.
    """

    shift: str
    metric: str
    to_map: bool = False
    to_temperature: bool = False

    @property
    def head(self) -> str:
        words = self.shift.replace("=*", "").replace("*", "all").replace("=", " ")
        to = ", to MAP" if self.to_map else ""
        to = ", to a temperature of its price" if self.to_temperature else to
        return f"{self.metric} {words}".strip() + to


def means(rows: Sequence[Row], method: str, column: Column) -> dict[int, float]:
    """A method's mean over the shifts by seed, whatever it is compared with."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if (row["method"], row["metric"]) == (method, column.metric):
            if fnmatchcase(row["shift"], column.shift):
                found.setdefault(row["seed"], []).append(row["value"])
    return {seed: statistics.fmean(found[seed]) for seed in sorted(found)}


def by_seed(rows: Sequence[Row], method: str, column: Column) -> list[float]:
    """A method's mean over the shifts, of each seed, or its difference as told."""
    if column.to_temperature:
        return _to_temperature(rows, method, column.shift)
    own = means(rows, method, column)
    if not column.to_map:
        return list(own.values())
    base = means(rows, _BASE, column)
    if not own.keys() <= base.keys():
        return []
    return [mean - base[seed] for seed, mean in own.items()]


def has_curve(rows: Sequence[Row]) -> bool:
    """Whether the MAP was scored at temperatures."""
    return any(row["metric"] == at_temperature(CURVE[0]) for row in rows)


def _to_temperature(rows: Sequence[Row], method: str, shift: str) -> list[float]:
    """NLL under shift, less that of the MAP at the temperature of the same price."""
    differences = []
    for seed in sorted({row["seed"] for row in rows if row["method"] == method}):
        own = [row for row in rows if row["seed"] == seed]
        inside = by_seed(own, method, Column("", "nll"))
        shifted = by_seed(own, method, Column(shift, "nll"))
        curve = [
            (
                *by_seed(own, _BASE, Column("", name)),
                *by_seed(own, _BASE, Column(shift, name)),
            )
            for name in map(at_temperature, CURVE)
        ]
        if not inside or not shifted or any(len(point) != 2 for point in curve):
            return []
        differences.append(shifted[0] - _at_price(curve, inside[0]))
    return differences


def _at_price(curve: Sequence[tuple[float, ...]], price: float) -> float:
    """NLL under shift where the curve, by rising temperature, last has this price."""
    # In distribution a temperature first helps and then costs.
    for (inside, shifted), (above, further) in reversed([*pairwise(curve)]):
        if inside <= price < above:
            share = (price - inside) / (above - inside)
            return shifted + share * (further - shifted)
    # It costs more than all of them, or is better in distribution than any.
    if price >= curve[-1][0]:
        return curve[-1][1]
    return min(curve)[1]


def cell(rows: Sequence[Row], method: str, column: Column) -> str:
    """Mean and standard error: over seeds, or over images where there is one seed."""
    values = by_seed(rows, method, column)
    if column.to_temperature:
        return mean_and_error(values)
    error = "gain_error" if column.to_map else f"{column.metric}_error"
    # Of several shifts of the same images, as if all moved together.
    errors = by_seed(rows, method, Column(column.shift, error))
    if len(values) == 1 and errors:
        return f"{values[0]:.3f} ± {errors[0]:.3f}"
    return mean_and_error(values)


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
            cell(part.rows, method, column) for part in parts for column in part.columns
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
            if base == _SMALL[0] and f"{_SMALL[1]}{end}" in found:
                continue
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
