"""A function of one input with its epistemic and its total uncertainty."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from pyro_subnet.exceptions import DataError, OptionError
from pyro_subnet.plotting.style import BLUE, INK, SKY, Axes, array, frame, new_axes


def plot_regression(
    x: Tensor,
    outputs: Any,
    predictive: Any = None,
    *,
    data: tuple[Tensor, Tensor] | None = None,
    num_stddev: float = 2.0,
    ax: Axes | None = None,
) -> Axes:
    """Mean of a function of one input, with its epistemic and its total band.

    Args:
        x: Inputs, shape (N,) or (N, 1), in any order.
        outputs: Distribution of the function at each input, without noise, for the
            epistemic band: ``posterior.output_distribution(x)``, or a normal with the
            mean and standard deviation of draws.
        predictive: Distribution of y at each input, noise included, for the total band,
            such as ``posterior.predictive_distribution(x)``.
        data: Inputs and observations to show.
        num_stddev: Half the bands' width, in standard deviations.
        ax: Axes to draw on; None for new ones.

    Returns:
        The axes.

    Raises:
        DataError: If there are several inputs or outputs.
        OptionError: If ``num_stddev`` is not positive.
    """
    if not num_stddev > 0:
        raise OptionError(
            f"`num_stddev` must be positive; got {num_stddev}. Leave it out for 2."
        )
    at = _column("x", x, len(x))
    order = at.argsort(kind="stable")
    at, count = at[order], len(at)
    mean = _column("outputs", outputs.mean, count)[order]
    ax = new_axes(ax)
    if predictive is not None:
        own = _column("predictive", predictive.mean, count)[order]
        half = num_stddev * _column("predictive", predictive.stddev, count)[order]
        label = f"total, ±{num_stddev:g} sd"
        low, high = own - half, own + half
        ax.fill_between(at, low, high, color=SKY, alpha=0.25, lw=0, label=label)
        for edge in (low, high):
            ax.plot(at, edge, color=SKY, lw=1, ls="--")
    half = num_stddev * _column("outputs", outputs.stddev, count)[order]
    label = f"epistemic, ±{num_stddev:g} sd"
    low, high = mean - half, mean + half
    ax.fill_between(at, low, high, color=BLUE, alpha=0.35, lw=0, label=label)
    ax.plot(at, mean, color=BLUE, lw=2, label="mean")
    if data is not None:
        seen = _column("data", data[0], len(data[0]))
        value = _column("data", data[1], len(seen))
        ax.plot(seen, value, ".", color=INK, ms=5, label="data")
    frame(ax, "x", "y")
    ax.legend(frameon=False)
    return ax


def _column(name: str, values: Any, count: int) -> np.ndarray:
    """One number for each data point, shape (N,)."""
    found = array(values)
    if found.size != count or not count:
        raise DataError(
            f"`{name}` must have one number for each of {count} inputs, and one input "
            f"at least; got shape {found.shape}. Draw one input and one output at a "
            "time."
        )
    return found.reshape(count)
