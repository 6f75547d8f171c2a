"""Log determinants under many priors, by eigenvalues and factors, against slogdet."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pyro_subnet import AutoSubnetMultivariateNormal
from pyro_subnet.curvature.prior import PriorPrecision
from pyro_subnet.exceptions import OptionError, PrecisionError
from pyro_subnet.gaussians.base import CurvatureForm
from pyro_subnet.gaussians.primal import PrimalForm
from tests.cases import CASES, DOUBLE, Case, draw, regression_mlp
from tests.tolerances import tolerance

# More than pay for the eigenvalues, and no more than are factored.
MANY = torch.logspace(-6, 6, 13, dtype=torch.float64)
FEW = MANY[::2]
EXACT = {"rtol": 0.0, "atol": 0.0}
SIZES = [1, 2, 5, 33, 130]
EIGENVALUES, FACTOR = "eigvalsh", "cholesky_ex"
# P0 has dense columns; that of the first curves the wrong way along some of them.
HIERARCHICAL = [
    "heteroscedastic",
    "masked_bernoulli",
    "correlated_prior",
    "constrained",
]
FACTORIZED = sorted(CASES.keys() - HIERARCHICAL)

each_path = pytest.mark.parametrize("factors", [FEW, MANY], ids=["factors", "eigen"])


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names each decomposition and each factor that torch makes, as it is made."""
    done: list[str] = []

    def record(name: str) -> Callable[..., Any]:
        original = getattr(torch.linalg, name)

        def recorded(*args: Any, **options: Any) -> Any:
            done.append(name)
            return original(*args, **options)

        return recorded

    for name in (EIGENVALUES, FACTOR):
        monkeypatch.setattr(torch.linalg, name, record(name))
    return done


def fitted(case: Case, positions: list[int]) -> AutoSubnetMultivariateNormal:
    guide = case.guide(positions, form="primal")
    return guide.laplace_approximation(*case.args, **case.kwargs)


def log_dets(form: CurvatureForm, factors: Tensor) -> Tensor:
    return form.log_det_function(factors.numel())(factors)


def counted_log_dets(
    form: CurvatureForm, factors: Tensor, work: list[str]
) -> tuple[Tensor, list[str]]:
    """The log determinants, and what they took."""
    work.clear()
    found = log_dets(form, factors)
    return found, work.copy()


def dense(case: Case, positions: list[int], factors: Tensor) -> Tensor:
    """G + s P0 in float64, shape (number of factors, S, S)."""
    ggn, prior = (
        matrix[positions][:, positions] for matrix in (case.ggn(), case.prior())
    )
    return ggn + factors[:, None, None] * prior


def one_rounding(precisions: Tensor, dtype: torch.dtype) -> Tensor:
    """How far log det P moves if P, as stored, does: eps |P| tr P^-1, to first order.

    No algorithm can do better; where P is ill conditioned it is all there is to hold.
    """
    eigenvalues = torch.linalg.eigvalsh(precisions)
    return torch.finfo(dtype).eps * eigenvalues[:, -1] * (1 / eigenvalues).sum(-1)


def assert_log_dets(found: Tensor, precisions: Tensor, dtype: torch.dtype) -> None:
    """To 1e-9 in float64 and 1e-5 in float32, and two roundings of the matrix."""
    assert found.dtype == torch.float64
    expected = torch.linalg.slogdet(precisions).logabsdet
    rtol = {torch.float64: 1e-9, torch.float32: 1e-5}[dtype]
    allowed = rtol * (1 + expected.abs()) + 2 * one_rounding(precisions, dtype)
    ratio = (found.cpu() - expected) / allowed
    assert_close(ratio, torch.zeros_like(ratio), rtol=0.0, atol=1.0)


@each_path
@pytest.mark.parametrize("name", FACTORIZED)
def test_priors_that_factorize(
    name: str,
    factors: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    work: list[str],
) -> None:
    """All weights, mostly more than there are outputs, and a third of them."""
    case = CASES[name](torch.empty((), dtype=dtype, device=device))
    if factors is FEW and dtype == torch.float32:
        factors = FEW[FEW >= 1.0]  # below, float32 may find a singular GGN indefinite
    once = [EIGENVALUES] if len(factors) == len(MANY) else [FACTOR] * len(factors)
    for positions in (list(range(case.num_params)), sorted(case.scattered())):
        form = fitted(case, positions).form
        assert form.prior.coupled.numel() == 0
        found, done = counted_log_dets(form, factors, work)
        assert_log_dets(found, dense(case, positions, factors), dtype)
        assert done == once


@each_path
@pytest.mark.parametrize("name", HIERARCHICAL)
def test_priors_that_couple_weights_are_factored(
    name: str,
    factors: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    work: list[str],
) -> None:
    case = CASES[name](torch.empty((), dtype=dtype, device=device))
    positions = sorted(case.scattered())
    precisions = dense(case, positions, factors)
    form = fitted(case, positions).form
    assert form.prior.coupled.numel() > 0
    found, done = counted_log_dets(form, factors, work)
    assert_log_dets(found, precisions, dtype)
    assert done == [FACTOR] * len(factors)


@pytest.mark.parametrize("rank", [0, 1, 7])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_factors", [3, 12])
def test_low_rank_in_awkward_sizes(
    size: int, rank: int, num_factors: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Prior precisions of all sizes; what stands below the diagonal is not read."""
    rows, diagonal = draw(1, rank, size).to(dtype), draw(2, size).exp().to(dtype)
    ggn = (rows.double().T @ rows.double()).to(dtype)
    factors = torch.logspace(-2, 6, num_factors, dtype=torch.float64)
    buffer = ggn.triu(1) + torch.full_like(ggn, math.nan).tril()
    form = PrimalForm(
        buffer.to(device),
        ggn.diagonal().to(device),
        PriorPrecision.of_diagonal(diagonal.to(device)),
    )
    exact = rows.double().T @ rows.double()
    prior = diagonal.double().diag()
    precisions = exact + factors[:, None, None] * prior
    assert_log_dets(log_dets(form, factors), precisions, dtype)


@pytest.mark.parametrize("factor", [1e-9, 1.0, 1e12])
@pytest.mark.parametrize("size", SIZES)
def test_factoring_keeps_every_digit_of_the_curvature(
    size: int, factor: float, dtype: torch.dtype, device: torch.device
) -> None:
    """However small beside the prior it is: other priors are found from it."""
    rows = draw(1, 3 * size, size).to(device, dtype)
    ggn, diagonal = rows.T @ rows, draw(2, size).exp().to(device, dtype)
    prior = PriorPrecision.of_diagonal(diagonal)
    form = PrimalForm.factored_(ggn.tril(), prior, factor)
    for each in (form, form.rescaled(1.0), form.rescaled(1.0).rescaled(factor)):
        assert_close(each.ggn().tril(), ggn.tril(), **EXACT)
    precision = ggn.double() + factor * diagonal.double().diag()
    expected = torch.linalg.cholesky(precision).to(dtype)
    close = tolerance(dtype, "closed_form")
    assert_close(form.factor_and_ggn.tril(), expected, **close)


def form_of(curvature: Tensor, diagonal: Tensor) -> PrimalForm:
    """The form of a curvature and a prior that couples nothing, not factored."""
    prior = PriorPrecision.of_diagonal(diagonal)
    return PrimalForm(curvature, curvature.diagonal(), prior)


def test_no_curvature_leaves_the_prior_alone() -> None:
    diagonal = draw(2, 6).exp()
    zero = torch.zeros(6, 6, dtype=torch.float64)
    found = log_dets(form_of(zero, diagonal), MANY)
    expected = 6 * MANY.log() + diagonal.log().sum()
    assert_close(found, expected, **tolerance(torch.float64, "closed_form"))


@pytest.mark.parametrize("factor", [1e-6, 0.3, 1.0, 1e6])
def test_it_is_that_of_the_posterior_at_the_factor(factor: float) -> None:
    case = regression_mlp(DOUBLE)
    posterior = fitted(case, case.scattered())
    wandered = posterior.with_prior_precision(factor)
    expected = 2 * wandered.gaussian.half_log_det()
    own = torch.tensor(wandered.prior_factor, dtype=torch.float64)
    close = tolerance(torch.float64, "reordered")
    for source in (posterior, wandered):
        assert_close(log_dets(source.form, own), expected, **close)
        many = log_dets(source.form, own.expand(11))
        assert_close(many, expected.expand(11), **close)


def test_few_factors_are_factored_and_many_are_not(work: list[str]) -> None:
    case = regression_mlp(DOUBLE)
    form = fitted(case, case.scattered()).form
    for count, expected in ((9, [FACTOR] * 9), (10, [EIGENVALUES])):
        factors = torch.linspace(0.1, 1.0, count, dtype=torch.float64)
        assert counted_log_dets(form, factors, work)[1] == expected


@pytest.mark.parametrize("shape", [(), (0,), (1,), (9,), (10,), (2, 3), (3, 1, 5)])
def test_the_shape_of_the_factors_is_kept(shape: tuple[int, ...]) -> None:
    case = regression_mlp(DOUBLE)
    form = fitted(case, case.scattered()).form
    factors = draw(3, *shape).exp()
    found = log_dets(form, factors)
    assert found.shape == shape
    one_by_one = [log_dets(form, factor) for factor in factors.flatten()]
    expected = torch.stack(one_by_one).reshape(shape) if one_by_one else factors
    assert_close(found, expected, **tolerance(torch.float64, "reordered"))


@each_path
def test_factors_that_are_not_contiguous(factors: Tensor) -> None:
    """A float32 posterior answers in float64 too."""
    factors = torch.linspace(0.5, 4.0, len(factors), dtype=torch.float64)
    for like in (DOUBLE, DOUBLE.float()):
        case = regression_mlp(like)
        form = fitted(case, case.scattered()).form
        strided = torch.stack([factors, -factors], dim=1)[:, 0]
        assert not strided.is_contiguous()
        found = log_dets(form, strided)
        assert found.dtype == torch.float64
        assert_close(found, log_dets(form, factors), **EXACT)


@each_path
@pytest.mark.parametrize("name", ["regression_mlp", "correlated_prior"])
def test_the_posterior_is_left_alone(
    name: str, factors: Tensor, dtype: torch.dtype, device: torch.device
) -> None:
    case = CASES[name](torch.empty((), dtype=dtype, device=device))
    posterior = fitted(case, case.scattered())
    before, given = bits(posterior), factors.clone()
    log_dets(posterior.form, factors)
    assert bits(posterior) == before
    assert posterior.prior_factor == 1.0
    assert_close(factors, given, **EXACT)


def bits(posterior: AutoSubnetMultivariateNormal) -> dict[str, bytes]:
    """All its tensors, as they are stored."""
    return {
        name: np.ascontiguousarray(buffer.cpu().numpy()).tobytes()
        for name, buffer in posterior.named_buffers()
    }


@pytest.mark.parametrize("missing", [0, 1])
def test_without_room_for_two_float64_matrices_it_factors(
    missing: int, dtype: torch.dtype, work: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = regression_mlp(torch.empty((), dtype=dtype))
    positions = case.scattered()
    form = fitted(case, positions).form
    free = SimpleNamespace(available=2 * 8 * len(positions) ** 2 - missing)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    factors = torch.logspace(-1, 4, 12, dtype=torch.float64)
    found, done = counted_log_dets(form, factors, work)
    assert done == ([FACTOR] * 12 if missing else [EIGENVALUES])
    assert_log_dets(found, dense(case, positions, factors), dtype)


@pytest.mark.parametrize("bad", [0.0, -2.0, math.inf, -math.inf, math.nan])
def test_bad_factors_are_refused(bad: float) -> None:
    case = regression_mlp(DOUBLE)
    posterior = fitted(case, case.scattered())
    message = f"must be positive and finite; got {bad}. Pass 1.0 for the model's own"
    with pytest.raises(OptionError, match=re.escape(f"`prior_factor` {message}")):
        posterior.log_marginal_likelihood(prior_factor=bad)
    with pytest.raises(OptionError, match=re.escape(f"`scale` {message}")):
        posterior.with_prior_precision(bad)


def indefinite(smallest: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A curvature with eigenvalues from a given one to 8 over a prior precision."""
    diagonal = torch.tensor([0.5, 2.0, 1.0, 4.0, 0.25, 1.0], dtype=torch.float64)
    basis = torch.linalg.qr(draw(4, 6, 6)).Q
    eigenvalues = torch.tensor([smallest, 0.5, 1.0, 2.0, 4.0, 8.0]).double()
    scaled = basis @ eigenvalues.diag() @ basis.T
    root = diagonal.sqrt()
    curvature = (root[:, None] * scaled * root).to(dtype)
    return curvature, diagonal.to(dtype), eigenvalues


def test_a_negative_eigenvalue_counts_as_it_is_where_the_prior_outweighs_it() -> None:
    """An exact Hessian may have some."""
    curvature, diagonal, eigenvalues = indefinite(-0.5, torch.float64)
    factors = torch.linspace(0.6, 3.0, 11, dtype=torch.float64)
    found = log_dets(form_of(curvature, diagonal), factors)
    expected = (eigenvalues + factors[:, None]).log().sum(1) + diagonal.log().sum()
    assert_close(found, expected, **tolerance(torch.float64, "closed_form"))


def test_an_eigenvalue_below_zero_by_round_off_counts_as_none() -> None:
    """-2e-6 of at most 6 * 1.2e-7 * 8 in float32, at factors below it."""
    curvature, diagonal, eigenvalues = indefinite(-2e-6, torch.float32)
    factors = torch.logspace(-9, -6, 11, dtype=torch.float64)
    found = log_dets(form_of(curvature, diagonal), factors)
    eigenvalues[0] = 0.0
    expected = (eigenvalues + factors[:, None]).log().sum(1)
    expected += diagonal.double().log().sum()
    assert_close(found, expected, **tolerance(torch.float32, "closed_form"))


def test_eigenvalues_that_no_prior_outweighs_are_refused() -> None:
    curvature, diagonal, _ = indefinite(-0.5, torch.float64)
    factors = torch.linspace(3.0, 0.25, 12, dtype=torch.float64)
    message = (
        r"S=6 must be positive definite; got smallest eigenvalue -2\.500e-01 times the "
        r"prior's\. Train closer .* raise the prior's precision "
        r"\(now 0\.25 times the model's\)"
    )
    with pytest.raises(PrecisionError, match=message):
        log_dets(form_of(curvature, diagonal), factors)


@each_path
def test_a_hierarchical_prior_that_curves_the_wrong_way(factors: Tensor) -> None:
    """It outweighs the data once it is scaled up: the factor is named."""
    case = CASES["heteroscedastic"](DOUBLE)
    everything = list(range(case.num_params))
    form = fitted(case, everything).form
    smallest = torch.linalg.eigvalsh(dense(case, everything, factors))
    bad = factors[smallest[:, 0] <= 0]
    assert 0 < len(bad) < len(factors)
    message = (
        rf"S={case.num_params} must be positive definite; got smallest eigenvalue -.* "
        rf"\(now {re.escape(f'{float(bad[0]):g}')} times the model's\)"
    )
    with pytest.raises(PrecisionError, match=message):
        log_dets(form, factors)


def test_a_diagonal_prior_that_curves_the_wrong_way_is_factored(
    work: list[str],
) -> None:
    """Its square root does not exist, but the data outweigh it at small factors."""
    curvature, diagonal, _ = indefinite(0.25, torch.float64)
    diagonal[1] = -1.0
    factors = torch.linspace(0.01, 0.05, 12, dtype=torch.float64)
    found, done = counted_log_dets(form_of(curvature, diagonal), factors, work)
    precisions = curvature + factors[:, None, None] * diagonal.diag()
    assert_log_dets(found, precisions, torch.float64)
    assert done == [FACTOR] * 12
