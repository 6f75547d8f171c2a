"""Whether a learned noise is likely too small, against dense algebra."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import init_to_value
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.diagnostics import absorbed_noise
from pyro_subnet.exceptions import AbsorbedNoiseWarning, ModelError, OptionError
from pyro_subnet.nn import bayesianize, init_to_module

N, INPUTS = 12, 40
PRIOR_SCALE = 1.5
MESSAGE = r"has \d+ effective parameters for 12 data, .*`posterior.tune\(val="


def data(dtype: torch.dtype = torch.float32, count: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, INPUTS, generator=generator, dtype=dtype)
    return x, 0.1 * torch.randn(count, generator=generator, dtype=dtype)


def latent_noise(like: Tensor) -> Tensor:
    return pyro.sample("sigma", dist.LogNormal(torch.zeros_like(like), 1.0))


def param_noise(like: Tensor) -> Tensor:
    start = torch.full_like(like, 0.1)
    return pyro.param("sigma", start, constraint=dist.constraints.positive)


def fixed_noise(like: Tensor) -> Tensor:
    return torch.full_like(like, 0.1)


def linear(noise: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        prior = dist.Normal(x.new_zeros(INPUTS), PRIOR_SCALE).to_event(1)
        w = pyro.sample("w", prior)
        scale = noise(x.new_zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, scale), obs=y)

    return model


def start(site: Any) -> Tensor:
    """At weights of zero and a noise of 0.1, where the data are likely enough."""
    value = torch.zeros(site["fn"].shape())
    return value + 0.1 if site["name"] == "sigma" else value


def fitted(model: Any, subnet: Any = 3, count: int = N, **options: Any) -> Any:
    guide = AutoSubnetLaplace(model, subnet, init_loc_fn=start, **options)
    return guide.laplace_approximation(*data(count=count))


@pytest.mark.parametrize("count", [1, N])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_effective_parameters_are_those_of_dense_algebra(
    dtype: torch.dtype, count: int
) -> None:
    """gamma = tr K (K + I)^-1 with K = X X^T times prior variance over noise variance,
    of the weights alone."""
    x, y = data(dtype, count)
    zero = init_to_value(values={"w": torch.zeros(INPUTS, dtype=dtype)})
    guide = AutoSubnetLaplace(linear(fixed_noise), 3, init_loc_fn=zero)
    found = absorbed_noise(guide.laplace_approximation(x, y), x, y)
    kernel = (x @ x.T).double() * PRIOR_SCALE**2 / 0.1**2
    inverse = torch.linalg.inv(kernel + torch.eye(count, dtype=torch.float64))
    expected = float((kernel @ inverse).trace())
    assert found.num_data == count
    rtol = 1e-5 if dtype == torch.float32 else 1e-10
    assert found.effective_parameters == pytest.approx(expected, rel=rtol)
    rest = count - found.effective_parameters
    assert found.factor == pytest.approx(math.sqrt(count / rest))


def test_the_factors_of_a_posterior_are_those_it_is_measured_under() -> None:
    x, y = data(torch.float64)
    zero = init_to_value(values={"w": torch.zeros(INPUTS, dtype=x.dtype)})
    guide = AutoSubnetLaplace(linear(fixed_noise), 3, init_loc_fn=zero)
    posterior = guide.laplace_approximation(x, y)
    scaled = posterior.with_prior_precision(4.0).with_noise_scale(30.0)
    kernel = x @ x.T * PRIOR_SCALE**2 / 4 / (30 * 0.1) ** 2
    inverse = torch.linalg.inv(kernel + torch.eye(N, dtype=x.dtype))
    expected = float((kernel @ inverse).trace())
    found = absorbed_noise(scaled, x, y)
    assert found.effective_parameters == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("subnet", [3, None])
@pytest.mark.parametrize("noise", [latent_noise, param_noise])
def test_a_learned_noise_that_the_weights_absorb_warns(noise: Any, subnet: Any) -> None:
    with pytest.warns(AbsorbedNoiseWarning, match=MESSAGE) as caught:
        fitted(linear(noise), subnet)
    own = [each for each in caught if each.category is AbsorbedNoiseWarning]
    assert [each.filename for each in own] == [__file__]


def test_a_network_as_users_write_it_warns() -> None:
    """Its noise a latent site of a module; the subnet a share."""
    net = nn.Sequential(nn.Linear(INPUTS, 20), nn.Tanh(), nn.Linear(20, 1))

    class Regression(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = bayesianize(net, prior_scale=3.0)
            self.sigma = PyroSample(dist.LogNormal(0.0, 1.0))

        def forward(self, x: Tensor, y: Tensor | None = None) -> None:
            loc = self.net(x).squeeze(-1)
            scale = self.sigma * 0.01
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(loc, scale), obs=y)

    x, _ = data()
    y = net(x).detach().squeeze(-1)
    guide = AutoSubnetLaplace(Regression(), 0.05, init_loc_fn=init_to_module(net))
    with pytest.warns(AbsorbedNoiseWarning, match=MESSAGE):
        guide.laplace_approximation_from([(x[:5], y[:5]), (x[5:], y[5:])])


def heteroscedastic(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(x.new_zeros(INPUTS), PRIOR_SCALE).to_event(1))
    sigma = latent_noise(x.new_zeros(()))
    with pyro.plate("data", len(x)):
        scale = sigma * (1 + x[:, 0].abs())
        pyro.sample("y", dist.Normal(x @ w, scale), obs=y)


def classes(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(x.new_zeros(INPUTS), PRIOR_SCALE).to_event(1))
    with pyro.plate("data", len(x)):
        labels = None if y is None else (y > 0).to(y.dtype)
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=labels)


def coupled(x: Tensor, y: Tensor | None = None) -> None:
    """A prior for which there is no kernel."""
    covariance = torch.eye(INPUTS) + 1
    w = pyro.sample("w", dist.MultivariateNormal(x.new_zeros(INPUTS), covariance))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, latent_noise(x.new_zeros(()))), obs=y)


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (linear(fixed_noise), N),
        (linear(latent_noise), 100),  # more data than weights
        (heteroscedastic, N),
        (classes, N),
        (coupled, N),
    ],
)
def test_what_cannot_be_absorbed_or_told_does_not_warn(model: Any, count: int) -> None:
    fitted(model, count=count)  # warnings are errors


def of_outputs(num_outputs: int, x: Tensor) -> None:
    """Fits 40 weights an output, which absorb nearly all of up to 50 data each."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        prior = dist.Normal(x.new_zeros(num_outputs, INPUTS), PRIOR_SCALE).to_event(2)
        w = pyro.sample("w", prior)
        sigma = latent_noise(x.new_zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w.mT, sigma).to_event(1), obs=y)

    guide = AutoSubnetLaplace(model, {"w": torch.arange(3)}, init_loc_fn=start)
    guide.laplace_approximation(x, torch.zeros(len(x), num_outputs))


@pytest.mark.parametrize(("num_outputs", "count"), [(1, N), (3, N), (20, 50)])
def test_the_data_are_counted_output_by_output(num_outputs: int, count: int) -> None:
    x, _ = data(count=count)
    with pytest.warns(AbsorbedNoiseWarning, match=f"for {count * num_outputs} data"):
        of_outputs(num_outputs, x)


def test_many_outputs_are_not_measured() -> None:
    """Twice as many outputs take a kernel beyond what a fit adds to its own cost. It
    would warn as that of half of them does, and warnings are errors."""
    x, _ = data(count=50)
    of_outputs(40, x)


def test_batches_that_can_be_read_once_are_not_read_for_it() -> None:
    guide = AutoSubnetLaplace(
        linear(latent_noise), {"w": torch.arange(3)}, init_loc_fn=start
    )
    guide(*data())
    guide.laplace_approximation_from(iter([data()]))


def test_it_means_nothing_for_other_families() -> None:
    posterior = fitted(classes)
    with pytest.raises(ModelError, match=r"one observed site, normal.* got \['y'\]"):
        absorbed_noise(posterior, *data())


def test_a_prior_that_couples_weights_is_refused() -> None:
    posterior = fitted(coupled)
    with pytest.raises(OptionError, match="a prior that couples weights"):
        absorbed_noise(posterior, *data())
