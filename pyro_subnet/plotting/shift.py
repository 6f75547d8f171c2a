"""Scores as inputs move away from the training data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from pyro_subnet.exceptions import DataError, OptionError
from pyro_subnet.plotting.style import (
    REFERENCE,
    Axes,
    array,
    frame,
    new_row,
    strokes_of,
)

_MAX_TICKS = 7


def plot_shift_curves(
    shifts: Sequence[float] | Tensor,
    scores: Mapping[str, Mapping[str, Any]],
    *,
    references: Mapping[str, float] | None = None,
    reference_label: str = "blind guess",
    xlabel: str = "rotation (degrees)",
    axes: Iterable[Axes] | None = None,
) -> np.ndarray:
    """Scores against the size of a shift: a panel for each score, a curve a method.

    Args:
        shifts: Sizes of the shift, such as degrees of rotation, shape (L,).
        scores: ``{score with its unit: {method: values}}``, such as ``{"NLL (nats)":
            {"MAP": ..., "subnet": ...}}``. Values have shape (L,), or (R, L) for R
            runs: the line is then their mean, the band a standard error either way.
        references: ``{score: value}`` of a level to compare curves with.
        reference_label: Label of that level.
        xlabel: Label of the shift, with its unit.
        axes: Axes to draw on, one a score; None for new ones.

    Returns:
        The axes, shape (scores,).

    Raises:
        DataError: If a score does not have one value for each shift.
        OptionError: If there is no score, if the number of axes differs, or if a
            reference belongs to no score.
    """
    levels = dict(references or {})
    if not scores or not set(levels) <= set(scores):
        raise OptionError(
            "`scores` must hold one score at least, and each of `references`; got "
            f"{list(scores)} and {list(levels)}. Name references as the scores."
        )
    at = array(shifts)
    panels = new_row(axes, len(scores), "score", (4.0, 3.2))
    # A method looks the same in every panel, even where others are missing.
    looks = strokes_of(m for by_method in scores.values() for m in by_method)
    for ax, (score, by_method) in zip(panels, scores.items(), strict=True):
        if score in levels:
            ax.axhline(levels[score], color=REFERENCE, ls=":", label=reference_label)
        for method, values in by_method.items():
            runs = _runs(score, method, values, len(at))
            mean, look = runs.mean(0), looks[method]
            ax.plot(at, mean, label=method, **look.options())
            if len(runs) > 1:
                error = runs.std(0, ddof=1) / len(runs) ** 0.5
                low, high = mean - error, mean + error
                ax.fill_between(at, low, high, color=look.color, alpha=0.2, lw=0)
        frame(ax, xlabel, score)
        ax.set_xticks(at[:: math.ceil(len(at) / _MAX_TICKS)])
    # One legend for all panels.
    entries = {
        label: handle
        for ax in panels
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    panels[0].legend(entries.values(), entries.keys(), frameon=False)
    return np.array(panels, dtype=object)


def _runs(score: str, method: str, values: Any, count: int) -> np.ndarray:
    """Values of a score, a row for each run, shape (R, L)."""
    found = np.atleast_2d(array(values))
    if found.ndim != 2 or found.shape[1] != count or not found.size:  # noqa: PLR2004
        raise DataError(
            f"Values of {score!r} for {method!r} must have shape ({count},), or (runs, "
            f"{count}), for {count} shifts; got {tuple(array(values).shape)}. Score "
            "every shift."
        )
    return found
