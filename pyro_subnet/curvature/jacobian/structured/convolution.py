r"""Convolutions: entries of J at a kernel, from shifted inputs and output gradients.

.. math:: J_{b,(o,i,k)} = \sum_t \delta_{bot}\, a_{b,i,ut + dk}

with stride u and dilation d, and with the sides swapped for transposed convolutions.
Only the shifts and channels that hold a chosen entry are formed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_subnet.curvature.jacobian.structured.entries import (
    Contraction,
    broadcast,
    compact,
    is_dense,
    planned,
)
from pyro_subnet.curvature.jacobian.structured.tape import Entries, Layer, Part

_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = "input weight bias stride padding output_padding groups dilation".split()
# Shifted inputs are held entry by entry if they grow by this factor at most.
_GROWTH = 2


@final
@dataclass(frozen=True, eq=False)
class _Geometry:
    """Where a kernel's offsets lie on the side that they shift over, axis by axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]  # padding before the first element
    positions: tuple[int, ...]  # how many positions the kernel takes
    groups: int  # of channels

    def shifted(self, tensor: Tensor, channels: Tensor, offsets: Tensor) -> Tensor:
        """Values of Q channels under Q ascending flat offsets: (B, Q, positions)."""
        # A window for each distinct offset: all positions' inputs under it.
        padded = F.pad(tensor, self._padding(tensor.shape[2:]))
        distinct, counts = torch.unique_consecutive(offsets, return_counts=True)
        parts = []
        pairs = zip(distinct.tolist(), channels.split(counts.tolist()), strict=True)
        for offset, picked in pairs:
            window = padded[(slice(None), slice(None), *self._window(offset))]
            parts.append(window.index_select(1, picked).flatten(2))
        return torch.cat(parts, dim=1)

    def _window(self, offset: int) -> list[slice]:
        at = []
        for axis in reversed(range(len(self.kernel))):
            offset, along = divmod(offset, self.kernel[axis])
            start, step = along * self.dilation[axis], self.stride[axis]
            at.append(slice(start, start + step * (self.positions[axis] - 1) + 1, step))
        return at[::-1]

    def _padding(self, spatial: Sequence[int]) -> list[int]:
        """Zeros before and after, last axis first, so that every window fits."""
        padding = []
        for axis in reversed(range(len(self.kernel))):
            reach = (self.kernel[axis] - 1) * self.dilation[axis] + 1
            needed = self.stride[axis] * (self.positions[axis] - 1) + reach
            before = self.before[axis]
            padding += [before, needed - spatial[axis] - before]
        return padding


def _tuple(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _geometry(
    bound: Mapping[str, Any], weight: Tensor, positions: Sequence[int]
) -> _Geometry:
    dims = weight.ndim - 2
    dilation = _tuple(bound.get("dilation", 1), dims)
    padding = bound.get("padding", 0)
    if padding == "valid":
        padding = 0
    kernel = tuple(weight.shape[2:])
    if padding == "same":  # of an odd total the larger half goes behind
        before = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
    else:
        before = _tuple(padding, dims)
    stride = _tuple(bound.get("stride", 1), dims)
    groups = bound.get("groups", 1)
    return _Geometry(kernel, stride, dilation, before, tuple(positions), groups)


@final
@dataclass(frozen=True, eq=False)
class _Kernel:
    """A kernel in use."""

    x: Tensor  # the layer's input, (rows, channels, *spatial)
    shape: torch.Size  # of its output
    weight: Tensor
    geometry: _Geometry

    def entries(self, chosen: Tensor, num_data: int) -> Entries:
        """Entries at a kernel (out, in per group, *kernel): the input is shifted."""
        width, x = self.x.shape[1], self.x.detach()
        outs, p, pairs, q = self._plan(chosen, self.shape[1], width)
        many = len(chosen) > _GROWTH * len(pairs)
        if many or is_dense(len(outs), len(pairs), len(chosen)):
            right = self.geometry.shifted(x, pairs % width, pairs // width)

            def left(delta: Tensor) -> Tensor:
                return _of_rows(delta.flatten(2).index_select(1, outs), num_data)

            return Contraction(left, _of_rows(right, num_data), p, q, len(outs))
        # A row for each entry, in their order: then none is looked up for a product.
        by_offset, back = planned(q, "by offset", lambda: _sorting(q))
        pairs = pairs[q[by_offset]]
        right = self.geometry.shifted(x, pairs % width, pairs // width)
        return Contraction(
            lambda delta: _of_rows(delta.flatten(2), num_data),
            _of_rows(right, num_data),
            outs[p[by_offset]],
            None,
            self.shape[1],
            back,
        )

    def transposed_entries(self, chosen: Tensor, num_data: int) -> Entries:
        """Entries at a kernel (in, out per group, *kernel): the gradient is shifted."""
        width = self.shape[1]
        ins, q, pairs, p = self._plan(chosen, self.weight.shape[0], width)

        def left(delta: Tensor) -> Tensor:
            at = self.geometry.shifted(delta, pairs % width, pairs // width)
            return _of_rows(at, num_data)

        right = self.x.detach().flatten(2).index_select(1, ins)
        return Contraction(left, _of_rows(right, num_data), p, q, len(pairs))

    def _plan(
        self, chosen: Tensor, fixed: int, width: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Channels of the two sides with a chosen entry, and its place in each."""
        # The side that does not shift has `fixed` channels, the kernel's axis 0. Of the
        # other side there are pairs, offset * width + channel, so that each offset is
        # cut out once.
        size, per_group = math.prod(self.geometry.kernel), self.weight.shape[1]
        groups = self.geometry.groups

        def make() -> tuple[Tensor, Tensor, Tensor, Tensor]:
            offset, channel = chosen % size, chosen // size
            own, within = channel // per_group, channel % per_group
            other = own // (fixed // groups) * per_group + within
            return *compact(own, fixed), *compact(offset * width + other, size * width)

        return planned(chosen, (size, per_group, groups, fixed, width), make)


def _convolution(bound: Mapping[str, Any], result: Tensor) -> Mapping[str, Part] | None:
    x, weight = bound["input"], bound["weight"]
    if x.ndim != weight.ndim:  # without an axis of data
        return None
    geometry = _geometry(bound, weight, result.shape[2:])
    kernel = _Kernel(x, result.shape, weight, geometry)
    return _with_bias(((x,), kernel.entries), bound.get("bias"), result)


def _transposed(bound: Mapping[str, Any], result: Tensor) -> Mapping[str, Part] | None:
    x, weight = bound["input"], bound["weight"]
    if x.ndim != weight.ndim:
        return None
    kernel = _Kernel(x, result.shape, weight, _geometry(bound, weight, x.shape[2:]))
    return _with_bias(((x,), kernel.transposed_entries), bound.get("bias"), result)


def _with_bias(weight: Part, bias: Tensor | None, result: Tensor) -> Mapping[str, Part]:
    parts = {"weight": weight}
    if bias is not None:
        wide = bias.view(-1, *(1,) * (result.ndim - 2))
        parts["bias"] = ((), broadcast(wide, result.shape, None))
    return parts


def _sorting(index: Tensor) -> tuple[Tensor, Tensor]:
    """The permutation that sorts, and its inverse."""
    order = index.argsort(stable=True)
    return order, order.argsort()


def _of_rows(tensor: Tensor, num_data: int) -> Tensor:
    """From (B * k, Q, T) to (B, Q, k * T)."""
    if len(tensor) == num_data:
        return tensor
    return tensor.unflatten(0, (num_data, -1)).transpose(1, 2).flatten(2)


CONVOLUTIONS: dict[Any, Layer] = {
    **dict.fromkeys(
        (F.conv1d, F.conv2d, F.conv3d),
        Layer(_CONVOLUTION, _convolution, affine="layer"),
    ),
    **dict.fromkeys(
        (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
        Layer(_TRANSPOSED, _transposed, affine="layer"),
    ),
}
