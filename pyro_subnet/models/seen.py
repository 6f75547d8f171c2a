"""Whether a call comes again: on the same data, with the same sites and values."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, ExpTransform, Transform
from torch.distributions.constraints import Constraint
from torch.utils._pytree import tree_flatten

from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.trace import is_factor

# Arguments that are the same if they are equal.
_PLAIN = (int, float, str, bool, bytes)
# Objects that are the same if their attributes are.
_OF_ATTRIBUTES = (Distribution, Transform, Constraint)
# But for what says nothing of their values: a switch of Pyro, what a transform
# remembers of its last use, and its inverse, which holds it in turn.
_LEFT = ("_validate_args", "_cached_x_y", "_inv")
_Inverse = type(ExpTransform().inv)


@final
@dataclass(frozen=True, eq=False)
class Seen:
    """What identifies a call: its arguments, their versions, its values at the MAP."""

    leaves: tuple[Any, ...]
    versions: tuple[int | None, ...]
    values: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Seen:
        """Of the arguments alone."""
        leaves = tuple(tree_flatten((args, dict(kwargs)))[0])
        return cls(leaves, tuple(map(_version, leaves)))

    def is_same(self, other: Seen) -> bool:
        """Whether the model was called on the same data and gave the same values."""
        return (
            self.has_arguments_of(other)
            and len(self.values) == len(other.values)
            and all(
                torch.equal(a, b)
                for a, b in zip(self.values, other.values, strict=True)
            )
        )

    def has_arguments_of(self, other: Seen) -> bool:
        """Whether the model was called on the same data."""
        return (
            len(self.leaves) == len(other.leaves)
            and None not in other.versions
            and all(
                a is b or (a == b if type(a) is type(b) in _PLAIN else False)
                for a, b in zip(self.leaves, other.leaves, strict=True)
            )
            and self.versions == other.versions
        )


@final
class Changed(BaseException):
    """A call that comes again does not do what it did.

    No ``Exception``, since it goes through the user's model, which may catch those.
    """


@final
class Record:
    """What a run of a call meets at the MAP: its sites, and what it returns.

    Args:
        seen: The arguments of the call.
        call: The call.
        before: The record of an earlier run, which this one is held to, if any.
    """

    def __init__(self, seen: Seen, call: ModelCall, before: Record | None = None):
        self.seen = seen
        self.call = call
        self.wants_gradients = torch.is_grad_enabled()
        self._before = before
        self._met: dict[Hashable, Any] = {}

    def has(self, key: Hashable) -> bool:
        """Whether the run has met something."""
        return key in self._met

    def meet(self, key: Hashable, content: object, holder: object = None) -> None:
        """Takes down what the run has met.

        Args:
            key: Of what is met.
            content: It.
            holder: What the content is read from, if the model has it for good: as long
                as this is the same object, so is the content.

        Raises:
            Changed: If the earlier run met something else.
        """
        before = self._before
        if before is not None and key not in before._met:
            raise Changed
        if before is not None and holder is not None and before._met[key][0] is holder:
            self._met[key] = before._met[key]
            return
        # Past our own replacements of torch's functions, which each tensor would ask.
        with torch._C.DisableTorchFunction():
            now = _numbers(content)
            if before is not None and not _same(before._met[key][1], now):
                raise Changed
        self._met[key] = holder, now

    def finish(self) -> None:
        """Lets go of the earlier run, all of which this one must have met.

        Raises:
            Changed: If it has not.
        """
        before, self._before = self._before, None
        if before is not None and len(before._met) != len(self._met):
            raise Changed

    @property
    def may_serve(self) -> bool:
        """Whether a call on these arguments may be held to this record."""
        nodes = self.call.trace.nodes
        return (
            not self.wants_gradients
            and not torch.is_grad_enabled()
            # Each call draws a subsample of its own, and runs the model for factors.
            and not any(site_is_subsample(nodes[name]) for name in self.call.fixed)
            and not any(map(is_factor, nodes.values()))
        )


def _numbers(content: object) -> Any:
    """Tuples of tensors and plain values, which hold no graph."""
    if isinstance(content, Tensor):
        return content.detach()
    if isinstance(content, _OF_ATTRIBUTES):
        left = _LEFT if type(content) is not _Inverse else ()
        parts = [(n, part) for n, part in vars(content).items() if n not in left]
        return type(content), *((n, _numbers(part)) for n, part in parts)
    if isinstance(content, (tuple, list)):
        return type(content), *map(_numbers, content)
    if isinstance(content, Mapping):
        return type(content), *((n, _numbers(part)) for n, part in content.items())
    return content


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b or (a == b if type(a) is type(b) in _PLAIN else False)


def _version(leaf: Any) -> int | None:
    """Number of times a tensor was written to; None where that is unknown."""
    if not isinstance(leaf, Tensor):
        return 0 if leaf is None or type(leaf) in _PLAIN else None
    return None if leaf.is_inference() else leaf._version
