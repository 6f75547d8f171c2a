"""A weight as a sample site: one for all calls of a run, in no plate."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, no_type_check

import pyro
from pyro.distributions import Distribution
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor

from pyro_subnet.exceptions import ModelError

# Plates that Pyro itself opens around a model, over draws of all of it.
_OVER_DRAWS = ("num_particles_vectorized", "_num_predictive_samples")
# What Pyro says of a second site of the same name.
_TWICE = "Multiple sample sites named"
# What a module drew last, by site.
Drawn = dict[str, weakref.ref[Tensor]]


def weight_site(site: str, prior: Distribution, drawn: Drawn) -> Tensor:
    """A draw of a weight; what it was before, if this run has drawn it.

    Args:
        site: Name of the site.
        prior: Its distribution.
        drawn: What the module drew last; this draw is added.

    Returns:
        The value.

    Raises:
        ModelError: If another module has drawn a site of this name.
        RuntimeError: As Pyro's handlers do.
    """
    before: Tensor | None = _in_trace(site)
    if before is not None and site in drawn and drawn[site]() is before:
        return before
    try:
        plates = _plates_of(_PYRO_STACK)
        with _without(plates) if plates else nullcontext():
            value: Tensor = pyro.sample(site, prior)
    except RuntimeError as error:
        if before is None or not str(error).startswith(_TWICE):
            raise
        raise ModelError(
            "Networks of one model must have sites of different names; got site "
            f"{site!r} twice. Make them attributes of one PyroModule, or bayesianize "
            "one `nn.ModuleDict` of both."
        ) from error
    drawn[site] = weakref.ref(value)
    return value


@no_type_check
def _in_trace(site: str) -> Tensor | None:
    """The site's value in the trace of the present run, if there is a trace."""
    # Pyro refuses a second site of its name: a network that is called twice in a
    # function, as for a difference of two rewards, has the same weights in both calls.
    blocks: list[BlockMessenger] = []
    for handler in reversed(_PYRO_STACK):
        if isinstance(handler, BlockMessenger):
            blocks.append(handler)
        elif isinstance(handler, TraceMessenger) and site in handler.trace.nodes:
            node = handler.trace.nodes[site]
            hidden = any(block.hide_fn(node) for block in blocks)
            return None if hidden else node["value"]
    return None


@contextmanager
def _without(plates: list[Any]) -> Iterator[None]:
    """Takes the model's plates off the stack: in one, each row has its own weight."""
    before = list(_PYRO_STACK)
    without = [one for one in before if one not in plates]
    try:
        _PYRO_STACK[:] = without
        yield
    finally:
        # Of a run that an interrupt has ended, its handlers are gone by now.
        if _PYRO_STACK[: len(without)] == without:
            _PYRO_STACK[:] = before


# Called for each weight of each run, of which training takes thousands: checks of types
# at run time would take longer than the draw.
@no_type_check
def _plates_of(handlers: Iterable[Any]) -> list[Any]:
    return [
        one
        for one in handlers
        if isinstance(one, IndepMessenger) and one.name not in _OVER_DRAWS
    ]
