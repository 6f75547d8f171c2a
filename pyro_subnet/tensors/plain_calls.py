"""Torch's functions in a form of the same values that has every derivative.

Some save work in training at the cost of what a curvature needs: embeddings with sparse
gradients, recurrent kernels without a backward pass in eval mode, layers that are run
again in the backward pass, compiled ones.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final, no_type_check

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)

from pyro_subnet.exceptions import ModelError
from pyro_subnet.tensors.modes import ProcessSwitch, one_thread_at_a_time

_EMBEDDINGS: Mapping[Any, list[str]] = {
    F.embedding: (
        "input weight padding_idx max_norm norm_type scale_grad_by_freq sparse"
    ).split(),
    F.embedding_bag: (
        "input weight offsets max_norm norm_type scale_grad_by_freq mode sparse"
    ).split(),
}
_RECURRENT = frozenset({torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu})
_RERUN = torch.utils.checkpoint.CheckpointFunction.forward.__code__
_CHECKPOINTS = torch.utils.checkpoint.__name__
_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
# What keeps torch from a zero in the denominator of a row's norm.
_RENORM_EPS = 1e-7


@contextmanager
def plain_calls(*, trains: bool = False) -> Iterator[None]:
    """Runs torch's functions in their plain form, and nothing compiled.

    Args:
        trains: Whether first derivatives are all that is asked for, as where the user
            trains: recurrent layers in training mode then keep their fast kernels.

    Raises:
        KeyboardInterrupt: As it came.
    """
    before = _get_current_function_mode_stack()
    if any(isinstance(mode, _PlainCalls) for mode in before):
        yield
        return
    with _EAGER.entered():
        try:
            _PlainCalls(trains).__enter__()
            yield
        except KeyboardInterrupt as interrupt:
            # Generators that it has ended would put their own modes back, but later.
            traceback.clear_frames(interrupt.__traceback__)
            raise
        finally:
            _restore_modes(before)


def _restore_modes(before: Sequence[TorchFunctionMode]) -> None:
    """Gives torch's stack of modes back, which an interrupt may have changed."""
    while list(now := _get_current_function_mode_stack()) != list(before[: len(now)]):
        _pop_mode()
    for mode in before[len(now) :]:
        _push_mode(mode)


@final
class _PlainCalls(TorchFunctionMode):
    """Replaces calls while it is entered."""

    def __init__(self, trains: bool) -> None:
        super().__init__()
        self._trains = trains
        self._wants_graph = torch.is_grad_enabled()

    # Called for each torch function of a run: checks at run time would take longer.
    @no_type_check
    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs a torch function."""
        kwargs = kwargs or {}
        if func in _EMBEDDINGS:
            return _embedded(func, args, kwargs)
        if func in _RECURRENT and not (self._trains and _in_training_mode(args)):
            with _without_fused_recurrence():
                return func(*args, **kwargs)
        if self._wants_graph and not torch.is_grad_enabled():
            _refuse_reentrant_checkpoint()
        hooks = _top_hooks(True)
        if hooks is None or hooks[0].__module__ != _CHECKPOINTS:
            return func(*args, **kwargs)
        return _kept(hooks, func, args, kwargs)


def _embedded(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """An embedding whose gradient is dense, and which leaves its weight as it is."""
    names = _EMBEDDINGS[func]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    # The gradient divided by how often a row is read is no derivative.
    given |= {"sparse": False, "scale_grad_by_freq": False}
    limit = given.get("max_norm")
    if limit is not None:
        order = given.get("norm_type", 2.0)
        weight = _renormed(given["weight"], float(limit), float(order))
        given |= {"weight": weight, "max_norm": None}
    # Past the arguments that are named here.
    return func(*args[len(names) :], **given)


def _renormed(weight: Tensor, limit: float, order: float) -> Tensor:
    """A weight whose longer rows are cut to a norm, with torch's gradient."""
    # Torch overwrites the rows it reads, without a gradient: at the new values the
    # derivative is that of a plain lookup.
    now = weight.detach()
    norm = torch.linalg.vector_norm(now, order, dim=-1, keepdim=True)
    scale = torch.where(norm > limit, limit / (norm + _RENORM_EPS), 1.0)
    return weight + (now * scale.to(now.dtype) - now)


def _in_training_mode(args: tuple[Any, ...]) -> bool:
    """Whether a recurrent call is one of training, whose kernels have a gradient."""
    # After the weights: biases, layers, dropout, training. Packed sequences have one
    # argument more in front of the weights.
    weights = next(i for i, arg in enumerate(args) if isinstance(arg, list))
    return bool(args[weights + 4])


@contextmanager
def _without_fused_recurrence() -> Iterator[None]:
    """Switches off kernels of recurrent layers that have no gradient in eval mode."""
    with one_thread_at_a_time():  # they are switched for the whole process
        before = torch._C._get_mkldnn_enabled(), torch.backends.cudnn.enabled
        try:
            torch._C._set_mkldnn_enabled(False)
            torch.backends.cudnn.enabled = False
            yield
        finally:
            torch._C._set_mkldnn_enabled(before[0])
            torch.backends.cudnn.enabled = before[1]


@no_type_check
def _kept(
    hooks: Any, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
) -> Any:
    """Runs a function and keeps what its backward pass needs, though checkpointed."""
    # A layer that runs again in the backward pass would find other weights than those
    # that a functional call, or a draw, gave it in the forward pass.
    try:
        torch._C._autograd._pop_saved_tensors_default_hooks()
        return func(*args, **kwargs)
    finally:
        # Back, unless an interrupt came before they were taken.
        now = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if now is None or now[0] is not hooks[0]:
            torch._C._autograd._push_saved_tensors_default_hooks(*hooks)


def _refuse_reentrant_checkpoint() -> None:
    frame = sys._getframe(1)
    while frame.f_back is not None:
        if frame.f_code is _RERUN:
            raise ModelError(
                "Checkpointed layers must have `use_reentrant=False`, as torch's other "
                "kind gives their weights no gradient but in `backward()`; got "
                "`use_reentrant=True`. Pass `use_reentrant=False` to "
                "`torch.utils.checkpoint.checkpoint`."
            )
        frame = frame.f_back


@final
class _Eager(ProcessSwitch):
    """Runs compiled code eagerly: it has neither our modes nor a graph of ours."""

    def __init__(self) -> None:
        super().__init__()
        self._stance: Any = None

    def _set(self) -> None:
        # The compiler takes seconds to import: without it nothing is compiled.
        if self._stance is None and "torch._dynamo" in sys.modules:
            self._stance = torch.compiler.set_stance("force_eager")

    def _give_back(self) -> None:
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None


_EAGER = _Eager()
