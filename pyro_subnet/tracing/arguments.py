"""What users pass to a model: arrays that stand for tensors, and mistakes by name."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.data import DataLoader, Dataset

from pyro_subnet.exceptions import DataError, SubnetError

Result = TypeVar("Result")
# Positional and keyword arguments of one call of the model.
Call = tuple[tuple[Any, ...], dict[str, Any]]

# What torch says where shapes, or kinds of numbers, do not fit.
_SHAPES = re.compile(
    r"shapes? |size mismatch|size of tensor|must match|[Dd]imension|[Ee]xpected \dD|"
    r"[Cc]hannels|[Bb]roadcast|out of (range|bounds)|invalid for input of size|numel"
)
_DTYPES = re.compile(r"dtype|scalar type|[Tt]ype\b|Long|Double|Float|Half|Bool|Int\b")
# What a model's own code raises by purpose is another class, or another text.
_TORCH_RAISES = (
    RuntimeError,
    TypeError,
    ValueError,
    IndexError,
    AttributeError,
    ZeroDivisionError,
)


def run_on(
    run: Callable[..., Result],
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    like: Tensor | None = None,
) -> tuple[Result, Call]:
    """Runs a model for the first time on some data.

    NumPy arrays and pandas objects are taken as tensors, floating ones in the model's
    dtype, unless the model can only be run on the arrays themselves. A batch on the CPU
    is moved to the model's device if the model does not run on it as it is.

    Args:
        run: What is done with the arguments, a run of the model.
        model: The model, to say how it is called.
        args: Positional arguments.
        kwargs: Keyword arguments.
        like: Of the dtype and device of the model's latent sites, if they are known.

    Returns:
        What ``run`` returns, and the arguments that it was given.

    Raises:
        DataError: If the model cannot be run, for a reason that the arguments show.
    """
    given = tuple(args), dict(kwargs)
    taken, converted = as_tensors(given, model, like)
    try:
        return run(*taken[0], **taken[1]), taken
    except _TORCH_RAISES as error:
        if isinstance(error, SubnetError):
            raise
        if converted:
            with contextlib.suppress(*_TORCH_RAISES):
                return run(*given[0], **given[1]), given
        device = (_first_float(model) if like is None else like).device
        moved = _moved(taken, device)
        if moved is not None:
            with contextlib.suppress(*_TORCH_RAISES):
                return run(*moved[0], **moved[1]), moved
        _explain(error, model, taken, like)
        raise


def as_tensors(
    call: Call, model: Callable[..., Any], like: Tensor | None
) -> tuple[Call, bool]:
    """Arguments with tensors in place of arrays, and whether there were any."""
    leaves = tree_flatten(call)[0]
    if not any(is_array(leaf) or _is_of_inference(leaf) for leaf in leaves):
        return call, False
    if like is None:
        like = _first_float(model)

    def convert(leaf: Any) -> Any:
        if _is_of_inference(leaf):
            return leaf.clone()
        return _as_tensor(leaf, like) if is_array(leaf) else leaf

    args, kwargs = tree_map(convert, call)
    return (args, kwargs), True


def _moved(call: Call, device: torch.device) -> Call | None:
    """A call whose tensors on the CPU are on a device; None if there are none."""

    def is_left(leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.device.type == "cpu"

    def move(leaf: Any) -> Any:
        # A tokenizer's batch is a mapping of its own, which moves as a whole.
        whole = isinstance(leaf, Mapping) and hasattr(leaf, "to")
        if whole and any(map(is_left, leaf.values())):
            return leaf.to(device)
        return leaf.to(device) if is_left(leaf) else leaf

    leaves, spec = tree_flatten(call)
    found = [move(leaf) for leaf in leaves]
    same = all(one is other for one, other in zip(leaves, found, strict=True))
    if device.type == "cpu" or same:
        return None
    args, kwargs = tree_unflatten(found, spec)
    return args, kwargs


def _is_of_inference(leaf: Any) -> bool:
    """Whether a tensor was made in inference mode, and so has no place in a graph."""
    found = isinstance(leaf, Tensor) and leaf.is_inference()
    return found and not torch.is_inference_mode_enabled()


def is_array(leaf: Any) -> bool:
    """Whether a value is a NumPy array or a pandas object."""
    # pandas is no dependency: its objects are known by where they come from.
    pandas = type(leaf).__module__.partition(".")[0] == "pandas"
    return isinstance(leaf, np.ndarray) or (pandas and hasattr(leaf, "to_numpy"))


def _as_tensor(leaf: Any, like: Tensor) -> Tensor:
    array = leaf if isinstance(leaf, np.ndarray) else leaf.to_numpy()
    try:
        native = array.astype(array.dtype.newbyteorder("="), copy=False)
        # torch takes neither reversed nor read-only memory without a word.
        tensor = torch.from_numpy(np.require(native, requirements=["C", "W"]))
    except TypeError as error:
        raise DataError(
            f"Data must be numbers; got a {type(leaf).__name__} of dtype "
            f"{array.dtype}. Encode text and objects first, or pick columns."
        ) from error
    dtype = like.dtype if tensor.is_floating_point() else tensor.dtype
    return tensor.to(like.device, dtype)


def arguments_without_value(
    model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[str]:
    """Names of the arguments of a call that are None, given or by default."""
    model = model.forward if isinstance(model, nn.Module) else model
    try:
        bound = inspect.signature(model).bind(*args, **kwargs)
    except (TypeError, ValueError):  # a callable without a usable signature
        return [name for name, value in kwargs.items() if value is None]
    bound.apply_defaults()
    return [name for name, value in bound.arguments.items() if value is None]


def is_of_shapes(error: BaseException) -> bool:
    """Whether torch says that shapes do not fit."""
    return _SHAPES.search(str(error)) is not None


def _first_float(model: Any) -> Tensor:
    """A tensor of the dtype and device that a model is likely to compute in."""
    if isinstance(model, nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                return tensor
    return torch.empty(0)


def _explain(error: Exception, model: Any, call: Call, like: Tensor | None) -> None:
    """Raises a DataError if the arguments show why the model failed on them."""
    leaves = tree_flatten(call)[0]
    signature = _signature(model)
    said = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"

    def refuse(rule: str, way_out: str) -> NoReturn:
        raise DataError(
            f"{rule}; got {_described(call)} ({said}). {way_out}"
        ) from error

    if signature is not None and isinstance(error, TypeError):
        try:
            signature.bind(*call[0], **call[1])
        except TypeError:
            refuse(
                f"The model must be called with its own arguments, {signature}",
                "Pass them as the model takes them, such as `(x, y)`.",
            )
    for leaf in leaves:
        if isinstance(leaf, DataLoader | Dataset):
            refuse(
                "The arguments of one call must be tensors, and no "
                f"{type(leaf).__name__}",
                "Pass it where batches are taken, as to `laplace_approximation_from`, "
                "or call this for each batch.",
            )
        if isinstance(leaf, nn.Module) or inspect.isroutine(leaf):
            refuse(
                "The arguments must be the model's data: a guide knows its model",
                "Pass the data alone, such as `guide(x, y)`.",
            )
    if re.search(r"must be Tensor|has no attribute|must be real number", str(error)):
        odd = [leaf for leaf in call[0] if leaf is not None]
        if not all(isinstance(leaf, Tensor | Mapping) for leaf in odd):
            refuse(
                "The model's data must be tensors, or NumPy arrays",
                "Convert them with `torch.as_tensor`.",
            )
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if any(leaf.numel() == 0 for leaf in tensors):
        refuse("The data must hold at least one row", "Check what was filtered out.")
    device = _first_float(model).device if like is None else like.device
    devices = {leaf.device for leaf in tensors} | {device}
    if len(devices) > 1 and ("device" in str(error) or "meta" in map(str, devices)):
        refuse(
            f"All data must be on the model's device, {device}",
            f"Move them with `.to({str(device)!r})`.",
        )
    dtype = _first_float(model).dtype if like is None else like.dtype
    others = {leaf.dtype for leaf in tensors} - {dtype}
    if others and _DTYPES.search(str(error)) and not _SHAPES.search(str(error)):
        refuse(
            f"Inputs must have the network's dtype, likely {dtype}, and labels or "
            "indices be integers",
            f"Convert inputs with `.to({dtype})`, labels with `.long()`.",
        )
    _refuse_infinite(error, signature, call)
    if is_of_shapes(error):
        way = "Check their order and shapes"
        if signature is not None:
            way += f": the model takes {signature}"
        refuse("The model must run on the data", f"{way}.")


def _signature(model: Any) -> inspect.Signature | None:
    """How a model is called, without annotations."""
    called = model.forward if isinstance(model, nn.Module) else model
    try:
        found = inspect.signature(called)
        empty = inspect.Parameter.empty
        plain = [p.replace(annotation=empty) for p in found.parameters.values()]
        return found.replace(parameters=plain, return_annotation=empty)
    except (TypeError, ValueError):  # a callable that does not tell
        return None


def _refuse_infinite(
    error: Exception, signature: inspect.Signature | None, call: Call
) -> None:
    """Raises a DataError if inputs are NaN or infinite, and made a parameter so."""
    if not isinstance(error, ValueError) or "invalid values" not in str(error):
        return
    for name, leaf in _named_leaves(signature, call):
        bad = int((~leaf.isfinite()).sum()) if isinstance(leaf, Tensor) else 0
        if bad:
            said = str(error).splitlines()[0][:200]
            raise DataError(
                f"Inputs must be finite; got {bad} NaN or inf of {leaf.numel()} values "
                f"of `{name}` ({said}). Leave such data out, or fill them in."
            ) from error


def _named_leaves(
    signature: inspect.Signature | None, call: Call
) -> list[tuple[str, Any]]:
    """Values inside the arguments of a call, each with the argument's name."""
    args, kwargs = call
    names: Iterable[str] = map("args[{}]".format, range(len(args)))
    if signature is not None:
        bound = signature.bind_partial(*args).arguments
        if len(bound) == len(args):
            names = bound
    named = {**dict(zip(names, args, strict=True)), **kwargs}
    return [(n, leaf) for n, value in named.items() for leaf in tree_flatten(value)[0]]


def _described(call: Call) -> str:
    args, kwargs = call
    parts = [*map(_kind, args), *(f"{k}={_kind(value)}" for k, value in kwargs.items())]
    return f"({', '.join(parts)})"


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    where = "" if value.device.type == "cpu" else f" on {value.device}"
    return f"{value.dtype} {list(value.shape)}{where}"
