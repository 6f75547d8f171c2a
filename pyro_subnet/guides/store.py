"""What Pyro's param store holds for a guide."""

from __future__ import annotations

import pyro
from torch import Tensor


def entry_of(key: str, like: Tensor) -> Tensor | None:
    """The param store's entry of a key, if it may stand for a guide's parameter."""
    store = pyro.get_param_store()
    if key not in store or pyro.settings.get("module_local_params"):
        return None
    entry: Tensor = store[key].unconstrained()
    fits = entry.shape == like.shape and entry.dtype == like.dtype
    return entry if fits and entry.device == like.device else None
