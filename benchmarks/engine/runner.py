"""Runs the two sides in turns, each in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.engine import prepare
from benchmarks.engine.cases import Case
from benchmarks.engine.compare import PARTS, Failure, Result, Row, best, compare
from benchmarks.engine.process import is_out_of_memory

# Seconds. A backend that would need longer for all the data gets those of the trial;
# one that needs longer even for those is tried with no larger batches. One whose run
# takes longer than ONCE is run in a single pair.
PATIENCE, ONCE = 120.0, 30.0
_REASON_WIDTH = 100
_MODULES = {"ours": "ours", "Pyro": "weight_space"}


@dataclass(frozen=True)
class Request:
    """One run of one side."""

    case: Case
    side: str
    batches: tuple[int, int]


# Runs a request; gives back its result, or why there is none.
Run = Callable[[Request], Result | str]


@dataclass(frozen=True)
class Launcher:
    """Starts processes.

    Attributes:
        folder: Where networks and results are kept.
        timeout: Seconds after which a process is ended.
        cold: Whether first fits are timed, with nothing run before them.
        device: Where both sides compute.
    """

    folder: Path
    timeout: float
    cold: bool = False
    device: str = "cpu"

    def prepare(self, case: Case) -> None:
        """Makes the network and the data of a case's requests."""
        prepare.save(prepare.prepare(case), self.folder / case.name)

    def __call__(self, request: Request) -> Result | str:
        case = request.case
        prepared, out = self.folder / case.name, self.folder / "result.pt"
        out.unlink(missing_ok=True)
        module = _MODULES.get(request.side, "laplace_torch")
        options = {
            "--case": case.name,
            "--side": request.side,
            "--prepared": prepared,
            "--out": out,
            "--num-data": max(case.num_data, case.num_predict),
            "--fit-batch": request.batches[0],
            "--predict-batch": request.batches[1],
            "--device": self.device,
        }
        command = ["-W", "ignore", "-m", f"benchmarks.engine.{module}"]
        for option, value in options.items():
            command += [option, str(value)]
        if self.cold:
            command.append("--cold")
        reason = failure([sys.executable, *command], self.timeout)
        return torch.load(out) if reason is None else reason


def failure(command: Sequence[str], timeout: float) -> str | None:
    """Runs a command; says why it failed, or None if it did not."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {timeout:.0f} s"
    if done.returncode == 0:
        return None
    if is_out_of_memory(done.stderr):
        return "out of memory"
    if done.returncode < 0:
        return f"killed by {signal.Signals(-done.returncode).name}"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[-1][:_REASON_WIDTH] if lines else f"exit status {done.returncode}"


@dataclass(frozen=True)
class Plan:
    """How a backend is run: on how many data, in which batches."""

    case: Case
    batches: tuple[int, int]


def plan(case: Case, backend: str, run: Run) -> Plan | Failure:
    """Tries the batch sizes on a few data; keeps the fastest for each part."""
    if len(case.batch_sizes) == 1:
        return Plan(case, (case.batch_sizes[0], case.batch_sizes[0]))
    trial = case.smaller(case.trial_size)
    seconds: dict[int, dict[str, float]] = {}
    reasons = []
    for size in case.batch_sizes:
        if size > trial.trial_size and seconds:
            break
        outcome = run(Request(trial, backend, (size, size)))
        if isinstance(outcome, str):
            reasons.append(outcome)
            if seconds:
                break  # what is too much for this batch size is for larger ones
            continue
        seconds[size] = outcome["seconds"]
        if sum(outcome["seconds"].values()) > PATIENCE:
            break
    if not seconds:
        return Failure(backend, reasons[0])
    fits, predictions = (
        {size: found[part] for size, found in seconds.items() if part in found}
        for part in ("fit", "predict")
    )
    batches = tuple(
        min(found, key=lambda size: found[size]) if found else case.batch_sizes[0]
        for found in (fits, predictions)
    )
    needed = 0.0
    if fits:
        needed += min(fits.values()) * case.num_data / trial.num_data
    if predictions:
        needed += min(predictions.values()) * case.num_predict / trial.num_predict
    whole = case if needed <= PATIENCE else trial
    return Plan(whole, (batches[0], batches[1]))


def run_backend(case: Case, backend: str, num_pairs: int, run: Run) -> Row | Failure:
    """Pairs of ours and one backend, in the batches that a trial says are its best."""
    planned = plan(case, backend, run)
    if isinstance(planned, Failure):
        return planned
    return run_pairs(planned, backend, num_pairs, run)


def run_pairs(planned: Plan, backend: str, num_pairs: int, run: Run) -> Row | Failure:
    """Pairs of ours and one backend, in turns."""
    pairs = []
    for _ in range(num_pairs):
        ours = run(Request(planned.case, "ours", planned.batches))
        if isinstance(ours, str):
            return Failure("ours", ours)
        theirs = run(Request(planned.case, backend, planned.batches))
        if isinstance(theirs, str):
            return Failure(backend, theirs)
        pairs.append((ours, theirs))
        if sum(theirs["seconds"].values()) > ONCE:
            break
    return compare(planned.case, backend, planned.batches, pairs)


@dataclass(frozen=True)
class CaseReport:
    """All that was found out about a case.

    Attributes:
        case: The case.
        rows: One for each backend.
        alone: Ours on all the data, once more; None where it failed.
    """

    case: Case
    rows: Sequence[Row | Failure]
    alone: Result | None


def run_case(
    case: Case, backends: Sequence[str] | None, num_pairs: int, run: Run
) -> CaseReport:
    """Measures a case against its backends, or those of them that are named."""
    rows: list[Row | Failure] = []
    for backend in case.backends:
        if backends is None or backend in backends:
            rows.append(run_backend(case, backend, num_pairs, run))
    return _with_ours_alone(case, rows, run)


def run_again(report: CaseReport, num_pairs: int, run: Run) -> CaseReport:
    """The case run in another way, against the best backends in their batches."""
    case = report.case
    rows: list[Row | Failure] = []
    found = {row.backend: row for part in PARTS if (row := best(report.rows, part))}
    for backend, row in found.items():
        planned = Plan(case.smaller(max(row.num_data)), row.batches)
        rows.append(run_pairs(planned, backend, num_pairs, run))
    return _with_ours_alone(case, rows, run)


def _with_ours_alone(case: Case, rows: list[Row | Failure], run: Run) -> CaseReport:
    alone = run(Request(case, "ours", (1, 1)))
    if isinstance(alone, str):
        return CaseReport(case, [*rows, Failure("ours", alone)], None)
    return CaseReport(case, rows, alone)
