"""Log determinants under many priors, by eigenvalues and factors, against slogdet."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pyro_subnet import AutoSubnetMultivariateNormal
from pyro_subnet.curvature.prior import PriorPrecision
from pyro_subnet.exceptions import OptionError, PrecisionError
from pyro_subnet.gaussians import scaled_precision
from pyro_subnet.gaussians.scaled_precision import log_det_precision
from tests.cases import CASES, DOUBLE, Case, draw, regression_mlp
from tests.tolerances import tolerance

# More than pay for the eigenvalues, and no more than are factored.
MANY = torch.logspace(-6, 6, 13, dtype=torch.float64)
FEW = MANY[::2]
EXACT = {"rtol": 0.0, "atol": 0.0}
SIZES = [1, 2, 5, 33, 130]
EIGENVALUES, FACTOR = "_eigenvalues", "factor_scaled_"
# P0 has dense columns; that of the first curves the wrong way along some of them.
HIERARCHICAL = [
    "heteroscedastic",
    "masked_bernoulli",
    "correlated_prior",
    "constrained",
]
FACTORIZED = sorted(CASES.keys() - HIERARCHICAL)

each_path = pytest.mark.parametrize("scales", [FEW, MANY], ids=["factors", "eigen"])


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names each decomposition and each factor as it is made."""
    done: list[str] = []

    def record(name: str) -> Callable[..., Any]:
        original = getattr(scaled_precision, name)

        def recorded(*args: Any) -> Any:
            done.append(name)
            return original(*args)

        return recorded

    for name in (EIGENVALUES, FACTOR):
        monkeypatch.setattr(scaled_precision, name, record(name))
    return done


def fitted(case: Case, positions: list[int]) -> AutoSubnetMultivariateNormal:
    guide = case.guide(positions, form="primal")
    return guide.laplace_approximation(*case.args, **case.kwargs)


def dense(case: Case, positions: list[int], scales: Tensor) -> Tensor:
    """G + s P0 in float64, shape (number of scales, S, S)."""
    ggn, prior = (
        matrix[positions][:, positions] for matrix in (case.ggn(), case.prior())
    )
    return ggn + scales[:, None, None] * prior


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
    scales: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    work: list[str],
) -> None:
    """All weights, mostly more than there are outputs, and a third of them."""
    case = CASES[name](torch.empty((), dtype=dtype, device=device))
    if scales is FEW and dtype == torch.float32:
        scales = FEW[FEW >= 1.0]  # below, float32 may find a singular GGN indefinite
    for positions in (list(range(case.num_params)), sorted(case.scattered())):
        posterior = fitted(case, positions)
        assert posterior.prior_coupled.numel() == 0
        found = posterior.log_det_precision(scales)
        assert_log_dets(found, dense(case, positions, scales), dtype)
    once = [EIGENVALUES] if len(scales) == len(MANY) else [FACTOR] * len(scales)
    assert work == 2 * once


@each_path
@pytest.mark.parametrize("name", HIERARCHICAL)
def test_priors_that_couple_weights_are_factored(
    name: str,
    scales: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    work: list[str],
) -> None:
    case = CASES[name](torch.empty((), dtype=dtype, device=device))
    positions = sorted(case.scattered())
    precisions = dense(case, positions, scales)
    posterior = fitted(case, positions)
    assert posterior.prior_coupled.numel() > 0
    found = posterior.log_det_precision(scales)
    assert_log_dets(found, precisions, dtype)
    assert work == [FACTOR] * len(scales)


@pytest.mark.parametrize("rank", [0, 1, 7])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_scales", [3, 12])
def test_low_rank_in_awkward_sizes(
    size: int, rank: int, num_scales: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Prior precisions of all sizes; what stands below the diagonal is not read."""
    rows, diagonal = draw(1, rank, size).to(dtype), draw(2, size).exp().to(dtype)
    ggn = (rows.double().T @ rows.double()).to(dtype)
    scales = torch.logspace(-2, 6, num_scales, dtype=torch.float64)
    buffer = ggn.triu(1) + torch.full_like(ggn, math.nan).tril()
    found = log_det_precision(
        buffer.to(device),
        ggn.diagonal().to(device),
        factorized(diagonal.to(device)),
        scales,
    )
    exact = rows.double().T @ rows.double()
    prior = diagonal.double().diag()
    assert_log_dets(found, exact + scales[:, None, None] * prior, dtype)


def factorized(diagonal: Tensor) -> PriorPrecision:
    """P0 that couples nothing."""
    nothing = torch.empty(0, dtype=torch.long, device=diagonal.device)
    return PriorPrecision(diagonal, nothing, diagonal.new_empty(len(diagonal), 0))


def test_no_curvature_leaves_the_prior_alone() -> None:
    diagonal = draw(2, 6).exp()
    zero = torch.zeros(6, 6, dtype=torch.float64)
    found = log_det_precision(zero, zero[0], factorized(diagonal), MANY)
    expected = 6 * MANY.log() + diagonal.log().sum()
    assert_close(found, expected, **tolerance(torch.float64, "closed_form"))


@pytest.mark.parametrize("scale", [1e-6, 0.3, 1.0, 1e6])
def test_it_is_that_of_the_posterior_at_the_scale(scale: float) -> None:
    case = regression_mlp(DOUBLE)
    posterior = fitted(case, case.scattered())
    wandered = posterior.with_prior_precision(scale)
    expected = 2 * wandered.gaussian.half_log_det()
    own = torch.tensor(wandered.prior_scale, dtype=torch.float64)
    close = tolerance(torch.float64, "reordered")
    for source in (posterior, wandered):
        assert_close(source.log_det_precision(own), expected, **close)
        many = source.log_det_precision(own.expand(11))
        assert_close(many, expected.expand(11), **close)


def test_few_scales_are_factored_and_many_are_not(work: list[str]) -> None:
    case = regression_mlp(DOUBLE)
    posterior = fitted(case, case.scattered())
    posterior.log_det_precision(torch.linspace(0.1, 1.0, 9))
    assert work == [FACTOR] * 9
    posterior.log_det_precision(torch.linspace(0.1, 1.0, 10))
    assert work == [FACTOR] * 9 + [EIGENVALUES]


@pytest.mark.parametrize("shape", [(), (0,), (1,), (9,), (10,), (2, 3), (3, 1, 5)])
def test_the_shape_of_the_scales_is_kept(shape: tuple[int, ...]) -> None:
    case = regression_mlp(DOUBLE)
    posterior = fitted(case, case.scattered())
    scales = draw(3, *shape).exp()
    found = posterior.log_det_precision(scales)
    assert found.shape == shape
    one_by_one = [posterior.log_det_precision(scale) for scale in scales.flatten()]
    expected = torch.stack(one_by_one).reshape(shape) if one_by_one else scales
    assert_close(found, expected, **tolerance(torch.float64, "reordered"))


@each_path
def test_any_floating_point_scales(scales: Tensor) -> None:
    """Other types, and not contiguous; a float32 posterior answers in float64 too."""
    scales = torch.linspace(0.5, 4.0, len(scales), dtype=torch.float64)
    for like in (DOUBLE, DOUBLE.float()):
        case = regression_mlp(like)
        posterior = fitted(case, case.scattered())
        for dtype in (torch.float16, torch.float32):
            typed = scales.to(dtype)
            found = posterior.log_det_precision(typed)
            assert_close(found, posterior.log_det_precision(typed.double()), **EXACT)
        strided = torch.stack([scales, -scales], dim=1)[:, 0]
        found = posterior.log_det_precision(strided.requires_grad_())
        assert_close(found, posterior.log_det_precision(scales), **EXACT)
        assert not found.requires_grad


@each_path
@pytest.mark.parametrize("name", ["regression_mlp", "correlated_prior"])
def test_the_posterior_is_left_alone(
    name: str, scales: Tensor, dtype: torch.dtype, device: torch.device
) -> None:
    case = CASES[name](torch.empty((), dtype=dtype, device=device))
    posterior = fitted(case, case.scattered())
    before, given = bits(posterior), scales.clone()
    posterior.log_det_precision(scales)
    assert bits(posterior) == before
    assert posterior.prior_scale == 1.0
    assert_close(scales, given, **EXACT)


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
    posterior = fitted(case, positions)
    free = 2 * 8 * len(positions) ** 2 - missing
    monkeypatch.setattr(scaled_precision, "available_bytes", lambda device: free)
    scales = torch.logspace(-1, 4, 12, dtype=torch.float64)
    found = posterior.log_det_precision(scales)
    assert work == ([FACTOR] * 12 if missing else [EIGENVALUES])
    assert_log_dets(found, dense(case, positions, scales), dtype)


@pytest.mark.parametrize("bad", [0.0, -2.0, math.inf, -math.inf, math.nan])
@each_path
def test_bad_scales_are_refused(scales: Tensor, bad: float) -> None:
    case = regression_mlp(DOUBLE)
    posterior = fitted(case, case.scattered())
    scales = scales.clone()
    scales[2] = scales[-1] = bad
    message = (
        "`prior_scales` must be positive and finite; got 2 of "
        f"{len(scales)} that are not (first {bad} at 2). Pass 1.0 for"
    )
    with pytest.raises(OptionError, match=re.escape(message)):
        posterior.log_det_precision(scales)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_scales_that_are_no_floating_point_numbers_are_refused(
    dtype: torch.dtype,
) -> None:
    case = regression_mlp(DOUBLE)
    posterior = fitted(case, case.scattered())
    message = rf"must be a floating point tensor; got {dtype}\. Pass `prior_scales\.dou"
    with pytest.raises(OptionError, match=message):
        posterior.log_det_precision(torch.ones(3, dtype=dtype))


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
    scales = torch.linspace(0.6, 3.0, 11, dtype=torch.float64)
    found = log_det_precision(
        curvature, curvature.diagonal(), factorized(diagonal), scales
    )
    expected = (eigenvalues + scales[:, None]).log().sum(1) + diagonal.log().sum()
    assert_close(found, expected, **tolerance(torch.float64, "closed_form"))


def test_an_eigenvalue_below_zero_by_round_off_counts_as_none() -> None:
    """-2e-6 of at most 6 * 1.2e-7 * 8 in float32, at scales below it."""
    curvature, diagonal, eigenvalues = indefinite(-2e-6, torch.float32)
    scales = torch.logspace(-9, -6, 11, dtype=torch.float64)
    found = log_det_precision(
        curvature, curvature.diagonal(), factorized(diagonal), scales
    )
    eigenvalues[0] = 0.0
    expected = (eigenvalues + scales[:, None]).log().sum(1)
    expected += diagonal.double().log().sum()
    assert_close(found, expected, **tolerance(torch.float32, "closed_form"))


def test_eigenvalues_that_no_prior_outweighs_are_refused() -> None:
    curvature, diagonal, _ = indefinite(-0.5, torch.float64)
    scales = torch.linspace(3.0, 0.25, 12, dtype=torch.float64)
    message = (
        r"S=6 must be positive definite; got smallest eigenvalue -2\.500e-01 times the "
        r"prior's precision at scale 0\.25\. Train closer .* raise the prior's "
        r"precision \(now 0\.25 times the model's\)"
    )
    with pytest.raises(PrecisionError, match=message):
        log_det_precision(curvature, curvature.diagonal(), factorized(diagonal), scales)


@each_path
def test_a_hierarchical_prior_that_curves_the_wrong_way(scales: Tensor) -> None:
    """It outweighs the data once it is scaled up: the scale is named."""
    case = CASES["heteroscedastic"](DOUBLE)
    posterior = fitted(case, list(range(case.num_params)))
    smallest = torch.linalg.eigvalsh(dense(case, list(range(case.num_params)), scales))
    bad = scales[smallest[:, 0] <= 0]
    assert 0 < len(bad) < len(scales)
    message = (
        rf"S={case.num_params} must be positive definite; got smallest eigenvalue -.* "
        rf"\(now {re.escape(f'{float(bad[0]):g}')} times the model's\)"
    )
    with pytest.raises(PrecisionError, match=message):
        posterior.log_det_precision(scales)


def test_a_diagonal_prior_that_curves_the_wrong_way_is_factored(
    work: list[str],
) -> None:
    """Its square root does not exist, but the data outweigh it at small scales."""
    curvature, diagonal, _ = indefinite(0.25, torch.float64)
    diagonal[1] = -1.0
    scales = torch.linspace(0.01, 0.05, 12, dtype=torch.float64)
    found = log_det_precision(
        curvature, curvature.diagonal(), factorized(diagonal), scales
    )
    precisions = curvature + scales[:, None, None] * diagonal.diag()
    assert_log_dets(found, precisions, torch.float64)
    assert work == [FACTOR] * 12
