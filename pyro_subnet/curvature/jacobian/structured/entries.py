"""Entries of J from a layer's input and the gradient of its output.

The gradient of an output with respect to a layer's weight is a sum, over the positions
at which the weight is used, of products of an input and an output gradient. Only the
chosen entries are formed.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_subnet.curvature.jacobian.structured.tape import Entries
from pyro_subnet.tensors.modes import at_least_float32

# A gathered product moves memory where a dense block multiplies matrices: per
# multiplication it costs about this many times more (measured on CPU, float32).
_GATHER_COST = 12
_WIDEST = 8  # bytes of a number
# Elements that a gathered product holds at once: about what a cache holds.
_GATHER_ELEMENTS = 2**19
# Elements of the dense blocks of several data that are squared at once.
_BLOCK_ELEMENTS = 2**20

Spread = Callable[[Tensor], Tensor]
Plan = TypeVar("Plan")


@final
@dataclass(frozen=True, eq=False)
class Broadcast(Entries):
    r"""A weight that is added to, or multiplies, a tensor that it is broadcast to.

    .. math:: J_{bs} = \sum_f [E_f = s]\, \delta_{bf} a_{bf}
    """

    num_data: int
    features: Int[Tensor, " f"]  # positions f of a data point's outputs
    columns: Int[Tensor, " f"]  # E, the chosen element that reaches each
    num_columns: int
    factor: Float[Tensor, "... f"] | None  # a, (B, F) or (F,); None for one
    _in_order: bool = field(init=False)

    def __post_init__(self) -> None:
        """Finds out whether each element reaches one position, in order."""
        ascending = bool((self.columns[1:] > self.columns[:-1]).all())
        in_order = ascending and self.columns.numel() == self.num_columns
        object.__setattr__(self, "_in_order", in_order)

    @property
    def held_bytes(self) -> int:
        """See :attr:`Entries.held_bytes`."""
        return 0 if self.factor is None else self.factor.nbytes

    @property
    def nbytes(self) -> int:
        """See :attr:`Entries.nbytes`."""
        taken = self.num_data * self.features.numel()
        return self.held_bytes + taken * 4

    @property
    def part_columns(self) -> Int[Tensor, " parts"]:
        """See :attr:`Entries.part_columns`."""
        return self.columns

    def places(self, delta: Float[Tensor, "rows ..."]) -> Float[Tensor, "batch parts"]:
        """See :meth:`Entries.places`."""
        flat = _widened(delta.reshape(self.num_data, -1))
        return flat.index_select(1, self.features)

    def parts(self, delta: Float[Tensor, "rows ..."]) -> Float[Tensor, "batch parts"]:
        """See :meth:`Entries.parts`."""
        picked = self.places(delta)
        return picked if self.factor is None else picked * self.factor

    def __call__(self, delta: Float[Tensor, "rows ..."]) -> Float[Tensor, "batch s"]:
        """See :meth:`Entries.__call__`."""
        picked = self.parts(delta)
        if self._in_order:
            return picked
        total = picked.new_zeros(len(picked), self.num_columns)
        return total.index_add_(1, self.columns, picked)


@final
@dataclass(frozen=True, eq=False)
class Channelwise(Entries):
    r"""A weight of a channel, that is added to or multiplies all positions of it.

    .. math:: J_{bs} = \sum_t \delta_{b c_s t}\, a_{b c_s t}
    """

    num_data: int
    axis: int  # of the channels, in the output
    channels: Int[Tensor, " s"]  # c, the chosen ones
    num_positions: int  # of a channel, in a data point's outputs
    factor: Tensor | None  # a at those channels, in the output's shape; None for one

    @property
    def held_bytes(self) -> int:
        """See :attr:`Entries.held_bytes`."""
        return 0 if self.factor is None else self.factor.nbytes

    @property
    def nbytes(self) -> int:
        """See :attr:`Entries.nbytes`."""
        # A bias has no factor: its outputs' gradients are picked all the same.
        picked = self.num_data * len(self.channels) * self.num_positions
        return 2 * (self.held_bytes or _WIDEST * picked)

    @property
    def part_columns(self) -> Int[Tensor, " parts"]:
        """See :attr:`Entries.part_columns`."""
        return _repeated(self.channels, self.num_positions)

    def places(self, delta: Float[Tensor, "rows ..."]) -> Float[Tensor, "batch parts"]:
        """See :meth:`Entries.places`."""
        return self._by_channel(_selected(delta, self.axis, self.channels))

    def parts(self, delta: Float[Tensor, "rows ..."]) -> Float[Tensor, "batch parts"]:
        """See :meth:`Entries.parts`."""
        return self._by_channel(self._picked(delta))

    def _by_channel(self, picked: Tensor) -> Tensor:
        by_data = picked.unflatten(0, (self.num_data, -1))
        return by_data.movedim(self.axis + 1, 1).flatten(1)

    def _picked(self, delta: Tensor) -> Tensor:
        picked = _widened(_selected(delta, self.axis, self.channels))
        return picked if self.factor is None else picked.mul_(self.factor)

    def __call__(self, delta: Float[Tensor, "rows ..."]) -> Float[Tensor, "batch s"]:
        """See :meth:`Entries.__call__`."""
        picked = self._picked(delta)
        others = [axis for axis in range(1, delta.ndim) if axis != self.axis]
        rows = picked.sum(others) if others else picked
        return rows.unflatten(0, (self.num_data, -1)).sum(1)


@final
@dataclass(frozen=True, eq=False)
class Contraction(Entries):
    r"""A weight that couples channels p of one side to channels q of the other.

    .. math:: J_{bs} = \sum_t \ell_{b p_s t}\, r_{b q_s t}

    By gathering the two factors of each chosen entry, or by the dense block of the
    channels that occur in any, whichever costs less.
    """

    left: Spread  # l, from the output's gradient to shape (B, P, T)
    right: Float[Tensor, "batch q t"]  # r
    p: Int[Tensor, " s"]
    q: Int[Tensor, " s"] | None  # None where they are in order
    num_left: int  # P
    order: Int[Tensor, " s"] | None = None  # place of each result; None: in order

    def __post_init__(self) -> None:
        """Widens half precision, so that sums of products keep their digits."""
        object.__setattr__(self, "right", _widened(self.right))

    @property
    def one_position(self) -> bool:
        """Whether each data point uses the weight at a single position."""
        return self.right.shape[-1] == 1

    @cached_property
    def _gathered(self) -> Tensor:
        """Inputs at the chosen entries, for a single position: shape (B, S)."""
        right = self.right[..., 0]
        return right if self.q is None else right.index_select(1, self.q)

    def __call__(self, delta: Float[Tensor, "rows ..."]) -> Float[Tensor, "batch s"]:
        """See :meth:`Entries.__call__`."""
        left = _widened(self.left(delta))
        if self.one_position:
            products = left[..., 0].index_select(1, self.p).mul_(self._gathered)
            return self._ordered(products)
        if self.dense:
            block = torch.bmm(left, self.right.mT).flatten(1)
            return block.index_select(1, self._places)
        num_positions = self.right.shape[-1]
        step = max(1, _GATHER_ELEMENTS // (self.p.numel() * num_positions))
        parts = []
        for some, right in zip(left.split(step), self.right.split(step), strict=True):
            other = right if self.q is None else _gathered_rows(right, self.q)
            parts.append(_gathered_rows(some, self.p).mul_(other).sum(-1))
        return self._ordered(torch.cat(parts))

    @property
    def part_columns(self) -> Int[Tensor, " parts"]:
        """See :attr:`Entries.part_columns`."""
        place = _repeated(self.p, self.right.shape[-1])
        return place if self.order is None else self.order.argsort()[place]

    def places(self, delta: Float[Tensor, "rows ..."]) -> Float[Tensor, "batch parts"]:
        """See :meth:`Entries.places`."""
        left = _widened(self.left(delta))
        return left.index_select(1, self.p).flatten(1)

    def parts(self, delta: Float[Tensor, "rows ..."]) -> Float[Tensor, "batch parts"]:
        """See :meth:`Entries.parts`."""
        right = self.right if self.q is None else self.right.index_select(1, self.q)
        return self.places(delta) * right.flatten(1)

    def _ordered(self, entries: Float[Tensor, "batch s"]) -> Float[Tensor, "batch s"]:
        return entries if self.order is None else entries.index_select(1, self.order)

    @property
    def _places(self) -> Int[Tensor, " s"]:
        """Places of the entries in the flat dense block of channels."""
        num_right = self.right.shape[1]
        q = self.q if self.q is not None else torch.arange(num_right).to(self.p)
        places = self.p * num_right + q
        return places if self.order is None else places[self.order]

    def summed(self, delta: Float[Tensor, "rows ..."]) -> Float[Tensor, " s"]:
        """See :meth:`Entries.summed`; by one product, as a layer's own gradient."""
        left = _widened(self.left(delta))
        # sum_bt l_bpt r_bqt, with data and positions on one axis
        sides = (side.transpose(0, 1).flatten(1) for side in (left, self.right))
        over_left, over_right = sides
        return (over_left @ over_right.mT).flatten()[self._places]

    def new_squares(self) -> Tensor:
        """See :meth:`Entries.new_squares`; (B, P) at a single position, else (P, Q)."""
        num_data, num_right, _ = self.right.shape
        # At one position sum_kb (l_kbp r_bq)^2 = sum_b (sum_k l_kbp^2) r_bq^2, so the
        # sum over the rows k is kept, and one product of matrices does the rest.
        if self.one_position:
            return self.right.new_zeros(num_data, self.num_left)
        return self.right.new_zeros(self.num_left, num_right)

    def add_squares_(self, total: Tensor, delta: Tensor) -> Tensor:
        """See :meth:`Entries.add_squares_`."""
        left = _widened(self.left(delta))
        if self.one_position:
            return total.addcmul_(left[..., 0], left[..., 0])
        step = max(1, min(len(left), _BLOCK_ELEMENTS // total.numel()))
        blocks = total.new_empty(step, *total.shape)
        for some, right in zip(left.split(step), self.right.split(step), strict=True):
            # Into the same memory: new pages would take longer than the products.
            for block in torch.bmm(some, right.mT, out=blocks[: len(some)]):
                total.addcmul_(block, block)
        return total

    def squares(self, total: Tensor) -> Float[Tensor, " s"]:
        """See :meth:`Entries.squares`."""
        if self.one_position:
            total = total.mT @ self.right[..., 0].square()
        return total.flatten()[self._places]

    @property
    def held_bytes(self) -> int:
        """See :attr:`Entries.held_bytes`."""
        return self.right.nbytes

    @property
    def nbytes(self) -> int:
        """See :attr:`Entries.nbytes`."""
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
        return is_dense(self.num_left, self.right.shape[1], self.p.numel())


def is_dense(num_left: int, num_right: int, num_entries: int) -> bool:
    """Whether a dense block of channels costs less than gathered products."""
    return num_left * num_right <= _GATHER_COST * num_entries


def _selected(tensor: Tensor, axis: int, index: Int[Tensor, " s"]) -> Tensor:
    """``tensor.index_select(axis, index)``."""
    if axis != tensor.ndim - 1 or axis == 1:
        return tensor.index_select(axis, index)
    # Along the last of several axes torch takes five times as long as on a matrix.
    rows = tensor.flatten(0, -2).index_select(1, index)
    return rows.unflatten(0, tensor.shape[:-1])


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(at_least_float32(tensor.dtype))


def _repeated(elements: Int[Tensor, " s"], count: int) -> Int[Tensor, " parts"]:
    """Numbers of some elements, each repeated."""
    places = torch.arange(len(elements), device=elements.device)
    return places.repeat_interleave(count)


def _gathered_rows(
    tensor: Float[Tensor, "batch p t"], index: Int[Tensor, " s"]
) -> Float[Tensor, "batch s t"]:
    """Rows of each data point's matrix."""
    # One lookup of whole rows is what CPUs do fastest.
    num_data, num_rows, num_positions = tensor.shape
    start = torch.arange(0, num_data * num_rows, num_rows, device=index.device)
    return F.embedding(start.unsqueeze(1) + index, tensor.reshape(-1, num_positions))


# What depends on the chosen positions alone, by their tensor: groups of data share it.
_PLANS: MutableMapping[Tensor, dict[Any, Any]] = WeakTensorKeyDictionary()


def planned(chosen: Int[Tensor, " s"], key: Any, make: Callable[[], Plan]) -> Plan:
    """What ``make`` returns, worked out once for a key while the tensor lives."""
    plans = _PLANS.setdefault(chosen, {})
    if key not in plans:
        plans[key] = make()
    return plans[key]


def compact(index: Int[Tensor, " s"], bound: int) -> tuple[Tensor, Tensor]:
    """Distinct values below ``bound``, ascending, and which of them each entry is."""
    found = torch.zeros(bound, dtype=torch.bool, device=index.device)
    found[index] = True
    return found.nonzero().squeeze(-1), (found.cumsum(0) - 1)[index]


def broadcast(
    weight: Tensor, shape: torch.Size, factor: Tensor | None
) -> Callable[[Tensor, int], Entries]:
    """Entries of a weight that is broadcast to ``shape``, times ``factor``."""
    if sum(length > 1 for length in weight.shape) == 1:
        return partial(_of_channels, weight, shape, factor)
    return partial(_of_broadcast, weight, shape, factor)


def _of_channels(
    weight: Tensor,
    shape: torch.Size,
    factor: Tensor | None,
    chosen: Tensor,
    num_data: int,
) -> Channelwise:
    (own,) = (axis for axis, length in enumerate(weight.shape) if length > 1)
    axis = len(shape) - weight.ndim + own
    picked = None
    if factor is not None:
        picked = _selected(factor.detach().expand(shape), axis, chosen)
    num_positions = shape.numel() // (shape[axis] * num_data)
    return Channelwise(num_data, axis, chosen, num_positions, picked)


def _of_broadcast(
    weight: Tensor,
    shape: torch.Size,
    factor: Tensor | None,
    chosen: Tensor,
    num_data: int,
) -> Broadcast:
    # Each output's chosen element, -1 where the element is not chosen.
    column = torch.full((weight.numel(),), -1, device=weight.device)
    column[chosen] = torch.arange(len(chosen), device=weight.device)
    # The same for all rows of axis 0, along which the weight does not vary.
    of_row = column.view(weight.shape).expand(shape[1:]).flatten()
    of_datum = of_row.repeat(shape[0] // num_data)
    features = (of_datum >= 0).nonzero().squeeze(-1)
    picked = None
    if factor is not None:
        wide = factor.detach().expand(shape).reshape(num_data, -1)
        picked = wide.index_select(1, features)
    return Broadcast(num_data, features, of_datum[features], len(chosen), picked)


def picked(tensor: Tensor, channels: Tensor, num_data: int) -> Tensor:
    """Some channels, the last axis: (B * k, ..., C) to (B, picked, positions)."""
    found = _selected(tensor, tensor.ndim - 1, channels)
    return found.unflatten(0, (num_data, -1)).flatten(1, -2).mT


def linear_entries(x: Tensor, weight: Tensor, chosen: Tensor, num_data: int) -> Entries:
    """Entries of J at a matrix (out, in) that maps the last axis of ``x``."""
    # J_(o,i) = sum_t delta_to x_ti
    outs, p, ins, q = matrix_plan(chosen, weight.shape[0], weight.shape[1])
    left = partial(picked, channels=outs, num_data=num_data)
    return Contraction(left, picked(x.detach(), ins, num_data), p, q, len(outs))


def matrix_plan(
    chosen: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of a matrix that hold a chosen entry, its place in them; then columns."""
    return planned(
        chosen,
        (height, width),
        lambda: (*compact(chosen // width, height), *compact(chosen % width, width)),
    )
