"""Pickling and copying of guides that leaves the live guide alive.

``AutoGuide.__getstate__`` sets the model of the guide that is being pickled to None.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from pyro.infer.autoguide import AutoGuide

Guide = TypeVar("Guide", bound=AutoGuide)

# The model may hold anything, and a guide list is held by weak reference.
_LEFT_BEHIND = ("_model", "_user_model", "master")


def portable_state(guide: AutoGuide) -> dict[str, Any]:
    """What a pickle of a guide holds.

    Args:
        guide: A live guide; it is not touched.

    Returns:
        Its attributes, without the model.
    """
    return {
        **guide.__dict__,
        **{name: None for name in _LEFT_BEHIND if name in guide.__dict__},
    }


def sharing(guide: Guide) -> Guide:
    """A copy of a guide that shares its tensors, its model and what it knows of it.

    Args:
        guide: A live guide; it is not touched.

    Returns:
        The copy; assigning to its buffers leaves the original's alone.
    """
    shared = (*guide.buffers(), *guide.parameters(), guide.prototype_trace)
    return copied(guide, {id(part): part for part in shared})


def copied(guide: Guide, memo: dict[int, Any]) -> Guide:
    """A deep copy of a guide that shares its model.

    Args:
        guide: A live guide; it is not touched.
        memo: As ``copy.deepcopy`` passes it.

    Returns:
        The copy, a member of no guide list.
    """
    new: Guide = object.__new__(type(guide))
    memo[id(guide)] = new
    new.__setstate__(copy.deepcopy(portable_state(guide), memo))
    for name in ("_model", "_user_model"):
        new.__dict__[name] = guide.__dict__[name]
    return new
