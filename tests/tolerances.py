"""The one table of tolerances, and the one false-alarm rate, that tests use.

A test compares with ``assert_close(ours, oracle, **tolerance(dtype, "autograd"))``.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Literal, TypedDict

import torch

Kind = Literal["closed_form", "reordered", "autograd", "peer"]


class Tolerance(TypedDict):
    """What ``torch.testing.assert_close`` takes."""

    rtol: float
    atol: float


# closed_form: the same number by another formula (linear-Gaussian models)
# reordered:   the same sum in another order (batch sizes, shuffles, permutations)
# autograd:    dense autograd over a network, looped, as the oracle
# peer:        another library, which works in float32
TOLERANCES: dict[Kind, dict[torch.dtype, Tolerance]] = {
    "closed_form": {
        torch.float64: {"rtol": 1e-10, "atol": 1e-10},
        torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    },
    "reordered": {
        torch.float64: {"rtol": 1e-9, "atol": 1e-9},
        torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    },
    "autograd": {
        torch.float64: {"rtol": 1e-8, "atol": 1e-8},
        torch.float32: {"rtol": 1e-3, "atol": 1e-4},
    },
    "peer": {
        torch.float64: {"rtol": 1e-7, "atol": 1e-7},
        torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    },
}

# Chance that a right program fails one random test: fixed before any is run.
FALSE_ALARM_RATE = 2e-5


def tolerance(dtype: torch.dtype, kind: Kind = "autograd") -> Tolerance:
    """Tolerances for values of a type, by what they are compared with."""
    return TOLERANCES[kind][dtype]


def num_standard_errors(num_checks: int = 1) -> float:
    """How many standard errors a Monte Carlo mean may lie from its expectation.

    Two-sided, so that ``num_checks`` of them together raise a false alarm in
    ``FALSE_ALARM_RATE`` of the runs at most (Bonferroni).
    """
    return NormalDist().inv_cdf(1 - FALSE_ALARM_RATE / (2 * num_checks))
