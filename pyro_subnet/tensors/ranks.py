"""The ranks of a process group, each of which passes over data of its own.

Sums over data are sums over ranks. Every collective here is called by all ranks, in one
order, and gives all of them the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, final

import torch
import torch.distributed as dist
from torch import Tensor

from pyro_subnet.exceptions import OptionError, RankError

Value = TypeVar("Value")
_CPU = torch.device("cpu")
# Numbers of a matrix that are summed at once: a copy of so many is held beside it.
_NUMBERS = 2**24


@final
class Ranks:
    """The ranks of a group.

    Args:
        group: A process group of ``torch.distributed``.
    """

    def __init__(self, group: dist.ProcessGroup):
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    @classmethod
    def of(cls, process_group: Any) -> Ranks | None:
        """The ranks that an option stands for; None for this process alone.

        Args:
            process_group: A group; True for the one that is initialized; None or False.

        Returns:
            The ranks.

        Raises:
            OptionError: If there is no such group, or this process is not in it.
        """
        if process_group is None or process_group is False:
            return None
        if not (dist.is_available() and dist.is_initialized()):
            raise OptionError(
                "`process_group` needs a group that is initialized; got none. Call "
                "`torch.distributed.init_process_group` first, or start the script by "
                "`torchrun`."
            )
        group = dist.group.WORLD if process_group is True else process_group
        if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
            raise OptionError(
                "`process_group` must be True or a group that this process is in; got "
                f"{process_group!r}. Pass True for all ranks."
            )
        return cls(group)

    def gathered(self, own: Value) -> list[Value]:
        """What each rank gives, in the ranks' order, on every rank."""
        found: list[Any] = [None] * self.size
        with self._answered():
            dist.all_gather_object(found, _moved(own, _CPU), self._group)
        return found

    def shared(self, own: Value, source: int, device: torch.device) -> Value:
        """What one rank gives, on every rank."""
        held = [_moved(own, _CPU) if self.rank == source else None]
        at = dist.get_global_rank(self._group, source)
        with self._answered():
            dist.broadcast_object_list(held, at, self._group)
        return _moved(held[0], device)

    def sum_(self, *tensors: Tensor) -> None:
        """Sums tensors over ranks, in place."""
        for tensor in tensors:
            whole = tensor.contiguous()
            with self._answered():
                dist.all_reduce(whole, group=self._group)
            if whole is not tensor:
                tensor.copy_(whole)

    def sum_lower_(self, matrix: Tensor) -> None:
        """Sums the lower triangle of a matrix over ranks, in place."""
        size = len(matrix)
        rows = max(1, _NUMBERS // max(1, size))
        for start in range(0, size, rows):
            # What lies above the diagonal in these few rows comes along.
            part = matrix[start : start + rows, : start + rows]
            self.sum_(part)

    def rows(self, own: Tensor) -> Tensor:
        """The rows of all ranks, (R, S), in the ranks' order."""
        counts = self.gathered(len(own))
        padded = own.new_zeros(max(counts), *own.shape[1:])
        padded[: len(own)] = own
        found = [torch.empty_like(padded) for _ in counts]
        with self._answered():
            dist.all_gather(found, padded, group=self._group)
        pairs = zip(found, counts, strict=True)
        return torch.cat([part[:count] for part, count in pairs])

    @contextmanager
    def together(self) -> Iterator[None]:
        """Ends all ranks if one fails inside, where it calls no collective.

        Yields:
            Nothing.

        Raises:
            RankError: If another rank failed; says which, and how.
        """
        try:
            yield
        except Exception as error:
            self.gathered(f"{type(error).__name__}: {error}")
            raise
        for rank, said in enumerate(self.gathered("")):
            if said:
                raise RankError(
                    f"All ranks must pass over their data; got an error on rank {rank} "
                    f"of {self.size}: {said}"
                )

    @contextmanager
    def _answered(self) -> Iterator[None]:
        """Says of a collective that fails what that means."""
        try:
            yield
        except RuntimeError as error:
            raise RankError(
                f"All {self.size} ranks must take part until the end; on rank "
                f"{self.rank} another one did not answer ({error}). See the first "
                "rank's error; the same call resumes where `checkpoint=` was given."
            ) from error


def first_with(values: Sequence[Any]) -> int:
    """The first rank that gave something; rank 0 if none did."""
    return next((rank for rank, value in enumerate(values) if value is not None), 0)


def _moved(value: Any, device: torch.device) -> Any:
    """A value with its tensors on a device, inside tuples, mappings and dataclasses."""
    if isinstance(value, Tensor):
        return value.detach().to(device)
    if isinstance(value, tuple | list):
        return type(value)(_moved(part, device) for part in value)
    if isinstance(value, Mapping):
        return {name: _moved(part, device) for name, part in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        own = {part.name: getattr(value, part.name) for part in fields(value)}
        return replace(value, **{n: _moved(part, device) for n, part in own.items()})
    return value
