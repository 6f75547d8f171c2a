"""What the pairs of runs say: how far apart, how much faster, which backend is best."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.engine.cases import Case, Work

Result = Mapping[str, Any]  # what `process.measure` saved
Values = Mapping[str, Tensor]

# The target of a case with this backend speaks of it, however fast its others are.
TARGETED = "100 steps"
PARTS = ("fit", "predict")


@dataclass(frozen=True)
class Ratio:
    """Medians over the pairs; ``ratio`` is the median of theirs over ours."""

    ours: float
    theirs: float
    ratio: float

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]]) -> Ratio:
        ours, theirs = zip(*pairs, strict=True)
        ratios = [theirs / ours for ours, theirs in pairs]
        return cls(*map(statistics.median, (ours, theirs, ratios)))


@dataclass(frozen=True)
class Row:
    """One backend beside ours.

    Attributes:
        backend: Its name.
        num_data: N of the fit and of the prediction.
        batches: Its batch sizes in the fit and in the prediction.
        parts: ``{"fit" or "predict": seconds}``.
        memory: GB beyond what the imports took.
        apart: Largest distance between the two sides' numbers.
        right: Whether they are as close as they must be.
        num_pairs: How many pairs the medians are of.
    """

    backend: str
    num_data: tuple[int, int]
    batches: tuple[int, int]
    parts: Mapping[str, Ratio]
    memory: Ratio
    apart: float
    right: bool
    num_pairs: int = 1


@dataclass(frozen=True)
class Failure:
    """A backend that gave no numbers, or ours, and why."""

    backend: str
    reason: str


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest entry; infinite if incomparable."""
    if ours.shape != theirs.shape:
        return math.inf
    found = float((ours - theirs).abs().max() / theirs.abs().max())
    return found if math.isfinite(found) else math.inf


def same_numbers(ours: Values, theirs: Values) -> float:
    """The largest :func:`relative` difference of all that the sides give."""
    return max(relative(ours[key], theirs[key]) for key in theirs)


def same_selection(ours: Values, theirs: Values) -> float:
    """Whether ours chose weights of largest variance, by their variances.

    Ties may be broken either way. Their variances are held against our precision at
    some random weights, so that both cannot be wrong together.
    """
    variance = theirs["variance"]
    if ours["probe"].max() >= len(variance):
        return math.inf
    threshold = variance.topk(len(ours["chosen"])).values[-1]
    below = float((threshold - variance[ours["chosen"]].min()) / threshold)
    values = relative(ours["precision"], 1 / variance[ours["probe"]])
    found = max(below, values, 0.0)
    return found if math.isfinite(found) else math.inf


def same_spread(ours: Values, theirs: Values) -> float:
    """Distance of the two maps of variances of draws, in the Frobenius norm.

    Even between right sides it is about sqrt(4 / draws): 6% at 1,000 draws.
    """
    found = float(
        torch.linalg.norm(ours["variance"] - theirs["variance"])
        / torch.linalg.norm(theirs["variance"])
    )
    return found if math.isfinite(found) else math.inf


DISTANCES: Mapping[Work, Callable[[Values, Values], float]] = {
    "fit-predict": same_numbers,
    "predict": same_numbers,
    "prior-tuning": same_numbers,
    "selection": same_selection,
    "draws": same_spread,
}


def compare(
    case: Case,
    backend: str,
    batches: tuple[int, int],
    pairs: Sequence[tuple[Result, Result]],
) -> Row:
    """A backend's row from its pairs of (our result, its result)."""
    distance = DISTANCES[case.work]
    apart = max(distance(ours["values"], theirs["values"]) for ours, theirs in pairs)
    parts = {
        part: Ratio.of(
            [(ours["seconds"][part], theirs["seconds"][part]) for ours, theirs in pairs]
        )
        for part in pairs[0][1]["seconds"]
    }
    memory = Ratio.of([(ours["memory"], theirs["memory"]) for ours, theirs in pairs])
    sizes = (case.num_data, case.num_predict)
    right = apart <= case.tolerance
    return Row(backend, sizes, batches, parts, memory, apart, right, len(pairs))


def best(rows: Iterable[Row | Failure], part: str) -> Row | None:
    """The row that the case's target is held against, if its numbers are right.

    Of the backends the fastest per observation, unless the target speaks of one.
    """
    index = 0 if part == "fit" else 1
    rows = list(rows)
    targeted = [row for row in rows if row.backend == TARGETED]
    right = [
        row
        for row in targeted or rows
        if isinstance(row, Row) and row.right and part in row.parts
    ]
    return min(
        right,
        key=lambda row: row.parts[part].theirs / row.num_data[index],
        default=None,
    )


def problem(case: Case, rows: Sequence[Row | Failure]) -> str | None:
    """What is wrong with a case as a whole; None if it can be relied on.

    One backend that is wrong or fails is its own fault. If none of those that were run
    agrees with ours, or ours itself fails, nothing vouches for our numbers.
    """
    for row in rows:
        if isinstance(row, Failure) and row.backend == "ours":
            return f"{case.name}: ours fails: {row.reason}"
    if not rows or any(isinstance(row, Row) and row.right for row in rows):
        return None
    return f"{case.name}: no backend agrees with ours"
