"""How much memory there is, and whether an S x S factor fits into it."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import psutil
import torch

from pyro_subnet.exceptions import MemoryLimitError

try:
    import resource as _resource
except ImportError:  # Windows
    resource: ModuleType | None = None
else:
    resource = _resource

# Folder of the controller, and files of its limit and use; the part that is cache.
_CGROUP_2 = ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")
_CGROUP_1 = (
    "sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "total_inactive_file",
)
# Version 1 writes 2**63 - 1, in whole pages, where there is no limit.
_UNLIMITED = 2**62
# The precision is summed and factored in place; a quarter is for blocks of work.
_MATRICES_PER_FIT = 1.25
# Jacobian blocks and the activations behind them are cut to about this size.
DEFAULT_BUDGET = 2**28


def available_bytes(device: torch.device) -> int:
    """Memory that is free for a computation now, in bytes.

    On a CPU: of the machine, of the process (``ulimit -v``), and of the container, the
    least.

    Args:
        device: Whose memory.

    Returns:
        Bytes.
    """
    if device.type == "cuda":
        # Blocks that torch keeps are free to it, though the card counts them as taken.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    free = [psutil.virtual_memory().available, *_left_to_process(), *cgroup_bytes()]
    return max(0, min(free))


def check_fits(needed: int, device: torch.device, what: str, way_out: str) -> None:
    """Refuses an allocation that does not fit in memory, before it is made.

    Args:
        needed: Bytes.
        device: Where.
        what: The rule and what came, up to "which needs".
        way_out: What to do instead, a sentence.

    Raises:
        MemoryLimitError: If fewer bytes are free.
    """
    free = available_bytes(device)
    if needed > free:
        raise MemoryLimitError(
            f"{what}, which needs {needed / 2**30:.1f} GiB ({needed} bytes) where "
            f"{free / 2**30:.1f} GiB ({free} bytes) are free. {way_out}"
        )


def _left_to_process() -> list[int]:
    """Bytes of address space that are left under the process's own limit, if any."""
    if resource is None:
        return []
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return []
    return [limit - psutil.Process().memory_info().vms]


def cgroup_bytes(root: Path = Path("/")) -> list[int]:
    """Bytes that are left under each memory limit of the process's cgroups.

    Args:
        root: Where ``/proc`` and ``/sys`` are.

    Returns:
        One number for each limit; none where no cgroup limits memory.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            base, limit, used, cache = _CGROUP_2
        elif "memory" in controllers.split(","):
            base, limit, used, cache = _CGROUP_1
        else:
            continue
        folder = root / base
        # A container may see its own group as the root, under a path that it has not.
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            group = folder.joinpath(*parts[:depth])
            try:
                most = int((group / limit).read_text())
                if most >= _UNLIMITED:
                    continue
                now = int((group / used).read_text())
                text = (group / "memory.stat").read_text()
            except (OSError, ValueError):  # no such group, or "max"
                continue
            # Pages of files that were read are given back when memory is short.
            counts = dict(entry.split() for entry in text.splitlines())
            found.append(most - now + int(counts.get(cache, 0)))
    return found


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
