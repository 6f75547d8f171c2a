r"""Diagonal of :math:`(R J)^\top R J`, without an entry for each data point and weight.

Where a weight enters one layer, its squared entries are summed over the data inside the
layer; a weight with several uses has its entries added up first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import final

import torch
from torch import Tensor

from pyro_subnet.curvature.jacobian.output_map import (
    Factors,
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

OtherDiagonal = Callable[[OutputMap, Factors], Tensor]


@not_layered_on_errors()
def layered_diagonal(
    outputs: OutputMap, factors: Factors, budget: int, other: OtherDiagonal
) -> Tensor:
    """Squared columns of :math:`R J`, summed over the data, (S,), float64."""
    total = torch.zeros(outputs.size, dtype=torch.float64, device=outputs.loc.device)
    group = group_size(outputs, budget)
    for _, recording, sliced in recordings(outputs, factors, group):
        columns = recording.columns()
        squares = SquaredColumns(columns, recording.outputs)
        for deltas in checked_gradients(recording, columns, sliced):
            squares.add(total, deltas)
        squares.finish(total)
        # Sites that do not enter layers alone are left to the other route.
        if recording.tape.escaped:
            rest = other(recording.outputs.over(recording.tape.escaped), sliced)
            total[recording.escaped_columns()] += rest
    return total


def group_size(outputs: OutputMap, budget: int) -> int:
    """How many data fit in the budget, by what a single one takes; at least 1."""
    if outputs.num_data == 1:
        return 1
    probe = Recording(outputs.at(0, 1), whole=False)
    held = 2 * sum(column.entries.held_bytes for column in probe.columns())
    # Activations of the run, gradients of its layers, and their random mixture.
    activations = 4 * outputs.activation_bytes // outputs.num_data
    return max(1, min(outputs.num_data, budget // (held + activations)))


def checked_gradients(
    recording: Recording, columns: Sequence[Column], factors: Factors
) -> Iterator[Gradients]:
    r"""Yields gradients of all layers' outputs, one row of every data point at a time.

    Each comes from one backward pass of all data. After the last row, one more checks
    that no layer couples data, and that entries at the weights follow: summed over the
    data, those of :math:`\sum_k u_{bk}\, \delta_{bk}`, u random, are the gradient of
    :math:`\sum_{bk} u_{bk} R_{bk}\, \eta_b` at the weights.

    Raises:
        NotLayered: If they disagree.
    """
    num_data = recording.outputs.num_data
    counts = [num_rows(factor, num_data) for factor in factors]
    u = random_direction((num_data, sum(counts)), recording.outputs.loc)
    mixed: list[Tensor | None] = [None] * len(recording.edges)
    row = 0
    for site, factor in enumerate(factors):
        for deltas in recording.gradients(site, cotangent_rows(factor, num_data)):
            for edge, delta in enumerate(deltas):
                if delta is not None:
                    part = delta.reshape(num_data, -1) * u[:, row : row + 1].to(delta)
                    part, before = part.view(delta.shape), mixed[edge]
                    mixed[edge] = part if before is None else before.add_(part)
            row += 1
            yield deltas
    of_site = zip(factors, u.split(counts, dim=1), strict=True)
    weights = [own.reshape(len(factor), -1) for factor, own in of_site]
    expected = recording.weight_gradient(mixed_rows(factors, weights))
    found = recording.of_layered(_summed_entries(recording, columns, mixed))
    if not agree(found.unsqueeze(-1), expected.unsqueeze(-1)):
        raise NotLayered(COUPLED)


def _summed_entries(
    recording: Recording, columns: Sequence[Column], deltas: Gradients
) -> Tensor:
    """Entries of all uses for one row of each data point, summed over data, (S,)."""
    like = recording.outputs.loc
    total = like.new_zeros(recording.outputs.size, dtype=at_least_float32(like.dtype))
    for column in columns:
        delta = deltas[column.edge]
        if delta is None:
            continue
        entries = column.entries.summed(delta)
        if isinstance(column.columns, slice):
            total[column.columns] += entries
        else:
            total.index_add_(0, column.columns, entries)
    return total


@final
class SquaredColumns:
    """Sums of squares of columns of R J; ``columns`` are all uses of their sites."""

    def __init__(self, columns: Sequence[Column], outputs: OutputMap):
        uses: dict[str, list[Column]] = {}
        for column in columns:
            uses.setdefault(column.site, []).append(column)
        self._outputs = outputs
        self._single = [own[0] for own in uses.values() if len(own) == 1]
        self._several = [own for own in uses.values() if len(own) > 1]
        self._sums = [column.entries.new_squares() for column in self._single]

    def add(self, total: Tensor, deltas: Gradients) -> None:
        """Adds a row of each data point; sites with several uses go to ``total``."""
        for place, column in enumerate(self._single):
            delta = deltas[column.edge]
            if delta is not None:
                sums = column.entries.add_squares_(self._sums[place], delta)
                self._sums[place] = sums
        for own in self._several:
            _add_summed_squares(total, own, deltas, self._outputs)

    def finish(self, total: Tensor) -> None:
        """Adds the sites with one use to ``total``, after the last row."""
        for column, squares in zip(self._single, self._sums, strict=True):
            total[column.columns] += column.entries.squares(squares)


def _add_summed_squares(
    total: Tensor, uses: list[Column], deltas: Gradients, outputs: OutputMap
) -> None:
    """Adds one row's squares at a site that enters several layers."""
    names = list(outputs.chosen)
    counts = [at.numel() for at in outputs.chosen.values()]
    site = names.index(uses[0].site)
    start, size = sum(counts[:site]), counts[site]
    # Entries of all uses are added up before they are squared.
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
