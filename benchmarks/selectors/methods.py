"""What is compared: selectors at three sizes, and references over all weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.selectors.candidates import Beyond, HalfAndHalf, WholeUnits
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
MAP, TEMPERATURE = "MAP", "MAP, temperature"
SIZES = (0.01, 0.05, 0.2)
DEFAULT = "PredictiveVariance greedy"
ALL, UNITS = "greedy, all in the pool", "whole units"
# Of classes, what the default was.
EQUAL = "sum of variances"
# Where others take too long, have candidates enough, or no unit fits in the subnet.
_SIZES = {"GreedyVariance": SIZES[:2], ALL: SIZES[:2], UNITS: SIZES[2:]}


@dataclass(frozen=True)
class Method:
    """One posterior.

    Attributes:
        choose: Makes its selector; None for every weight.
        covariance: The guide's option.
    """

    choose: Choose | None = None
    covariance: Literal["full", "diag", "kron"] = "full"


# Selectors that look at inputs look at those of the training data.
SELECTORS: dict[str, Choose] = {
    DEFAULT: lambda size, seed, moments: size,
    "PredictiveVariance diagonal": lambda size, seed, moments: PredictiveVariance(
        size, method="diagonal"
    ),
    "GreedyVariance": lambda size, seed, moments: GreedyVariance(size),
    "LargestGradient": lambda size, seed, moments: LargestGradient(size),
    "LargestVariance ggn": lambda size, seed, moments: LargestVariance(size),
    "LargestVariance swag": lambda size, seed, moments: LargestVariance(
        size, "swag", moments=moments()
    ),
    "LargestMagnitude": lambda size, seed, moments: LargestMagnitude(size),
    "RandomSubnet": lambda size, seed, moments: RandomSubnet(size, seed),
}
# What might have done better than the default; not in the package, but for two.
CANDIDATES: dict[str, Choose] = {
    EQUAL: lambda size, seed, moments: PredictiveVariance(size, weighting="equal"),
    ALL: lambda size, seed, moments: PredictiveVariance(
        size, method="greedy", weighting="equal", pool=1 / size
    ),
    "half LargestVariance": lambda size, seed, moments: HalfAndHalf(size),
    "inputs between": lambda size, seed, moments: Beyond(size, "between", seed),
    "inputs around": lambda size, seed, moments: Beyond(size, "around", seed),
    UNITS: lambda size, seed, moments: WholeUnits(size),
}
LAST, DIAGONAL, KRONECKER, FULL = (
    "LastLayer",
    "diagonal, all weights",
    "Kronecker, all weights",
    "full, all weights",
)
UNSIZED: dict[str, Method] = {
    LAST: Method(lambda size, seed, moments: LastLayer()),
    DIAGONAL: Method(covariance="diag"),
    KRONECKER: Method(covariance="kron"),
    FULL: Method(),
}


# The default at 5% and all others as independent, which the package does not build.
REST = "default 5% and a diagonal over the rest"


def sized(name: str, share: float) -> str:
    """A selector at a size, as it is called in the results."""
    return f"{name} {share:.0%}"


def names() -> tuple[str, ...]:
    """All methods, in the order in which they run."""
    subnets = (
        sized(name, share)
        for name in (*SELECTORS, *CANDIDATES)
        for share in _SIZES.get(name, SIZES)
    )
    return (MAP, TEMPERATURE, *UNSIZED, *subnets, REST)


def method_of(name: str) -> tuple[Method, float]:
    """A method by its name in the results, and its share of the weights."""
    if name in UNSIZED:
        return UNSIZED[name], 1.0
    selector, _, share = name.rpartition(" ")
    choose = (SELECTORS | CANDIDATES)[selector]
    return Method(choose), float(share.rstrip("%")) / 100


def is_candidate(name: str) -> bool:
    """Whether a method, by its name in the results, is one of the candidates."""
    return name.rpartition(" ")[0] in CANDIDATES
