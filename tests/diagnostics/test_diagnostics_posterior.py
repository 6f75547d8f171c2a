"""Numbers about a posterior: against dense matrices by autograd, in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import jaxtyping
import psutil
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.diagnostics import (
    Stationarity,
    condition_number,
    effective_dimension,
    effective_dimension_by_site,
    kept_variance,
    stationarity,
    stationarity_from,
)
from pyro_subnet.exceptions import (
    DataError,
    MemoryLimitError,
    NonFiniteError,
    OptionError,
)
from tests.cases import (
    CASES,
    DOUBLE,
    NUM_DATA,
    Case,
    classification_mlp,
    correlated_prior,
    double,
    draw,
    masked_bernoulli,
    mlp_outputs,
    regression_mlp,
    several_outputs,
)
from tests.reference import dense_jacobian
from tests.tolerances import tolerance

AUTOGRAD = tolerance(torch.float64, "autograd")
SCALE = 2.5


def fitted(
    case: Case, chosen: list[int], **options: Any
) -> AutoSubnetMultivariateNormal:
    guide = case.guide(chosen, **options)
    return guide.laplace_approximation(*case.args, **case.kwargs)


def part(matrix: Tensor, chosen: list[int]) -> Tensor:
    at = torch.tensor(sorted(chosen))
    return matrix[at][:, at]


def subnets(case: Case) -> list[list[int]]:
    """S = 1, a third in no order, and S = D."""
    return [[case.num_params - 1], case.scattered(), list(range(case.num_params))]


@pytest.mark.parametrize("case_of", [regression_mlp, classification_mlp])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_effective_dimension(case_of: Any, which: int) -> None:
    case = case_of(DOUBLE)
    chosen = subnets(case)[which]
    posterior = fitted(case, chosen)
    ggn, prior = part(case.ggn(), chosen), part(case.prior(), chosen)
    # The prior is standard normal: its precision is the identity.
    assert_close(prior, torch.eye(len(chosen)).double(), **AUTOGRAD)
    for scale in (1.0, SCALE):
        scaled = posterior.with_prior_precision(scale)
        e = torch.linalg.eigvalsh(ggn)
        expected = float((e / (e + scale)).sum())
        assert effective_dimension(scaled) == pytest.approx(expected, rel=1e-8)
    by_site = effective_dimension_by_site(posterior)
    shares = (torch.linalg.solve(ggn + prior, ggn)).diagonal()
    counts = {site: count for site, count in posterior.subnet.counts.items() if count}
    assert list(by_site) == list(counts)
    expected = [float(own.sum()) for own in shares.split(list(counts.values()))]
    assert list(by_site.values()) == pytest.approx(expected, rel=1e-8)


def test_effective_dimension_under_priors_by_site_and_scaled_noise() -> None:
    case = regression_mlp(DOUBLE)
    chosen = case.scattered()
    posterior = fitted(case, chosen).with_prior_precision({"fc2.weight": SCALE})
    posterior = posterior.with_noise_scale(0.5)
    names = torch.tensor(
        [SCALE if n.startswith("fc2.weight") else 1.0 for n in posterior.subnet.names]
    ).double()
    ggn = part(case.ggn(), chosen) * 4
    expected = torch.linalg.solve(ggn + names.diag(), ggn).trace()
    assert effective_dimension(posterior) == pytest.approx(float(expected), rel=1e-8)


def test_effective_dimension_under_a_prior_that_couples() -> None:
    case = correlated_prior(DOUBLE)
    chosen = case.scattered()
    posterior = fitted(case, chosen)
    ggn, prior = part(case.ggn(), chosen), part(case.prior(), chosen)
    expected = torch.linalg.solve(ggn + prior, ggn).trace()
    assert effective_dimension(posterior) == pytest.approx(float(expected), rel=1e-8)


@pytest.mark.parametrize(
    "options",
    [
        {"form": "primal"},
        {"form": "dual"},
        {"covariance": "diag"},
        {"covariance": "kron"},
    ],
)
def test_every_form(options: dict[str, Any]) -> None:
    case = regression_mlp(DOUBLE)
    guide = case.guide(None, **options)
    posterior = guide.laplace_approximation(*case.args)
    p = case.ggn() + case.prior()
    if options.get("covariance") == "diag":
        p = p.diagonal().diag()
    elif "covariance" in options:
        p = posterior.gaussian.precision_matrix()
    expected = torch.linalg.cond(p)
    assert condition_number(posterior) == pytest.approx(float(expected), rel=1e-8)
    shares = torch.linalg.solve(p, p - case.prior()).diagonal()
    assert effective_dimension(posterior) == pytest.approx(float(shares.sum()))
    gradient = autograd_gradient(case)
    check(stationarity(posterior, *case.args), gradient, p, posterior.subnet.names)


def test_condition_number_of_one_weight() -> None:
    assert condition_number(fitted(regression_mlp(DOUBLE), [3])) == pytest.approx(1.0)


def test_condition_number_needs_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = fitted(regression_mlp(DOUBLE), [0, 3])
    free = SimpleNamespace(available=10)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    with pytest.raises(MemoryLimitError, match="got S=2"):
        condition_number(posterior)
    with pytest.raises(MemoryLimitError, match="got S=21"):
        kept_variance(posterior, *regression_mlp(DOUBLE).args)


def log_joint(case: Case, packed: Tensor) -> Tensor:
    """By Pyro's own log density of the model, where sites are unconstrained."""
    values = {site: value.to(case.like) for site, value in case.values(packed).items()}
    model = pyro.poutine.condition(case.model, data=values)
    trace = pyro.poutine.trace(model).get_trace(*case.args, **case.kwargs)
    return trace.log_prob_sum()


def autograd_gradient(case: Case) -> Tensor:
    packed = case.packed.requires_grad_()
    (gradient,) = torch.autograd.grad(log_joint(case, packed), packed)
    return gradient


def check(found: Stationarity, gradient: Tensor, p: Tensor, names: list[str]) -> None:
    assert_close(found.gradient, gradient, **AUTOGRAD)
    decrement = float(gradient @ torch.linalg.solve(p, gradient)) ** 0.5
    assert found.newton_decrement == pytest.approx(decrement, rel=1e-7)
    steps = gradient.abs() / p.diagonal().sqrt()
    assert found.largest_step == pytest.approx(float(steps.max()), rel=1e-7)
    assert found.worst == names[int(steps.argmax())]
    assert found.largest_step <= found.newton_decrement * (1 + 1e-9)


@pytest.mark.parametrize(
    "case_of", [regression_mlp, several_outputs, classification_mlp, correlated_prior]
)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_the_gradient_that_is_left(case_of: Any, which: int) -> None:
    case = case_of(DOUBLE)
    chosen = subnets(case)[which]
    posterior = fitted(case, chosen)
    gradient = autograd_gradient(case)
    p = part(case.ggn() + case.prior(), chosen)
    found = stationarity(posterior, *case.args, **case.kwargs)
    check(found, gradient[torch.tensor(sorted(chosen))], p, posterior.subnet.names)


@pytest.mark.parametrize("batch_size", [1, 4, NUM_DATA])
def test_minibatches_give_the_same_gradient(batch_size: int) -> None:
    case = regression_mlp(DOUBLE)
    posterior = fitted(case, case.scattered())
    x, y = case.args
    starts = range(0, NUM_DATA, batch_size)
    batches = [(x[i : i + batch_size], y[i : i + batch_size]) for i in starts]
    whole = stationarity(posterior, x, y)
    found = stationarity_from(posterior, batches)
    assert_close(found.gradient, whole.gradient, **AUTOGRAD)
    # Half of the data, for all of them.
    part_of = stationarity_from(posterior, [(x[:4], y[:4])], num_data=8)
    prior = -posterior.loc[posterior.subnet_positions]
    half = stationarity(posterior, x[:4], y[:4]).gradient - prior
    assert_close(part_of.gradient, 2 * half + prior, **AUTOGRAD)


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_kind_of_model(name: str) -> None:
    """Against finite differences of the model's own density, unconstrained."""
    case = CASES[name](DOUBLE)
    if not case.observed:
        pytest.skip("observes nothing")
    chosen = case.scattered()
    posterior = fitted(case, chosen)
    found = stationarity(posterior, *case.args, **case.kwargs)
    guide = case.guide(chosen)
    guide(*case.args, **case.kwargs)
    latents = guide.latents

    @torch.no_grad()
    def density(packed: Tensor) -> float:
        unconstrained = latents.layout.unpack(packed)
        values = latents.constrain(unconstrained)
        model = pyro.poutine.condition(case.model, data=values)
        trace = pyro.poutine.trace(model).get_trace(*case.args, **case.kwargs)
        likelihood = sum(
            float(node["log_prob_sum"])
            for site, node in with_densities(trace).items()
            if site not in values
        )
        return likelihood + float(case.log_prior_at(packed))

    loc, steps = latents.loc.detach(), 1e-5
    for k, i in enumerate(sorted(chosen)):
        shift = torch.zeros_like(loc)
        shift[i] = steps
        slope = (density(loc + shift) - density(loc - shift)) / (2 * steps)
        assert float(found.gradient[k]) == pytest.approx(slope, rel=1e-5, abs=1e-5)


def with_densities(trace: Any) -> dict[str, Any]:
    trace.compute_log_prob()
    return {
        site: node
        for site, node in trace.nodes.items()
        if node["type"] == "sample" and not pyro.poutine.util.site_is_subsample(node)
    }


def test_masked_data_may_be_nan() -> None:
    case = masked_bernoulli(DOUBLE)
    posterior = fitted(case, case.scattered())
    assert bool(
        stationarity(posterior, *case.args, **case.kwargs).gradient.isfinite().all()
    )


def test_the_gradient_under_another_prior_and_noise() -> None:
    case = regression_mlp(DOUBLE)
    chosen = case.scattered()
    posterior = fitted(case, chosen).with_prior_precision(SCALE).with_noise_scale(2.0)
    x, y = case.args

    def density(packed: Tensor) -> Tensor:
        mean = mlp_outputs(x, case.values(packed)).squeeze(-1)
        return -0.5 * ((y - mean) / 0.6).square().sum() - 0.5 * SCALE * (
            packed @ packed
        )

    gradient = torch.func.jacrev(density)(case.packed)[torch.tensor(sorted(chosen))]
    p = part(case.ggn() / 4 + SCALE * case.prior(), chosen)
    check(stationarity(posterior, x, y), gradient, p, posterior.subnet.names)


def test_a_newton_step_away_from_the_maximum() -> None:
    """A linear-Gaussian model, where one step reaches it and gains what it says."""
    x, y = draw(1, 20, 3), draw(2, 20)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3).to(x), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    def at(w: Tensor) -> AutoSubnetMultivariateNormal:
        pyro.clear_param_store()
        init = pyro.infer.autoguide.initialization.init_to_value(values={"w": w})
        return AutoSubnetLaplace(model, init_loc_fn=init).laplace_approximation(x, y)

    p = 4 * x.T @ x + torch.eye(3).double()
    best = torch.linalg.solve(p, 4 * x.T @ y)
    good = stationarity(at(best), x, y)
    assert good.newton_decrement < 1e-10
    assert "stationary for all that predictions see" in str(good)
    offset = double([0.1, -0.2, 0.3])
    found = stationarity(at(best + offset), x, y)
    assert found.expected_gain == pytest.approx(float(0.5 * offset @ p @ offset))
    assert "is not stationary; train on" in str(found)
    assert "w[" in str(found)
    slight = stationarity(at(best + 0.05 * offset), x, y)
    assert "less than the posterior's own uncertainty" in str(slight)
    # No linearized output moves by more than λ of its standard deviations.
    posterior = at(best + offset)
    outputs = posterior.output_distribution(x)
    moved = (x @ offset).abs() / outputs.stddev.squeeze(-1)
    assert float(moved.max()) <= found.newton_decrement


def test_a_gradient_that_is_not_finite() -> None:
    x, y = draw(1, 4, 3), draw(2, 4)

    def model(x: Tensor, y: Tensor | None = None, broken: bool = False) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3).to(x), 1.0).to_event(1))
        # Zero, with a derivative that is none.
        kink = (0.0 * w.sum()).abs().sqrt() if broken else 0.0
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w + kink, 0.5), obs=y)

    posterior = AutoSubnetLaplace(model).laplace_approximation(x, y)
    with pytest.raises(NonFiniteError, match="NaN or inf at 3 of 3 weights"):
        stationarity(posterior, x, y, broken=True)
    broken_data = y.index_fill(0, torch.tensor([1]), math.inf)
    with pytest.raises(DataError, match=r"got inf at index \(1,\) of site 'y'"):
        stationarity(posterior, x, broken_data)


@pytest.mark.parametrize("case_of", [regression_mlp, several_outputs])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_the_share_of_variance_kept(case_of: Any, which: int) -> None:
    case = case_of(DOUBLE)
    width = case.args[0].shape[1]
    chosen = subnets(case)[which]
    posterior = fitted(case, chosen)
    shifted = draw(21, 5, width) + 2
    noise = 0.5 if case_of is regression_mlp else 1.0
    scaled = posterior.with_prior_precision(SCALE).with_noise_scale(noise)
    for ours, s, r in ((posterior, 1.0, 1.0), (scaled, SCALE, noise)):
        p = case.ggn() / r**2 + s * case.prior()
        for x, inputs in ((case.args[0], None), (shifted, [shifted[:2], shifted[2:]])):
            jac = dense_jacobian(
                lambda u, x=x: mlp_outputs(x, case.values(u)), case.packed
            ).flatten(0, 1)
            own = jac[:, torch.tensor(sorted(chosen))]
            kept = (own @ part(p, chosen).inverse() @ own.T).trace()
            expected = float(kept / (jac @ p.inverse() @ jac.T).trace())
            found = kept_variance(ours, *case.args, inputs=inputs)
            assert found == pytest.approx(expected, rel=1e-8)
            # The numerator is the posterior's own variance.
            variance = ours.output_distribution(x).variance.sum()
            assert float(variance) == pytest.approx(float(kept), rel=1e-7)


def test_kept_variance_of_priors_by_site() -> None:
    case = regression_mlp(DOUBLE)
    chosen = case.scattered()
    posterior = fitted(case, chosen).with_prior_precision({"fc1.bias": SCALE})
    scales = torch.ones(case.num_params).double()
    scales[12:16] = SCALE
    p = case.ggn() + scales.diag()
    jac = case.jacobian(0)
    own = jac[:, torch.tensor(sorted(chosen))]
    kept = (own @ part(p, chosen).inverse() @ own.T).trace()
    expected = float(kept / (jac @ p.inverse() @ jac.T).trace())
    assert kept_variance(posterior, *case.args) == pytest.approx(expected, rel=1e-8)


def test_the_fisher_weighting_of_kept_variance() -> None:
    case = regression_mlp(DOUBLE)
    posterior = fitted(case, [0, 5])
    fisher = kept_variance(posterior, *case.args, weighting="fisher")
    # One noise for all: the weighting is a constant.
    assert fisher == pytest.approx(kept_variance(posterior, *case.args), rel=1e-9)


def test_an_unknown_weighting() -> None:
    case = regression_mlp(DOUBLE)
    posterior, some = fitted(case, [0, 5]), cast(Any, "some")
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(OptionError, match=r"`weighting` must be .* got 'some'"):
            kept_variance(posterior, *case.args, weighting=some)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_nothing_is_left_behind() -> None:
    case = classification_mlp(DOUBLE)
    posterior = fitted(case, case.scattered())
    before = set(pyro.get_param_store().keys())
    state = torch.get_rng_state()
    stationarity(posterior, *case.args)
    effective_dimension(posterior)
    condition_number(posterior)
    kept_variance(posterior, *case.args)
    assert_close(torch.get_rng_state(), state)
    assert set(pyro.get_param_store().keys()) == before
