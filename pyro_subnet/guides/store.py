"""What Pyro's param store holds for a guide: its one parameter, under a key of its own.

Two live guides never share an entry. What is loaded or set there is the guide's.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary, ref

import pyro
from torch import Tensor, nn

# Live guides by the param-store key of their `loc`.
_OWNERS: WeakValueDictionary[str, Any] = WeakValueDictionary()
# What the latest guide had under such a key: any other entry was loaded, or set.
_MADE: dict[str, ref[Tensor]] = {}


def take_key(guide: Any, start: Tensor, *, told: bool) -> Tensor:
    """Takes a param-store key that no other guide has; returns where to start.

    Args:
        guide: The guide, whose name gets a number where its key is taken.
        start: Where it would start.
        told: Whether its user has said where.

    Returns:
        ``start``, or a loaded entry.
    """
    store, name, count = pyro.get_param_store(), guide._pyro_name, 0
    loaded = list[Tensor]()
    while True:
        key = _key(guide)
        owner, entry = _OWNERS.get(key), entry_of(key, start)
        made = entry is not None and _is_made(key, entry)
        if owner is None or owner is guide:
            if entry is not None:
                # What a guide that is gone has left does not replace what was asked
                # for; what was loaded since does.
                loaded = loaded if told and made else [entry]
                del store[key]
            if key not in store:
                break
        elif entry is not None and not told and (owner.is_loaded or not made):
            # It reaches the guide that lives, and this one as well.
            loaded = loaded or [entry]
        count += 1
        guide._pyro_name = f"{name}_{count}"
    return loaded[0].detach().clone() if loaded else start


def take_new_key(guide: Any) -> None:
    """Gives a copy a key of its own, whatever the store holds."""
    store, name, count = pyro.get_param_store(), guide._pyro_name, 0
    while _key(guide) in store or _key(guide) in _OWNERS:
        count += 1
        guide._pyro_name = f"{name}_{count}"
    register(guide)


def register(guide: Any) -> None:
    """Notes that a guide's parameter is the one of its key."""
    _OWNERS[_key(guide)] = guide
    _MADE[_key(guide)] = ref(guide._parameters["loc"])


def follow_entry(guide: Any) -> None:
    """Takes the entry of a guide's key as its parameter, where that was loaded."""
    key, own = _key(guide), guide._parameters["loc"]
    owner: Any = _OWNERS.get(key)
    if owner is not guide:
        return
    entry = entry_of(key, own)
    if entry is None or entry is own:
        return
    if not isinstance(entry, nn.Parameter):
        entry = nn.Parameter(entry.detach())
        pyro.get_param_store()[key] = entry
    guide._parameters["loc"] = entry
    guide.is_loaded = True
    register(guide)


def entry_of(key: str, like: Tensor) -> Tensor | None:
    """The param store's entry of a key, if it may stand for a guide's parameter."""
    store = pyro.get_param_store()
    if key not in store or pyro.settings.get("module_local_params"):
        return None
    entry: Tensor = store[key].unconstrained()
    fits = entry.shape == like.shape and entry.dtype == like.dtype
    return entry if fits and entry.device == like.device else None


def _key(guide: Any) -> str:
    return f"{guide._pyro_name}.loc"


def _is_made(key: str, entry: Tensor) -> bool:
    made = _MADE.get(key)
    return made is not None and made() is entry
