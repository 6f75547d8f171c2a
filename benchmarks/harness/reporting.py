"""What tables and pictures are made of: estimates over seeds, Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt

from benchmarks.harness.task import Row
from pyro_subnet.plotting.style import Axes

# Differences of NLL, in nats, that count as none when wins are counted.
TIE = 0.01
# A held-out NLL that moves by less, in nats, over all scales tried says nothing.
FLAT = 1e-3
_DOTS = 160  # an inch of a picture: two for one of a page


class Cell(NamedTuple):
    """What a number is of."""

    dataset: str
    variant: str
    method: str
    shift: str
    metric: str


Found = dict[Cell, dict[int, float]]  # by seed


def collected(rows: Iterable[Row]) -> Found:
    """Values by seed of each cell."""
    found: Found = {}
    for row in rows:
        cell = Cell(*(row[part] for part in Cell._fields))
        found.setdefault(cell, {})[row["seed"]] = row["value"]
    return found


def differences(found: Found, cell: Cell, base: Cell) -> list[float]:
    """One less the other, on each seed that has both."""
    own, other = found.get(cell, {}), found.get(base, {})
    return [own[seed] - other[seed] for seed in sorted(own) if seed in other]


class Estimate(NamedTuple):
    """A mean, and its standard error; 0 of one value."""

    mean: float
    error: float

    def text(self, digits: int = 3, sign: bool = False) -> str:
        number = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return f"{number} ± {self.error:.{digits}f}"


def estimate(values: Sequence[float]) -> Estimate | None:
    """Over seeds; None of no values."""
    if not values:
        return None
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return Estimate(statistics.fmean(values), spread / len(values) ** 0.5)


def mean_and_error(values: Iterable[float]) -> str:
    """Mean, and its standard error where there are two or more."""
    found = list(values)
    if not found:
        return "-"
    mean = statistics.fmean(found)
    if len(found) < 2:
        return f"{mean:.3g}"
    error = statistics.stdev(found) / len(found) ** 0.5
    digits = 1 if abs(mean) >= 100 else 2 if abs(mean) >= 10 else 3
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def pooled(groups: Iterable[Sequence[float]]) -> Estimate | None:
    """Over sets, each of which counts as one value: the mean of its own."""
    return estimate([statistics.fmean(group) for group in groups if group])


def without_largest(groups: Iterable[Sequence[float]]) -> Estimate | None:
    """The same without the set whose mean is furthest from zero."""
    there = [group for group in groups if group]
    return pooled(sorted(there, key=lambda group: abs(statistics.fmean(group)))[:-1])


def counts(values: Sequence[float]) -> str:
    """How many gain, are the same to 0.01, lose."""
    more = sum(value > TIE for value in values)
    less = sum(value < -TIE for value in values)
    return f"{more} / {len(values) - more - less} / {less}"


def shown(value: Estimate | None, digits: int = 3, sign: bool = False) -> str:
    return "-" if value is None else value.text(digits, sign)


def table(title: str, heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join([f"**{title}**", "", *("| " + " | ".join(r) + " |" for r in rows)])


def by_dataset(
    found: Found, method: str, metrics: Iterable[str]
) -> Iterator[list[str]]:
    """A line for each data set: its name, and each metric of one method."""
    columns = list(metrics)
    for name in dict.fromkeys(cell.dataset for cell in found):
        cells = (found[Cell(name, "", method, "", metric)] for metric in columns)
        yield [name, *(mean_and_error(cell.values()) for cell in cells)]


def saved(panels: Sequence[Axes], path: Path, alternative: str) -> str:
    """Writes the figure of some axes, and shows it in Markdown, with a text for it."""
    figure = panels[0].figure
    figure.savefig(path, dpi=_DOTS)
    plt.close(figure)
    return f"![{alternative}]({path.name})"


def legend_below(panels: Sequence[Axes], **options: object) -> None:
    """The first panel's, outside: within the panels it would hide points."""
    panels[0].figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        frameon=False,
        fontsize=8,
        **options,
    )
