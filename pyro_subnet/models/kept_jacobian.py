"""A Jacobian that is kept, and what draws move."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

# What is expanded: the parameters of an output site, a deterministic site, or a tensor
# among what the model returns.
Key = tuple[str, str]
# Elements of draws that are compared with the MAP at once: what two passes read fast.
_COMPARED_AT_ONCE = 2**23


@final
@dataclass(frozen=True, eq=False)
class Link:
    """A value that the weights move through another one alone, datum by datum.

    Attributes:
        source: Key of the other one.
        jacobian: Of a datum's numbers in those of the other one; None where both are
            one tensor.
    """

    source: Key
    jacobian: Float[Tensor, "data own other"] | None

    def follow(
        self, tangents: Float[Tensor, "draws others"]
    ) -> Float[Tensor, "draws owns"]:
        """Tangents of the value, from those of the other one."""
        if self.jacobian is None:
            return tangents
        num_data, _, num_others = self.jacobian.shape
        steps = tangents.unflatten(1, (num_data, num_others))
        return torch.einsum("nij,knj->kni", self.jacobian, steps).flatten(1)


@final
@dataclass(frozen=True, eq=False)
class KeptJacobian:
    """J at the chosen elements: one (numbers of the key, S) matrix for each key.

    A key that is linked to another one has none of its own.
    """

    keys: tuple[Key, ...]
    chosen: Mapping[str, Tensor]
    rows: Mapping[Key, Tensor]
    links: Mapping[Key, Link]
    # Positions of the other elements of each site that has any, and their MAP.
    others: Mapping[str, tuple[Tensor, Tensor]]

    def covers(self, keys: Sequence[Key], u: Mapping[str, Tensor]) -> bool:
        """Whether it has these keys' columns for all elements that any draw moves."""
        return tuple(keys) == self.keys and all(
            bool((u[site][:, at] == here).all())
            for site, (at, here) in self.others.items()
        )

    def narrowed(
        self, moved: Mapping[str, Tensor], base: Mapping[str, Tensor]
    ) -> KeptJacobian:
        """The same at some of the chosen elements; itself where they are most."""
        size = sum(at.numel() for at in moved.values())
        if 2 * size >= sum(at.numel() for at in self.chosen.values()):
            return self
        is_moved = torch.cat(
            [
                torch.isin(at, moved[site])
                if site in moved
                else at.new_zeros(len(at), dtype=torch.bool)
                for site, at in self.chosen.items()
            ]
        )
        columns = is_moved.nonzero().squeeze(-1)
        # Laid out as J is: by element.
        rows = {key: part.mT[columns].mT for key, part in self.rows.items()}
        others = other_elements(moved, base)
        return KeptJacobian(self.keys, moved, rows, self.links, others)

    def products(self, steps: Tensor) -> dict[Key, Tensor]:
        """(theta - MAP) J^T, (K, numbers of the key), of the chosen's steps, (K, S)."""
        found = {key: steps.to(rows) @ rows.mT for key, rows in self.rows.items()}
        return followed(found, self.links)


def followed(
    tangents: Mapping[Key, Tensor], links: Mapping[Key, Link]
) -> dict[Key, Tensor]:
    """The same, and the tangents of all that is linked to them."""
    more = {key: link.follow(tangents[link.source]) for key, link in links.items()}
    return {**tangents, **more}


def moved_elements(
    u: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Positions of the elements that any draw moves, for the sites that have any."""
    found = {}
    for site, rows in u.items():
        here = base[site].flatten()
        is_moved = torch.zeros_like(here, dtype=torch.bool)
        for some in rows.split(max(1, _COMPARED_AT_ONCE // max(1, here.numel()))):
            # Without a truth value for each number of each draw; NaN is an extreme.
            is_moved |= (some.amax(0) != here) | (some.amin(0) != here)
        if bool(is_moved.any()):
            found[site] = is_moved.nonzero().squeeze(-1)
    return found


def other_elements(
    chosen: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Positions of the elements that are not chosen, by site, and their values."""
    found = {}
    for site, value in base.items():
        is_other = torch.ones_like(value, dtype=torch.bool).flatten()
        if site in chosen:
            is_other[chosen[site]] = False
        at = is_other.nonzero().squeeze(-1)
        if at.numel():
            found[site] = at, value.flatten()[at]
    return found


def steps_from_map(
    u: Mapping[str, Tensor],
    chosen: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    count: int,
) -> Tensor:
    """theta - MAP of each draw at the chosen elements, (K, S)."""
    parts = [
        (u[site][:, at] - base[site].flatten()[at]).expand(count, -1)
        for site, at in chosen.items()
    ]
    nothing = next(iter(base.values())).new_zeros(count, 0)
    return torch.cat(parts, dim=1) if parts else nothing


def flat_values(
    u: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Values of each site, (K or 1, numbers of the site)."""
    # Not by -1, which a site without numbers leaves open.
    return {
        site: value.reshape(
            math.prod(value.shape[: value.ndim - base[site].ndim]), base[site].numel()
        )
        for site, value in u.items()
    }
