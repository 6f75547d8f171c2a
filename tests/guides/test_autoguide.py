"""What every ``AutoContinuous`` of Pyro's promises, held to by ours.

With ``subnet=None`` ours stands wherever ``AutoLaplaceApproximation`` does, so many
tests run both and compare. Models without observed sites are Pyro's own habit: there
the posterior is the prior's curvature, which ours says in a warning.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
)
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiscreteParallel,
    AutoGuideList,
    AutoLaplaceApproximation,
    AutoNormal,
)
from pyro.infer.autoguide.initialization import (
    init_to_feasible,
    init_to_generated,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
    init_to_value,
)
from pyro.nn import PyroModule, PyroParam
from pyro.util import check_model_guide_match
from torch import Tensor, nn
from torch.distributions import constraints
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from tests.tolerances import tolerance

CLOSED = tolerance(torch.float64, "closed_form")
EQUAL = {"rtol": 0.0, "atol": 0.0}
DOUBLE = torch.float64

pytestmark = pytest.mark.filterwarnings(
    "ignore::pyro_subnet.exceptions.NoObservedSiteWarning"
)
quiet_jit = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:`torch.jit"
)


def double(*values: float) -> Tensor:
    return torch.tensor(values if len(values) > 1 else values[0], dtype=DOUBLE)


def sites() -> None:
    """Every kind of support and plate, and nothing observed."""
    zero, one = double(0.0), double(1.0)
    pyro.sample("z1", dist.Normal(zero, one))
    pyro.sample("z2", dist.Normal(zero.expand(2), one).to_event(1))
    with pyro.plate("plate", 3):
        pyro.sample("z3", dist.LogNormal(zero.expand(3), one))
    pyro.sample("z4", dist.MultivariateNormal(zero.expand(2), torch.eye(2).to(DOUBLE)))
    pyro.sample("z5", dist.Dirichlet(one.expand(3) * 2))
    with poutine.scale(scale=0.5):
        pyro.sample("z6", dist.Normal(zero, one).expand([2]).to_event(1))
    pyro.sample("z7", dist.Beta(2 * one, 2 * one))


def regression(x: Tensor, y: Tensor | None = None) -> Tensor:
    w = pyro.sample("w", dist.Normal(torch.zeros(3, dtype=DOUBLE), 1.0).to_event(1))
    noise = pyro.sample("noise", dist.LogNormal(double(-1.0), 0.5))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ w, noise), obs=y)


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(12, 3, dtype=DOUBLE)
    return x, x @ double(1.0, -1.0, 0.5) + 0.3 * torch.randn(12, dtype=DOUBLE)


PART = {"z1": torch.tensor([0]), "z3": torch.tensor([2, 0]), "z7": torch.tensor([0])}


def posterior_of(subnet: Any = None) -> AutoSubnetMultivariateNormal:
    return AutoSubnetLaplace(sites, subnet).laplace_approximation()


# ----------------------------------------------------------------------------------
# Training.


INITS: dict[str, Callable[..., Any]] = {
    "feasible": init_to_feasible,
    "mean": init_to_mean,
    "median": init_to_median,
    "sample": init_to_sample,
    "uniform": init_to_uniform,
    "value": init_to_value(values={"z1": double(0.3), "z3": double(1.0, 2.0, 3.0)}),
    "generated": init_to_generated(
        generate=lambda: init_to_value(values={"z2": double(0.1, 0.2)})
    ),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO])
@pytest.mark.parametrize("init", INITS)
def test_starts_and_scores_as_pyros(init: str, elbo: Any) -> None:
    """From any start and under any ELBO, the very number of Pyro's guide."""
    losses = []
    for kind in (AutoLaplaceApproximation, AutoSubnetLaplace):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        guide = kind(sites, init_loc_fn=INITS[init])
        losses.append(elbo(strict_enumeration_warning=False).loss(sites, guide))
    assert losses[1] == losses[0]


@quiet_jit
@pytest.mark.parametrize("subnet", [None, PART], ids=["whole", "part"])
@pytest.mark.parametrize(
    "elbo",
    [
        lambda: Trace_ELBO(num_particles=5, vectorize_particles=True),
        lambda: TraceGraph_ELBO(num_particles=2),
        JitTrace_ELBO,
    ],
    ids=["vectorized", "graph", "jit"],
)
def test_the_posterior_under_elbos(elbo: Any, subnet: Any) -> None:
    """Draws reach the model: the ELBO is a Monte Carlo estimate around one value.

    Within five standard errors, and 0.05 for the reference, itself of 5,000 draws.
    """
    posterior = posterior_of(subnet)
    pyro.set_rng_seed(0)
    found = [elbo().loss(sites, posterior) for _ in range(20)]
    pyro.set_rng_seed(1)
    many = Trace_ELBO(num_particles=5000, vectorize_particles=True)
    reference = many.loss(sites, posterior)
    spread = torch.tensor(found).std().item() / 20**0.5
    assert abs(sum(found) / 20 - reference) < 5 * spread + 0.05


def test_training_reaches_pyros_posterior() -> None:
    """A model where the Hessian is the GGN plus the prior's: linear in its weights.

    The noise, in which it is not, is held out by a block.
    """
    x, y = data()
    held = poutine.condition(regression, data={"noise": double(0.3)})
    found = []
    for kind in (AutoLaplaceApproximation, AutoSubnetLaplace):
        pyro.clear_param_store()
        pyro.set_rng_seed(5)
        guide = kind(held)
        svi = SVI(held, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        for _ in range(50):
            svi.step(x, y)
        found.append(guide.laplace_approximation(x, y).get_posterior())
    assert_close(found[1].loc, found[0].loc, **EQUAL)
    assert_close(found[1].covariance_matrix, found[0].covariance_matrix, **CLOSED)


# ----------------------------------------------------------------------------------
# Median, quantiles, moments.


def test_posterior_without_data_is_pyros() -> None:
    """The prior's curvature, site for site, at the same point."""
    ours = AutoSubnetLaplace(sites, init_loc_fn=init_to_median)
    pyros = AutoLaplaceApproximation(sites, init_loc_fn=init_to_median)
    pyro.set_rng_seed(0)
    ours()
    pyros()
    pyros.loc.data.copy_(ours.loc.data)
    mine, theirs = ours.laplace_approximation(), pyros.laplace_approximation()
    covariance = theirs.get_posterior().covariance_matrix
    assert_close(mine.get_posterior().covariance_matrix, covariance, **CLOSED)
    levels = [0.1, 0.5, 0.9]
    for site, value in theirs.quantiles(levels).items():
        assert_close(mine.quantiles(levels)[site], value, **CLOSED)
    for found, expected in zip(mine._loc_scale(), theirs._loc_scale(), strict=True):
        assert_close(found, expected.detach(), **CLOSED)
    for site, value in theirs.median().items():
        assert_close(mine.median()[site], value.detach(), **CLOSED)


@pytest.mark.parametrize("subnet", [None, PART], ids=["whole", "part"])
def test_quantiles_bracket_the_median(subnet: Any) -> None:
    posterior = posterior_of(subnet)
    median, quantiles = posterior.median(), posterior.quantiles([0.1, 0.5, 0.9])
    for site in ("z1", "z3", "z7"):
        low, middle, high = quantiles[site]
        assert_close(middle, median[site], **CLOSED)
        at = (subnet or {}).get(site, torch.arange(low.numel()))
        assert bool((low.flatten()[at] < middle.flatten()[at]).all())
        assert bool((middle.flatten()[at] < high.flatten()[at]).all())


# ----------------------------------------------------------------------------------
# In company.


def test_guide_list_members_and_their_sites() -> None:
    guide = AutoGuideList(sites)
    guide.append(AutoSubnetLaplace(poutine.block(sites, expose=["z1", "z3"])))
    guide.append(AutoNormal(poutine.block(sites, expose=["z2", "z4", "z6"])))
    guide.append(AutoDelta(poutine.block(sites, expose=["z5", "z7"])))
    svi = SVI(sites, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step()
    check_model_guide_match(
        poutine.trace(sites).get_trace(), poutine.trace(guide).get_trace()
    )
    assert set(guide.median()) == {f"z{i}" for i in range(1, 8)}
    keys = set(pyro.get_param_store().keys())
    assert "AutoGuideList.0.loc" in keys


def test_guide_list_with_plates_of_its_own() -> None:
    """``create_plates`` belongs to the list; ours takes the sites outside of them."""
    y = torch.randn(9, dtype=DOUBLE)

    def model(indices: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(double(0.0), 1.0))
        with pyro.plate("data", 9, subsample=indices):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y[indices])

    def create_plates(indices: Tensor, y: Tensor) -> Any:
        return pyro.plate("data", 9, subsample=indices)

    guide = AutoGuideList(model, create_plates=create_plates)
    guide.append(AutoSubnetLaplace(poutine.block(model, expose=["w"])))
    rest = poutine.block(model, hide=["w"])
    guide.append(AutoNormal(rest))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    before = None
    for indices in torch.arange(9).split(3):
        svi.step(indices, y)
        drawn = guide(indices, y)
        assert drawn["z"].shape == (3,)
        assert drawn["w"].shape == ()
        assert before is None or not torch.equal(drawn["w"], before)
        before = drawn["w"].detach().clone()


def test_beside_discrete_sites() -> None:
    y = double(0.0, 1.0, 10.0, 11.0, 12.0)

    def mixture(y: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(double(0.5, 0.5)))
        locs = pyro.sample("locs", dist.Normal(double(0.0, 0.0), 10.0).to_event(1))
        with pyro.plate("data", len(y)):
            which = pyro.sample("which", dist.Categorical(weights))
            pyro.sample("y", dist.Normal(locs[which], 1.0), obs=y)

    guide = AutoGuideList(mixture)
    guide.append(AutoSubnetLaplace(poutine.block(mixture, hide=["which"])))
    guide.append(AutoDiscreteParallel(poutine.block(mixture, expose=["which"])))
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss_and_grads(mixture, guide, y)
    assert torch.tensor(loss).isfinite()


class Parametrized(PyroModule):
    """A model with parameters beside its latent sites."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(double(1.0))
        self.scale = PyroParam(double(0.5), constraints.positive)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        w = pyro.sample("w", dist.Normal(torch.zeros(3, dtype=DOUBLE), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(x @ w + self.shift, self.scale), obs=y)


@pytest.mark.parametrize("local", [False, True])
def test_module_local_parameters(local: bool) -> None:
    """``settings.set(module_local_params=True)`` keeps modules out of the store."""
    x, y = data()
    with pyro.settings.context(module_local_params=local):
        model = Parametrized()
        guide = AutoSubnetLaplace(model)
        # With parameters of their own, modules are trained by torch.
        loss = Trace_ELBO()(model, guide)
        loss(x, y)
        optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss(x, y).backward()
            optimizer.step()
        posterior = guide.laplace_approximation(x, y)
        # The trained parameters are those that the posterior sees.
        design = x / model.scale.detach()
        expected = design.T @ design + torch.eye(3, dtype=DOUBLE)
    assert_close(posterior.get_posterior().precision_matrix, expected, **CLOSED)
    assert float((model.shift.detach() - 1.0).abs()) > 1e-3
    assert bool(pyro.get_param_store().keys()) == (not local)


# ----------------------------------------------------------------------------------
# Saved, traced, drawn.


def test_the_param_store_brings_a_trained_guide_back(tmp_path: Path) -> None:
    x, y = data()
    guide = AutoSubnetLaplace(regression)
    svi = SVI(regression, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(5):
        svi.step(x, y)
    expected = guide.laplace_approximation(x, y)
    pyro.get_param_store().save(str(tmp_path / "store"))
    del guide, svi
    pyro.clear_param_store()
    pyro.get_param_store().load(str(tmp_path / "store"))
    again = AutoSubnetLaplace(regression)
    again(x, y)  # as for every guide of Pyro's: the store is read in a call
    found = again.laplace_approximation(x, y)
    assert_close(found.loc, expected.loc, **EQUAL)
    assert_close(
        found.get_posterior().precision_matrix,
        expected.get_posterior().precision_matrix,
        **EQUAL,
    )


@quiet_jit
@pytest.mark.parametrize("subnet", [None, PART], ids=["whole", "part"])
def test_call_can_be_traced_by_jit(subnet: Any) -> None:
    posterior = posterior_of(subnet)
    pyro.set_rng_seed(0)
    expected = posterior.call()
    traced = torch.jit.trace_module(posterior, {"call": ()}, check_trace=False)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    pyro.set_rng_seed(0)
    found = torch.jit.load(buffer).call()
    assert len(found) == len(expected) == 7
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine, theirs, **CLOSED)


@quiet_jit
@pytest.mark.filterwarnings("ignore:Draws of the guide are the MAP")
def test_predictive_can_be_traced_by_jit() -> None:
    x, y = data()
    guide = AutoSubnetLaplace(regression)
    posterior = guide.laplace_approximation(x, y)
    for each in (guide, posterior):
        predictive = Predictive(regression, guide=each, num_samples=4)
        expected = predictive.call(x)
        traced = torch.jit.trace_module(predictive, {"call": (x,)}, check_trace=False)
        found = traced.call(x)  # of another stream: draws that nobody uses are left out
        shapes = [value.shape for value in found]
        assert shapes == [value.shape for value in expected]
        assert all(bool(value.isfinite().all()) for value in found)


def test_models_are_drawn() -> None:
    x, y = data()
    guide = AutoSubnetLaplace(regression)
    posterior = guide.laplace_approximation(x, y)
    for each in (regression, posterior.linearized_model, posterior.hybrid_model()):
        graph = pyro.render_model(each, model_args=(x, y))
        assert "y" in graph.source


def test_moves_with_the_device_and_type() -> None:
    x, y = data()
    posterior = AutoSubnetLaplace(regression).laplace_approximation(x, y)
    expected = posterior.get_posterior().precision_matrix
    moved = posterior.to("cpu").float()
    found = moved.get_posterior().precision_matrix
    assert found.dtype == torch.float32
    assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
