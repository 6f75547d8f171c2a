"""More data: posteriors that are updated equal those fitted to everything at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_value
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.exceptions import OptionError
from tests.cases import CASES, DOUBLE, Case
from tests.tolerances import tolerance

SAME = tolerance(torch.float64, "reordered")
NAMES = ["regression_mlp", "classification_mlp", "several_outputs", "cnn"]
OPTIONS: dict[str, dict[str, Any]] = {
    "primal": {"form": "primal"},
    "dual": {"form": "dual"},
    "hessian": {"curvature": "hessian"},
    "ef": {"curvature": "ef"},
    "diag": {"covariance": "diag"},
}


def part(case: Case, start: int, stop: int) -> tuple[Any, ...]:
    """Some of the data."""
    return tuple(arg[start:stop] for arg in case.args)


def assert_same(
    found: AutoSubnetMultivariateNormal, expected: AutoSubnetMultivariateNormal
) -> None:
    ours, theirs = found.get_posterior(), expected.get_posterior()
    assert_close(ours.precision_matrix, theirs.precision_matrix, **SAME)
    assert_close(ours.loc, theirs.loc, **SAME)
    assert_close(ours.variance, theirs.variance, **SAME)
    evidence = expected.log_marginal_likelihood()
    assert_close(found.log_marginal_likelihood(), evidence, **SAME)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", OPTIONS)
def test_a_stream_equals_the_one_shot_fit(name: str, kind: str) -> None:
    case = CASES[name](DOUBLE)
    positions = case.scattered()
    if kind == "hessian":  # is positive definite in the last layer, on any data
        positions = list(range(case.num_params - 3, case.num_params))
    guide = case.guide(positions, **OPTIONS[kind])
    expected = guide.laplace_approximation(*case.args)
    first = guide.laplace_approximation(*part(case, 0, 3))
    second = first.update(*part(case, 3, 4)).update(*part(case, 4, 7))
    assert_same(second, expected)
    batches = [part(case, 3, 5), part(case, 5, 7)]
    assert_same(first.update_from(batches), expected)
    scaled = first.with_prior_precision(0.2)
    assert_same(scaled.update(*part(case, 3, 7)), expected.with_prior_precision(0.2))


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_at_another_noise(form: str) -> None:
    case = CASES["regression_mlp"](DOUBLE)
    guide = case.guide(case.scattered(), form=form)
    first = guide.laplace_approximation(*part(case, 0, 3)).with_noise_scale(0.4)
    expected = guide.laplace_approximation(*case.args).with_noise_scale(0.4)
    assert_same(first.update(*part(case, 3, 7)), expected)


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_forgetting_weighs_the_old_data_down(form: str) -> None:
    """As ``poutine.scale`` around their likelihood would."""
    case = CASES["classification_mlp"](DOUBLE)
    guide = case.guide(case.scattered(), form=form)
    found = guide.laplace_approximation(*part(case, 0, 4))
    found = found.update(*part(case, 4, 7), forgetting=0.3)

    class WeighData(Messenger):
        def __init__(self, weight: Tensor):
            super().__init__()
            self.weight = weight

        def _pyro_sample(self, msg: dict[str, Any]) -> None:
            if msg["name"] == "y":
                msg["scale"] = msg["scale"] * self.weight

    def weighted(x: Tensor, y: Tensor, weight: Tensor) -> Any:
        with WeighData(weight):
            return case.model(x, y)

    own = AutoSubnetLaplace(
        weighted,
        case.positions_by_site(case.scattered()),
        init_loc_fn=lambda site: guide.median()[site["name"]],
    )
    weight = torch.tensor([0.3] * 4 + [1.0] * 3, dtype=torch.float64)
    expected = own.laplace_approximation(*case.args, weight)
    assert_same(found, expected)


@pytest.mark.parametrize("forgetting", [0.0, -1.0, 1.5])
def test_bad_forgetting(forgetting: float) -> None:
    case = CASES["regression_mlp"](DOUBLE)
    posterior = case.guide(case.scattered()).laplace_approximation(*case.args)
    message = rf"`forgetting` must be in \(0, 1\]; got {forgetting}\. Pass 1\.0"
    with pytest.raises(OptionError, match=message):
        posterior.update(*case.args, forgetting=forgetting)


def test_everything_else_is_left_alone() -> None:
    case = CASES["regression_mlp"](DOUBLE)
    guide = case.guide(case.scattered())
    posterior = guide.laplace_approximation(*case.args)
    before = {name: buffer.clone() for name, buffer in posterior.named_buffers()}
    store = set(pyro.get_param_store().keys())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    updated = posterior.update(*case.args)
    assert torch.equal(torch.get_rng_state(), state) is True
    assert set(pyro.get_param_store().keys()) == store
    for name, buffer in posterior.named_buffers():
        assert_close(buffer, before[name], rtol=0.0, atol=0.0)
    assert_close(updated.loc, posterior.loc, rtol=0.0, atol=0.0)


def test_more_data_never_raise_a_variance() -> None:
    case = CASES["classification_mlp"](DOUBLE)
    posterior = case.guide(case.scattered()).laplace_approximation(*case.args)
    variance = posterior.get_posterior().variance
    for _ in range(3):
        posterior = posterior.update(*case.args)
        found = posterior.get_posterior().variance
        assert bool((found <= variance * (1 + 1e-12)).all())
        variance = found


# New data of a model whose plate knows how many data there were.

NUM_OLD = 11


def by_size(x: Tensor) -> pyro.plate:
    """The plate is told how many data there are, and how many are shown."""
    return pyro.plate("data", NUM_OLD, subsample_size=len(x))


def by_index(x: Tensor) -> pyro.plate:
    """The plate is told which data are shown."""
    return pyro.plate("data", NUM_OLD, subsample=torch.arange(len(x)))


def linear(plate: Callable[[Tensor], Any]) -> Callable[..., None]:
    """A linear regression of noise 0.5 and unit prior, in the dtype of its data."""

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        with plate(x):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    return model


@pytest.mark.parametrize("sizes", [(5,), (4, 1), (1, 1, 3)])
@pytest.mark.parametrize("plate", [by_size, by_index])
def test_new_data_count_once_under_a_subsampling_plate(
    plate: Callable[[Tensor], Any], sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, y = torch.randn(NUM_OLD + 5, 3, dtype=dtype), torch.randn(NUM_OLD + 5).to(dtype)
    parts = list(zip(x[NUM_OLD:].split(sizes), y[NUM_OLD:].split(sizes), strict=True))
    at_zero = init_to_value(values={"w": x.new_zeros(3)})
    guide = AutoSubnetLaplace(linear(plate), init_loc_fn=at_zero)
    first = guide.laplace_approximation(x[:NUM_OLD], y[:NUM_OLD])
    updated = first
    for part in parts:
        updated = updated.update(*part)
    streamed = first.update_from(parts)
    dense = x.double()
    right = (4.0 * dense.T @ dense + torch.eye(3, dtype=torch.float64)).to(dtype)
    close = tolerance(dtype, "closed_form")
    for found in (updated, streamed):
        assert_close(found.get_posterior().precision_matrix, right, **close)
    # At zero: log N(y; 0, 0.5), and the prior's density.
    log_joint = -2.0 * y.double().square().sum() - len(y) * math.log(0.5)
    log_joint -= (len(y) + 3) * 0.5 * math.log(2 * math.pi)
    evidence = log_joint + 1.5 * math.log(2 * math.pi) - 0.5 * right.double().logdet()
    assert_close(updated.log_marginal_likelihood(), evidence, **close)
    assert_close(streamed.log_marginal_likelihood(), evidence, **close)


def test_a_scale_of_the_users_own_is_kept_by_an_update() -> None:
    x, y = torch.randn(NUM_OLD, 3).double(), torch.randn(NUM_OLD).double()
    tempered = poutine.scale(linear(by_size), scale=0.25)
    first = AutoSubnetLaplace(tempered).laplace_approximation(x, y)
    updated = first.update(x[:2], y[:2]).get_posterior().precision_matrix
    dense = torch.cat([x, x[:2]])
    # The scale is around the whole model, the prior too.
    right = 0.25 * (4.0 * dense.T @ dense + torch.eye(3, dtype=torch.float64))
    assert_close(updated, right, **tolerance(torch.float64, "closed_form"))
