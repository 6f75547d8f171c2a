"""Whether a call comes again: its arguments, their versions, its values at the MAP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from pyro_subnet.tracing.call import ModelCall

# Arguments that are the same if they are equal.
_PLAIN = (int, float, str, bool, bytes)


@final
@dataclass(frozen=True, eq=False)
class Seen:
    """What identifies a call: its arguments, their versions, its values at the MAP."""

    leaves: tuple[Any, ...]
    versions: tuple[int | None, ...]
    values: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, call: ModelCall) -> Seen:
        """Its arguments alone."""
        leaves = tuple(tree_flatten((call.args, dict(call.kwargs)))[0])
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


def _version(leaf: Any) -> int | None:
    """Number of times a tensor was written to; None where that is unknown."""
    if not isinstance(leaf, Tensor):
        return 0 if leaf is None or type(leaf) in _PLAIN else None
    return None if leaf.is_inference() else leaf._version
