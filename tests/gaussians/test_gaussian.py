"""The Gaussian held by its precision's factor, against torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from pyro.distributions import MultivariateNormal
from scipy import stats
from torch import Tensor
from torch.testing import assert_close

from pyro_subnet.exceptions import NonFiniteError, PrecisionError
from pyro_subnet.gaussians.factored import FactoredGaussian, factor_precision_
from pyro_subnet.models.subnet_normal import SubnetNormal
from tests.cases import draw
from tests.tolerances import FALSE_ALARM_RATE, num_standard_errors, tolerance

# One element, a few, and more than the 512 columns that are solved for at once.
SIZES = [1, 5, 600]


def precision_matrix(size: int) -> Tensor:
    """A well-conditioned precision, float64."""
    root = draw(size, size, size + 3) / math.sqrt(size)
    return root @ root.T + torch.eye(size, dtype=torch.float64)


def factored(precision: Tensor) -> Tensor:
    """A copy of a precision, factored; what is above the diagonal is left in it."""
    factor = precision.clone()
    factor_precision_(factor, lambda: factor.copy_(precision))
    return factor


def pair(
    size: int, dtype: torch.dtype = torch.float64
) -> tuple[SubnetNormal, MultivariateNormal]:
    """Ours in a dtype, and torch's in float64.

    What stands in the strict upper triangle of the factor must not be read.
    """
    loc, precision = draw(size + 1, size), precision_matrix(size)
    factor = factored(precision)
    factor = factor + 100.0 * draw(size + 2, size, size).triu(1)
    ours = SubnetNormal(
        FactoredGaussian(loc.to(dtype), factor.to(dtype)), validate_args=True
    )
    return ours, MultivariateNormal(loc, precision_matrix=precision)


def is_close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    """Compares values, and checks that the dtype was kept."""
    assert ours.dtype == dtype
    assert_close(ours.double(), theirs, **tolerance(dtype, "closed_form"))


@pytest.mark.parametrize("size", SIZES)
def test_moments(size: int, dtype: torch.dtype) -> None:
    ours, theirs = pair(size, dtype)
    is_close(ours.loc, theirs.loc, dtype)
    is_close(ours.mean, theirs.mean, dtype)
    is_close(ours.mode, theirs.mode, dtype)
    is_close(ours.variance, theirs.variance, dtype)
    is_close(ours.stddev, theirs.stddev, dtype)
    is_close(ours.covariance_matrix, theirs.covariance_matrix, dtype)
    is_close(ours.precision_matrix, precision_matrix(size), dtype)
    diagonal = precision_matrix(size).diagonal()
    is_close(ours.gaussian.precision_diagonal(), diagonal, dtype)


@pytest.mark.parametrize("size", SIZES)
def test_the_scale_is_the_covariances_lower_factor(
    size: int, dtype: torch.dtype
) -> None:
    ours, theirs = pair(size, dtype)
    is_close(ours.scale_tril, theirs.scale_tril, dtype)
    assert_close(ours.scale_tril.triu(1).abs().max().item(), 0.0)


@pytest.mark.parametrize("size", SIZES)
def test_log_density_and_entropy(size: int, dtype: torch.dtype) -> None:
    ours, theirs = pair(size, dtype)
    values = theirs.loc + draw(3, 4, 2, size)
    found, expected = ours.log_prob(values.to(dtype)), theirs.log_prob(values)
    assert found.shape == (4, 2)
    is_close(found, expected, dtype)
    is_close(ours.log_prob(ours.loc), theirs.log_prob(theirs.loc), dtype)
    is_close(ours.entropy(), theirs.entropy(), dtype)


@pytest.mark.parametrize("size", SIZES)
def test_a_draw_is_the_transposed_solve(size: int, dtype: torch.dtype) -> None:
    ours, theirs = pair(size, dtype)
    noise = draw(4, 2, 3, size)
    factor = torch.linalg.cholesky(precision_matrix(size))
    expected = theirs.loc + noise @ torch.linalg.inv(factor)
    is_close(ours.gaussian.draw(noise.to(dtype)), expected, dtype)
    is_close(ours.gaussian.draw(noise[0, 0].to(dtype)), expected[0, 0], dtype)


@pytest.mark.parametrize("size", SIZES)
def test_whitened_rows_have_the_projected_covariance(
    size: int, dtype: torch.dtype
) -> None:
    ours, theirs = pair(size, dtype)
    jac = draw(5, 2, 3, size) / math.sqrt(size)
    whitened = ours.gaussian.whiten(jac.to(dtype))
    assert whitened.shape == jac.shape
    projected = whitened @ whitened.mT
    is_close(projected, jac @ theirs.covariance_matrix @ jac.mT, dtype)


def test_half_log_determinant() -> None:
    ours, _ = pair(5)
    expected = 0.5 * torch.linalg.slogdet(precision_matrix(5)).logabsdet
    is_close(ours.gaussian.half_log_det(), expected, torch.float64)


@pytest.mark.parametrize("size", SIZES)
def test_extreme_precisions(size: int, dtype: torch.dtype) -> None:
    ours, _ = pair(size, dtype)
    found = torch.tensor(ours.gaussian.extreme_precisions(), dtype=dtype)
    expected = torch.linalg.eigvalsh(precision_matrix(size))[[0, -1]]
    is_close(found, expected, dtype)


def test_what_is_above_the_diagonal_is_not_read() -> None:
    loc, factor = draw(1, 5), torch.linalg.cholesky(precision_matrix(5))
    clean = FactoredGaussian(loc, factor)
    dirty = FactoredGaussian(loc, factor + torch.full_like(factor, torch.nan).triu(1))
    noise = draw(2, 3, 5)
    exact = {"rtol": 0.0, "atol": 0.0}
    assert_close(dirty.draw(noise), clean.draw(noise), **exact)
    assert_close(dirty.whiten(noise), clean.whiten(noise), **exact)
    assert_close(dirty.log_prob(noise), clean.log_prob(noise), **exact)
    for name in ("entropy", "variance", "covariance_matrix", "scale_tril"):
        assert_close(getattr(dirty, name)(), getattr(clean, name)(), **exact)
    for name in ("precision_matrix", "precision_diagonal"):
        assert_close(getattr(dirty, name)(), getattr(clean, name)(), **exact)
    assert dirty.extreme_precisions() == clean.extreme_precisions()


def test_shapes_of_draws() -> None:
    ours, _ = pair(5)
    assert ours.batch_shape == ()
    assert ours.event_shape == (5,)
    assert ours.rsample().shape == (5,)
    assert ours.sample(torch.Size([2, 3])).shape == (2, 3, 5)
    assert ours.expand(torch.Size([4])).sample().shape == (4, 5)
    assert ours.rsample(torch.Size([0])).shape == (0, 5)


def test_gradients_of_a_draw() -> None:
    noise, loc = draw(1, 2, 4).requires_grad_(), draw(2, 4).requires_grad_()
    factor = torch.linalg.cholesky(precision_matrix(4)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda n, m, f: FactoredGaussian(m, f).draw(n), (noise, loc, factor)
    )


def test_gradients_of_the_log_density() -> None:
    value, loc = draw(1, 2, 4).requires_grad_(), draw(2, 4).requires_grad_()
    factor = torch.linalg.cholesky(precision_matrix(4)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, m, f: FactoredGaussian(m, f).log_prob(v), (value, loc, factor)
    )


def test_samples_are_reparameterized() -> None:
    loc = draw(2, 4).requires_grad_()
    factor = torch.linalg.cholesky(precision_matrix(4))
    draws = SubnetNormal(FactoredGaussian(loc, factor)).rsample(torch.Size([3]))
    (gradient,) = torch.autograd.grad(draws.sum(), loc)
    assert_close(gradient, torch.full_like(loc, 3.0))
    assert not SubnetNormal(FactoredGaussian(loc, factor)).sample().requires_grad


NUM_DRAWS = 20_000


def test_mean_of_the_draws(dtype: torch.dtype) -> None:
    ours, theirs = pair(5, dtype)
    draws = ours.sample(torch.Size([NUM_DRAWS])).double()
    errors = (draws.mean(0) - theirs.loc) / theirs.stddev * math.sqrt(NUM_DRAWS)
    assert errors.abs().max() < num_standard_errors(5)


def test_covariance_of_the_draws(dtype: torch.dtype) -> None:
    """Along any direction, n times the mean square over the variance is χ²(n)."""
    ours, theirs = pair(5, dtype)
    draws = ours.sample(torch.Size([NUM_DRAWS])).double() - theirs.loc
    eye = torch.eye(5, dtype=torch.float64)
    pairs = [
        eye[i] + sign * eye[j] for i in range(5) for j in range(i) for sign in (1, -1)
    ]
    directions = torch.stack([*eye, *pairs])
    variances = ((directions @ theirs.covariance_matrix) * directions).sum(-1)
    squares = (draws @ directions.T).square().sum(0) / variances
    tail = FALSE_ALARM_RATE / (2 * len(directions))
    low, high = stats.chi2.ppf([tail, 1 - tail], NUM_DRAWS)
    assert squares.min() > low
    assert squares.max() < high


@pytest.mark.parametrize("size", [1, 5, 600])
def test_the_factor_reads_the_lower_triangle(size: int, dtype: torch.dtype) -> None:
    precision = precision_matrix(size)
    dirty = precision + torch.full_like(precision, torch.nan).triu(1)
    factor = factored(dirty.to(dtype))
    is_close(factor.tril(), torch.linalg.cholesky(precision), dtype)
    assert bool(factor.isnan().eq(dirty.isnan()).all())


def test_a_precision_that_is_not_positive_definite() -> None:
    values = torch.tensor([-0.25, 1.0, 2.0, 3.0], dtype=torch.float64)
    vectors = torch.linalg.qr(draw(1, 4, 4)).Q
    precision = vectors @ values.diag() @ vectors.T
    message = (
        r"precision at S=4 must be positive definite; got smallest eigenvalue "
        r"-2\.500e-01\. Train closer to the MAP, raise the prior's precision, or choose"
    )
    with pytest.raises(PrecisionError, match=message):
        factored(precision)


def test_a_precision_beyond_float32_is_to_be_made_in_float64() -> None:
    """Beside an eigenvalue of 1e9 float32 knows nothing of those below some hundred."""
    vectors = torch.linalg.qr(draw(1, 4, 4)).Q
    precision = vectors @ torch.tensor([-200.0, 1e3, 1e6, 1e9]).double().diag()
    precision = (precision @ vectors.T).float()
    message = (
        r"smallest eigenvalue .*, which rounding makes of the largest, 1\.000e\+09\. "
        r"Run the model in float64, train closer to the MAP"
    )
    with pytest.raises(PrecisionError, match=message):
        factored(precision)
    with pytest.raises(PrecisionError, match=r"eigenvalue -1\.000e\+00\. Train closer"):
        factored(vectors @ torch.tensor([-1.0, 1, 2, 3]).double().diag() @ vectors.T)


def test_the_priors_factor_is_named() -> None:
    precision = torch.diag(torch.tensor([1.0, -0.5]))
    factor = precision.clone()
    message = r"-5\.000e-01\. .* \(now 0\.2 times the model's\), or choose"
    with pytest.raises(PrecisionError, match=message):
        factor_precision_(factor, lambda: factor.copy_(precision), 0.2)


def test_a_singular_precision() -> None:
    with pytest.raises(PrecisionError, match=r"S=2 .* smallest eigenvalue 0\.000e\+00"):
        factored(torch.zeros(2, 2))


def test_the_smallest_eigenvalue_is_that_of_the_lower_triangle() -> None:
    precision = torch.tensor([[1.0, 99.0], [2.0, 1.0]])
    with pytest.raises(PrecisionError, match=r"smallest eigenvalue -1\.000e\+00"):
        factored(precision)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_diagonal_that_is_not_finite(bad: float) -> None:
    precision = torch.eye(4)
    precision[2, 2] = precision[3, 3] = bad
    message = r"must be finite; got NaN or inf in 2 of 4 rows \(first 2\)"
    with pytest.raises(NonFiniteError, match=message):
        factored(precision)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_entry_off_the_diagonal_that_is_not_finite(
    bad: float, dtype: torch.dtype
) -> None:
    precision = torch.eye(4, dtype=dtype)
    precision[3, 1] = bad
    message = r"must be finite; got NaN or inf in 1 of 4 rows \(first 3\)"
    with pytest.raises(NonFiniteError, match=message):
        factored(precision)


def test_values_are_validated() -> None:
    ours, _ = pair(5)
    with pytest.raises(ValueError, match="within the support"):
        ours.log_prob(torch.full((5,), torch.nan, dtype=torch.float64))
    with pytest.raises(ValueError, match="Expected parameter loc"):
        SubnetNormal(
            FactoredGaussian(torch.tensor([torch.nan]), torch.eye(1)),
            validate_args=True,
        )
