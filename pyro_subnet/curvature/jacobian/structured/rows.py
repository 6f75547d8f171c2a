"""The structured route: entries of J from each layer's input and output gradient.

One run of the model records where the chosen weights enter (``tape.py``). One backward
pass a row of :math:`R` gives the gradients of those layers' outputs for all data at
once. Products of the two are the chosen entries; nothing else is formed, and
backpropagation stops at the earliest layer that holds a chosen weight.

This supposes that axis 0 of every layer is the data's, and that no layer couples data.
Both are checked before a number is given out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_subnet.curvature.jacobian.output_map import (
    Blocks,
    Factors,
    JacobianBlock,
    OutputMap,
    cotangent_rows,
    num_rows,
)
from pyro_subnet.curvature.jacobian.plain import mixed_rows
from pyro_subnet.curvature.jacobian.structured.recording import (
    COUPLED,
    Column,
    Gradients,
    NotLayered,
    Recording,
    not_layered_on_errors,
    recordings,
)
from pyro_subnet.tensors.agreement import agree, random_direction
from pyro_subnet.tensors.modes import at_least_float32

# Layers hold a few times their activations: data that need less than the budget by this
# factor are known to fit without a trial run.
_FAR_BELOW = 32
# Data that need up to so many times the budget are not divided.
_UNDIVIDED = 2

OtherRoute = Callable[[OutputMap, Factors], Blocks]


def layered_blocks(
    outputs: OutputMap, factors: Factors, budget: int, other: OtherRoute
) -> Blocks:
    """Yields rows of :math:`R J`, one block a site for every group of data."""
    with not_layered_on_errors():
        group = _group(outputs, factors, budget)
        for start, recording, sliced in recordings(outputs, factors, group):
            rows = _group_rows(recording, sliced)
            _check_gradient(recording, sliced, rows)
            if recording.tape.escaped:
                _fill_escaped(recording, sliced, other, rows)
            yield from _by_site(rows, recording, sliced, start)


def _by_site(
    rows: Tensor, recording: Recording, factors: Factors, start: int
) -> Blocks:
    """Rows of a group of data, (B, rows of a data point, S), as one block a site."""
    count = recording.outputs.num_data
    per_site = rows.split([num_rows(factor, count) for factor in factors], dim=1)
    for site, (block, factor) in enumerate(zip(per_site, factors, strict=True)):
        first = start * len(factor) // count
        shaped = block.reshape(len(factor), factor.shape[1], -1)
        yield JacobianBlock(site, first, shaped)


def _check_gradient(recording: Recording, factors: Factors, rows: Tensor) -> None:
    """Compares with autograd's gradient of the whole group, for a random cotangent."""
    # Two linear maps that agree on a random vector, (R J)^T u, are equal with
    # probability one: data that are coupled, or on another axis, do not agree.
    num_data = recording.outputs.num_data
    u = random_direction(rows.shape[:2], rows)
    counts = [num_rows(factor, num_data) for factor in factors]
    of_site = zip(factors, u.split(counts, dim=1), strict=True)
    weights = [part.reshape(len(factor), -1) for factor, part in of_site]
    expected = recording.weight_gradient(mixed_rows(factors, weights))
    found = recording.of_layered(u.flatten() @ rows.flatten(0, 1))
    if not agree(found.unsqueeze(-1), expected.unsqueeze(-1)):
        raise NotLayered(COUPLED)


def _group(outputs: OutputMap, factors: Factors, budget: int) -> int:
    """How many data fit in the budget, by what a single one takes."""
    rows = sum(num_rows(factor, outputs.num_data) for factor in factors)
    # A quarter more is held while entries are added to a row.
    element_size = torch.finfo(at_least_float32(outputs.loc.dtype)).bits // 8
    jacobian = 5 * rows * outputs.size * element_size // 4
    activations = 2 * outputs.activation_bytes // outputs.num_data
    needed = outputs.num_data * (jacobian + activations)
    if outputs.num_data == 1 or needed * _FAR_BELOW <= budget:
        return outputs.num_data
    probe = Recording(outputs.at(0, 1), whole=False)
    held = sum(column.entries.nbytes for column in probe.columns())
    one = held + jacobian + activations
    # Whether data may be taken apart costs eight passes over a few to find out.
    if outputs.num_data * one <= _UNDIVIDED * budget:
        return outputs.num_data
    return max(1, min(outputs.num_data, budget // one))


def _group_rows(recording: Recording, factors: Factors) -> Tensor:
    """Rows of R J of a recording's data, (B, rows of a data point, S)."""
    outputs = recording.outputs
    counts = [num_rows(factor, outputs.num_data) for factor in factors]
    rows = outputs.loc.new_zeros(
        outputs.num_data,
        sum(counts),
        outputs.size,
        dtype=at_least_float32(outputs.loc.dtype),
    )
    columns = recording.columns()
    per_site = zip(factors, rows.split(counts, dim=1), strict=True)
    for site, (factor, target) in enumerate(per_site):
        cotangents = cotangent_rows(factor, outputs.num_data)
        for k, deltas in enumerate(recording.gradients(site, cotangents)):
            _add_entries(target[:, k], columns, deltas)
    return rows


def _add_entries(target: Tensor, columns: Sequence[Column], deltas: Gradients) -> None:
    """Adds every use's entries to one row of J of each data point, (B, S)."""
    for column in columns:
        delta = deltas[column.edge]
        if delta is None:
            continue
        entries = column.entries(delta)
        if isinstance(column.columns, Tensor):
            target.index_add_(1, column.columns, entries)
        elif column.first:
            target[:, column.columns] = entries
        else:
            target[:, column.columns] += entries


def _fill_escaped(
    recording: Recording, factors: Factors, other: OtherRoute, rows: Tensor
) -> None:
    """Computes the columns of sites that this route does not serve, by another one."""
    outputs = recording.outputs
    place = recording.escaped_columns()
    counts = [num_rows(factor, outputs.num_data) for factor in factors]
    per_site = rows.split(counts, dim=1)
    for block in other(outputs.over(recording.tape.escaped), factors):
        each = len(factors[block.site]) // outputs.num_data
        # By observation and element.
        target = per_site[block.site].unflatten(1, (each, -1))
        few = torch.arange(block.start, block.start + len(block.rows)).to(place)
        rank = torch.arange(target.shape[2]).to(place)[:, None]
        at = few[:, None, None]
        target[at // each, at % each, rank, place] = block.rows.to(target)
