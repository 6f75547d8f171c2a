"""Uses of weights whose entries of J are products: of outputs' gradients and inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_subnet.curvature.jacobian.structured.entries import (
    Broadcast,
    Channelwise,
    Contraction,
    Entries,
    Spread,
)
from pyro_subnet.curvature.jacobian.structured.recording import Column


@dataclass(frozen=True, eq=False)
class FactoredUse:
    r"""A use of a weight whose entries of J are a grid of products.

    .. math:: J_{b,pq} = \sum_t \ell_{bpt}\, r_{bqt}

    Attributes:
        column: The use.
        left: From the output's gradient to shape (B, P, T).
        right: Inputs, shape (B, Q, T).
        positions: Columns of J in a grid, shape (P, Q), ascending along both axes.
        rows: Which P each row of the grid is.
        columns: Which Q each column of the grid is.
    """

    column: Column
    left: Spread
    right: Tensor
    positions: Tensor
    rows: Tensor
    columns: Tensor


def factored_uses(
    columns: Iterable[Column], num_data: int
) -> tuple[list[list[FactoredUse]], list[Column]]:
    """Uses whose entries of J are grids of products, and the others.

    A site has such uses alone or none: where one of them is no grid, or two grids hold
    the same elements in different places, all are others.

    Args:
        columns: All uses of the weights.
        num_data: How many data they are of.

    Returns:
        Uses that share a grid, grid by grid, and the uses of all other sites.
    """
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
    """Blocks of one site; none if a use has no factors or blocks overlap."""
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
    """A use as a grid of products; None if it is no such."""
    sides = _sides(column, num_data) if column.affine else None
    if sides is None:
        return None
    left, right, p, q, num_left = sides
    at = column.columns
    if isinstance(at, slice):
        at = torch.arange(at.start, at.stop, device=p.device)
    elif len(at.unique()) < len(at):  # an element several times in one matrix
        return None
    if len(at) != num_left * right.shape[1]:
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
    """Both sides of the products, the place of each entry in them, and P."""
    entries = column.entries
    if isinstance(entries, Contraction):
        if entries.q is None or entries.order is not None:
            return None
        return entries.left, entries.right, entries.p, entries.q, entries.num_left
    if isinstance(entries, Channelwise):
        at, left = entries.channels, _channel_positions(entries, num_data)
    elif isinstance(entries, Broadcast) and entries.num_columns == 1:
        at, left = entries.columns[:1], _all_positions(entries, num_data)
    else:
        return None
    if column.affine == "sum":
        left = _summed(entries)
    elif entries.factor is not None:
        return None
    p = torch.arange(len(at), device=at.device)
    ones = torch.ones(num_data, 1, 1, dtype=torch.float32, device=at.device)
    return left, ones, p, torch.zeros_like(p), len(p)


def _summed(entries: Entries) -> Spread:
    """Entries of J themselves, sums over the positions that a vector is added at."""

    def left(delta: Tensor) -> Tensor:
        return entries(delta).unsqueeze(-1)

    return left


def _channel_positions(entries: Channelwise, num_data: int) -> Spread:
    """Gradients at each position that a vector is added at."""

    def left(delta: Tensor) -> Tensor:
        side = delta.index_select(entries.axis, entries.channels)
        side = side.movedim(entries.axis, 1)
        return side.unflatten(0, (num_data, -1)).transpose(1, 2).flatten(2)

    return left


def _all_positions(entries: Broadcast, num_data: int) -> Spread:
    """Gradients at each position that a number is added at."""

    def left(delta: Tensor) -> Tensor:
        flat = delta.reshape(num_data, -1)
        return flat.index_select(1, entries.features).unsqueeze(1)

    return left


def same_positions(first: Tensor, second: Tensor) -> bool:
    """Whether two grids hold the same elements.

    Args:
        first: Positions, shape (P, Q).
        second: The others.

    Returns:
        True if they do, in the same places.
    """
    return first.shape == second.shape and torch.equal(first, second)
