"""What is compared: selectors at a size, and references over all weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pyro_subnet.selection import (
    GreedyVariance,
    LargestGradient,
    LargestMagnitude,
    LargestVariance,
    LastLayer,
    PredictiveVariance,
    RandomSubnet,
    SwagMoments,
)

# Makes the guide's `subnet=` of a size, a seed, and a way to have SGD's moments.
Choose = Callable[[float, int, Callable[[], SwagMoments]], Any]
MAP = "MAP"
FULL = "full, all weights"


@dataclass(frozen=True)
class Method:
    """One posterior.

    Attributes:
        choose: Makes its selector; None for every weight.
        covariance: The guide's option.
        sized: Whether it has a size to choose.
        most: The largest share at which it is run, where its cost forbids more.
    """

    choose: Choose | None = None
    covariance: Literal["full", "diag", "kron"] = "full"
    sized: bool = True
    most: float = 1.0


def _variance(estimator: Any) -> Method:
    return Method(lambda size, seed, moments: LargestVariance(size, estimator))


# Selectors that look at inputs look at those of the training data.
METHODS: dict[str, Method] = {
    "LargestVariance ggn": _variance("ggn"),
    "LargestVariance ef": _variance("ef"),
    "LargestVariance kfac": _variance("kfac"),
    "LargestVariance swag": Method(
        lambda size, seed, moments: LargestVariance(size, "swag", moments=moments())
    ),
    "LargestVariance ggn, alive": Method(
        lambda size, seed, moments: LargestVariance(size, keep_dead=False)
    ),
    "LargestGradient": Method(lambda size, seed, moments: LargestGradient(size)),
    "GreedyVariance": Method(
        lambda size, seed, moments: GreedyVariance(size), most=0.05
    ),
    "PredictiveVariance diagonal": Method(
        lambda size, seed, moments: PredictiveVariance(size, method="diagonal")
    ),
    "PredictiveVariance greedy": Method(
        lambda size, seed, moments: PredictiveVariance(size, method="greedy"), most=0.05
    ),
    "RandomSubnet": Method(lambda size, seed, moments: RandomSubnet(size, seed)),
    "LargestMagnitude": Method(lambda size, seed, moments: LargestMagnitude(size)),
    "LastLayer": Method(lambda size, seed, moments: LastLayer(), sized=False),
    FULL: Method(sized=False),
    "diag, all weights": Method(covariance="diag", sized=False),
    "kron, all weights": Method(covariance="kron", sized=False),
}
