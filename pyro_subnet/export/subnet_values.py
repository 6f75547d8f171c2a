"""Draws of a subnet as constrained values of its sites' elements, never of all D."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributions import Transform
from torch.distributions.transforms import ComposeTransform, IndependentTransform

from pyro_subnet.exceptions import SelectionError
from pyro_subnet.subnet import Subnet, place_elements
from pyro_subnet.tracing.trace import Latents

# Elements of a site held at once while its draws are mapped to constrained values.
_HELD_AT_ONCE = 2**22


@final
@dataclass(frozen=True, eq=False)
class SiteElements:
    """The constrained elements of a site that the subnet moves."""

    positions: Int[Tensor, " elements"]  # flat, within the constrained value, ascending
    shape: torch.Size  # of that value
    values: Float[Tensor, "draws elements"]


def site_elements(
    latents: Latents,
    subnet: Subnet,
    theta: Float[Tensor, "draws subnet"],
    sites: Sequence[str] | None = None,
    whole: Container[str] = (),
) -> dict[str, SiteElements]:
    """Constrained values of the elements that draws theta, (K, S), move, by site."""
    # Of the sites in `whole` every element, those outside the subnet at the MAP.
    chosen, pieces = subnet.indices, subnet.split(theta)
    for name in sites or ():
        if name not in chosen:
            raise SelectionError(
                "`sites` must be latent sites with elements in the subnet, some of "
                f"{list(chosen)}; got {name!r}. Leave `sites` out for all of them."
            )
    return {
        name: _elements(
            latents.values[name],
            latents.transforms[name],
            within,
            pieces[name],
            name in whole,
        )
        for name, within in chosen.items()
        if sites is None or name in sites
    }


def _elements(
    base: Tensor, transform: Transform, within: Tensor, piece: Tensor, whole: bool
) -> SiteElements:
    """One site's elements, of which a few draws are constrained at a time."""
    parts = _parts(transform)
    if not parts and not whole:
        return SiteElements(within, base.shape, piece.detach())
    # Where a constraint acts element by element these are the subnet's own elements;
    # where it ties elements together (a simplex, a Cholesky factor), all elements of
    # each value that holds a chosen one.
    shape = transform.forward_shape(base.shape)
    inside = _last(base.shape, max((p.domain.event_dim for p in parts), default=0))
    outside = _last(shape, max((p.codomain.event_dim for p in parts), default=0))
    groups = (within // inside).unique()
    within_group = torch.arange(outside, device=within.device)
    positions = (groups.unsqueeze(-1) * outside + within_group).flatten()
    if whole:
        positions = torch.arange(math.prod(shape), device=within.device)
    held = max(1, _HELD_AT_ONCE // max(base.numel(), 1))
    values = []
    for some in piece.split(held):
        value = transform(place_elements(base, within, some, base.ndim))
        values.append(
            value.flatten(1)[:, positions] if value.ndim > 1 else value[:, None]
        )
    return SiteElements(positions, shape, torch.cat(values).detach())


def _parts(transform: Transform) -> list[Transform]:
    """What a transform is composed of, without what `to_event` makes of each."""
    if isinstance(transform, IndependentTransform):
        return _parts(transform.base_transform)
    if isinstance(transform, ComposeTransform):
        return [own for part in transform.parts for own in _parts(part)]
    return [transform]


def _last(shape: Sequence[int], count: int) -> int:
    """How many elements the last axes of a shape hold."""
    return math.prod(shape[len(shape) - count :])
