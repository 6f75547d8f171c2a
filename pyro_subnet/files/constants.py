"""What predictions depend on beside the posterior: a model's constants, as digests.

Running statistics and frozen parameters are in no latent site. A file holds a digest of
each, so that a posterior is not loaded into a network that has others.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain
from types import FunctionType, MethodType
from typing import Any

from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pyro_subnet.exceptions import CheckpointError
from pyro_subnet.files.fingerprint import digest
from pyro_subnet.nn.bayesian import BayesianModule

# Functions of these are not looked into.
_LIBRARIES = frozenset({"torch", "pyro", "numpy", "builtins", "math"})
# No prediction depends on it.
_COUNTER = "num_batches_tracked"


def constants_of(model: Any) -> dict[str, str]:
    """A digest of each constant of the networks that a model holds or refers to."""
    found: dict[str, str] = {}
    for module in _networks(model, set()):
        for name, tensor in _constants(module):
            path = f"{type(module).__name__}.{name}"
            while path in found:
                path += "'"
            found[path] = digest(tensor)
    return found


def check_constants(found: Mapping[str, str], expected: Any) -> None:
    """Raises a CheckpointError that names a constant in which two models differ."""
    if expected is None:  # an older file, or a posterior that knew no model
        return
    if not isinstance(expected, Mapping):
        raise CheckpointError(
            f"The file's constants must be digests by name; got {expected!r:.40}. Take "
            "another copy of it."
        )
    # Names may differ, as where a network is held by another object.
    if sorted(map(str, expected.values())) == sorted(found.values()):
        return
    others = [name for name in expected if found.get(name) != expected[name]]
    named = [*others, *(name for name in found if name not in expected)]
    raise CheckpointError(
        "The model must have the running statistics, buffers and frozen parameters of "
        f"the one that was saved; got others, such as {named[:3]}. Load the network's "
        "`state_dict` before the posterior."
    )


def _constants(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers, frozen parameters, and parameters that Pyro trains beside the sites."""
    sampled = set[int]()
    trained = set[int]()
    for part in module.modules():
        if isinstance(part, BayesianModule):
            sampled.update(id(value) for value in part.pretrained_values().values())
        elif isinstance(part, PyroModule):
            trained.update(id(value) for value in part.parameters(recurse=False))
    for name, tensor in chain(module.named_buffers(), module.named_parameters()):
        # Trainable weights of other networks are what sites are made of.
        constant = not tensor.requires_grad or id(tensor) in trained
        if constant and id(tensor) not in sampled and not is_lazy(tensor):
            if not name.endswith(_COUNTER):
                yield name, tensor


def _networks(value: Any, seen: set[int]) -> Iterator[nn.Module]:
    """Modules that a model is, holds, or refers to by name."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        yield value
        return
    parts: list[Any] = []
    if isinstance(value, FunctionType):
        if str(value.__module__).partition(".")[0] not in _LIBRARIES:
            names = inspect.getclosurevars(value)
            parts = [*names.nonlocals.values(), *names.globals.values()]
    elif isinstance(value, MethodType):
        parts = [value.__self__, value.__func__]
    elif isinstance(value, partial):
        parts = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, list | tuple):
        parts = list(value)
    elif isinstance(value, Mapping):
        parts = list(value.values())
    elif callable(value) and not isinstance(value, type):
        parts = list(getattr(value, "__dict__", {}).values())
    for part in parts:
        yield from _networks(part, seen)
