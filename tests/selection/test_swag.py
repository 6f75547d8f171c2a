"""Moments of SGD iterates, against the stacked iterates, and the choice by them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jaxtyping
import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoLaplaceApproximation
from torch import Tensor
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.exceptions import (
    ModelError,
    NonFiniteError,
    OptionError,
    SelectionError,
)
from pyro_subnet.selection import LargestVariance, SwagMoments
from tests.cases import DOUBLE, Case, draw, regression_mlp
from tests.tolerances import tolerance

SUM = tolerance(torch.float64, "reordered")


def set_up(case: Case) -> AutoSubnetLaplace:
    pyro.clear_param_store()
    guide = case.guide()
    guide(*case.args)
    return guide


def collect(guide: AutoSubnetLaplace, iterates: Tensor) -> SwagMoments:
    moments = SwagMoments(guide)
    for iterate in iterates:
        guide.loc.data.copy_(iterate)
        moments.update()
    return moments


@pytest.mark.parametrize("count", [2, 3, 50])
def test_moments(count: int) -> None:
    case = regression_mlp(DOUBLE)
    iterates = draw(3, count, case.num_params)
    moments = collect(set_up(case), iterates)
    assert moments.count == count
    assert_close(moments.mean, iterates.mean(0), **SUM)
    squared = iterates.square().mean(0) - iterates.mean(0).square()  # as printed
    assert_close(moments.variance, squared, **SUM)


def test_small_steps_about_a_large_mean_keep_their_digits() -> None:
    """In float32, where mean square less squared mean is lost."""
    case = regression_mlp(DOUBLE.float())
    iterates = 1000 + 1e-2 * draw(4, 40, case.num_params)
    single = iterates.float()
    moments = collect(set_up(case), single)
    expected = single.double().var(0, correction=0)
    assert_close(moments.variance, expected, rtol=1e-7, atol=0)
    assert moments.variance.dtype == torch.float64
    naive = single.square().mean(0) - single.mean(0).square()
    assert not torch.allclose(naive.double(), expected, rtol=0.1)


def test_in_training_the_guide_is_only_read() -> None:
    case = regression_mlp(DOUBLE)
    runs = []
    for with_moments in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = case.guide()
        moments = SwagMoments(guide)  # before the guide is set up
        svi = SVI(case.model, guide, pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO())
        seen = []
        for _ in range(7):
            svi.step(*case.args)
            if with_moments:
                moments.update()
            seen.append(guide.loc.detach().clone())
        runs.append(torch.stack(seen))
    assert_close(runs[1], runs[0], rtol=0, atol=0)
    assert_close(moments.variance, runs[1].var(0, correction=0), **SUM)
    assert guide.loc.requires_grad
    moments.variance.zero_()  # a tensor of its own
    assert float(moments.variance.sum()) > 0


@pytest.mark.parametrize("size", [1, 6, 21])
def test_largest_variance_by_moments(size: int) -> None:
    case = regression_mlp(DOUBLE)
    iterates = draw(5, 9, case.num_params)
    moments = collect(set_up(case), iterates)
    selector = LargestVariance(size, estimator="swag", moments=moments)
    pyro.clear_param_store()
    x, y = case.args
    # without a pass over the data, so that one-shot batches serve
    guide = case.guide(selector)
    guide(x, y)
    subnet = guide.laplace_approximation_from(iter([(x, y)])).subnet
    order = iterates.var(0, correction=0).argsort(descending=True, stable=True)
    assert subnet.flat.tolist() == sorted(order[:size].tolist())
    assert subnet.explained_variance is None


def test_equal_moments_go_by_position() -> None:
    case = regression_mlp(DOUBLE)
    iterates = draw(5, 9, 1).expand(9, case.num_params)
    moments = collect(set_up(case), iterates + torch.arange(21))
    selector = LargestVariance(4, estimator="swag", moments=moments)
    pyro.clear_param_store()
    subnet = case.guide(selector).laplace_approximation(*case.args).subnet
    assert subnet.flat.tolist() == [0, 1, 2, 3]


def test_weights_without_curvature() -> None:
    """Kept, they go by their iterates; left out, the data are read to know them."""
    case = regression_mlp(DOUBLE)
    x, y = case.args
    x = x.clone()
    x[:, 1] = 0.0
    iterates = draw(6, 5, case.num_params)
    iterates[:, [1, 4, 7, 10]] *= 100  # of the column that is always zero
    moments = collect(set_up(case), iterates)
    order = iterates.var(0, correction=0).argsort(descending=True).tolist()
    pyro.clear_param_store()
    kept = LargestVariance(6, estimator="swag", moments=moments)
    subnet = case.guide(kept).laplace_approximation(x, y).subnet
    assert subnet.flat.tolist() == sorted(order[:6])
    pyro.clear_param_store()
    left = LargestVariance(6, estimator="swag", moments=moments, keep_dead=False)
    subnet = case.guide(left).laplace_approximation(x, y).subnet
    assert subnet.flat.tolist() == sorted(order[4:10])
    assert subnet.explained_variance is not None
    assert 0 < subnet.explained_variance < 1


def test_printing_and_comparing() -> None:
    moments = SwagMoments(object())
    selector = LargestVariance(3, estimator="swag", moments=moments)
    assert repr(selector) == (
        "LargestVariance(size=3, estimator='swag', keep_dead=True)"
    )
    assert selector == LargestVariance(3, estimator="swag", moments=moments)
    assert selector != LargestVariance(3, estimator="swag", moments=SwagMoments(0))


# ----------------------------------------------------------------------------------
# Errors.


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_updates(count: int) -> None:
    case = regression_mlp(DOUBLE)
    moments = collect(set_up(case), draw(3, count, case.num_params))
    message = rf"at least 2 updates; got {count}\. Call `update\(\)`"
    with pytest.raises(SelectionError, match=message):
        moments.variance  # noqa: B018 - the property raises
    pyro.clear_param_store()
    guide = case.guide(LargestVariance(3, estimator="swag", moments=moments))
    with pytest.raises(SelectionError, match=message):
        guide.laplace_approximation(*case.args)


def test_no_mean_without_updates() -> None:
    with pytest.raises(SelectionError, match=r"at least one update; got 0\. Call"):
        SwagMoments(object()).mean  # noqa: B018 - the property raises


def test_a_guide_that_is_not_set_up() -> None:
    case = regression_mlp(DOUBLE)
    for guide in (case.guide(), AutoLaplaceApproximation(case.model)):
        moments = SwagMoments(guide)
        with pytest.raises(ModelError, match=r"got one without `loc`\. Take an SVI"):
            moments.update()


def test_moments_of_another_model() -> None:
    case = regression_mlp(DOUBLE)

    class Short:
        loc = torch.zeros(3)

    moments = SwagMoments(Short())
    moments.update()
    moments.update()
    guide = case.guide(LargestVariance(3, estimator="swag", moments=moments))
    with pytest.raises(SelectionError, match="latent parameters, 21; got 3"):
        guide.laplace_approximation(*case.args)
    Short.loc = torch.zeros(4)
    with pytest.raises(SelectionError, match="must keep its length, 3; got 4"):
        moments.update()


def test_iterates_that_are_not_finite() -> None:
    case = regression_mlp(DOUBLE)
    guide = set_up(case)
    moments = collect(guide, draw(3, 4, case.num_params))
    before = moments.variance
    guide.loc.data[2] = float("nan")
    message = r"got 1 non-finite of 21 values at update 5\. Lower"
    with pytest.raises(NonFiniteError, match=message):
        moments.update()
    assert moments.count == 4
    assert_close(moments.variance, before, rtol=0, atol=0)


@pytest.fixture
def as_users_run_it() -> Iterator[None]:
    """Without the run-time type checks of the tests, which come before our own."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "swag"}, "got NoneType with 'swag'. Collect them"),
        ({"moments": SwagMoments(object())}, "got SwagMoments with 'ggn'. Collect"),
    ],
)
def test_moments_come_with_their_estimator(options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        LargestVariance(3, **options)
