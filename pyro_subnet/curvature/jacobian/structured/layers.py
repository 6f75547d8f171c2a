r"""Rules of the torch functions that weights enter, one for each kind of layer.

A rule says how the entries of J at a weight follow from what the function read and from
the gradient :math:`\delta` of its output. Axis 0 of inputs and outputs is the data's,
or data times positions; the route checks by itself that it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_subnet.curvature.jacobian.structured.entries import (
    Contraction,
    broadcast,
    compact,
    linear_entries,
    matrix_plan,
    picked,
)
from pyro_subnet.curvature.jacobian.structured.tape import Entries, Layer, Part

Bound = Mapping[str, Any]
# Axes of a batch of vectors, and of a weight that maps vectors to vectors.
_MATRIX = 2


def _broadcasts(weight: Any, result: Tensor) -> bool:
    """Whether an argument has no axis of data, so that it may be a weight."""
    return isinstance(weight, Tensor) and weight.ndim < result.ndim


def _channels(weight: Tensor, ndim: int) -> Tensor:
    """A weight of the channels, axis 1, in a shape that broadcasts over positions."""
    return weight.view(-1, *(1,) * (ndim - 2))


def _linear(bound: Bound, result: Tensor) -> Mapping[str, Part] | None:
    x, weight, bias = bound["input"], bound["weight"], bound.get("bias")
    if x.ndim < _MATRIX or weight.ndim != _MATRIX:
        return None
    parts: dict[str, Part] = {"weight": ((x,), partial(linear_entries, x, weight))}
    if bias is not None:
        parts["bias"] = ((), broadcast(bias, result.shape, None))
    return parts


def _matmul(bound: Bound, result: Tensor) -> Mapping[str, Part] | None:
    x, weight = bound["input"], bound["weight"]
    if not isinstance(x, Tensor) or x.ndim < _MATRIX or weight.ndim > _MATRIX:
        return None
    return {"weight": ((x,), partial(_matmul_entries, x, weight))}


def _matmul_entries(
    x: Tensor, weight: Tensor, chosen: Tensor, num_data: int
) -> Entries:
    # The weight is transposed beside `F.linear`: J_(i,o) = sum_t x_ti delta_to
    width = 1 if weight.ndim == 1 else weight.shape[1]
    ins, q, outs, p = matrix_plan(chosen, weight.shape[0], width)

    def left(delta: Tensor) -> Tensor:
        wide = delta.unsqueeze(-1) if weight.ndim == 1 else delta
        return picked(wide, outs, num_data)

    return Contraction(left, picked(x.detach(), ins, num_data), p, q, len(outs))


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
    bound: Bound, result: Tensor, normalize: Callable[[], Tensor], channels: bool
) -> Mapping[str, Part] | None:
    # result = weight * normalized + bias: the input is normalized again, without either
    x, weight, bias = bound["input"], bound.get("weight"), bound.get("bias")
    if x.ndim < _MATRIX:
        return None

    def shaped(part: Tensor) -> Tensor:
        return _channels(part, x.ndim) if channels else part

    parts: dict[str, Part] = {}
    if weight is not None:

        def weight_entries(chosen: Tensor, num_data: int) -> Entries:
            with torch.no_grad():
                normalized = normalize()
            entries = broadcast(shaped(weight), result.shape, normalized)
            return entries(chosen, num_data)

        parts["weight"] = ((x,), weight_entries)
    if bias is not None:
        parts["bias"] = ((), broadcast(shaped(bias), result.shape, None))
    return parts


def _batch_norm(bound: Bound, result: Tensor) -> Mapping[str, Part] | None:
    if bound.get("training", False):  # couples the data, and changes the buffers
        return None
    read = bound["input"], bound["running_mean"], bound["running_var"]
    normalize = partial(F.batch_norm, *read, eps=bound.get("eps", 1e-5))
    return _norm(bound, result, normalize, channels=True)


def _instance_norm(bound: Bound, result: Tensor) -> Mapping[str, Part] | None:
    if bound.get("running_mean") is not None and bound.get("use_input_stats", True):
        return None  # training mode changes the buffers
    normalize = partial(
        F.instance_norm,
        bound["input"],
        bound.get("running_mean"),
        bound.get("running_var"),
        use_input_stats=bound.get("use_input_stats", True),
        eps=bound.get("eps", 1e-5),
    )
    return _norm(bound, result, normalize, channels=True)


def _group_norm(bound: Bound, result: Tensor) -> Mapping[str, Part] | None:
    read = bound["input"], bound["num_groups"]
    normalize = partial(F.group_norm, *read, eps=bound.get("eps", 1e-5))
    return _norm(bound, result, normalize, channels=True)


def _layer_norm(bound: Bound, result: Tensor) -> Mapping[str, Part] | None:
    x, shape = bound["input"], bound["normalized_shape"]
    if len(shape) >= x.ndim:
        return None
    normalize = partial(F.layer_norm, x, shape, eps=bound.get("eps", 1e-5))
    return _norm(bound, result, normalize, channels=False)


def _rms_norm(bound: Bound, result: Tensor) -> Mapping[str, Part] | None:
    x, shape = bound["input"], bound["normalized_shape"]
    if len(shape) >= x.ndim:
        return None
    normalize = partial(F.rms_norm, x, shape, eps=bound.get("eps"))
    return _norm(bound, result, normalize, channels=False)


def _embedding(bound: Bound, result: Tensor) -> Mapping[str, Part] | None:
    words, weight = bound["input"], bound["weight"]
    scaled = bound.get("scale_grad_by_freq", False)
    if scaled or bound.get("max_norm") is not None or words.ndim < 1:
        return None
    padding = bound.get("padding_idx")
    # Reverse mode, and so training, takes a padding row for a constant.
    padding = None if padding is None else padding % weight.shape[0]
    entries = partial(_embedding_entries, words, weight, padding)
    return {"weight": ((words,), entries)}


def _embedding_entries(
    words: Tensor, weight: Tensor, padding: int | None, chosen: Tensor, num_data: int
) -> Entries:
    # As a matrix product with one-hot words: J_(w,o) = sum_t [word_t = w] delta_to
    width = weight.shape[1]
    rows, q = compact(chosen // width, weight.shape[0])
    outs, p = compact(chosen % width, width)
    found = words.reshape(num_data, 1, -1) == rows[:, None]
    if padding is not None:
        found = found & (rows != padding)[:, None]
    left = partial(picked, channels=outs, num_data=num_data)
    return Contraction(left, found.to(weight.dtype), p, q, len(outs))


_BINARY = ("input", "other")
_PRODUCT = ("input", "weight")
_NORM = ("weight", "bias")
_RUNNING = ("input", "running_mean", "running_var", *_NORM)
_LOOKUP = "input weight padding_idx max_norm norm_type scale_grad_by_freq".split()

_DENSE_LAYERS: dict[Any, Layer] = {
    F.linear: Layer(("input", "weight", "bias"), _linear, affine="layer"),
    F.embedding: Layer(_LOOKUP, _embedding),
    F.batch_norm: Layer((*_RUNNING, "training", "momentum", "eps"), _batch_norm),
    F.instance_norm: Layer(
        (*_RUNNING, "use_input_stats", "momentum", "eps"), _instance_norm
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
        (torch.sub, Tensor.sub, Tensor.__sub__), Layer(_BINARY, _subtract, affine="sum")
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
