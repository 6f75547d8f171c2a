"""How many bytes a run keeps for its backward pass."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Result = TypeVar("Result")


def counting_kept_bytes(
    run: Callable[[], Result], apart_from: Sequence[Tensor]
) -> tuple[Result, int]:
    """What a function returns, and the bytes kept by its graph but for some tensors.

    Parameters and buffers of the modules that run do not count: they are there anyway,
    however many data there are.

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
        with (
            torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
            _storages_of_modules() as known,
        ):
            result = run()
    # Of hooks inside `torch.func.grad`, or of a `torch.func.jvp`'s tensors without
    # storage. What is the function's own fault it raises again.
    except RuntimeError:
        with _Made() as made:
            return run(), made.nbytes
    known |= {tensor.untyped_storage().data_ptr() for tensor in apart_from}
    return result, sum(size for at, size in saved.items() if at not in known)


@contextmanager
def _storages_of_modules() -> Iterator[set[int]]:
    """Where the parameters and buffers of the modules lie that run inside."""
    found, met, thread = set[int](), set[nn.Module](), threading.get_ident()

    def meet(module: nn.Module, inputs: Any) -> None:
        if threading.get_ident() != thread or module in met:
            return
        for part in module.modules():
            if part not in met:
                met.add(part)
                for own in (*part._parameters.values(), *part._buffers.values()):
                    # Those that `torch.func` wraps, and sparse ones, have no storage.
                    if own is not None:
                        with suppress(RuntimeError):
                            found.add(own.untyped_storage().data_ptr())

    handle = register_module_forward_pre_hook(meet)
    try:
        yield found
    finally:
        handle.remove()


def _count(saved: dict[int, int], tensor: Tensor) -> Tensor:
    for part in _strided_parts(tensor):
        # Its own size, for the few data points are a view of all; but of one that is
        # expanded no more than there is.
        storage = part.untyped_storage()
        at, size = storage.data_ptr(), min(part.nbytes, storage.nbytes())
        saved[at] = max(saved.get(at, 0), size)
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
            parts = [part for leaf in made for part in _strided_parts(leaf)]
            self.nbytes += sum(part.nbytes for part in parts)
        return result


def _strided_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """What a tensor is held in: a sparse one in its numbers and their places."""
    if tensor.layout == torch.strided:
        return (tensor,)
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return ()
