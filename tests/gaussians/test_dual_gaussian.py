"""The Gaussian in dual form, against dense algebra, the primal form and 60 digits."""

from __future__ import annotations

import math
import re

import mpmath
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pyro_subnet.curvature.ggn import dual_pays
from pyro_subnet.curvature.prior import PriorPrecision
from pyro_subnet.exceptions import NonFiniteError, PrecisionError
from pyro_subnet.gaussians.dual import DualForm
from pyro_subnet.gaussians.dual_gaussian import DualGaussian
from pyro_subnet.gaussians.factored import FactoredGaussian, factor_precision_
from pyro_subnet.subnet import Layout
from tests.cases import double, draw
from tests.tolerances import tolerance

SIZES = [1, 7, 40]
# R and S: no rows, few, one fewer than columns, as many, more, and more than are
# worked on at once.
SHAPES = [
    *sorted({(r, s) for s in SIZES for r in (0, 1, 3, s - 1, s, s + 5)}),
    (300, 40),
]
EPS = torch.finfo(torch.float64).eps

each_shape = pytest.mark.parametrize(("num_rows", "size"), SHAPES)


def parts(num_rows: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, rows W and the prior's unequal precisions, float64."""
    rows = 2 * draw(1, num_rows, size) / math.sqrt(size)
    return draw(2, size), rows, draw(3, size).square() + 0.3


def dense(rows: Tensor, prior: Tensor) -> Tensor:
    """P by a sum over the rows."""
    total = prior.diag()
    for row in rows:
        total = total + torch.outer(row, row)
    return total


def dual(
    num_rows: int, size: int, dtype: torch.dtype = torch.float64
) -> tuple[DualGaussian, Tensor, Tensor]:
    """Ours in a dtype; the mean and P in float64, from what the dtype holds."""
    loc, rows, prior = (part.to(dtype) for part in parts(num_rows, size))
    ours = DualGaussian.of(loc, rows, prior)
    return ours, loc.double(), dense(rows.double(), prior.double())


def dual_form(rows: Tensor, prior: Tensor) -> DualForm:
    """The form of rows under a diagonal prior, factored."""
    layout = Layout(("w",), (prior.shape,))
    return DualForm.of(rows, PriorPrecision.of_diagonal(prior), layout)


def not_factored(rows: Tensor, prior: Tensor) -> DualForm:
    """The same with another kernel's factor, which a log determinant needs none of."""
    factor = torch.eye(len(rows), dtype=torch.float64)
    return DualForm(rows, PriorPrecision.of_diagonal(prior), prior, factor)


def is_close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    """Compares values, and checks that the dtype was kept."""
    assert ours.dtype == dtype
    assert_close(ours.double(), theirs, **tolerance(dtype, "closed_form"))


def log_density(value: Tensor, loc: Tensor, precision: Tensor) -> Tensor:
    """Of a normal, term by term."""
    centred = value - loc
    quadratic = ((centred @ precision) * centred).sum(-1)
    log_det = torch.linalg.slogdet(precision).logabsdet
    return 0.5 * (log_det - quadratic - len(loc) * math.log(2 * math.pi))


@each_shape
def test_moments(num_rows: int, size: int, dtype: torch.dtype) -> None:
    ours, loc, precision = dual(num_rows, size, dtype)
    covariance = torch.linalg.inv(precision)
    assert ours.size == size
    is_close(ours.loc, loc, dtype)
    is_close(ours.variance(), covariance.diagonal(), dtype)
    is_close(ours.precision_matrix(), precision, dtype)
    is_close(ours.precision_diagonal(), precision.diagonal(), dtype)
    is_close(ours.covariance_matrix(), covariance, dtype)
    is_close(ours.scale_tril(), torch.linalg.cholesky(covariance), dtype)


@each_shape
def test_log_density_and_entropy(num_rows: int, size: int, dtype: torch.dtype) -> None:
    ours, loc, precision = dual(num_rows, size, dtype)
    values = loc + draw(4, 4, 2, size)
    found = ours.log_prob(values.to(dtype))
    assert found.shape == (4, 2)
    is_close(found, log_density(values.to(dtype).double(), loc, precision), dtype)
    is_close(ours.log_prob(ours.loc), log_density(loc, loc, precision), dtype)
    half_log_det = 0.5 * torch.linalg.slogdet(precision).logabsdet
    is_close(ours.half_log_det(), half_log_det, dtype)
    entropy = 0.5 * size * (1 + math.log(2 * math.pi)) - half_log_det
    is_close(ours.entropy(), entropy, dtype)


@each_shape
def test_a_draw_is_a_linear_map_whose_square_is_the_covariance(
    num_rows: int, size: int, dtype: torch.dtype
) -> None:
    ours, loc, precision = dual(num_rows, size, dtype)
    identity = torch.eye(size, dtype=dtype)
    images = (ours.draw(identity) - ours.loc).double()
    covariance = images.mT @ images  # each row is a column of D^-1/2 B
    assert_close(
        covariance, torch.linalg.inv(precision), **tolerance(dtype, "closed_form")
    )
    noise = draw(5, 2, 3, size)
    is_close(ours.draw(noise.to(dtype)), loc + noise @ images, dtype)
    is_close(ours.draw(noise[0, 0].to(dtype)), loc + noise[0, 0] @ images, dtype)


@each_shape
def test_whitened_rows_have_the_projected_covariance(
    num_rows: int, size: int, dtype: torch.dtype
) -> None:
    ours, _, precision = dual(num_rows, size, dtype)
    jac = draw(6, 2, 3, size) / math.sqrt(size)
    whitened = ours.whiten(jac.to(dtype))
    assert whitened.shape == jac.shape
    projected = whitened @ whitened.mT
    is_close(projected, jac @ torch.linalg.inv(precision) @ jac.mT, dtype)


@each_shape
def test_whitening_is_the_transpose_of_drawing(num_rows: int, size: int) -> None:
    """One square root of the covariance serves both, as in the primal form."""
    ours, *_ = dual(num_rows, size)
    identity = torch.eye(size, dtype=torch.float64)
    drawn = ours.draw(identity) - ours.loc
    assert_close(drawn, ours.whiten(identity).mT, rtol=1e-12, atol=1e-12)


@each_shape
def test_the_primal_form_says_the_same(num_rows: int, size: int) -> None:
    ours, loc, precision = dual(num_rows, size)
    factor = precision.clone()
    factor_precision_(factor, lambda: None)
    primal = FactoredGaussian(loc, factor)
    close = tolerance(torch.float64, "reordered")
    value, jac = draw(7, 3, size), draw(8, 5, size)
    assert_close(ours.log_prob(value), primal.log_prob(value), **close)
    assert_close(ours.half_log_det(), primal.half_log_det(), **close)
    assert_close(ours.entropy(), primal.entropy(), **close)
    assert_close(ours.variance(), primal.variance(), **close)
    assert_close(ours.covariance_matrix(), primal.covariance_matrix(), **close)
    assert_close(ours.scale_tril(), primal.scale_tril(), **close)
    found, expected = ours.whiten(jac), primal.whiten(jac)
    assert_close(found @ found.mT, expected @ expected.mT, rtol=1e-8, atol=1e-8)


def test_shapes_without_elements() -> None:
    ours, *_ = dual(3, 7)
    nothing = torch.empty(0, 7, dtype=torch.float64)
    assert ours.draw(nothing).shape == (0, 7)
    assert ours.whiten(nothing).shape == (0, 7)
    assert ours.log_prob(nothing).shape == (0,)


def test_inputs_that_are_not_contiguous() -> None:
    loc, rows, prior = parts(3, 7)
    ours = DualGaussian.of(loc, rows, prior)
    other = DualGaussian.of(loc, rows.mT.contiguous().mT, prior)
    noise = draw(1, 7, 5, 2).mT.movedim(0, -1)
    for method in ("draw", "whiten", "log_prob"):
        found = getattr(other, method)(noise)
        assert_close(found, getattr(ours, method)(noise.contiguous()))


def test_gradients() -> None:
    ours, *_ = dual(3, 4)
    values, loc = draw(1, 2, 4).requires_grad_(), draw(2, 4).requires_grad_()
    assert torch.autograd.gradcheck(ours.whiten, (values,))

    def moved(mean: Tensor) -> DualGaussian:
        return DualGaussian(mean, ours.rows, ours.prior_precision, ours.kernel_tril)

    assert torch.autograd.gradcheck(lambda v, m: moved(m).draw(v), (values, loc))
    assert torch.autograd.gradcheck(lambda v, m: moved(m).log_prob(v), (values, loc))


def test_the_rows_are_shared_and_left_alone() -> None:
    loc, rows, prior = parts(3, 7)
    before = rows.clone()
    ours = DualGaussian.of(loc, rows, prior)
    ours.variance()
    ours.draw(loc)
    assert ours.rows.data_ptr() == rows.data_ptr()
    assert_close(rows, before, rtol=0.0, atol=0.0)


def test_what_is_above_the_kernels_diagonal_is_not_read() -> None:
    clean, *_ = dual(3, 7)
    filled = clean.kernel_tril + torch.full((3, 3), torch.nan).double().triu(1)
    dirty = DualGaussian(clean.loc, clean.rows, clean.prior_precision, filled)
    values = draw(1, 2, 7)
    for method in ("draw", "whiten", "log_prob"):
        found = getattr(dirty, method)(values)
        assert_close(found, getattr(clean, method)(values))
    for method in ("variance", "entropy", "covariance_matrix"):
        assert_close(getattr(dirty, method)(), getattr(clean, method)())


def test_a_subnet_whose_dense_form_would_take_320_gigabytes() -> None:
    """Orthonormal rows and a prior p: along them 1 / (1 + p), elsewhere 1 / p."""
    size, num_rows, prior = 200_000, 30, 0.5
    rows = torch.linalg.qr(draw(1, size, num_rows)).Q.mT
    loc = torch.zeros(size, dtype=torch.float64)
    ours = DualGaussian.of(loc, rows, torch.full_like(loc, prior))
    log_det = num_rows * math.log(1 + prior) + (size - num_rows) * math.log(prior)
    assert_close(2 * ours.half_log_det().item(), log_det, rtol=1e-12, atol=0.0)
    held_back = (1 / prior - 1 / (1 + prior)) * rows.square().sum(0)
    assert_close(ours.variance(), 1 / prior - held_back, rtol=1e-10, atol=0.0)
    whitened = ours.whiten(rows)
    along = torch.eye(num_rows, dtype=torch.float64) / (1 + prior)
    assert_close(whitened @ whitened.mT, along, rtol=1e-10, atol=1e-10)
    drawn = ours.draw(rows[0])
    assert_close(drawn, rows[0] / math.sqrt(1 + prior), rtol=1e-10, atol=1e-10)


def exact(rows: Tensor, prior: Tensor, jac: Tensor) -> tuple[Tensor, Tensor, float]:
    """Marginal variances, variances along the rows of J and log det P, to 60 digits."""
    with mpmath.workdps(60):
        data, outer = mpmath.matrix(rows.tolist()), mpmath.matrix(jac.tolist())
        precision = data.T * data + mpmath.diag(prior.tolist())
        covariance = mpmath.inverse(precision)
        along = outer * covariance * outer.T
        variances = [float(covariance[i, i]) for i in range(len(prior))]
        projected = [float(along[i, i]) for i in range(len(jac))]
        log_det = float(mpmath.log(mpmath.det(precision)))
    return double(variances), double(projected), log_det


HARD = [(1e4, 1.0), (1.0, 1e-6), (1e4, 1e-6), (1e2, 1e-3)]
each_hard_scale = pytest.mark.parametrize(("scale", "prior"), HARD)


@each_hard_scale
@pytest.mark.parametrize(("num_rows", "size"), [(1, 7), (3, 7), (6, 7), (3, 40)])
def test_accuracy_of_large_independent_rows_over_a_weak_prior(
    num_rows: int, size: int, scale: float, prior: float
) -> None:
    """Up to k = 1e16. What is left along a row is 1e-16 of the prior's variance."""
    rows = scale * draw(1, num_rows, size)
    diagonal = prior * (draw(3, size).square() + 0.3)
    ours = DualGaussian.of(draw(2, size), rows, diagonal)
    jac = torch.cat([rows, draw(6, 3, size)])
    variances, projected, log_det = exact(rows, diagonal, jac)
    assert_close(ours.variance(), variances, rtol=1e-12, atol=0.0)
    assert_close(2 * ours.half_log_det().item(), log_det, rtol=1e-12, atol=0.0)
    found = ours.whiten(jac).square().sum(-1)
    assert_close(found[num_rows:], projected[num_rows:], rtol=1e-12, atol=0.0)
    assert_close(found[:num_rows], projected[:num_rows], rtol=1e-5, atol=0.0)


@each_hard_scale
@pytest.mark.parametrize(("num_rows", "size"), [(3, 7), (7, 7), (12, 7), (3, 40)])
def test_accuracy_of_rows_that_repeat_others(
    num_rows: int, size: int, scale: float, prior: float
) -> None:
    """k eps is what remains, and where that is nothing the kernel is refused."""
    rows = scale * draw(1, num_rows, size)
    rows[1] = rows[0]
    diagonal = prior * (draw(3, size).square() + 0.3)
    largest = 1 + torch.linalg.matrix_norm(rows * diagonal.rsqrt(), ord=2).item() ** 2
    if largest * EPS > 0.01:
        with pytest.raises(PrecisionError, match=r"R=\d+ rows must have pivots .* got"):
            DualGaussian.of(draw(2, size), rows, diagonal)
        return
    ours = DualGaussian.of(draw(2, size), rows, diagonal)
    jac = torch.cat([rows, draw(6, 3, size)])
    variances, projected, log_det = exact(rows, diagonal, jac)
    left = {"rtol": 2 * largest * EPS, "atol": 0.0}
    assert_close(ours.variance(), variances, **left)
    assert_close(ours.whiten(jac).square().sum(-1), projected, **left)
    assert_close(2 * ours.half_log_det().item(), log_det, rtol=0.0, atol=left["rtol"])


def test_accuracy_in_float32() -> None:
    """k eps along the rows, and nearly all digits elsewhere and in the variances."""
    num_rows, size = 50, 400
    rows = 30 * (draw(1, num_rows, size) + draw(4, 1, size)) / math.sqrt(size)
    loc, diagonal = torch.zeros(size), (draw(3, size).square() + 0.3).float()
    ours = DualGaussian.of(loc, rows.float(), diagonal)
    scaled = ours.rows.double() * diagonal.double().rsqrt()
    largest = torch.linalg.matrix_norm(scaled, ord=2).item() ** 2
    assert 1e4 < largest < 1e6
    covariance = torch.linalg.inv(dense(ours.rows.double(), diagonal.double()))
    jac = torch.cat([ours.rows, draw(6, 5, size).float()])
    expected = ((jac.double() @ covariance) * jac.double()).sum(-1)
    found = ours.whiten(jac).double().square().sum(-1)
    rtol = largest * torch.finfo(torch.float32).eps
    assert_close(found[:num_rows], expected[:num_rows], rtol=rtol, atol=0.0)
    assert_close(found[num_rows:], expected[num_rows:], rtol=1e-5, atol=0.0)
    assert_close(ours.variance().double(), covariance.diagonal(), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("bad", [0.0, -0.25])
def test_a_prior_that_is_not_positive(bad: float) -> None:
    loc, rows, prior = parts(3, 7)
    prior[2] = prior[4] = bad
    first = re.escape(f"(first {bad:.3e} at 2). Use the primal form")
    message = rf"positive normal number .* got 2 of 7 .* {first}"
    with pytest.raises(PrecisionError, match=message):
        DualGaussian.of(loc, rows, prior)
    with pytest.raises(PrecisionError, match=message):
        dual_form(rows, prior)
    with pytest.raises(PrecisionError, match=message):
        not_factored(rows, prior).log_det_function(1)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_are_not_finite(bad: float) -> None:
    loc, rows, prior = parts(3, 7)
    prior[2] = bad
    with pytest.raises(
        NonFiniteError, match=r"NaN or inf in 1 of 7 elements \(first 2"
    ):
        DualGaussian.of(loc, rows, prior)
    loc, rows, prior = parts(3, 7)
    rows[1, 6] = bad
    message = r"must be finite.* got NaN or inf from 1 of 3 rows \(first 1\)"
    with pytest.raises(NonFiniteError, match=message):
        DualGaussian.of(loc, rows, prior)
    with pytest.raises(NonFiniteError, match=message):
        dual_form(rows, prior)
    with pytest.raises(NonFiniteError, match=message):
        not_factored(rows, prior).log_det_function(1)


def test_rows_whose_squares_overflow() -> None:
    loc, rows, prior = parts(3, 7)
    rows[2] *= 1e200
    with pytest.raises(NonFiniteError, match=r"so must their squares .* 1 of 3 rows"):
        DualGaussian.of(loc, rows, prior)


def test_a_variance_that_round_off_takes() -> None:
    """A factor that belongs to other rows stands in for it."""
    loc, rows, prior = parts(3, 7)
    ours = DualGaussian.of(loc, rows, prior)
    wrong = DualGaussian(loc, 1e3 * rows, prior, ours.kernel_tril)
    with pytest.raises(PrecisionError, match=r"S=7 must be positive; got 7 that"):
        wrong.variance()


FACTORS = torch.logspace(-6, 6, 6, dtype=torch.float64).reshape(2, 3)


@each_shape
def test_log_determinants_under_many_factors(
    num_rows: int, size: int, dtype: torch.dtype
) -> None:
    _, rows, prior = (part.to(dtype) for part in parts(num_rows, size))
    found = dual_form(rows, prior).log_det_function(FACTORS.numel())(FACTORS)
    ggn = rows.double().mT @ rows.double()
    precisions = ggn + FACTORS[..., None, None] * prior.double().diag()
    eigenvalues = torch.linalg.eigvalsh(precisions)
    # 1e-10, and what one rounding of a badly conditioned matrix moves.
    allowed = 1e-10 + 4 * size * EPS * eigenvalues[..., -1] / eigenvalues[..., 0]
    errors = (found - torch.linalg.slogdet(precisions).logabsdet).abs()
    assert found.dtype == torch.float64
    assert_close(errors / allowed, torch.zeros_like(errors), rtol=0.0, atol=1.0)


def test_no_factors() -> None:
    _, rows, prior = parts(3, 7)
    nothing = torch.empty(0, 2, dtype=torch.float64)
    found = dual_form(rows, prior).log_det_function(0)(nothing)
    assert found.shape == (0, 2)
    assert found.dtype == torch.float64


@pytest.mark.parametrize("factor", [0.5, "each"])
def test_a_gaussian_under_another_prior(factor: float | str) -> None:
    loc, rows, prior = parts(3, 7)
    each = draw(4, 7).square() + 0.1 if isinstance(factor, str) else factor
    form = dual_form(rows, prior)
    ours = form.rescaled(each).gaussian(loc)
    assert_close(ours.precision_matrix(), dense(rows, prior * each))
    expected = torch.linalg.inv(dense(rows, prior * each))
    assert_close(ours.covariance_matrix(), expected)
    if not isinstance(factor, str):
        log_det = form.log_det_function(1)(double([factor]))
        assert_close(2 * ours.half_log_det(), log_det[0])


def test_a_gaussian_keeps_float32_under_factors_in_float64() -> None:
    loc, rows, prior = (part.float() for part in parts(3, 7))
    factors = torch.ones(7, dtype=torch.float64)
    ours = dual_form(rows, prior).rescaled(factors).gaussian(loc)
    assert ours.variance().dtype == ours.draw(loc).dtype == torch.float32


@pytest.mark.parametrize("forgetting", [1.0, 0.5])
@pytest.mark.parametrize("num_more", [0, 1, 5])
def test_more_rows(num_more: int, forgetting: float, dtype: torch.dtype) -> None:
    _, rows, prior = parts(3, 7)
    before, more = rows.to(dtype), draw(9, num_more, 7)
    form = dual_form(before, prior.to(dtype))
    found = form.updated(more.to(dtype), 1.0, forgetting=forgetting)
    assert found.rows.shape == (3 + num_more, 7)
    is_close(found.ggn(), forgetting * rows.mT @ rows + more.mT @ more, dtype)
    assert_close(form.rows, before.double(), rtol=0.0, atol=0.0)
    assert_close(before, rows.to(dtype), rtol=0.0, atol=0.0)


def test_tensors_there_and_back() -> None:
    _, rows, prior = parts(3, 7)
    form = dual_form(rows, prior)
    tensors = form.tensors()
    assert sorted(tensors) == [
        "kernel_tril",
        "prior_columns",
        "prior_coupled",
        "prior_diagonal",
        "rows",
        "scaled_prior",
    ]
    back = DualForm.from_tensors(tensors, Layout(("w",), (prior.shape,)))
    assert back.rows is rows
    assert back.prior.diagonal is prior
    assert back.scaled_prior is form.scaled_prior
    assert back.kernel_tril is form.kernel_tril


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_the_dual_form_costs(dtype: torch.dtype) -> None:
    for size in (1, 2, 10, 1000, 100_000):
        pays = [
            dual_pays(rows, size, dtype) for rows in range(0, size + 1, -(-size // 50))
        ]
        assert pays[0]
        assert pays == sorted(pays, reverse=True)  # once too many rows, always
        assert not pays[-1]
    limit = {torch.float64: 220, torch.float32: 110}[dtype]
    assert dual_pays(limit, 1000, dtype)
    assert not dual_pays(limit + 10, 1000, dtype)
