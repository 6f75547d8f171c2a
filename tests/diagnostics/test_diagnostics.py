"""Importance sampling as a check: against ArviZ, and where the answer is known."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.diagnostics import ImportanceCheck, importance_check, pareto_smoothed
from pyro_subnet.exceptions import NonFiniteError, OptionError
from tests.export.generation import IS_1, psislw
from tests.tolerances import tolerance

CLOSED = tolerance(torch.float64, "closed_form")
DOUBLE = torch.float64


WEIGHTS = {
    "normal": lambda n: torch.randn(n, dtype=DOUBLE),
    "heavy": lambda n: dist.Cauchy(0.0, 1.0).sample((n,)).double(),
    "bounded": lambda n: torch.rand(n, dtype=DOUBLE),
    "far": lambda n: 40 * torch.randn(n, dtype=DOUBLE),
    "shifted": lambda n: torch.randn(n, dtype=DOUBLE) - 1e4,
    "one": lambda n: torch.cat([torch.zeros(n - 1), torch.tensor([800.0])]).double(),
}


# Of K draws the largest 3 sqrt(K) are fitted, at most K / 5. ArviZ 1.x rounds down, and
# is the same where that is whole; to a tail of five draws it fits nothing.
@pytest.mark.parametrize("count", [225, 400] if IS_1 else [25, 400, 1000])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_smoothed_weights_are_arvizs(kind: str, count: int, dtype: torch.dtype) -> None:
    raw = WEIGHTS[kind](count).to(dtype)
    expected, expected_k = psislw(raw.double().numpy())
    found, k_hat = pareto_smoothed(raw)
    if math.isinf(k_hat):
        assert not math.isfinite(expected_k)  # 1.x says nan
    else:
        assert k_hat == pytest.approx(expected_k, abs=1e-6)
    expected = torch.as_tensor(expected)
    if dtype == torch.float32:  # of equal weights in the tail it is open which is which
        found, expected = found.sort().values, expected.sort().values
    assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert_close(found.logsumexp(0), torch.zeros((), dtype=DOUBLE), **CLOSED)


def test_equal_weights_are_the_best_there_are() -> None:
    found, k_hat = pareto_smoothed(torch.full((100,), -3.0, dtype=DOUBLE))
    assert k_hat == -math.inf
    assert_close(found, torch.full((100,), -math.log(100.0), dtype=DOUBLE), **CLOSED)


def linear(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3, dtype=DOUBLE), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def skewed(x: Tensor, y: Tensor | None = None, *, sharp: float = 1.0) -> None:
    """A likelihood that is far from normal in its one weight."""
    w = pyro.sample("w", dist.Normal(torch.zeros((), dtype=DOUBLE), 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Poisson((sharp * w * x).exp()), obs=y)


def fit_linear() -> tuple[AutoSubnetMultivariateNormal, Tensor, Tensor]:
    x, y = torch.randn(20, 3, dtype=DOUBLE), torch.randn(20, dtype=DOUBLE)
    precision = 4 * x.T @ x + torch.eye(3, dtype=DOUBLE)
    at = torch.linalg.solve(precision, 4 * x.T @ y)
    guide = AutoSubnetLaplace(linear, init_loc_fn=init_to_value(values={"w": at}))
    return guide.laplace_approximation(x, y), x, y


@pytest.mark.parametrize("linearized", [False, True])
def test_an_exact_posterior_has_all_its_draws(linearized: bool) -> None:
    posterior, x, y = fit_linear()
    check = importance_check(posterior, x, y, num_samples=200, linearized=linearized)
    assert check.effective_sample_size == pytest.approx(200, rel=1e-6)
    assert check.is_reliable
    assert "close to the exact posterior" in str(check)


def test_a_wide_and_a_narrow_guide() -> None:
    """A Laplace posterior held against the model at another prior is off by as much."""
    posterior, x, y = fit_linear()
    wide = posterior.with_prior_precision(1e-3)
    check = importance_check(wide, x, y, num_samples=2000)
    # Exact: E_p[p/q] of two normals of one mean, by their precisions.
    q = wide.get_posterior().precision_matrix
    p = posterior.get_posterior().precision_matrix
    offset = posterior.get_posterior().loc - wide.get_posterior().loc
    assert_close(offset, torch.zeros_like(offset), **CLOSED)
    ratio = p.det() / (q.det() * (2 * p - q).det()).sqrt()
    expected = 2000 / float(ratio)
    assert check.effective_sample_size == pytest.approx(expected, rel=0.02)
    # Some six times too narrow in every direction: the weights have no second moment.
    narrow = posterior.with_prior_precision(3e3)
    check = importance_check(narrow, x, y, num_samples=2000)
    assert check.k_hat > 0.7
    assert not check.is_reliable
    assert "misses much" in str(check)


def test_weighted_draws_are_those_of_the_exact_posterior() -> None:
    """Against quadrature, in one dimension, where Laplace is off in the mean."""
    x = torch.tensor([0.5, 1.0, 1.5], dtype=DOUBLE)
    y = torch.tensor([0.0, 1.0, 0.0], dtype=DOUBLE)
    guide = AutoSubnetLaplace(skewed, curvature="hessian")
    optimizer = pyro.optim.Adam({"lr": 0.05})
    svi = pyro.infer.SVI(skewed, guide, optimizer, pyro.infer.Trace_ELBO())
    for _ in range(400):
        svi.step(x, y)
    posterior = guide.laplace_approximation(x, y)
    grid = torch.linspace(-25, 8, 20001, dtype=DOUBLE)
    log_p = dist.Normal(0.0, 3.0).log_prob(grid) + dist.Poisson(
        (grid.unsqueeze(-1) * x).exp()
    ).log_prob(y).sum(-1)
    p = log_p.softmax(0)
    mean = float((p * grid).sum())
    spread = float((p * (grid - mean).square()).sum().sqrt())
    laplace = float(posterior.get_posterior().loc)
    assert abs(laplace - mean) > 0.1 * spread
    check = importance_check(posterior, x, y, num_samples=2500)
    weighted = float((check.log_weights.exp() * check.draws.squeeze(-1)).sum())
    error = spread / check.effective_sample_size**0.5
    assert abs(weighted - mean) < min(5 * error, 0.5 * abs(laplace - mean))
    drawn = check.posterior_samples()["subnet"]
    assert drawn.shape == (2500, 1)
    assert abs(float(drawn.mean()) - mean) < 8 * error
    predicted = Predictive(posterior.hybrid_model(), check.posterior_samples())(x)
    assert predicted["y"].shape == (2500, 3)


def test_keyword_arguments_reach_the_model() -> None:
    x, y = torch.ones(3, dtype=DOUBLE), torch.ones(3, dtype=DOUBLE)
    guide = AutoSubnetLaplace(skewed)
    posterior = guide.laplace_approximation(x, y, sharp=0.2)
    pyro.set_rng_seed(0)
    mild = importance_check(
        posterior, x, y, num_samples=50, model_kwargs={"sharp": 0.2}
    )
    pyro.set_rng_seed(0)
    other = importance_check(posterior, x, y, num_samples=50)
    assert mild.effective_sample_size != other.effective_sample_size


def test_the_param_store_stays_as_it_was() -> None:
    """The hybrid model's parameters, D numbers a check, are gone with the check."""
    guide = AutoSubnetLaplace(linear, {"w": torch.tensor([1])})
    x, y = torch.randn(20, 3, dtype=DOUBLE), torch.randn(20, dtype=DOUBLE)
    posterior = guide.laplace_approximation(x, y)
    before = set(pyro.get_param_store().keys())
    importance_check(posterior, x, y, num_samples=25)
    assert set(pyro.get_param_store().keys()) == before


def checked(k_hat: float, count: int = 1000) -> ImportanceCheck:
    log_weights = torch.full((count,), -math.log(count), dtype=DOUBLE)
    draws = torch.zeros(count, 1, dtype=DOUBLE)
    return ImportanceCheck(log_weights, draws, k_hat, float(count), False)


@pytest.mark.parametrize(
    ("k_hat", "count", "words"),
    [
        (0.2, 1000, "close to the exact posterior of the network"),
        (0.6, 1000, "weighted draws correct it"),
        (0.9, 1000, "run MCMC on the hybrid model"),
        (math.inf, 1000, "run MCMC on the hybrid model"),
        (0.4, 30, "too few to tell"),
    ],
)
def test_verdicts(k_hat: float, count: int, words: str) -> None:
    check = checked(k_hat, count)
    assert words in str(check)
    assert check.is_reliable == (k_hat < check.max_k_hat)
    assert str(check).startswith(f"k-hat {k_hat:.2f}, effective sample size")


def test_equal_weights_in_words() -> None:
    check = checked(-math.inf)
    assert str(check).startswith(
        "all weights equal, effective sample size 1000 of 1000 draws: the Laplace"
    )
    assert check.is_reliable


def test_bounds_of_k_hat() -> None:
    """Vehtari et al. (2024), eq. 13: min(1 - 1/log10(K), 0.7)."""
    assert checked(0.1, 100).max_k_hat == pytest.approx(0.5)
    assert checked(0.1, 1000).max_k_hat == pytest.approx(2 / 3)
    assert checked(0.1, 100_000).max_k_hat == pytest.approx(0.7)


@pytest.mark.parametrize("count", [24, 0, -1])
def test_too_few_draws(count: int) -> None:
    posterior, x, y = fit_linear()
    with pytest.raises(OptionError, match=f"at least 25.*got {count}"):
        importance_check(posterior, x, y, num_samples=count)


def test_weights_that_are_no_numbers() -> None:
    posterior, x, y = fit_linear()
    with pytest.raises(NonFiniteError, match="50 NaN"), pyro.validation_enabled(False):
        importance_check(posterior, x, y * math.nan, num_samples=50)
