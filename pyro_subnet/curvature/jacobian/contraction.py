r"""Entries of J from a layer's input and the gradient of its output.

The gradient of an output with respect to a layer's weight is a sum, over the positions
at which the weight is used, of products of an input and an output gradient. Only the
chosen entries are formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

# A gathered product moves memory where a dense block multiplies matrices: per
# multiplication it costs about this many times more (measured on CPU, float32).
_GATHER_COST = 12
# Elements that a gathered product holds at once: about what a cache holds.
_GATHER_ELEMENTS = 2**19

# Elements of the dense blocks of several data that are squared at once.
_BLOCK_ELEMENTS = 2**22

Spread = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Broadcast:
    r"""A weight that is added to, or multiplies, what it is broadcast to.

    .. math:: J_{bs} = \sum_f [E_f = s]\, \delta_{bf} a_{bf}

    Attributes:
        num_data: B.
        features: Flat positions f of a datum's outputs that a chosen element reaches.
        columns: Which chosen element that is.
        num_columns: How many chosen elements there are.
        factor: a at those positions, shape (B, F) or (F,); None for one.
    """

    num_data: int
    features: Int[Tensor, " f"]
    columns: Int[Tensor, " f"]
    num_columns: int
    factor: Float[Tensor, "... f"] | None
    _in_order: bool = field(init=False)

    def __post_init__(self) -> None:
        """Finds out whether each element reaches one position, in order."""
        ascending = bool((self.columns[1:] > self.columns[:-1]).all())
        in_order = ascending and self.columns.numel() == self.num_columns
        object.__setattr__(self, "_in_order", in_order)

    @property
    def held_bytes(self) -> int:
        """Memory that it holds."""
        return 0 if self.factor is None else self.factor.nbytes

    @property
    def nbytes(self) -> int:
        """Memory that it holds, and that one call takes."""
        taken = self.num_data * self.features.numel()
        return self.held_bytes + taken * 4

    def __call__(self, delta: Float[Tensor, "rows ..."]) -> Float[Tensor, "batch s"]:
        """Entries of J at the chosen elements.

        Args:
            delta: Gradient of the layer's output, in its shape.

        Returns:
            Shape (B, S of this use).
        """
        picked = delta.reshape(self.num_data, -1).index_select(1, self.features)
        if self.factor is not None:
            picked = picked * self.factor
        if self._in_order:
            return picked
        total = picked.new_zeros(len(picked), self.num_columns)
        return total.index_add_(1, self.columns, picked)

    def squares(self, deltas: Iterable[Tensor]) -> Float[Tensor, " s"]:
        """Sum of squared entries over the data and over output gradients.

        Args:
            deltas: Gradients of the layer's output, in its shape.

        Returns:
            Shape (S of this use,), float64.
        """
        total = torch.zeros(
            self.num_columns, dtype=torch.float64, device=self.columns.device
        )
        for delta in deltas:
            total += self(delta).square().sum(0)
        return total


@dataclass(frozen=True, eq=False)
class Contraction:
    r"""A weight that couples channels p of one side to channels q of the other.

    .. math:: J_{bs} = \sum_t \ell_{b p_s t}\, r_{b q_s t}

    By gathering the two factors of each chosen entry, or by the dense block of the
    channels that occur in any, whichever costs less.

    Attributes:
        left: From the output's gradient to its channels p, shape (B, P, T).
        right: The other side, shape (B, Q, T).
        p: Row of ``left`` of each chosen entry.
        q: Row of ``right`` of each chosen entry.
        num_left: P.
    """

    left: Spread
    right: Float[Tensor, "batch q t"]
    p: Int[Tensor, " s"]
    q: Int[Tensor, " s"]
    num_left: int

    @property
    def one_position(self) -> bool:
        """Whether the weight is used at a single position of each datum."""
        return self.right.shape[-1] == 1

    @cached_property
    def _gathered(self) -> Tensor:
        """What all output gradients share, at a single position: shape (B, S)."""
        return self.right[..., 0].index_select(1, self.q)

    def __call__(self, delta: Float[Tensor, "rows ..."]) -> Float[Tensor, "batch s"]:
        """Entries of J at the chosen elements.

        Args:
            delta: Gradient of the layer's output, in its shape.

        Returns:
            Shape (B, S of this use).
        """
        left = self.left(delta)
        if self.one_position:
            return left[..., 0].index_select(1, self.p).mul_(self._gathered)
        if self.dense:
            block = torch.bmm(left, self.right.mT).flatten(1)
            return block.index_select(1, self.p * self.right.shape[1] + self.q)
        num_data, _, num_positions = self.right.shape
        step = max(1, _GATHER_ELEMENTS // (num_data * num_positions))
        parts = [
            torch.linalg.vecdot(left.index_select(1, p), self.right.index_select(1, q))
            for p, q in zip(self.p.split(step), self.q.split(step), strict=True)
        ]
        return torch.cat(parts, dim=1)

    def squares(self, deltas: Iterable[Tensor]) -> Float[Tensor, " s"]:
        r"""Sum of squared entries over the data and over output gradients.

        Without an entry for each datum where the weight is used once: there
        :math:`\sum_{kb} \ell_{kbp}^2 r_{bq}^2` is one product of matrices.

        Args:
            deltas: Gradients of the layer's output, in its shape.

        Returns:
            Shape (S of this use,), float64.
        """
        num_right = self.right.shape[1]
        block = torch.zeros(
            self.num_left, num_right, dtype=torch.float64, device=self.right.device
        )
        if self.one_position:
            squares = [self.left(delta)[..., 0].square() for delta in deltas]
            block += torch.stack(squares).sum(0).mT @ self.right[..., 0].square()
        else:
            step = max(1, _BLOCK_ELEMENTS // (self.num_left * num_right))
            for delta in deltas:
                pairs = zip(
                    self.left(delta).split(step), self.right.split(step), strict=True
                )
                for left, right in pairs:
                    block += torch.bmm(left, right.mT).square_().sum(0)
        return block.flatten().index_select(0, self.p * num_right + self.q)

    @property
    def held_bytes(self) -> int:
        """Memory that it holds."""
        return self.right.nbytes

    @property
    def nbytes(self) -> int:
        """Memory that it holds, and that one call takes."""
        num_data, num_right, num_positions = self.right.shape
        call = self.num_left * (num_positions + self.dense * num_right)
        if self.one_position:
            call += self.p.numel()
        return self.held_bytes + num_data * call * self.right.element_size()

    @property
    def dense(self) -> bool:
        """Whether the dense block of channels costs less than gathered products."""
        if self.one_position:
            return False
        block = self.num_left * self.right.shape[1]
        return block <= _GATHER_COST * self.p.numel()


Entries = Broadcast | Contraction


def compact(index: Int[Tensor, " s"], bound: int) -> tuple[Tensor, Tensor]:
    """Distinct values, and which of them each entry is.

    Args:
        index: Non-negative, shape (S,).
        bound: One more than any value may be.

    Returns:
        The distinct values, ascending, and positions among them, shape (S,).
    """
    found = torch.zeros(bound, dtype=torch.bool, device=index.device)
    found[index] = True
    return found.nonzero().squeeze(-1), (found.cumsum(0) - 1)[index]
