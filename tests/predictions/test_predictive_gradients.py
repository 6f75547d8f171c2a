"""Predictions that are differentiable in the inputs: finite differences in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.tensors.lower_factor import lower_factor
from tests.tolerances import tolerance

EXACT = tolerance(torch.float64, "reordered")  # 1e-9
NUM_TRAIN, NUM_TEST, NUM_INPUTS = 11, 3, 2
Family = Callable[[Tensor], Any]


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def fitted(
    family: Family, num_outputs: int, *, mix: Callable[[Tensor], Tensor] = lambda x: x
) -> AutoSubnetMultivariateNormal:
    shapes = {"w1": (4, NUM_INPUTS), "b1": (4,), "w2": (num_outputs, 4)}

    def model(x: Tensor, y: Tensor | None = None) -> None:
        weights = {}
        for site, shape in shapes.items():
            zero = torch.zeros(shape, dtype=torch.float64)
            weights[site] = pyro.sample(
                site, dist.Normal(zero, 0.8).to_event(len(shape))
            )
        hidden = F.linear(mix(x), weights["w1"], weights["b1"]).tanh()
        with pyro.plate("data", len(x)):
            pyro.sample("y", family(F.linear(hidden, weights["w2"])), obs=y)

    at = {site: double(*shape) for site, shape in shapes.items()}
    # All of the first layer, some of the last: scattered for several outputs.
    subnet = {"w1": torch.tensor([0, 3, 5]), "w2": torch.arange(0, 4 * num_outputs, 3)}
    guide = AutoSubnetLaplace(model, subnet, init_loc_fn=init_to_value(values=at))
    x = double(NUM_TRAIN, NUM_INPUTS)
    y = family(double(NUM_TRAIN, num_outputs)).sample()
    return guide.laplace_approximation(x, y)


def centred(x: Tensor) -> Tensor:
    """Couples the data: no observation's outputs are its own."""
    return x - x.mean(0)


FAMILIES = {
    "normal-1": (lambda f: dist.Normal(f.squeeze(-1), 0.3), 1),
    "normal-3": (lambda f: dist.Normal(f, 0.3).to_event(1), 3),
    "heteroscedastic": (lambda f: dist.Normal(f[:, 0], F.softplus(f[:, 1])), 2),
    "categorical": (lambda f: dist.Categorical(logits=f), 3),
    "bernoulli": (lambda f: dist.Bernoulli(logits=f.squeeze(-1)), 1),
    "poisson": (lambda f: dist.Poisson(f.squeeze(-1).exp()), 1),
}


@pytest.mark.parametrize("mix", [lambda x: x, centred], ids=["by-row", "coupled"])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", ["normal-1", "normal-3", "categorical"])
def test_moments_of_the_outputs(
    name: str, joint: bool, mix: Callable[[Tensor], Tensor]
) -> None:
    posterior = fitted(*FAMILIES[name], mix=mix)

    def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = posterior.output_distribution(x, joint=joint)
        return found.loc, found.covariance_matrix, found.variance

    x = double(NUM_TEST, NUM_INPUTS).requires_grad_()
    assert torch.autograd.gradcheck(moments, (x,))
    # the same numbers as without gradients
    for ours, plain in zip(moments(x), moments(x.detach()), strict=True):
        assert_close(ours.detach(), plain, **EXACT)


def test_one_observation() -> None:
    posterior = fitted(*FAMILIES["normal-1"])

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        found = posterior.output_distribution(x)
        return found.loc, found.variance

    x = double(1, NUM_INPUTS).requires_grad_()
    assert torch.autograd.gradcheck(moments, (x,))


@pytest.mark.parametrize(
    ("name", "link"),
    [
        ("normal-1", None),
        ("normal-3", None),
        ("heteroscedastic", None),
        ("categorical", "probit"),
        ("categorical", "pairwise"),
        ("categorical", "bridge"),
        ("categorical", "bridge-norm"),
        ("categorical", "mc"),
        ("bernoulli", "probit"),
        ("bernoulli", "quadrature"),
        ("poisson", None),
        ("poisson", "mc"),
    ],
)
def test_log_density_of_y(name: str, link: str | None) -> None:
    family, num_outputs = FAMILIES[name]
    posterior = fitted(family, num_outputs)
    y = family(double(NUM_TEST, num_outputs)).sample()

    def log_prob(x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        found = posterior.predictive_distribution(
            x, link=link, num_samples=20, generator=generator
        )
        return found.log_prob(y)

    x = double(NUM_TEST, NUM_INPUTS).requires_grad_()
    assert torch.autograd.gradcheck(log_prob, (x,))


@pytest.mark.parametrize("name", ["normal-3", "categorical"])
def test_joint_log_density_of_y(name: str) -> None:
    family, num_outputs = FAMILIES[name]
    posterior = fitted(family, num_outputs)
    y = family(double(NUM_TEST, num_outputs)).sample()
    y = y.flatten()

    def log_prob(x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        found = posterior.predictive_distribution(
            x, joint=True, num_samples=20, generator=generator
        )
        return found.log_prob(y)

    x = double(NUM_TEST, NUM_INPUTS).requires_grad_()
    assert torch.autograd.gradcheck(log_prob, (x,))


def test_functions() -> None:
    posterior = fitted(*FAMILIES["normal-3"])

    def draws(x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return posterior.sample_functions(4, x, generator=generator)

    x = double(NUM_TEST, NUM_INPUTS).requires_grad_()
    assert torch.autograd.gradcheck(draws, (x,))


def test_a_noise_scale_that_moves_with_the_input() -> None:
    """No subnet weight moves it, but the input does."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        prior = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1)
        w = pyro.sample("w", prior)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x @ w).sin(), F.softplus(x[:, 0])), obs=y)

    posterior = AutoSubnetLaplace(model).laplace_approximation(
        double(NUM_TRAIN, 2), double(NUM_TRAIN)
    )

    def scale(x: Tensor) -> Tensor:
        return posterior.predictive_distribution(x).stddev

    assert torch.autograd.gradcheck(scale, (double(NUM_TEST, 2).requires_grad_(),))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_carries_gradients_where_none_are_wanted(mode: Any) -> None:
    posterior = fitted(*FAMILIES["normal-3"])
    x = double(NUM_TEST, NUM_INPUTS).requires_grad_()
    with mode():
        found = posterior.predictive_distribution(x)
        outputs = posterior.output_distribution(x)
        draws = posterior.sample_functions(2, x)
    plain = posterior.predictive_distribution(x.detach())
    for distribution in (found, outputs, plain):
        assert not distribution.loc.requires_grad
        assert not distribution.scale_tril.requires_grad
    assert not draws.requires_grad


# ----------------------------------------------------------------------------------
# The factor.


@pytest.mark.parametrize("shape", [(1, 3), (3, 3), (3, 5), (2, 3, 4)])
def test_the_factors_gradient(shape: tuple[int, ...]) -> None:
    assert torch.autograd.gradcheck(lower_factor, (double(*shape).requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 7), (5, 1, 7), (0, 1, 7), (4, 2, 7), (4, 3, 2)])
def test_a_factor_without_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Also where an output has no variance, which leaves the covariance singular."""
    rows = double(*shape).to(dtype)
    for given in (rows, rows * torch.arange(shape[-2]).to(dtype).unsqueeze(-1)):
        factor = lower_factor(given)
        assert factor.shape == (*shape[:-1], shape[-2])
        assert torch.equal(factor, factor.tril())
        assert not bool((factor.diagonal(dim1=-2, dim2=-1) < 0).any())
        exact = given.double()
        found, expected = (factor @ factor.mT).double(), exact @ exact.mT
        assert_close(found, expected, **tolerance(dtype, "reordered"))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_singular_factors_gradient_where_it_is_read_as_a_covariance(
    rank: int,
) -> None:
    left, right = double(4, rank), double(rank, 3)

    def covariance(rows: Tensor) -> Tensor:
        factor = lower_factor(rows)
        return factor @ factor.mT

    rows = (left @ right).requires_grad_()
    weight = double(4, 4)
    (found,) = torch.autograd.grad((covariance(rows) * weight).sum(), rows)
    (expected,) = torch.autograd.grad(((rows @ rows.mT) * weight).sum(), rows)
    assert_close(found, expected, **EXACT)


# ----------------------------------------------------------------------------------
# What it is for.


def test_bayesian_optimisation_finds_the_optimum() -> None:
    """Expected improvement, climbed by gradient, on a known function of one input."""

    def target(x: Tensor) -> Tensor:
        return (3 * x).sin() - 0.4 * (x - 0.5).square()

    def features(x: Tensor) -> Tensor:
        centres = torch.linspace(-2, 2, 15, dtype=torch.float64)
        return (-((x.unsqueeze(-1) - centres) ** 2) / (2 * 0.4**2)).exp()

    def model(x: Tensor, y: Tensor | None = None) -> None:
        zero = torch.zeros(15, dtype=torch.float64)
        w = pyro.sample("w", dist.Normal(zero, 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(features(x) @ w, 0.01), obs=y)

    def map_weights(x: Tensor, y: Tensor) -> Tensor:
        phi = features(x)
        eye = torch.eye(15, dtype=torch.float64)
        return torch.linalg.solve(phi.mT @ phi / 1e-4 + eye, phi.mT @ y / 1e-4)

    def expected_improvement(d: Any, best: Tensor) -> Tensor:
        unit = torch.distributions.Normal(torch.zeros_like(best), 1.0)
        z = (d.mean - best) / d.stddev
        return d.stddev * (z * unit.cdf(z) + unit.log_prob(z).exp())

    x = torch.tensor([-1.7, 1.9], dtype=torch.float64)
    for _ in range(9):
        y = target(x)
        init = init_to_value(values={"w": map_weights(x, y)})
        guide = AutoSubnetLaplace(model, init_loc_fn=init)
        posterior = guide.laplace_approximation(x, y)
        starts = torch.linspace(-2, 2, 9, dtype=torch.float64)
        candidate = starts.requires_grad_()
        optimizer = torch.optim.Adam([candidate], lr=0.05)
        for _ in range(15):
            optimizer.zero_grad()
            found = posterior.predictive_distribution(candidate)
            gain = expected_improvement(found, y.max())
            (-gain.sum()).backward()
            optimizer.step()
            candidate.data.clamp_(-2, 2)
        x = torch.cat([x, candidate.detach()[gain.argmax()].reshape(1)])
    grid = torch.linspace(-2, 2, 4001, dtype=torch.float64)
    best = x[target(x).argmax()]
    assert abs(float(best - grid[target(grid).argmax()])) < 0.05
    assert math.isclose(float(target(x).max()), float(target(grid).max()), abs_tol=0.01)
