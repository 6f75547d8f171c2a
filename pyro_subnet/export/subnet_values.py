"""Draws of a subnet as constrained values of its sites' elements, never of all D."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributions import Transform
from torch.distributions.transforms import ComposeTransform, IndependentTransform

from pyro_subnet.exceptions import SelectionError
from pyro_subnet.subnet import Subnet, place_elements
from pyro_subnet.tracing.trace import Latents

# Elements of a site that are held at once while its draws are constrained.
_HELD_AT_ONCE = 2**22


@dataclass(frozen=True, eq=False)
class SiteElements:
    """Which constrained elements of a site the subnet moves.

    Attributes:
        positions: Flat positions within the site's constrained value, ascending.
        shape: Shape of that value.
        values: Theirs at the draws, shape (K, number of positions).
    """

    positions: Int[Tensor, " elements"]
    shape: torch.Size
    values: Float[Tensor, "draws elements"]


def site_elements(
    latents: Latents,
    subnet: Subnet,
    theta: Float[Tensor, "draws subnet"],
    sites: Sequence[str] | None = None,
) -> dict[str, SiteElements]:
    """Constrained values of the elements that draws of a subnet move.

    Where a constraint acts element by element, those are the subnet's own. Where it
    ties elements together (a simplex, a Cholesky factor), they are all elements of each
    value that holds a chosen one.

    Args:
        latents: The latent sites; other elements are taken from there.
        subnet: The chosen elements.
        theta: Draws of them, unconstrained.
        sites: Which sites; by default all that hold chosen elements.

    Returns:
        ``{site: elements}``, in packing order. Takes K S numbers, and a few draws of
        one site at a time where its constraint is not trivial.

    Raises:
        SelectionError: If a site holds no chosen element.
    """
    chosen = subnet.indices
    _check_sites(sites, chosen)
    counts = [within.numel() for within in chosen.values()]
    pieces = dict(zip(chosen, theta.split(counts, dim=-1), strict=True))
    return {
        name: _elements(latents.values[name], latents.transforms[name], within, piece)
        for (name, within), piece in zip(chosen.items(), pieces.values(), strict=True)
        if sites is None or name in sites
    }


def _elements(
    base: Tensor, transform: Transform, within: Tensor, piece: Tensor
) -> SiteElements:
    plain = _without_independence(transform)
    if _is_identity(plain):
        return SiteElements(within, base.shape, piece.detach())
    shape = transform.forward_shape(base.shape)
    inside = _last(base.shape, plain.domain.event_dim)
    outside = _last(shape, plain.codomain.event_dim)
    groups = (within // inside).unique()
    within_group = torch.arange(outside, device=within.device)
    positions = (groups.unsqueeze(-1) * outside + within_group).flatten()
    held = max(1, _HELD_AT_ONCE // max(base.numel(), 1))
    parts = []
    for some in piece.split(held):
        value = transform(place_elements(base, within, some, base.ndim))
        parts.append(
            value.flatten(1)[:, positions] if value.ndim > 1 else value[:, None]
        )
    return SiteElements(positions, shape, torch.cat(parts).detach())


def _last(shape: Sequence[int], count: int) -> int:
    """How many elements the last axes of a shape hold."""
    return math.prod(shape[len(shape) - count :])


def _without_independence(transform: Transform) -> Transform:
    while isinstance(transform, IndependentTransform):  # what `to_event` makes of one
        transform = transform.base_transform
    return transform


def _is_identity(transform: Transform) -> bool:
    return isinstance(transform, ComposeTransform) and not transform.parts


def _check_sites(sites: Sequence[str] | None, chosen: Mapping[str, Tensor]) -> None:
    for name in sites or ():
        if name not in chosen:
            raise SelectionError(
                "`sites` must be latent sites with elements in the subnet, some of "
                f"{list(chosen)}; got {name!r}. Leave `sites` out for all of them."
            )
