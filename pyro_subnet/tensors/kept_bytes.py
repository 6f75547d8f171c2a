"""How many bytes a run keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Result = TypeVar("Result")


def counting_kept_bytes(
    run: Callable[[], Result], apart_from: Sequence[Tensor]
) -> tuple[Result, int]:
    """What a function returns, and the bytes kept by its graph but for some tensors.

    A function with ``torch.func`` in it, which allows no hooks, runs once more: there
    every tensor that it makes counts, which is at least what it keeps.

    Args:
        run: The function.
        apart_from: Tensors that are there anyway.

    Returns:
        Both.
    """
    saved: dict[int, int] = {}
    count = partial(_count, saved)
    try:
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            result = run()
    # Of hooks inside `torch.func.grad`, or of a `torch.func.jvp`'s tensors without
    # storage. What is the function's own fault it raises again.
    except RuntimeError:
        with _Made() as made:
            return run(), made.nbytes
    known = {tensor.untyped_storage().data_ptr() for tensor in apart_from}
    return result, sum(size for at, size in saved.items() if at not in known)


def _count(saved: dict[int, int], tensor: Tensor) -> Tensor:
    # The tensor's own size: the few data points are a view of all.
    storage = tensor.untyped_storage().data_ptr()
    saved[storage] = max(saved.get(storage, 0), tensor.nbytes)
    # An operation that keeps its own output, as ReLU does, would hold itself, in a
    # circle that Python does not see and never frees.
    return tensor.detach()


@final
class _Made(TorchDispatchMode):
    """Adds up the bytes of tensors that operations make, but not of views."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs an operation and adds what it made."""
        result = func(*args, **(kwargs or {}))
        if all(part.alias_info is None for part in func._schema.returns):
            made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            self.nbytes += sum(leaf.nbytes for leaf in made)
        return result
