"""Distributions over y: against conjugate algebra and brute integration in float64.

The oracle's mean and covariance of the outputs come from autograd's dense Jacobian.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.stats
import torch
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.exceptions import ModelError, NonFiniteError, OptionError
from pyro_subnet.predictions.distribution import of_site, predictive_distribution
from pyro_subnet.predictions.groups import joint_option
from pyro_subnet.predictions.links.integration import Integrated, PredictiveOptions
from pyro_subnet.predictions.outputs import OutputGaussian
from pyro_subnet.predictions.raw_logits import with_raw_logits
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.linearized_outputs import LinearizedOutputs
from tests.tolerances import num_standard_errors, tolerance

EXACT = tolerance(torch.float64, "reordered")  # 1e-9
CONJUGATE = {"rtol": 1e-8, "atol": 1e-8}
QUADRATURE = {"rtol": 1e-10, "atol": 1e-10}
NUM_TRAIN, NUM_TEST, NUM_INPUTS, NUM_HIDDEN = 11, 4, 3, 5
Values = Mapping[str, Tensor]
Family = Callable[..., Any]


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def shapes(num_outputs: int) -> dict[str, tuple[int, ...]]:
    return {
        "w1": (NUM_HIDDEN, NUM_INPUTS),
        "b1": (NUM_HIDDEN,),
        "w2": (num_outputs, NUM_HIDDEN),
        "b2": (num_outputs,),
    }


def network(weights: Values, x: Tensor) -> Tensor:
    hidden = F.linear(x, weights["w1"], weights["b1"]).tanh()
    return F.linear(hidden, weights["w2"], weights["b2"])


def sampled_weights(num_outputs: int) -> dict[str, Tensor]:
    found = {}
    for site, shape in shapes(num_outputs).items():
        prior = dist.Normal(torch.zeros(shape, dtype=torch.float64), 0.8)
        found[site] = pyro.sample(site, prior.to_event(len(shape)))
    return found


def scattered(num_outputs: int) -> dict[str, Tensor]:
    return {
        "w2": torch.tensor([num_outputs * NUM_HIDDEN - 1, 0]),
        "w1": torch.tensor([2, 13, 7, 4, 0]),
        "b2": torch.arange(num_outputs),
    }


class Fit:
    """A posterior over some weights of a network, and the oracle's dense Jacobian."""

    def __init__(self, family: Family, num_outputs: int, subnet: Any = "scattered"):
        def model(x: Tensor, y: Tensor | None = None) -> None:
            f = network(sampled_weights(num_outputs), x)
            with pyro.plate("data", len(x)):
                pyro.sample("y", family(f), obs=y)

        self.at = {site: double(*s) for site, s in shapes(num_outputs).items()}
        chosen = scattered(num_outputs) if isinstance(subnet, str) else subnet
        init = init_to_value(values=self.at)
        x = double(NUM_TRAIN, NUM_INPUTS)
        y = family(network(self.at, x)).sample()
        guide = AutoSubnetLaplace(model, chosen, init_loc_fn=init)
        self.posterior = guide.laplace_approximation(x, y)
        self.x = double(NUM_TEST, NUM_INPUTS)
        self.y = family(network(self.at, self.x)).sample()

    def predict(self, **options: Any) -> Integrated:
        return predict(self.posterior, self.x, **options)

    def assert_link(self, link: str, **options: Any) -> None:
        assert_link(link, self.posterior, self.x, self.y, **options)

    def moments(
        self, eta: Callable[[Tensor], Tensor] = lambda f: f
    ) -> tuple[Tensor, Tensor]:
        """Mean (N, C) and covariance (N C, N C) of functions of the raw outputs."""
        jacobians = torch.autograd.functional.jacobian(
            lambda *leaves: eta(
                network(dict(zip(self.at, leaves, strict=True)), self.x)
            ),
            tuple(self.at.values()),
        )
        by_site = dict(zip(self.at, jacobians, strict=True))
        jac = torch.cat(
            [
                by_site[site].flatten(2)[..., at]
                for site, at in self.posterior.subnet.indices.items()
            ],
            dim=-1,
        ).flatten(0, 1)
        precision = self.posterior.get_posterior().precision_matrix
        covariance = jac @ torch.linalg.solve(precision, jac.mT)
        return eta(network(self.at, self.x)), covariance

    def each(
        self, eta: Callable[[Tensor], Tensor] = lambda f: f
    ) -> tuple[Tensor, Tensor]:
        """Mean (N, C) and covariance (N, C, C)."""
        loc, covariance = self.moments(eta)
        count, width = loc.shape
        blocks = covariance.reshape(count, width, count, width)
        return loc, torch.stack([blocks[n, :, n] for n in range(count)])


def predict(
    posterior: AutoSubnetMultivariateNormal,
    *args: Any,
    site: str | None = None,
    **options: Any,
) -> Integrated:
    """What the posterior's own methods give, at any noise and with its error."""
    call = of_site(ModelCall.read(posterior.at_map, args, {}), site)
    outputs = with_raw_logits(LinearizedOutputs.read(call, posterior.subnet))
    gaussian = OutputGaussian(outputs, posterior.gaussian)
    return predictive_distribution(gaussian.problem(PredictiveOptions(**options)))


def assert_link(
    link: str,
    posterior: AutoSubnetMultivariateNormal,
    x: Tensor,
    y: Tensor,
    **options: Any,
) -> None:
    """The link that is taken where none is asked for: both predict the same bits."""
    taken, asked = (
        predict(
            posterior,
            x,
            link=each,
            generator=torch.Generator().manual_seed(1),
            **options,
        ).distribution.log_prob(y)
        for each in (None, link)
    )
    assert_close(taken, asked, rtol=0.0, atol=0.0)


def integral(function: Callable[[float], float], loc: float, scale: float) -> float:
    """E g(f) for Gaussian f, adaptively."""
    found = scipy.integrate.quad(
        lambda z: function(loc + scale * z) * math.exp(-z * z / 2),
        -12,
        12,
        epsabs=0.0,
        epsrel=1e-12,
        limit=400,
    )
    return found[0] / math.sqrt(2 * math.pi)


# ----------------------------------------------------------------------------------
# Gaussian noise.


@pytest.mark.parametrize("noise_factor", [1.0, 1.7])
@pytest.mark.parametrize("joint", [False, True])
def test_conjugate_regression_is_exact(joint: bool, noise_factor: float) -> None:
    """Bayesian linear regression, whose predictive the textbooks give."""
    noise, prior = 0.3, 0.8

    def model(x: Tensor, y: Tensor | None = None) -> None:
        zero = torch.zeros(NUM_INPUTS, dtype=torch.float64)
        w = pyro.sample("w", dist.Normal(zero, prior).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, noise), obs=y)

    x, y, test = double(NUM_TRAIN, 3), double(NUM_TRAIN), double(NUM_TEST, 3)
    eye = torch.eye(NUM_INPUTS, dtype=torch.float64)
    covariance = torch.linalg.inv(x.mT @ x / noise**2 + eye / prior**2)
    mean = covariance @ x.mT @ y / noise**2
    init = init_to_value(values={"w": mean})
    posterior = AutoSubnetLaplace(model, init_loc_fn=init).laplace_approximation(x, y)
    found = predict(posterior, test, joint=joint, noise_factor=noise_factor)
    d = found.distribution
    expected = test @ covariance @ test.mT
    expected += (noise * noise_factor) ** 2 * torch.eye(NUM_TEST, dtype=torch.float64)
    assert_link("exact", posterior, test, double(NUM_TEST), joint=joint)
    assert found.log_prob_error is None
    assert_close(d.mean, test @ mean, **CONJUGATE)
    if joint:
        assert isinstance(d, dist.MultivariateNormal)
        assert_close(d.covariance_matrix, expected, **CONJUGATE)
    else:
        assert isinstance(d, dist.Normal)
        assert_close(d.variance, expected.diagonal(), **CONJUGATE)


@pytest.mark.parametrize("joint", [False, True])
def test_several_columns_of_their_own_noise(joint: bool) -> None:
    noise = torch.tensor([0.3, 0.9, 0.1], dtype=torch.float64)
    fit = Fit(lambda f: dist.Normal(f, noise).to_event(1), 3)
    d = fit.predict(joint=joint).distribution
    assert isinstance(d, dist.MultivariateNormal)
    if joint:
        loc, covariance = fit.moments()
        assert d.batch_shape == ()
        assert_close(d.loc, loc.flatten(), **EXACT)
        expected = covariance + noise.repeat(NUM_TEST).square().diag()
    else:
        loc, covariance = fit.each()
        assert d.batch_shape == (NUM_TEST,)
        assert_close(d.loc, loc, **EXACT)
        expected = covariance + noise.square().diag()
        assert d.log_prob(fit.y).shape == (NUM_TEST,)
    assert_close(d.covariance_matrix, expected, **EXACT)


@pytest.mark.parametrize("num_outputs", [1, 3])
@pytest.mark.parametrize("noise_factor", [1.0, 1.7])
def test_groups_of_inputs_share_a_distribution(
    num_outputs: int, noise_factor: float
) -> None:
    noise = torch.tensor([0.3, 0.9, 0.1], dtype=torch.float64)[:num_outputs]
    fit = Fit(lambda f: dist.Normal(f, noise).to_event(1), num_outputs)
    fit.x = double(6, NUM_INPUTS)
    loc, covariance = fit.moments()
    covariance = covariance + (noise_factor * noise).repeat(6).diag() ** 2
    for size in (1, 2, 3, 6):
        d = fit.predict(joint=size, noise_factor=noise_factor).distribution
        width = size * num_outputs
        blocks = [
            covariance[first : first + width, first : first + width]
            for first in range(0, len(covariance), width)
        ]
        assert d.batch_shape == (6 // size,)
        assert_close(d.loc, loc.reshape(-1, width), **EXACT)
        assert_close(d.covariance_matrix, torch.stack(blocks), **EXACT)


def test_truth_values_of_numpy_are_no_numbers_of_inputs() -> None:
    """As they come; the tests' own checks of types refuse them at public methods."""
    assert joint_option(np.True_) is True
    assert joint_option(np.False_) is False
    assert joint_option(True) is True
    assert joint_option(1) == 1
    assert not isinstance(joint_option(1), bool)


def test_groups_are_of_gaussian_noise_and_of_equal_size() -> None:
    fit = Fit(lambda f: dist.Normal(f, 0.3).to_event(1), 1)
    for function in (
        fit.posterior.output_distribution,
        fit.posterior.predictive_distribution,
    ):
        wrong = NUM_TEST - 1
        message = rf"`joint` must be .* divides the {NUM_TEST} inputs; got {wrong}"
        with pytest.raises(OptionError, match=message):
            function(fit.x, joint=wrong)
    counts = Fit(lambda f: dist.Poisson(f.exp()).to_event(1), 1)
    with pytest.raises(OptionError, match=r"must be a bool for Poisson .*; got 1"):
        counts.posterior.predictive_distribution(counts.x, joint=1)


def test_one_column_declared_an_event() -> None:
    fit = Fit(lambda f: dist.Normal(f, 0.3).to_event(1), 1)
    d = fit.predict().distribution
    loc, covariance = fit.each()
    assert (d.batch_shape, d.event_shape) == ((NUM_TEST,), (1,))
    assert_close(d.mean, loc, **EXACT)
    assert_close(d.variance, covariance.squeeze(-1) + 0.09, **EXACT)


@pytest.mark.parametrize("joint", [False, True])
def test_correlated_noise(joint: bool) -> None:
    noise = 0.2 * torch.eye(3, dtype=torch.float64) + 0.1
    fit = Fit(lambda f: dist.MultivariateNormal(f, noise), 3)
    d = fit.predict(joint=joint, noise_factor=2.0).distribution
    if joint:
        loc, covariance = fit.moments()
        eye = torch.eye(NUM_TEST, dtype=torch.float64)
        expected = covariance + torch.kron(eye, 4 * noise)
        loc = loc.flatten()
    else:
        loc, covariance = fit.each()
        expected = covariance + 4 * noise
    assert_close(d.loc, loc, **EXACT)
    assert_close(d.covariance_matrix, expected, **EXACT)


@pytest.mark.parametrize("correlated", [False, True])
def test_arrays_keep_their_shape(correlated: bool) -> None:
    noise = 0.2 * torch.eye(3, dtype=torch.float64) + 0.1

    def family(f: Tensor) -> Any:
        f = f.unflatten(-1, (2, 3))
        if correlated:
            return dist.MultivariateNormal(f, noise).to_event(1)
        return dist.Normal(f, 0.3).to_event(2)

    fit = Fit(family, 6)
    d = fit.predict().distribution
    loc, covariance = fit.each()
    eye = torch.eye(6, dtype=torch.float64)
    extra = torch.kron(eye[:2, :2], noise) if correlated else 0.09 * eye
    oracle = dist.MultivariateNormal(loc, covariance + extra)
    assert (d.batch_shape, d.event_shape) == ((NUM_TEST,), (2, 3))
    assert d.sample((5,)).shape == (5, NUM_TEST, 2, 3)
    assert d.rsample().shape == fit.y.shape
    assert_close(d.mean.flatten(1), loc, **EXACT)
    assert_close(d.variance.flatten(1), oracle.variance, **EXACT)
    assert_close(d.log_prob(fit.y), oracle.log_prob(fit.y.flatten(1)), **EXACT)


@pytest.mark.parametrize("kind", ["param", "latent", "by observation"])
def test_a_scale_that_the_subnet_does_not_move(kind: str) -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        f = network(sampled_weights(1), x).squeeze(-1)
        noise: Any = F.softplus(x[:, 0])
        if kind == "param":
            start = torch.tensor(0.4, dtype=torch.float64)
            noise = pyro.param("noise", start, constraint=dist.constraints.positive)
        if kind == "latent":
            zero = torch.zeros((), dtype=torch.float64)
            noise = pyro.sample("noise", dist.LogNormal(zero, 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(f, noise), obs=y)

    at = {site: double(*shape) for site, shape in shapes(1).items()}
    at["noise"] = torch.tensor(0.4, dtype=torch.float64)
    guide = AutoSubnetLaplace(model, scattered(1), init_loc_fn=init_to_value(values=at))
    posterior = guide.laplace_approximation(
        double(NUM_TRAIN, NUM_INPUTS), double(NUM_TRAIN)
    )
    x = double(NUM_TEST, NUM_INPUTS)
    d = predict(posterior, x).distribution
    assert isinstance(d, dist.Normal)
    noise = F.softplus(x[:, 0]) if kind == "by observation" else at["noise"]
    variance = posterior.output_distribution(x).variance.squeeze(-1)
    assert_close(d.variance, variance + noise.square(), **EXACT)
    assert not d.scale.requires_grad


@pytest.mark.parametrize("num_outputs", [1, 2])
def test_log_normal(num_outputs: int) -> None:
    fit = Fit(lambda f: dist.LogNormal(f, 0.3).to_event(1), num_outputs)
    loc, covariance = fit.each()
    noise = 0.09 * torch.eye(num_outputs, dtype=torch.float64)
    oracle = dist.MultivariateNormal(loc, covariance + noise)
    log_y = fit.y.log()
    expected = oracle.log_prob(log_y) - log_y.sum(-1)
    assert_close(fit.predict().distribution.log_prob(fit.y), expected, **EXACT)


def test_noise_that_is_tiny_beside_the_outputs() -> None:
    """A product with the outputs' variance would lose it in float32."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1e3).to_event(1))
        with pyro.plate("data", len(x)):
            f = torch.stack([x @ w, x @ w], -1)
            pyro.sample("y", dist.Normal(f, 0.1).to_event(1), obs=y)

    x = torch.tensor([[1e-3, 0.0], [0.0, 1e-3]])
    posterior = AutoSubnetLaplace(model).laplace_approximation(x, torch.zeros(2, 2))
    d = predict(posterior, torch.tensor([[3.0, 4.0]])).distribution
    # along (1, -1) there is noise alone
    value = torch.tensor([[0.1, -0.1]]) / math.sqrt(2)
    drop = d.log_prob(torch.zeros(1, 2)) - d.log_prob(value)
    assert_close(drop, torch.tensor([0.5]), rtol=2e-2, atol=0.0)


# ----------------------------------------------------------------------------------
# Noise whose log scale is an output.


def test_heteroscedastic_noise_against_a_grid() -> None:
    """A fine grid over loc and log scale at once."""
    fit = Fit(lambda f: dist.Normal(f[:, 0], F.softplus(f[:, 1])), 2)
    found = fit.predict(noise_factor=1.3)
    fit.assert_link("quadrature", noise_factor=1.3)

    def eta(f: Tensor) -> Tensor:
        return torch.stack([f[:, 0], F.softplus(f[:, 1]).log()], -1)

    loc, covariance = fit.each(eta)
    line = torch.linspace(-9, 9, 1201, dtype=torch.float64)
    z = torch.cartesian_prod(line, line)
    weights = (-0.5 * z.square().sum(-1)).exp()
    weights /= weights.sum()
    for n in range(NUM_TEST):
        points = loc[n] + z @ torch.linalg.cholesky(covariance[n]).mT
        density = dist.Normal(points[:, 0], 1.3 * points[:, 1].exp())
        expected = (weights * density.log_prob(fit.y[n]).exp()).sum().log()
        ours = found.distribution.log_prob(fit.y)[n]
        assert found.log_prob_error is not None
        error = float(found.log_prob_error(fit.y)[n])
        assert abs(float(ours - expected)) < 1e-6 + error
        assert error < 1e-3


@pytest.mark.parametrize("joint", [False, True])
def test_noise_in_the_subnet_is_integrated_over_one_dimension(joint: bool) -> None:
    """One log scale for two columns of all data: scipy over it, Gaussian the rest."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        weights = sampled_weights(2)
        zero = torch.zeros((), dtype=torch.float64)
        noise = pyro.sample("noise", dist.LogNormal(zero, 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(network(weights, x), noise).to_event(1), obs=y)

    at = {site: double(*shape) for site, shape in shapes(2).items()}
    at["noise"] = torch.tensor(0.4, dtype=torch.float64)
    subnet = {**scattered(2), "noise": torch.tensor([0])}
    guide = AutoSubnetLaplace(model, subnet, init_loc_fn=init_to_value(values=at))
    posterior = guide.laplace_approximation(
        double(NUM_TRAIN, NUM_INPUTS), double(NUM_TRAIN, 2)
    )
    x, y = double(NUM_TEST, NUM_INPUTS), double(NUM_TEST, 2)
    found = predict(posterior, x, joint=joint)
    assert_link("quadrature", posterior, x, y, joint=joint)
    outputs = posterior.output_distribution(x, joint=True)
    at_loc = torch.arange(4 * NUM_TEST).reshape(NUM_TEST, 4)[:, :2]
    groups = [at_loc.flatten()] if joint else list(at_loc)
    values = [y.flatten()] if joint else list(y)
    log_probs = found.distribution.log_prob(y).reshape(-1)
    for group, value, ours in zip(groups, values, log_probs, strict=True):
        assert_close(ours, _over_log_scale(outputs, group, value), **QUADRATURE)


def _over_log_scale(outputs: Any, group: Tensor, value: Tensor) -> Tensor:
    both = torch.cat([torch.tensor([2]), group])
    mean = outputs.loc[both].numpy()
    covariance = outputs.covariance_matrix[both][:, both].numpy()
    slope = covariance[1:, 0] / covariance[0, 0]
    rest = covariance[1:, 1:] - np.outer(slope, covariance[0, 1:])

    def density(s: float) -> float:
        noise = math.exp(2 * s) * np.eye(len(group))
        centre = mean[1:] + slope * (s - mean[0])
        return scipy.stats.multivariate_normal.pdf(value, centre, rest + noise)

    found = integral(density, float(mean[0]), math.sqrt(covariance[0, 0]))
    return torch.tensor(math.log(found), dtype=torch.float64)


@pytest.mark.parametrize("joint", [False, True])
def test_several_log_scales_by_draws(joint: bool) -> None:
    fit = Fit(lambda f: dist.Normal(f[:, :2], F.softplus(f[:, 2:])).to_event(1), 4)
    found = fit.predict(joint=joint, num_samples=4000)
    fit.assert_link("mc", joint=joint, num_samples=4000)
    brute = fit.predict(joint=joint, num_samples=4000)
    assert_within_errors(found, brute, fit.y)
    with pytest.raises(OptionError, match=r"one log scale .* got (2|8) for each obs"):
        fit.predict(joint=joint, link="quadrature")


def assert_within_errors(first: Integrated, second: Integrated, y: Tensor) -> None:
    assert first.log_prob_error is not None
    assert second.log_prob_error is not None
    one, two = first.distribution.log_prob(y), second.distribution.log_prob(y)
    error = torch.hypot(first.log_prob_error(y), second.log_prob_error(y))
    bound = num_standard_errors(one.numel()) * error
    assert bool(((one - two).abs() <= bound).all())


# ----------------------------------------------------------------------------------
# Scalar outputs: quadrature.


def test_bernoulli_by_quadrature() -> None:
    fit = Fit(lambda f: dist.Bernoulli(logits=3 * f.squeeze(-1)), 1)
    found = fit.predict()
    fit.assert_link("quadrature")
    assert isinstance(found.distribution, dist.Bernoulli)
    loc, covariance = fit.each(lambda f: 3 * f)
    expected = [
        integral(lambda f: 1 / (1 + math.exp(-f)), float(mean), math.sqrt(variance))
        for mean, variance in zip(loc.flatten(), covariance.flatten(), strict=True)
    ]
    expected = torch.tensor(expected, dtype=torch.float64)
    assert_close(found.distribution.probs, expected, **QUADRATURE)


def test_bernoulli_by_probit() -> None:
    fit = Fit(lambda f: dist.Bernoulli(logits=f.squeeze(-1)), 1)
    loc, covariance = fit.each()
    shrunk = loc / (1 + math.pi / 8 * covariance.squeeze(-1)).sqrt()
    d = fit.predict(link="probit").distribution
    assert_close(d.logits, shrunk.squeeze(-1), **EXACT)


@pytest.mark.parametrize("name", ["poisson", "binomial", "geometric", "student"])
def test_other_scalar_outputs_by_quadrature(name: str) -> None:
    count = torch.tensor([3.0, 1.0, 8.0, 5.0], dtype=torch.float64)
    families: dict[str, tuple[Family, Any]] = {
        "poisson": (
            lambda f: dist.Poisson((f[:, 0] / 2).exp()),
            lambda f, n: scipy.stats.poisson(math.exp(f / 2)),
        ),
        "binomial": (
            lambda f: dist.Binomial(count.repeat(3)[: len(f)], logits=f[:, 0]),
            lambda f, n: scipy.stats.binom(int(count[n]), 1 / (1 + math.exp(-f))),
        ),
        "geometric": (
            lambda f: dist.Geometric(logits=f[:, 0]),
            lambda f, n: scipy.stats.geom(1 / (1 + math.exp(-f)), loc=-1),
        ),
        "student": (
            lambda f: dist.StudentT(4.0, f[:, 0], 1.5),
            lambda f, n: scipy.stats.t(4, f, 1.5),
        ),
    }
    family, oracle = families[name]
    fit = Fit(family, 1)
    found = fit.predict()
    fit.assert_link("quadrature")
    loc, covariance = fit.each()
    assert found.log_prob_error is not None
    error = found.log_prob_error(fit.y)
    for n in range(NUM_TEST):

        def density(f: float, n: int = n) -> float:
            frozen = oracle(f, n)
            y = float(fit.y[n])
            return float(frozen.pdf(y) if name == "student" else frozen.pmf(y))

        scale = math.sqrt(covariance[n, 0, 0])
        expected = math.log(integral(density, float(loc[n, 0]), scale))
        gap = abs(float(found.distribution.log_prob(fit.y)[n]) - expected)
        # half of the nodes are off by more than all of them
        assert gap <= 1e-9 + float(error[n])
        assert float(error[n]) < 1e-2


def test_quadrature_of_several_elements_is_by_element() -> None:
    fit = Fit(lambda f: dist.Poisson((f / 2).exp()).to_event(1), 3)
    fit.assert_link("quadrature")
    d = fit.predict().distribution
    assert (d.batch_shape, d.event_shape) == ((NUM_TEST,), (3,))
    loc, covariance = fit.each()
    mean = (loc / 2 + covariance.diagonal(dim1=-2, dim2=-1) / 8).exp()
    assert_close(d.mean, mean, **tolerance(torch.float64, "autograd"))


@pytest.mark.parametrize("num_data", [1, NUM_TEST])
@pytest.mark.parametrize("way", ["event", "plate", "one label"])
def test_probabilities_of_several_labels_are_marginals_and_no_draws(
    way: str, num_data: int, dtype: torch.dtype
) -> None:
    """As the model may be written; also for one label, and one observation."""
    labels = 1 if way == "one label" else 5

    def model(x: Tensor, y: Tensor | None = None) -> None:
        prior = dist.Normal(torch.zeros(labels, 3, dtype=dtype), 1.0)
        logits = x @ pyro.sample("w", prior.to_event(2)).mT
        with pyro.plate("data", len(x), dim=-2 if way == "plate" else -1):
            if way == "plate":
                with pyro.plate("labels", labels, dim=-1):
                    pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)
            else:
                pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=y)

    x, test = torch.randn(9, 3, dtype=dtype), torch.randn(num_data, 3, dtype=dtype)
    y = torch.randint(0, 2, (9, labels)).to(dtype)
    start = init_to_value(values={"w": torch.randn(labels, 3, dtype=dtype)})
    guide = AutoSubnetLaplace(model, init_loc_fn=start)
    posterior = guide.laplace_approximation(x, y)
    outputs = posterior.output_distribution(test)
    expected = [
        integral(lambda f: 1 / (1 + math.exp(-f)), float(loc), math.sqrt(variance))
        for loc, variance in zip(
            outputs.mean.flatten(), outputs.variance.flatten(), strict=True
        )
    ]
    found = posterior.predictive_distribution(test)
    wide = torch.tensor(expected, dtype=dtype).reshape(num_data, labels)
    assert_close(found.mean, wide, **tolerance(dtype, "autograd"))
    again = posterior.predictive_distribution(test).mean
    assert_close(again, found.mean, rtol=0.0, atol=0.0)


# ----------------------------------------------------------------------------------
# Classes.


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("kind", [dist.Categorical, dist.OneHotCategorical])
def test_probit_reads_the_logits_that_the_model_gave(kind: Any, expanded: bool) -> None:
    def family(f: Tensor) -> Any:
        found = kind(logits=f)
        return found.expand((len(f),)) if expanded else found

    fit = Fit(family, 3)
    loc, covariance = fit.each()
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    shrunk = loc / (1 + math.pi / 8 * variance).sqrt()
    found = fit.predict()
    fit.assert_link("probit")
    assert type(found.distribution) is kind
    assert_close(found.distribution.probs, shrunk.softmax(-1), **EXACT)


def test_probabilities_count_as_their_logarithms() -> None:
    fit = Fit(lambda f: dist.Categorical(f.softmax(-1)), 3)
    loc, covariance = fit.each(lambda f: f.log_softmax(-1))
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    shrunk = loc / (1 + math.pi / 8 * variance).sqrt()
    d = fit.predict(link="probit").distribution
    assert_close(d.probs, shrunk.softmax(-1), **tolerance(torch.float64, "autograd"))


def test_classes_of_several_elements() -> None:
    fit = Fit(lambda f: dist.Categorical(logits=f.unflatten(-1, (2, 3))).to_event(1), 6)
    loc, covariance = fit.each()
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    shrunk = loc / (1 + math.pi / 8 * variance).sqrt()
    d = fit.predict().distribution
    assert (d.batch_shape, d.event_shape) == ((NUM_TEST,), (2,))
    expected = shrunk.unflatten(-1, (2, 3)).softmax(-1)
    assert_close(d.base_dist.probs, expected, **EXACT)
    drawn = fit.predict(link="mc").distribution
    assert (drawn.batch_shape, drawn.event_shape) == ((NUM_TEST,), (2,))


def in_pairs(loc: Tensor, covariance: Tensor) -> Tensor:
    """Class by class: 1 / p_k is the sum over l of e^-z_kl, and they sum to one."""
    num_classes = loc.shape[-1]
    inverse = torch.zeros_like(loc)
    for k in range(num_classes):
        for other in range(num_classes):
            contrast = torch.zeros(num_classes, dtype=loc.dtype)
            contrast[k] += 1
            contrast[other] -= 1
            variance = contrast @ covariance @ contrast
            z = (loc @ contrast) / (1 + math.pi / 8 * variance).sqrt()
            inverse[k] += (-z).exp()
    return 1 / inverse / (1 / inverse).sum()


@pytest.mark.parametrize("kind", [dist.Categorical, dist.OneHotCategorical])
@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_classes_by_pairs(kind: Any, num_classes: int) -> None:
    fit = Fit(lambda f: kind(logits=f), num_classes)
    expected = torch.stack([in_pairs(*each) for each in zip(*fit.each(), strict=True)])
    d = fit.predict(link="pairwise").distribution
    assert type(d) is kind
    assert_close(d.probs, expected, **EXACT)


def test_classes_by_pairs_of_several_elements() -> None:
    fit = Fit(lambda f: dist.Categorical(logits=f.unflatten(-1, (2, 3))).to_event(1), 6)
    loc, covariance = fit.each()
    d = fit.predict(link="pairwise").distribution
    assert (d.batch_shape, d.event_shape) == ((NUM_TEST,), (2,))
    for element in range(2):
        own = slice(3 * element, 3 * element + 3)
        for n in range(NUM_TEST):
            expected = in_pairs(loc[n, own], covariance[n, own, own])
            assert_close(d.base_dist.probs[n, element], expected, **EXACT)


def test_two_classes_by_draws_against_quadrature() -> None:
    fit = Fit(lambda f: dist.Categorical(logits=f), 2)
    loc, covariance = fit.each(lambda f: f[:, 1:] - f[:, :1])
    expected = [
        integral(lambda f: 1 / (1 + math.exp(-f)), float(mean), math.sqrt(variance))
        for mean, variance in zip(loc.flatten(), covariance.flatten(), strict=True)
    ]
    found = fit.predict(link="mc", num_samples=20_000)
    ones = torch.ones(NUM_TEST)
    assert found.log_prob_error is not None
    gap = found.distribution.log_prob(ones) - torch.tensor(expected).log()
    bound = num_standard_errors(NUM_TEST) * found.log_prob_error(ones)
    assert bool((gap.abs() <= bound).all())
    assert isinstance(found.distribution, dist.Categorical)


def test_data_that_the_subnet_does_not_move_keep_the_softmax() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        prior = dist.Normal(torch.zeros(3, 2, dtype=torch.float64), 1.0)
        w = pyro.sample("w", prior.to_event(2))
        with pyro.plate("data", len(x)):
            logits = x @ w.mT + torch.tensor([0.3, 0.1, -1.0], dtype=torch.float64)
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    x, y = double(NUM_TRAIN, 2), torch.randint(3, (NUM_TRAIN,))
    posterior = AutoSubnetLaplace(model).laplace_approximation(x, y)
    test = torch.zeros(1, 2, dtype=torch.float64)
    softmax = torch.tensor([[0.3, 0.1, -1.0]], dtype=torch.float64).softmax(-1)
    for link in ("probit", "pairwise", "bridge", "bridge-norm", "mc"):
        d = predict(posterior, test, link=link).distribution
        assert_close(d.probs, softmax, **EXACT)


@pytest.mark.parametrize("link", ["bridge", "bridge-norm"])
def test_a_bridge_needs_variance_of_every_class(link: str) -> None:
    fit = Fit(lambda f: dist.Categorical(logits=f), 3, {"b2": torch.tensor([1])})
    with pytest.raises(OptionError, match=r"variance left .* got 4 of 4 elements"):
        fit.predict(link=link)


# ----------------------------------------------------------------------------------
# Every family, and options.

EVERY: dict[str, tuple[Family, int]] = {
    "normal": (lambda f: dist.Normal(f[:, 0], 0.3), 1),
    "normal-2": (lambda f: dist.Normal(f, 0.3).to_event(1), 2),
    "heteroscedastic": (lambda f: dist.Normal(f[:, 0], f[:, 1].exp()), 2),
    "log-normal": (lambda f: dist.LogNormal(f, 0.3).to_event(1), 2),
    "log-normal-both": (lambda f: dist.LogNormal(f[:, 0], f[:, 1].exp()), 2),
    "multivariate": (
        lambda f: dist.MultivariateNormal(f, torch.eye(2, dtype=torch.float64)),
        2,
    ),
    "categorical": (lambda f: dist.Categorical(logits=f), 3),
    "one-hot": (lambda f: dist.OneHotCategorical(logits=f), 3),
    "multinomial": (lambda f: dist.Multinomial(4, logits=f), 3),
    "bernoulli": (lambda f: dist.Bernoulli(logits=f[:, 0]), 1),
    "bernoulli-3": (lambda f: dist.Bernoulli(logits=f).to_event(1), 3),
    "binomial": (lambda f: dist.Binomial(5, logits=f[:, 0]), 1),
    "poisson": (lambda f: dist.Poisson((f[:, 0] / 2).exp()), 1),
    "poisson-3": (lambda f: dist.Poisson((f / 2).exp()).to_event(1), 3),
    "gamma": (lambda f: dist.Gamma(f[:, 0].exp(), f[:, 1].exp()), 2),
    "beta": (lambda f: dist.Beta(f[:, 0].exp(), f[:, 1].exp()), 2),
    "student": (lambda f: dist.StudentT(5.0, f[:, 0], 0.7), 1),
    "laplace": (lambda f: dist.Laplace(f[:, 0], 0.7), 1),
    "exponential": (lambda f: dist.Exponential(f[:, 0].exp()), 1),
    "negative-binomial": (
        lambda f: dist.NegativeBinomial(
            torch.tensor(3.0, dtype=torch.float64), logits=f[:, 0] - 1
        ),
        1,
    ),
    "dirichlet": (lambda f: dist.Dirichlet(f.exp()), 3),
}


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_every_family_has_a_best_link(name: str, joint: bool) -> None:
    family, num_outputs = EVERY[name]
    fit = Fit(family, num_outputs)
    found = fit.predict(joint=joint, num_samples=50)
    d, y = found.distribution, fit.y
    if joint and found.log_prob_error is None:  # exact, and so in a row
        y = y.flatten()
    assert d.log_prob(y).shape == (() if joint else (NUM_TEST,))
    assert bool(d.log_prob(y).isfinite().all())
    assert d.sample().shape == y.shape
    assert d.sample((3,)).shape == (3, *y.shape)
    if found.log_prob_error is not None:
        assert bool((found.log_prob_error(fit.y) >= 0).all())
    # and by draws, which serve all of them
    drawn = fit.predict(joint=joint, num_samples=50, link="mc").distribution
    assert drawn.sample((3,)).shape == (3, *fit.y.shape)
    assert drawn.log_prob(fit.y).shape == (() if joint else (NUM_TEST,))


@pytest.mark.parametrize(
    "name", ["normal-2", "log-normal-both", "poisson", "bernoulli", "binomial"]
)
def test_draws_agree_with_the_best_link(name: str) -> None:
    family, num_outputs = EVERY[name]
    fit = Fit(family, num_outputs)
    best = fit.predict().distribution.log_prob(fit.y)
    found = fit.predict(link="mc", num_samples=20_000)
    assert found.log_prob_error is not None
    bound = num_standard_errors(NUM_TEST) * found.log_prob_error(fit.y)
    gap = (found.distribution.log_prob(fit.y) - best).abs()
    assert bool((gap <= bound).all())


def test_the_standard_error_is_that_of_repeated_draws() -> None:
    """120 repetitions: their spread is known to 6.5%, 4.6 times that is allowed."""
    fit = Fit(lambda f: dist.Poisson((f[:, 0] / 2).exp()), 1)
    runs = [fit.predict(link="mc", num_samples=200) for _ in range(120)]
    log_probs = torch.stack([run.distribution.log_prob(fit.y) for run in runs])
    errors = torch.stack(
        [run.log_prob_error(fit.y) for run in runs if run.log_prob_error is not None]
    )
    assert_close(errors.square().mean(0).sqrt(), log_probs.std(0), rtol=0.3, atol=0.0)


def test_a_generator_is_honoured() -> None:
    fit = Fit(lambda f: dist.Poisson((f[:, 0] / 2).exp()), 1)

    def log_prob(seed: int, joint: bool) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        found = fit.predict(link="mc", generator=generator, joint=joint)
        return found.distribution.log_prob(fit.y)

    for joint in (False, True):
        state = torch.get_rng_state()
        assert torch.equal(log_prob(1, joint), log_prob(1, joint))
        assert not torch.equal(log_prob(1, joint), log_prob(2, joint))
        assert torch.equal(torch.get_rng_state(), state)


def two_sites(x: Tensor, y: Tensor | None = None, n: Tensor | None = None) -> None:
    f = network(sampled_weights(3), x)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(f[:, :2], 0.4).to_event(1), obs=y)
        pyro.sample("n", dist.Poisson(f[:, 2].exp()), obs=n)


def test_one_of_several_sites() -> None:
    at = {site: double(*shape) for site, shape in shapes(3).items()}
    guide = AutoSubnetLaplace(
        two_sites, scattered(3), init_loc_fn=init_to_value(values=at)
    )
    x = double(NUM_TRAIN, NUM_INPUTS)
    n = torch.ones(NUM_TRAIN, dtype=torch.float64)
    posterior = guide.laplace_approximation(x, double(NUM_TRAIN, 2), n)
    outputs = posterior.output_distribution(x)
    noise = 0.16 * torch.eye(2, dtype=torch.float64)
    d = predict(posterior, x, site="y").distribution
    assert_close(d.loc, outputs.loc[:, :2], **EXACT)
    expected = outputs.covariance_matrix[:, :2, :2] + noise
    assert_close(d.covariance_matrix, expected, **EXACT)
    assert predict(posterior, x, site="n").distribution.log_prob(n).shape == n.shape
    with pytest.raises(ModelError, match=r"got a model that has 2.*with `site=`"):
        predict(posterior, x)
    with pytest.raises(ModelError, match=r"must name an observed site.*got 'z'"):
        predict(posterior, x, site="z")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("normal", {"link": "probit"}, r"'exact', 'mc' for Normal; got 'probit'"),
        ("categorical", {"link": "exact"}, r"'probit', 'pairwise', .* got 'exact'"),
        ("categorical", {"link": "probit", "joint": True}, r"with joint=True; got"),
        ("poisson", {"link": "bridge"}, r"'quadrature', 'mc' for Poisson; got"),
        ("gamma", {"link": "quadrature"}, r"'mc' for Gamma; got 'quadrature'"),
        ("gamma", {"num_samples": 0}, r"`num_samples` must be at least 1; got 0"),
    ],
)
def test_impossible_options(name: str, options: Any, message: str) -> None:
    family, num_outputs = EVERY[name]
    fit = Fit(family, num_outputs)
    with pytest.raises(OptionError, match=message):
        fit.posterior.predictive_distribution(fit.x, **options)


@pytest.mark.parametrize(
    ("name", "noise_factor", "message"),
    [
        ("poisson", 2.0, r"`noise_factor` must be .* has no Gaussian noise; got 2.0"),
        ("normal", torch.ones(7), r"must broadcast to \(4,\).*got shape \(7,\)"),
    ],
)
def test_a_noise_that_does_not_fit(name: str, noise_factor: Any, message: str) -> None:
    family, num_outputs = EVERY[name]
    fit = Fit(family, num_outputs)
    with pytest.raises(OptionError, match=message):
        fit.predict(noise_factor=noise_factor)


def test_overflow_is_an_error() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Poisson((x * w).exp()), obs=y)

    posterior = AutoSubnetLaplace(model).laplace_approximation(
        torch.ones(3), torch.ones(3)
    )
    with pytest.raises(NonFiniteError, match=r"`rate` must be finite .* torch.float32"):
        predict(posterior, torch.full((1,), 100.0))


def test_a_mixture_of_a_family_in_another_class() -> None:
    """Of the multivariate normal family, but no subclass of it."""
    ones = torch.ones(3, dtype=torch.float64)
    fit = Fit(lambda f: dist.LowRankMultivariateNormal(f, ones[:, None], ones), 3)
    best = fit.predict().distribution.log_prob(fit.y)
    found = fit.predict(link="mc", num_samples=20_000)
    assert found.log_prob_error is not None
    bound = num_standard_errors(NUM_TEST) * found.log_prob_error(fit.y)
    assert bool(((found.distribution.log_prob(fit.y) - best).abs() <= bound).all())


def test_a_class_that_cannot_be() -> None:
    def family(f: Tensor) -> Any:
        never = torch.full_like(f[:, :1], -torch.inf)
        return dist.Categorical(logits=torch.cat([f, never], -1))

    fit = Fit(family, 2)
    for link in ("probit", "pairwise", "mc"):
        probs = fit.predict(link=link).distribution.probs
        assert bool((probs[:, 2] == 0).all())
        assert bool((probs[:, :2] > 0).all())
    with pytest.raises(OptionError, match=r"finite logit.* got 4 of 4 elements"):
        fit.predict(link="bridge")


@pytest.mark.parametrize("link", [None, "mc", "bridge", "pairwise"])
def test_float32_stays_float32(link: str | None) -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=x @ w.mT), obs=y)

    x, y = torch.randn(NUM_TRAIN, 2), torch.randint(3, (NUM_TRAIN,))
    posterior = AutoSubnetLaplace(model).laplace_approximation(x, y)
    assert predict(posterior, x, link=link).distribution.probs.dtype == torch.float32


def test_one_observation_without_a_plate() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)

    x = torch.randn(3)
    posterior = AutoSubnetLaplace(model).laplace_approximation(x, torch.tensor(1.0))
    d = predict(posterior, x).distribution
    assert (d.batch_shape, d.event_shape) == ((1,), ())
    assert predict(posterior, x, joint=True).distribution.event_shape == (1,)


def test_noise_factor_is_differentiable() -> None:
    """What tuning it by held-out likelihood needs."""
    fit = Fit(lambda f: dist.Normal(f, 0.3).to_event(1), 2)

    def log_prob(noise_factor: Tensor) -> Tensor:
        return fit.predict(noise_factor=noise_factor).distribution.log_prob(fit.y)

    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_prob, (scale,))


def test_the_model_is_left_alone() -> None:
    fit = Fit(lambda f: dist.Categorical(logits=f), 3)
    before = fit.posterior.factor_and_ggn.clone()
    state, store = torch.get_rng_state(), dict(pyro.get_param_store())
    found = fit.predict(link="probit")
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(pyro.get_param_store()) == store
    assert torch.equal(fit.posterior.factor_and_ggn, before)
    assert not found.distribution.logits.requires_grad
