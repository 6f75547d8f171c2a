r"""Entries of J from a layer's input and the gradient of its output.

The gradient of an output with respect to a layer's weight is a sum, over the positions
at which the weight is used, of products of an input and an output gradient. Only the
chosen entries are formed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

# A gathered product moves memory where a dense block multiplies matrices: per
# multiplication it costs about this many times more (measured on CPU, float32).
_GATHER_COST = 12
# Elements that a gathered product holds at once: about what a cache holds.
_GATHER_ELEMENTS = 2**19

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
    def nbytes(self) -> int:
        """Memory that it holds."""
        return 0 if self.factor is None else self.factor.nbytes

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
    _gathered: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        """Gathers what all output gradients share."""
        one = self.right.shape[-1] == 1
        gathered = self.right[..., 0].index_select(1, self.q) if one else None
        object.__setattr__(self, "_gathered", gathered)

    def __call__(self, delta: Float[Tensor, "rows ..."]) -> Float[Tensor, "batch s"]:
        """Entries of J at the chosen elements.

        Args:
            delta: Gradient of the layer's output, in its shape.

        Returns:
            Shape (B, S of this use).
        """
        left = self.left(delta)
        if self._gathered is not None:
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

    @property
    def nbytes(self) -> int:
        """Memory that it holds, and that one call takes."""
        gathered = 0 if self._gathered is None else self._gathered.nbytes
        positions = self.right.shape[-1]
        block = self.num_left * (positions + self.dense * self.right.shape[1])
        call = len(self.right) * block * self.right.element_size()
        return self.right.nbytes + gathered + call

    @property
    def dense(self) -> bool:
        """Whether the dense block of channels costs less than gathered products."""
        if self.right.shape[-1] == 1:
            return False
        block = self.num_left * self.right.shape[1]
        return block <= _GATHER_COST * self.p.numel()


Entries = Broadcast | Contraction


def compact(index: Int[Tensor, " s"]) -> tuple[Tensor, Tensor]:
    """Distinct values, and which of them each entry is.

    Args:
        index: Shape (S,).

    Returns:
        The distinct values, ascending, and positions among them, shape (S,).
    """
    values, inverse = torch.unique(index, return_inverse=True)
    return values, inverse
