r"""Rows of J where each place of a layer's output reaches one output of the model.

Of a last layer it does: a class's logit is one place, and so is that of a class at a
pixel. The gradient of the sum of all outputs is at such a place the derivative of one
output and no sum, so one backward pass holds all of J that is not zero. The gradient of
a sum of numbered outputs tells which outputs those are, and that of a random one that
they are the only ones. A row is left with the few weights that reach its output.

Source: Curtis, Powell and Reid (1974), "On the estimation of sparse Jacobian matrices",
doi 10.1093/imamat/13.1.117, for rows that share a pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from pyro_subnet.curvature.jacobian.output_map import OutputMap, identity_factors
from pyro_subnet.curvature.jacobian.structured.recording import (
    COUPLED,
    NotLayered,
    Recording,
    not_layered_on_errors,
    recordings,
)
from pyro_subnet.tensors.agreement import agree, random_direction, random_stream

# Numbers of 8 bytes that are held for each product of an input and a gradient.
_HELD = 8
# Roundings on the way from a layer's output to the model's, at most.
_ROUNDINGS = 64


# The derivative of an output at each place of a layer's, and the output's number; 0 is
# none.
_Reach = tuple[Tensor, Tensor]
# Values, (B, E), with an output of each observation and a column each, (E,).
_Entries = tuple[Tensor, Tensor, Tensor]


@final
@dataclass(frozen=True, eq=False)
class ReachedRows:
    """Rows of J at outputs of some data that the same few weights reach."""

    start: int  # first of the data
    outputs: Int[Tensor, " some"]  # of each observation, numbered site by site
    columns: Int[Tensor, " few"]  # where J is not zero
    rows: Float[Tensor, "data some few"]


@torch.no_grad()
def reached_rows(outputs: OutputMap, budget: int) -> Iterator[ReachedRows]:
    """Yields all rows of J that are not zero.

    Costs four backward passes for a group of data, however many outputs there are.

    Raises:
        NotLayered: If a place of a layer's output reaches several outputs.
    """
    with not_layered_on_errors():
        groups = recordings(outputs, identity_factors(outputs), _group(outputs, budget))
        for start, recording, _ in groups:
            if recording.tape.escaped:
                raise NotLayered("a chosen site enters more than layers")
            yield from _rows(recording, start)


def _group(outputs: OutputMap, budget: int) -> int:
    """How many data fit in the budget, by what a single one takes."""
    if outputs.num_data == 1:
        return 1
    probe = Recording(outputs.at(0, 1), whole=False)
    parts = sum(len(column.entries.part_columns) for column in probe.columns())
    activations = 4 * outputs.activation_bytes // outputs.num_data
    return max(1, min(outputs.num_data, budget // (8 * _HELD * parts + activations)))


def _rows(recording: Recording, start: int) -> Iterator[ReachedRows]:
    outputs = recording.outputs
    num_data = outputs.num_data
    counts = [m * c // num_data for m, c in outputs.shapes]

    def of_sites(numbers: Float[Tensor, "data rows"]) -> list[Tensor]:
        parts = zip(numbers.split(counts, dim=1), outputs.shapes, strict=True)
        return [part.reshape(shape) for part, shape in parts]

    u = random_direction((num_data, sum(counts)), outputs.loc)
    ones = torch.ones_like(u)
    passes = [of_sites(mix) for mix in (ones, ones.cumsum(1), u)]
    edges = zip(*(recording.gradients_of(mix) for mix in passes), strict=True)
    reaches = [_reach(one, number, mix, u) for one, number, mix in edges]
    values, reached, columns = _entries(recording, reaches)
    # Two linear maps that agree on a random vector, J^T u, are equal with probability
    # one: so a wrong entry of any row is found, by one pass.
    found = torch.zeros(outputs.size).to(values)
    found.index_add_(0, columns, (values * u[:, reached]).sum(0))
    expected = recording.weight_gradient(passes[2])
    if not agree(found.unsqueeze(-1), expected.unsqueeze(-1)):
        raise NotLayered(COUPLED)
    for alike in _alike(reached, columns, sum(counts)):
        yield ReachedRows(
            start, reached[alike[:, 0]], columns[alike[0]], values[:, alike]
        )


def _reach(
    one: Tensor | None, number: Tensor | None, mix: Tensor | None, u: Tensor
) -> _Reach | None:
    """What a layer's output reaches, by the gradients of three sums of all outputs."""
    # one: of their plain sum; number: times their numbers in an observation, from 1;
    # mix: times u, (N, rows of an observation), random.
    if one is None or number is None or mix is None:
        return None
    # Behind a ReLU a place may reach no output in one observation and the same one in
    # all the others.
    by_datum = torch.where(one != 0, number / one, 0).round().reshape(len(u), -1)
    numbers = by_datum.amax(0).clamp(0, u.shape[1])
    expected = one * F.pad(u, (1, 0))[:, numbers.long()].reshape(one.shape).to(one)
    limit = _ROUNDINGS * torch.finfo(one.dtype).eps * expected.abs()
    if not bool(((mix - expected).abs() <= limit).all()):
        raise NotLayered("a place of a layer's output reaches several outputs")
    # In float64, which has every number exactly.
    return one, numbers.double().expand(by_datum.shape).reshape(one.shape)


def _entries(recording: Recording, reaches: Sequence[_Reach | None]) -> _Entries:
    """Entries of J that may be other than zero, by output and then by column."""
    outputs = recording.outputs
    every = torch.arange(outputs.size, device=outputs.loc.device)
    values, keys = [], []
    for column in recording.columns():
        reach = reaches[column.edge]
        if reach is None:
            continue
        derivative, numbers = reach
        entries = column.entries
        reached = entries.places(numbers)[0].long() - 1
        at = every[column.columns][entries.part_columns]
        live = reached >= 0
        values.append(entries.parts(derivative)[:, live])
        keys.append((reached * outputs.size + at)[live])
    # A weight may reach an output at several places: a pooled one, or a tied one.
    distinct, place = torch.cat(keys).unique(return_inverse=True)
    parts = torch.cat(values, dim=1)
    total = parts.new_zeros(len(parts), len(distinct)).index_add_(1, place, parts)
    return total, distinct // outputs.size, distinct % outputs.size


def _alike(
    reached: Int[Tensor, " entries"], columns: Int[Tensor, " entries"], num_rows: int
) -> Iterator[Int[Tensor, "some few"]]:
    """Places of the entries of outputs that the same columns reach, set by set."""
    # Sets of columns are told apart by sums of random numbers of 64 bits.
    size = int(columns.max()) + 1 if len(columns) else 0
    stream = random_stream()
    marks = torch.randint(-(2**63), 2**63 - 1, (size,), generator=stream).to(columns)
    sums = reached.new_zeros(num_rows).index_add_(0, reached, marks[columns])
    counts = reached.bincount(minlength=num_rows)
    first = counts.cumsum(0) - counts
    live = counts.nonzero().squeeze(-1)
    _, kind = sums[live].unique(return_inverse=True)
    for same in live[kind.argsort(stable=True)].split(kind.bincount().tolist()):
        within = torch.arange(int(counts[same[0]]), device=columns.device)
        yield first[same].unsqueeze(1) + within
