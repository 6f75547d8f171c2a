"""Jacobians of a whole call at once: right for any model, whatever couples its data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_subnet.curvature.jacobian.directional import forward_derivative
from pyro_subnet.curvature.jacobian.output_map import (
    Blocks,
    Factors,
    JacobianBlock,
    OutputMap,
)
from pyro_subnet.curvature.jacobian.plain import require_held
from pyro_subnet.tensors.modes import differentiable
from pyro_subnet.tensors.pullback import weighted_sum
from pyro_subnet.tensors.row_gradients import RowGradients


def forward_bytes(outputs: OutputMap) -> int:
    """Bytes of the Jacobian that forward mode holds, (M, c, S) for every site."""
    entries = sum(count * width for count, width in outputs.shapes)
    return entries * outputs.size * outputs.loc.element_size()


def forward_blocks(outputs: OutputMap, factors: Factors, budget: int) -> Blocks:
    """Yields one block a site by forward mode, its S directions in groups.

    Costs about 2 S forward passes of the call and holds the whole Jacobian.

    Raises:
        WrongRows: Before the first block, if they are not plain reverse mode's.
    """
    loc = outputs.loc
    one = outputs.activation_bytes + outputs.num_touched * loc.element_size()
    group = max(1, min(outputs.size, budget // (2 * one)))

    def push(direction: Tensor) -> tuple[Tensor, ...]:
        return forward_derivative(outputs.outputs, loc, direction)[1]

    columns = [loc.new_empty(*shape, outputs.size) for shape in outputs.shapes]
    for start in range(0, outputs.size, group):
        stop = min(start + group, outputs.size)
        directions = loc.new_zeros(stop - start, outputs.size)
        directions[:, start:stop].fill_diagonal_(1.0)
        found = torch.func.vmap(push)(directions)
        for column, derivative in zip(columns, found, strict=True):
            column[..., start:stop] = derivative.movedim(0, -1)
    pairs = zip(columns, factors, strict=True)
    blocks = [
        JacobianBlock(site, 0, factor @ column)
        for site, (column, factor) in enumerate(pairs)
    ]
    require_held(outputs, factors, blocks)
    yield from blocks


def column_blocks(outputs: OutputMap, factors: Factors, budget: int) -> Blocks:
    """Yields one block a site, column by column, by reverse mode of reverse mode.

    For very few elements, such as a noise scale. Costs a backward pass and one through
    it a column; forward mode's two forward passes are cheaper, but its first use
    imports a compiler for half a second, ten times what a small fit takes.

    Raises:
        WrongRows: Before the first block, if they are not plain reverse mode's.
    """
    with differentiable():
        leaf = outputs.loc.detach().clone().requires_grad_()
        values = outputs.outputs(leaf)
        # J^T u is linear in u: its derivative along an element is that column of J.
        cotangents = [torch.zeros_like(value).requires_grad_() for value in values]
        (pulled,) = torch.autograd.grad(
            weighted_sum(values, cotangents),
            leaf,
            create_graph=True,
            materialize_grads=True,
        )
        elements = pulled.unbind()
    columns: list[list[Tensor]] = [[] for _ in values]
    for element in elements:
        found: Sequence[Tensor] = [torch.zeros_like(value) for value in values]
        if element.requires_grad:
            found = torch.autograd.grad(
                element, cotangents, retain_graph=True, materialize_grads=True
            )
        for column, own in zip(columns, found, strict=True):
            column.append(own.detach())
    blocks = [
        JacobianBlock(site, 0, factor @ torch.stack(column, -1))
        for site, (column, factor) in enumerate(zip(columns, factors, strict=True))
    ]
    require_held(outputs, factors, blocks)
    yield from blocks


def reverse_blocks(
    outputs: OutputMap, factors: Factors, budget: int, *, create_graph: bool = False
) -> Blocks:
    """Yields blocks by reverse mode: a backward pass of the whole call a row."""
    # Plain autograd, without `torch.func`: it takes every model that trains. Several
    # rows share a pass where that gives the same. With `create_graph` they carry
    # gradients to the data of the call.
    with differentiable():
        leaf = outputs.loc.detach().clone().requires_grad_()
        values = outputs.outputs(leaf)
    one = outputs.activation_bytes + 2 * outputs.num_touched * leaf.element_size()
    group = max(1, budget // one)
    for site, (value, factor) in enumerate(zip(values, factors, strict=True)):
        count, rank, _ = factor.shape
        rows_of = RowGradients(value, [leaf], create_graph=create_graph)
        # Whole elements are a block, though a single one may have more rows than fit.
        step = max(1, group // max(1, rank))
        for start in range(0, count, step):
            stop = min(start + step, count)
            # Row (m, r): element m of the site carries R_m[r], the others nothing.
            cotangents = leaf.new_zeros(stop - start, rank, *value.shape)
            picked = torch.arange(stop - start, device=leaf.device)
            cotangents[picked, :, start + picked] = factor[start:stop].to(leaf)
            rows = [
                rows_of(part.to(value))[0]
                for part in cotangents.flatten(0, 1).split(group)
            ]
            block = torch.cat(rows).reshape(stop - start, rank, -1)
            yield JacobianBlock(site, start, block)
