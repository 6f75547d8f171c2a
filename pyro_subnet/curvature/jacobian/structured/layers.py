r"""What is known about torch functions that weights enter: one rule a kind of layer.

A rule says how the entries of J at a weight follow from what the function read and from
the gradient :math:`\delta` of its output. Axis 0 of inputs and outputs is the data's,
or data times positions; which it is, and whether it is, the route checks by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_subnet.curvature.jacobian.structured.entries import (
    Broadcast,
    Channelwise,
    Contraction,
    Entries,
    compact,
    planned,
)
from pyro_subnet.curvature.jacobian.structured.tape import Layer, Part

Bound = Mapping[str, Any]
# Axes of a batch of vectors, and of a weight that maps vectors to vectors.
_MATRIX = 2


def by_data(tensor: Tensor, num_data: int) -> Tensor:
    """Splits axis 0 into data and positions.

    Args:
        tensor: Shape (B * k, ...).
        num_data: B.

    Returns:
        Shape (B, k, ...), a view.
    """
    return tensor.unflatten(0, (num_data, -1))


def broadcast(
    weight: Tensor, shape: torch.Size, factor: Tensor | None
) -> Callable[[Tensor, int], Entries]:
    """Entries of a weight that is broadcast to a shape, times a factor of that shape.

    Args:
        weight: The weight, without a data axis.
        shape: Shape of the output.
        factor: What multiplies the weight; None for one.

    Returns:
        The function of chosen positions and number of data.
    """
    axes = [axis for axis, length in enumerate(weight.shape) if length > 1]

    def channelwise(chosen: Tensor, num_data: int) -> Entries:
        axis = len(shape) - weight.ndim + axes[0]
        picked = None
        if factor is not None:
            picked = factor.detach().expand(shape).index_select(axis, chosen)
        return Channelwise(num_data, axis, chosen, picked)

    def entries(chosen: Tensor, num_data: int) -> Entries:
        column = torch.full((weight.numel(),), -1, device=weight.device)
        column[chosen] = torch.arange(len(chosen), device=weight.device)
        # It is the same for all rows of axis 0, on which the weight has no axis.
        of_row = column.view(weight.shape).expand(shape[1:]).flatten()
        of_datum = of_row.repeat(shape[0] // num_data)
        features = (of_datum >= 0).nonzero().squeeze(-1)
        picked = None
        if factor is not None:
            wide = factor.detach().expand(shape).reshape(num_data, -1)
            picked = wide.index_select(1, features)
        return Broadcast(num_data, features, of_datum[features], len(chosen), picked)

    return channelwise if len(axes) == 1 else entries


def _broadcasts(weight: Any, result: Tensor) -> bool:
    """Whether a weight has no axis along the data's."""
    return isinstance(weight, Tensor) and weight.ndim < result.ndim


def _channels(weight: Tensor, ndim: int) -> Tensor:
    """A weight per channel (axis 1), shaped to broadcast over positions."""
    return weight.view(-1, *(1,) * (ndim - 2))


def _linear(bound: Bound, result: Tensor) -> Mapping[str, Part] | None:
    x, weight, bias = bound["input"], bound["weight"], bound.get("bias")
    if x.ndim < _MATRIX or weight.ndim != _MATRIX:
        return None
    parts: dict[str, Part] = {"weight": ((x,), partial(_linear_entries, x, weight))}
    if bias is not None:
        parts["bias"] = ((), broadcast(bias, result.shape, None))
    return parts


def _linear_entries(
    x: Tensor, weight: Tensor, chosen: Tensor, num_data: int
) -> Entries:
    outs, p, ins, q = _matrix_plan(chosen, weight.shape[0], weight.shape[1])
    right = by_data(x.detach(), num_data).flatten(1, -2).index_select(2, ins).mT

    def left(delta: Tensor) -> Tensor:
        return by_data(delta, num_data).flatten(1, -2).index_select(2, outs).mT

    return Contraction(left, right, p, q, len(outs))


def _matrix_plan(
    chosen: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows and columns of a matrix that hold a chosen entry, and its place in each."""

    def make() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return *compact(chosen // width, height), *compact(chosen % width, width)

    return planned(chosen, (height, width), make)


def _matmul(bound: Bound, result: Tensor) -> Mapping[str, Part] | None:
    x, weight = bound["input"], bound["weight"]
    if not isinstance(x, Tensor) or x.ndim < _MATRIX or weight.ndim > _MATRIX:
        return None
    return {"weight": ((x,), partial(_matmul_entries, x, weight))}


def _matmul_entries(
    x: Tensor, weight: Tensor, chosen: Tensor, num_data: int
) -> Entries:
    width = 1 if weight.ndim == 1 else weight.shape[1]
    ins, q, outs, p = _matrix_plan(chosen, weight.shape[0], width)
    right = by_data(x.detach(), num_data).flatten(1, -2).index_select(2, ins).mT

    def left(delta: Tensor) -> Tensor:
        if weight.ndim == 1:
            delta = delta.unsqueeze(-1)
        return by_data(delta, num_data).flatten(1, -2).index_select(2, outs).mT

    return Contraction(left, right, p, q, len(outs))


def _add(bound: Bound, result: Tensor, sign: float = 1.0) -> Mapping[str, Part] | None:
    if bound.get("alpha", 1) != 1:
        return None
    parts: dict[str, Part] = {}
    for name, one in (("input", 1.0), ("other", sign)):
        weight = bound[name]
        if _broadcasts(weight, result):
            factor = None if one == 1.0 else torch.tensor(one).to(result)
            parts[name] = ((), broadcast(weight, result.shape, factor))
    return parts


def _subtract(bound: Bound, result: Tensor) -> Mapping[str, Part] | None:
    return _add(bound, result, sign=-1.0)


def _multiply(bound: Bound, result: Tensor) -> Mapping[str, Part] | None:
    parts: dict[str, Part] = {}
    for name, other in (("input", "other"), ("other", "input")):
        weight, factor = bound[name], bound[other]
        if _broadcasts(weight, result) and isinstance(factor, Tensor):
            parts[name] = ((factor,), broadcast(weight, result.shape, factor))
    return parts


def _norm(
    bound: Bound, result: Tensor, normalize: Callable[[Bound], Tensor], channels: bool
) -> Mapping[str, Part] | None:
    x, weight, bias = bound["input"], bound.get("weight"), bound.get("bias")
    if x.ndim < _MATRIX:
        return None

    def shaped(part: Tensor) -> Tensor:
        return _channels(part, x.ndim) if channels else part

    parts: dict[str, Part] = {}
    if weight is not None:

        def weight_entries(chosen: Tensor, num_data: int) -> Entries:
            with torch.no_grad():
                normalized = normalize(bound)
            entries = broadcast(shaped(weight), result.shape, normalized)
            return entries(chosen, num_data)

        parts["weight"] = ((x,), weight_entries)
    if bias is not None:
        parts["bias"] = ((), broadcast(shaped(bias), result.shape, None))
    return parts


def _batch_norm(bound: Bound, result: Tensor) -> Mapping[str, Part] | None:
    if bound.get("training", False):  # couples the data, and changes the buffers
        return None

    def normalize(bound: Bound) -> Tensor:
        eps = bound.get("eps", 1e-5)
        return F.batch_norm(
            bound["input"], bound["running_mean"], bound["running_var"], eps=eps
        )

    return _norm(bound, result, normalize, channels=True)


def _instance_norm(bound: Bound, result: Tensor) -> Mapping[str, Part] | None:
    if bound.get("running_mean") is not None and bound.get("use_input_stats", True):
        return None  # training mode changes the buffers

    def normalize(bound: Bound) -> Tensor:
        return F.instance_norm(
            bound["input"],
            bound.get("running_mean"),
            bound.get("running_var"),
            use_input_stats=bound.get("use_input_stats", True),
            eps=bound.get("eps", 1e-5),
        )

    return _norm(bound, result, normalize, channels=True)


def _group_norm(bound: Bound, result: Tensor) -> Mapping[str, Part] | None:
    def normalize(bound: Bound) -> Tensor:
        eps = bound.get("eps", 1e-5)
        return F.group_norm(bound["input"], bound["num_groups"], eps=eps)

    return _norm(bound, result, normalize, channels=True)


def _layer_norm(bound: Bound, result: Tensor) -> Mapping[str, Part] | None:
    def normalize(bound: Bound) -> Tensor:
        eps = bound.get("eps", 1e-5)
        return F.layer_norm(bound["input"], bound["normalized_shape"], eps=eps)

    if len(bound["normalized_shape"]) >= bound["input"].ndim:
        return None
    return _norm(bound, result, normalize, channels=False)


def _rms_norm(bound: Bound, result: Tensor) -> Mapping[str, Part] | None:
    def normalize(bound: Bound) -> Tensor:
        shape = bound["normalized_shape"]
        return F.rms_norm(bound["input"], shape, eps=bound.get("eps"))

    if len(bound["normalized_shape"]) >= bound["input"].ndim:
        return None
    return _norm(bound, result, normalize, channels=False)


def _embedding(bound: Bound, result: Tensor) -> Mapping[str, Part] | None:
    words, weight = bound["input"], bound["weight"]
    scaled = bound.get("scale_grad_by_freq", False)
    if scaled or bound.get("max_norm") is not None or words.ndim < 1:
        return None
    padding = bound.get("padding_idx")
    # Reverse mode, and so training, has a padding row for a constant.
    padding = None if padding is None else padding % weight.shape[0]
    entries = partial(_embedding_entries, words, weight, padding)
    return {"weight": ((words,), entries)}


def _embedding_entries(
    words: Tensor, weight: Tensor, padding: int | None, chosen: Tensor, num_data: int
) -> Entries:
    width = weight.shape[1]
    rows, q = compact(chosen // width, weight.shape[0])
    outs, p = compact(chosen % width, width)
    found = words.reshape(num_data, 1, -1) == rows[:, None]
    if padding is not None:
        found = found & (rows != padding)[:, None]
    right = found.to(weight.dtype)

    def left(delta: Tensor) -> Tensor:
        return by_data(delta, num_data).flatten(1, -2).index_select(2, outs).mT

    return Contraction(left, right, p, q, len(outs))


_BINARY = ("input", "other")
_PRODUCT = ("input", "weight")
_NORM = ("weight", "bias")

_DENSE_LAYERS: dict[Any, Layer] = {
    F.linear: Layer(("input", "weight", "bias"), _linear, affine="layer"),
    F.embedding: Layer(
        (
            "input",
            "weight",
            "padding_idx",
            "max_norm",
            "norm_type",
            "scale_grad_by_freq",
        ),
        _embedding,
    ),
    F.batch_norm: Layer(
        ("input", "running_mean", "running_var", *_NORM, "training", "momentum", "eps"),
        _batch_norm,
    ),
    F.instance_norm: Layer(
        (
            "input",
            "running_mean",
            "running_var",
            *_NORM,
            "use_input_stats",
            "momentum",
            "eps",
        ),
        _instance_norm,
    ),
    F.group_norm: Layer(("input", "num_groups", *_NORM, "eps"), _group_norm),
    F.layer_norm: Layer(("input", "normalized_shape", *_NORM, "eps"), _layer_norm),
    F.rms_norm: Layer(("input", "normalized_shape", "weight", "eps"), _rms_norm),
}
_OPERATORS: dict[Any, Layer] = {
    **dict.fromkeys(
        (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__),
        Layer(_PRODUCT, _matmul, affine="layer"),
    ),
    **dict.fromkeys(
        (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__),
        Layer(_BINARY, _add, affine="sum"),
    ),
    **dict.fromkeys(
        (torch.sub, Tensor.sub, Tensor.__sub__),
        Layer(_BINARY, _subtract, affine="sum"),
    ),
    **dict.fromkeys(
        (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__),
        Layer(_BINARY, _multiply),
    ),
}
LAYERS = {**_DENSE_LAYERS, **_OPERATORS}

REARRANGEMENTS = frozenset(
    {
        torch.t,
        Tensor.t,
        vars(torch._C.TensorBase)["T"].__get__,
        vars(torch._C.TensorBase)["mT"].__get__,
        torch.transpose,
        Tensor.transpose,
        torch.permute,
        Tensor.permute,
        torch.reshape,
        Tensor.reshape,
        Tensor.view,
        torch.flatten,
        Tensor.flatten,
        torch.unflatten,
        Tensor.unflatten,
        torch.squeeze,
        Tensor.squeeze,
        torch.unsqueeze,
        Tensor.unsqueeze,
        Tensor.contiguous,
        Tensor.clone,
        torch.clone,
        Tensor.expand,
        Tensor.__getitem__,
    }
)
