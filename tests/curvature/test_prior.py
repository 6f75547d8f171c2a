"""The prior's precision over the subnet against dense Hessians.

Every prior is a case without data. Where its density is long to write down, Pyro's own
full Laplace approximation of the same model is the oracle.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoLaplaceApproximation
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.curvature.prior import PriorPrecision, prior_diagonal, prior_precision
from pyro_subnet.exceptions import (
    NoObservedSiteWarning,
    NoOutputVarianceWarning,
    PrecisionError,
)
from tests import reference
from tests.cases import (
    CASES,
    DOUBLE,
    Case,
    Latent,
    Values,
    double,
    draw,
    normal_log_density,
    read_call,
    triangle,
)
from tests.tolerances import tolerance

DOUBLE_TOLERANCE = tolerance(torch.float64, "autograd")
# Bytes: one column of the Hessian at a time, a few, and all at once.
BUDGETS = [1, 500, 2**30]


def normal(like: Tensor) -> Case:
    """A matrix, a scalar and a vector, of other means and scales."""
    scale = draw(1, 3, 2).exp()

    def model() -> None:
        pyro.sample("w", dist.Normal(like.new_ones(3, 2), scale.to(like)).to_event(2))
        pyro.sample("b", dist.Normal(like.new_tensor(-1.0), 0.1))
        with pyro.plate("units", 4):
            pyro.sample("v", dist.Normal(like.new_tensor(0.5), 2.0))

    def log_prior(v: Values) -> Tensor:
        w = normal_log_density(scale, v["w"] - 1)
        b = normal_log_density(0.1, v["b"] + 1)
        return w + b + normal_log_density(2.0, v["v"] - 0.5)

    return prior_case(like, model, log_prior, w=draw(2, 3, 2), b=draw(3), v=draw(4, 4))


def prior_case(
    like: Tensor,
    model: Callable[..., None],
    log_prior: Callable[[Values], Tensor],
    **sites: Tensor | tuple[Callable[[Tensor], Tensor], Tensor],
) -> Case:
    """A case without data; a constrained site comes as (map, unconstrained value)."""
    latents = tuple(
        Latent(name, site)
        if isinstance(site, Tensor)
        else Latent(name, site[1], site[0])
        for name, site in sites.items()
    )
    return Case(like=like, model=model, args=(), latents=latents, log_prior=log_prior)


def student_t(like: Tensor) -> Case:
    """Curvature that depends on the value, and is negative in the tails."""

    def model() -> None:
        prior = dist.StudentT(like.new_tensor(4.0), like.new_zeros(3, 2), 0.5)
        pyro.sample("w", prior.to_event(2))

    def log_prior(v: Values) -> Tensor:
        return -2.5 * (1 + (v["w"] / 0.5) ** 2 / 4).log().sum()

    return prior_case(like, model, log_prior, w=draw(2, 3, 2))


def laplace(like: Tensor) -> Case:
    """No curvature at all."""

    def model() -> None:
        pyro.sample("w", dist.Laplace(like.new_zeros(3, 2), 0.5).to_event(2))

    return prior_case(like, model, lambda v: -2 * v["w"].abs().sum(), w=draw(2, 3, 2))


def uniform(like: Tensor) -> Case:
    """The change of volume alone."""

    def model() -> None:
        pyro.sample("w", dist.Uniform(-like.new_ones(3), 2.0).to_event(1))

    return prior_case(
        like,
        model,
        lambda v: 0 * v["w"].sum(),
        w=(lambda u: 3 * torch.sigmoid(u) - 1, draw(2, 3)),
    )


def positive(like: Tensor) -> Case:
    """Sites above zero: scalars, a vector, and a plate."""

    def model() -> None:
        pyro.sample("gamma", dist.Gamma(like.new_tensor([2.0, 3.0]), 1.5).to_event(1))
        pyro.sample("log_normal", dist.LogNormal(like.new_tensor(0.3), 0.5))
        with pyro.plate("units", 3):
            pyro.sample("half", dist.HalfNormal(like.new_tensor(2.0)))

    def log_prior(v: Values) -> Tensor:
        powers, u = double([1.0, 2.0]), v["log_normal"].log()
        gamma = (powers * v["gamma"].log() - 1.5 * v["gamma"]).sum()
        half = normal_log_density(2.0, v["half"])
        return gamma - 2 * (u - 0.3) ** 2 - u + half

    return prior_case(
        like,
        model,
        log_prior,
        gamma=(torch.exp, draw(2, 2)),
        log_normal=(torch.exp, draw(3)),
        half=(torch.exp, draw(4, 3)),
    )


def simplex(like: Tensor) -> Case:
    """A transform that couples the elements of a site."""

    def model() -> None:
        pyro.sample("parts", dist.Dirichlet(like.new_tensor([2.0, 0.5, 3.0, 4.0])))
        pyro.sample("b", dist.Beta(like.new_tensor(2.0), 3.0))

    def log_prior(v: Values) -> Tensor:
        dirichlet = double([1.0, -0.5, 2.0, 3.0]) @ v["parts"].log()
        return dirichlet + v["b"].log() + 2 * (1 - v["b"]).log()

    return prior_case(
        like,
        model,
        log_prior,
        parts=(reference.stick_breaking, draw(2, 3)),
        b=(torch.sigmoid, draw(3)),
    )


def hierarchical(like: Tensor) -> Case:
    """Scales of the weights, one for all and one for each unit."""

    def model() -> None:
        tau = pyro.sample("tau", dist.Gamma(like.new_tensor(3.0), 2.0))
        pyro.sample("w", dist.Normal(like.new_zeros(3, 2), tau).to_event(2))
        with pyro.plate("units", 2):
            own = pyro.sample("own", dist.LogNormal(like.new_tensor(0.0), tau))
            prior = dist.Normal(like.new_zeros(2, 3), own.unsqueeze(-1))
            pyro.sample("v", prior.to_event(1))
        pyro.sample("b", dist.Normal(like.new_zeros(2), 1.0).to_event(1))

    def log_prior(v: Values) -> Tensor:
        tau, own = v["tau"], v["own"]
        gamma = 2 * tau.log() - 2 * tau
        owns = normal_log_density(tau, own.log()) - own.log().sum()
        units = normal_log_density(own.unsqueeze(-1).expand(2, 3), v["v"])
        return (
            gamma + normal_log_density(tau, v["w"]) + owns + units - v["b"] @ v["b"] / 2
        )

    return prior_case(
        like,
        model,
        log_prior,
        tau=(torch.exp, draw(2)),
        w=draw(3, 3, 2),
        own=(torch.exp, draw(4, 2)),
        v=draw(5, 2, 3),
        b=draw(6, 2),
    )


def horseshoe(like: Tensor) -> Case:
    """A global and a local scale for each weight."""

    def model() -> None:
        tau = pyro.sample("tau", dist.HalfCauchy(like.new_tensor(0.5)))
        scales = dist.HalfCauchy(like.new_ones(3, 2)).to_event(2)
        local = pyro.sample("local", scales)
        pyro.sample("w", dist.Normal(0.0, tau * local).to_event(2))

    def log_prior(v: Values) -> Tensor:
        cauchy = -(1 + (v["tau"] / 0.5) ** 2).log() - (1 + v["local"] ** 2).log().sum()
        return cauchy + normal_log_density(v["tau"] * v["local"], v["w"])

    return prior_case(
        like,
        model,
        log_prior,
        tau=(torch.exp, draw(2)),
        local=(torch.exp, draw(3, 3, 2)),
        w=draw(4, 3, 2),
    )


def means_and_scales(like: Tensor) -> Case:
    """A chain in which means and scales are products of latent sites."""

    def model() -> None:
        a = pyro.sample("a", dist.Normal(like.new_tensor(0.0), 1.0))
        b = pyro.sample("b", dist.Normal(a.expand(2), 2.0).to_event(1))
        pyro.sample("c", dist.Normal(a * b, b.exp()).to_event(1))

    def log_prior(v: Values) -> Tensor:
        first = normal_log_density(1.0, v["a"]) + normal_log_density(
            2.0, v["b"] - v["a"]
        )
        return first + normal_log_density(v["b"].exp(), v["c"] - v["a"] * v["b"])

    return prior_case(like, model, log_prior, a=draw(2), b=draw(3, 2), c=draw(4, 2))


def correlated(like: Tensor) -> Case:
    """Multivariate normals: over all weights of a site, and over each row of one."""
    whole, row = triangle(5, 6), triangle(6, 2)

    def model() -> None:
        factor = whole.to(like)
        pyro.sample("w", dist.MultivariateNormal(like.new_ones(6), scale_tril=factor))
        rows = dist.MultivariateNormal(like.new_zeros(3, 2), scale_tril=row.to(like))
        pyro.sample("v", rows.to_event(1))
        pyro.sample("b", dist.Normal(like.new_zeros(2), 1.0).to_event(1))

    def log_prior(v: Values) -> Tensor:
        w = torch.linalg.inv(whole) @ (v["w"] - 1)
        rows = torch.linalg.inv(row) @ v["v"].T
        return normal_log_density(1.0, w, rows, v["b"])

    return prior_case(
        like, model, log_prior, w=draw(2, 6), v=draw(3, 3, 2), b=draw(4, 2)
    )


def scaled(like: Tensor) -> Case:
    """``poutine.scale`` multiplies densities, not the change of volume; masks drop."""
    kept = torch.tensor([True, False, True])

    @poutine.scale(scale=0.3)
    def model() -> None:
        pyro.sample("w", dist.Normal(like.new_zeros(3, 2), 0.5).to_event(2))
        pyro.sample("g", dist.Gamma(like.new_tensor([2.0, 3.0]), 1.5).to_event(1))
        pyro.sample("b", dist.Beta(like.new_tensor(2.0), 3.0))
        masked = dist.StudentT(like.new_tensor(4.0), like.new_zeros(3), 1.0)
        with pyro.plate("units", 3), poutine.scale(scale=2.0):
            pyro.sample("v", masked.mask(kept.to(like.device)))

    def log_prior(v: Values) -> Tensor:
        gamma = (double([1.0, 2.0]) * v["g"].log() - 1.5 * v["g"]).sum()
        beta = v["b"].log() + 2 * (1 - v["b"]).log()
        t = -2.5 * (1 + v["v"] ** 2 / 4).log()[kept].sum()
        return 0.3 * (normal_log_density(0.5, v["w"]) + gamma + beta + 2 * t)

    return prior_case(
        like,
        model,
        log_prior,
        w=draw(2, 3, 2),
        g=(torch.exp, draw(3, 2)),
        b=(torch.sigmoid, draw(5)),
        v=draw(4, 3),
    )


def factors(like: Tensor) -> Case:
    """``pyro.factor`` may couple anything: dense columns where it does."""

    def model() -> None:
        w = pyro.sample("w", dist.Normal(like.new_zeros(3, 2), 1.0).to_event(2))
        v = pyro.sample("v", dist.Normal(like.new_zeros(2), 1.0).to_event(1))
        pyro.sample("b", dist.Normal(like.new_zeros(2), 1.0).to_event(1))
        pyro.factor("penalty", -((w @ v) ** 4).sum())
        # Without a plate: in one that holds no latent site it would be data.
        with poutine.scale(scale=0.5):
            pyro.factor("smooth", -((w[:2, 0] - w[1:, 0]) ** 2))

    def log_prior(v: Values) -> Tensor:
        w = v["w"]
        smooth = ((w[:2, 0] - w[1:, 0]) ** 2).sum()
        penalty = ((w @ v["v"]) ** 4).sum()
        return normal_log_density(1.0, *v.values()) - penalty - 0.5 * smooth

    return prior_case(
        like, model, log_prior, w=draw(2, 3, 2), v=draw(3, 2), b=draw(4, 2)
    )


PRIORS = {
    build.__name__: build
    for build in (
        normal,
        student_t,
        laplace,
        uniform,
        positive,
        simplex,
        hierarchical,
        horseshoe,
        means_and_scales,
        correlated,
        scaled,
        factors,
    )
}
each_prior = pytest.mark.parametrize("name", PRIORS)


def found_precision(case: Case, subnet: list[int], budget: int) -> PriorPrecision:
    """What the package finds from one run of the model."""
    call, chosen = read_call(case, subnet)
    graph = call.graph()
    return prior_precision(graph.prior_terms, graph.leaves, chosen, budget)


def as_matrix(found: PriorPrecision, scale: float = 1.0) -> Tensor:
    """P0 as a dense matrix."""
    size = len(found.diagonal)
    lower = found.diagonal.new_zeros(size, size)
    found.add_to_lower_(lower, scale)
    return lower + lower.tril(-1).mT


@pytest.mark.parametrize("budget", BUDGETS)
@each_prior
def test_every_weight(name: str, budget: int) -> None:
    case = PRIORS[name](DOUBLE)
    found = found_precision(case, list(range(case.num_params)), budget)
    assert_close(as_matrix(found), case.prior(), **DOUBLE_TOLERANCE)
    assert_close(found.diagonal, case.prior().diagonal(), **DOUBLE_TOLERANCE)


@each_prior
def test_a_scattered_subnet(name: str) -> None:
    case = PRIORS[name](DOUBLE)
    for seed in range(3):
        subnet = case.scattered(seed)
        found = found_precision(case, subnet, BUDGETS[seed])
        expected = case.prior()[sorted(subnet)][:, sorted(subnet)]
        assert_close(as_matrix(found), expected, **DOUBLE_TOLERANCE)


@each_prior
def test_each_weight_alone(name: str) -> None:
    case = PRIORS[name](DOUBLE)
    diagonal = case.prior().diagonal()
    for position in range(case.num_params):
        found = found_precision(case, [position], BUDGETS[-1])
        expected = diagonal[position].reshape(1, 1)
        assert_close(as_matrix(found), expected, **DOUBLE_TOLERANCE)


@pytest.mark.parametrize("budget", BUDGETS)
@each_prior
def test_the_diagonal(name: str, budget: int) -> None:
    case = PRIORS[name](DOUBLE)
    call, _ = read_call(case, [0])
    graph = call.graph()
    found = prior_diagonal(graph.prior_terms, graph.leaves, budget)
    assert_close(found, case.prior().diagonal(), **DOUBLE_TOLERANCE)


@each_prior
def test_dtype_and_device_are_kept(
    name: str, dtype: torch.dtype, device: torch.device
) -> None:
    case = PRIORS[name](torch.empty((), dtype=dtype, device=device))
    subnet = case.scattered()
    matrix = as_matrix(found_precision(case, subnet, BUDGETS[-1]))
    assert matrix.dtype == dtype
    assert matrix.device.type == device.type
    expected = case.prior()[sorted(subnet)][:, sorted(subnet)]
    assert_close(matrix.double().cpu(), expected, **tolerance(dtype, "autograd"))


@pytest.mark.parametrize(
    ("name", "coupled"),
    [("normal", 0), ("positive", 0), ("scaled", 0), ("laplace", 0), ("factors", 8)],
)
def test_columns_are_stored_for_coupled_elements_alone(name: str, coupled: int) -> None:
    case = PRIORS[name](DOUBLE)
    found = found_precision(case, list(range(case.num_params)), BUDGETS[-1])
    assert found.columns.shape == (case.num_params, coupled)


def test_a_flat_prior_has_no_precision() -> None:
    case = laplace(DOUBLE)
    found = found_precision(case, list(range(case.num_params)), BUDGETS[-1])
    zero = torch.zeros(case.num_params).double()
    assert_close(found.diagonal, zero, rtol=0.0, atol=0.0)


@each_prior
def test_it_is_added_with_a_factor(name: str) -> None:
    case = PRIORS[name](DOUBLE)
    subnet = case.scattered()
    found, before = found_precision(case, subnet, 1), draw(8, len(subnet), len(subnet))
    matrix = before.clone()
    found.add_to_lower_(matrix, 2.5)
    added = 2.5 * case.prior()[sorted(subnet)][:, sorted(subnet)]
    assert_close(matrix, before + added.tril(), **DOUBLE_TOLERANCE)
    assert_close(matrix.triu(1), before.triu(1), rtol=0.0, atol=0.0)


# Whole guides of models without data, where the posterior is the prior's curvature.


def fitted_precision(
    model: Callable[..., None], values: dict[str, Tensor], subnet: Any = None
) -> Tensor:
    """The posterior precision of a model that observes nothing."""
    guide = AutoSubnetLaplace(model, subnet, init_loc_fn=init_to_value(values=values))
    with pytest.warns(NoObservedSiteWarning, match="no observed site"):
        posterior = guide.laplace_approximation()
    return posterior.get_posterior().precision_matrix


def pyros_precision(model: Callable[..., None], values: dict[str, Tensor]) -> Tensor:
    """That of Pyro's full Laplace approximation, which holds the covariance."""
    guide = AutoLaplaceApproximation(model, init_loc_fn=init_to_value(values=values))
    guide()
    covariance = guide.laplace_approximation().get_posterior().covariance_matrix
    return torch.linalg.inv(covariance.detach())


@pytest.mark.parametrize("name", ["normal", "simplex", "positive", "correlated"])
def test_without_data_the_posterior_is_that_of_pyro(name: str) -> None:
    case = PRIORS[name](DOUBLE)
    values = dict(case.values(case.packed))
    found = fitted_precision(case.model, values)
    assert_close(found, pyros_precision(case.model, values), **DOUBLE_TOLERANCE)
    assert_close(found, case.prior(), **DOUBLE_TOLERANCE)


def unusual() -> None:
    """Densities and transforms that are long to write down."""
    zeros, ones = torch.zeros(3).double(), torch.ones(3).double()
    pyro.sample("corr", dist.LKJCholesky(3, double(2.0)))
    pyro.sample("gumbel", dist.Gumbel(zeros, 1.0).to_event(1))
    pyro.sample("logistic", dist.Logistic(zeros, ones).to_event(1))
    factor = triangle(5, 3)
    pyro.sample("t", dist.MultivariateStudentT(double(3.0), zeros, factor))
    locs = double([[-1.0, 0.0], [1.0, 0.5]])
    mixture = dist.MixtureOfDiagNormals(locs, torch.ones_like(locs), ones[:2])
    pyro.sample("mixture", mixture)
    pyro.sample("weibull", dist.Weibull(double(1.0), 2.0))
    pyro.sample("beta", dist.AffineBeta(double(2.0), double(3.0), -1.0, 2.0))
    flow = dist.TransformedDistribution(
        dist.Normal(zeros, 1.0).to_event(1),
        [dist.transforms.LowerCholeskyAffine(zeros, factor)],
    )
    pyro.sample("flow", flow)
    affine = dist.TransformedDistribution(
        dist.Normal(zeros, 1.0), [dist.transforms.AffineTransform(1.0, 2.0)]
    )
    pyro.sample("affine", affine.to_event(1))


def unusual_values() -> dict[str, Tensor]:
    """A point at which the prior of :func:`unusual` is curved downwards."""
    factor = torch.linalg.cholesky(
        double([[1, 0.2, 0.1], [0.2, 1, -0.3], [0.1, -0.3, 1]])
    )
    return {
        "corr": factor,
        "gumbel": double([0.1, -0.2, 0.3]),
        "logistic": double([0.1, -0.2, 0.3]),
        "t": double([0.3, 0.1, -0.4]),
        "mixture": double([1.1, -0.9]),
        "weibull": double(0.8),
        "beta": double(-0.2),
        "flow": double([0.1, -0.2, 0.3]),
        "affine": double([0.1, -0.2, 0.3]),
    }


def test_unusual_priors() -> None:
    values = unusual_values()
    found = fitted_precision(unusual, values)
    assert_close(found, pyros_precision(unusual, values), **DOUBLE_TOLERANCE)


def test_a_part_of_unusual_priors() -> None:
    values = unusual_values()
    subnet = {
        "corr": torch.tensor([0, 2]),
        "t": torch.tensor([1]),
        "beta": torch.tensor([0]),
    }
    found = fitted_precision(unusual, values, subnet)
    # In trace order: corr at 0 to 2, then gumbel and logistic, t at 9, and so on.
    order = [0, 2, 10, 15]
    expected = pyros_precision(unusual, values)[order][:, order]
    assert_close(found, expected, **DOUBLE_TOLERANCE)


def test_a_prior_that_is_curved_upwards() -> None:
    case = student_t(DOUBLE)
    values = {"w": torch.full((3, 2), 5.0).double()}
    # Of -log p: (df + 1) (df σ² - w²) / (df σ² + w²)².
    curvature = 5.0 * (4 * 0.25 - 25.0) / (4 * 0.25 + 25.0) ** 2
    guide = AutoSubnetLaplace(
        case.model, {"w": torch.tensor([1])}, init_loc_fn=init_to_value(values=values)
    )
    message = f"S=1 must be positive definite; got smallest eigenvalue {curvature:.3e}"
    with (
        pytest.warns(NoObservedSiteWarning, match="no observed site"),
        pytest.raises(PrecisionError, match=re.escape(message)),
    ):
        guide.laplace_approximation()


def test_a_scale_that_the_data_do_not_see() -> None:
    case = CASES["heteroscedastic"](DOUBLE)
    guide = case.guide({"tau": torch.tensor([0])})
    with pytest.warns(NoOutputVarianceWarning, match="moves no output"):
        posterior = guide.laplace_approximation(*case.args)
    precision = posterior.get_posterior().precision_matrix
    assert_close(precision, case.prior()[:1, :1], **DOUBLE_TOLERANCE)
