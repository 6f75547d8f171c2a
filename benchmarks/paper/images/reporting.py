"""Tables and pictures of image experiments."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl

from benchmarks.paper.images.methods import METHODS, ON_SHIFT
from benchmarks.paper.task import Row
from benchmarks.selectors.report import mean_and_error

mpl.use("Agg")
from matplotlib import pyplot as plt

# Mean and standard error of a method at each position.
Lines = dict[str, list[tuple[float, float, float]]]
# Methods of the pictures, which tell no more than these apart.
_DRAWN = (
    "MAP",
    "deep ensemble",
    "MC dropout",
    "SWAG",
    "subnet LargestVariance",
    "subnet LargestVariance, tuned on shift",
    "subnet LastLayer, tuned on shift",
    "MAP with temperature, tuned on shift",
)


class Table(NamedTuple):
    """What a table shows.

    Attributes:
        title: Above it.
        columns: Shift, in which ``*`` stands for any, and metric.
    """

    title: str
    columns: list[tuple[str, str]]


def by_seed(rows: Sequence[Row], method: str, shift: str, metric: str) -> list[float]:
    """A method's mean over the shifts that fit, of each seed."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if (row["method"], row["metric"]) == (method, metric):
            if fnmatchcase(row["shift"], shift):
                found.setdefault(row["seed"], []).append(row["value"])
    return [statistics.fmean(found[seed]) for seed in sorted(found)]


def methods_of(rows: Sequence[Row]) -> list[str]:
    """In the order of the table of methods."""
    there = {row["method"] for row in rows}
    order = [*METHODS, *(f"{name}{ON_SHIFT}" for name in METHODS)]
    return [name for name in order if name in there]


def tables(table: Table, rows: Sequence[Row]) -> str:
    """Mean and standard error over seeds, in Markdown."""
    heads = [f"{metric} {_words(shift)}".strip() for shift, metric in table.columns]
    found = [["method", *heads], ["---"] * (1 + len(heads))]
    for method in methods_of(rows):
        cells = [mean_and_error(by_seed(rows, method, *one)) for one in table.columns]
        found.append([method, *cells])
    seeds = len({row["seed"] for row in rows})
    title = f"**{table.title}** ({seeds} seed{'s' if seeds > 1 else ''})"
    return "\n".join([title, "", *("| " + " | ".join(row) + " |" for row in found)])


def lines(
    rows: Sequence[Row], positions: Sequence[tuple[float, str]], metric: str
) -> Lines:
    """What a picture draws."""
    found: Lines = {}
    for method in methods_of(rows):
        for position, shift in positions:
            values = by_seed(rows, method, shift, metric)
            if values:
                error = (
                    statistics.stdev(values) / len(values) ** 0.5 if values[1:] else 0
                )
                point = (position, statistics.fmean(values), error)
                found.setdefault(method, []).append(point)
    return found


def picture(found: Lines, path: Path, label: str) -> str:
    """Draws NLL by position, and names the picture."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for method in (name for name in _DRAWN if name in found):
        at, means, errors = zip(*found[method], strict=True)
        style = "--" if method.endswith(ON_SHIFT) else "-"
        axes.errorbar(at, means, errors, label=method, linestyle=style, capsize=2)
    axes.set(xlabel=label, ylabel="NLL, nats")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return f"![NLL]({path.name})"


def _words(shift: str) -> str:
    return shift.replace("=*", "").replace("*", "all").replace("=", " ")
