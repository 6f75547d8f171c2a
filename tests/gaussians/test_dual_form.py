"""The dual form of the posterior, against the primal one on the same fit."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import psutil
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from torch import Tensor
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.exceptions import MemoryLimitError, OptionError
from pyro_subnet.gaussians.dual import DualForm
from pyro_subnet.gaussians.primal import PrimalForm
from pyro_subnet.options import FitOptions
from tests.cases import CASES, DOUBLE, Case, draw
from tests.tolerances import tolerance

# What the weights are does not matter to how their Gaussian is held.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pyro_subnet.exceptions.UntrainedWarning"
)

PREDICTION = {"rtol": 1e-8, "atol": 1e-8}
FLOAT32 = tolerance(torch.float32, "autograd")
NAMES = [
    "regression_mlp",
    "several_outputs",
    "classification_mlp",
    "weighted_poisson",
    "two_sites",
    "cnn",
    "plates",
]


def both(
    case: Case, positions: Any, **options: Any
) -> tuple[AutoSubnetMultivariateNormal, AutoSubnetMultivariateNormal]:
    """The primal posterior and the dual one."""
    primal, dual = (
        case.guide(positions, form=form, **options).laplace_approximation(
            *case.args, **case.kwargs
        )
        for form in ("primal", "dual")
    )
    assert isinstance(primal.form, PrimalForm)
    assert isinstance(dual.form, DualForm)
    return primal, dual


@pytest.mark.parametrize("curvature", ["ggn", "ef"])
@pytest.mark.parametrize("every", [True, False], ids=["all-weights", "some"])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_same_posterior(name: str, every: bool, curvature: str) -> None:
    case = CASES[name](DOUBLE)
    positions = list(range(case.num_params)) if every else case.scattered()
    primal, dual = both(case, positions, curvature=curvature)
    for scale in (1.0, 0.05, 40.0):
        first = primal.with_prior_precision(scale)
        second = dual.with_prior_precision(scale)
        ours, theirs = second.get_posterior(), first.get_posterior()
        for what in ("loc", "variance", "precision_matrix", "covariance_matrix"):
            assert_close(getattr(ours, what), getattr(theirs, what), **PREDICTION)
        assert_close(ours.scale_tril, theirs.scale_tril, **PREDICTION)
        assert_close(ours.entropy(), theirs.entropy(), **PREDICTION)
        value = theirs.loc + 0.1 * draw(3, len(theirs.loc))
        assert_close(ours.log_prob(value), theirs.log_prob(value), **PREDICTION)
        assert_close(
            second.log_marginal_likelihood(),
            first.log_marginal_likelihood(),
            **PREDICTION,
        )
        quantiles = second.quantiles([0.1, 0.7])
        for site, expected in first.quantiles([0.1, 0.7]).items():
            assert_close(quantiles[site], expected, **PREDICTION)
    assert_close(dual.ggn(), primal.ggn(), **PREDICTION)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", ["regression_mlp", "several_outputs", "cnn"])
def test_it_predicts_the_same(name: str, joint: bool) -> None:
    case = CASES[name](DOUBLE)
    primal, dual = both(case, case.scattered())
    inputs = case.args[0][1:4]
    if joint:  # where the data outweigh the prior by more
        primal, dual = (p.with_prior_precision(0.02) for p in (primal, dual))
    expected = primal.output_distribution(inputs, joint=joint)
    found = dual.output_distribution(inputs, joint=joint)
    assert_close(found.mean, expected.mean, **PREDICTION)
    assert_close(found.covariance_matrix, expected.covariance_matrix, **PREDICTION)


def test_draws_have_its_covariance_exactly() -> None:
    """The draws of unit vectors of noise are a square root of the covariance."""
    case = CASES["classification_mlp"](DOUBLE)
    primal, dual = both(case, case.scattered())
    gaussian = dual.gaussian
    root = gaussian.draw(torch.eye(gaussian.size).double()) - gaussian.loc
    covariance = primal.get_posterior().covariance_matrix
    assert_close(root.T @ root, covariance, **PREDICTION)


def test_predictive_runs_on_every_model_of_it() -> None:
    case = CASES["regression_mlp"](DOUBLE)
    _, dual = both(case, case.scattered())
    x = case.args[0]
    hybrid = dual.hybrid_model(linearized=True)
    for model, guide in (
        (case.model, dual),
        (dual.linearized_model, dual),
        (hybrid, hybrid.guide),
    ):
        found = Predictive(model, guide=guide, num_samples=3)(x)
        assert found["y"].shape == (3, len(x))
        assert bool(found["y"].isfinite().all())


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_minibatches_give_the_same(batch_size: int) -> None:
    case = CASES["classification_mlp"](DOUBLE)
    primal, _ = both(case, case.scattered())
    batches = list(zip(*(arg.split(batch_size) for arg in case.args), strict=True))
    guide = case.guide(case.scattered(), form="dual")
    found = guide.laplace_approximation_from(batches).get_posterior()
    expected = primal.get_posterior().covariance_matrix
    assert_close(found.covariance_matrix, expected, **PREDICTION)
    twice = guide.laplace_approximation_from(batches, num_data=14).ggn()
    assert_close(twice, 2 * primal.ggn(), **PREDICTION)


def wide_model(x: Tensor, y: Tensor | None = None) -> None:
    """Linear in 400 weights."""
    w = pyro.sample("w", dist.Normal(torch.zeros(400).double(), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


@pytest.mark.parametrize(("num_data", "form"), [(70, DualForm), (130, PrimalForm)])
def test_the_cheaper_form_is_chosen(num_data: int, form: type) -> None:
    x, y = draw(1, num_data, 400), draw(2, num_data)
    guide = AutoSubnetLaplace(wide_model)
    one_call = guide.laplace_approximation(x, y)
    batches = list(zip(x.split(30), y.split(30), strict=True))
    in_parts = guide.laplace_approximation_from(batches)
    assert type(one_call.form) is form
    assert type(in_parts.form) is form
    first, second = one_call.get_posterior(), in_parts.get_posterior()
    assert_close(first.covariance_matrix, second.covariance_matrix, **PREDICTION)


def test_float32_keeps_digits_where_the_data_outweigh_the_prior() -> None:
    """By 1e7 along the training rows: variances there, against float64."""
    x, y = draw(1, 10, 400), draw(2, 10)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(400), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.006), obs=y)

    exact, found = (
        AutoSubnetLaplace(model, form="dual")
        .laplace_approximation(x.to(dtype), y.to(dtype))
        .output_distribution(x.to(dtype))
        .variance
        for dtype in (torch.float64, torch.float32)
    )
    assert found.dtype == torch.float32
    assert float((exact / x.square().sum(1, keepdim=True)).max()) < 1e-6
    assert_close(found.double(), exact, rtol=1e-4, atol=0.0)


def test_float32_keeps_its_dtype_and_digits() -> None:
    case = CASES["regression_mlp"](torch.empty((), dtype=torch.float32))
    primal, dual = both(case, case.scattered())
    found, expected = (
        p.output_distribution(case.args[0]).covariance_matrix for p in (dual, primal)
    )
    assert found.dtype == torch.float32
    assert_close(found, expected, **FLOAT32)


def test_a_subnet_whose_square_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """400 weights take 1.6 MB as a matrix; 10 rows of them, 32 kB."""
    free = SimpleNamespace(available=400_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    x, y = draw(1, 10, 400), draw(2, 10)
    for form in ("dual", "auto"):
        guide = AutoSubnetLaplace(wide_model, form=form)
        assert isinstance(guide.laplace_approximation(x, y).form, DualForm)
    guide = AutoSubnetLaplace(wide_model, form="primal")
    message = r"got S=400, which needs .* Choose at most 200 weights"
    with pytest.raises(MemoryLimitError, match=message):
        guide.laplace_approximation(x, y)


REFUSED = {
    "correlated_prior": ({}, "a prior that couples weights or does not curve"),
    "regression_mlp": ({"curvature": "hessian"}, "an exact Hessian"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_dual_form(name: str) -> None:
    options, found = REFUSED[name]
    case = CASES[name](DOUBLE)
    guide = case.guide(case.scattered(), form="dual", **options)
    message = rf"positive diagonal; got {found}\. Pass `form='primal'`"
    with pytest.raises(OptionError, match=message):
        guide.laplace_approximation(*case.args, **case.kwargs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "sparse"}, "`form` must be one of 'auto', 'primal', 'dual'; got"),
        ({"covariance": "low-rank"}, "`covariance` must be one of 'full', 'diag', "),
        ({"covariance": "diag", "form": "dual"}, "`form` must be left out unless"),
        ({"covariance": "diag", "curvature": "hessian"}, "got curvature='hessian'"),
    ],
)
def test_unknown_options(options: dict[str, Any], message: str) -> None:
    """As where types are not checked at run time: past the check of ``__init__``."""
    unchecked = object.__new__(FitOptions)
    unchecked.__dict__.update(options)
    with pytest.raises(OptionError, match=re.escape(message)):
        unchecked.__post_init__()


def test_a_forgetting_factor_that_is_no_number() -> None:
    case = CASES["regression_mlp"](DOUBLE)
    _, dual = both(case, case.scattered())
    with pytest.raises(OptionError, match=r"in \(0, 1\]; got nan\. Pass 1\.0"):
        dual.update(*case.args, forgetting=math.nan)


def test_a_stream_leaves_the_dual_form_once_it_does_not_pay() -> None:
    x, y = draw(1, 130, 400), draw(2, 130)
    guide = AutoSubnetLaplace(wide_model)
    first = guide.laplace_approximation(x[:70], y[:70])
    assert isinstance(first.form, DualForm)
    both = first.with_prior_precision(0.3).update(x[70:], y[70:])
    assert isinstance(both.form, PrimalForm)
    whole = guide.laplace_approximation(x, y).with_prior_precision(0.3)
    found, expected = (p.get_posterior().covariance_matrix for p in (both, whole))
    assert_close(found, expected, **PREDICTION)
    asked = AutoSubnetLaplace(wide_model, form="dual")
    kept = asked.laplace_approximation(x[:70], y[:70]).update(x[70:], y[70:])
    assert isinstance(kept.form, DualForm)
