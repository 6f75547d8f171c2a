"""Pyro's handlers, one stack for all threads of a process, used by one at a time."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import final, no_type_check

from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK, Message

from pyro_subnet.exceptions import ModelError


@final
class OneThread(Messenger):
    """Refuses sites and handlers of other threads, which it cannot tell apart later.

    The package's own threads wait for each other. Others, such as one that takes steps
    of ``SVI``, put their handlers on the same stack: each would see the other's sites.
    """

    def __enter__(self) -> OneThread:
        """Installs it above all handlers that are there."""
        self._owner = threading.get_ident()
        super().__enter__()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Takes it off the stack; an error if another thread's handlers are on it."""
        mixed = exc_type is None and (not _PYRO_STACK or _PYRO_STACK[-1] is not self)
        error = _mixed("handlers") if mixed else None
        # With an error Pyro takes off what is above as well.
        super().__exit__(type(error) if error else exc_type, error or exc_value, None)
        if error:
            raise error

    # Called for each site of each run: checks at run time would take longer.
    @no_type_check
    def _process_message(self, msg: Message) -> None:
        if threading.get_ident() != self._owner:
            raise _mixed(f"site {msg['name']!r}")


def _mixed(what: str) -> ModelError:
    return ModelError(
        "Pyro models must run in one thread at a time, as Pyro has one stack of "
        f"handlers for all threads; got {what} of another thread while the package "
        "ran a model. Predictions in closed form wait for each other; hold a lock of "
        "your own around them and around `SVI`, `Predictive` or `MCMC` in other "
        "threads."
    )
