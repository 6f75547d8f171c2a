"""Closed forms of many outputs per observation, which need their variances alone.

The oracle is autograd's dense Jacobian and the dense covariance, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.nn import bayesianize, init_to_module
from pyro_subnet.selection import RandomSubnet, Sites
from tests.tolerances import tolerance

F, C, SIDE, NUM_TRAIN = 6, 40, 10, 9
# So few outputs have whole rows of J; of so many data they have not.
FEW, MANY = 1, 30
# From the network's outputs to the distribution of an observation's labels.
Likelihood = Callable[[Tensor], dist.TorchDistribution]


class Heads(nn.Module):
    """Two heads: a layer whose logits are cooled, and a product and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(F, C // 2))
        self.b = nn.Parameter(torch.randn(C // 2))
        self.other = nn.Linear(F, C // 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.other(x) / 1.5, x @ self.w + self.b], dim=-1)


class Pixels(nn.Module):
    """Logits of some classes at every pixel, classes last."""

    def __init__(self, num_classes: int, kernel: int) -> None:
        super().__init__()
        self.out = nn.Conv2d(F, num_classes, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        wide = x[..., None, None] * torch.linspace(-1, 1, SIDE**2).view(SIDE, SIDE)
        return self.out(wide.to(x)).movedim(1, -1)


class Leaking(nn.Module):
    """One observation's last logit holds a little of its first."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(F, C)

    def forward(self, x: Tensor) -> Tensor:
        z = self.out(x)
        leak = 1e-3 * (x[:, :1] > 2) * z[:, :1]
        return torch.cat([z[:, :-1], z[:, -1:] + leak], dim=1)


def classes(f: Tensor) -> dist.TorchDistribution:
    return dist.Categorical(logits=f).to_event(f.ndim - 2)


def labels(f: Tensor) -> dist.TorchDistribution:
    return dist.Bernoulli(logits=f).to_event(f.ndim - 1)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Likelihood]] = {
    "classes": (lambda: nn.Linear(F, C), classes),
    "labels of two heads": (Heads, labels),
    "pixels": (lambda: Pixels(3, 1), classes),
    "pixels of one class": (lambda: Pixels(1, 3), labels),
    "hidden": (lambda: nn.Sequential(nn.Linear(F, 4), nn.Linear(4, C)), classes),
    "one that leaks": (Leaking, classes),
}


PAIRS = [
    *((kind, "full") for kind in NETWORKS),
    *((kind, "diag") for kind in ("classes", "pixels", "one that leaks")),
    *((kind, "kron") for kind in ("classes", "labels of two heads", "hidden")),
]


class Fit:
    """A posterior of a network, and what its predictions should be."""

    def __init__(
        self,
        net: nn.Module,
        likelihood: Likelihood,
        covariance: str,
        dtype: torch.dtype,
    ) -> None:
        net = net.to(dtype)
        bnn = bayesianize(net)

        def model(x: Tensor, y: Tensor | None = None) -> Any:
            f = bnn(x)
            with pyro.plate("data", len(x)):
                return pyro.sample("y", likelihood(f), obs=y)

        x = torch.randn(NUM_TRAIN, F, dtype=dtype)
        y = likelihood(net(x)).sample()
        guide = AutoSubnetLaplace(
            model,
            None if covariance == "kron" else RandomSubnet(0.7, seed=0),
            init_loc_fn=init_to_module(net),
            covariance=covariance,
        )
        self.posterior = guide.laplace_approximation(x, y)
        self.net = net.double()

    def variance(self, x: Tensor) -> Tensor:
        """Of the network's outputs, in their shape."""
        return dense_variance(self.posterior, self.net, x)


def dense_variance(
    posterior: AutoSubnetMultivariateNormal, net: nn.Module, x: Tensor
) -> Tensor:
    """Of a network's outputs, in their shape, by the dense Jacobian and covariance."""
    weights = {name: p.detach().double() for name, p in net.named_parameters()}

    def outputs(*values: Tensor) -> Tensor:
        return functional_call(net, dict(zip(weights, values, strict=True)), x.double())

    found = torch.autograd.functional.jacobian(
        outputs, tuple(weights.values()), strategy="forward-mode", vectorize=True
    )
    by_site = dict(zip(weights, found, strict=True))
    ndim = outputs(*weights.values()).ndim
    jac = torch.cat(
        [
            by_site[site].flatten(ndim)[..., at]
            for site, at in posterior.subnet.indices.items()
        ],
        dim=-1,
    )
    covariance = posterior.get_posterior().covariance_matrix.double()
    return ((jac @ covariance) * jac).sum(-1)


def logits_of(distribution: Any) -> Tensor:
    """Those of classes and labels, whatever axes are an observation's."""
    base = getattr(distribution, "base_dist", distribution)
    return base.logits


@pytest.mark.parametrize(("kind", "covariance"), PAIRS)
def test_probit_has_the_dense_variances(
    kind: str, covariance: str, dtype: torch.dtype
) -> None:
    make, likelihood = NETWORKS[kind]
    fit = Fit(make(), likelihood, covariance, dtype)
    for num_data in (FEW, MANY):
        x = torch.randn(num_data, F, dtype=dtype)
        x[0, 0], x[-1, 1] = 3.0, 0.0
        found = logits_of(fit.posterior.predictive_distribution(x, link="probit"))
        shrunk = (1 + math.pi / 8 * fit.variance(x)).sqrt()
        right = logits_of(likelihood(fit.net(x.double()) / shrunk))
        assert found.dtype == dtype
        assert_close(found.double(), right, **tolerance(dtype, "closed_form"))


class Rates(PyroModule):  # type: ignore[misc]
    """Many counts per observation, of a head whose weights are Pyro's own samples."""

    def __init__(self) -> None:
        super().__init__()
        prior = dist.Normal(torch.zeros((), dtype=torch.float64), 0.3)
        self.out = PyroModule[nn.Linear](F, C)
        self.out.weight = PyroSample(prior.expand([C, F]).to_event(2))
        self.out.bias = PyroSample(prior.expand([C]).to_event(1))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        rate = self.out(x).exp()
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Poisson(rate).to_event(1), obs=y)


def test_quadrature_of_many_counts_is_that_of_each() -> None:
    x, net = torch.randn(NUM_TRAIN, F).double(), nn.Sequential()
    net.add_module("out", nn.Linear(F, C).double())
    guide = AutoSubnetLaplace(Rates(), init_loc_fn=init_to_module(net))
    posterior = guide.laplace_approximation(x, torch.poisson(net(x).exp()).detach())
    x = torch.randn(MANY, F).double()
    found = posterior.predictive_distribution(x).base_dist.mean
    # the mean of a log-normal rate
    right = (net(x) + dense_variance(posterior, net, x) / 2).exp()
    assert_close(found, right.detach(), **tolerance(torch.float64, "closed_form"))


@pytest.mark.parametrize("covariance", ["diag", "kron"])
def test_passes_do_not_grow_with_the_classes(covariance: str) -> None:
    passes: list[float] = []

    class Counted(nn.Module):
        def __init__(self, num_classes: int) -> None:
            super().__init__()
            self.out = nn.Linear(F, num_classes)

        def forward(self, x: Tensor) -> Tensor:
            z = self.out(x) * 1.0
            if z.requires_grad:  # not batched: a number has no batch
                z.register_hook(lambda gradient: passes.append(gradient.sum().item()))
            return z

    counts = []
    for num_classes in (C, 150):
        net = Counted(num_classes)
        fit = Fit(net, classes, covariance, torch.float64)
        passes.clear()
        x = torch.randn(MANY, F).double()
        logits = fit.posterior.predictive_distribution(x).logits
        counts.append(len(passes))
        shrunk = net(x) / (1 + math.pi / 8 * fit.variance(x)).sqrt()
        assert_close(logits, shrunk.log_softmax(-1).detach())
    assert counts[0] == counts[1] < 10


def test_no_covariance_of_pixels_is_made() -> None:
    """That of these logits would take 27 GB."""
    body, head = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 5, 1)
    net = nn.Sequential(body, nn.Tanh(), head)
    bnn = bayesianize(net)

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        logits = bnn(x).movedim(1, -1)
        with pyro.plate("data", len(x)):
            likelihood = dist.Categorical(logits=logits).to_event(2)
            return pyro.sample("y", likelihood, obs=y)

    x, y = torch.randn(2, 1, 8, 8), torch.randint(0, 5, (2, 8, 8))
    guide = AutoSubnetLaplace(model, Sites(["2.*"]), init_loc_fn=init_to_module(net))
    posterior = guide.laplace_approximation(x, y)
    image = torch.randn(1, 1, 128, 128)
    found = posterior.predictive_distribution(image).base_dist.probs
    features = torch.cat([body(image).tanh(), torch.ones_like(image)], 1).movedim(1, -1)
    covariance = posterior.get_posterior().covariance_matrix
    at = [[*range(8 * c, 8 * c + 8), 40 + c] for c in range(5)]  # weights, then biases
    variance = [((features @ covariance[i][:, i]) * features).sum(-1) for i in at]
    shrunk = (1 + math.pi / 8 * torch.stack(variance, -1)).sqrt()
    right = (net(image).movedim(1, -1) / shrunk).softmax(-1)
    assert_close(found, right.detach(), **tolerance(torch.float32, "closed_form"))
