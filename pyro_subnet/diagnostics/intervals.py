r"""Calibration and sharpness of predictions of a number.

"Sharpness subject to calibration": intervals must cover as often as they promise, and
then the narrower the better. A :math:`1 - \alpha` central interval holds y exactly if
its PIT value u has :math:`|2u - 1| \le 1 - \alpha`, so coverage needs no quantiles.

Source: Gneiting, Balabdaoui and Raftery (2007), doi 10.1111/j.1467-9868.2007.00587.x.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributions as td
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.diagnostics.probabilities import check_draws, tensors_of
from pyro_subnet.exceptions import DataError, NonFiniteError, OptionError, shown
from pyro_subnet.options import as_number

_WIDEN, _HALVE = 60, 200  # more steps than any interval with finite ends takes


def pit_values(predictive: Any, y: Float[Tensor, "*data"]) -> Float[Tensor, "*data"]:
    r"""Probability integral transform, :math:`u_n = F_n(y_n)`.

    The values are uniform on [0, 1] if the predictions are calibrated. They heap up in
    the middle if predictions are too wide, at the ends if too narrow. Each of several
    outputs counts by itself.

    Args:
        predictive: Continuous distribution of y at each input, batch shape (N,).
        y: Observations, shape (N, ...).

    Returns:
        Shape of y, in [0, 1].

    Raises:
        DataError: If the distribution has no distribution function, or y another shape
            or NaN.

    Source: Dawid (1984), doi 10.2307/2981683.
    """
    (y,) = tensors_of(y=y)
    marginal = _marginal(predictive)
    shape = tuple(marginal.batch_shape)
    if shape != tuple(y.shape) or not y.numel():
        raise DataError(
            f"`y` must have the shape of the predictions, {shape}, and hold at "
            f"least one observation; got {tuple(y.shape)}. Pass both for the same data."
        )
    _check_no_nan("y", y)
    found = _cdf(marginal, y)
    # Mixtures sum weights, which may pass one by round-off.
    return found.clamp(0.0, 1.0)


def pit_from_draws(
    draws: Float[Tensor, " draws *data"], y: Float[Tensor, "*data"]
) -> Float[Tensor, "*data"]:
    """Probability integral transform from draws: the share below the observation.

    Args:
        draws: Of the predictive distribution, noise included, shape (K, N, ...).
        y: Observations, shape (N, ...).

    Returns:
        Shape of y; draws equal to y count half.

    Raises:
        DataError: If draws and observations are of different data, there is none, or
            one is NaN.
    """
    draws, y = tensors_of(draws=draws, y=y)
    check_draws(draws, y)
    _check_no_nan("draws", draws)
    _check_no_nan("y", y)
    return ((draws < y).to(y) + 0.5 * (draws == y).to(y)).mean(0)


def interval_coverage(
    pit: Float[Tensor, "*shape"], levels: Sequence[float]
) -> Float[Tensor, " levels"]:
    """Share of observations inside the central interval of each level.

    Args:
        pit: PIT values, any shape.
        levels: Probabilities that the intervals promise, in [0, 1].

    Returns:
        One share for each level. For calibrated predictions it is the level itself,
        with a standard error of ``(level * (1 - level) / N) ** 0.5``.

    Raises:
        OptionError: If a level is outside [0, 1].
        DataError: If a PIT value is outside [0, 1], or there is none.
    """
    levels = _checked(levels)
    (pit,) = tensors_of(pit=pit)
    outside = ~((pit >= 0) & (pit <= 1))
    if not pit.numel() or bool(outside.any()):
        raise DataError(
            f"`pit` must hold values in [0, 1], one at least; got {pit.numel()} values,"
            f" of which {int(outside.sum())} are outside. Pass what `pit_values` gives."
        )
    centred = (2 * pit.flatten() - 1).abs()
    wanted = torch.tensor(levels, dtype=pit.dtype, device=pit.device)
    return (centred <= wanted.unsqueeze(-1)).to(pit).mean(-1)


def mean_interval_width(predictive: Any, levels: Sequence[float]) -> Tensor:
    """Sharpness: mean width of the central interval of each level.

    Args:
        predictive: Continuous distribution of y at each input.
        levels: Probabilities that the intervals promise, in [0, 1).

    Returns:
        One width for each level, in units of y: the mean over inputs and outputs. It is
        found by bisection if the distribution has no quantile function.

    Raises:
        OptionError: If a level is outside [0, 1).
        DataError: If the distribution has no distribution function.
        NonFiniteError: If no finite interval holds a level.
    """
    levels = _checked(levels, below_one=True)
    marginal = _marginal(predictive)
    widths = [
        quantile(marginal, 0.5 + level / 2) - quantile(marginal, 0.5 - level / 2)
        for level in levels
    ]
    return torch.stack([width.mean() for width in widths])


def quantile(predictive: Any, level: float) -> Tensor:
    """Quantile of each prediction.

    Args:
        predictive: Continuous distribution of y at each input.
        level: In (0, 1).

    Returns:
        Shape (N, ...).

    Raises:
        OptionError: If the level is outside (0, 1).
        DataError: If the distribution has no distribution function.
        NonFiniteError: If the quantile is not finite.
    """
    level = as_number(level, "level", "0.5 for the median")
    if not 0 < level < 1:
        raise OptionError(
            f"`level` must be in (0, 1); got {level}. Pass 0.5 for the median."
        )
    marginal = _marginal(predictive)
    wanted = torch.full_like(marginal.mean, level)
    try:
        return marginal.icdf(wanted)
    except NotImplementedError:
        return _bisected(marginal, wanted)


def _bisected(marginal: Any, wanted: Tensor) -> Tensor:
    """Quantiles by bisection, from an interval that is doubled until it holds them."""
    centre, width = marginal.mean, marginal.stddev
    low, high = centre - width, centre + width
    unbounded = ~(low.isfinite() & high.isfinite())
    for _ in range(_WIDEN):
        if bool(unbounded.any()):
            break
        too_high, too_low = _cdf(marginal, low) > wanted, _cdf(marginal, high) < wanted
        if not bool((too_high | too_low).any()):
            break
        width = 2 * width
        low = torch.where(too_high, centre - width, low)
        high = torch.where(too_low, centre + width, high)
    else:
        unbounded = too_high | too_low
    if bool(unbounded.any()):
        raise NonFiniteError(
            f"A quantile must be finite; got none for {int(unbounded.sum())} of "
            f"{unbounded.numel()} predictions. Check that their mean and scale are "
            "finite."
        )
    for _ in range(_HALVE):
        middle = 0.5 * (low + high)
        if bool(((middle == low) | (middle == high)).all()):
            break
        below = _cdf(marginal, middle) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return 0.5 * (low + high)


def _cdf(marginal: Any, value: Tensor) -> Tensor:
    """Distribution function, 0 and 1 outside the support, where torch has none."""
    centre = marginal.mean
    try:
        inside = marginal.support.check(value) | value.isnan()
    except NotImplementedError:  # of a distribution that names no support
        return torch.as_tensor(marginal.cdf(value))
    within = marginal.cdf(torch.where(inside, value, centre))
    return torch.where(inside, within, (value > centre).to(within))


def _check_no_nan(name: str, values: Tensor) -> None:
    bad = int(values.isnan().sum())
    if bad:
        raise DataError(
            f"`{name}` must not be NaN; got {bad} NaN of {values.numel()} values. "
            "Leave out what is missing."
        )


def _has_cdf(predictive: Any) -> bool:
    """Whether a distribution has a distribution function, and not only a method."""
    if isinstance(predictive, td.MixtureSameFamily):
        return _has_cdf(predictive.component_distribution)
    if isinstance(predictive, td.Independent | td.TransformedDistribution):
        return _has_cdf(predictive.base_dist)
    return type(predictive).cdf is not td.Distribution.cdf


def _marginal(predictive: Any) -> Any:
    """Each output's own distribution, with event dimensions moved into the batch."""
    while isinstance(predictive, td.Independent):
        predictive = predictive.base_dist
    if isinstance(predictive, td.MultivariateNormal):
        return td.Normal(predictive.mean, predictive.stddev)
    if not isinstance(predictive, td.Distribution):
        raise DataError(
            "`predictive` must be a distribution; got "
            f"{shown(predictive)}. Pass what `predictive_distribution` gives."
        )
    if not _has_cdf(predictive) or tuple(predictive.event_shape):
        raise DataError(
            "`predictive` must be a continuous distribution of a number with a "
            f"distribution function; got {type(predictive).__name__} of event shape "
            f"{tuple(predictive.event_shape)}. Draw from it and use `pit_from_draws`."
        )
    return predictive


def _checked(levels: Any, *, below_one: bool = False) -> list[float]:
    """Levels as numbers; refuses what are no probabilities."""
    top, given = "1)" if below_one else "1]", levels
    if isinstance(levels, str) or not isinstance(levels, Iterable):
        given = []
    elif not isinstance(levels, Sequence):
        given = list(levels)  # as of an array
    way = "0.9, say"
    found = [as_number(level, "levels", way) for level in given]
    if not found or any(
        not 0 <= level <= 1 or (below_one and level == 1) for level in found
    ):
        raise OptionError(
            f"`levels` must be probabilities in [0, {top}, one at least; got "
            f"{shown(levels)}. Pass, for example, [0.5, 0.9]."
        )
    return found
