"""A factor in the data's plate counts as data do, against dense Hessians."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.testing import assert_close

from pyro_subnet import (
    AutoSubnetLaplace,
    AutoSubnetMultivariateNormal,
    to_inference_data,
)
from pyro_subnet.diagnostics import stationarity
from pyro_subnet.exceptions import ModelError, OptionError
from pyro_subnet.selection import LargestVariance
from tests import reference
from tests.tolerances import tolerance

DOUBLE = torch.float64
AUTOGRAD = tolerance(DOUBLE, "autograd")
REORDERED = tolerance(DOUBLE, "reordered")
N, WIDTH = 12, 3
Data = tuple[Tensor, Tensor, Tensor]
Model = Callable[..., None]


def survival(count: int = N, dtype: torch.dtype = DOUBLE) -> Data:
    """Inputs, times that are cut off at 1, and whether the event came before."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, WIDTH, generator=generator, dtype=DOUBLE)
    time = -torch.rand(count, generator=generator, dtype=DOUBLE).log()
    event = time < 1.0
    return x.to(dtype), time.clamp(max=1.0).to(dtype), event


def weights(x: Tensor) -> Tensor:
    return pyro.sample("w", dist.Normal(x.new_zeros(WIDTH), 1.0).to_event(1))


def censored(x: Tensor, time: Tensor, event: Tensor, total: int | None = None) -> None:
    """Times to an event, of which some are cut off; ``total`` data, of which these."""
    rate = (x @ weights(x)).exp()
    rows = torch.arange(len(x))
    with pyro.plate("data", total or len(x), subsample=rows if total else None):
        with poutine.mask(mask=event):
            pyro.sample("time", dist.Exponential(rate), obs=time)
        with poutine.mask(mask=~event):
            pyro.factor("survived", -rate * time)


def unobserved(x: Tensor, time: Tensor, event: Tensor) -> None:
    """The same density without any observed site."""
    rate = (x @ weights(x)).exp()
    with pyro.plate("data", len(x)):
        pyro.factor("all", event * rate.log() - rate * time)


def log_likelihood(w: Tensor, x: Tensor, time: Tensor, event: Tensor) -> Tensor:
    """Observation by observation, as a textbook writes it."""
    rate = (x @ w).exp()
    return event * rate.log() - rate * time


def exact(w: Tensor, data: Data) -> Tensor:
    """The negative Hessian of the log likelihood."""
    return reference.dense_negative_hessian(
        lambda w: log_likelihood(w, *data).sum(), w.to(DOUBLE)
    )


def ggn(w: Tensor, data: Data) -> Tensor:
    """Fisher information of the events, 1 in the log rate, and a factor's Hessian."""
    x, time, event = data
    ours = torch.where(event, 1.0, (x @ w).exp() * time)
    return x.T @ (ours[:, None] * x)


def at_start(site: dict[str, Any]) -> Tensor:
    return site["fn"].mean.new_tensor([0.4, -0.3, 0.2])


def guide(model: Model = censored, **options: Any) -> AutoSubnetLaplace:
    return AutoSubnetLaplace(model, init_loc_fn=at_start, **options)


def precision(posterior: AutoSubnetMultivariateNormal) -> Tensor:
    return posterior.get_posterior().precision_matrix


def same(
    ours: AutoSubnetMultivariateNormal, theirs: AutoSubnetMultivariateNormal
) -> None:
    assert_close(precision(ours), precision(theirs), **REORDERED)
    for posterior in (ours, theirs):  # the factor has left the prior
        assert_close(posterior.prior_precision.diagonal, torch.ones(WIDTH).double())
    evidence = theirs.log_marginal_likelihood()
    assert_close(ours.log_marginal_likelihood(), evidence, **REORDERED)


# Curvature.


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("count", [1, N])
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_a_prior_factor_leaves_it_alone(
    dtype: torch.dtype, count: int, curvature: str
) -> None:
    data = survival(count, dtype)
    posterior = guide(curvature=curvature).laplace_approximation(*data)
    w = posterior.median()["w"]
    of_data = exact(w, survival(count)) if curvature == "hessian" else ggn(w, data)
    for factor in (1.0, 10.0):
        found = precision(posterior.with_prior_precision(factor)).double()
        expected = of_data.double() + factor * torch.eye(WIDTH, dtype=DOUBLE)
        assert_close(found, expected, **tolerance(dtype, "autograd"))


def test_without_any_observed_site() -> None:
    data = survival()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it has data
        posterior = guide(unobserved).laplace_approximation(*data)
    expected = exact(posterior.median()["w"], data)
    found = precision(posterior.with_prior_precision(7.0))
    assert_close(found, expected + 7 * torch.eye(WIDTH, dtype=DOUBLE), **AUTOGRAD)


def test_a_subset_and_the_diagonal() -> None:
    data = survival()
    chosen = torch.tensor([0, 2])
    posterior = guide(subnet={"w": chosen}).laplace_approximation(*data)
    expected = ggn(posterior.median()["w"], data)
    found = posterior.ggn()
    assert_close(found, expected[chosen][:, chosen], **AUTOGRAD)
    posterior = guide(covariance="diag").laplace_approximation(*data)
    found = posterior.with_prior_precision(3.0).get_posterior().variance
    assert_close(found, 1 / (expected.diagonal() + 3), **AUTOGRAD)


def test_selectors_rank_by_it() -> None:
    data = survival()
    x, time, event = data
    # Only the factor sees the second weight, which it determines.
    x = x * torch.tensor([1.0, 0.0, 1.0])
    x = torch.where(event[:, None], x, 9.0 * torch.tensor([0.0, 1.0, 0.0]))
    posterior = guide(subnet=LargestVariance(2)).laplace_approximation(x, time, event)
    assert posterior.subnet.flat.tolist() == [0, 2]


def test_forms_that_cannot_hold_it() -> None:
    data = survival()
    message = "form='dual'` must have observed sites alone .* 'survived'"
    with pytest.raises(OptionError, match=message):
        guide(form="dual").laplace_approximation(*data)
    message = "Kronecker factors must have observed sites alone .* 'survived'"
    with pytest.raises(OptionError, match=message):
        guide(covariance="kron").laplace_approximation(*data)


# Batches, and more data.


@pytest.mark.parametrize("model", [censored, unobserved])
def test_batches_add_up(model: Model) -> None:
    data = survival()
    parts = list(zip(*(part.split(5) for part in data), strict=True))
    whole = guide(model).laplace_approximation(*data)
    same(guide(model).laplace_approximation_from(parts), whole)
    twice = guide(model).laplace_approximation_from(parts, num_data=2 * N)
    assert_close(twice.ggn(), 2 * whole.ggn(), **REORDERED)


def test_the_scale_of_a_subsampling_plate_is_left_out_of_a_sum() -> None:
    data = survival()
    parts = [(*part, N) for part in zip(*(t.split(5) for t in data), strict=True)]
    whole = guide().laplace_approximation(*data)
    same(guide().laplace_approximation_from(parts), whole)
    # One call states N/B itself.
    half = tuple(part[:6] for part in data)
    scaled = guide().laplace_approximation(*half, N)
    assert_close(scaled.ggn(), 2 * ggn(scaled.median()["w"], half), **AUTOGRAD)


@pytest.mark.parametrize("model", [censored, unobserved])
def test_an_update_adds_that_of_the_new_data(model: Model) -> None:
    data = survival()
    first, second = zip(*(part.split([7, 5]) for part in data), strict=True)
    whole = guide(model).laplace_approximation(*data)
    posterior = guide(model).laplace_approximation(*first)
    same(posterior.update(*second), whole)
    same(posterior.update_from([second]), whole)


# What goes by the log likelihood.


def test_the_evidence_and_the_gradient() -> None:
    data = survival()
    posterior = guide().laplace_approximation(*data)
    w = posterior.median()["w"].requires_grad_()
    density = log_likelihood(w, *data).sum()
    (gradient,) = torch.autograd.grad(density, w)
    found = posterior.summary.log_likelihood
    assert found == pytest.approx(density.item(), abs=1e-10)
    other = stationarity(posterior.with_prior_precision(4.0), *data)
    assert_close(other.gradient, gradient - 4 * w.detach(), **AUTOGRAD)


@pytest.mark.parametrize("linearized", [False, True])
def test_exported_densities(linearized: bool) -> None:
    data = survival()
    posterior = guide(curvature="hessian").laplace_approximation(*data)
    found = to_inference_data(
        posterior, *data, num_samples=20, linearized=linearized, seed=0
    )
    assert list(found["log_likelihood"].data_vars) == ["time"]
    draws = torch.as_tensor(found["posterior"]["w"].values[0])
    # The model is linear in the log rate: its expansion is itself.
    each = torch.stack([log_likelihood(w, *data) for w in draws])
    ours = torch.as_tensor(found["log_likelihood"]["time"].values[0])
    assert_close(ours, each, **AUTOGRAD)
    log_prior = dist.Normal(torch.zeros(WIDTH).double(), 1.0).log_prob(draws).sum(1)
    log_q = posterior.get_posterior().log_prob(draws)
    stats = found["sample_stats"]
    ratio = torch.as_tensor(stats["log_importance_ratio"].values[0])
    assert_close(ratio, each.sum(1) + log_prior - log_q, **AUTOGRAD)
    hybrid = posterior.hybrid_model(linearized=linearized)
    for row in range(2):  # the same joint density as Pyro's
        given = poutine.condition(hybrid, data={"subnet": draws[row]})
        joint = poutine.trace(given).get_trace(*data).log_prob_sum()
        assert_close(joint, each[row].sum() + log_prior[row], **AUTOGRAD)


def test_a_factor_without_one_site_of_its_own_has_a_variable() -> None:
    def model(x: Tensor, time: Tensor, event: Tensor) -> None:
        w = weights(x)
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(x @ w, 1.0), obs=time)
            pyro.sample("b", dist.Normal(x @ w, 2.0), obs=time)
            with poutine.mask(mask=event), poutine.scale(scale=3.0):
                pyro.factor("extra", -(x @ w).square())

    data = survival()
    posterior = guide(model).laplace_approximation(*data)
    found = to_inference_data(posterior, *data, num_samples=5, seed=0)
    draws = torch.as_tensor(found["posterior"]["w"].values[0])
    ours = torch.as_tensor(found["log_likelihood"]["extra"].values[0])
    assert_close(ours, -(draws @ data[0].T).square() * data[2], **AUTOGRAD)
    (x, _, event), scales = data, 1 / 1.0**2 + 1 / 2.0**2
    expected = scales * x.T @ x + 3 * 2 * x[event].T @ x[event]
    assert_close(posterior.ggn(), expected, **AUTOGRAD)


# What stays as it was.


def test_factors_outside_of_the_datas_plates_are_prior() -> None:
    def model(x: Tensor, time: Tensor, event: Tensor) -> None:
        with pyro.plate("weights", WIDTH):
            w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
            pyro.factor("smooth", -w.square())  # curvature 2
        pyro.factor("small", -(w.sum() ** 2))
        with pyro.plate("data", len(x)):
            pyro.sample("time", dist.Normal(x @ w, 1.0), obs=time)

    data = survival()
    posterior = guide(model).laplace_approximation(*data)
    x, one = data[0], torch.ones(WIDTH, WIDTH, dtype=DOUBLE)
    prior = 3 * torch.eye(WIDTH, dtype=DOUBLE) + 2 * one
    found = precision(posterior.with_prior_precision(5.0))
    assert_close(found, x.T @ x + 5 * prior, **AUTOGRAD)


def test_a_random_factor_is_refused() -> None:
    def model(x: Tensor, time: Tensor, event: Tensor) -> None:
        w = weights(x)
        with pyro.plate("data", len(x)):
            pyro.sample("time", dist.Normal(x @ w, 1.0), obs=time)
            pyro.factor("noisy", torch.randn(len(x)) * (x @ w))

    with pytest.raises(ModelError, match="must give the same prior in every run"):
        guide(model).laplace_approximation(*survival())


def test_tuning_that_leaves_it_out_is_refused() -> None:
    def model(x: Tensor, time: Tensor, event: Tensor) -> None:
        w = weights(x)
        with pyro.plate("data", len(x)):
            pyro.sample("time", dist.Normal(x @ w, 1.0), obs=time)
            pyro.factor("extra", -(x @ w).square())

    data = survival()
    posterior = guide(model).laplace_approximation(*data)
    with pytest.raises(OptionError, match="normal"):
        posterior.with_noise_scale(2.0)
    with pytest.raises(ModelError, match=r"must all be observed.* 'extra'"):
        posterior.tune_prior_precision("nll", val=data)
    assert posterior.tune_prior_precision().prior_factor != 1.0


def test_files_hold_a_diagonal_that_it_makes_negative(tmp_path: Path) -> None:
    def model(x: Tensor, time: Tensor, event: Tensor) -> None:
        w = weights(x)
        with pyro.plate("data", len(x)):
            pyro.sample("time", dist.Normal(0.1 * x @ w, 1.0), obs=time)
            pyro.factor("convex", 0.02 * (x @ w).square())

    data = survival()
    posterior = guide(model, covariance="diag").laplace_approximation(*data)
    expected = (0.01 - 0.04) * data[0].square().sum(0)
    assert_close(posterior.ggn().diagonal(), expected, **AUTOGRAD)
    posterior.save(tmp_path / "posterior")
    kind = AutoSubnetMultivariateNormal
    again = kind.load(tmp_path / "posterior", model, *data)
    assert_close(again.get_posterior().variance, posterior.get_posterior().variance)
