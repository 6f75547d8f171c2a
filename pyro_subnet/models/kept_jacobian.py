"""A Jacobian that is kept, and what draws move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

# What is expanded: the parameters of an output site, a deterministic site, or a tensor
# among what the model returns.
Key = tuple[str, str]
# Elements of draws that are compared with the MAP at once: about what a cache holds.
_COMPARED_AT_ONCE = 2**21


@final
@dataclass(frozen=True, eq=False)
class KeptJacobian:
    """J at the chosen elements: one (numbers of the key, S) matrix for each key."""

    keys: tuple[Key, ...]
    chosen: Mapping[str, Tensor]
    rows: tuple[Tensor, ...]
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
        rows = tuple(part.mT[columns].mT for part in self.rows)
        return KeptJacobian(self.keys, moved, rows, other_elements(moved, base))


def moved_elements(
    u: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Positions of the elements that any draw moves, for the sites that have any."""
    found = {}
    for site, rows in u.items():
        here = base[site].flatten()
        is_moved = torch.zeros_like(here, dtype=torch.bool)
        for some in rows.split(max(1, _COMPARED_AT_ONCE // here.numel())):
            is_moved |= (some != here).any(0)
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
    return {site: value.reshape(-1, base[site].numel()) for site, value in u.items()}
