"""Modes of torch that a computation switches off for a while, and restores."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, final

import torch

# Kinds of devices that `torch.autocast` may be on for.
_AUTOCAST = ("cpu", "cuda", "mps", "xpu")
# Held while a thread changes what a process has one of, and until it is given back. A
# thread that holds it may take it again.
_ALONE = threading.RLock()


def one_thread_at_a_time() -> AbstractContextManager[bool]:
    """Keeps other threads of the package out of what a process has only one of."""
    return _ALONE


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype itself, but float32 for half precision, for sums and factors."""
    return torch.promote_types(dtype, torch.float32)


@contextmanager
def differentiable() -> Iterator[None]:
    """Switches gradients on, inside ``no_grad`` and ``inference_mode`` as well."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leaves inference mode, with gradient mode as it is."""
    # `torch.inference_mode(False)` alone would switch gradients on.
    enabled = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(enabled):
        yield


@contextmanager
def without_autocast() -> Iterator[None]:
    """Leaves ``torch.autocast``; what is entered inside is on as it asks."""
    with ExitStack() as stack:
        for device in _AUTOCAST:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def full_precision() -> Iterator[None]:
    """Switches off autocast, and TF32 and bfloat16 shortcuts of float32 products."""
    # TF32 keeps 10 bits of a factor, and is on by default for convolutions on GPUs. A
    # curvature summed from such products is off by 1e-3, and may have no factor.
    with _FULL_PRECISION.entered(), without_autocast():
        yield


class ProcessSwitch(ABC):
    """A setting that a process has once: the last thread inside gives it back."""

    def __init__(self) -> None:
        self._inside = 0
        self._lock = threading.Lock()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Sets it, if no thread has; gives it back, if no other needs it."""
        entered = False
        try:
            with self._lock:
                entered = True
                self._inside += 1
                self._set()
            yield
        finally:
            if entered:
                self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._give_back()

    @abstractmethod
    def _set(self) -> None:
        """Sets it, unless it is set."""

    @abstractmethod
    def _give_back(self) -> None:
        """Gives it back, if it was set."""


@final
class _FullPrecision(ProcessSwitch):
    """Torch's settings of float32 products."""

    def __init__(self) -> None:
        super().__init__()
        self._before: list[Any] = []

    def _set(self) -> None:
        if self._before:
            return
        settings = _precision_settings()
        self._before = [getattr(module, name) for module, name, _ in settings]
        for module, name, exact in settings:
            setattr(module, name, exact)

    def _give_back(self) -> None:
        settings = zip(_precision_settings(), self._before, strict=False)
        for (module, name, _), value in settings:
            setattr(module, name, value)
        self._before = []


_FULL_PRECISION = _FullPrecision()


def _precision_settings() -> list[tuple[Any, str, Any]]:
    """Module, attribute and full-precision value of each of torch's settings."""
    backends: Any = torch.backends
    if not hasattr(backends.cuda.matmul, "fp32_precision"):  # torch before 2.9
        return [
            (backends.cuda.matmul, "allow_tf32", False),
            (backends.cudnn, "allow_tf32", False),
        ]
    modules = [backends.cuda.matmul]
    for library in (backends.cudnn, backends.mkldnn):
        for kind in ("matmul", "conv", "rnn"):
            if hasattr(library, kind):
                modules.append(getattr(library, kind))
    return [(module, "fp32_precision", "ieee") for module in modules]
