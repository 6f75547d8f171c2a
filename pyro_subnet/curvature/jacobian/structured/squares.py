r"""Diagonal of :math:`(R J)^\top R J`, without an entry for each datum and weight.

Where a weight enters one layer, its squared entries are summed over the data inside the
layer; a weight with several uses has its entries added up first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_subnet.curvature.jacobian.output_map import Factors, OutputMap
from pyro_subnet.curvature.jacobian.structured.checks import (
    MixtureCheck,
    check_separation,
)
from pyro_subnet.curvature.jacobian.structured.recording import (
    Column,
    Gradients,
    Recording,
)
from pyro_subnet.curvature.jacobian.structured.rows import cotangent_rows, of_group

OtherDiagonal = Callable[[OutputMap, Factors], Tensor]


def layered_diagonal(
    outputs: OutputMap, factors: Factors, budget: int, other: OtherDiagonal
) -> Tensor:
    """Squared columns of :math:`R J`, summed over the data.

    Args:
        outputs: The map to be differentiated.
        factors: R of each element, one (M, r, c) tensor a site.
        budget: Bytes that a group of data may take.
        other: What serves the chosen sites that do not enter layers only.

    Returns:
        Shape (S,), float64.

    Raises:
        NotLayered: If the model does not fit.
    """
    num_data = outputs.num_data
    group = group_size(outputs, budget)
    whole = group == num_data
    if not whole:
        check_separation(outputs)
    total = torch.zeros(outputs.size, dtype=torch.float64, device=outputs.loc.device)
    for start in range(0, num_data, group):
        stop = min(start + group, num_data)
        part = outputs.at(start, stop)
        recording = Recording(part, whole=whole)
        sliced = of_group(factors, num_data, start, stop)
        _add_squares(total, recording, sliced)
        if recording.tape.escaped:
            rest = other(part.over(recording.tape.escaped), sliced)
            total[recording.escaped_columns()] += rest
    return total


def group_size(outputs: OutputMap, budget: int) -> int:
    """How many data fit in the budget, by what a single one takes.

    Args:
        outputs: The map to be differentiated.
        budget: Bytes that a group of data may take.

    Returns:
        At least 1.
    """
    if outputs.num_data == 1:
        return 1
    probe = Recording(outputs.at(0, 1), whole=False)
    held = 2 * sum(column.entries.held_bytes for column in probe.columns())
    # With the gradients, and their mixture.
    activations = 4 * outputs.activation_bytes // outputs.num_data
    return max(1, min(outputs.num_data, budget // (held + activations)))


class SquaredColumns:
    """Sums of squares of columns of :math:`R J`, as the rows' gradients come in.

    Args:
        columns: Uses of the weights, all that a site has.
        outputs: The map of the data.
    """

    def __init__(self, columns: Sequence[Column], outputs: OutputMap):
        uses: dict[str, list[Column]] = {}
        for column in columns:
            uses.setdefault(column.site, []).append(column)
        self._outputs = outputs
        self._single = [own[0] for own in uses.values() if len(own) == 1]
        self._several = [own for own in uses.values() if len(own) > 1]
        self._sums = [column.entries.new_squares() for column in self._single]

    def add(self, total: Tensor, deltas: Gradients) -> None:
        """Adds one row of every datum.

        Args:
            total: Where sums at weights with several uses go, (S,).
            deltas: Gradients of the layers' outputs.
        """
        for place, column in enumerate(self._single):
            delta = deltas[column.edge]
            if delta is not None:
                sums = column.entries.add_squares_(self._sums[place], delta)
                self._sums[place] = sums
        for own in self._several:
            _add_summed_squares(total, own, deltas, self._outputs)

    def finish(self, total: Tensor) -> None:
        """Adds the sums at weights with one use, after the last row.

        Args:
            total: Where they go, (S,).
        """
        for column, squares in zip(self._single, self._sums, strict=True):
            total[column.columns] += column.entries.squares(squares)


def _add_squares(total: Tensor, recording: Recording, factors: Factors) -> None:
    squares = SquaredColumns(recording.columns(), recording.outputs)
    check, row = MixtureCheck(recording, factors), 0
    for site, factor in enumerate(factors):
        cotangents = cotangent_rows(factor, recording.outputs.num_data)
        for deltas in recording.gradients(site, cotangents):
            check.add(row, deltas)
            row += 1
            squares.add(total, deltas)
    check.finish()
    squares.finish(total)


def _add_summed_squares(
    total: Tensor, uses: list[Column], deltas: Gradients, outputs: OutputMap
) -> None:
    """Adds one row's squares at a site that enters several layers."""
    names = list(outputs.chosen)
    counts = [at.numel() for at in outputs.chosen.values()]
    site = names.index(uses[0].site)
    start, size = sum(counts[:site]), counts[site]
    entries = outputs.loc.new_zeros(outputs.num_data, size)
    for use in uses:
        delta = deltas[use.edge]
        if delta is None:
            continue
        if isinstance(use.columns, slice):
            entries += use.entries(delta)
        else:
            entries.index_add_(1, use.columns - start, use.entries(delta))
    total[start : start + size] += entries.square().sum(0)
