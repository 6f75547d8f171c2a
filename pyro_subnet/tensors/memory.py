"""How much memory there is, and whether an S x S factor fits into it."""

from __future__ import annotations

import math

import psutil
import torch

from pyro_subnet.exceptions import MemoryLimitError

# The precision is summed and factored in place; a quarter is for blocks of work.
_MATRICES_PER_FIT = 1.25
# Jacobian blocks and the activations behind them are cut to about this size.
DEFAULT_BUDGET = 2**28


def available_bytes(device: torch.device) -> int:
    """Memory that is free for a computation now, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def check_factor_fits(
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    matrices: float = _MATRICES_PER_FIT,
) -> None:
    """Refuses an S whose S x S matrices do not fit in memory, before any long work."""
    per_entry = matrices * torch.finfo(dtype).bits / 8
    needed = math.ceil(per_entry * size**2)
    free = available_bytes(device)
    if needed > free:
        largest = math.isqrt(int(free / per_entry))
        raise MemoryLimitError(
            f"A subnet must have an S x S factor that fits in memory; got S={size}, "
            f"which needs {needed / 2**30:.1f} GiB ({needed} bytes) where "
            f"{free / 2**30:.1f} GiB ({free} bytes) are free. Choose at most "
            f"{largest} weights."
        )
