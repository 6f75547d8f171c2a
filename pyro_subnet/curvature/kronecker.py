r"""Kronecker factors of the likelihood's curvature, one pair a weight matrix.

A matrix W that maps inputs a to outputs enters the curvature as
:math:`\sum_n \sum_{tu} a_{nt} a_{nu}^\top \otimes \delta_{nt}^\top \delta_{nu}`, with
:math:`\delta_{nt}` the gradients of the rows of :math:`\sqrt{w_n} R_n \eta_n` at the
layer's output, and positions t and u at which datum n uses W: one for a plain layer,
many for a convolution, an axis of time, or a layer that is called several times. What
is kept is KFAC's approximation of it, in its form "expand", which takes positions for
further data:

.. math:: G_W \approx A \otimes B,\qquad
    A = \frac{\sum_{nt} w_n\, a_{nt} a_{nt}^\top}{\sum_{nt} w_n},\qquad
    B = \sum_{nt} \delta_{nt}^\top \delta_{nt}

It is exact for one datum at one position, and where inputs and output gradients are
unrelated. A vector that is added to a layer's outputs has :math:`a = 1`, so its block
is B alone: exact at one position. All other elements have their exact diagonal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyro_subnet.curvature.jacobian.agreement import MixtureCheck, check_separation
from pyro_subnet.curvature.jacobian.contraction import (
    Broadcast,
    Channelwise,
    Contraction,
    Spread,
)
from pyro_subnet.curvature.jacobian.layered import cotangent_rows, of_group
from pyro_subnet.curvature.jacobian.layered_diagonal import SquaredColumns, group_size
from pyro_subnet.curvature.jacobian.output_map import Factors, OutputMap
from pyro_subnet.curvature.jacobian.recording import Column, NotLayered, Recording
from pyro_subnet.curvature.jacobian.route import squared_columns
from pyro_subnet.exceptions import ModelError
from pyro_subnet.full_precision import at_least_float32


@dataclass(frozen=True, eq=False)
class KroneckerBlock:
    """Kronecker factors of one weight matrix, or of one vector that is added.

    Attributes:
        site: The site that holds it.
        positions: Where its elements lie in the packed vector, shape (P, Q): axis 0
            belongs to ``output``, axis 1 to ``input``. Q is 1 for a vector.
        output: B, shape (P, P), nats / output squared, a **sum** over the data.
        input: A, shape (Q, Q), input squared, a **mean** over the data; 1 for a vector.
        weight: Sum of the weights that A is a mean under, over data and positions.
    """

    site: str
    positions: Int[Tensor, "out in"]
    output: Float[Tensor, "out out"]
    input: Float[Tensor, "in in"]
    weight: Float[Tensor, ""]

    def plus(self, other: KroneckerBlock) -> KroneckerBlock:
        """The block of both one's data.

        Args:
            other: The same block, of other data.

        Returns:
            The block.

        Raises:
            ModelError: If it is not the same block.
        """
        if not _same(self.positions, other.positions):
            raise ModelError(_changed(f"site {self.site!r} in other layers"))
        weight = self.weight + other.weight
        both = self.input * self.weight + other.input * other.weight
        return KroneckerBlock(
            self.site,
            self.positions,
            self.output + other.output,
            both / weight.where(weight > 0, 1.0),
            weight,
        )


class KroneckerTotal:
    """Sums Kronecker factors, and the diagonal of the rest, over calls of a model.

    Batches may be of any size: their sums give what one call on all data gives.

    Args:
        num_params: D.
        like: A tensor of the device and floating point type of the factors.

    Attributes:
        diagonal: Diagonal at the elements in no block, 0 at the others, (D,), float64.
        reason: Why a model does not fit the structured route; None if it does.
    """

    def __init__(self, num_params: int, like: Tensor):
        self.diagonal = torch.zeros(num_params, dtype=torch.float64, device=like.device)
        self.reason: str | None = None
        self._dtype = at_least_float32(like.dtype)
        self._blocks: list[_Sums] | None = None

    def blocks(self, scale: float = 1.0) -> tuple[KroneckerBlock, ...]:
        """The factors of what was added.

        Args:
            scale: What the sum over the data is multiplied by.

        Returns:
            One block a matrix or vector.
        """
        return tuple(sums.block(scale) for sums in self._blocks or [])

    def add(
        self,
        outputs: OutputMap,
        factors: Factors,
        weights: Float[Tensor, " data"],
        budget: int,
    ) -> None:
        """Adds the data of one call.

        Costs the model's forward pass, a backward pass for every row of R, and
        :math:`T (r P^2 + Q^2)` products a datum for each matrix used at T positions.

        Args:
            outputs: Outputs as a function of all D elements.
            factors: R of each element, one (M, r, c) tensor a site.
            weights: w of each datum, in the mean that A is, shape (N,).
            budget: Bytes that a group of data may take; one is always done.

        Raises:
            ModelError: If weights enter other layers than in the calls before.
        """
        with torch.no_grad():
            before = self.diagonal.clone()
            try:
                self._add_groups(outputs, factors, weights, budget)
            except NotLayered as error:
                if self._blocks:
                    raise ModelError(_changed(str(error))) from error
                self._blocks, self.reason = [], str(error)
                self.diagonal = before + squared_columns(outputs, factors, budget)

    def _add_groups(
        self, outputs: OutputMap, factors: Factors, weights: Tensor, budget: int
    ) -> None:
        num_data = outputs.num_data
        group = group_size(outputs, budget)
        whole = group == num_data
        if not whole:
            check_separation(outputs)
        for start in range(0, num_data, group):
            stop = min(start + group, num_data)
            part = outputs.at(start, stop)
            recording = Recording(part, whole=whole)
            sliced = of_group(factors, num_data, start, stop)
            found = _of_recording(
                recording, sliced, weights[start:stop], self.diagonal, self._dtype
            )
            self._include(found)
            if recording.tape.escaped:
                rest = part.over(recording.tape.escaped)
                place = recording.escaped_columns()
                self.diagonal[place] += squared_columns(rest, sliced, budget)

    def _include(self, found: list[_Sums]) -> None:
        if self._blocks is None:
            self._blocks = found
            return
        if len(self._blocks) != len(found):
            counts = f"{len(self._blocks)} blocks, then {len(found)}"
            raise ModelError(_changed(counts))
        for sums, more in zip(self._blocks, found, strict=True):
            if not _same(sums.positions, more.positions):
                raise ModelError(_changed(f"site {more.site!r} in other layers"))
            sums.add_(more)


@dataclass(eq=False)
class _Sums:
    """Sums over data and positions that the factors of a block are made of."""

    site: str
    positions: Tensor
    output: Tensor
    input: Tensor
    weight: Tensor

    def add_(self, other: _Sums) -> None:
        self.output += other.output
        self.input += other.input
        self.weight += other.weight

    def block(self, scale: float) -> KroneckerBlock:
        # Without any weight all sums are 0, and stay so.
        mean = self.input / self.weight.where(self.weight > 0, 1.0)
        return KroneckerBlock(
            self.site, self.positions, self.output * scale, mean, self.weight * scale
        )


@dataclass(frozen=True, eq=False)
class _Factored:
    """A use of a weight whose entries of J are a grid of products.

    Attributes:
        column: The use.
        left: From the output's gradient to shape (B, P, T).
        right: Inputs, shape (B, Q, T).
        positions: Columns of J in a grid, shape (P, Q), ascending along both axes.
        rows: Which P each row of the grid is.
        columns: Which Q each column of the grid is.
    """

    column: Column
    left: Spread
    right: Tensor
    positions: Tensor
    rows: Tensor
    columns: Tensor


def _of_recording(
    recording: Recording,
    factors: Factors,
    weights: Tensor,
    diagonal: Tensor,
    dtype: torch.dtype,
) -> list[_Sums]:
    """Sums of a group's data; adds to the diagonal what is in no block, in place."""
    num_data = recording.outputs.num_data
    blocks, rest = _sort(recording.columns(), num_data)
    squares = SquaredColumns(rest, recording.outputs)
    uses = [use for block in blocks for use in block]
    outputs = [_new_output(use, dtype) for use in uses]
    check, row = MixtureCheck(recording, factors), 0
    for site, factor in enumerate(factors):
        cotangents = cotangent_rows(factor, num_data)
        for deltas in recording.gradients(site, cotangents):
            check.add(row, deltas)
            row += 1
            squares.add(diagonal, deltas)
            for output, use in zip(outputs, uses, strict=True):
                delta = deltas[use.column.edge]
                if delta is not None:
                    side = use.left(delta).to(dtype).transpose(0, 1).flatten(1)
                    output.addmm_(side, side.mT)
    check.finish()
    squares.finish(diagonal)
    of_use, found = iter(outputs), list[_Sums]()
    for block in blocks:
        parts = [_use_sums(use, next(of_use), weights, dtype) for use in block]
        for part in parts[1:]:
            parts[0].add_(part)
        found.append(parts[0])
    return found


def _new_output(use: _Factored, dtype: torch.dtype) -> Tensor:
    size = len(use.rows)
    return torch.zeros(size, size, dtype=dtype, device=use.rows.device)


def _use_sums(
    use: _Factored, output: Tensor, weights: Tensor, dtype: torch.dtype
) -> _Sums:
    num_data, num_right, num_positions = use.right.shape
    side = use.right.new_empty(num_right, num_data, num_positions, dtype=dtype)
    root = weights.sqrt().to(dtype)[:, None]
    torch.mul(use.right.transpose(0, 1), root, out=side)
    side, masked = side.flatten(1), weights == 0
    if bool(masked.any()):  # it does not count, even where its inputs are not finite
        side.view(num_right, num_data, -1)[:, masked] = 0.0
    return _Sums(
        use.column.site,
        use.positions,
        output[use.rows][:, use.rows],
        (side @ side.mT)[use.columns][:, use.columns],
        weights.sum().to(dtype) * num_positions,
    )


def _sort(
    columns: Iterable[Column], num_data: int
) -> tuple[list[list[_Factored]], list[Column]]:
    """Uses that share a block, block by block, and the uses of all other weights."""
    by_site: dict[str, list[Column]] = {}
    for column in columns:
        by_site.setdefault(column.site, []).append(column)
    blocks, rest = list[list[_Factored]](), list[Column]()
    for own in by_site.values():
        found = _blocks_of_site(own, num_data)
        blocks += found
        if not found:
            rest += own
    return blocks, rest


def _blocks_of_site(own: Sequence[Column], num_data: int) -> list[list[_Factored]]:
    """Blocks of one site; none if a use has no factors or blocks overlap."""
    blocks = list[list[_Factored]]()
    for column in own:
        use = _factored(column, num_data)
        if use is None:
            return []
        for block in blocks:
            if _same(block[0].positions, use.positions):
                block.append(use)
                break
        else:
            blocks.append([use])
    flat = torch.cat([block[0].positions.flatten() for block in blocks])
    if len(blocks) > 1 and len(flat.unique()) < len(flat):
        return []
    return blocks


def _factored(column: Column, num_data: int) -> _Factored | None:
    """A use as a grid of products; None if it is no such."""
    sides = _sides(column, num_data) if column.affine else None
    if sides is None:
        return None
    left, right, p, q, num_left = sides
    at = column.columns
    if isinstance(at, slice):
        at = torch.arange(at.start, at.stop, device=p.device)
    elif len(at.unique()) < len(at):  # an element several times in one matrix
        return None
    if len(at) != num_left * right.shape[1]:
        return None
    grid = torch.full((num_left, right.shape[1]), -1, device=p.device)
    grid[p, q] = at
    if bool((grid < 0).any()):
        return None
    rows, columns = grid[:, 0].argsort(), grid[0].argsort()
    return _Factored(column, left, right, grid[rows][:, columns], rows, columns)


def _sides(
    column: Column, num_data: int
) -> tuple[Spread, Tensor, Tensor, Tensor, int] | None:
    """Both sides of the products, the place of each entry in them, and P."""
    entries = column.entries
    if isinstance(entries, Contraction):
        if entries.q is None or entries.order is not None:
            return None
        return entries.left, entries.right, entries.p, entries.q, entries.num_left
    if isinstance(entries, Channelwise) and entries.factor is None:
        channels, axis = entries.channels, entries.axis

        def left(delta: Tensor) -> Tensor:
            side = delta.index_select(axis, channels).movedim(axis, 1)
            return side.unflatten(0, (num_data, -1)).transpose(1, 2).flatten(2)

        p = torch.arange(len(channels), device=channels.device)
    elif isinstance(entries, Broadcast) and entries.num_columns == 1:
        if entries.factor is not None:
            return None
        features = entries.features

        def left(delta: Tensor) -> Tensor:
            return delta.reshape(num_data, -1).index_select(1, features).unsqueeze(1)

        p = features.new_zeros(1)
    else:
        return None
    return left, _ones(num_data, p), p, torch.zeros_like(p), len(p)


def _ones(num_data: int, like: Tensor) -> Tensor:
    return torch.ones(num_data, 1, 1, dtype=torch.float32, device=like.device)


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first, second)


def _changed(found: str) -> str:
    return (
        "Weights must enter the same layers in every batch and group of data for "
        f"Kronecker factors; got a change ({found}). Pass batches of one kind, or "
        "choose a diagonal or full covariance."
    )
