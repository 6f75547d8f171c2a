"""Special functions against 40-digit arithmetic and against slow sums."""

import mpmath
import numpy as np
import pytest
import scipy.stats
import torch
from torch.testing import assert_close

from pyro_subnet.curvature.families.special_functions import (
    bessel_ratio,
    negative_binomial_log_count_information,
    student_t_log_df_information,
    trigamma,
    von_mises_log_concentration_information,
)

ARGUMENTS = [1e-3, 0.1, 0.9, 3.0, 20.0, 29.99, 30.01, 70.0, 1e3, 1e4, 1e6, 1e9]


def _column(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _student_t(df: float) -> float:
    nu = mpmath.mpf(df)
    difference = (mpmath.psi(1, nu / 2) - mpmath.psi(1, (nu + 1) / 2)) / 4
    return float(nu**2 * (difference - (nu + 5) / (2 * nu * (nu + 1) * (nu + 3))))


def _von_mises(concentration: float) -> float:
    kappa = mpmath.mpf(concentration)
    ratio = mpmath.besseli(1, kappa) / mpmath.besseli(0, kappa)
    return float(kappa**2 * (1 - ratio**2 - ratio / kappa))


def test_trigamma() -> None:
    expected = _column([float(mpmath.psi(1, x)) for x in ARGUMENTS])
    assert_close(trigamma(_column(ARGUMENTS)), expected, rtol=1e-14, atol=0)


def test_bessel_ratio() -> None:
    expected = [
        float(mpmath.besseli(1, x) / mpmath.besseli(0, x)) for x in ARGUMENTS[:-1]
    ]
    assert_close(
        bessel_ratio(_column(ARGUMENTS[:-1])), _column(expected), rtol=1e-14, atol=0
    )


@pytest.mark.parametrize(
    ("function", "oracle"),
    [
        (student_t_log_df_information, _student_t),
        (von_mises_log_concentration_information, _von_mises),
    ],
)
def test_cancelling_differences_keep_their_digits(function, oracle) -> None:
    # At 1e9 the difference is 1e-36 of its terms: 80 digits leave 44.
    with mpmath.workdps(80):
        expected = _column([oracle(x) for x in ARGUMENTS])
    assert_close(function(_column(ARGUMENTS)), expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("total_count", [1e-3, 0.4, 1.0, 7.0, 300.0, 1e4])
@pytest.mark.parametrize("logits", [-15.0, -3.0, 0.0, 2.0, 5.0])
def test_negative_binomial_integral_is_the_sum(total_count, logits) -> None:
    p = 1 / (1 + np.exp(-logits))
    mean = total_count * np.exp(logits)
    deviation = np.sqrt(mean / (1 - p))
    j = np.arange(int(mean + 40 * deviation + 60 / (1 - p)))
    tail = scipy.stats.nbinom.sf(j, total_count, 1 - p)
    expected = total_count**2 * np.sum(tail / (total_count + j) ** 2)
    actual = negative_binomial_log_count_information(
        _column([total_count]), _column([logits])
    )
    # Summing a million tails by scipy is good to about 1e-10.
    assert_close(actual, _column([expected]), rtol=1e-9, atol=0)


def test_negative_binomial_integral_at_logits_too_large_to_sum() -> None:
    # With X unbounded, r^2 E[psi'(r) - psi'(r + X)] tends to r^2 psi'(r).
    count = _column([0.5, 3.0, 50.0])
    logits = torch.full_like(count, 80.0)
    actual = negative_binomial_log_count_information(count, logits)
    assert_close(actual, count**2 * trigamma(count), rtol=1e-12, atol=0)
