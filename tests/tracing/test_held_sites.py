"""Hyperparameters held by `pyro.condition` are no data; data given by it are."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from torch import Tensor
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, to_inference_data
from tests.cases import draw
from tests.tolerances import tolerance

NOISE, TAU = 0.3, [0.5, 1.0, 2.0]


def plated(x: Tensor, y: Tensor | None = None) -> None:
    """Noise, scales and offset of a linear model are sites; the data have a plate."""
    noise = pyro.sample("noise", dist.HalfNormal(torch.ones(()).to(x)))
    with pyro.plate("features", 3):
        tau = pyro.sample("tau", dist.HalfNormal(torch.ones(3).to(x)))
        w = pyro.sample("w", dist.Normal(torch.zeros(3).to(x), tau))
    offset = pyro.sample("offset", dist.Normal(torch.zeros(()).to(x), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w + offset, noise), obs=y)


def by_events(x: Tensor, y: Tensor | None = None) -> None:
    """The same without plates."""
    noise = pyro.sample("noise", dist.HalfNormal(torch.ones(()).to(x)))
    tau = pyro.sample("tau", dist.HalfNormal(torch.ones(3).to(x)).to_event(1))
    w = pyro.sample("w", dist.Normal(torch.zeros(3).to(x), tau).to_event(1))
    offset = pyro.sample("offset", dist.Normal(torch.zeros(()).to(x), 1.0))
    pyro.sample("y", dist.Normal(x @ w + offset, noise).to_event(1), obs=y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("model", [plated, by_events])
def test_held_hyperparameters(model: Any, count: int, dtype: torch.dtype) -> None:
    """All is as if they were numbers: the oracle is the linear-Gaussian closed form."""
    x, y = draw(1, count, 3).to(dtype), draw(2, count).to(dtype)
    tau = torch.tensor(TAU, dtype=dtype)
    held = {"noise": torch.tensor(NOISE, dtype=dtype), "tau": tau}
    given = pyro.condition(model, data={**held, "offset": torch.zeros((), dtype=dtype)})
    precision = x.T @ x / NOISE**2 + tau.pow(-2).diag()
    best = torch.linalg.solve(precision, x.T @ y / NOISE**2)
    start = pyro.infer.autoguide.initialization.init_to_value(values={"w": best})
    posterior = AutoSubnetLaplace(given, init_loc_fn=start).laplace_approximation(x, y)
    close = tolerance(dtype, "closed_form")
    assert_close(posterior.get_posterior().precision_matrix, precision, **close)
    covariance = x @ tau.square().diag() @ x.T + NOISE**2 * torch.eye(
        count, dtype=dtype
    )
    evidence = dist.MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y)
    found = posterior.log_marginal_likelihood().to(dtype)
    assert_close(found, evidence, **tolerance(dtype, "autograd"))
    # One-site calls do not ask for a site, and the held are not among the outputs.
    predicted = posterior.predictive_distribution(x)
    assert_close(predicted.mean, x @ best, **tolerance(dtype, "autograd"))
    assert posterior.output_distribution(x).event_shape == (1,)
    assert posterior.tune_noise_scale().noise_factor > 0
    drawn = Predictive(posterior.linearized_model, guide=posterior, num_samples=3)(x)
    assert drawn["y"].shape[-1] == count
    idata = to_inference_data(posterior, x, y, num_samples=10)
    assert list(idata.log_likelihood) == list(idata.observed_data) == ["y"]


def test_batches_count_the_data_alone() -> None:
    x, y = draw(1, 8, 3), draw(2, 8)
    held = {"noise": torch.tensor(NOISE), "tau": torch.tensor(TAU)}
    given = pyro.condition(plated, data=held)
    at = {"w": torch.zeros(3).to(x), "offset": torch.zeros(()).to(x)}
    start = pyro.infer.autoguide.initialization.init_to_value(values=at)
    guide = AutoSubnetLaplace(given, init_loc_fn=start)
    whole = guide.laplace_approximation(x, y)
    batches = list(zip(x.split(3), y.split(3), strict=True))
    for found in (
        guide.laplace_approximation_from(batches),
        guide.laplace_approximation_from(batches, num_data=8),
    ):
        both = [p.get_posterior().precision_matrix for p in (found, whole)]
        assert_close(*both, **tolerance(torch.float64, "reordered"))
        evidence = [p.log_marginal_likelihood() for p in (found, whole)]
        assert_close(*evidence, **tolerance(torch.float64, "reordered"))


def test_data_given_by_condition() -> None:
    """Data may come that way too, and those of two lengths stay two data sites."""

    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3).to(x), 1.0).to_event(1))
        with pyro.plate("sums", 2):
            pyro.sample("total", dist.Normal(w.sum().expand(2), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, NOISE))

    x = draw(1, 8, 3)
    given = pyro.condition(model, data={"y": draw(2, 8), "total": draw(3, 2)})
    posterior = AutoSubnetLaplace(given).laplace_approximation(x)
    wanted = x.T @ x / NOISE**2 + 2 * torch.ones(3, 3) + torch.eye(3)
    found = posterior.get_posterior().precision_matrix
    assert_close(found, wanted.double(), **tolerance(torch.float64, "closed_form"))
    idata = to_inference_data(posterior, x, num_samples=4)
    assert set(idata.log_likelihood) == {"total", "y"}
