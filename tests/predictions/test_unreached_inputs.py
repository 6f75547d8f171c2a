"""Inputs that none of the subnet's weights reach, as of an expert they never enter.

The oracle is the network itself: there the posterior is certain of the MAP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.nn import bayesianize, init_to_module
from pyro_subnet.selection import Sites
from tests.tolerances import tolerance

EXACT = {"rtol": 0.0, "atol": 0.0}
OUTPUTS = 2


class Experts(nn.Module):
    """Each row goes through one of two layers, by the sign of its first number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, OUTPUTS), nn.Linear(3, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), OUTPUTS)
        for rows, layer in ((x[:, 0] > 0, self.a), (x[:, 0] <= 0, self.b)):
            if bool(rows.any()):
                out = out.index_put((rows.nonzero()[:, 0],), layer(x[rows]))
        return out


LIKELIHOODS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "normal": lambda f, noise: dist.Normal(f, 0.5).to_event(1),
    "latent-noise": lambda f, noise: dist.Normal(f, noise).to_event(1),
    "heteroscedastic": lambda f, noise: dist.Normal(f[:, 0], f[:, 1].exp()),
    "classes": lambda f, noise: dist.Categorical(logits=f),
    "counts": lambda f, noise: dist.Poisson(f[:, 0].exp()),
}
# Columns where the subnet reaches the inputs: the same ones where it does not.
NAMES = {
    "normal": ("loc[0]", "loc[1]"),
    "latent-noise": ("loc[0]", "loc[1]"),
    "heteroscedastic": ("loc", "log_scale"),
    "classes": ("logits[0]", "logits[1]"),
    "counts": ("log_rate",),
}


def of_other_expert(count: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(count, 3, dtype=dtype)
    return torch.cat([-x[:, :1].abs() - 0.1, x[:, 1:]], dim=1)


def fitted(name: str, net: nn.Module, dtype: torch.dtype) -> Any:
    bnn = bayesianize(net)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        noise = x.new_tensor(0.5)
        if name == "latent-noise":
            noise = pyro.sample("noise", dist.LogNormal(noise, 1.0))
        f = bnn(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", LIKELIHOODS[name](f, noise), obs=y)

    x = torch.randn(7, 3, dtype=dtype)
    x[:4, 0], x[4:, 0] = x[:4, 0].abs() + 0.1, -x[4:, 0].abs() - 0.1
    with torch.no_grad():
        y = LIKELIHOODS[name](net(x), x.new_tensor(0.5)).sample()
    guide = AutoSubnetLaplace(model, Sites("a.*"), init_loc_fn=init_to_module(net))
    return guide.laplace_approximation(x, y)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_outputs_are_those_of_the_map_without_variance(
    name: str, count: int, dtype: torch.dtype
) -> None:
    net = Experts().to(dtype)
    posterior = fitted(name, net, dtype)
    x = of_other_expert(count, dtype)
    found = posterior.output_distribution(x)
    assert found.names == NAMES[name]
    f = net(x).detach()
    f = f.log_softmax(-1) if name == "classes" else f[:, : len(NAMES[name])]
    assert_close(found.mean, f, **tolerance(dtype))
    assert_close(found.covariance_matrix, 0 * f[..., None] * f[:, None], **EXACT)
    joint = posterior.output_distribution(x, joint=True)
    assert_close(joint.covariance_matrix, f.new_zeros(f.numel(), f.numel()), **EXACT)
    draws = posterior.sample_functions(3, x)
    assert_close(draws, f.expand(3, *f.shape), **tolerance(dtype))


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_predictions_are_those_of_the_map(name: str, dtype: torch.dtype) -> None:
    net = Experts().to(dtype)
    posterior = fitted(name, net, dtype)
    x = of_other_expert(4, dtype)
    noise = posterior.median().get("noise", x.new_tensor(0.5))
    expected = LIKELIHOODS[name](net(x).detach(), noise)
    y = expected.sample()
    for link in (None, "mc"):
        found = posterior.predictive_distribution(x, link=link, num_samples=5)
        assert_close(found.log_prob(y), expected.log_prob(y), **tolerance(dtype))
    error = posterior.predictive_error(y, x)
    assert_close(error, torch.zeros_like(error), **tolerance(dtype))


def test_held_out_inputs_of_another_expert_leave_the_prior_as_it_is() -> None:
    posterior = fitted("normal", Experts().double(), torch.float64)
    val = of_other_expert(4, torch.float64), torch.randn(4, 2, dtype=torch.float64)
    tuned = posterior.tune_prior_precision("nll", val=val)
    assert tuned.tuning.is_flat
    assert tuned.prior_factor == 1.0


def test_predictions_have_their_gradient_in_the_inputs() -> None:
    net = Experts().double()
    posterior = fitted("normal", net, torch.float64)
    x = of_other_expert(4, torch.float64).requires_grad_()
    found = posterior.predictive_distribution(x)
    (gradient,) = torch.autograd.grad(found.mean.sum(), x)
    (expected,) = torch.autograd.grad(net(x).sum(), x)
    assert_close(gradient, expected, **tolerance(torch.float64))
