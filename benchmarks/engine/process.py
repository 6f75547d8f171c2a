"""What each measured process does around its work: limits, clocks, memory, results."""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor

from benchmarks.engine import prepare
from benchmarks.engine.cases import CASES, Case, Work
from benchmarks.engine.prepare import Prepared

GB = 1e9
_CPU = torch.device("cpu")
_SHARE_OF_FREE_MEMORY = 0.9

Value = TypeVar("Value")


@dataclass
class Meter:
    """Seconds and peak memory of the parts of a side's work that are timed.

    Attributes:
        baseline: Bytes in use when the imports were done.
        seconds: Of each timed part, by its name.
        peak: Most bytes in use during any of them, so far.
    """

    baseline: int = field(default_factory=lambda: psutil.Process().memory_info().rss)
    seconds: dict[str, float] = field(default_factory=dict)
    peak: int = 0
    device: torch.device = _CPU

    @classmethod
    def on(cls, device: torch.device) -> Meter:
        """A meter of a device's memory, from now on."""
        if device.type == "cpu":
            return cls()
        return cls(torch.cuda.memory_allocated(device), device=device)

    def time(self, part: str, function: Callable[[], Value]) -> Value:
        """Runs a part, and keeps its wall time and peak memory."""
        self._settle()
        start = time.perf_counter()
        value = function()
        if self.device.type != "cpu":
            torch.cuda.synchronize(self.device)
        self.seconds[part] = time.perf_counter() - start
        on_card = self.device.type != "cpu"
        own = torch.cuda.max_memory_allocated(self.device) if on_card else peak_bytes()
        self.peak = max(self.peak, own)
        return value

    def _settle(self) -> None:
        """Starts the peak anew; on a card, once all that was asked of it is done."""
        if self.device.type == "cpu":
            forget_peak()
        else:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)


@dataclass(frozen=True)
class Task:
    """A side's share of a case.

    Attributes:
        case: The case, with as many data as are to be used.
        side: ``"ours"``, or the backend.
        prepared: Network and data.
        fit_batch: Batch size of the fit, for sides that must be told.
        predict_batch: Batch size of the prediction, likewise.
        cold: Whether what a first fit costs once is timed: nothing runs before it.
    """

    case: Case
    side: str
    prepared: Prepared
    fit_batch: int
    predict_batch: int
    cold: bool = False


# The numbers that the two sides are compared by, and further figures of ours.
Answer = tuple[dict[str, Tensor], dict[str, float]]
Works = Mapping[Work, Callable[[Task, Meter], Answer]]


def forget_peak() -> None:
    """Starts the peak anew, where the system (Linux) can."""
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5")


def peak_bytes() -> int:
    """Most memory in use since the last :func:`forget_peak`, or the start.

    Linux: the high-water mark of the process, not ``ru_maxrss``, which a child takes
    over from the process that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        return 1024 * next(int(s.split()[1]) for s in lines if s.startswith("VmHWM"))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def limit_memory(gigabytes: float) -> None:
    """Makes allocations beyond what is in use now plus the limit fail."""
    free = _SHARE_OF_FREE_MEMORY * psutil.virtual_memory().available
    limit = psutil.Process().memory_info().vms + int(min(gigabytes * GB, free))
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def is_out_of_memory(message: str) -> bool:
    """Whether an error's text says so, in any of the allocators' words."""
    signs = ("allocate memory", "not enough memory", "MemoryError", "bad_alloc")
    return any(sign in message for sign in signs)


def measure(works: Works, task: Task, meter: Meter) -> dict[str, Any]:
    """A side's result, as it is saved."""
    values, figures = works[task.case.work](task, meter)
    return {
        "seconds": meter.seconds,
        "memory": (meter.peak - meter.baseline) / GB,
        "whole_memory": meter.peak / GB,
        "threads": torch.get_num_threads(),
        "values": {name: value.cpu() for name, value in values.items()},
        "figures": figures,
    }


def main(works: Works, arguments: Sequence[str] | None = None) -> None:
    """A measured process: reads its task, runs it, saves the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--side", required=True)
    parser.add_argument("--prepared", type=Path, help="made by another process")
    parser.add_argument("--out", type=Path, help="where the result goes; else printed")
    parser.add_argument("--num-data", type=int)
    parser.add_argument("--fit-batch", type=int, default=32)
    parser.add_argument("--predict-batch", type=int, default=32)
    parser.add_argument("--cold", action="store_true", help="without a warm-up")
    parser.add_argument("--device", type=torch.device, default=_CPU)
    options = parser.parse_args(arguments)
    case = CASES[options.case]
    if options.num_data is not None:
        case = case.smaller(options.num_data)
    meter = Meter.on(options.device)
    if options.device.type == "cpu":  # a card's driver asks for more addresses
        limit_memory(case.memory_limit)
    if options.prepared is None:
        prepared = prepare.prepare(case)
    else:
        prepared = prepare.load(case, options.prepared)
    prepared = prepared.to(options.device)
    batches = options.fit_batch, options.predict_batch
    task = Task(case, options.side, prepared, *batches, cold=options.cold)
    try:
        result = measure(works, task, meter)
    except Exception as error:  # any failure of a library is a result
        text = f"{type(error).__name__}: {error}"
        # The last line of what is printed is taken for the reason.
        raise SystemExit("out of memory" if is_out_of_memory(text) else text) from error
    if options.out is None:
        print({key: value for key, value in result.items() if key != "values"})
    else:
        torch.save(result, options.out)
