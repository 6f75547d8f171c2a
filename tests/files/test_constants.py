"""A posterior is not loaded into a network with other constants.

The oracle is the live posterior: what loads predicts the same to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.exceptions import CheckpointError
from pyro_subnet.nn import bayesianize

EQUAL = {"rtol": 0.0, "atol": 0.0}
N = 6
Model = Callable[..., Any]


def network(seed: int, dtype: torch.dtype) -> nn.Module:
    """A frozen layer, running statistics, and a trained layer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        net(torch.randn(20, 3))
    net[0].requires_grad_(False)
    return net.to(dtype).eval()


def of_copy(net: nn.Module) -> Model:
    bnn = bayesianize(net)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        f = bnn(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(f, 0.3), obs=y)

    return model


def of_parameters(net: nn.Module) -> Model:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        values = {
            name: pyro.sample(
                name, dist.Normal(torch.zeros_like(p), 1.0).to_event(p.ndim)
            )
            for name, p in net.named_parameters()
            if p.requires_grad
        }
        f = torch.func.functional_call(net, values, x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(f, 0.3), obs=y)

    return model


class AsModule(PyroModule):
    def __init__(self, net: nn.Module):
        super().__init__()
        self.bnn = bayesianize(net)

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        f = self.bnn(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(f, 0.3), obs=y)


def under_a_handler(net: nn.Module) -> Model:
    return poutine.scale(of_copy(net), scale=1.0)


MODELS = {
    "copy": of_copy,
    "parameters": of_parameters,
    "module": AsModule,
    "handler": under_a_handler,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", MODELS)
def test_constants_are_those_of_the_fit(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    x, y = torch.randn(N, 3, dtype=dtype), torch.randn(N, dtype=dtype)
    net, make = network(0, dtype), MODELS[kind]
    posterior = AutoSubnetLaplace(make(net)).laplace_approximation(x, y)
    wanted = posterior.output_distribution(x)
    posterior.save(tmp_path / "saved")

    # Sampled weights are in the file, and may be any in the network.
    same = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in same.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    load = AutoSubnetMultivariateNormal.load
    found = load(tmp_path / "saved", make(same), x, y).output_distribution(x)
    assert_close(found.loc, wanted.loc, **EQUAL)
    assert_close(found.covariance_matrix, wanted.covariance_matrix, **EQUAL)

    for name in ("0.bias", "1.running_mean"):
        other = copy.deepcopy(net)
        with torch.no_grad():
            other.state_dict()[name].add_(0.01)
        with pytest.raises(
            CheckpointError, match=rf"running stat.*got others.*{name}.*`state_dict`"
        ):
            load(tmp_path / "saved", make(other), x, y)
    with pytest.raises(CheckpointError, match=r"running statistics.*got others"):
        load(tmp_path / "saved", make(network(1, dtype)), x, y)
