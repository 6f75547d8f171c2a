"""Choices that may be right, and more often are not: each warns once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.exceptions import SquashedLogitsWarning
from pyro_subnet.nn import bayesianize
from tests.mistakes.programs import as_users_run_it

__all__ = ["as_users_run_it"]  # a fixture for this file

N, CLASSES = 5, 3
LIKELIHOODS: dict[str, Callable[[Tensor], Any]] = {
    "softmax": lambda f: dist.Categorical(logits=f.softmax(-1)),
    "softmax of one-hot": lambda f: dist.OneHotCategorical(logits=f.softmax(-1)),
    "sigmoid": lambda f: dist.Bernoulli(logits=f[:, 0].sigmoid()),
    "sigmoid of labels": lambda f: dist.Bernoulli(logits=f.sigmoid()).to_event(1),
    "clamped": lambda f: dist.Bernoulli(logits=f.sigmoid().clamp(0.1, 0.9)[:, 1]),
}
RIGHT: dict[str, Callable[[Tensor], Any]] = {
    "logits": lambda f: dist.Categorical(logits=f),
    "log-probabilities": lambda f: dist.Categorical(logits=f.log_softmax(-1)),
    "probabilities": lambda f: dist.Categorical(probs=f.softmax(-1)),
    "one-hot": lambda f: dist.OneHotCategorical(probs=f.softmax(-1)),
    "of one label": lambda f: dist.Bernoulli(probs=f[:, 0].sigmoid()),
    "logits of one label": lambda f: dist.Bernoulli(logits=f[:, 0]),
    "of a gate": lambda f: dist.Bernoulli(logits=3.0 * f[:, 0].sigmoid() - 1.0),
    "small logits": lambda f: dist.Categorical(logits=1e-3 * f.sigmoid()),
}


def fit(likelihood: Callable[[Tensor], Any]) -> Any:
    bnn = bayesianize(nn.Linear(2, CLASSES))
    drawn = likelihood(torch.zeros(N, CLASSES)).sample()

    def model(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("y", likelihood(bnn(x)), obs=y)

    guide = AutoSubnetLaplace(model)
    return guide.laplace_approximation(torch.randn(N, 2), drawn)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_probabilities_given_as_logits_warn_once(name: str) -> None:
    message = r"logits of site 'y' are the output of a (sigmoid|softmax).*`probs=`"
    with pytest.warns(SquashedLogitsWarning, match=message) as caught:
        fit(LIKELIHOODS[name])
    assert len(caught) == 1


@pytest.mark.parametrize("name", RIGHT)
def test_logits_and_probabilities_in_their_places_do_not_warn(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(RIGHT[name])
