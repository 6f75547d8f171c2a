"""Rows of every general route, and second derivatives, are plain reverse mode's.

The networks have operations whose derivatives torch batches wrongly, or not at all.
The oracle is `torch.autograd`, looped, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.nn import bayesianize, init_to_module
from tests.tolerances import tolerance

Scalar = Callable[..., Tensor]


class ScaledWhereBatched(torch.autograd.Function):
    """The identity, but 1% larger under `vmap`."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return ScaledWhereBatched.apply(gradient)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return ScaledWhereBatched.apply(tangent)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> tuple[Tensor, Any]:
        return ScaledWhereBatched.apply(1.01 * x), in_dims[0]


class WronglyBatched(ScaledWhereBatched):
    """The identity, whose gradients are 1% too large wherever they are batched."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.clone()

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> tuple[Tensor, Any]:
        return WronglyBatched.apply(x), in_dims[0]


class OfMatrices(nn.Module):
    """A function of a 2 x 2 matrix a data point, C times."""

    def __init__(self, function: Callable[[Tensor], Tensor], num_outputs: int) -> None:
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.randn(3, 4))
        self.v = nn.Parameter(torch.randn(1, num_outputs))

    def forward(self, x: Tensor) -> Tensor:
        m = torch.einsum("ni,ij->nj", x, self.w).reshape(-1, 2, 2)
        eye = torch.eye(2, dtype=x.dtype)
        return torch.tanh(self.function(m @ m.mT + eye))[:, None] * self.v


class Batched(nn.Module):
    """A layer behind an operation that is batched wrongly, and outside of layers."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4))
        self.out = nn.Linear(4, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("ni,ij->nj", x, self.w)
        return self.out(torch.tanh(WronglyBatched.apply(h)))


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "prelu": lambda c: nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, c)),
    "prelu-1": lambda c: nn.Sequential(nn.Linear(3, 4), nn.PReLU(), nn.Linear(4, c)),
    "prelu-last": lambda c: nn.Sequential(nn.Linear(3, c), nn.PReLU(c)),
    "det": lambda c: OfMatrices(torch.linalg.det, c),
    "slogdet": lambda c: OfMatrices(lambda m: torch.linalg.slogdet(m)[1], c),
    "logdet": lambda c: OfMatrices(torch.logdet, c),
    "cholesky": lambda c: OfMatrices(
        lambda m: torch.linalg.cholesky(m).diagonal(dim1=-2, dim2=-1).prod(-1), c
    ),
    "batched-wrongly": Batched,
}
each_network = pytest.mark.parametrize("kind", NETWORKS)
# N and C: coincidences of lengths hide errors of shape.
SIZES = [(1, 1), (3, 3), (4, 2), (2, 1)]


def network(kind: str, num_outputs: int, dtype: torch.dtype) -> nn.Module:
    return NETWORKS[kind](num_outputs).to(torch.float64).to(dtype)


def fitted(net: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Any:
    bnn = bayesianize(net)

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = bnn(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)
        return mean

    guide = AutoSubnetLaplace(model, init_loc_fn=init_to_module(net), **options)
    return guide.laplace_approximation(x, y)


def weights(net: nn.Module) -> tuple[list[str], tuple[Tensor, ...]]:
    names, values = zip(*net.named_parameters(), strict=True)
    return list(names), tuple(value.detach() for value in values)


def of_weights(net: nn.Module, x: Tensor) -> Scalar:
    names, _ = weights(net)

    def outputs(*values: Tensor) -> Tensor:
        at = dict(zip(names, values, strict=True))
        return functional_call(net, at, (x,))

    return outputs


def dense_jacobian(net: nn.Module, x: Tensor, **options: bool) -> Tensor:
    """J of every output and observation, (N, C, D)."""
    found = jacobian(of_weights(net, x), weights(net)[1], **options)
    return torch.cat([part.flatten(2) for part in found], dim=-1)


def dense_hessian(function: Scalar, values: Sequence[Tensor]) -> Tensor:
    blocks = hessian(function, tuple(values))
    rows = [
        torch.cat([b.reshape(v.numel(), -1) for b in row], 1)
        for v, row in zip(values, blocks, strict=True)
    ]
    return torch.cat(rows)


def precision(net: nn.Module, x: Tensor) -> Tensor:
    jac = dense_jacobian(net, x).flatten(0, 1)
    return jac.mT @ jac + torch.eye(jac.shape[1], dtype=jac.dtype)


@pytest.mark.parametrize(("n", "c"), SIZES)
@each_network
def test_precision(kind: str, n: int, c: int, dtype: torch.dtype) -> None:
    net, x = network(kind, c, dtype), torch.randn(n, 3, dtype=dtype)
    posterior = fitted(net, x, torch.zeros(n, c, dtype=dtype))
    expected = precision(deepcopy(net).double(), x.double())
    found = posterior.get_posterior().precision_matrix
    assert_close(found.double(), expected, **tolerance(dtype))


@each_network
def test_diagonal(kind: str, dtype: torch.dtype) -> None:
    net, x = network(kind, 3, dtype), torch.randn(3, 3, dtype=dtype)
    posterior = fitted(net, x, torch.zeros(3, 3, dtype=dtype), covariance="diag")
    expected = precision(deepcopy(net).double(), x.double()).diagonal()
    found = posterior.get_posterior().variance
    assert_close(found.double(), expected.reciprocal(), **tolerance(dtype))


@each_network
def test_empirical_fisher(kind: str) -> None:
    net, x = network(kind, 2, torch.float64), torch.randn(4, 3, dtype=torch.float64)
    y = torch.randn(4, 2, dtype=torch.float64)
    posterior = fitted(net, x, y, curvature="ef")
    residual = (y - net(x)).detach()
    scores = torch.einsum("nc,ncs->ns", residual, dense_jacobian(net, x))
    expected = scores.mT @ scores + torch.eye(scores.shape[1], dtype=x.dtype)
    found = posterior.get_posterior().precision_matrix
    assert_close(found, expected, **tolerance(torch.float64))


@each_network
def test_hessian(kind: str) -> None:
    net, x = network(kind, 2, torch.float64), torch.randn(4, 3, dtype=torch.float64)
    y = net(x).detach() + 0.1 * torch.randn(4, 2, dtype=torch.float64)
    posterior = fitted(net, x, y, curvature="hessian")

    def loss(*values: Tensor) -> Tensor:
        return (of_weights(net, x)(*values) - y).square().sum() / 2

    found = posterior.get_posterior().precision_matrix
    expected = dense_hessian(loss, weights(net)[1])
    expected += torch.eye(len(expected), dtype=x.dtype)
    assert_close(found, expected, **tolerance(torch.float64))


@pytest.mark.parametrize(("n", "c"), SIZES)
@each_network
def test_covariances_and_their_gradients_at_inputs(kind: str, n: int, c: int) -> None:
    net, data = network(kind, c, torch.float64), torch.randn(5, 3, dtype=torch.float64)
    posterior = fitted(net, data, torch.zeros(5, c, dtype=torch.float64))
    covariance = torch.linalg.inv(precision(net, data))
    x = torch.randn(n, 3, dtype=torch.float64).requires_grad_()
    jac = dense_jacobian(net, x, create_graph=True)
    expected = jac @ covariance @ jac.mT
    found = posterior.output_distribution(x).covariance_matrix
    assert_close(found, expected, **tolerance(torch.float64))
    direction = torch.randn_like(found)
    ours, theirs = (
        torch.autograd.grad((part * direction).sum(), x)[0]
        for part in (found, expected)
    )
    assert_close(ours, theirs, **tolerance(torch.float64))


@pytest.mark.parametrize("num_samples", [1, 3, 400])
@each_network
def test_linearized_predictions(kind: str, num_samples: int) -> None:
    net, data = network(kind, 3, torch.float64), torch.randn(5, 3, dtype=torch.float64)
    posterior = fitted(net, data, torch.zeros(5, 3, dtype=torch.float64))
    x = torch.randn(3, 3, dtype=torch.float64)
    names, values = weights(net)
    predictive = Predictive(
        posterior.linearized_model,
        guide=posterior,
        num_samples=num_samples,
        parallel=True,
        return_sites=("_RETURN", *names),
    )
    drawn = predictive(x)
    steps = torch.cat(
        [
            (drawn[name].reshape(num_samples, *value.shape) - value).flatten(1)
            for name, value in zip(names, values, strict=True)
        ],
        dim=1,
    )
    shift = torch.einsum("ncs,ks->knc", dense_jacobian(net, x), steps)
    found = drawn["_RETURN"].reshape(num_samples, 3, 3)
    assert_close(found, net(x).detach() + shift, **tolerance(torch.float64))


@pytest.mark.parametrize(
    "function", [torch.logdet, torch.linalg.det, WronglyBatched.apply]
)
def test_priors_that_couple(function: Callable[[Tensor], Tensor]) -> None:
    """P0 is a Hessian, too: of a factor whose derivatives are batched wrongly."""
    start = torch.randn(3, 3, dtype=torch.float64)

    def factor(w: Tensor) -> Tensor:
        return -function(w @ w.mT + torch.eye(3, dtype=w.dtype)).square().sum() / 10

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(start.new_zeros(3, 3), 1.0).to_event(2))
        pyro.factor("coupling", factor(w))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w[0], 0.1), obs=y)

    x = torch.randn(6, 3, dtype=torch.float64)
    guide = AutoSubnetLaplace(model, init_loc_fn=lambda site: start)
    posterior = guide.laplace_approximation(x, x.sum(1))

    def energy(w: Tensor) -> Tensor:
        return w.square().sum() / 2 - factor(w) + 50 * (x @ w[0]).square().sum()

    expected = dense_hessian(energy, [start])
    found = posterior.get_posterior().precision_matrix
    assert_close(found, expected, **tolerance(torch.float64))


@pytest.mark.parametrize("covariance", ["full", "diag"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_two_sites_and_a_weight_outside_layers(n: int, covariance: Any) -> None:
    """The structured route takes rows of both sites from another route."""
    values = {"w": torch.randn(3, 4).double(), "v": torch.randn(4, 2).double()}

    def model(x: Tensor, y: Tensor | None = None, z: Tensor | None = None) -> None:
        w, v = (
            pyro.sample(k, dist.Normal(torch.zeros_like(at), 1.0).to_event(2))
            for k, at in values.items()
        )
        f = torch.einsum("ni,ij->nj", x, w).tanh() @ v
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(f, 0.5).to_event(1), obs=y)
            pyro.sample("z", dist.Poisson(f[:, 0].exp()), obs=z)

    x = torch.randn(n, 3, dtype=torch.float64)
    guide = AutoSubnetLaplace(
        model,
        init_loc_fn=lambda site: values[site["name"]],
        covariance=covariance,
        form="primal" if covariance == "full" else "auto",
    )
    posterior = guide.laplace_approximation(x, x[:, :2], torch.ones(n).double())

    def rows(w: Tensor, v: Tensor) -> Tensor:
        f = (x @ w).tanh() @ v
        root = (f[:, :1] / 2).exp().detach()  # of the rate
        return torch.cat([f / 0.5, root * f[:, :1]], dim=1)

    found = jacobian(rows, tuple(values.values()))
    jac = torch.cat([part.flatten(2) for part in found], dim=-1).flatten(0, 1)
    expected = jac.mT @ jac + torch.eye(20, dtype=x.dtype)
    if covariance == "diag":
        ours = posterior.get_posterior().variance.reciprocal()
        assert_close(ours, expected.diagonal(), **tolerance(torch.float64))
    else:
        ours = posterior.get_posterior().precision_matrix
        assert_close(ours, expected, **tolerance(torch.float64))
