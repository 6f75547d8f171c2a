"""What beginners pass to the scores of predictions, and the message that each gets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

from pyro_subnet import diagnostics as scores
from pyro_subnet.exceptions import DataError, OptionError
from tests.mistakes.programs import as_users_run_it, assert_told

__all__ = ["as_users_run_it"]  # a fixture for this file

PROBS = torch.tensor([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]])
LABELS = torch.tensor([1, 0, 0])
DRAWS, Y = torch.linspace(-1, 1, 12).reshape(4, 3), torch.tensor([0.1, 0.5, -0.2])
PREDICTIVE = dist.Normal(torch.zeros(3), 1.0)

TOLD: dict[str, tuple[Any, str, type[Exception]]] = {
    "soft labels": (
        lambda: scores.brier_score(PROBS, LABELS + 0.5),
        r"`labels` must be class numbers; got 1\.5\. Pass whole numbers",
        DataError,
    ),
    "labels as text": (
        lambda: scores.expected_calibration_error(PROBS, ["b", "a", "a"]),
        r"`labels` must be a tensor, or an array of numbers; got \['b', 'a', 'a'\]\.",
        DataError,
    ),
    "one-hot predictions of whole numbers": (
        lambda: scores.predictive_entropy(torch.eye(2).long()),
        r"`probs` must be probabilities; got torch\.int64\. Pass `logits\.softmax",
        DataError,
    ),
    "half a bin": (
        lambda: scores.reliability(PROBS, LABELS, num_bins=1.5),  # type: ignore[arg-type]
        r"`num_bins` must be positive; got 1\.5\. Pass a whole number, or leave",
        OptionError,
    ),
    "a negative scale": (
        lambda: scores.crps_normal(Y, -torch.ones(3), Y),
        r"`scale` must be standard deviations, positive; got -1\.0\. Pass `pred",
        DataError,
    ),
    "one scale for all": (
        lambda: scores.crps_normal(Y, 0.5, Y),  # type: ignore[arg-type]
        r"`scale` must have an observation for each of `y`.* shapes \(\) and \(3,\)",
        DataError,
    ),
    "one level": (
        lambda: scores.interval_coverage(Y.sigmoid(), 0.9),  # type: ignore[arg-type]
        r"`levels` must be probabilities in \[0, 1\].*; got 0\.9\. Pass, for example",
        OptionError,
    ),
    "levels as text": (
        lambda: scores.mean_interval_width(PREDICTIVE, "90%"),
        r"`levels` must be probabilities in \[0, 1\).*; got '90%'\. Pass, for example",
        OptionError,
    ),
    "a level in percent": (
        lambda: scores.quantile(PREDICTIVE, 95),
        r"`level` must be in \(0, 1\); got 95\.0\. Pass 0\.5 for the median",
        OptionError,
    ),
    "several levels at once": (
        lambda: scores.quantile(PREDICTIVE, [0.1, 0.9]),  # type: ignore[arg-type]
        r"`level` must be a number; got \[0\.1, 0\.9\]\. Pass 0\.5 for the median",
        OptionError,
    ),
    "predictions in place of draws of them": (
        lambda: scores.decompose_entropy(PROBS),
        r"`draws` must have shape \(K, N, C\).*; got \(3, 2\)\. Pass `posterior\.samp",
        DataError,
    ),
}


@pytest.mark.parametrize("name", TOLD)
def test_a_mistake_with_scores_is_told(name: str) -> None:
    mistake, message, kind = TOLD[name]
    assert_told(lambda p: mistake(), message, kind)


@pytest.mark.parametrize("kind", [np.asarray, torch.Tensor.tolist, pd.Series])
def test_observations_need_not_be_tensors(kind: Any) -> None:
    labels, y, u = kind(LABELS), kind(Y), kind(Y.sigmoid())
    pairs: list[tuple[Any, Any]] = [
        (scores.brier_score(PROBS, labels), scores.brier_score(PROBS, LABELS)),
        (
            scores.classwise_calibration_error(PROBS, labels),
            scores.classwise_calibration_error(PROBS, LABELS),
        ),
        (scores.crps_from_draws(DRAWS, y), scores.crps_from_draws(DRAWS, Y)),
        (scores.crps_normal(Y, Y.exp(), y), scores.crps_normal(Y, Y.exp(), Y)),
        (scores.pit_from_draws(DRAWS, y), scores.pit_from_draws(DRAWS, Y)),
        (scores.pit_values(PREDICTIVE, y), scores.pit_values(PREDICTIVE, Y)),
        (
            scores.negative_log_likelihood(PREDICTIVE, y),
            scores.negative_log_likelihood(PREDICTIVE, Y),
        ),
        (scores.auroc(u, y), scores.auroc(Y.sigmoid(), Y)),
        (scores.risk_coverage(u, y).risk, scores.risk_coverage(Y.sigmoid(), Y).risk),
        (
            scores.interval_coverage(u, np.array([0.5, 0.9])),
            scores.interval_coverage(Y.sigmoid(), [0.5, 0.9]),
        ),
    ]
    for found, expected in pairs:
        assert_close(found, expected, check_dtype=False)
