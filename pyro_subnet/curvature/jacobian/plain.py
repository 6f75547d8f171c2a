"""Plain reverse mode, to which the rows of every route are held before they are used.

It is `torch.autograd.grad` of one run of the model as it stands, without `vmap`: what
training itself takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.curvature.jacobian.output_map import (
    Blocks,
    Factors,
    JacobianBlock,
    OutputMap,
)
from pyro_subnet.tensors.agreement import agree, random_direction, random_stream
from pyro_subnet.tensors.modes import differentiable
from pyro_subnet.tensors.pullback import weighted_sum


class WrongRows(Exception):
    """Raised when a route's rows are not plain reverse mode's; then another follows."""


@final
@dataclass(frozen=True, eq=False)
class PlainRun:
    """A run whose graph is there: of few outputs each has a backward pass of its own.

    Attributes:
        leaves: Values of the chosen sites, where the graph begins.
        values: Its outputs, (M, c) an observed site.
    """

    leaves: Mapping[str, Tensor]
    values: tuple[Tensor, ...]

    def blocks(self, outputs: OutputMap, factors: Factors) -> Blocks:
        """Yields one block of :math:`R J` a site, with all its elements."""
        leaves = [self.leaves[site] for site in outputs.chosen]
        for site, (value, factor) in enumerate(zip(self.values, factors, strict=True)):
            with differentiable():
                elements = value.flatten().unbind()
            found = [
                torch.autograd.grad(
                    element, leaves, retain_graph=True, materialize_grads=True
                )
                for element in elements
            ]
            of_leaves = map(torch.stack, zip(*found, strict=True))
            pairs = zip(of_leaves, outputs.chosen.values(), strict=True)
            columns = [own.flatten(1)[:, at] for own, at in pairs]
            rows = torch.cat(columns, 1)
            yield JacobianBlock(site, 0, factor @ rows.unflatten(0, value.shape))


def plain_gradient(
    outputs: OutputMap, cotangents: Sequence[Tensor]
) -> Float[Tensor, " subnet"]:
    """Gradient at the chosen elements, for a cotangent of each observed site."""
    leaves = {s: v.detach().requires_grad_() for s, v in outputs.base.items()}
    with differentiable():
        values = outputs.of_sites(leaves, None)
    pairs = zip(values, cotangents, strict=True)
    live = [(value, u.to(value)) for value, u in pairs if value.requires_grad]
    if not live:
        return outputs.loc.new_zeros(outputs.size)
    gradients = torch.autograd.grad(
        weighted_sum(*zip(*live, strict=True)),
        list(leaves.values()),
        materialize_grads=True,
    )
    return at_chosen(dict(zip(leaves, gradients, strict=True)), outputs.chosen)


def at_chosen(gradients: Mapping[str, Tensor], chosen: Mapping[str, Tensor]) -> Tensor:
    """Elements of gradients by site, site by site: (S,) if they are of all sites."""
    parts = [gradient.flatten()[chosen[site]] for site, gradient in gradients.items()]
    return torch.cat(parts)


def mixed_rows(factors: Factors, weights: Sequence[Tensor]) -> list[Tensor]:
    r"""Cotangents :math:`\sum_r u_{mr} R_{mr}` of each element m, one a site."""
    pairs = zip(factors, weights, strict=True)
    return [torch.einsum("mr,mrc->mc", u.to(factor), factor) for factor, u in pairs]


@torch.no_grad()
def require_held(
    outputs: OutputMap, factors: Factors, blocks: Sequence[JacobianBlock]
) -> None:
    """Holds blocks, which are all of :math:`R J` site by site, to plain reverse mode.

    Raises:
        WrongRows: If a random mixture of their rows is not its gradient.
    """
    stream = random_stream()
    found = outputs.loc.new_zeros(outputs.size)
    weights = []
    for block in blocks:
        u = random_direction(block.rows.shape[:2], block.rows, stream)
        found = found + u.flatten() @ block.rows.flatten(0, 1)
        weights.append(u)
    expected = plain_gradient(outputs, mixed_rows(factors, weights))
    if not agree(found.unsqueeze(-1), expected.unsqueeze(-1)):
        raise WrongRows("rows are not those of plain reverse mode")


def require_held_gradients(
    outputs: OutputMap, factors: Factors, blocks: Sequence[JacobianBlock]
) -> None:
    """Holds gradients of :func:`require_held`'s rows, at the data, to plain ones.

    Raises:
        WrongRows: If those of a random mixture of all their numbers disagree.
    """
    data = [row for row in outputs.rows if row.requires_grad]
    if not data:
        raise WrongRows("what wants gradients is no row of the data")
    stream = random_stream()
    v = random_direction((outputs.size,), outputs.loc, stream)
    weights, found = [], outputs.loc.new_zeros(())
    for block in blocks:
        u = random_direction(block.rows.shape[:2], block.rows, stream)
        found = found + (u * (block.rows @ v.to(block.rows))).sum()
        weights.append(u)
    # u^T R J v once more, by plain passes
    theta = outputs.loc.detach().requires_grad_()
    cotangents = mixed_rows(factors, weights)
    pairs = zip(outputs.outputs(theta), cotangents, strict=True)
    parts = [(value * u.to(value)).sum() for value, u in pairs]
    (gradient,) = torch.autograd.grad(
        torch.stack(parts).sum(), theta, create_graph=True, materialize_grads=True
    )
    ours, plain = (_at_data(total, data) for total in (found, gradient @ v))
    if not agree(ours.unsqueeze(-1), plain.unsqueeze(-1)):
        raise WrongRows("gradients of rows are not those of plain reverse mode")


def _at_data(total: Tensor, data: Sequence[Tensor]) -> Tensor:
    gradients: Sequence[Tensor] = [torch.zeros_like(row) for row in data]
    if total.requires_grad:
        gradients = torch.autograd.grad(
            total, data, retain_graph=True, materialize_grads=True
        )
    return torch.cat([part.flatten() for part in gradients])
