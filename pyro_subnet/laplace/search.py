"""A bounded search over one positive number, which keeps a record of what it tried."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.exceptions import NonFiniteError, OptionError, PrecisionError
from pyro_subnet.options import as_number

# Points of the first pass, one and a half to a decade between the default bounds, and
# golden-section steps of the second, which leave 0.618^24, 1e-5, of the best interval.
_GRID = 19
_STEPS = 24
_GOLDEN = (math.sqrt(5) - 1) / 2
NUM_TRIED = _GRID + 2 + _STEPS
# Nats over which an objective must move for its minimum to mean anything.
_FLAT = 1e-3
# A scale that is this close to a bound, in logarithms, counts as being there.
AT_BOUND = 1e-3


@final
@dataclass(frozen=True, eq=False)
class Tuning:
    """How a scale was chosen.

    Attributes:
        method: ``"evidence"`` or ``"nll"``.
        scales: Every scale that was tried, in that order, shape (K,); with one for each
            site, shape (K, sites).
        objective: The objective at each, shape (K,): the log evidence in nats, or the
            mean negative log predictive density of a held-out data point; infinite
            where the posterior does not exist.
        best: The scale that was chosen, by the best objective or within the standard
            errors that were asked for; the geometric mean where each site has a scale.
        by_site: The scale of each site, where sites have their own.
        is_flat: Whether the objective moves by less than 0.001 nats between the bounds,
            so that the data do not choose, and the model's own scale stays.
        at_bound: Whether a chosen scale is one of the bounds: the best may lie outside.
    """

    method: str
    scales: Float[Tensor, "..."]
    objective: Float[Tensor, " tried"]
    best: float
    at_bound: bool
    by_site: Mapping[str, float] | None = None
    is_flat: bool = False

    def with_tried(self, scale: float, objective: float) -> Tuning:
        """The record with one more scale, and the choice as it was."""
        return replace(
            self,
            scales=torch.cat([self.scales, self.scales.new_tensor([scale])]),
            objective=torch.cat(
                [self.objective, self.objective.new_tensor([objective])]
            ),
        )


def minimize(
    loss: Callable[[float], float],
    bounds: tuple[float, float],
    method: str,
    sign: float = 1.0,
) -> Tuning:
    """Minimizes a function of one positive number, ``sign`` times which is recorded."""
    low, high = check_bounds(bounds)
    tried: list[tuple[float, float]] = []
    errors: list[PrecisionError | NonFiniteError] = []

    def at(log_scale: float) -> float:
        scale = math.exp(log_scale)
        try:
            value = loss(scale)
        except (PrecisionError, NonFiniteError) as error:
            # Such as a prior so wide that a rate overflows.
            errors.append(error)
            value = math.inf
        value = value if math.isfinite(value) else math.inf
        tried.append((scale, value))
        return value

    # In the logarithm: a grid over the bounds finds the best interval, so that local
    # minima wider than a step do no harm; golden sections shrink it.
    grid = torch.linspace(
        math.log(low), math.log(high), _GRID, dtype=torch.float64
    ).tolist()
    values = [at(point) for point in grid]
    best = min(range(_GRID), key=values.__getitem__)
    if not math.isfinite(values[best]):
        cause = errors[-1] if errors else None
        raise PrecisionError(
            "The objective must be finite at some scale between the bounds; got none "
            f"at {_GRID} scales from {low:g} to {high:g}. Train closer to the MAP, or "
            "choose other bounds."
        ) from cause
    finite = [value for value in values if math.isfinite(value)]
    is_flat = len(finite) == _GRID and max(finite) - min(finite) < _FLAT
    # What round-off calls the minimum is not taken: 1 is, or the bound next to it.
    if is_flat:
        at(min(max(0.0, grid[0]), grid[-1]))
        scale = tried[-1][0]
    else:
        _golden_section(at, grid[max(0, best - 1)], grid[min(_GRID - 1, best + 1)])
        scale = min(tried, key=lambda pair: pair[1])[0]
    scales, losses = zip(*tried, strict=True)
    return Tuning(
        method,
        torch.tensor(scales, dtype=torch.float64),
        sign * torch.tensor(losses, dtype=torch.float64),
        scale,
        _is_at_bound(scale, (low, high)),
        is_flat=is_flat,
    )


def _is_at_bound(scale: float, bounds: tuple[float, float]) -> bool:
    return any(abs(math.log(scale / edge)) < AT_BOUND for edge in bounds)


def nearest_to_own(
    tuning: Tuning,
    losses: Mapping[float, Float[Tensor, " data"]],
    weights: Float[Tensor, " data"],
    standard_errors: int | float,
    bounds: tuple[float, float],
) -> Tuning:
    r"""Returns the choice nearest the model's own scale that the data do not rule out.

    Scale s serves if it loses to the best one, t, by no more than k standard errors of
    the difference, which is taken data point by data point:

    .. math:: \bar d \le k\, \Big(\sum_n w_n^2 (d_n - \bar d)^2\Big)^{1/2} \Big/
        \sum_n w_n,\qquad d_n = \ell_n(s) - \ell_n(t)

    Source: Breiman et al. (1984), "Classification and regression trees", section 3.4.3,
    the rule of one standard error; departs from it in the errors of differences.
    """
    best, total = losses[tuning.best], weights.sum()

    def serves(scale: float) -> bool:
        worse = losses[scale] - best
        mean = (weights * worse).sum() / total
        error = (weights * (worse - mean)).square().sum().sqrt() / total
        return bool(mean <= standard_errors * error)

    scale = min(filter(serves, losses), key=lambda scale: abs(math.log(scale)))
    return replace(tuning, best=scale, at_bound=_is_at_bound(scale, bounds))


def check_bounds(bounds: tuple[float, float]) -> tuple[float, float]:
    """The bounds as floats; an error unless positive, finite and in order."""
    pair = isinstance(bounds, tuple | list) and len(bounds) == 2  # noqa: PLR2004
    low, high = (
        (as_number(bound, "bounds", "(1e-6, 1e6)") for bound in bounds)
        if pair
        else (math.nan, math.nan)
    )
    if not (math.isfinite(high) and 0 < low < high):
        raise OptionError(
            f"`bounds` must be positive, finite and in order; got {bounds}. Pass "
            "(1e-6, 1e6)."
        )
    return low, high


def _golden_section(at: Callable[[float], float], left: float, right: float) -> None:
    """Evaluates a function where a golden-section search for its minimum would.

    SciPy's bounded Brent would spare some of the evaluations, but SciPy, 110 MB, is no
    dependency of Pyro's or of ours.
    """
    inner = [right - _GOLDEN * (right - left), left + _GOLDEN * (right - left)]
    values = [at(point) for point in inner]
    for _ in range(_STEPS):
        if values[0] <= values[1]:
            right, inner[1], values[1] = inner[1], inner[0], values[0]
            inner[0] = right - _GOLDEN * (right - left)
            values[0] = at(inner[0])
        else:
            left, inner[0], values[0] = inner[0], inner[1], values[1]
            inner[1] = left + _GOLDEN * (right - left)
            values[1] = at(inner[1])
