"""What the machine can do: the floor under a fit."""

from __future__ import annotations

import platform
import time
from pathlib import Path

import torch
from torch import Tensor, nn

_CPU = torch.device("cpu")
_PRODUCT_SIZE = 2048
_REPEATS = 5
_BATCH_SIZES = (16, 64)


def product_rate(device: torch.device = _CPU) -> float:
    """Operations a second of the best of some float32 matrix products."""
    left, right = torch.rand(2, _PRODUCT_SIZE, _PRODUCT_SIZE, device=device)
    seconds = []
    for _ in range(_REPEATS):
        start = _now(device)
        torch.mm(left, right)
        seconds.append(_now(device) - start)
    return 2 * _PRODUCT_SIZE**3 / min(seconds)


@torch.no_grad()
def forward_seconds(net: nn.Module, x: Tensor) -> float:
    """One forward pass."""
    net(x[:2])
    start = _now(x.device)
    net(x)
    return _now(x.device) - start


def passes_seconds(net: nn.Module, x: Tensor) -> float:
    """One forward and C backward passes to the outputs of the layers, at best.

    Gradients of weights are not computed; backpropagation ends at the output of the
    first layer with weights.
    """
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    _run_passes(net, x[:2])
    seconds = []
    for batch_size in _BATCH_SIZES:
        start = _now(x.device)
        for part in x.split(batch_size):
            _run_passes(net, part)
        seconds.append(_now(x.device) - start)
    return min(seconds)


def _run_passes(net: nn.Module, x: Tensor) -> None:
    first = next(m for m in net.modules() if m._parameters)
    starts: list[Tensor] = []

    def note(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor):  # no tuple, as of attention
            starts.append(output.requires_grad_())

    handle = first.register_forward_hook(note)
    outputs = net(x)
    handle.remove()
    if not starts:
        starts.append(x.requires_grad_())
        outputs = net(x)
    for total in outputs.sum(0):
        torch.autograd.grad(total, starts, retain_graph=True)


def _now(device: torch.device) -> float:
    """Seconds of the clock, once all that was asked of a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def description(device: torch.device = _CPU) -> str:
    """Processor or card, threads and the version of torch, on one line."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
