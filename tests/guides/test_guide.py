"""The MAP guide and the posterior guide, as Pyro and its users handle them."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    Predictive,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuideList,
    AutoLaplaceApproximation,
    AutoNormal,
)
from pyro.infer.autoguide.initialization import init_to_mean, init_to_value
from pyro.infer.predictive import WeighedPredictive
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.distributions import biject_to, constraints
from torch.nn import functional as F
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.exceptions import (
    ChoiceWarning,
    DataCountWarning,
    ModelError,
    NoObservedSiteWarning,
    OptionError,
    PrecisionError,
)
from pyro_subnet.selection import LargestMagnitude, RandomSubnet
from tests.tolerances import FALSE_ALARM_RATE, tolerance

Model = Callable[..., Any]

CLOSED = tolerance(torch.float64, "closed_form")
SUM = tolerance(torch.float64, "reordered")
EQUAL = {"rtol": 0.0, "atol": 0.0}
N, INPUTS, HIDDEN = 7, 3, 4
# Scattered over three sites, one of them constrained; "b1" holds no chosen element.
SUBNET = {
    "w1": torch.tensor([10, 0, 3]),
    "scale": torch.tensor([0]),
    "w2": torch.tensor([2]),
}
SIZE = 5


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> dist.TorchDistribution:
    return dist.Normal(torch.zeros(shape, dtype=dtype), 1.0).to_event(len(shape))


def model(x: Tensor, y: Tensor | None = None) -> Tensor:
    """A network under a hierarchical scale, with a simplex and a plate beside it."""
    one = torch.ones((), dtype=x.dtype)
    scale = pyro.sample("scale", dist.HalfNormal(one))
    wide = scale * torch.ones(HIDDEN, INPUTS, dtype=x.dtype)
    w1 = pyro.sample("w1", dist.Normal(torch.zeros_like(wide), wide).to_event(2))
    b1 = pyro.sample("b1", normal(HIDDEN, dtype=x.dtype))
    w2 = pyro.sample("w2", normal(HIDDEN, dtype=x.dtype))
    f = (x @ w1.mT + b1).tanh() @ w2
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(f, 0.5), obs=y)
    return f


def batched(x: Tensor, y: Tensor | None = None) -> Tensor:
    """The same with layers written by broadcasting: it runs on many weights at once."""
    one = torch.ones((), dtype=x.dtype)
    scale = pyro.sample("scale", dist.HalfNormal(one))
    wide = scale[..., None, None] * torch.ones(HIDDEN, INPUTS, dtype=x.dtype)
    w1 = pyro.sample("w1", dist.Normal(torch.zeros_like(wide), wide).to_event(2))
    b1 = pyro.sample("b1", normal(HIDDEN, dtype=x.dtype))
    w2 = pyro.sample("w2", normal(HIDDEN, dtype=x.dtype))
    hidden = torch.einsum("...hi,ni->...nh", w1, x) + b1.unsqueeze(-2)
    f = torch.einsum("...nh,...h->...n", hidden.tanh(), w2)
    if f.ndim > 2:
        f = f.squeeze(-2)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(f, 0.5), obs=y)
    return f


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(N, INPUTS, dtype=dtype), torch.randn(N, dtype=dtype)


def start(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Weights of about one size: then the chosen ones do not outweigh the others, and
    the Hessian of the hierarchical prior is positive definite."""
    w1 = torch.randn(HIDDEN, INPUTS, dtype=dtype)
    return {
        "scale": torch.tensor(0.8, dtype=dtype),
        "w1": w1.sign() * (0.8 + 0.2 * torch.rand(HIDDEN, INPUTS, dtype=dtype)),
        "b1": torch.randn(HIDDEN, dtype=dtype),
        "w2": torch.randn(HIDDEN, dtype=dtype),
    }


def fitted(
    user_model: Model = model, subnet: Any = SUBNET, dtype: torch.dtype = torch.float64
) -> tuple[AutoSubnetLaplace, AutoSubnetMultivariateNormal, Tensor, Tensor]:
    x, y = data(dtype)
    init = init_to_value(values=start(dtype))
    guide = AutoSubnetLaplace(user_model, subnet, init_loc_fn=init)
    return guide, guide.laplace_approximation(x, y), x, y


# ----------------------------------------------------------------------------------
# Before the approximation: a MAP guide under any SVI.


def train(guide: Any, elbo: Any, user_model: Model, steps: int = 12) -> list[Tensor]:
    """The parameter after every step, from the same seed for every guide."""
    pyro.clear_param_store()
    pyro.set_rng_seed(11)
    x, y = data()
    svi = SVI(user_model, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
    path = []
    for _ in range(steps):
        svi.step(x, y)
        path.append(guide.loc.detach().clone())
    return path


ELBOS: dict[str, Callable[[], Any]] = {
    "trace": Trace_ELBO,
    "particles": lambda: Trace_ELBO(num_particles=3),
    "vectorized": lambda: Trace_ELBO(
        num_particles=3, vectorize_particles=True, max_plate_nesting=1
    ),
    "graph": TraceGraph_ELBO,
    "mean-field": TraceMeanField_ELBO,
    "jit": JitTrace_ELBO,
}
quiet_jit = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:`torch.jit"
)


@quiet_jit
@pytest.mark.parametrize("elbo", ELBOS)
def test_training_is_that_of_auto_laplace_approximation(elbo: str) -> None:
    ours = train(AutoSubnetLaplace(batched), ELBOS[elbo](), batched)
    theirs = train(AutoLaplaceApproximation(batched), ELBOS[elbo](), batched)
    assert not torch.equal(ours[0], ours[-1])
    for found, expected in zip(ours, theirs, strict=True):
        assert_close(found, expected, **EQUAL)


@pytest.mark.parametrize("init", [init_to_mean, init_to_value(values={})])
def test_starts_where_auto_laplace_approximation_does(init: Any) -> None:
    x, y = data()
    locs = []
    for kind in (AutoSubnetLaplace, AutoLaplaceApproximation):
        pyro.clear_param_store()
        pyro.set_rng_seed(4)
        guide = kind(model, init_loc_fn=init)
        guide(x, y)
        locs.append(guide.loc.detach())
    assert_close(locs[0], locs[1], **EQUAL)


@pytest.mark.usefixtures("no_guides_of_other_tests")
def test_loc_is_the_one_parameter() -> None:
    guide, _, x, y = fitted()
    guide(x, y)
    assert [name for name, _ in guide.named_parameters()] == ["loc"]
    assert guide.loc.shape == (guide.latent_dim,)
    assert guide.latent_dim == 1 + HIDDEN * INPUTS + 2 * HIDDEN
    assert list(pyro.get_param_store().keys()) == ["AutoSubnetLaplace.loc"]


def test_guide_sites_match_auto_laplace_approximation() -> None:
    """Same sites, shapes and densities."""
    (x, y), values = data(), start()
    traces = []
    for kind in (AutoSubnetLaplace, AutoLaplaceApproximation):
        pyro.clear_param_store()
        guide = kind(model, init_loc_fn=init_to_value(values=values))
        traces.append(poutine.trace(guide).get_trace(x, y))
        traces[-1].compute_log_prob()
    ours, theirs = traces
    latent = [site for site in theirs.stochastic_nodes if not site.startswith("_")]
    assert [s for s in ours.stochastic_nodes if not s.startswith("_")] == latent
    for site in latent:
        assert ours.nodes[site]["value"].shape == theirs.nodes[site]["value"].shape
        assert (
            ours.nodes[site]["log_prob"].shape == theirs.nodes[site]["log_prob"].shape
        )


def test_map_guide_median_and_quantiles() -> None:
    values = start()
    x, y = data()
    guide = AutoSubnetLaplace(model, init_loc_fn=init_to_value(values=values))
    guide(x, y)
    quantiles = guide.quantiles([0.025, 0.5, 0.975], x, y)
    median = guide.median(x, y)
    assert list(median) == ["scale", "w1", "b1", "w2"]
    for site, value in values.items():
        assert_close(median[site], value, **CLOSED)
        assert quantiles[site].shape == (3, *value.shape)
        assert_close(quantiles[site], value.expand(3, *value.shape), **CLOSED)


def test_a_median_is_not_a_window_into_the_guide() -> None:
    guide, posterior, _, _ = fitted()
    for each in (guide, posterior):
        before = each.loc.detach().clone()
        for value in each.median().values():
            value.add_(1.0)
        assert_close(each.loc.detach(), before, **EQUAL)


def test_map_guide_under_predictive() -> None:
    guide, _, x, _ = fitted()
    predictive = Predictive(model, guide=guide, num_samples=3)
    with pytest.warns(ChoiceWarning, match="Draws of the guide are the MAP"):
        result = predictive(x)
    assert_close(
        result["w1"].reshape(3, HIDDEN, INPUTS),
        guide.median()["w1"].expand(3, -1, -1),
        **CLOSED,
    )


def test_training_goes_on_after_the_approximation() -> None:
    x, y = data()
    guide = AutoSubnetLaplace(model, SUBNET, init_loc_fn=init_to_value(values=start()))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    svi.step(x, y)
    before = guide.loc.detach().clone()
    posterior = guide.laplace_approximation(x, y)
    assert_close(guide.loc.detach(), before, **EQUAL)
    assert guide.loc.requires_grad
    svi.step(x, y)
    assert not torch.equal(guide.loc, before)
    assert_close(posterior.loc, before, **EQUAL)
    later = guide.laplace_approximation(x, y)
    assert_close(later.loc, guide.loc.detach(), **EQUAL)


# ----------------------------------------------------------------------------------
# The posterior as a distribution and as a guide.


def test_posterior_is_a_gaussian_over_the_subnet() -> None:
    guide, posterior, x, y = fitted()
    gaussian = posterior.get_posterior(x, y)
    assert gaussian.event_shape == (SIZE,)
    assert_close(gaussian.loc, guide.loc.detach()[posterior.subnet.flat], **EQUAL)
    loc, scale = posterior._loc_scale(x, y)
    assert_close(loc, gaussian.loc, **EQUAL)
    assert_close(scale, gaussian.covariance_matrix.diagonal().sqrt(), **SUM)
    assert float(gaussian.variance[-1]) > 0


def test_auxiliary_site_has_the_subnets_shape() -> None:
    _, posterior, x, y = fitted()
    trace = poutine.trace(posterior).get_trace(x, y)
    (name,) = [site for site in trace.stochastic_nodes if site.startswith("_")]
    assert trace.nodes[name]["value"].shape == (SIZE,)
    assert trace.nodes[name]["infer"]["is_auxiliary"]
    assert posterior.sample_latent(x, y).shape == (SIZE,)
    flat = {
        "scale": trace.nodes["scale"]["value"].log().reshape(1),
        "w1": trace.nodes["w1"]["value"].flatten(),
        "w2": trace.nodes["w2"]["value"].flatten(),
    }
    drawn = torch.cat([flat[site][at] for site, at in posterior.subnet.indices.items()])
    assert_close(drawn, trace.nodes[name]["value"], **CLOSED)


def test_draws_are_gaussian_with_the_precision() -> None:
    """Whitened by the factor, a χ² sum of squares; at FALSE_ALARM_RATE."""
    _, posterior, x, y = fitted()
    with pyro.plate("draws", 3000):
        draws = posterior.sample_latent(x, y)
    gaussian = posterior.get_posterior()
    white = (draws - gaussian.loc) @ torch.linalg.cholesky(gaussian.precision_matrix)
    total, count = float(white.square().sum()), white.numel()
    assert scipy.stats.chi2.ppf(FALSE_ALARM_RATE / 2, count) < total
    assert total < scipy.stats.chi2.isf(FALSE_ALARM_RATE / 2, count)


def test_only_the_subnet_is_random() -> None:
    _, posterior, x, _ = fitted()
    values = posterior.median()
    first, second = posterior(x), posterior(x)
    assert list(first) == ["scale", "w1", "b1", "w2"]
    for site, value in values.items():
        chosen = posterior.subnet.mask(site)
        for drawn in (first[site], second[site]):
            assert drawn.shape == value.shape
            assert_close(drawn[~chosen], value[~chosen], **CLOSED)
            assert bool((drawn[chosen] != value[chosen]).all())
        assert bool((first[site][chosen] != second[site][chosen]).all())


def test_draws_do_not_depend_on_the_arguments() -> None:
    _, posterior, x, y = fitted()
    drawn = []
    for args in ((x, y), (x,), (x[:2],)):
        pyro.set_rng_seed(8)
        drawn.append(posterior(*args)["w1"])
    assert_close(drawn[1], drawn[0], **EQUAL)
    assert_close(drawn[2], drawn[0], **EQUAL)


LEVELS = [1e-6, 0.05, 0.5, 0.8, 1 - 1e-6]


def test_median_and_quantiles() -> None:
    guide, posterior, x, y = fitted()
    at_map, median = guide.median(), posterior.median(x, y)
    quantiles = posterior.quantiles(LEVELS, x, y)
    sd = posterior.get_posterior().variance.sqrt()
    normal_quantiles = torch.tensor(scipy.stats.norm.ppf(LEVELS))
    for site, value in at_map.items():
        assert_close(median[site], value, **CLOSED)
        assert quantiles[site].shape == (len(LEVELS), *value.shape)
        outside = ~posterior.subnet.mask(site)
        for found in quantiles[site]:
            assert_close(found[outside], value[outside], **CLOSED)
    # inside: the normal quantiles, mapped to the support
    start_of = {"scale": 0, "w1": 1, "w2": 4}
    to_support = biject_to(constraints.positive)
    for site, within in posterior.subnet.indices.items():
        for i, position in enumerate(within.tolist()):
            k = start_of[site] + i
            u = posterior.get_posterior().loc[k] + sd[k] * normal_quantiles
            expected = to_support(u) if site == "scale" else u
            found = quantiles[site].reshape(len(LEVELS), -1)[:, position]
            assert_close(found, expected, rtol=1e-6, atol=1e-6)


def hand_log_density(
    posterior: AutoSubnetMultivariateNormal, trace: poutine.Trace
) -> Tensor:
    """log q of a guide trace: the Gaussian, and the volume of every site's transform.

    Also of sites outside the subnet: a constant, which Pyro's own guides count too.
    """
    gaussian = posterior.get_posterior()
    (latent,) = [site for site in trace.nodes if site.startswith("_Auto")]
    u = trace.nodes[latent]["value"]
    multivariate = torch.distributions.MultivariateNormal(
        gaussian.loc, precision_matrix=gaussian.precision_matrix
    )
    # du/dscale of u = log scale
    return multivariate.log_prob(u) - trace.nodes["scale"]["value"].log()


def test_log_density_in_a_trace() -> None:
    _, posterior, x, y = fitted()
    trace = poutine.trace(posterior).get_trace(x, y)
    assert_close(trace.log_prob_sum(), hand_log_density(posterior, trace), **SUM)


def test_elbo_is_the_hand_computation() -> None:
    _, posterior, x, y = fitted()
    pyro.set_rng_seed(21)
    loss = Trace_ELBO().loss(model, posterior, x, y)
    pyro.set_rng_seed(21)
    guide_trace = poutine.trace(posterior).get_trace(x, y)
    values = {
        site: guide_trace.nodes[site]["value"] for site in ("scale", "w1", "b1", "w2")
    }
    conditioned = poutine.condition(model, data=values)
    joint = poutine.trace(conditioned).get_trace(x, y).log_prob_sum()
    expected = hand_log_density(posterior, guide_trace) - joint
    assert_close(torch.tensor(loss, dtype=torch.float64), expected.detach(), **SUM)


@quiet_jit
@pytest.mark.parametrize("elbo", ELBOS)
def test_posterior_under_every_elbo(elbo: str) -> None:
    """Its loss is finite; it has nothing to train."""
    _, posterior, x, y = fitted(batched)
    assert list(posterior.parameters()) == []
    loss = ELBOS[elbo]().loss(batched, posterior, x, y)
    assert math.isfinite(loss)


@pytest.mark.parametrize("parallel", [False, True])
def test_weight_space_predictive(parallel: bool) -> None:
    _, posterior, x, _ = fitted(batched)
    result = Predictive(
        batched,
        guide=posterior,
        num_samples=6,
        parallel=parallel,
        return_sites=("scale", "w1", "b1", "w2", "y", "_RETURN"),
    )(x)
    assert result["y"].shape == (6, N)
    for k in range(6):
        w1, w2 = result["w1"][k].reshape(HIDDEN, INPUTS), result["w2"][k].flatten()
        f = (x @ w1.mT + result["b1"][k].flatten()).tanh() @ w2
        assert_close(result["_RETURN"][k].flatten(), f, **CLOSED)
    assert len(result["w1"].reshape(6, -1)[:, 0].unique()) == 6
    assert len(result["w1"].reshape(6, -1)[:, 1].unique()) == 1


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_of_the_guide_alone_stacks_every_site(parallel: bool) -> None:
    _, posterior, x, _ = fitted(batched)
    result = Predictive(posterior, num_samples=5, parallel=parallel)(x)
    for site, value in posterior.median().items():
        assert result[site].reshape(5, -1).shape == (5, value.numel())


def scalars(x: Tensor, y: Tensor | None = None) -> None:
    """Sites without dimensions: Pyro's parallel mode runs them, of any guide."""
    one = torch.ones((), dtype=x.dtype)
    scale = pyro.sample("scale", dist.HalfNormal(one))
    w1 = pyro.sample("w1", dist.Normal(0.0 * one, scale))
    w2 = pyro.sample("w2", normal())
    with pyro.plate("data", len(x)):
        f = (w1 * x[:, 0]).tanh() * w2
        pyro.sample("y", dist.Normal(f, 0.5), obs=y)


@pytest.mark.parametrize(
    ("user_model", "parallel"), [(model, False), (scalars, False), (scalars, True)]
)
def test_weighed_predictive(user_model: Model, parallel: bool) -> None:
    """Weights are log p(y, θ) - log q(θ), draw by draw."""
    values = start()
    subnet: Any = SUBNET
    if user_model is scalars:
        values = {"scale": values["scale"], **dict.fromkeys(["w1", "w2"], 0.7)}
        values = {site: torch.as_tensor(v).double() for site, v in values.items()}
        subnet = {site: torch.tensor([0]) for site in ("scale", "w2")}
    x, y = data()
    init = init_to_value(values=values)
    guide = AutoSubnetLaplace(user_model, subnet, init_loc_fn=init)
    posterior = guide.laplace_approximation(x, y)
    predictive = WeighedPredictive(
        user_model, guide=posterior, num_samples=4, parallel=parallel
    )
    result = predictive(x, y, model_guide=user_model)
    assert result.log_weights.shape == (4,)
    gaussian = posterior.get_posterior()
    for k in range(4):
        drawn = {
            site: result.samples[site][k].reshape(value.shape)
            for site, value in values.items()
        }
        conditioned = poutine.condition(user_model, data=drawn)
        joint = poutine.trace(conditioned).get_trace(x, y).log_prob_sum()
        unconstrained = {**drawn, "scale": drawn["scale"].log()}
        u = torch.cat([value.flatten() for value in unconstrained.values()])
        log_q = gaussian.log_prob(u[posterior.subnet.flat]) - unconstrained["scale"]
        found = result.log_weights[k]  # float32 by Pyro 1.9.1, whatever the draws are
        close = tolerance(found.dtype, "reordered")
        assert_close(found, (joint - log_q).to(found.dtype), **close)


# ----------------------------------------------------------------------------------
# Latent sites in plates, and other companions.


def plated(x: Tensor, y: Tensor | None = None) -> None:
    with pyro.plate("groups", 3):
        offset = pyro.sample("offset", normal())
        slope = pyro.sample("slope", normal(INPUTS))
    simplex = pyro.sample("simplex", dist.Dirichlet(torch.ones(3, dtype=x.dtype)))
    f = x @ slope.mT @ simplex + (offset * simplex).sum(-1)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(f, 0.5), obs=y)


def test_exact_shapes_under_plates_and_constraints() -> None:
    """A simplex of three has two unconstrained elements, and positions count those."""
    x, y = data()
    guide = AutoSubnetLaplace(
        plated, {"offset": torch.tensor([1]), "simplex": torch.tensor([1])}
    )
    posterior = guide.laplace_approximation(x, y)
    assert posterior.subnet.num_params == 3 + 3 * INPUTS + 2
    assert posterior.subnet.names == ["offset[1]", "simplex[1]"]
    drawn = posterior(x, y)
    assert {site: value.shape for site, value in drawn.items()} == {
        "offset": (3,),
        "slope": (3, INPUTS),
        "simplex": (3,),
    }
    assert_close(drawn["simplex"].sum(), torch.ones((), dtype=x.dtype), **CLOSED)
    assert {site: value.shape for site, value in posterior.median().items()} == {
        site: value.shape for site, value in drawn.items()
    }
    quantiles = posterior.quantiles([0.1, 0.9])
    assert quantiles["simplex"].shape == (2, 3)
    trace = poutine.trace(posterior).get_trace(x, y)
    trace.compute_log_prob()
    assert trace.nodes["offset"]["log_prob"].shape == (3,)
    with pyro.plate("outer", 5, dim=-2):
        many = posterior(x, y)
    assert many["offset"].shape == (5, 3)
    # no chosen element: the same in all draws, whatever shape stands for that
    assert_close(
        many["slope"].expand(5, 3, INPUTS), drawn["slope"].expand(5, -1, -1), **CLOSED
    )
    assert many["simplex"].shape == (5, 1, 3)


def test_member_of_a_guide_list() -> None:
    """The MAP guide, and the posterior, of some sites beside another guide."""
    x, y = data()
    guide = AutoGuideList(model)
    hide = poutine.block(model, hide=["scale"])
    guide.append(AutoSubnetLaplace(hide, init_loc_fn=init_to_value(values=start())))
    guide.append(AutoDelta(poutine.block(model, expose=["scale"])))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    drawn = guide(x, y)
    assert set(drawn) == {"scale", "w1", "b1", "w2"}
    before = drawn["w1"].detach().clone()
    svi.step(x, y)
    assert not torch.equal(guide(x, y)["w1"], before)


def test_posterior_as_member_of_a_guide_list() -> None:
    x, y = data()
    scale = torch.tensor(0.8, dtype=torch.float64)
    rest = poutine.condition(model, data={"scale": scale})
    values = {site: value for site, value in start().items() if site != "scale"}
    subnet = {site: at for site, at in SUBNET.items() if site != "scale"}
    member = AutoSubnetLaplace(rest, subnet, init_loc_fn=init_to_value(values=values))
    posterior = member.laplace_approximation(x, y)
    alone = posterior.get_posterior().precision_matrix
    guide = AutoGuideList(model)
    guide.append(posterior)
    guide.append(AutoNormal(poutine.block(model, expose=["scale"])))
    drawn = guide(x, y)
    assert set(drawn) == {"scale", "w1", "b1", "w2"}
    assert_close(drawn["b1"], values["b1"], **CLOSED)
    assert not torch.equal(drawn["w1"], values["w1"])
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert math.isfinite(svi.step(x, y))
    assert_close(posterior.get_posterior().precision_matrix, alone, **EQUAL)
    result = Predictive(model, guide=guide, num_samples=2)(x)
    assert result["y"].shape == (2, N)


def test_a_hidden_likelihood_is_said_to_be_missing() -> None:
    """Pyro's guide on such a sub-model takes the prior for the posterior, silently."""
    x, y = data()
    blocked = poutine.block(model, hide=["y"])
    guide = AutoSubnetLaplace(
        blocked, {"w1": torch.arange(2)}, init_loc_fn=init_to_value(values=start())
    )
    with pytest.warns(NoObservedSiteWarning, match="no observed site.*poutine.block"):
        guide.laplace_approximation(x, y)


def test_pyro_module_model() -> None:
    """A class with ``PyroSample`` weights, as Pyro's tutorials write networks."""

    class Net(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = PyroModule[nn.Linear](INPUTS, 2, dtype=torch.float64)
            self.layer.weight = PyroSample(normal(2, INPUTS))
            self.layer.bias = PyroSample(normal(2))

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            f = self.layer(x)
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(f, 0.5).to_event(1), obs=y)
            return f

    net, x = Net(), data()[0]
    y = torch.randn(N, 2, dtype=torch.float64)
    posterior = AutoSubnetLaplace(net, 0.5).laplace_approximation(x, y)
    assert posterior.subnet.size == 4
    result = Predictive(posterior.linearized_model, guide=posterior, num_samples=2)(x)
    assert result["y"].shape == (2, N, 2)


# ----------------------------------------------------------------------------------
# Saving and copying.


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def through_torch(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WAYS = {
    "pickle": through_pickle,
    "torch.save": through_torch,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_saved_posterior_samples_the_same_and_the_live_one_lives(way: str) -> None:
    _, posterior, x, y = fitted()
    loaded = WAYS[way](posterior)
    draws = []
    for each in (posterior, loaded, posterior):
        pyro.set_rng_seed(31)
        draws.append(each(x, y))
    for site in draws[0]:
        assert_close(draws[1][site], draws[0][site], **EQUAL)
        assert_close(draws[2][site], draws[0][site], **EQUAL)
    assert_close(loaded.subnet.flat, posterior.subnet.flat, **EQUAL)
    assert loaded.subnet.names == posterior.subnet.names
    found = loaded.get_posterior()
    assert_close(found.precision_matrix, posterior.get_posterior().precision_matrix)
    # the live one keeps its model
    assert posterior.output_distribution(x).batch_shape == (N,)
    Predictive(posterior.linearized_model, guide=posterior, num_samples=2)(x)
    assert posterior.user_model is model
    assert posterior.model is not None


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_with_model_after_unpickling(way: str) -> None:
    _, posterior, x, _ = fitted()
    expected = posterior.output_distribution(x)
    loaded = WAYS[way](posterior)
    for act in (
        lambda: loaded.output_distribution(x),
        lambda: loaded.linearized_model,
    ):
        with pytest.raises(
            ModelError, match=r"must know its model.*unpickled.*with_model\(model\)"
        ):
            act()
    whole = loaded.with_model(model)
    found = whole.output_distribution(x)
    assert_close(found.loc, expected.loc, **EQUAL)
    assert_close(found.covariance_matrix, expected.covariance_matrix, **SUM)
    Predictive(whole.linearized_model, guide=whole, num_samples=2)(x)
    scaled = whole.with_prior_precision(2.0).get_posterior().precision_matrix
    wanted = posterior.with_prior_precision(2.0).get_posterior().precision_matrix
    assert_close(scaled, wanted, **SUM)
    # what it was made from still lacks a model
    with pytest.raises(ModelError, match="must know its model"):
        loaded.output_distribution(x)


def test_a_deep_copy_shares_the_model_and_nothing_else() -> None:
    posterior = fitted()[1]
    copied = copy.deepcopy(posterior)
    assert copied.user_model is posterior.user_model
    before = posterior.get_posterior().precision_matrix
    with torch.no_grad():
        for buffer in copied.buffers():
            buffer.zero_()
    assert_close(posterior.get_posterior().precision_matrix, before, **EQUAL)


@pytest.mark.parametrize("way", WAYS)
def test_the_live_map_guide_survives_saving(way: str) -> None:
    """Pyro's is of no use afterwards: its model is None."""
    guide, posterior, x, y = fitted()
    loaded = WAYS[way](guide)
    assert_close(loaded.median()["w1"], guide.median()["w1"], **EQUAL)
    again = guide.laplace_approximation(x, y)
    assert_close(
        again.get_posterior().precision_matrix,
        posterior.get_posterior().precision_matrix,
        **EQUAL,
    )
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    assert math.isfinite(svi.step(x, y))
    if way != "deepcopy":
        with pytest.raises(ModelError, match=r"must know its model.*init_to_value"):
            loaded.laplace_approximation(x, y)


def state_dict_of(posterior: AutoSubnetMultivariateNormal) -> dict[str, Tensor]:
    """Written, and read with the safe defaults of ``torch.load``."""
    buffer = io.BytesIO()
    torch.save(posterior.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer)


def test_state_dict_brings_the_positions_along() -> None:
    _, posterior, x, y = fitted()
    other = {
        "w1": torch.tensor([1, 2, 4]),
        "b1": torch.tensor([0]),
        "scale": torch.tensor([0]),
    }
    guide = AutoSubnetLaplace(model, other, init_loc_fn=init_to_value(values=start()))
    target = guide.laplace_approximation(x, y)
    target.load_state_dict(state_dict_of(posterior))
    assert target.subnet.names == posterior.subnet.names
    assert_close(
        target.get_posterior().precision_matrix,
        posterior.get_posterior().precision_matrix,
        **EQUAL,
    )
    draws = []
    for each in (posterior, target):
        pyro.set_rng_seed(3)
        draws.append(each(x)["w1"])
    assert_close(draws[1], draws[0], **EQUAL)


def test_state_dict_of_another_size_does_not_load() -> None:
    _, posterior, x, y = fitted()
    init = init_to_value(values=start())
    guide = AutoSubnetLaplace(model, {"w2": torch.tensor([1])}, init_loc_fn=init)
    target = guide.laplace_approximation(x, y)
    with pytest.raises(RuntimeError, match="size mismatch for subnet_positions"):
        target.load_state_dict(state_dict_of(posterior))


# ----------------------------------------------------------------------------------
# Dtypes.


def test_dtype_is_kept_throughout(dtype: torch.dtype) -> None:
    guide, posterior, x, _ = fitted(subnet=0.5, dtype=dtype)
    assert guide.loc.dtype == dtype
    gaussian = posterior.get_posterior()
    for name in ("loc", "precision_matrix", "covariance_matrix", "scale_tril"):
        assert getattr(gaussian, name).dtype == dtype, name
    assert gaussian.variance.dtype == dtype
    assert gaussian.rsample().dtype == dtype
    assert gaussian.log_prob(gaussian.loc).dtype == dtype
    assert gaussian.entropy().dtype == dtype
    for values in (posterior.median(), posterior.quantiles([0.1]), posterior(x)):
        assert {value.dtype for value in values.values()} == {dtype}
    buffers = {
        buffer.dtype
        for name, buffer in posterior.named_buffers()
        # Sums over many data, and what is compared with them, keep their digits.
        if buffer.is_floating_point() and name not in posterior.summary.tensors()
    }
    assert buffers == {dtype}
    assert torch.get_default_dtype() == torch.float32
    result = Predictive(posterior.linearized_model, guide=posterior, num_samples=2)(x)
    assert {value.dtype for value in result.values()} == {dtype}
    scaled = posterior.with_prior_precision(3.0).get_posterior()
    assert scaled.precision_matrix.dtype == dtype


@pytest.mark.parametrize(
    "move",
    [lambda p: p.to(torch.float64), lambda p: p.double()],
    ids=["to", "double"],
)
def test_a_posterior_moves_to_double(move: Callable[[Any], Any]) -> None:
    """Fitted in float32, used in float64: draws, quantiles, predictions."""
    _, posterior, x, _ = fitted(dtype=torch.float32)
    single = posterior.get_posterior().precision_matrix
    closed = posterior.output_distribution(x)
    moved = move(copy.deepcopy(posterior))
    gaussian = moved.get_posterior()
    assert gaussian.precision_matrix.dtype == torch.float64
    loose = tolerance(torch.float32, "autograd")
    assert_close(gaussian.precision_matrix, single.double(), **loose)
    for values in (moved.median(), moved.quantiles([0.1]), moved(x.double())):
        assert {value.dtype for value in values.values()} == {torch.float64}
    found = moved.output_distribution(x.double())
    assert found.covariance_matrix.dtype == torch.float64
    assert_close(found.covariance_matrix, closed.covariance_matrix.double(), **loose)
    result = Predictive(moved.linearized_model, guide=moved, num_samples=2)(x.double())
    assert {value.dtype for value in result.values()} == {torch.float64}
    assert moved.subnet.flat.dtype == torch.int64
    assert posterior.get_posterior().loc.dtype == torch.float32


# ----------------------------------------------------------------------------------
# The user's state.


def surroundings() -> dict[str, Any]:
    return {
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "validation": torch.distributions.Distribution._validate_args,
        "filters": list(warnings.filters),
        "params": {
            name: value.detach().clone()
            for name, value in pyro.get_param_store().items()
        },
    }


class TrainableModel(PyroModule):
    """A network of layers with parameters of its own, one of them frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(INPUTS, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.Tanh()
        ).double()
        self.net[0].bias.requires_grad_(False)
        self.net.eval()
        self.net[2].train()  # harmless there; must not be changed either

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        gain = pyro.param("gain", torch.tensor(1.5, dtype=torch.float64))
        w = pyro.sample("w", normal(HIDDEN))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(gain * self.net(x) @ w, 0.5), obs=y)


@pytest.mark.parametrize("subnet", [None, 2, 0.5, RandomSubnet(2)], ids=str)
def test_nothing_around_is_touched(subnet: Any) -> None:
    user_model = TrainableModel()
    x, y = data()
    guide = AutoSubnetLaplace(user_model, subnet)
    guide(x, y)
    modes = [m.training for m in user_model.modules()]
    state = {n: v.detach().clone() for n, v in user_model.state_dict().items()}
    gradients = [p.requires_grad for p in user_model.parameters()]
    before, rng = surroundings(), torch.get_rng_state()

    posterior = guide.laplace_approximation(x, y)
    assert_close(torch.get_rng_state(), rng, **EQUAL)
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    guide.laplace_approximation_from(batches)
    assert_close(torch.get_rng_state(), rng, **EQUAL)
    posterior.output_distribution(x)
    posterior.output_distribution(x, joint=True)
    posterior.with_prior_precision(2.0)
    posterior.median()
    posterior.quantiles([0.5])
    assert_close(torch.get_rng_state(), rng, **EQUAL)

    after = surroundings()
    params = after.pop("params")
    for name, value in before.pop("params").items():
        assert_close(params.pop(name), value, **EQUAL)
    assert params == {}
    assert after == before
    assert [m.training for m in user_model.modules()] == modes
    assert [p.requires_grad for p in user_model.parameters()] == gradients
    assert all(p.grad is None for p in user_model.parameters())
    for name, value in user_model.state_dict().items():
        assert_close(value, state[name], **EQUAL)
    hooks = [
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in user_model.modules()
    ]
    assert not any(hooks)
    assert len(torch.nn.modules.module._global_forward_pre_hooks) == 0


def test_the_models_own_parameters_are_not_put_into_the_store() -> None:
    """A prediction after the store was emptied, as between two experiments."""
    x, y = data()
    posterior = AutoSubnetLaplace(TrainableModel(), 2).laplace_approximation(x, y)
    pyro.clear_param_store()
    posterior.output_distribution(x)
    assert list(pyro.get_param_store().keys()) == []


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradient_mode_around_does_not_matter(mode: Callable[[], Any]) -> None:
    """Users predict, and some fit, where gradients are off."""
    guide, posterior, x, y = fitted()
    expected = posterior.get_posterior().precision_matrix
    closed = posterior.output_distribution(x).covariance_matrix
    with mode():
        covariance = posterior.output_distribution(x).covariance_matrix
        found = guide.laplace_approximation(x, y).get_posterior().precision_matrix
    assert_close(covariance, closed, **SUM)
    assert_close(found, expected, **SUM)


def test_handlers_around_do_not_see_the_fit() -> None:
    guide, posterior, x, y = fitted()
    with poutine.trace() as tracer, poutine.scale(scale=100.0), pyro.plate("p", 3):
        found = guide.laplace_approximation(x, y)
        found.output_distribution(x)
    sites = [n for n, v in tracer.trace.nodes.items() if v["type"] == "sample"]
    assert [site for site in sites if site != "p"] == []
    assert_close(
        found.get_posterior().precision_matrix,
        posterior.get_posterior().precision_matrix,
        **EQUAL,
    )


def test_fit_is_detached_from_the_guide() -> None:
    guide, posterior, _, _ = fitted()
    assert not posterior.get_posterior().precision_matrix.requires_grad
    assert not any(b.requires_grad for b in posterior.buffers())
    before = posterior.median()["w1"]
    with torch.no_grad():
        guide.loc.add_(1.0)
    assert_close(posterior.median()["w1"], before, **EQUAL)


# ----------------------------------------------------------------------------------
# Several guides, first calls.


def test_two_live_guides_do_not_share_a_parameter() -> None:
    x, y = data()
    first = AutoSubnetLaplace(model, init_loc_fn=init_to_value(values=start()))
    first(x, y)
    values = start()
    second = AutoSubnetLaplace(model, init_loc_fn=init_to_value(values=values))
    second(x, y)
    assert_close(second.median()["w1"], values["w1"], **CLOSED)
    assert len(pyro.get_param_store()) == 2
    svi = SVI(model, second, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    before = first.median()["w1"]
    svi.step(x, y)
    assert_close(first.median()["w1"], before, **EQUAL)
    assert not torch.equal(second.median()["w1"], values["w1"])


def test_two_live_guides_of_different_sizes() -> None:
    """Pyro's second guide asserts."""
    x, y = data()
    AutoSubnetLaplace(model)(x, y)
    kept = AutoSubnetLaplace(model)
    kept(x, y)
    small = AutoSubnetLaplace(plated)
    small(x, y)
    assert small.loc.shape == (3 + 3 * INPUTS + 2,)
    assert small.laplace_approximation(x, y).subnet.num_params == small.loc.numel()


@pytest.mark.usefixtures("no_guides_of_other_tests")
def test_a_dead_guides_parameter_is_taken_up() -> None:
    """As in Pyro: a guide made anew goes on from what the param store holds."""
    x, y = data()
    values = start()
    guide = AutoSubnetLaplace(model, init_loc_fn=init_to_value(values=values))
    guide(x, y)
    del guide
    again = AutoSubnetLaplace(model)
    again(x, y)
    assert list(pyro.get_param_store().keys()) == ["AutoSubnetLaplace.loc"]
    assert_close(again.median()["w1"], values["w1"], **CLOSED)


def test_two_posteriors_of_one_guide_live_side_by_side() -> None:
    x, y = data()
    values = start()
    locs = []
    for subnet in (SUBNET, LargestMagnitude(3)):
        guide = AutoSubnetLaplace(
            model, subnet, init_loc_fn=init_to_value(values=values)
        )
        locs.append(guide.laplace_approximation(x, y))
    assert [posterior.subnet.size for posterior in locs] == [SIZE, 3]
    assert locs[0](x)["w1"].shape == locs[1](x)["w1"].shape


def test_a_first_call_without_data_is_found_out() -> None:
    """Then a continuous observed site is taken for a latent one; Pyro says nothing."""
    x, y = data()
    guide = AutoSubnetLaplace(model)
    guide(x)
    with pytest.raises(
        ModelError, match=r"must not be observed; got data for site 'y'.*new guide"
    ):
        guide.laplace_approximation(x, y)


def test_a_first_call_without_data_in_svi_is_found_out() -> None:
    x, y = data()
    guide = AutoSubnetLaplace(model)
    guide(x)
    with pytest.raises(
        ModelError, match=r"must not be observed; got data for site 'y'.*new guide"
    ):
        guide.laplace_approximation_from([(x[:3], y[:3]), (x[3:], y[3:])])


def test_no_call_before_the_approximation_is_needed() -> None:
    x, y = data()
    guide = AutoSubnetLaplace(model, SUBNET, init_loc_fn=init_to_value(values=start()))
    assert guide.laplace_approximation(x, y).subnet.size == SIZE


# ----------------------------------------------------------------------------------
# Another prior precision.


def scaled_prior_model(scale: float) -> Model:
    """A model whose prior precision is ``scale`` times the first's."""

    def user_model(x: Tensor, y: Tensor | None = None) -> None:
        wide = torch.zeros(HIDDEN, INPUTS, dtype=torch.float64)
        sd = scale**-0.5
        w1 = pyro.sample("w1", dist.Normal(wide, 0.7 * sd).to_event(2))
        tril = torch.eye(HIDDEN, dtype=torch.float64) + 0.3
        prior = dist.MultivariateNormal(
            torch.zeros(HIDDEN, dtype=torch.float64), scale_tril=sd * tril.tril()
        )
        w2 = pyro.sample("w2", prior)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x @ w1.mT).tanh() @ w2, 0.5), obs=y)

    return user_model


def network_values() -> dict[str, Tensor]:
    return {
        "w1": torch.randn(HIDDEN, INPUTS, dtype=torch.float64),
        "w2": torch.randn(HIDDEN, dtype=torch.float64),
    }


@pytest.mark.parametrize("scale", [1e-6, 0.3, 1.0, 7.0, 1e6])
@pytest.mark.parametrize("subnet", [None, {"w1": torch.tensor([7, 2])}], ids=["D", "2"])
def test_another_prior_precision_equals_a_refit(scale: float, subnet: Any) -> None:
    x, y = data()
    init = init_to_value(values=network_values())
    first = AutoSubnetLaplace(scaled_prior_model(1.0), subnet, init_loc_fn=init)
    posterior = first.laplace_approximation(x, y)
    # far from where it is: what is not cumulative comes back without loss
    wandered = posterior.with_prior_precision(1e6).with_prior_precision(1e-3)
    refit = AutoSubnetLaplace(scaled_prior_model(scale), subnet, init_loc_fn=init)
    expected = refit.laplace_approximation(x, y).get_posterior().precision_matrix
    for source in (posterior, wandered):
        found = source.with_prior_precision(scale)
        assert_close(found.get_posterior().precision_matrix, expected, **SUM)
        assert found.prior_factor == scale


def test_extremes_leave_the_curvature_of_the_data_exact() -> None:
    """1e6 times the prior drowns no digit of the GGN: it comes back bit by bit."""
    x, y = data()
    init = init_to_value(values=network_values())
    guide = AutoSubnetLaplace(scaled_prior_model(1.0), init_loc_fn=init)
    posterior = guide.laplace_approximation(x, y)
    direct = posterior.with_prior_precision(0.5).get_posterior().precision_matrix
    for scale in (1e-6, 1e6):
        there = posterior.with_prior_precision(scale)
        assert_close(there.ggn(), posterior.ggn(), **EQUAL)
        back = there.with_prior_precision(0.5).get_posterior().precision_matrix
        assert_close(back, direct, **EQUAL)


def test_another_prior_precision_leaves_the_original_alone() -> None:
    _, posterior, x, _ = fitted()
    before = posterior.get_posterior().precision_matrix
    closed = posterior.output_distribution(x).covariance_matrix
    stronger = posterior.with_prior_precision(50.0)
    assert_close(posterior.get_posterior().precision_matrix, before, **EQUAL)
    assert posterior.prior_factor == 1.0
    assert_close(posterior.output_distribution(x).covariance_matrix, closed, **EQUAL)
    narrower = stronger.output_distribution(x).variance
    assert bool((narrower < closed.diagonal(dim1=-2, dim2=-1)).all())
    assert stronger.subnet.names == posterior.subnet.names
    assert_close(stronger.loc, posterior.loc, **EQUAL)
    assert stronger.user_model is posterior.user_model
    stronger(x)
    Predictive(stronger.linearized_model, guide=stronger, num_samples=2)(x)


def test_the_data_are_not_passed_over_again() -> None:
    calls = 0

    def counted(x: Tensor, y: Tensor | None = None) -> Tensor:
        nonlocal calls
        calls += 1
        return model(x, y)

    _, posterior, _, _ = fitted(counted)
    before = calls
    posterior.with_prior_precision(3.0)
    assert calls == before


@pytest.mark.parametrize("scale", [0.0, -2.0, math.inf, math.nan])
def test_bad_scales_are_refused(scale: float) -> None:
    _, posterior, _, _ = fitted()
    with pytest.raises(
        OptionError, match=rf"`scale` must be positive and finite; got {scale}\. Pass"
    ):
        posterior.with_prior_precision(scale)


def test_a_prior_that_curves_the_wrong_way_is_refused_when_scaled_up() -> None:
    """A StudentT prior far from its center: negative curvature, drowned by the data."""

    def heavy(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample(
            "w", dist.StudentT(1.0, torch.zeros(1).double(), 1.0).to_event(1)
        )
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x[:, :1] @ w, 0.5), obs=y)

    x, y = data()
    init = init_to_value(values={"w": torch.tensor([3.0], dtype=torch.float64)})
    posterior = AutoSubnetLaplace(heavy, init_loc_fn=init).laplace_approximation(x, y)
    with pytest.raises(
        PrecisionError,
        match=r"S=1 must be positive definite; got smallest eigenvalue -",
    ):
        posterior.with_prior_precision(1e6)


# ----------------------------------------------------------------------------------
# Subsampling plates.


@pytest.mark.parametrize("batch_size", [2, 3])
def test_one_call_with_a_subsample_keeps_its_scale(batch_size: int) -> None:
    """One call shows B of N data, each for N/B: what a user's ELBO sums."""
    kept: list[Tensor] = []

    def user_model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", normal(INPUTS))
        with pyro.plate("data", N, subsample_size=batch_size) as index:
            kept.append(index)
            pyro.sample("y", dist.Normal(x[index] @ w, 0.5), obs=y[index])

    x, y = data()
    guide = AutoSubnetLaplace(user_model)
    guide(x, y)
    kept.clear()
    with pytest.warns(DataCountWarning, match="draws a subsample of its own"):
        posterior = guide.laplace_approximation(x, y)
    # One run more, at other data, finds that the model draws them itself.
    index, others = kept[0], (kept[0] + 1) % N
    assert torch.equal(kept[1], index)
    assert all(torch.equal(k, index) or torch.equal(k, others) for k in kept)
    rows = x[index]
    eye = torch.eye(INPUTS, dtype=torch.float64)
    expected = N / batch_size * rows.mT @ rows / 0.25 + eye
    assert_close(posterior.get_posterior().precision_matrix, expected, **SUM)


def test_one_call_with_a_given_subsample_keeps_its_scale() -> None:
    def user_model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", normal(INPUTS))
        with pyro.plate("data", 10 * N, subsample_size=N):
            f = F.linear(x, w.unsqueeze(0)).squeeze(-1)
            pyro.sample("y", dist.Normal(f, 0.5), obs=y)

    x, y = data()
    guide = AutoSubnetLaplace(user_model)
    posterior = guide.laplace_approximation(x, y)
    eye = torch.eye(INPUTS, dtype=torch.float64)
    expected = 10 * x.mT @ x / 0.25 + eye
    assert_close(posterior.get_posterior().precision_matrix, expected, **SUM)
    # summed as minibatches, the plate's scale must not count
    with pytest.warns(DataCountWarning, match="show 7 of the 70 data"):
        once = guide.laplace_approximation_from([(x, y)])
    found = once.get_posterior().precision_matrix
    assert_close(found, x.mT @ x / 0.25 + eye, **SUM)
