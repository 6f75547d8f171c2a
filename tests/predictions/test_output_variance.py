"""Variances of many outputs: exact ones beside covariances, drawn ones within error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.exceptions import OptionError
from pyro_subnet.nn import bayesianize, init_to_module
from pyro_subnet.selection import LastLayer, RandomSubnet
from tests.tolerances import num_standard_errors, tolerance

N, SIZE = 3, 12
Fitted = tuple[AutoSubnetMultivariateNormal, Tensor, tuple[int, ...]]


def fitted(
    net: nn.Module,
    x: Tensor,
    likelihood: Callable[[Tensor], Any],
    subnet: Any = None,
    **options: Any,
) -> AutoSubnetMultivariateNormal:
    net = net.to(x.dtype)
    bnn = bayesianize(net)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("y", likelihood(bnn(x)), obs=y)

    with torch.no_grad():
        y = likelihood(net(x)).sample()
    guide = AutoSubnetLaplace(
        model,
        RandomSubnet(SIZE, seed=2) if subnet is None else subnet,
        init_loc_fn=init_to_module(net),
        **options,
    )
    return guide.laplace_approximation(x, y)


def scalars(dtype: torch.dtype) -> Fitted:
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(0))
    x = torch.randn(N, 2, dtype=dtype)
    return fitted(net, x, lambda f: dist.Normal(f, 0.5)), x, (N, 1)


def classes(dtype: torch.dtype) -> Fitted:
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4))
    x = torch.randn(N, 2, dtype=dtype)
    return fitted(net, x, lambda f: dist.Categorical(logits=f)), x, (N, 4)


def pixels(dtype: torch.dtype) -> Fitted:
    net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 1, 1))
    net.append(nn.Flatten(1, 2))
    x = torch.randn(N, 1, 4, 5, dtype=dtype)
    found = fitted(net, x, lambda f: dist.Normal(f, 0.5).to_event(2))
    return found, x, (N, 4, 5)


def segments(dtype: torch.dtype) -> Fitted:
    net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 1))
    x = torch.randn(N, 1, 4, 5, dtype=dtype)
    found = fitted(
        net, x, lambda f: dist.Categorical(logits=f.movedim(1, -1)).to_event(2)
    )
    return found, x, (N, 4, 5, 2)


def tokens(dtype: torch.dtype) -> Fitted:
    net = nn.Sequential(
        nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), nn.Linear(4, 3)
    ).eval()
    x = torch.randn(N, 5, 4, dtype=dtype)
    found = fitted(net, x, lambda f: dist.Categorical(logits=f).to_event(1))
    return found, x, (N, 5, 3)


MADE = {each.__name__: each for each in (scalars, classes, pixels, segments, tokens)}


@pytest.fixture(params=list(MADE))
def made(request: pytest.FixtureRequest, dtype: torch.dtype) -> Fitted:
    return MADE[request.param](dtype)


def test_variances_are_those_of_the_covariances(made: Fitted) -> None:
    posterior, x, shape = made
    found = posterior.output_variance(x)
    assert found.shape == shape
    assert found.dtype == x.dtype
    expected = posterior.output_distribution(x).variance.reshape(shape)
    # A covariance's factor and sums of squares round apart.
    assert_close(found, expected, **tolerance(x.dtype, "autograd"))


def test_variances_from_draws_are_within_their_error(made: Fitted) -> None:
    posterior, x, shape = made
    count = 400
    generator = torch.Generator().manual_seed(0)
    found = posterior.output_variance(x, num_samples=count, generator=generator)
    exact = posterior.output_variance(x)
    assert found.shape == shape
    error = exact * (2 / count) ** 0.5
    bound = num_standard_errors(exact.numel()) * error
    # The squares of normal draws have a tail to the right.
    assert bool(((found - exact).abs() <= 1.3 * bound).all())
    assert float(((found - exact) / error).square().mean()) > 0.05


def test_draws_are_the_generators() -> None:
    posterior, x, _ = classes(torch.float64)
    first, again, other = (
        posterior.output_variance(
            x, num_samples=3, generator=torch.Generator().manual_seed(seed)
        )
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("covariance", ["diag", "kron"])
def test_draws_of_references_over_all_weights(covariance: str) -> None:
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    x = torch.randn(N, 2, dtype=torch.float64)
    everything = RandomSubnet(1.0, seed=0) if covariance == "diag" else None
    bnn = bayesianize(net)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=bnn(x)), obs=y)

    start = init_to_module(net)
    guide = AutoSubnetLaplace(
        model, everything, init_loc_fn=start, covariance=covariance
    )
    posterior = guide.laplace_approximation(x, torch.arange(N))
    exact = posterior.output_variance(x)
    generator = torch.Generator().manual_seed(1)
    drawn = posterior.output_variance(x, num_samples=2000, generator=generator)
    bound = num_standard_errors(exact.numel()) * (2 / 2000) ** 0.5
    assert_close(drawn, exact, rtol=1.2 * bound, atol=0.0)


def test_of_a_last_layer_rows_are_its_features() -> None:
    """Of 600 classes: variance c is that of features beside weights, in closed form."""
    num_classes, width = 600, 4
    net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, num_classes))
    x = torch.randn(N, 2, dtype=torch.float64)
    posterior = fitted(
        net,
        x,
        lambda f: dist.Normal(f, 0.5).to_event(1),
        LastLayer(),
        covariance="diag",
    )
    features = net[1](net[0](x)).detach()
    curvature = features.square().sum(0) / 0.25 + 1
    expected = (features.square() / curvature).sum(1) + 1 / (N / 0.25 + 1)
    found = posterior.output_variance(x)
    assert_close(found, expected[:, None].expand(-1, num_classes))


def test_exact_variances_are_differentiable_in_the_inputs() -> None:
    posterior, x, _ = pixels(torch.float64)
    inputs = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(posterior.output_variance(inputs).sum(), inputs)
    expected = posterior.output_distribution(inputs).variance.sum()
    (gradient,) = torch.autograd.grad(expected, inputs)
    assert_close(found, gradient, **tolerance(torch.float64, "autograd"))


@pytest.mark.parametrize("count", [0, -1])
def test_a_number_of_draws_is_a_count(count: int) -> None:
    posterior, x, _ = scalars(torch.float64)
    with pytest.raises(OptionError, match="num_samples"):
        posterior.output_variance(x, num_samples=count)
