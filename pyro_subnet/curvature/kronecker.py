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
unrelated. A layer's bias has :math:`a = 1`, so its block is B alone: exact at one
position. A vector that is added by a sum of its own, as in ``x @ w + b``, has its exact
block, whatever its positions. All other elements have their exact diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyro_subnet.curvature.jacobian.output_map import Factors, OutputMap
from pyro_subnet.curvature.jacobian.route import squared_columns
from pyro_subnet.curvature.jacobian.structured.checks import (
    MixtureCheck,
    check_separation,
)
from pyro_subnet.curvature.jacobian.structured.grids import (
    FactoredUse,
    factored_uses,
    same_positions,
)
from pyro_subnet.curvature.jacobian.structured.recording import NotLayered, Recording
from pyro_subnet.curvature.jacobian.structured.rows import cotangent_rows, of_group
from pyro_subnet.curvature.jacobian.structured.squares import SquaredColumns, group_size
from pyro_subnet.exceptions import MemoryLimitError, ModelError
from pyro_subnet.tensors.memory import available_bytes
from pyro_subnet.tensors.modes import at_least_float32


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
        if not same_positions(self.positions, other.positions):
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
            MemoryLimitError: If the factors do not fit in memory.
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
            if not same_positions(sums.positions, more.positions):
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


def _of_recording(
    recording: Recording,
    factors: Factors,
    weights: Tensor,
    diagonal: Tensor,
    dtype: torch.dtype,
) -> list[_Sums]:
    """Sums of a group's data; adds to the diagonal what is in no block, in place."""
    num_data = recording.outputs.num_data
    blocks, rest = factored_uses(recording.columns(), num_data)
    squares = SquaredColumns(rest, recording.outputs)
    uses = [use for block in blocks for use in block]
    _check_fits(uses, dtype)
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


def _check_fits(uses: Sequence[FactoredUse], dtype: torch.dtype) -> None:
    """Refuses factors that cannot be held, before any is made."""
    sizes = [(sum(n**2 for n in use.positions.shape), use) for use in uses]
    # The sums, and what is added to them.
    needed = 2 * sum(size for size, _ in sizes) * torch.finfo(dtype).bits // 8
    if not sizes or needed <= (free := available_bytes(uses[0].positions.device)):
        return
    largest = max(sizes, key=lambda pair: pair[0])[1]
    raise MemoryLimitError(
        f"Kronecker factors must fit in memory; got factors of sizes "
        f"{tuple(largest.positions.shape)} at site {largest.column.site!r} and others, "
        f"which need {needed / 2**30:.1f} GiB ({needed} bytes) where "
        f"{free / 2**30:.1f} GiB ({free} bytes) are free. Choose a diagonal covariance "
        "or a subnet."
    )


def _new_output(use: FactoredUse, dtype: torch.dtype) -> Tensor:
    size = len(use.rows)
    return torch.zeros(size, size, dtype=dtype, device=use.rows.device)


def _use_sums(
    use: FactoredUse, output: Tensor, weights: Tensor, dtype: torch.dtype
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


def _changed(found: str) -> str:
    return (
        "Weights must enter the same layers in every batch and group of data for "
        f"Kronecker factors; got a change ({found}). Pass batches of one kind, or "
        "choose a diagonal or full covariance."
    )
