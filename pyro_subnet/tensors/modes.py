"""Full float32 products, whatever shortcuts the user has allowed for training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_EXACT = "ieee"


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The floating point type of a network's curvature.

    Args:
        dtype: The network's.

    Returns:
        The same, or float32 for half precision: sums over data need the digits, and
        there is no Cholesky factorization in less.
    """
    return torch.promote_types(dtype, torch.float32)


@contextmanager
def full_precision() -> Iterator[None]:
    """Switches TF32 and bfloat16 shortcuts of float32 products off, for a while.

    TF32 keeps 10 bits of a factor, and is on by default for convolutions on GPUs. A
    curvature summed from such products is off by 1e-3, and its factor may not exist.

    Yields:
        Nothing.
    """
    settings = _settings()
    before = [getattr(module, name) for module, name, _ in settings]
    try:
        for module, name, exact in settings:
            setattr(module, name, exact)
        yield
    finally:
        for (module, name, _), value in zip(settings, before, strict=True):
            setattr(module, name, value)


def _settings() -> list[tuple[Any, str, Any]]:
    """Where torch keeps them, under what name, and the value for full precision."""
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
    return [(module, "fp32_precision", _EXACT) for module in modules]
