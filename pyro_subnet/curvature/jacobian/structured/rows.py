r"""The structured route: entries of J from each layer's input and output gradient.

One run of the model records where the chosen weights enter (``tape.py``). One backward
pass a row of :math:`R` gives the gradients of those layers' outputs for all data at
once. Products of the two are the chosen entries; nothing else is formed, and
backpropagation stops at the earliest layer that holds a chosen weight.

This supposes that axis 0 of every layer is the data's, and that no layer couples data.
Both are checked (``checks.py``) before a number is given out.
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
    num_rows,
)
from pyro_subnet.curvature.jacobian.structured.checks import (
    check_gradient,
    check_separation,
)
from pyro_subnet.curvature.jacobian.structured.recording import (
    Column,
    Gradients,
    Recording,
)
from pyro_subnet.tensors.modes import at_least_float32

# What layers hold is a few times their activations: data this many times below the
# budget fit without a look at it.
_FAR_BELOW = 32

OtherRoute = Callable[[OutputMap, Factors], Blocks]


def layered_blocks(
    outputs: OutputMap, factors: Factors, budget: int, other: OtherRoute
) -> Blocks:
    """Rows of :math:`R J`, data in groups that fit the budget.

    Args:
        outputs: The map to be differentiated.
        factors: R of each element, one (M, r, c) tensor a site.
        budget: Bytes that a group of data may take.
        other: Route of the chosen sites that do not enter layers only.

    Yields:
        For every group of data, one block a site.

    Raises:
        NotLayered: If the model does not fit; blocks given out before are right.
    """
    num_data = outputs.num_data
    group = _group(outputs, factors, budget)
    whole = group == num_data
    if not whole:
        check_separation(outputs)
    for start in range(0, num_data, group):
        stop = min(start + group, num_data)
        sliced = of_group(factors, num_data, start, stop)
        recording = Recording(outputs.at(start, stop), whole=whole)
        rows = _group_rows(recording, sliced)
        check_gradient(recording, sliced, rows)
        if recording.tape.escaped:
            _fill_escaped(recording, sliced, other, rows)
        per_site = rows.split([num_rows(f, stop - start) for f in sliced], dim=1)
        for site, (block, factor) in enumerate(zip(per_site, sliced, strict=True)):
            first = start * len(factor) // (stop - start)
            shaped = block.reshape(len(factor), factor.shape[1], -1)
            yield JacobianBlock(site, first, shaped)


def of_group(factors: Factors, num_data: int, start: int, stop: int) -> Factors:
    """Factors of some consecutive data.

    Args:
        factors: R of each element, one (M, r, c) tensor a site.
        num_data: N.
        start: First datum.
        stop: One past the last.

    Returns:
        One tensor a site.
    """
    return tuple(
        factor[start * len(factor) // num_data : stop * len(factor) // num_data]
        for factor in factors
    )


def _group(outputs: OutputMap, factors: Factors, budget: int) -> int:
    """How many data fit in the budget, by what a single one takes."""
    rows = sum(num_rows(factor, outputs.num_data) for factor in factors)
    # A row is added to as it is made: a quarter more is there for a while.
    element_size = torch.finfo(at_least_float32(outputs.loc.dtype)).bits // 8
    jacobian = 5 * rows * outputs.size * element_size // 4
    activations = 2 * outputs.activation_bytes // outputs.num_data
    needed = outputs.num_data * (jacobian + activations)
    if outputs.num_data == 1 or needed * _FAR_BELOW <= budget:
        return outputs.num_data
    probe = Recording(outputs.at(0, 1), whole=False)
    held = sum(column.entries.nbytes for column in probe.columns())
    return max(1, min(outputs.num_data, budget // (held + jacobian + activations)))


def _group_rows(recording: Recording, factors: Factors) -> Tensor:
    """Rows of :math:`R J` of a recording's data, shape (B, rows of a datum, S)."""
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


def cotangent_rows(factor: Tensor, num_data: int) -> Tensor:
    """Rows of R, one of each datum at a time.

    Args:
        factor: R of each element, shape (M, r, c).
        num_data: N.

    Returns:
        Shape (rows of a datum, M, c).
    """
    per_datum = factor.unflatten(0, (num_data, -1))
    _, count, rank, width = per_datum.shape
    spread = factor.new_zeros(count, rank, num_data, count, width)
    for element in range(count):
        spread[element, :, :, element] = per_datum[:, element].transpose(0, 1)
    return spread.reshape(count * rank, num_data * count, width)


def _add_entries(target: Tensor, columns: Sequence[Column], deltas: Gradients) -> None:
    """Adds what each use contributes to one row of J of each datum, (B, S)."""
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
        flat = per_site[block.site].unflatten(1, (each, -1)).flatten(0, 1)
        few = slice(block.start, block.start + len(block.rows))
        flat[few, :, place] = block.rows.to(flat)
        per_site[block.site].copy_(flat.reshape(per_site[block.site].shape))
