"""Choices that may be right, and more often are not: each warns once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor, nn
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, to_inference_data
from pyro_subnet.exceptions import (
    ChoiceWarning,
    SquashedLogitsWarning,
    UntrainedWarning,
)
from pyro_subnet.nn import bayesianize
from pyro_subnet.selection import RandomSubnet
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


class Trained:
    """A regression whose guide SVI has brought near the MAP, with S = D = 23."""

    def __init__(self, subnet: Any = None, num_params: int = 23, steps: int = 300):
        self.x = torch.linspace(-1, 1, 40).unsqueeze(-1) ** torch.arange(num_params)
        self.y = self.x[:, 1] - 2 * self.x[:, 2] + 0.2 * torch.randn(40)
        self.guide = AutoSubnetLaplace(self.model, subnet)
        optimizer = pyro.optim.Adam({"lr": 0.05})
        self.svi = SVI(self.model, self.guide, optimizer, Trace_ELBO())
        for _ in range(steps):
            self.svi.step(self.x, self.y)

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x * w).sum(-1), 0.2), obs=y)

    def fit(self) -> Any:
        return self.guide.laplace_approximation(self.x, self.y)


@pytest.mark.parametrize("one", [1, np.int64(1)])
def test_one_weight_of_many_warns_once(one: Any) -> None:
    trained = Trained(one)
    message = r"`subnet=1` is one weight; got a model of 23\. .*pass 1\.0"
    with pytest.warns(ChoiceWarning, match=message) as caught:
        first, second = trained.fit(), trained.fit()
    assert len(caught) == 1
    assert first.subnet.size == second.subnet.size == 1


@pytest.mark.parametrize(
    ("subnet", "num_params"),
    [(1.0, 23), (2, 23), (RandomSubnet(1, seed=0), 23), (1, 20), (None, 23)],
)
def test_what_can_only_be_meant_does_not_warn(subnet: Any, num_params: int) -> None:
    Trained(subnet, num_params).fit()  # warnings are errors


def test_predicting_with_the_map_guide_after_a_fit_warns_once() -> None:
    trained = Trained()
    predictive = Predictive(trained.model, guide=trained.guide, num_samples=3)
    predictive(trained.x)  # before the fit the MAP is all that there is
    posterior = trained.fit()
    message = r"Draws of the guide are the MAP.*`Predictive\(model, guide=posterior\)`"
    with pytest.warns(ChoiceWarning, match=message) as caught:
        draws = predictive(trained.x)
    again = predictive(trained.x)
    assert_close(draws["w"], again["w"])
    assert len(caught) == 1
    assert caught[0].filename == __file__
    Predictive(trained.model, guide=posterior, num_samples=3)(trained.x)


@pytest.mark.parametrize("parallel", [False, True])
def test_one_draw_of_the_map_is_meant(parallel: bool) -> None:
    """However often it is asked for: so the MAP is compared with its posterior."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)

    x, guide = torch.randn(6), AutoSubnetLaplace(model)
    guide.laplace_approximation(x, x)
    one, two = (
        Predictive(model, guide=guide, num_samples=count, parallel=parallel)
        for count in (1, 2)
    )
    for _ in range(4):
        one(x)
    with pytest.warns(ChoiceWarning, match="Draws of the guide are the MAP"):
        two(x)


def test_training_on_after_a_fit_does_not_warn() -> None:
    trained = Trained()
    trained.fit()
    trained.svi.step(trained.x, trained.y)
    trained.svi.evaluate_loss(trained.x, trained.y)
    trained.guide(trained.x)
    with torch.no_grad():
        trained.guide(trained.x)
    trained.guide.median()
    trained.fit()


def test_data_without_targets_to_arviz_warn_once() -> None:
    trained = Trained()
    posterior = trained.fit()
    few: dict[str, Any] = {"num_samples": 4, "prior": False}
    message = r"got no observations, .*Pass what training takes"
    with pytest.warns(ChoiceWarning, match=message) as caught:
        to_inference_data(posterior, trained.x, **few)
    assert len(caught) == 1
    to_inference_data(posterior, trained.x, trained.y, **few)


# ----------------------------------------------------------------------------------
# Weights that were not trained on the data.

NOISE = 0.3


class Networks:
    """A network for waves or for classes, and data of which there are enough."""

    def __init__(self, classes: bool):
        self.classes, self.x = classes, torch.rand(200, 2) * 4 - 2
        wave = (2 * self.x[:, 0]).sin() + self.x[:, 1]
        self.y = (wave > 0).long() if classes else wave + NOISE * torch.randn(200)
        layers = nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 2 if classes else 1)
        self.net = nn.Sequential(*layers)

    def likelihood(self, f: Tensor) -> Any:
        if self.classes:
            return dist.Categorical(logits=f)
        return dist.Normal(f.squeeze(-1), NOISE)

    def train(self, y: Tensor, steps: int = 300, decay: float = 0.0) -> None:
        optimizer = torch.optim.Adam(self.net.parameters(), lr=0.02, weight_decay=decay)
        for _ in range(steps):
            optimizer.zero_grad()
            (-self.likelihood(self.net(self.x)).log_prob(y).mean()).backward()
            optimizer.step()

    def fit(self, subnet: Any = None, prior_scale: float = 1.0, **options: Any) -> Any:
        bnn = bayesianize(self.net, prior_scale)

        def model(x: Tensor, y: Tensor | None = None) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("y", self.likelihood(bnn(x)), obs=y)

        guide = AutoSubnetLaplace(model, subnet, **options)
        return guide.laplace_approximation(self.x, self.y)


CLASSES_OR_NOT = pytest.mark.parametrize("classes", [False, True])
SUBNETS = pytest.mark.parametrize("subnet", [None, RandomSubnet(30, seed=0)])
UNTRAINED = r"do not seem to be trained on these data.*nats.*Train the guide"


@SUBNETS
@CLASSES_OR_NOT
def test_a_network_that_nobody_trained_warns_once(classes: bool, subnet: Any) -> None:
    networks = Networks(classes)
    with pytest.warns(UntrainedWarning, match=UNTRAINED) as caught:
        networks.fit(subnet)
    assert len(caught) == 1


@SUBNETS
@CLASSES_OR_NOT
def test_weights_of_another_problem_warn(classes: bool, subnet: Any) -> None:
    networks = Networks(classes)
    networks.train(1 - networks.y)
    with pytest.warns(UntrainedWarning, match=UNTRAINED):
        networks.fit(subnet)


@SUBNETS
@CLASSES_OR_NOT
@pytest.mark.parametrize(("prior_scale", "decay"), [(0.1, 0.0), (10.0, 1e-3)])
def test_a_trained_network_does_not_warn(
    classes: bool, subnet: Any, prior_scale: float, decay: float
) -> None:
    """Whatever its prior: training that did not know it says nothing of the data."""
    networks = Networks(classes)
    networks.train(networks.y, decay=decay)
    networks.fit(subnet, prior_scale)


def test_few_data_do_not_tell_trained_from_untrained() -> None:
    networks = Networks(False)
    networks.x, networks.y = networks.x[:6], networks.y[:6]
    networks.fit()
