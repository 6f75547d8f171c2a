"""Links against laplace-torch 0.3, at the same posterior, in float64."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from laplace import Laplace
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.nn import bayesianize, init_to_module
from pyro_subnet.selection import RandomSubnet
from tests.tolerances import num_standard_errors, tolerance

PEER = tolerance(torch.float64, "peer")
NUM_TRAIN, NUM_TEST, SUBNET_SIZE = 30, 7, 25


@dataclass(frozen=True)
class Pair:
    ours: AutoSubnetMultivariateNormal
    theirs: Any
    test: Tensor


def make_pair(num_classes: int, likelihood: str = "classification") -> Pair:
    net = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, num_classes)).double()
    x = torch.randn(NUM_TRAIN, 4, dtype=torch.float64)
    y: Tensor = torch.randint(num_classes, (NUM_TRAIN,))
    if likelihood == "regression":
        y = torch.randn(NUM_TRAIN, num_classes, dtype=torch.float64)
    bnn = bayesianize(net, prior_scale=0.7)

    def model(inputs: Tensor, y: Tensor | None = None) -> None:
        f = bnn(inputs)
        with pyro.plate("data", len(inputs)):
            fn: Any = dist.Categorical(logits=f)
            if likelihood == "regression":
                fn = dist.Normal(f, 0.3).to_event(1)
            pyro.sample("y", fn, obs=y)

    guide = AutoSubnetLaplace(
        model, RandomSubnet(SUBNET_SIZE, seed=1), init_loc_fn=init_to_module(net)
    )
    ours = guide.laplace_approximation(x, y)
    noise = {"sigma_noise": 0.3} if likelihood == "regression" else {}
    theirs = Laplace(
        deepcopy(net),
        likelihood,
        subset_of_weights="subnetwork",
        hessian_structure="full",
        subnetwork_indices=ours.subnet.flat,
        prior_precision=0.7**-2,
        **noise,
    )
    theirs.fit(DataLoader(TensorDataset(x, y), batch_size=11))
    return Pair(ours, theirs, torch.randn(NUM_TEST, 4, dtype=torch.float64))


@pytest.mark.parametrize("num_classes", [2, 3, 5])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("probit", "probit"), ("bridge", "bridge"), ("bridge-norm", "bridge_norm")],
)
def test_class_probabilities_agree(ours: str, theirs: str, num_classes: int) -> None:
    pair = make_pair(num_classes)
    expected = pair.theirs(pair.test, pred_type="glm", link_approx=theirs)
    found = pair.ours.predictive_distribution(pair.test, link=ours)
    assert_close(found.probs, expected, **PEER)


def test_class_probabilities_by_draws_agree() -> None:
    """Both draw: theirs has our standard error at the same number of draws."""
    pair = make_pair(3)
    count = 20_000
    expected = pair.theirs(
        pair.test, pred_type="glm", link_approx="mc", n_samples=count
    )
    options = {"link": "mc", "num_samples": count}
    generator = torch.Generator().manual_seed(1)
    found = pair.ours.predictive_distribution(pair.test, **options, generator=generator)
    deviations = num_standard_errors(3 * NUM_TEST)
    for label in range(3):
        y = torch.full((NUM_TEST,), label)
        same = generator.manual_seed(1)
        own = pair.ours.predictive_error(y, pair.test, **options, generator=same)
        error = 2**0.5 * own * expected[:, label]
        gap = (found.probs[:, label] - expected[:, label]).abs()
        assert bool((gap <= deviations * error).all())


@pytest.mark.parametrize("joint", [False, True])
def test_regression_agrees(joint: bool) -> None:
    pair = make_pair(2, "regression")
    loc, covariance = pair.theirs(pair.test, pred_type="glm", joint=joint)
    found = pair.ours.predictive_distribution(pair.test, joint=joint)
    noise = 0.09 * torch.eye(found.event_shape[0], dtype=torch.float64)
    assert_close(found.loc, loc, **PEER)
    assert_close(found.covariance_matrix, covariance + noise, **PEER)
