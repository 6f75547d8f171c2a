"""Jacobians of a whole call at once: right for any model, whatever couples its data."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_subnet.curvature.jacobian.output_map import (
    Blocks,
    Factors,
    JacobianBlock,
    OutputMap,
)
from pyro_subnet.tensors.grad_mode import differentiable


def forward_bytes(outputs: OutputMap) -> int:
    """Memory of the Jacobian that forward mode holds.

    Args:
        outputs: The map to be differentiated.

    Returns:
        Bytes of all sites' (M, c, S) blocks.
    """
    entries = sum(count * width for count, width in outputs.shapes)
    return entries * outputs.size * outputs.loc.element_size()


def forward_blocks(outputs: OutputMap, factors: Factors, budget: int) -> Blocks:
    """Forward mode: S directions, in groups; one block a site.

    Costs about 2 S forward passes of the call and holds the whole Jacobian.

    Args:
        outputs: The map to be differentiated.
        factors: R of each element, one (M, r, c) tensor a site.
        budget: Bytes that a group of directions may take.

    Yields:
        One block for every site.
    """
    loc = outputs.loc
    one = outputs.activation_bytes + outputs.num_touched * loc.element_size()
    group = max(1, min(outputs.size, budget // (2 * one)))

    def push(direction: Tensor) -> tuple[Tensor, ...]:
        return torch.func.jvp(outputs.outputs, (loc,), (direction,))[1]

    columns = [loc.new_empty(*shape, outputs.size) for shape in outputs.shapes]
    for start in range(0, outputs.size, group):
        stop = min(start + group, outputs.size)
        directions = loc.new_zeros(stop - start, outputs.size)
        directions[:, start:stop].fill_diagonal_(1.0)
        for column, derivative in zip(
            columns, torch.func.vmap(push)(directions), strict=True
        ):
            column[..., start:stop] = derivative.movedim(0, -1)
    for site, (column, factor) in enumerate(zip(columns, factors, strict=True)):
        yield JacobianBlock(site, 0, factor @ column)


def reverse_blocks(
    outputs: OutputMap, factors: Factors, budget: int, *, create_graph: bool = False
) -> Blocks:
    """Reverse mode: one backward pass of the whole call for every row, in groups.

    Plain autograd, without ``torch.func``: it takes every model that trains.

    Args:
        outputs: The map to be differentiated.
        factors: R of each element, one (M, r, c) tensor a site.
        budget: Bytes that a group of rows may take.
        create_graph: Whether the rows carry gradients to the data of the call; they
            are then pulled one by one, as not every second derivative can be batched.

    Yields:
        Blocks of consecutive elements, site by site.
    """
    with differentiable():
        leaf = outputs.loc.detach().clone().requires_grad_()
        values = outputs.outputs(leaf)
    one = outputs.activation_bytes + 2 * outputs.num_touched * leaf.element_size()
    group = max(1, budget // one)
    for site, (value, factor) in enumerate(zip(values, factors, strict=True)):
        count, rank, _ = factor.shape
        # Whole elements, unless a single one has more rows than fit.
        step = max(1, group // max(1, rank))
        for start in range(0, count, step):
            stop = min(start + step, count)
            # Row (m, r): element m of the site carries R_m[r], the others nothing.
            cotangents = leaf.new_zeros(stop - start, rank, *value.shape)
            picked = torch.arange(stop - start, device=leaf.device)
            cotangents[picked, :, start + picked] = factor[start:stop]
            pull = _pull_with_graph if create_graph else _pull
            rows = [
                pull(value, leaf, part)
                for part in cotangents.flatten(0, 1).split(group)
            ]
            block = torch.cat(rows).reshape(stop - start, rank, -1)
            yield JacobianBlock(site, start, block)


def _pull(value: Tensor, leaf: Tensor, cotangents: Tensor) -> Tensor:
    """Gradients at ``leaf`` of several cotangents of ``value``."""
    if not value.requires_grad:
        return leaf.new_zeros(len(cotangents), *leaf.shape)
    return torch.autograd.grad(
        value,
        leaf,
        cotangents,
        retain_graph=True,
        is_grads_batched=True,
        materialize_grads=True,
    )[0]


def _pull_with_graph(value: Tensor, leaf: Tensor, cotangents: Tensor) -> Tensor:
    """The same, differentiable in whatever ``value`` was computed from."""
    if not value.requires_grad:
        return leaf.new_zeros(len(cotangents), *leaf.shape)
    found = [
        torch.autograd.grad(
            value, leaf, one, create_graph=True, materialize_grads=True
        )[0]
        for one in cotangents
    ]
    return torch.stack(found)
