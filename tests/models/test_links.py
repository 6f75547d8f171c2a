"""Expanded values that follow from one another share one Jacobian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from torch import Tensor
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.models.expansion import Expansion, expanded_keys
from pyro_subnet.models.kept_jacobian import Link
from pyro_subnet.models.links import find_links
from pyro_subnet.tracing.call import ModelCall
from tests.tolerances import tolerance

NUM_DATA, NUM_INPUTS, NUM_CLASSES = 7, 2, 3
Y, LOGITS, RETURN = ("output", "y"), ("deterministic", "logits"), ("return", "0")


def logits_of(weights: Tensor, x: Tensor) -> Tensor:
    """Sums of waves, which a run's graph takes more bytes for than a link has."""
    waves = torch.arange(1, 17, dtype=x.dtype)
    return ((x @ weights).unsqueeze(-1) * waves).sin().mean(-1)


class Classes:
    """Classes whose logits, and something made of them, are shown.

    Args:
        made: Of the logits and the weights; it is returned.
    """

    def __init__(self, made: Callable[[Tensor, Tensor], Tensor]):
        self.made = made

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        prior = dist.Normal(x.new_zeros(NUM_INPUTS, NUM_CLASSES), 1.0).to_event(2)
        weights = pyro.sample("weights", prior)
        logits = logits_of(weights, x)
        pyro.deterministic("logits", logits, event_dim=1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)
        return self.made(logits, weights)


MADE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "themselves": lambda logits, weights: logits,
    "probabilities": lambda logits, weights: logits.softmax(-1),
    "another shape": lambda logits, weights: torch.stack([logits.exp(), -logits], 1),
    "of other data": lambda logits, weights: logits - logits.mean(0),
    "of the weights": lambda logits, weights: logits * weights[0, 0],
}
# Where all the weights move of what is made goes by the logits, datum by datum.
FOLLOW = ("themselves", "probabilities", "another shape")


def fitted(
    made: str, dtype: torch.dtype
) -> tuple[AutoSubnetMultivariateNormal, Tensor]:
    x = torch.randn(NUM_DATA, NUM_INPUTS, dtype=dtype)
    model, y = Classes(MADE[made]), torch.arange(NUM_DATA) % NUM_CLASSES
    return AutoSubnetLaplace(model).laplace_approximation(x, y), x


def links_of(
    posterior: AutoSubnetMultivariateNormal, x: Tensor, budget: int
) -> dict[Any, Link]:
    call = ModelCall.read(posterior.at_map, (x,), {})
    keys = expanded_keys(call)
    expansion = Expansion(call, keys)

    def read(trace: poutine.Trace) -> dict[Any, Tensor]:
        return dict(zip(keys, expansion.read(trace), strict=True))

    return find_links(call, keys, read, budget)


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("budget", [1100, 2**20])
def test_what_follows_is_found(made: str, budget: int, dtype: torch.dtype) -> None:
    """From a run on all data, and from several on some."""
    posterior, x = fitted(made, dtype)
    call = ModelCall.read(posterior.at_map, (x,), {})
    in_parts = call.graph(with_prior=False).activation_bytes > budget
    assert in_parts == (budget < 2**20)
    links = links_of(posterior, x, budget)
    source = RETURN if made == "themselves" else LOGITS
    assert links[Y].source == source
    assert (RETURN in links) == (made in FOLLOW and made != "themselves")
    assert (LOGITS in links) == (made == "themselves")
    if made == "themselves":
        assert links[LOGITS].jacobian is None
    if RETURN in links:
        weights = posterior.median()["weights"]
        logits = logits_of(weights, x)
        jacobians = [
            torch.autograd.functional.jacobian(
                lambda own: MADE[made](own.unsqueeze(0), weights).flatten(), own
            )
            for own in logits
        ]
        found = links[RETURN].jacobian
        assert_close(found, torch.stack(jacobians), **tolerance(dtype))


def test_a_link_larger_than_the_budget_is_left_out() -> None:
    posterior, x = fitted("probabilities", torch.float64)
    needed = NUM_DATA * NUM_CLASSES**2 * 8
    assert links_of(posterior, x, needed).keys() == {Y, RETURN}
    assert links_of(posterior, x, needed - 1) == {}


def test_a_model_of_a_fixed_length_is_not_run_on_parts() -> None:
    def fixed(logits: Tensor, weights: Tensor) -> Tensor:
        if len(logits) not in (2, NUM_DATA):
            raise ValueError("another length")
        return logits.softmax(-1)

    x = torch.randn(NUM_DATA, NUM_INPUTS)
    y = torch.arange(NUM_DATA) % NUM_CLASSES
    posterior = AutoSubnetLaplace(Classes(fixed)).laplace_approximation(x, y)
    assert links_of(posterior, x, 1100) == {}
    assert links_of(posterior, x, 2**20).keys() == {Y, RETURN}


class Experts:
    """The third observation on goes by weights of its own."""

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        prior = dist.Normal(x.new_zeros(NUM_INPUTS, NUM_CLASSES), 1.0).to_event(2)
        weights, others = (pyro.sample(name, prior) for name in ("weights", "others"))
        logits = pyro.deterministic("logits", logits_of(weights, x), event_dim=1)
        late = (torch.arange(len(x)) >= 2).unsqueeze(1)
        # On two observations, which a run's graph is read on, it follows.
        shift = logits_of(others, x) if bool(late.any()) else 0.0
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)
        return logits + late * shift


def test_what_follows_on_few_data_alone_does_not() -> None:
    x = torch.randn(NUM_DATA, NUM_INPUTS, dtype=torch.float64)
    y = torch.arange(NUM_DATA) % NUM_CLASSES
    posterior = AutoSubnetLaplace(Experts()).laplace_approximation(x, y)
    assert RETURN not in links_of(posterior, x, 2**20)


class Counted:
    """Counts the backward passes through a network.

    Args:
        shown: Whether the logits are named, and probabilities returned.
    """

    def __init__(self, *, shown: bool):
        self.shown = shown
        self.passes = 0

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor | None:
        prior = dist.Normal(x.new_zeros(NUM_INPUTS, NUM_CLASSES), 1.0).to_event(2)
        hidden = x @ pyro.sample("weights", prior)
        if hidden.requires_grad:
            hidden.register_hook(self._count)
        logits = hidden.sin()
        if self.shown:
            pyro.deterministic("logits", logits, event_dim=1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)
        return logits.softmax(-1) if self.shown else None

    def _count(self, gradient: Tensor) -> None:
        self.passes += 1


def test_what_follows_takes_no_pass_through_the_network() -> None:
    passes = []
    for shown in (False, True):
        model = Counted(shown=shown)
        x = torch.randn(NUM_DATA, NUM_INPUTS, dtype=torch.float64)
        y = torch.arange(NUM_DATA) % NUM_CLASSES
        posterior = AutoSubnetLaplace(model).laplace_approximation(x, y)
        draws = torch.randn(40, 1, NUM_INPUTS, NUM_CLASSES, dtype=torch.float64)
        given = poutine.condition(posterior.linearized_model, data={"weights": draws})
        model.passes = 0
        with torch.no_grad(), pyro.plate("draws", 40, dim=-2):
            given(x)
        passes.append(model.passes)
    assert passes[0] >= NUM_CLASSES
    assert passes[1] == passes[0]


@pytest.mark.parametrize("made", MADE)
def test_draws_are_the_expansion(made: str, dtype: torch.dtype) -> None:
    posterior, x = fitted(made, dtype)
    predictive = Predictive(
        posterior.linearized_model,
        guide=posterior,
        num_samples=50,
        parallel=True,
        return_sites=("weights", "logits", "_RETURN"),
    )
    found = predictive(x)
    at = posterior.median()["weights"]
    steps = found["weights"].reshape(50, NUM_INPUTS, NUM_CLASSES) - at

    def expanded(function: Callable[[Tensor], Tensor]) -> Tensor:
        jacobian = torch.autograd.functional.jacobian(function, at)
        return function(at) + torch.einsum("...ij,kij->k...", jacobian, steps)

    logits = expanded(lambda w: logits_of(w, x))
    assert_close(found["logits"], logits, **tolerance(dtype))
    returned = expanded(lambda w: MADE[made](logits_of(w, x), w))
    assert_close(found["_RETURN"], returned, **tolerance(dtype))


@pytest.mark.parametrize("made", ["probabilities", "of other data"])
def test_classes_have_the_expanded_logits(made: str, dtype: torch.dtype) -> None:
    """Where the site's own parameters follow from logits that are expanded."""
    posterior, x = fitted(made, dtype)
    at = posterior.median()["weights"]
    draws = at + torch.randn(40, 1, NUM_INPUTS, NUM_CLASSES, dtype=dtype)
    model = poutine.condition(posterior.linearized_model, data={"weights": draws})
    with torch.no_grad(), pyro.plate("draws", 40, dim=-2):
        nodes = poutine.trace(model).get_trace(x).nodes
    assert_close(
        nodes["y"]["fn"].logits,
        nodes["logits"]["value"].reshape(40, NUM_DATA, NUM_CLASSES).log_softmax(-1),
        **tolerance(dtype),
    )
