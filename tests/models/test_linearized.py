"""The linearized model: its outputs against dense first-order expansions.

The oracle is the user's network as a plain torch function, expanded with autograd's
dense Jacobian in the sites' unconstrained values; it never sees Pyro or the package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor
from torch.distributions import Distribution
from torch.nn import functional as F
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.exceptions import ChoiceWarning, DataCountWarning, ModelError
from tests.tolerances import FALSE_ALARM_RATE, tolerance

Model = Callable[..., Any]
Values = Mapping[str, Tensor]

EXACT = tolerance(torch.float64, "closed_form")
NUM_DATA, NUM_INPUTS, NUM_HIDDEN = 5, 3, 4
K = 6
# Of a call whose Jacobian is known: one reads it, one has its outputs put in place.
RUNS_AT_MAP = 1
BOTH_MODES = pytest.mark.parametrize("parallel", [False, True])


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def normal(*shape: int, scale: float = 1.0) -> dist.TorchDistribution:
    zero = torch.zeros(shape, dtype=torch.float64)
    return dist.Normal(zero, scale).to_event(len(shape))


def shapes(num_outputs: int) -> dict[str, tuple[int, ...]]:
    return {
        "w1": (NUM_HIDDEN, NUM_INPUTS),
        "b1": (NUM_HIDDEN,),
        "w2": (num_outputs, NUM_HIDDEN),
    }


def network(weights: Values, x: Tensor) -> Tensor:
    """Plain layers: they cannot run on a batch of weights."""
    hidden = F.linear(x, weights["w1"], weights["b1"]).tanh()
    return F.linear(hidden, weights["w2"])


def random_values(num_outputs: int) -> dict[str, Tensor]:
    return {site: double(*shape) for site, shape in shapes(num_outputs).items()}


def fitted(
    model: Model, at: Values, *args: Any, subnet: Any = None, **kwargs: Any
) -> AutoSubnetMultivariateNormal:
    guide = AutoSubnetLaplace(model, subnet, init_loc_fn=init_to_value(values=at))
    return guide.laplace_approximation(*args, **kwargs)


def expansion(
    function: Callable[[Values], Tensor], at: Values, values: Values
) -> Tensor:
    """f(at) + J (values - at), with the dense Jacobian."""
    names = list(at)
    jacobians = torch.autograd.functional.jacobian(
        lambda *leaves: function(dict(zip(names, leaves, strict=True))),
        tuple(at.values()),
    )
    result = function(at).detach()
    for name, jac in zip(names, jacobians, strict=True):
        step = (values[name] - at[name]).flatten()
        result = result + jac.reshape(*result.shape, -1) @ step
    return result


def spread_draws(values: list[Values]) -> dict[str, Tensor]:
    """Draws stacked left of a data plate at dimension -1: (K, 1, *event)."""
    return {
        site: torch.stack([value[site] for value in values]).unsqueeze(1)
        for site in values[0]
    }


def run(model: Model, values: Values, *args: Any, **kwargs: Any) -> poutine.Trace:
    conditioned = poutine.condition(model, data=dict(values))
    trace = poutine.trace(conditioned).get_trace(*args, **kwargs)
    trace.compute_log_prob()
    return trace


def run_batched(
    model: Model, values: list[Values], *args: Any, **kwargs: Any
) -> poutine.Trace:
    """Runs a model at all draws at once, in a plate left of its own."""
    with pyro.plate("draws", len(values), dim=-2):
        return run(model, spread_draws(values), *args, **kwargs)


# ----------------------------------------------------------------------------------
# Families: each by hand, as a distribution of raw outputs f, and as η of f.


def itself(eta: Tensor) -> Tensor:
    return eta


@dataclass(frozen=True)
class Family:
    """How raw outputs become a distribution, and what η is then.

    ``eta`` maps f to η, ``read`` takes η from a distribution, ``canonical`` brings both
    to the same representative where η is not unique.
    """

    num_outputs: int
    head: Callable[[Tensor], Distribution]
    eta: Callable[[Tensor], Tensor]
    read: Callable[[Any], Tensor]
    canonical: Callable[[Tensor], Tensor] = itself


def log_softmax(eta: Tensor) -> Tensor:
    return eta.log_softmax(-1)


SCALE_TRIL = torch.tensor([[0.5, 0.0], [0.2, 0.4]], dtype=torch.float64)
FAMILIES = {
    "normal": Family(
        2,
        head=lambda f: dist.Normal(f, 0.3).to_event(1),
        eta=lambda f: f,
        read=lambda d: d.base_dist.loc,
    ),
    "normal-one-column": Family(
        1,
        head=lambda f: dist.Normal(f.squeeze(-1), 0.3),
        eta=lambda f: f,
        read=lambda d: d.loc.unsqueeze(-1),
    ),
    "heteroscedastic": Family(
        2,
        head=lambda f: dist.Normal(f[..., 0], F.softplus(f[..., 1])),
        eta=lambda f: torch.stack([f[..., 0], F.softplus(f[..., 1]).log()], -1),
        read=lambda d: torch.stack([d.loc, d.scale.log()], -1),
    ),
    "log-normal": Family(
        2,
        head=lambda f: dist.LogNormal(f, 0.3).to_event(1),
        eta=lambda f: f,
        read=lambda d: d.base_dist.loc,
    ),
    "multivariate-normal": Family(
        2,
        head=lambda f: dist.MultivariateNormal(f, scale_tril=SCALE_TRIL),
        eta=lambda f: f,
        read=lambda d: d.loc,
    ),
    "categorical": Family(
        3,
        head=lambda f: dist.Categorical(logits=f),
        eta=lambda f: f,
        read=lambda d: d.logits,
        canonical=log_softmax,
    ),
    "categorical-probs": Family(
        3,
        head=lambda f: dist.Categorical(probs=f.softmax(-1)),
        eta=lambda f: f,
        read=lambda d: d.logits,
        canonical=log_softmax,
    ),
    "one-hot": Family(
        3,
        head=lambda f: dist.OneHotCategorical(logits=f),
        eta=lambda f: f,
        read=lambda d: d.logits,
        canonical=log_softmax,
    ),
    "bernoulli": Family(
        2,
        head=lambda f: dist.Bernoulli(probs=f.sigmoid()).to_event(1),
        eta=lambda f: f,
        read=lambda d: d.base_dist.logits,
    ),
    "binomial": Family(
        1,
        head=lambda f: dist.Binomial(
            torch.tensor(7.0, dtype=torch.float64), logits=f.squeeze(-1)
        ),
        eta=lambda f: f,
        read=lambda d: d.logits.unsqueeze(-1),
    ),
    "poisson": Family(
        1,
        head=lambda f: dist.Poisson(F.softplus(f.squeeze(-1))),
        eta=lambda f: F.softplus(f).log(),
        read=lambda d: d.rate.log().unsqueeze(-1),
    ),
    "gamma": Family(
        2,
        head=lambda f: dist.Gamma(f[..., 0].exp(), F.softplus(f[..., 1])),
        eta=lambda f: torch.stack([f[..., 0], F.softplus(f[..., 1]).log()], -1),
        read=lambda d: torch.stack([d.concentration.log(), d.rate.log()], -1),
    ),
    "student-t": Family(
        1,
        head=lambda f: dist.StudentT(4.0, f.squeeze(-1), 0.5),
        eta=lambda f: f,
        read=lambda d: d.loc.unsqueeze(-1),
    ),
}


class FamilyModel:
    """The network under a family; counts its runs."""

    def __init__(self, family: Family):
        self.family = family
        self.runs = 0

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        self.runs += 1
        weights = {
            site: pyro.sample(site, normal(*shape))
            for site, shape in shapes(self.family.num_outputs).items()
        }
        f = pyro.deterministic("f", network(weights, x))
        with pyro.plate("data", len(x)):
            pyro.deterministic("total", f.sum(-1))
            pyro.sample("y", self.family.head(f), obs=y)
        return f.square()


@dataclass(frozen=True)
class Fit:
    """A posterior, what it was fitted to, and some other values of its sites."""

    family: Family
    posterior: AutoSubnetMultivariateNormal
    x: Tensor
    y: Tensor
    at: Values
    draws: list[Values]

    def outputs(self, values: Values) -> Tensor:
        """η linearized, by the oracle."""
        eta = expansion(
            lambda w: self.family.eta(network(w, self.x)), self.at, dict(values)
        )
        return self.family.canonical(eta)


def fit(name: str) -> Fit:
    family = FAMILIES[name]
    x, at = double(NUM_DATA, NUM_INPUTS), random_values(family.num_outputs)
    y = family.head(network(at, x)).sample()
    posterior = fitted(FamilyModel(family), at, x, y)
    draws = [random_values(family.num_outputs) for _ in range(K)]
    return Fit(family, posterior, x, y, at, draws)


@pytest.fixture(params=FAMILIES)
def family_fit(request: pytest.FixtureRequest) -> Fit:
    return fit(request.param)


def test_one_draw_is_the_expansion(family_fit: Fit) -> None:
    model, x = family_fit.posterior.linearized_model, family_fit.x
    for values in family_fit.draws:
        trace = run(model, values, x)
        read = family_fit.family.read(trace.nodes["y"]["fn"])
        assert_close(read, family_fit.outputs(values), **EXACT)
        f = expansion(lambda w: network(w, x), family_fit.at, values)
        assert_close(trace.nodes["f"]["value"], f, **EXACT)
        assert_close(trace.nodes["total"]["value"], f.sum(-1), **EXACT)
        squared = expansion(lambda w: network(w, x).square(), family_fit.at, values)
        assert_close(trace.nodes["_RETURN"]["value"], squared, **EXACT)


def runs_of(family_fit: Fit, act: Callable[[], Any]) -> int:
    """How often something runs the network."""
    model = family_fit.posterior.user_model
    before = model.runs
    act()
    return model.runs - before


@pytest.mark.parametrize("times", [1, 20])
def test_many_draws_are_the_expansion(family_fit: Fit, times: int) -> None:
    """By a derivative for every draw, and by one Jacobian for all."""
    model, x = family_fit.posterior.linearized_model, family_fit.x
    draws = list(family_fit.draws) * times
    with torch.no_grad():
        trace = run_batched(model, draws, x)
    read = family_fit.family.read(trace.nodes["y"]["fn"])
    expected = torch.stack([family_fit.outputs(values) for values in draws])
    assert_close(read, expected, **EXACT)
    for site, function in [
        ("f", lambda w: network(w, x)),
        ("total", lambda w: network(w, x).sum(-1)),
        ("_RETURN", lambda w: network(w, x).square()),
    ]:
        wanted = torch.stack([expansion(function, family_fit.at, v) for v in draws])
        assert_close(trace.nodes[site]["value"].squeeze(), wanted.squeeze(), **EXACT)
    others = [random_values(family_fit.family.num_outputs) for _ in draws]
    with torch.no_grad():
        more = runs_of(family_fit, lambda: run_batched(model, others, x))
    assert more == RUNS_AT_MAP or times == 1


def agrees(family_fit: Fit, trace: Any, values: Any, x: Tensor) -> None:
    f = expansion(lambda w: network(w, x), family_fit.at, values)
    assert_close(trace.nodes["f"]["value"], f, **EXACT)


def test_the_jacobian_of_a_call_that_comes_again_is_kept() -> None:
    family_fit = fit("normal")
    model = family_fit.posterior.linearized_model

    def runs(x: Tensor, values: Values) -> int:
        """Of the network in one call, which is checked."""

        def call() -> None:
            agrees(family_fit, run(model, values, x), values, x)

        return runs_of(family_fit, call)

    with torch.no_grad():
        x = family_fit.x.clone()
        first, *rest = [runs(x, values) for values in family_fit.draws * 2]
        assert first > RUNS_AT_MAP
        assert rest == [RUNS_AT_MAP] * len(rest)
        # The same numbers elsewhere are another call.
        other = x.clone()
        first, second = [runs(other, values) for values in family_fit.draws[:2]]
        assert first > RUNS_AT_MAP
        assert second == RUNS_AT_MAP
        # So is what was written to.
        other.mul_(0.5)
        first, second = [runs(other, values) for values in family_fit.draws[:2]]
        assert first > RUNS_AT_MAP
        assert second == RUNS_AT_MAP


def test_a_kept_jacobian_grows_with_what_the_draws_move() -> None:
    family_fit = fit("normal")
    model, x = family_fit.posterior.linearized_model, family_fit.x
    first = next(iter(family_fit.at))
    flat = family_fit.at[first].flatten()
    with torch.no_grad():
        for element in (0, 0, 0, len(flat) - 1, len(flat) - 1):
            moved = flat.clone()
            moved[element] += 0.7
            values = {**family_fit.at, first: moved.view_as(family_fit.at[first])}
            agrees(family_fit, run(model, values, x), values, x)


def test_a_model_that_changed_is_expanded_anew() -> None:
    scale = torch.ones((), dtype=torch.float64)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", normal(NUM_INPUTS))
        with pyro.plate("data", len(x)):
            f = pyro.deterministic("f", scale * torch.sin(x @ w))
            pyro.sample("y", dist.Normal(f, 0.5), obs=y)

    x, at = double(NUM_DATA, NUM_INPUTS), {"w": double(NUM_INPUTS)}
    linearized = fitted(model, at, x, double(NUM_DATA)).linearized_model
    values = {"w": double(NUM_INPUTS)}
    with torch.no_grad():
        for factor in (1.0, 1.0, 1.0, 2.0, 2.0, 2.0):
            scale.fill_(factor)
            found = run(linearized, values, x).nodes["f"]["value"]
            wanted = expansion(lambda w: scale * torch.sin(x @ w["w"]), at, values)
            assert_close(found, wanted, **EXACT)


def test_gradients_flow_to_the_inputs_whatever_was_kept() -> None:
    family_fit = fit("normal")
    model, x = family_fit.posterior.linearized_model, family_fit.x.clone()
    values = next(iter(family_fit.draws))
    with torch.no_grad():
        for _ in range(3):
            run(model, values, x)
    x.requires_grad_()
    total = run(model, values, x).nodes["f"]["value"].sum()
    (found,) = torch.autograd.grad(total, x)
    step = {site: value - family_fit.at[site] for site, value in values.items()}
    wanted = torch.func.jvp(lambda w: network(w, x), (dict(family_fit.at),), (step,))
    assert_close(found, torch.autograd.grad(sum(wanted).sum(), x)[0], **EXACT)


def test_at_the_map_it_is_the_model(family_fit: Fit) -> None:
    posterior, x, y = family_fit.posterior, family_fit.x, family_fit.y
    ours = run(posterior.linearized_model, family_fit.at, x, y)
    users = run(posterior.user_model, family_fit.at, x, y)
    assert list(ours.nodes) == list(users.nodes)
    for site, node in users.nodes.items():
        if node["type"] == "sample" and site != "data":
            found = ours.nodes[site]
            assert_close(found["log_prob"], node["log_prob"], **EXACT)
            assert found["fn"].batch_shape == node["fn"].batch_shape
            assert found["fn"].event_shape == node["fn"].event_shape
            assert found["is_observed"] == node["is_observed"]
            assert found["cond_indep_stack"] == node["cond_indep_stack"]


@BOTH_MODES
@pytest.mark.parametrize("name", ["normal", "categorical", "heteroscedastic"])
def test_predictive_runs_unchanged(name: str, parallel: bool) -> None:
    found = fit(name)
    predictive = Predictive(
        found.posterior.linearized_model,
        guide=found.posterior,
        num_samples=K,
        parallel=parallel,
        return_sites=("w1", "b1", "w2", "f", "y", "_RETURN"),
    )
    result = predictive(found.x)
    assert result["y"].shape == (K, *found.y.shape)
    assert result["y"].dtype == found.y.dtype
    for k in range(K):
        weights = {
            site: result[site][k].reshape(value.shape)
            for site, value in found.at.items()
        }
        f = expansion(lambda w: network(w, found.x), found.at, weights)
        assert_close(result["f"][k].reshape(f.shape), f, **EXACT)
        squared = expansion(lambda w: network(w, found.x).square(), found.at, weights)
        assert_close(result["_RETURN"][k].reshape(f.shape), squared, **EXACT)


@BOTH_MODES
def test_predictive_sites_have_pyros_own_shapes(parallel: bool) -> None:
    """Those that ``Predictive`` gives of a model that can run on batched weights."""

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        w, b = pyro.sample("w", normal()), pyro.sample("b", normal())
        with pyro.plate("data", len(x)):
            f = pyro.deterministic("f", (w * x + b).tanh())
            return pyro.sample("y", dist.Normal(f, 0.5), obs=y)

    # as many draws as data: axes that are swapped do not pass for each other
    x, at = double(NUM_DATA), {"w": double(), "b": double()}
    posterior = fitted(model, at, x, double(NUM_DATA))
    shapes_of = []
    for predicted in (model, posterior.linearized_model):
        predictive = Predictive(
            predicted, guide=posterior, num_samples=NUM_DATA, parallel=parallel
        )
        result = predictive(x)
        shapes_of.append({site: value.shape for site, value in result.items()})
    assert shapes_of[0]["y"] == (NUM_DATA, NUM_DATA)
    assert shapes_of[0] == shapes_of[1]


def test_draws_of_labels_differ_between_draws_of_weights() -> None:
    found = fit("normal")
    same = {site: value.expand(K, *value.shape) for site, value in found.at.items()}
    model = found.posterior.linearized_model
    labels = Predictive(model, posterior_samples=same)(found.x)["y"]
    assert len(labels.flatten().unique()) == labels.numel()


# ----------------------------------------------------------------------------------
# What a model may consist of.


def two_headed(x: Tensor, y: Tensor | None = None, n: Tensor | None = None) -> Any:
    """Two observed sites of different families, a count that no weight moves."""
    weights = {site: pyro.sample(site, normal(*s)) for site, s in shapes(3).items()}
    f = network(weights, x)
    count = pyro.deterministic("count", torch.tensor(len(x)))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(f[:, :2], 0.4).to_event(1), obs=y)
        pyro.sample("n", dist.Poisson(f[:, 2].exp()), obs=n)
        pyro.sample(
            "z", dist.Normal(torch.zeros(len(x)).to(f), 1.0), obs=f[:, 0].detach()
        )
    return {"f": f, "pair": (f[:, 0], 3), "count": count, "name": "head"}


def test_labels_that_the_weights_move_stay_and_say_so() -> None:
    """A class made of logits has no derivative; a number of data says nothing."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", normal(NUM_INPUTS, 3))
        logits = pyro.deterministic("logits", x @ w)
        pyro.deterministic("label", logits.argmax(-1))
        pyro.deterministic("count", torch.tensor(len(x)))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    x = double(NUM_DATA, NUM_INPUTS)
    y = torch.arange(NUM_DATA) % 3
    posterior = AutoSubnetLaplace(model, None).laplace_approximation(x, y)
    predict = Predictive(posterior.linearized_model, guide=posterior, num_samples=5)
    message = r"got {'label': torch.int64}, which keep their values at the MAP"
    with pytest.warns(ChoiceWarning, match=message) as caught:
        found = predict(x)
    assert len(caught) == 1
    expected = poutine.condition(model, posterior.median())
    at_map = poutine.trace(expected).get_trace(x).nodes["label"]["value"]
    assert bool((found["label"].reshape(5, -1) == at_map).all())


def two_headed_fit() -> tuple[AutoSubnetMultivariateNormal, Tensor, Values]:
    x, at = double(NUM_DATA, NUM_INPUTS), random_values(3)
    n = torch.poisson(network(at, x)[:, 2].exp())
    return fitted(two_headed, at, x, double(NUM_DATA, 2), n), x, at


def test_several_observed_sites_are_expanded_together() -> None:
    posterior, x, at = two_headed_fit()
    draws = [random_values(3) for _ in range(K)]
    f = [expansion(lambda w: network(w, x), at, values) for values in draws]
    model = posterior.linearized_model
    for values, wanted in zip(draws, f, strict=True):
        trace = run(model, values, x)
        assert_close(trace.nodes["y"]["fn"].base_dist.loc, wanted[:, :2], **EXACT)
        assert_close(trace.nodes["n"]["fn"].rate.log(), wanted[:, 2], **EXACT)
    nodes = run_batched(model, draws, x).nodes
    together = torch.stack(f)
    assert_close(nodes["y"]["fn"].base_dist.loc, together[..., :2], **EXACT)
    assert_close(nodes["n"]["fn"].rate.log(), together[..., 2], **EXACT)


def test_returned_structures_keep_their_form() -> None:
    posterior, x, at = two_headed_fit()
    values = random_values(3)
    f = expansion(lambda w: network(w, x), at, values)
    returned = run(posterior.linearized_model, values, x).nodes["_RETURN"]["value"]
    assert_close(returned["f"], f, **EXACT)
    assert_close(returned["pair"][0], f[:, 0], **EXACT)
    assert returned["pair"][1] == 3
    assert returned["name"] == "head"
    assert returned["count"] == NUM_DATA
    assert not returned["count"].is_floating_point()


def test_a_deterministic_site_is_not_linearized_twice() -> None:
    """Each value is expanded by itself, from the model at the MAP.

    Were the expanded rate handed on to the likelihood, its log would be expanded again.
    """

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        weights = {site: pyro.sample(site, normal(*s)) for site, s in shapes(1).items()}
        rate = pyro.deterministic("rate", network(weights, x).squeeze(-1).exp())
        root = pyro.deterministic("root", rate.sqrt())
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Poisson(root.square()), obs=y)
        return root

    x, at = double(NUM_DATA, NUM_INPUTS), random_values(1)
    rate = network(at, x).squeeze(-1).exp()
    posterior = fitted(model, at, x, torch.poisson(rate))
    values = {site: value + 0.1 * double(*value.shape) for site, value in at.items()}
    f = expansion(lambda w: network(w, x).squeeze(-1), at, values)
    tangent = f - rate.log()
    trace = run(posterior.linearized_model, values, x)
    assert_close(trace.nodes["y"]["fn"].rate.log(), f, **EXACT)
    assert_close(trace.nodes["rate"]["value"], rate * (1 + tangent), **EXACT)
    root = rate.sqrt() * (1 + tangent / 2)
    assert_close(trace.nodes["root"]["value"], root, **EXACT)
    assert_close(trace.nodes["_RETURN"]["value"], root, **EXACT)


def test_keyword_arguments_and_several_inputs() -> None:
    def model(x: Tensor, *, shift: Tensor, y: Tensor | None = None) -> None:
        weights = {site: pyro.sample(site, normal(*s)) for site, s in shapes(2).items()}
        f = network(weights, x) * shift
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(f, 0.4).to_event(1), obs=y)

    x, at, shift = double(NUM_DATA, NUM_INPUTS), random_values(2), double(2)
    posterior = fitted(model, at, x, shift=shift, y=double(NUM_DATA, 2))
    values, other = random_values(2), double(NUM_DATA + 2, NUM_INPUTS)
    trace = run(posterior.linearized_model, values, other, shift=shift)
    expected = expansion(lambda w: network(w, other) * shift, at, values)
    assert_close(trace.nodes["y"]["fn"].base_dist.loc, expected, **EXACT)


@pytest.mark.filterwarnings("ignore::pyro_subnet.exceptions.MonteCarloFisherWarning")
def test_a_family_without_a_closed_form_is_expanded_as_well() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        weights = {site: pyro.sample(site, normal(*s)) for site, s in shapes(2).items()}
        f = network(weights, x)
        with pyro.plate("data", len(x)):
            family = dist.ZeroInflatedPoisson(f[:, 0].exp(), gate_logits=f[:, 1])
            pyro.sample("y", family, obs=y)

    x, at = double(NUM_DATA, NUM_INPUTS), random_values(2)
    y = torch.tensor([0.0, 2.0, 0.0, 1.0, 5.0], dtype=torch.float64)
    posterior = fitted(model, at, x, y)
    draws = [random_values(2) for _ in range(K)]
    f = torch.stack([expansion(lambda w: network(w, x), at, v) for v in draws])
    fn = run_batched(posterior.linearized_model, draws, x).nodes["y"]["fn"]
    expected = dist.ZeroInflatedPoisson(f[..., 0].exp(), gate_logits=f[..., 1])
    assert_close(fn.log_prob(y), expected.log_prob(y), **EXACT)


# ----------------------------------------------------------------------------------
# Linear models: the linearized model is the model itself.


def linear_model(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Linear in unconstrained space; scaled, masked, in a plate."""
    w = pyro.sample("w", normal(2, NUM_INPUTS, scale=0.7))
    b = pyro.sample("b", normal(2))
    f = F.linear(x, w, b)
    mask = torch.arange(len(x)) != 1
    with pyro.plate("data", len(x)), poutine.scale(scale=2.5), poutine.mask(mask=mask):
        inner = torch.tensor([[True, True]] * (len(x) - 1) + [[True, False]])
        pyro.sample("y", dist.Normal(f, 0.6).mask(inner).to_event(1), obs=y)
    return f


def linear_values() -> dict[str, Tensor]:
    return {"w": double(2, NUM_INPUTS), "b": double(2)}


def linear_fit() -> tuple[AutoSubnetMultivariateNormal, Tensor, Tensor]:
    x, y = double(NUM_DATA, NUM_INPUTS), double(NUM_DATA, 2)
    return fitted(linear_model, linear_values(), x, y), x, y


def assert_same_densities(
    ours: poutine.Trace, users: list[poutine.Trace], sites: list[str]
) -> None:
    """Log densities of a batched trace are those of the user's model, draw by draw."""
    for site in sites:
        per_draw = torch.stack([t.nodes[site]["log_prob"].sum() for t in users])
        found = ours.nodes[site]["log_prob"]
        assert found.shape[0] == len(users), (site, found.shape)
        assert_close(found.reshape(len(users), -1).sum(-1), per_draw, **EXACT)


def test_a_linear_model_is_its_own_linearization() -> None:
    posterior, x, y = linear_fit()
    draws = [linear_values() for _ in range(K)]
    users = [run(linear_model, values, x, y) for values in draws]
    model = posterior.linearized_model
    for values, user in zip(draws, users, strict=True):
        ours = run(model, values, x, y)
        for site in ("w", "b", "y"):
            found, wanted = ours.nodes[site], user.nodes[site]
            assert_close(found["log_prob"], wanted["log_prob"], **EXACT)
        returned = ours.nodes["_RETURN"]["value"]
        assert_close(returned, user.nodes["_RETURN"]["value"], **EXACT)
    assert_same_densities(run_batched(model, draws, x, y), users, ["w", "b", "y"])


def test_a_subsampling_plate_keeps_its_scale() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", normal(NUM_INPUTS))
        with pyro.plate("data", len(x), subsample_size=2) as index:
            pyro.sample("y", dist.Normal(x[index] @ w, 0.5), obs=y[index])

    x, y = double(NUM_DATA, NUM_INPUTS), double(NUM_DATA)
    with pytest.warns(DataCountWarning, match="draws a subsample of its own"):
        posterior = fitted(model, {"w": double(NUM_INPUTS)}, x, y)
    values = {"w": double(NUM_INPUTS)}
    trace = run(posterior.linearized_model, values, x, y)
    node, index = trace.nodes["y"], trace.nodes["data"]["value"]
    assert node["scale"] == NUM_DATA / 2
    loc = x[index] @ values["w"]
    assert_close(node["fn"].loc, loc, **EXACT)
    expected = NUM_DATA / 2 * dist.Normal(loc, 0.5).log_prob(y[index])
    assert_close(node["log_prob"], expected, **EXACT)


def test_masks_and_scales_survive_in_a_network() -> None:
    mask = torch.tensor([True, False, True, True, False])

    def model(x: Tensor, y: Tensor | None = None) -> None:
        weights = {site: pyro.sample(site, normal(*s)) for site, s in shapes(2).items()}
        f = network(weights, x)
        with pyro.plate("data", len(x)), poutine.scale(scale=0.25):
            family = dist.Normal(f, 0.6).to_event(1).mask(mask)
            pyro.sample("y", family, obs=y)

    x, at, y = double(NUM_DATA, NUM_INPUTS), random_values(2), double(NUM_DATA, 2)
    posterior = fitted(model, at, x, y)
    values = random_values(2)
    f = expansion(lambda w: network(w, x), at, values)
    wanted = dist.Normal(f, 0.6).to_event(1).log_prob(y).where(mask, 0.0) * 0.25
    node = run(posterior.linearized_model, values, x, y).nodes["y"]
    assert_close(node["log_prob"], wanted, **EXACT)


def evidence(x: Tensor, y: Tensor) -> Tensor:
    """Log evidence of y = X w + noise under a standard normal prior on w."""
    covariance = x @ x.mT + 0.25 * torch.eye(len(x), dtype=x.dtype)
    return dist.MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y)


@pytest.mark.parametrize("vectorized", [False, True])
def test_elbo_of_the_exact_posterior_is_the_evidence(vectorized: bool) -> None:
    """log p(y, w) - log q(w) is the same for every w: no Monte Carlo error at all."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", normal(NUM_INPUTS))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    x, y = double(NUM_DATA, NUM_INPUTS), double(NUM_DATA)
    solved = torch.linalg.solve(
        x.mT @ x + 0.25 * torch.eye(NUM_INPUTS, dtype=x.dtype), x.mT @ y
    )
    posterior = fitted(model, {"w": solved}, x, y)
    elbo = Trace_ELBO(
        num_particles=4, vectorize_particles=vectorized, max_plate_nesting=1
    )
    loss = elbo.loss(posterior.linearized_model, posterior, x, y)
    assert_close(torch.tensor(loss, dtype=x.dtype), -evidence(x, y), **EXACT)


@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("name", ["normal", "categorical", "poisson"])
def test_elbo_of_a_network_is_finite(name: str, vectorized: bool) -> None:
    found = fit(name)
    elbo = Trace_ELBO(
        num_particles=3, vectorize_particles=vectorized, max_plate_nesting=1
    )
    model, posterior = found.posterior.linearized_model, found.posterior
    loss = elbo.loss(model, posterior, found.x, found.y)
    assert torch.tensor(loss).isfinite()


# ----------------------------------------------------------------------------------
# Priors.


def hierarchical(x: Tensor, y: Tensor | None = None) -> Tensor:
    """A chain tau -> scale -> weights, a mean of its own, correlated output weights."""
    one = torch.ones((), dtype=torch.float64)
    tau = pyro.sample("tau", dist.HalfCauchy(one))
    scale = pyro.sample("scale", dist.LogNormal(0.0 * one, tau))
    mean = pyro.sample("mean", normal(NUM_HIDDEN))
    wide = torch.ones(NUM_HIDDEN, NUM_INPUTS, dtype=torch.float64)
    w1 = pyro.sample("w1", dist.Normal(0.0 * wide, scale * wide).to_event(2))
    b1 = pyro.sample("b1", dist.Normal(mean, 0.5).to_event(1))
    tril = (torch.eye(NUM_HIDDEN, dtype=torch.float64) + 0.1).tril()
    w2 = pyro.sample("w2", dist.MultivariateNormal(mean, scale_tril=scale * tril))
    f = F.linear(F.linear(x, w1, b1).tanh(), w2)
    noise = pyro.sample("noise", dist.Gamma(2.0 * one, 3.0 * one))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(f, noise), obs=y)
    return f


LATENT = ["tau", "scale", "mean", "w1", "b1", "w2", "noise"]


def hierarchical_values() -> dict[str, Tensor]:
    """Unconstrained values are logs for the positive sites."""
    positive = {site: (0.5 * double()).exp() for site in ("tau", "scale", "noise")}
    return {
        **positive,
        "mean": double(NUM_HIDDEN),
        "w1": double(NUM_HIDDEN, NUM_INPUTS),
        "b1": double(NUM_HIDDEN),
        "w2": double(NUM_HIDDEN),
    }


def test_hierarchical_priors_keep_their_density() -> None:
    x, y, at = double(NUM_DATA, NUM_INPUTS), double(NUM_DATA), hierarchical_values()
    subnet = {"w1": torch.arange(5), "w2": torch.tensor([2])}
    posterior = fitted(hierarchical, at, x, y, subnet=subnet)
    model = posterior.linearized_model
    draws = [hierarchical_values() for _ in range(K)]
    users = [run(hierarchical, values, x, y) for values in draws]
    for values, user in zip(draws, users, strict=True):
        ours = run(model, values, x, y)
        for site in LATENT:
            found, wanted = ours.nodes[site], user.nodes[site]
            assert_close(found["log_prob"], wanted["log_prob"], **EXACT)
    assert_same_densities(run_batched(model, draws, x, y), users, LATENT)


def test_positive_latents_are_expanded_in_their_logs() -> None:
    x, y, at = double(NUM_DATA, NUM_INPUTS), double(NUM_DATA), hierarchical_values()
    subnet = {"w1": torch.arange(5), "noise": torch.tensor([0])}
    posterior = fitted(hierarchical, at, x, y, subnet=subnet)
    draws = [hierarchical_values() for _ in range(K)]

    def loc(w: Values) -> Tensor:
        return F.linear(F.linear(x, w["w1"], w["b1"]).tanh(), w["w2"])

    trained = {site: at[site] for site in ("w1", "b1", "w2")}
    expected = torch.stack([expansion(loc, trained, values) for values in draws])
    fn = run_batched(posterior.linearized_model, draws, x).nodes["y"]["fn"]
    assert_close(fn.loc, expected, **EXACT)
    # log scale is linear in the log of the noise: the expansion is exact
    noise = torch.stack([values["noise"] for values in draws])
    assert_close(fn.scale, noise.unsqueeze(-1).expand_as(fn.scale), **EXACT)


def grouped(x: Tensor, group: Tensor, y: Tensor | None = None) -> Tensor:
    """Latent sites in plates, beside a network of plain layers."""
    one = torch.ones((), dtype=torch.float64)
    spread = pyro.sample("spread", dist.HalfNormal(one))
    with pyro.plate("groups", 3):
        offset = pyro.sample("offset", dist.Normal(0.0 * one, spread))
        slope = pyro.sample("slope", normal(2))
    weights = {site: pyro.sample(site, normal(*s)) for site, s in shapes(2).items()}
    f = network(weights, x) * slope[group] + offset[group].unsqueeze(-1)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(f, 0.5).to_event(1), obs=y)
    return f


GROUP = torch.tensor([0, 2, 1, 2, 0])


def grouped_values() -> dict[str, Tensor]:
    return {
        "spread": (0.5 * double()).exp(),
        "offset": double(3),
        "slope": double(3, 2),
        **random_values(2),
    }


def grouped_output(x: Tensor) -> Callable[[Values], Tensor]:
    return lambda w: (
        network(w, x) * w["slope"][GROUP] + w["offset"][GROUP].unsqueeze(-1)
    )


def grouped_fit() -> tuple[AutoSubnetMultivariateNormal, Tensor, Tensor, Values]:
    x, y, at = double(NUM_DATA, NUM_INPUTS), double(NUM_DATA, 2), grouped_values()
    # away from the MAP, the prior of the offsets need not be convex in their spread
    subnet = {
        site: torch.arange(value.numel())
        for site, value in at.items()
        if site != "spread"
    }
    return fitted(grouped, at, x, GROUP, y, subnet=subnet), x, y, at


def test_latent_sites_in_plates_keep_their_density_and_are_expanded() -> None:
    posterior, x, y, at = grouped_fit()
    draws = [grouped_values() for _ in range(K)]
    users = [run(grouped, values, x, GROUP, y) for values in draws]
    latent = [site for site in at if site != "y"]
    moving = {site: value for site, value in at.items() if site != "spread"}
    expected = [expansion(grouped_output(x), moving, values) for values in draws]
    model = posterior.linearized_model
    for values, user, wanted in zip(draws, users, expected, strict=True):
        ours = run(model, values, x, GROUP, y)
        for site in latent:
            assert_close(
                ours.nodes[site]["log_prob"], user.nodes[site]["log_prob"], **EXACT
            )
        assert_close(ours.nodes["y"]["fn"].base_dist.loc, wanted, **EXACT)
    stacked = {site: torch.stack([v[site] for v in draws]) for site in at}
    for site in at:
        if site not in {"offset", "slope"}:  # these fill the plate at dimension -1
            stacked[site] = stacked[site].unsqueeze(1)
    with pyro.plate("draws", K, dim=-2):
        batched = run(model, stacked, x, GROUP, y)
    assert_same_densities(batched, users, latent)
    assert_close(batched.nodes["y"]["fn"].base_dist.loc, torch.stack(expected), **EXACT)


@BOTH_MODES
def test_predictive_with_latent_sites_in_plates(parallel: bool) -> None:
    """``Predictive`` pads every site then, and plain layers fail on padded weights."""
    posterior, x, _, at = grouped_fit()
    result = Predictive(
        posterior.linearized_model,
        guide=posterior,
        num_samples=K,
        parallel=parallel,
        return_sites=(*at, "_RETURN"),
    )(x, GROUP)
    moving = {site: value for site, value in at.items() if site != "spread"}
    for k in range(K):
        values = {site: result[site][k].reshape(v.shape) for site, v in at.items()}
        wanted = expansion(grouped_output(x), moving, values)
        assert_close(result["_RETURN"][k].reshape(wanted.shape), wanted, **EXACT)


def test_factors_of_latents_are_evaluated_at_the_drawn_values() -> None:
    """A factor of the weights is a term of the prior: P0 counts it, so must this."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", normal(NUM_INPUTS))
        pyro.factor("soft", -(w**4).sum())
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    x, y = double(NUM_DATA, NUM_INPUTS), double(NUM_DATA)
    posterior = fitted(model, {"w": double(NUM_INPUTS)}, x, y)
    draws = [{"w": double(NUM_INPUTS)} for _ in range(K)]
    users = [run(model, values, x, y) for values in draws]
    for values, user in zip(draws, users, strict=True):
        ours = run(posterior.linearized_model, values, x, y)
        assert_close(
            ours.nodes["soft"]["log_prob"], user.nodes["soft"]["log_prob"], **EXACT
        )
        assert_close(ours.log_prob_sum(), user.log_prob_sum(), **EXACT)
    ours = run_batched(posterior.linearized_model, draws, x, y)
    assert_same_densities(ours, users, ["soft", "w", "y"])


# ----------------------------------------------------------------------------------
# Sampled against closed form, at FALSE_ALARM_RATE a test.

NUM_DRAWS = 4000


@BOTH_MODES
def test_sampled_outputs_have_the_closed_forms_moments(parallel: bool) -> None:
    """Draws are Gaussian, so means and variances have exact normal and χ² bounds.

    Bonferroni over all outputs and both moments.
    """
    found = fit("normal")
    num_draws = NUM_DRAWS if parallel else NUM_DRAWS // 20
    f = Predictive(
        found.posterior.linearized_model,
        guide=found.posterior,
        num_samples=num_draws,
        parallel=parallel,
        return_sites=("f",),
    )(found.x)["f"].reshape(num_draws, NUM_DATA, 2)
    closed = found.posterior.output_distribution(found.x)
    tail = FALSE_ALARM_RATE / (2 * 2 * closed.variance.numel())
    errors = (f.mean(0) - closed.loc) / (closed.variance / num_draws).sqrt()
    assert float(errors.abs().max()) < scipy.stats.norm.isf(tail)
    ratio = f.var(0) / closed.variance * (num_draws - 1)
    assert float(ratio.min()) > scipy.stats.chi2.ppf(tail, num_draws - 1)
    assert float(ratio.max()) < scipy.stats.chi2.isf(tail, num_draws - 1)


def test_functions_are_drawn_jointly_over_inputs() -> None:
    """One draw of weights is one function: whitened by the joint covariance, draws are
    standard normal, and their sum of squares is χ². Noise shared by no inputs, or by
    all, would fail."""
    found = fit("normal")
    f = Predictive(
        found.posterior.linearized_model,
        guide=found.posterior,
        num_samples=NUM_DRAWS,
        parallel=True,
        return_sites=("f",),
    )(found.x)["f"].reshape(NUM_DRAWS, NUM_DATA * 2)
    closed = found.posterior.output_distribution(found.x, joint=True)
    white = torch.linalg.solve_triangular(
        closed.scale_tril, (f - closed.loc).mT, upper=False
    )
    total, count = float(white.square().sum()), white.numel()
    assert scipy.stats.chi2.ppf(FALSE_ALARM_RATE / 2, count) < total
    assert total < scipy.stats.chi2.isf(FALSE_ALARM_RATE / 2, count)


@pytest.mark.parametrize("name", ["normal", "multivariate-normal"])
def test_gaussian_predictive_mean_is_the_maps_output(name: str) -> None:
    """In closed form exactly, sampled within the error of a normal mean."""
    found = fit(name)
    output = network(found.at, found.x)
    closed = found.posterior.output_distribution(found.x)
    assert_close(closed.loc, output, **EXACT)
    y = Predictive(
        found.posterior.linearized_model,
        guide=found.posterior,
        num_samples=NUM_DRAWS,
        parallel=True,
    )(found.x)["y"].reshape(NUM_DRAWS, NUM_DATA, 2)
    noise = found.family.head(output).variance
    errors = (y.mean(0) - output) / ((closed.variance + noise) / NUM_DRAWS).sqrt()
    limit = scipy.stats.norm.isf(FALSE_ALARM_RATE / (2 * output.numel()))
    assert float(errors.abs().max()) < limit


# ----------------------------------------------------------------------------------
# Around the model.


def test_inside_another_plate() -> None:
    found = fit("categorical")
    model = found.posterior.linearized_model
    with pyro.plate("outer", 4, dim=-3), pyro.plate("inner", 2, dim=-2):
        trace = poutine.trace(model).get_trace(found.x)
    nodes = trace.nodes
    assert nodes["y"]["value"].shape == (4, 2, NUM_DATA)
    assert nodes["w1"]["value"].shape == (4, 2, 1, NUM_HIDDEN, NUM_INPUTS)
    for i in range(4):
        for j in range(2):
            values = {site: nodes[site]["value"][i, j, 0] for site in found.at}
            wanted = found.outputs(values)
            assert_close(nodes["y"]["fn"].logits[i, j], wanted, **EXACT)


def test_a_plate_that_collides_with_the_models_own_is_refused() -> None:
    found = fit("normal")
    draws = {
        site: torch.stack([values[site] for values in found.draws]) for site in found.at
    }
    message = rf"(?s)left of its own; got {K} draws .* Give the outer plate"
    with pytest.raises(ModelError, match=message), pyro.plate("draws", K, dim=-1):
        run(found.posterior.linearized_model, draws, found.x)


def test_guide_and_model_together_in_a_plate() -> None:
    """As vectorized particles run them: the guide's draws reach the model."""
    found = fit("normal")
    posterior = found.posterior
    with pyro.plate("particles", K, dim=-2):
        guide = poutine.trace(posterior).get_trace(found.x, found.y)
        replayed = poutine.replay(posterior.linearized_model, trace=guide)
        trace = poutine.trace(replayed).get_trace(found.x, found.y)
    loc = trace.nodes["y"]["fn"].base_dist.loc
    assert loc.shape == (K, NUM_DATA, 2)
    for k in range(K):
        values = {site: guide.nodes[site]["value"][k, 0] for site in found.at}
        assert_close(loc[k], found.outputs(values), **EXACT)


def test_the_models_handlers_and_store_are_left_alone() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        gain = pyro.param("gain", torch.tensor(1.5, dtype=torch.float64))
        w = pyro.sample("w", normal(NUM_INPUTS))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((gain * x @ w).tanh(), 0.5), obs=y)

    x, y, at = double(NUM_DATA, NUM_INPUTS), double(NUM_DATA), {"w": double(NUM_INPUTS)}
    pyro.param("gain", torch.tensor(1.5, dtype=torch.float64))
    posterior = fitted(model, at, x, y)
    before = {name: value.clone() for name, value in pyro.get_param_store().items()}
    state = torch.get_rng_state()
    values = {"w": double(NUM_INPUTS)}
    torch.set_rng_state(state)
    run(posterior.linearized_model, values, x, y)
    # nothing is random where every site has its value
    assert_close(torch.get_rng_state(), state, rtol=0, atol=0)
    assert before.keys() == set(pyro.get_param_store().keys())
    assert_close(pyro.param("gain").detach(), before["gain"].detach(), **EXACT)


def test_float32_is_kept() -> None:
    family = FAMILIES["categorical"]

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        weights = {
            site: pyro.sample(site, dist.Normal(torch.zeros(s), 1.0).to_event(len(s)))
            for site, s in shapes(3).items()
        }
        f = pyro.deterministic("f", network(weights, x))
        with pyro.plate("data", len(x)):
            pyro.sample("y", family.head(f), obs=y)
        return f

    x, y = torch.randn(NUM_DATA, NUM_INPUTS), torch.randint(3, (NUM_DATA,))
    at = {site: torch.randn(s) for site, s in shapes(3).items()}
    posterior = fitted(model, at, x, y)
    for parallel in (False, True):
        result = Predictive(
            posterior.linearized_model,
            guide=posterior,
            num_samples=3,
            parallel=parallel,
            return_sites=("f", "w1", "_RETURN"),
        )(x)
        assert {value.dtype for value in result.values()} == {torch.float32}
