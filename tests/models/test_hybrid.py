"""The hybrid model against the user's own, and under Pyro's inference."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import arviz
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Importance, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.predictive import WeighedPredictive
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.exceptions import OptionError, UntrainedWarning
from pyro_subnet.models.hybrid import HybridModel
from pyro_subnet.nn import bayesianize, init_to_module
from pyro_subnet.selection import RandomSubnet
from tests.export.generation import IS_1
from tests.tolerances import num_standard_errors, tolerance

Model = Callable[..., Any]

SUM = tolerance(torch.float64, "reordered")
AUTOGRAD = tolerance(torch.float64, "autograd")
EQUAL = {"rtol": 0.0, "atol": 0.0}
N, INPUTS, HIDDEN = 7, 3, 4
DOUBLE = torch.float64


def normal(*shape: int) -> dist.TorchDistribution:
    return dist.Normal(torch.zeros(shape, dtype=DOUBLE), 1.0).to_event(len(shape))


def network(x: Tensor, y: Tensor | None = None) -> Tensor:
    """A hierarchical scale, and noise that is latent."""
    one = torch.ones((), dtype=DOUBLE)
    scale = pyro.sample("scale", dist.HalfNormal(one))
    wide = scale[..., None, None].expand(*scale.shape, HIDDEN, INPUTS)
    w1 = pyro.sample("w1", dist.Normal(torch.zeros_like(wide), wide).to_event(2))
    w2 = pyro.sample("w2", normal(HIDDEN))
    noise = pyro.sample("noise", dist.Gamma(3 * one, 4 * one))
    hidden = torch.einsum("...hi,ni->...nh", w1, x).tanh()
    f = torch.einsum("...nh,...h->...n", hidden, w2)
    if f.ndim > 2:
        f = f.squeeze(-2)
    pyro.deterministic("f", f)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(f, noise), obs=y)
    return f


def awkward(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Constrained and correlated sites, a plate, a scale, a mask and a factor."""
    one = torch.ones((), dtype=DOUBLE)
    shares = pyro.sample("shares", dist.Dirichlet(torch.full((4,), 2.0, dtype=DOUBLE)))
    corr = pyro.sample("corr", dist.LKJCholesky(3, one))
    with pyro.plate("groups", 5, dim=-2), poutine.scale(scale=0.7):
        rates = pyro.sample("rates", dist.LogNormal(0 * one, 0.5).expand([5, 1]))
    with poutine.mask(mask=torch.tensor([True, False, True])):
        shift = pyro.sample("shift", dist.Normal(torch.zeros(3, dtype=DOUBLE), one))
    pyro.factor("penalty", -(shift.square().sum()) * 0.1)
    f = x @ corr @ shares[:3] + rates.log().sum() * shares[3] + shift.sum()
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(f, 0.5), obs=y)
    return f


def subsampled(x: Tensor, y: Tensor | None = None) -> Tensor:
    w = pyro.sample("w", normal(INPUTS))
    with pyro.plate("data", 2 * len(x), subsample=torch.arange(len(x))):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)
    return x @ w


MODELS = {"network": network, "awkward": awkward, "subsampled": subsampled}
SUBNETS: dict[str, dict[str, Tensor]] = {
    "network": {"w1": torch.tensor([10, 0, 3]), "scale": torch.tensor([0])},
    "awkward": {
        "shares": torch.tensor([1]),
        "corr": torch.tensor([2, 0]),
        "rates": torch.tensor([4, 2]),
        "shift": torch.tensor([0, 1, 2]),
    },
    "subsampled": {"w": torch.tensor([2, 0])},
}


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(N, INPUTS, dtype=DOUBLE), torch.randn(N, dtype=DOUBLE)


@dataclass(frozen=True)
class Fit:
    posterior: AutoSubnetMultivariateNormal
    x: Tensor
    y: Tensor

    def theta(self, distance: float = 0.1) -> Tensor:
        """Values of the subnet near the MAP."""
        loc = self.posterior.get_posterior().loc
        return loc + distance * torch.randn_like(loc)


def start() -> dict[str, Tensor]:
    """Weights of about one size, where a hierarchical prior's Hessian is positive."""
    w1 = torch.randn(HIDDEN, INPUTS, dtype=DOUBLE)
    return {
        "scale": torch.tensor(0.8, dtype=DOUBLE),
        "w1": w1.sign() * (0.8 + 0.2 * torch.rand(HIDDEN, INPUTS, dtype=DOUBLE)),
        "w2": torch.randn(HIDDEN, dtype=DOUBLE),
        "noise": torch.tensor(0.7, dtype=DOUBLE),
    }


def fitted(name: str = "network") -> Fit:
    """A posterior of a scattered subnet; nothing here needs a MAP that was trained."""
    x, y = data()
    init = init_to_value(values=start())
    guide = AutoSubnetLaplace(MODELS[name], SUBNETS[name], init_loc_fn=init)
    return Fit(guide.laplace_approximation(x, y), x, y)


def whole(posterior: AutoSubnetMultivariateNormal, theta: Tensor) -> dict[str, Tensor]:
    """Unconstrained values of all sites, by hand."""
    layout, packed = posterior.subnet.layout, posterior.loc.clone()
    packed[posterior.subnet.flat] = theta
    values, start = {}, 0
    for site, shape in zip(layout.names, layout.shapes, strict=True):
        values[site] = packed[start : start + shape.numel()].reshape(shape)
        start += shape.numel()
    return values


def constrained(model: Model, values: dict[str, Tensor], *args: Any) -> dict[str, Any]:
    nodes = poutine.trace(model).get_trace(*args).nodes
    return {site: biject_to(nodes[site]["fn"].support)(u) for site, u in values.items()}


def log_density(hybrid: HybridModel, theta: Tensor, *args: Any) -> Tensor:
    given = poutine.condition(hybrid, data={"subnet": theta})
    return poutine.trace(given).get_trace(*args).log_prob_sum()


# ----------------------------------------------------------------------------------
# What it is.


@pytest.mark.parametrize("name", MODELS)
def test_log_density_is_the_users(name: str) -> None:
    """Equal, not only up to a constant, to Pyro's potential of the user's model."""
    fit = fitted(name)
    hybrid = fit.posterior.hybrid_model()
    potential = initialize_model(MODELS[name], (fit.x, fit.y))[1]
    for distance in (0.0, 0.1, 1.0):
        theta = fit.theta(distance)
        expected = -potential(whole(fit.posterior, theta))
        assert_close(log_density(hybrid, theta, fit.x, fit.y), expected, **SUM)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("linearized", [False, True])
def test_gradient_of_the_log_density(name: str, linearized: bool) -> None:
    """Against differences, along a random direction; at the MAP both models agree."""
    fit = fitted(name)
    hybrid = fit.posterior.hybrid_model(linearized)
    theta = fit.theta().requires_grad_()
    (gradient,) = torch.autograd.grad(log_density(hybrid, theta, fit.x, fit.y), theta)
    step = 1e-5 * torch.randn_like(theta)
    with torch.no_grad():
        ahead = log_density(hybrid, theta + step, fit.x, fit.y)
        behind = log_density(hybrid, theta - step, fit.x, fit.y)
    assert_close((ahead - behind) / 2, gradient @ step, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_linearized_log_density(name: str) -> None:
    """The user's prior, and a likelihood whose parameters dense autograd expands."""
    fit = fitted(name)
    posterior, x, y = fit.posterior, fit.x, fit.y
    hybrid = posterior.hybrid_model(linearized=True)
    theta = fit.theta()

    def likelihood(theta: Tensor) -> tuple[Tensor, Tensor]:
        sites = constrained(MODELS[name], whole(posterior, theta), x, y)
        given = poutine.condition(MODELS[name], data=sites)
        fn = poutine.trace(given).get_trace(x, y).nodes["y"]["fn"]
        return fn.loc, fn.scale.log()

    loc = posterior.get_posterior().loc
    at_map = likelihood(loc)
    jac = torch.autograd.functional.jacobian(likelihood, loc)
    mean, log_scale = (
        value + part @ (theta - loc) for value, part in zip(at_map, jac, strict=True)
    )
    weight = 2.0 if name == "subsampled" else 1.0
    linear = weight * dist.Normal(mean, log_scale.exp()).log_prob(y).sum()
    own_loc, own_log_scale = likelihood(theta)
    own = weight * dist.Normal(own_loc, own_log_scale.exp()).log_prob(y).sum()
    potential = initialize_model(MODELS[name], (x, y))[1]
    expected = linear - own - potential(whole(posterior, theta))
    assert_close(log_density(hybrid, theta, x, y), expected, **AUTOGRAD)


@pytest.mark.usefixtures("no_guides_of_other_tests")
@pytest.mark.parametrize("linearized", [False, True])
def test_one_latent_site_and_the_rest_parameters(linearized: bool) -> None:
    fit = fitted()
    hybrid = fit.posterior.hybrid_model(linearized)
    pyro.clear_param_store()
    trace = poutine.trace(hybrid).get_trace(fit.x, fit.y)
    kinds = {
        name: node["type"]
        for name, node in trace.nodes.items()
        if node["type"] in ("sample", "param") and not site_is_subsample(node)
    }
    params = {"hybrid.w1", "hybrid.w2", "hybrid.noise"}  # "scale" is chosen whole
    assert kinds == {
        "subnet": "sample",
        "f": "sample",
        "y": "sample",
        **dict.fromkeys(params, "param"),
    }
    assert [n for n in trace.stochastic_nodes if n == "subnet"] == ["subnet"]
    assert trace.nodes["subnet"]["value"].shape == (4,)
    median = fit.posterior.median()
    store = pyro.get_param_store()
    assert set(store.keys()) == params
    for key in params:
        site = key.removeprefix("hybrid.")
        assert_close(store[key].detach(), median[site], **EQUAL)


def test_values_and_return_are_the_users() -> None:
    fit = fitted()
    theta = fit.theta(1.0)
    hybrid = fit.posterior.hybrid_model()
    found = poutine.condition(hybrid, data={"subnet": theta})(fit.x)
    sites = constrained(network, whole(fit.posterior, theta), fit.x)
    assert_close(found, poutine.condition(network, data=sites)(fit.x), **SUM)


def test_draws_of_its_prior_are_the_users() -> None:
    """The very numbers, from the same seed."""
    fit = fitted("awkward")
    hybrid = fit.posterior.hybrid_model()
    pyro.set_rng_seed(4)
    theta = poutine.trace(hybrid).get_trace(fit.x, fit.y).nodes["subnet"]["value"]
    pyro.set_rng_seed(4)
    nodes = poutine.trace(awkward).get_trace(fit.x, fit.y).nodes
    expected = [
        biject_to(nodes[site]["fn"].support).inv(nodes[site]["value"]).flatten()[at]
        for site, at in fit.posterior.subnet.indices.items()
    ]
    assert_close(theta, torch.cat(expected), **SUM)


def test_log_density_of_many_values_at_once() -> None:
    fit = fitted()
    hybrid = fit.posterior.hybrid_model()
    fn = poutine.trace(hybrid).get_trace(fit.x, fit.y).nodes["subnet"]["fn"]
    rows = torch.stack([fit.theta() for _ in range(6)])
    expected = torch.stack([fn.log_prob(row) for row in rows])
    assert_close(fn.log_prob(rows.reshape(2, 3, -1)), expected.reshape(2, 3), **EQUAL)
    assert_close(fn.log_prob(rows[:1]), expected[:1], **EQUAL)
    assert fn.sample(torch.Size([2, 3])).shape == (2, 3, 4)


@pytest.mark.parametrize(
    ("batch", "value"),
    [
        ((5,), ()),
        ((3, 1), ()),
        ((4, 1), (4,)),  # draws in parallel, without the axes of inner plates
        ((3, 2), (2,)),
        ((3, 1), (3, 2)),
        ((1,), (2, 3)),
    ],
)
def test_log_density_has_the_shape_of_the_batch(
    batch: tuple[int, ...], value: tuple[int, ...]
) -> None:
    """Each draw's own number, wherever it stands."""
    fit = fitted()
    hybrid = fit.posterior.hybrid_model()
    fn = poutine.trace(hybrid).get_trace(fit.x, fit.y).nodes["subnet"]["fn"]
    rows = torch.stack([fit.theta() for _ in range(math.prod(value))])
    each = torch.stack([fn.log_prob(row) for row in rows])
    assert len(each.unique()) == len(each)
    found = fn.expand(batch).log_prob(rows.reshape(*value, -1))
    if math.prod(value) == math.prod(batch):
        expected = each.reshape(batch)
    else:
        shape = torch.broadcast_shapes(value, batch)
        expected = each.reshape(value).expand(shape)
    assert_close(found, expected, **EQUAL)


# ----------------------------------------------------------------------------------
# The param store, copies and pickles.


@pytest.mark.usefixtures("no_guides_of_other_tests")
def test_two_live_models_do_not_share_parameters() -> None:
    first, second = fitted(), fitted()
    a, b = first.posterior.hybrid_model(), second.posterior.hybrid_model()
    a(first.x, first.y)
    b(second.x, second.y)
    store = pyro.get_param_store()
    assert_close(store["hybrid.w1"], first.posterior.median()["w1"], **EQUAL)
    assert_close(store["hybrid_1.w1"], second.posterior.median()["w1"], **EQUAL)


@pytest.mark.usefixtures("no_guides_of_other_tests")
def test_a_dead_models_parameters_are_not_taken_up() -> None:
    first, second = fitted(), fitted()
    hybrid = first.posterior.hybrid_model()
    hybrid(first.x, first.y)
    del hybrid
    again = second.posterior.hybrid_model()
    again(second.x, second.y)
    store = pyro.get_param_store()
    assert_close(store["hybrid.w1"], second.posterior.median()["w1"], **EQUAL)


@pytest.mark.parametrize("cleared", [False, True])
@pytest.mark.parametrize("copied", [False, True])
def test_a_model_that_is_gone_gives_its_parameters_back(
    copied: bool, cleared: bool
) -> None:
    fit = fitted()
    pyro.param("hybrid_mine", torch.ones(()))
    kept = fit.posterior.hybrid_model()
    theta = fit.theta()
    expected = log_density(kept, theta, fit.x, fit.y)
    before = set(pyro.get_param_store().keys())
    for _ in range(3):
        hybrid = fit.posterior.hybrid_model()
        hybrid = copy.deepcopy(hybrid) if copied else hybrid
        assert_close(log_density(hybrid, theta, fit.x, fit.y), expected, **EQUAL)
        assert set(pyro.get_param_store().keys()) > before
        if cleared:
            pyro.clear_param_store()
            before = set()
        del hybrid
        gc.collect()
        assert set(pyro.get_param_store().keys()) == before
    assert_close(log_density(kept, theta, fit.x, fit.y), expected, **EQUAL)


@pytest.mark.parametrize("linearized", [False, True])
@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_a_copy_is_the_same_model(
    linearized: bool, copy_of: Callable[[HybridModel], HybridModel]
) -> None:
    fit = fitted()
    hybrid = fit.posterior.hybrid_model(linearized)
    theta = fit.theta()
    expected = log_density(hybrid, theta, fit.x, fit.y)
    again = copy_of(hybrid)
    pyro.get_param_store()["hybrid.w2"] = torch.zeros(HIDDEN, dtype=DOUBLE)
    assert_close(log_density(again, theta, fit.x, fit.y), expected, **EQUAL)
    assert not torch.equal(log_density(hybrid, theta, fit.x, fit.y), expected)


def test_parameters_can_be_trained_with_a_guide() -> None:
    """Variational EM: the weights outside the subnet are parameters like any other."""
    fit = fitted()
    hybrid = fit.posterior.hybrid_model()
    guide = AutoNormal(hybrid, init_loc_fn=init_to_value(values=hybrid.guide.median()))
    svi = SVI(hybrid, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    losses = [svi.step(fit.x, fit.y) for _ in range(40)]
    store = pyro.get_param_store()
    assert math.isfinite(losses[-1])
    for site in ("w1", "w2", "noise"):
        moved = store[f"hybrid.{site}"].detach() - fit.posterior.median()[site]
        assert float(moved.abs().max()) > 1e-3, site
    # The density follows them.
    theta = fit.theta()
    values = whole(fit.posterior, theta)
    values["w2"] = store["hybrid.w2"].detach()
    values["noise"] = store["hybrid.noise"].detach().log()
    chosen = fit.posterior.subnet.indices["w1"]
    w1 = store["hybrid.w1"].detach().flatten().clone()
    w1[chosen] = values["w1"].flatten()[chosen]
    values["w1"] = w1.reshape(HIDDEN, INPUTS)
    potential = initialize_model(network, (fit.x, fit.y))[1]
    found = log_density(hybrid, theta, fit.x, fit.y)
    assert_close(found, -potential(values), **SUM)


# ----------------------------------------------------------------------------------
# Pyro's inference on it.


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("linearized", [False, True])
def test_predictive_with_its_guide(linearized: bool, parallel: bool) -> None:
    """Each draw's outputs are the user's model's, or its expansion's, at that draw."""
    fit = fitted()
    hybrid = fit.posterior.hybrid_model(linearized)
    drawn = Predictive(hybrid.guide, num_samples=6)(fit.x)["subnet"].reshape(6, 4)
    samples = {"subnet": drawn}
    found = Predictive(hybrid, samples, parallel=parallel)(fit.x)
    assert set(found) == {"f", "y"}
    user = fit.posterior.linearized_model if linearized else network
    for k in range(6):
        sites = constrained(network, whole(fit.posterior, drawn[k]), fit.x)
        expected = poutine.condition(user, data=sites)(fit.x)
        assert_close(found["f"][k].reshape(N), expected, **SUM)
    both = Predictive(hybrid, guide=hybrid.guide, num_samples=5, parallel=parallel)
    shapes = {name: value.numel() for name, value in both(fit.x).items()}
    assert shapes == {"subnet": 5 * 4, "f": 5 * N, "y": 5 * N}


def plated(x: Tensor, y: Tensor | None = None) -> None:
    """Sites without batch dimensions of their own, and with one in a plate."""
    one = torch.ones((), dtype=DOUBLE)
    slope = pyro.sample("slope", dist.Normal(one, one))
    noise = pyro.sample("noise", dist.LogNormal(0 * one, one))
    corr = pyro.sample("corr", dist.LKJCholesky(INPUTS, one))
    w = pyro.sample("w", normal(INPUTS, HIDDEN))
    with pyro.plate("units", HIDDEN):
        v = pyro.sample("v", dist.Normal(0 * one, one))
        shift = pyro.sample("shift", dist.Normal(0 * one, 1.0).expand([HIDDEN]))
    hidden = (x @ corr @ w).tanh() + shift.unsqueeze(-2)
    f = slope * (hidden @ v.unsqueeze(-1)).squeeze(-1)
    with pyro.plate("data", len(x)):
        pyro.deterministic("upper", f + noise)
        pyro.sample("y", dist.Normal(f, noise), obs=y)


@pytest.mark.parametrize("num_draws", [1, INPUTS, HIDDEN, N])
@pytest.mark.parametrize("linearized", [False, True])
@pytest.mark.parametrize(
    "subnet",
    [
        None,
        {"slope": torch.arange(1), "v": torch.tensor([0, 2])},
        {"noise": torch.arange(1), "corr": torch.tensor([1])},
        {"shift": torch.tensor([3, 1]), "w": torch.tensor([3])},
    ],
)
def test_draws_in_parallel_are_those_in_sequence(
    subnet: Any, linearized: bool, num_draws: int
) -> None:
    """Also as many as there are data, or elements in a plate, which would broadcast."""
    x, y = data()
    guide = AutoSubnetLaplace(plated, subnet)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedWarning)
        posterior = guide.laplace_approximation(x, y)
    hybrid = posterior.hybrid_model(linearized)
    loc = posterior.get_posterior().loc
    theta = loc + 0.1 * torch.randn(num_draws, len(loc), dtype=DOUBLE)
    expected = Predictive(hybrid, {"subnet": theta})(x)["upper"]
    # `Predictive` with a guide returns draws with the axis of the data's plate; on
    # these the user's own code would have to be written for it.
    for drawn in (theta, theta.unsqueeze(1))[: 1 + linearized]:
        found = Predictive(hybrid, {"subnet": drawn}, parallel=True)(x)["upper"]
        assert_close(found.reshape(expected.shape), expected, **SUM)


def in_columns(x: Tensor, y: Tensor | None = None) -> None:
    """Its data in a plate that is not the last dimension."""
    w = pyro.sample("w", normal(INPUTS, 1))
    f = pyro.deterministic("f", (x @ w).tanh())
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("y", dist.Normal(f, 0.5), obs=y)


@pytest.mark.parametrize("model", [plated, in_columns])
def test_an_elbo_of_vectorized_particles(model: Model) -> None:
    """Each particle counts once: of a guide without a spread all have one value."""
    x, y = data()
    y = y if model is plated else y.unsqueeze(-1)
    guide = AutoSubnetLaplace(model, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedWarning)
        hybrid = guide.laplace_approximation(x, y).hybrid_model(linearized=True)
    theta = hybrid.initial_params()["subnet"] + 0.1

    def at_theta(x: Tensor, y: Tensor) -> None:
        pyro.sample("subnet", dist.Delta(theta, event_dim=1))

    expected = Trace_ELBO().loss(hybrid, at_theta, x, y)
    found = Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=2)
    assert found.loss(hybrid, at_theta, x, y) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("linearized", [False, True])
def test_draws_in_parallel_on_data_in_columns(linearized: bool) -> None:
    x, y = data()
    guide = AutoSubnetLaplace(in_columns, {"w": torch.tensor([2, 0])})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedWarning)
        posterior = guide.laplace_approximation(x, y.unsqueeze(-1))
    hybrid = posterior.hybrid_model(linearized)
    theta = torch.randn(N, 2, dtype=DOUBLE)
    in_sequence, in_parallel = (
        Predictive(hybrid, {"subnet": theta}, parallel=parallel)(x)
        for parallel in (False, True)
    )
    assert in_parallel["y"].shape == in_sequence["y"].shape == (N, N, 1)
    expected = in_sequence["f"].reshape(N, N)
    assert_close(in_parallel["f"].reshape(N, N), expected, **SUM)


def test_predictive_holds_draws_of_the_subnet_alone() -> None:
    """K x S numbers, where the posterior guide shows K x D."""
    net = nn.Sequential(nn.Linear(3, 400), nn.Tanh(), nn.Linear(400, 2)).to(DOUBLE)
    bnn = bayesianize(net)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        f = bnn(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(f, 1.0).to_event(1), obs=y)

    x = torch.randn(N, 3, dtype=DOUBLE)
    init = init_to_module(net)
    guide = AutoSubnetLaplace(model, RandomSubnet(10), init_loc_fn=init)
    posterior = guide.laplace_approximation(x, torch.randn(N, 2, dtype=DOUBLE))
    hybrid, num_samples = posterior.hybrid_model(), 3
    whole_guide = Predictive(model, guide=posterior, num_samples=num_samples)(x)
    hybrid_guide = Predictive(hybrid, guide=hybrid.guide, num_samples=num_samples)(x)
    outputs = num_samples * N * 2
    num_params = posterior.subnet.num_params
    assert sum(v.numel() for v in hybrid_guide.values()) == num_samples * 10 + outputs
    assert sum(v.numel() for v in whole_guide.values()) >= num_samples * num_params


@pytest.mark.parametrize("linearized", [False, True])
def test_importance_weights(linearized: bool) -> None:
    fit = fitted()
    hybrid = fit.posterior.hybrid_model(linearized)
    run = Importance(hybrid, guide=hybrid.guide, num_samples=7).run(fit.x, fit.y)
    q = fit.posterior.get_posterior()
    for weight, trace in zip(run.log_weights, run.exec_traces, strict=True):
        theta = trace.nodes["subnet"]["value"]
        expected = log_density(hybrid, theta, fit.x, fit.y) - q.log_prob(theta)
        assert_close(torch.as_tensor(weight).to(DOUBLE), expected.detach(), **SUM)


@pytest.mark.parametrize("parallel", [False, True])
def test_weighed_predictive(parallel: bool) -> None:
    fit = fitted()
    hybrid = fit.posterior.hybrid_model()
    weighed = WeighedPredictive(
        hybrid, guide=hybrid.guide, num_samples=6, parallel=parallel
    )
    found = weighed(fit.x, fit.y)
    q = fit.posterior.get_posterior()
    thetas = found.samples["subnet"].reshape(6, 4)
    joint = torch.stack([log_density(hybrid, t, fit.x, fit.y) for t in thetas])
    assert_close(found.log_weights.reshape(6), joint - q.log_prob(thetas), **SUM)


def regression(x: Tensor, y: Tensor | None = None) -> None:
    """Gaussian noise and priors: linearized, its exact posterior is the Laplace one."""
    w1 = pyro.sample("w1", normal(HIDDEN, INPUTS))
    b1 = pyro.sample("b1", normal(HIDDEN))
    w2 = pyro.sample("w2", normal(HIDDEN))
    f = (x @ w1.mT + b1).tanh() @ w2
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(f, 0.5), obs=y)


def regression_fit() -> Fit:
    x = torch.randn(30, INPUTS, dtype=DOUBLE)
    y = torch.sin(2 * x[:, 0]) + 0.5 * torch.randn(30, dtype=DOUBLE)
    guide = AutoSubnetLaplace(regression)
    svi = SVI(regression, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(1500):
        svi.step(x, y)
    return Fit(guide.laplace_approximation(x, y), x, y)


def test_nuts_on_the_linearized_model_finds_the_posterior() -> None:
    """All S = 20 weights: whitened, the draws have mean 0 and covariance 1.

    Standard errors are those of the autocorrelated chain (effective sample sizes of x
    and of its products), Bonferroni over all entries; the seed is fixed.
    """
    fit = regression_fit()
    hybrid = fit.posterior.hybrid_model(linearized=True)
    mcmc = MCMC(
        hybrid.nuts(),
        num_samples=300,
        warmup_steps=60,
        initial_params=hybrid.initial_params(),
        disable_progbar=True,
    )
    mcmc.run(fit.x, fit.y)
    gaussian = fit.posterior.gaussian
    draws = mcmc.get_samples()["subnet"] - gaussian.loc
    white = draws @ gaussian.precision_tril.tril()
    size = white.shape[1]
    rows, columns = torch.tril_indices(size, size)
    products = white[:, rows] * white[:, columns]
    expected = torch.cat([torch.zeros(size), (rows == columns).double()])
    found = torch.cat([white, products], dim=1)
    # Of each column; a chain that swings to and fro counts as independent draws.
    effective = pyro.ops.stats.effective_sample_size(found[None]).clamp(max=len(found))
    error = found.std(0) / effective.sqrt()
    limit = num_standard_errors(found.shape[1])
    assert float(((found.mean(0) - expected) / error).abs().max()) < limit


def sine(x: Tensor, y: Tensor | None = None) -> Tensor:
    w = pyro.sample("w", normal(1, 10))
    b = pyro.sample("b", normal(10))
    v = pyro.sample("v", normal(10))
    f = pyro.deterministic("f", torch.tanh(x @ w + b) @ v)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(f, 0.1), obs=y)
    return f


def test_nuts_on_the_network_is_the_yardstick() -> None:
    """The linearized Laplace predictive against the exact one of the same subnet.

    At inputs among the data: means apart by less than half a standard deviation, and
    standard deviations by less than a third (400 draws alone explain a tenth).
    """
    x = torch.rand(200, 1, dtype=DOUBLE) * 4 - 2
    y = torch.sin(2 * x).squeeze(-1) + 0.1 * torch.randn(200, dtype=DOUBLE)
    guide = AutoSubnetLaplace(sine, subnet=0.2)
    svi = SVI(sine, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(1500):
        svi.step(x, y)
    posterior = guide.laplace_approximation(x, y)
    hybrid = posterior.hybrid_model()
    mcmc = MCMC(
        hybrid.nuts(),
        num_samples=400,
        warmup_steps=100,
        initial_params=hybrid.initial_params(),
        disable_progbar=True,
    )
    mcmc.run(x, y)
    inputs = torch.linspace(-1.8, 1.8, 13, dtype=DOUBLE).unsqueeze(-1)
    exact = Predictive(hybrid, mcmc.get_samples())(inputs)["f"].reshape(400, 13)
    laplace = posterior.output_distribution(inputs)
    spread = laplace.variance.squeeze(-1).sqrt()
    mean = laplace.mean.squeeze(-1)
    assert float(((exact.mean(0) - mean) / spread).abs().max()) < 0.5
    assert float((exact.std(0) / spread).log().abs().max()) < math.log(4 / 3)


def test_a_plain_kernel_runs() -> None:
    """And one whose mass matrix adapts from the posterior's."""
    fit = fitted()
    hybrid = fit.posterior.hybrid_model()
    adaptive = hybrid.nuts(adapt_mass_matrix=True, max_tree_depth=4)
    for kernel in (NUTS(hybrid, max_tree_depth=4), adaptive):
        mcmc = MCMC(kernel, num_samples=5, warmup_steps=12, disable_progbar=True)
        mcmc.run(fit.x, fit.y)
        assert mcmc.get_samples()["subnet"].shape == (5, 4)


@pytest.mark.skipif(IS_1, reason="ArviZ 1.x reads no runs of Pyro's MCMC")
def test_arviz_reads_a_chain() -> None:
    fit = fitted("subsampled")
    hybrid = fit.posterior.hybrid_model()
    mcmc = MCMC(hybrid.nuts(), num_samples=6, warmup_steps=4, disable_progbar=True)
    mcmc.run(fit.x, fit.y)
    read = arviz.from_pyro(mcmc, log_likelihood=False)
    draws = mcmc.get_samples()["subnet"]
    assert_close(torch.as_tensor(read.posterior["subnet"].values[0]), draws, **EQUAL)
    assert_close(torch.as_tensor(read.observed_data["y"].values), fit.y, **EQUAL)


def test_chains_start_at_the_map_or_around_it() -> None:
    fit = fitted()
    hybrid = fit.posterior.hybrid_model()
    loc = fit.posterior.get_posterior().loc
    assert_close(hybrid.initial_params()["subnet"], loc, **EQUAL)
    assert hybrid.initial_params(3)["subnet"].shape == (3, 4)
    with pytest.raises(OptionError, match="must be positive; got 0"):
        hybrid.initial_params(0)


def test_the_guide_answers_as_autoguides_do() -> None:
    fit = fitted()
    guide, q = fit.posterior.hybrid_model().guide, fit.posterior.get_posterior()
    assert_close(guide.median()["subnet"], q.loc, **EQUAL)
    low, high = guide.quantiles([0.025, 0.975])["subnet"]
    level = q.loc.new_tensor(0.975)
    expected = q.loc + dist.Normal(0 * level, 1.0).icdf(level) * q.variance.sqrt()
    assert_close(high, expected, **SUM)
    assert_close(low + high, 2 * q.loc, **SUM)
    assert_close(guide.get_posterior().precision_matrix, q.precision_matrix, **EQUAL)
