"""Whether a model gives the same in every run, and which latent sites it hides."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from pyro import poutine
from pyro.poutine.block_messenger import BlockMessenger
from torch import Tensor

from pyro_subnet.exceptions import ModelError
from pyro_subnet.tracing.log_prior import log_prior_terms
from pyro_subnet.tracing.trace import Latents, ModelAtMAP, Node, is_output, run_model


@runtime_checkable
class HasOutputs(Protocol):
    """What is compared of a site, such as an output site."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def node(self) -> Node:
        """What the first run has of it."""

    def own(self, node: Node) -> Mapping[str, Tensor]:
        """The values that must agree, of a node of some run."""


def check_same(
    sites: Sequence[HasOutputs],
    reference: poutine.Trace,
    again: poutine.Trace,
    latents: Latents | None,
    hidden: Callable[[], Sequence[str]],
) -> None:
    """Refuses a random model: outputs, prior of ``latents`` and factors must agree."""
    for site in sites:
        other = site.own(again.nodes[site.name])
        for part, value in site.own(site.node).items():
            if not _is_close(value, other[part]):
                gap = float((value - other[part]).abs().amax())
                what = f"outputs in every run; got values of `{part}` at site "
                raise _differs(
                    f"{what}{site.name!r} that differ by {gap:.3g}", hidden()
                )
    if latents is None:
        return
    terms, others = (
        log_prior_terms(trace, latents, latents.values, ())
        for trace in (reference, again)
    )
    pairs = [
        (one, two)
        for one, two in zip(terms, others, strict=True)
        if not one.has_numbers_of(two)
    ]
    if not pairs:
        return
    first, second = (
        torch.stack([term.log_density.detach().double() for term in side]).sum()
        for side in zip(*pairs, strict=True)
    )
    if not _is_close(first, second, latents.loc.dtype):
        gap = float((first - second).abs())
        what = f"prior in every run; got log densities that differ by {gap:.3g}"
        raise _differs(what, hidden())


def _is_close(value: Tensor, other: Tensor, dtype: torch.dtype | None = None) -> bool:
    tolerance = torch.finfo(dtype or value.dtype).eps ** 0.5
    return torch.allclose(value, other.detach(), tolerance, tolerance)


def _differs(what: str, hidden: Sequence[str]) -> ModelError:
    way = "Switch dropout off with `.eval()` on the network, or show what is hidden."
    if hidden:
        way = (
            f"Its latent sites {list(hidden)} are hidden, as by `poutine.block`, and "
            "drawn from their priors: pass the full model, or hold them by "
            "`pyro.condition`."
        )
    return ModelError(f"The model must give the same {what} between two runs. {way}")


def hidden_latents(
    at_map: ModelAtMAP, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[str]:
    """Latent sites that handlers around the model hide from a fit, as far as known."""
    # As in a member of an `AutoGuideList`. A handler inside the model is not seen.
    latents, model = at_map.latents, _without_blocks(at_map.model)
    values = latents.constrain(latents.values)
    # What the model's own code may raise without its handlers helps no one.
    with contextlib.suppress(Exception):
        trace = run_model(model, args, kwargs, values, {})
        return [
            name
            for name, node in trace.nodes.items()
            if is_output(name, node, latents) and not node["is_observed"]
        ]
    return []


def _without_blocks(model: Any) -> Any:
    """A model without the handlers of ``poutine.block`` that are wrapped around it."""
    wrapped = model
    while True:
        inner = getattr(wrapped, "func", None) if _is_bound(wrapped) else wrapped
        if not (isinstance(inner, partial) and len(inner.args) == 2):  # noqa: PLR2004
            return wrapped
        handler, fn = inner.args
        if isinstance(handler, BlockMessenger):
            return _without_blocks(fn)
        if not isinstance(handler, poutine.messenger.Messenger):
            return wrapped
        return handler(_without_blocks(fn))


def _is_bound(wrapped: Any) -> bool:
    # What a Pyro handler makes of a function holds the partial call of both.
    return isinstance(wrapped, partial) and isinstance(
        getattr(wrapped, "func", None), partial
    )
