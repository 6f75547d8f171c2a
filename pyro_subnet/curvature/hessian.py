r"""The exact Hessian of a scalar function, restricted to the chosen elements."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.curvature.jacobian.directional import forward_mode_agrees
from pyro_subnet.curvature.jacobian.general.per_datum import separates_by_datum
from pyro_subnet.curvature.jacobian.output_map import OutputMap
from pyro_subnet.tensors.modes import differentiable
from pyro_subnet.tensors.row_gradients import RowGradients

# Runs' worth of activations that a direction keeps: one pass forward, two backward.
_PASSES = 4
# Directions that are batched where the data must be grouped, too, to fit the budget.
_FEW_DIRECTIONS = 8


def subtract_hessian_(
    total: Float[Tensor, "subnet subnet"], outputs: OutputMap, budget: int
) -> None:
    r"""Subtracts :math:`\nabla_S^2 \sum_n f_n` from the lower triangle, in place.

    By Hessian-vector products, one for each chosen element: S times a few passes, where
    the Gauss-Newton matrix takes one a class. ``outputs`` are the numbers :math:`f_n`.

    Source: Pearlmutter (1994), Fast exact multiplication by the Hessian.
    """
    for part in _groups(outputs, budget):
        with differentiable():
            theta = part.loc.detach().clone().requires_grad_()
            value = torch.stack([f.sum() for f in part.outputs(theta)]).sum()
            gradient = torch.zeros_like(theta)
            if value.requires_grad:
                (gradient,) = torch.autograd.grad(value, theta, create_graph=True)
        # Where f is linear in theta there is no graph left, and the Hessian is 0.
        if gradient.requires_grad:
            for start, rows in _rows(gradient, theta, _directions(part, budget)):
                stop = start + len(rows)
                total[start:stop, :stop] -= rows[:, :stop]


def _rows(gradient: Tensor, theta: Tensor, count: int) -> Iterator[tuple[int, Tensor]]:
    """Groups of rows of the Hessian, each with the position of its first row."""
    size, rows_of = len(theta), RowGradients(gradient, [theta])
    for start in range(0, size, count):
        stop = min(start + count, size)
        basis = gradient.new_zeros(stop - start, size)
        basis[:, start:stop].fill_diagonal_(1.0)
        (rows,) = rows_of(basis)
        yield start, rows


def _directions(part: OutputMap, budget: int) -> int:
    """How many directions fit in the budget."""
    dense = 2 * part.num_touched * part.loc.element_size()
    return max(1, budget // (_PASSES * part.activation_bytes + dense))


def _groups(outputs: OutputMap, budget: int) -> Iterator[OutputMap]:
    """The data in groups that fit in the budget, or all at once if coupled."""
    num_data = outputs.num_data
    needed = _PASSES * _FEW_DIRECTIONS * outputs.activation_bytes
    group = max(1, min(num_data, num_data * budget // max(1, needed)))
    if group < num_data:
        forward_mode = forward_mode_agrees(outputs.outputs, outputs.loc)
        if not separates_by_datum(outputs, budget, forward_mode):
            group = num_data
    for start in range(0, num_data, group):
        yield outputs.at(start, min(start + group, num_data))
