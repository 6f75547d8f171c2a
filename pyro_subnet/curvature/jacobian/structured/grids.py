"""Uses of weights whose entries of J are products of output gradients and inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor

from pyro_subnet.curvature.jacobian.structured.entries import (
    Broadcast,
    Channelwise,
    Contraction,
    Spread,
)
from pyro_subnet.curvature.jacobian.structured.recording import Column
from pyro_subnet.curvature.jacobian.structured.tape import Entries


@final
@dataclass(frozen=True, eq=False)
class FactoredUse:
    r"""A use of a weight whose entries of J are a grid of products.

    .. math:: J_{b,pq} = \sum_t \ell_{bpt}\, r_{bqt}
    """

    column: Column
    left: Spread  # l, from the output's gradient to shape (B, P, T)
    right: Tensor  # r, inputs, shape (B, Q, T)
    positions: Tensor  # columns of J, shape (P, Q), ascending along both axes
    rows: Tensor  # which p each row of the grid is
    columns: Tensor  # which q each column of the grid is


def factored_uses(
    columns: Iterable[Column], num_data: int
) -> tuple[list[list[FactoredUse]], list[Column]]:
    """Uses that share a grid, grid by grid, and all uses of sites without grids."""
    # A site has grids alone or none: where one of its uses is no grid, or two grids
    # hold the same elements in different places, none of its uses is factored.
    by_site: dict[str, list[Column]] = {}
    for column in columns:
        by_site.setdefault(column.site, []).append(column)
    blocks, rest = list[list[FactoredUse]](), list[Column]()
    for own in by_site.values():
        found = _blocks_of_site(own, num_data)
        blocks += found
        if not found:
            rest += own
    return blocks, rest


def _blocks_of_site(own: Sequence[Column], num_data: int) -> list[list[FactoredUse]]:
    """Grids of one site; none if a use has no factors or grids overlap."""
    blocks = list[list[FactoredUse]]()
    for column in own:
        use = _factored(column, num_data)
        if use is None:
            return []
        for block in blocks:
            if same_positions(block[0].positions, use.positions):
                block.append(use)
                break
        else:
            blocks.append([use])
    flat = torch.cat([block[0].positions.flatten() for block in blocks])
    if len(blocks) > 1 and len(flat.unique()) < len(flat):
        return []
    return blocks


def _factored(column: Column, num_data: int) -> FactoredUse | None:
    """A use as a grid of products, or None."""
    sides = _sides(column, num_data) if column.affine else None
    if sides is None:
        return None
    left, right, p, q, num_left = sides
    at = column.columns
    if isinstance(at, slice):
        at = torch.arange(at.start, at.stop, device=p.device)
    elif len(at.unique()) < len(at):  # an element several times in one matrix
        return None
    if len(at) != num_left * right.shape[1]:  # not every product is a chosen entry
        return None
    grid = torch.full((num_left, right.shape[1]), -1, device=p.device)
    grid[p, q] = at
    if bool((grid < 0).any()):
        return None
    rows, columns = grid[:, 0].argsort(), grid[0].argsort()
    return FactoredUse(column, left, right, grid[rows][:, columns], rows, columns)


def _sides(
    column: Column, num_data: int
) -> tuple[Spread, Tensor, Tensor, Tensor, int] | None:
    """Both sides of the products, the places of each entry in them, and P."""
    entries = column.entries
    if isinstance(entries, Contraction):
        if entries.q is None or entries.order is not None:
            return None
        return entries.left, entries.right, entries.p, entries.q, entries.num_left
    if isinstance(entries, Channelwise):
        at, left = entries.channels, partial(_channel_positions, entries, num_data)
    elif isinstance(entries, Broadcast) and entries.num_columns == 1:
        at, left = entries.columns[:1], partial(_all_positions, entries, num_data)
    else:
        return None
    # A layer's bias takes positions for further data, as its weights do; a vector that
    # is added by a sum of its own has its exact block.
    if column.affine == "sum":
        left = partial(_summed, entries)
    elif entries.factor is not None:
        return None
    p = torch.arange(len(at), device=at.device)
    ones = torch.ones(num_data, 1, 1, dtype=torch.float32, device=at.device)
    return left, ones, p, torch.zeros_like(p), len(p)


def _summed(entries: Entries, delta: Tensor) -> Tensor:
    """Entries of J themselves: sums over the positions that a vector is added at."""
    return entries(delta).unsqueeze(-1)


def _channel_positions(entries: Channelwise, num_data: int, delta: Tensor) -> Tensor:
    """Gradients at each position that a vector is added at."""
    side = delta.index_select(entries.axis, entries.channels)
    side = side.movedim(entries.axis, 1)
    return side.unflatten(0, (num_data, -1)).transpose(1, 2).flatten(2)


def _all_positions(entries: Broadcast, num_data: int, delta: Tensor) -> Tensor:
    """Gradients at each position that a number is added at."""
    flat = delta.reshape(num_data, -1)
    return flat.index_select(1, entries.features).unsqueeze(1)


def same_positions(first: Tensor, second: Tensor) -> bool:
    """Whether two grids hold the same elements in the same places."""
    return first.shape == second.shape and torch.equal(first, second)
