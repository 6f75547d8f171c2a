"""Runs a function on several ranks of a gloo group, each a process of its own."""

from __future__ import annotations

import io
import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyro
import torch
import torch.distributed as td

# Seconds after which a rank that has not ended counts as hanging.
PATIENCE = 180
# Imported once: the ranks are forked from the process that has done it.
_PRELOADED = ["pyro_subnet", "tests.ranks", "sympy"]


@dataclass(frozen=True)
class Outcome:
    """How one rank ended.

    Attributes:
        value: What its function returned.
        error: Name of the class of the error that it raised; None if it raised none.
        said: That error's text.
    """

    value: Any = None
    error: str | None = None
    said: str = ""


def on_ranks(
    size: int, folder: Path, work: Callable[..., Any], *args: Any
) -> list[Outcome]:
    """Runs ``work(rank, *args)`` on every rank of a new group; waits for all.

    A rank that was killed has the error ``"killed"``, one that hangs ``"hangs"``.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    store = folder / "store"
    store.unlink(missing_ok=True)
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    processes = [
        context.Process(target=_run, args=((rank, size), store, sender, work, args))
        for rank, (_, sender) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for _, sender in pipes:
        sender.close()
    receivers = [receiver for receiver, _ in pipes]
    return [_outcome(*pair) for pair in zip(processes, receivers, strict=True)]


def _outcome(process: Any, receiver: Connection) -> Outcome:
    if not receiver.poll(PATIENCE):
        process.kill()
        return Outcome(error="hangs")
    try:
        sent = io.BytesIO(receiver.recv_bytes())
        found: Outcome = torch.load(sent, weights_only=False)
    except EOFError:
        found = Outcome(error="killed")
    process.join(PATIENCE)
    return found


def _run(
    place: tuple[int, int],
    store: Path,
    sender: Connection,
    work: Callable[..., Any],
    args: Sequence[Any],
) -> None:
    rank, size = place
    torch.set_num_threads(1)
    pyro.set_rng_seed(rank)  # ranks of a training script draw other numbers
    td.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size
    )
    try:
        found = Outcome(work(rank, *args))
    except Exception as error:
        traceback.print_exc()
        found = Outcome(error=type(error).__name__, said=str(error))
    # Others may still be in a collective with this one: it stays until they are done.
    sent = io.BytesIO()
    torch.save(found, sent)  # by value: a pipe would share memory that ends with us
    sender.send_bytes(sent.getvalue())
    sender.close()
    td.destroy_process_group()
