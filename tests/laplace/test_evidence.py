"""The log marginal likelihood, against marginal densities in closed form and autograd.

The linear models start at the exact MAP of the scales that are asked for, where
Laplace's approximation is exact.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.exceptions import OptionError, PrecisionError, SelectionError
from tests import reference
from tests.cases import CASES, DOUBLE, Case, draw
from tests.tolerances import tolerance

EXACT = {"rtol": 1e-10, "atol": 1e-8}
AUTOGRAD = tolerance(torch.float64, "autograd")
NUM_DATA = 7


@dataclass(frozen=True)
class Linear:
    """y = X w + b + noise, priors of unequal means and scales, two sites."""

    x: Tensor
    y: Tensor
    noise: Tensor
    loc: Tensor
    scale: Tensor

    @classmethod
    def of(cls, width: int = 3) -> Linear:
        return cls(
            x=draw(1, NUM_DATA, width),
            y=draw(2, NUM_DATA),
            noise=draw(3, NUM_DATA).exp() / 2,
            loc=draw(4, width + 1),
            scale=draw(5, width + 1).exp(),
        )

    @property
    def design(self) -> Tensor:
        return torch.cat([self.x, torch.ones(NUM_DATA, 1).double()], dim=1)

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(self.loc[:-1], self.scale[:-1]).to_event(1))
        b = pyro.sample("b", dist.Normal(self.loc[-1], self.scale[-1]))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w + b, self.noise[: len(x)]), obs=y)

    def scaled(self, s: Tensor, r: float) -> tuple[Tensor, Tensor]:
        """Variances of prior and noise at prior scales s, (4,), and noise scale r."""
        return self.scale**2 / s, (r * self.noise) ** 2

    def map(self, s: Tensor, r: float) -> Tensor:
        prior, noise = self.scaled(s, r)
        loc, _ = reference.conjugate_posterior(
            self.design, self.y, noise.sqrt(), self.loc, prior.diag()
        )
        return loc

    def log_evidence(self, s: Tensor, r: float) -> Tensor:
        """Density of y, the weights integrated out."""
        prior, noise = self.scaled(s, r)
        covariance = self.design @ prior.diag() @ self.design.T + noise.diag()
        return MultivariateNormal(self.design @ self.loc, covariance).log_prob(self.y)

    def fitted(
        self, at: Tensor, subnet: Any = None, **options: Any
    ) -> AutoSubnetMultivariateNormal:
        init = init_to_value(values={"w": at[:-1], "b": at[-1]})
        guide = AutoSubnetLaplace(self.model, subnet, init_loc_fn=init, **options)
        return guide.laplace_approximation(self.x, self.y)


def sites(s: Tensor) -> dict[str, float]:
    """Prior scales by site, where those of ``w`` agree."""
    return {"w": float(s[0]), "b": float(s[-1])}


ONE = torch.ones(4).double()
SCALES = {
    "the-models-own": (ONE, 1.0),
    "another-prior": (0.3 * ONE, 1.0),
    "another-noise": (ONE, 1.7),
    "both": (20.0 * ONE, 0.4),
    "by-site": (torch.tensor([4.0, 4.0, 4.0, 0.1]).double(), 0.8),
}


@pytest.mark.parametrize("form", ["primal", "dual"])
@pytest.mark.parametrize("name", SCALES)
def test_it_is_the_density_of_the_data(name: str, form: str) -> None:
    s, r = SCALES[name]
    case = Linear.of()
    posterior = case.fitted(case.map(s, r), form=form)
    found = posterior.log_marginal_likelihood(sites(s), r)
    assert_close(found, case.log_evidence(s, r), **EXACT)


@pytest.mark.parametrize("form", ["primal", "dual"])
@pytest.mark.parametrize("name", SCALES)
def test_it_reads_the_posteriors_own_scales(name: str, form: str) -> None:
    s, r = SCALES[name]
    case = Linear.of()
    posterior = case.fitted(case.map(s, r), form=form)
    scaled = posterior.with_prior_precision(sites(s)).with_noise_scale(r)
    assert_close(scaled.log_marginal_likelihood(), case.log_evidence(s, r), **EXACT)
    # In the other order, and over scales that were something else before.
    again = scaled.with_noise_scale(3.0).with_prior_precision(7.0)
    again = again.with_noise_scale(r).with_prior_precision(sites(s))
    assert_close(again.log_marginal_likelihood(), case.log_evidence(s, r), **EXACT)
    _, covariance = reference.conjugate_posterior(
        case.design, case.y, r * case.noise, case.loc, (case.scale**2 / s).diag()
    )
    found = again.get_posterior().covariance_matrix
    assert_close(found, covariance, **EXACT)


@pytest.mark.parametrize("kept", [[0], [1, 2], [0, 3], [0, 1, 2, 3]])
def test_of_a_subset_it_is_the_density_given_the_other_weights(kept: list[int]) -> None:
    """Joint density of the data and the weights that are held, S integrated out."""
    case = Linear.of()
    at = draw(6, 4)
    rest = [i for i in range(4) if i not in kept]
    target = case.y - case.design[:, rest] @ at[rest]
    loc, _ = reference.conjugate_posterior(
        case.design[:, kept],
        target,
        case.noise,
        case.loc[kept],
        (case.scale[kept] ** 2).diag(),
    )
    at[kept] = loc
    covariance = (case.noise**2).diag()
    covariance += (
        case.design[:, kept] @ (case.scale[kept] ** 2).diag() @ (case.design[:, kept].T)
    )
    mean = case.design[:, rest] @ at[rest] + case.design[:, kept] @ case.loc[kept]
    expected = MultivariateNormal(mean, covariance).log_prob(case.y)
    for i in rest:
        expected += torch.distributions.Normal(case.loc[i], case.scale[i]).log_prob(
            at[i]
        )
    subnet = {
        "w": torch.tensor([i for i in kept if i < 3], dtype=torch.long),
        "b": torch.tensor(3 in kept),
    }
    found = case.fitted(at, subnet).log_marginal_likelihood()
    assert_close(found, expected, **EXACT)


def test_the_bridge_to_the_linearized_model() -> None:
    """By sampling the prior: E[p(y | w)] of a model small enough for it.

    2e5 draws; the standard error of the log is 6e-3, and the limit 4.3 of those.
    """
    case = Linear.of(width=1)
    s = torch.ones(2).double()
    posterior = case.fitted(case.map(s, 1.0))
    torch.manual_seed(0)
    weights = case.loc + case.scale * torch.randn(200_000, 2).double()
    mean = weights @ case.design.T
    density = torch.distributions.Normal(mean, case.noise).log_prob(case.y).sum(1)
    weight = (density - density.max()).exp()
    estimate = weight.mean().log() + density.max()
    error = float(weight.std() / weight.mean() / math.sqrt(len(weight)))
    assert error < 0.02
    found = posterior.log_marginal_likelihood()
    assert_close(found, estimate, rtol=0.0, atol=4.27 * error)


def finite_difference(f: Callable[[float], Tensor], at: float) -> Tensor:
    """Fourth order, in the logarithm; truncation about h^4, round-off 1e-12 / h."""
    h = 1e-3
    values = [f(at * math.exp(k * h)) for k in (-2, -1, 1, 2)]
    return (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * h * at)


# Fixed noise or none; the priors couple weights in the last.
DIFFERENTIABLE = ["regression_mlp", "classification_mlp", "correlated_prior"]


@pytest.mark.parametrize("form", ["primal", "auto"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradient_in_the_prior_scale(name: str, form: str) -> None:
    case = CASES[name](DOUBLE)
    guide = case.guide(case.scattered(), form=form)
    posterior = guide.laplace_approximation(*case.args, **case.kwargs)
    for at in (0.3, 1.0, 25.0):
        scale = torch.tensor(at, dtype=torch.float64, requires_grad=True)
        found = posterior.log_marginal_likelihood(scale)
        plain = posterior.log_marginal_likelihood(at)
        assert_close(found.detach(), plain, **EXACT)
        (gradient,) = torch.autograd.grad(found, scale)
        expected = finite_difference(posterior.log_marginal_likelihood, at)
        assert_close(gradient, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_gradient_in_each_sites_scale_and_the_noise(form: str) -> None:
    case = Linear.of()
    posterior = case.fitted(draw(8, 4), form=form).with_noise_scale(1.3)
    w, b, r = (
        torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for value in (0.5, 3.0, 0.7)
    )

    def evidence(w: Any, b: Any, r: Any) -> Tensor:
        return posterior.log_marginal_likelihood({"w": w, "b": b}, r)

    gradients = torch.autograd.grad(evidence(w, b, r), (w, b, r))
    expected = (
        finite_difference(lambda v: evidence(v, 3.0, 0.7), 0.5),
        finite_difference(lambda v: evidence(0.5, v, 0.7), 3.0),
        finite_difference(lambda v: evidence(0.5, 3.0, v), 0.7),
    )
    assert_close(gradients, expected, rtol=1e-7, atol=1e-7)


def log_joint(case: Case) -> Tensor:
    """Pyro's own log density of data and weights, and the changes of volume."""
    values = {
        latent.name: value.to(case.like)
        for latent, value in zip(
            case.latents, case.values(case.packed).values(), strict=True
        )
    }
    model = poutine.condition(case.model, data=values)
    total = poutine.trace(model).get_trace(*case.args, **case.kwargs).log_prob_sum()
    for latent in case.latents:
        total = total + reference.log_volume(latent.to_support, latent.unconstrained)
    return total


@pytest.mark.parametrize(
    ("curvature", "covariance"),
    [("hessian", "full"), *product(["ggn", "ef"], ["full", "diag", "kron"])],
)
def test_another_noise_is_that_of_a_model_written_with_it(
    curvature: str, covariance: str
) -> None:
    """Precision and evidence; each curvature falls with its own power of the noise."""
    case, ratio = replace(Linear.of(), scale=torch.full((4,), 0.7).double()), 1.7
    at = draw(8, 4)
    options = {"curvature": curvature, "covariance": covariance}
    written = replace(case, noise=ratio * case.noise).fitted(at, **options)
    found = case.fitted(at, **options).with_noise_scale(ratio)
    ours, theirs = found.get_posterior(), written.get_posterior()
    assert_close(ours.precision_matrix, theirs.precision_matrix, **AUTOGRAD)
    expected = written.log_marginal_likelihood()
    assert_close(found.log_marginal_likelihood(), expected, **EXACT)
    own = case.fitted(at, **options)
    assert_close(own.log_marginal_likelihood(None, ratio), expected, **EXACT)
    parts = case.x[:3], case.y[:3]
    more = found.update(*parts).get_posterior().precision_matrix
    assert_close(more, written.update(*parts).get_posterior().precision_matrix, **EXACT)


def dense_evidence(case: Case, positions: list[int], scale: float) -> Tensor:
    """The formula, by dense autograd: other priors as the normal that touches them."""
    size = len(positions)
    packed = case.packed.requires_grad_()
    (gradient,) = torch.autograd.grad(case.log_prior_at(packed), packed)
    gradient = gradient[positions]
    ggn, prior = (
        matrix[positions][:, positions] for matrix in (case.ggn(), case.prior())
    )
    energy = gradient @ torch.linalg.solve(prior, gradient)
    change = 0.5 * (size * math.log(scale) - (scale - 1) * energy)
    log_det = torch.linalg.slogdet(ggn + scale * prior).logabsdet
    constant = 0.5 * size * math.log(2 * math.pi)
    return log_joint(case) + change + constant - 0.5 * log_det


# Without those whose precision, or prior, is not positive definite at the point, or
# whose site has another change of volume than a bijection's.
PROPER = sorted(
    name
    for name in CASES
    if name not in {"heteroscedastic", "masked_bernoulli", "latent_noise"}
)


@pytest.mark.parametrize("scale", [1.0, 0.2, 30.0])
@pytest.mark.parametrize("name", PROPER)
def test_any_model(name: str, scale: float) -> None:
    """Weights, masks, plates, several sites, constrained and correlated priors."""
    case = CASES[name](DOUBLE)
    positions = sorted(case.scattered())
    posterior = case.guide(positions).laplace_approximation(*case.args, **case.kwargs)
    found = posterior.log_marginal_likelihood(scale)
    assert_close(found, dense_evidence(case, positions, scale), **AUTOGRAD)
    scaled = posterior.with_prior_precision(scale)
    assert_close(scaled.log_marginal_likelihood(), found, **EXACT)


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_minibatches_sum_to_it(batch_size: int) -> None:
    case = CASES["classification_mlp"](DOUBLE)
    guide = case.guide(case.scattered())
    whole = guide.laplace_approximation(*case.args)
    batches = list(zip(*(arg.split(batch_size) for arg in case.args), strict=True))
    found = guide.laplace_approximation_from(batches).log_marginal_likelihood()
    assert_close(found, whole.log_marginal_likelihood(), **EXACT)


def test_a_part_of_the_data_is_scaled_up_to_all() -> None:
    """The likelihood's terms count 14/7 times, those of the prior once."""
    case = CASES["classification_mlp"](DOUBLE)
    guide = case.guide(case.scattered())
    once = guide.laplace_approximation_from([case.args])
    twice = guide.laplace_approximation_from([case.args], num_data=2 * NUM_DATA)
    both = guide.laplace_approximation_from([case.args, case.args])
    assert_close(
        twice.log_marginal_likelihood(), both.log_marginal_likelihood(), **EXACT
    )
    assert float(once.log_marginal_likelihood()) > float(
        twice.log_marginal_likelihood()
    )


def test_missing_data_do_not_count() -> None:
    """Masked observations may be NaN."""
    case = CASES["weighted_poisson"](DOUBLE)
    x, y, weights, seen = case.args
    posterior = case.guide(case.scattered()).laplace_approximation(*case.args)
    holes = y.clone()
    holes[~seen] = math.nan
    other = case.guide(case.scattered()).laplace_approximation(x, holes, weights, seen)
    found = other.log_marginal_likelihood()
    assert_close(found, posterior.log_marginal_likelihood(), **EXACT)


BAD: dict[str, tuple[type[Exception], Mapping[str, Any], str]] = {
    "zero": (OptionError, {"prior_factor": 0.0}, "`prior_factor` must be positive"),
    "nan": (OptionError, {"prior_factor": math.nan}, "got nan"),
    "site": (SelectionError, {"prior_factor": {"v": 1.0}}, "got 'v'"),
    "site-value": (
        OptionError,
        {"prior_factor": {"w": -1.0}},
        "`prior_factor['w']` must be positive and finite; got -1.0",
    ),
    "noise": (OptionError, {"noise_factor": -0.5}, "must be positive and finite"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_scales(name: str) -> None:
    kind, scales, message = BAD[name]
    case = Linear.of()
    posterior = case.fitted(case.map(ONE, 1.0))
    with pytest.raises(kind, match=re.escape(message)):
        posterior.log_marginal_likelihood(**scales)


@pytest.mark.parametrize("name", ["classification_mlp", "heteroscedastic"])
def test_noise_that_cannot_be_scaled(name: str) -> None:
    case = CASES[name](DOUBLE)
    positions = [1, 2, 3] if name == "classification_mlp" else [8, 9]
    posterior = case.guide(positions).laplace_approximation(*case.args)
    message = (
        r"must be that of normal observed sites whose scale no chosen weight moves"
    )
    with pytest.raises(OptionError, match=message):
        posterior.log_marginal_likelihood(noise_factor=2.0)
    with pytest.raises(OptionError, match=message):
        posterior.with_noise_scale(2.0)
    with pytest.raises(OptionError, match=message):
        posterior.tune_noise_scale()
    assert bool(posterior.log_marginal_likelihood(noise_factor=1.0).isfinite())


def test_a_prior_that_does_not_curve_cannot_be_scaled() -> None:
    """A Cauchy prior curves the wrong way in its tails; unscaled there is an answer."""
    x, y = draw(1, 9, 2), draw(2, 9)

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Cauchy(torch.zeros(2).double(), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.1), obs=y)

    far = init_to_value(values={"w": torch.tensor([3.0, 0.1]).double()})
    posterior = AutoSubnetLaplace(model, init_loc_fn=far).laplace_approximation(x, y)
    assert bool(posterior.log_marginal_likelihood().isfinite())
    message = r"must have a positive definite precision .* diagonal entries from -.*"
    with pytest.raises(PrecisionError, match=message):
        posterior.log_marginal_likelihood(2.0)


def test_sites_that_couple_take_one_scale() -> None:
    x, y = draw(1, 9, 2), draw(2, 9)

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(w.sum(), 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w + b, 0.1), obs=y)

    posterior = AutoSubnetLaplace(model).laplace_approximation(x, y)
    assert posterior.with_prior_precision({"w": 2.0, "b": 2.0}).subnet.size == 3
    message = r"couples must have one prior scale; got [23] and [23] at positions"
    with pytest.raises(OptionError, match=message):
        posterior.with_prior_precision({"w": 2.0, "b": 3.0})
