"""Reverse mode by data point: one backward pass serves a row of each at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pyro_subnet.curvature.jacobian.directional import directional_derivative
from pyro_subnet.curvature.jacobian.output_map import (
    Blocks,
    Factors,
    JacobianBlock,
    OutputMap,
    factors_of,
)
from pyro_subnet.curvature.jacobian.plain import require_held
from pyro_subnet.tensors.agreement import agree, random_direction


def separates_by_datum(outputs: OutputMap, budget: int, forward_mode: bool) -> bool:
    """Whether outputs and Jacobian of each data point depend on that point alone."""
    if outputs.num_data == 1 or not outputs.rows:
        return False
    # The model runs on every data point by itself. Outputs, and derivatives along a
    # random direction, must be those of the call on all data: a model that couples its
    # data (batch statistics, attention or centring over the batch) does not pass.
    like = outputs.loc
    direction = random_direction(like.shape, like)

    def derivative(function: Callable[[Tensor], tuple[Tensor, ...]]) -> Any:
        return directional_derivative(function, like, direction, forward_mode)

    def of_datum(*datum: Tensor) -> Any:
        return derivative(lambda theta: outputs.datum_outputs(theta, datum))

    try:
        whole = derivative(outputs.outputs)
        pieces = [
            torch.func.vmap(of_datum)(*rows)
            for _, rows in _slices(outputs, _group(outputs, 1, budget))
        ]
    # The user's code may fail here in many ways: a fixed plate size, a view, an
    # operation that torch.func cannot transform. Then another route is taken.
    except Exception:
        return False
    for which in (0, 1):
        for site, reference in enumerate(whole[which]):
            single = torch.cat([piece[which][site] for piece in pieces])
            if not agree(single.reshape(-1, single.shape[-1]), reference):
                return False
    return True


def per_datum_blocks(outputs: OutputMap, factors: Factors, budget: int) -> Blocks:
    """Yields blocks of groups of data, by reverse mode batched over data and rows.

    Valid only where :func:`separates_by_datum` holds. Costs as many backward passes of
    the call as a data point has rows, each with dense gradients of the chosen sites.

    Raises:
        WrongRows: Before any block of a group whose rows are not plain reverse mode's.
    """
    num_data = outputs.num_data
    per_site = [factor.unflatten(0, (num_data, -1)) for factor in factors]
    sizes = [factor.shape[1:3] for factor in per_site]  # m elements of r rows each
    num_rows = [m * r for m, r in sizes]
    group = _group(outputs, sum(num_rows), budget)
    dense_row = 2 * outputs.num_touched * outputs.loc.element_size()
    chunk = max(1, budget // (group * dense_row))

    def rows_of(factor: tuple[Tensor, ...], *datum: Tensor) -> tuple[Tensor, ...]:
        pullback = torch.func.vjp(
            lambda theta: outputs.datum_outputs(theta, datum), outputs.loc
        )[1]
        cotangents = _cotangents(factor)
        pull = torch.func.vmap(lambda *u: pullback(u)[0], chunk_size=chunk)
        rows = pull(*cotangents).split(num_rows)
        return tuple(
            row.reshape(m, r, -1) for row, (m, r) in zip(rows, sizes, strict=True)
        )

    for start, rows in _slices(outputs, group):
        stop = start + rows[0].shape[0]
        sliced = tuple(factor[start:stop] for factor in per_site)
        blocks = [
            JacobianBlock(site, start * sizes[site][0], block.flatten(0, 1))
            for site, block in enumerate(torch.func.vmap(rows_of)(sliced, *rows))
        ]
        # Under two `vmap`s some operations have wrong derivatives, and say nothing.
        own = factors_of(factors, num_data, start, stop)
        require_held(outputs.at(start, stop), own, blocks)
        yield from blocks


def _cotangents(factors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Rows of all sites' factors as cotangents: (rows of all sites, M, c) a site."""
    total = sum(factor.shape[0] * factor.shape[1] for factor in factors)
    result, start = [], 0
    for factor in factors:
        count, rank, width = factor.shape
        own = count * rank
        # Row (m, r) puts R_m[r] at element m: a block-diagonal spread of the factor.
        eye = torch.eye(count, dtype=factor.dtype, device=factor.device)
        spread = torch.einsum("mn,mrc->mrnc", eye, factor).reshape(own, count, width)
        before = factor.new_zeros(start, count, width)
        after = factor.new_zeros(total - start - own, count, width)
        result.append(torch.cat([before, spread, after]))
        start += own
    return tuple(result)


def _group(outputs: OutputMap, num_rows: int, budget: int) -> int:
    """How many data fit in the budget, at ``num_rows`` dense gradients each."""
    dense = 3 * num_rows * outputs.num_touched * outputs.loc.element_size()
    activations = math.ceil(outputs.activation_bytes / outputs.num_data)
    one = dense + (1 + num_rows) * activations
    return max(1, min(outputs.num_data, budget // one))


def _slices(outputs: OutputMap, group: int) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    for start in range(0, outputs.num_data, group):
        yield start, tuple(row[start : start + group] for row in outputs.rows)
