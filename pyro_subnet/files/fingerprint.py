"""What tells a model's latent sites, and data, from others, for files."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_subnet.exceptions import CheckpointError
from pyro_subnet.tracing.trace import preserved_rng

# What a file says of one site; JSON holds it.
SiteRecord = dict[str, Any]
_WORDS = {
    "unconstrained": "unconstrained shape",
    "shape": "shape",
    "support": "support",
    "dtype": "dtype",
}


def site_records(guide: AutoContinuous) -> list[SiteRecord]:
    """Name, both shapes, support and prior's dtype of each latent site, as packed."""
    return [
        {
            "name": name,
            "unconstrained": list(guide._unconstrained_shapes[name]),
            "shape": list(node["value"].shape),
            "support": _described(node["fn"].support),
            "dtype": str(prior_kind(node["fn"], node["value"])[0]),
        }
        for name, node in guide.prototype_trace.iter_stochastic_nodes()
    ]


def prior_kind(fn: Any, like: Tensor) -> tuple[torch.dtype, torch.device]:
    """Dtype and device of a prior's draws; those of ``like`` for an improper prior."""
    with preserved_rng():
        try:
            like = fn.sample()
        except NotImplementedError:
            pass
    return like.dtype, like.device


def check_sites(found: Sequence[SiteRecord], expected: Sequence[SiteRecord]) -> None:
    """Raises a CheckpointError that names the first site in which two models differ."""
    ours = {site["name"]: site for site in found}
    theirs = {site["name"]: site for site in expected}
    check_names(list(ours), list(theirs))
    for name, site in theirs.items():
        for key, word in _WORDS.items():
            if ours[name][key] != site[key]:
                raise CheckpointError(
                    f"The model must be the one of the file: site {name!r} has "
                    f"{word} {_shown(site[key])} there; got {_shown(ours[name][key])}. "
                    "Pass the model that was fitted."
                )


def check_names(found: Sequence[str], expected: Sequence[str]) -> None:
    """Raises a CheckpointError if the sites or their order differ from the file's."""
    for name in expected:
        if name not in found:
            raise CheckpointError(
                f"The model must be the one of the file, whose latent sites are "
                f"{list(expected)}; got one without {name!r}: {list(found)}. Pass the "
                "model that was fitted."
            )
    for name in found:
        if name not in expected:
            raise CheckpointError(
                f"The model must be the one of the file, whose latent sites are "
                f"{list(expected)}; got one with {name!r} too. Pass the model that was "
                "fitted, and data for every site that it observes."
            )
    if list(found) != list(expected):
        raise CheckpointError(
            f"The model must draw its sites in the file's order, {list(expected)}; got "
            f"{list(found)}. Pass the model that was fitted."
        )


def digest(*values: Any) -> str:
    """SHA-256 of tensors, arrays, numbers and strings in containers and dataclasses."""
    total = hashlib.sha256()
    _feed(total, values)
    return total.hexdigest()


def _shown(value: Any) -> str:
    return str(tuple(value)) if isinstance(value, list) else str(value)


def _described(value: Any) -> str:
    """A support in words that do not depend on the device or on print options."""
    if isinstance(value, Constraint):
        inner = sorted(vars(value).items())
        parts = ", ".join(f"{name}={_described(part)}" for name, part in inner)
        name = type(value).__name__.lstrip("_")
        return f"{name}({parts})"
    if isinstance(value, Tensor):
        return f"tensor({value.tolist()})"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_described, value))}]"
    if isinstance(value, int | float | str | bool | None):
        return repr(value)
    return type(value).__name__


def _feed(total: Any, value: Any) -> None:
    """Adds a value to a hash, after its kind and length."""
    kind = type(value)
    if isinstance(value, Tensor):
        dense = value.detach().resolve_conj().resolve_neg()
        dense = dense if dense.layout == torch.strided else dense.to_dense()
        flat = dense.cpu().contiguous().reshape(-1)
        total.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        total.update(flat.view(torch.uint8).numpy().data)
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        total.update(f"array {value.dtype} {value.shape};".encode())
        total.update(value.tobytes())
    elif isinstance(value, Mapping):
        total.update(f"mapping {len(value)};".encode())
        for item in value.items():
            _feed(total, item)
    elif isinstance(value, list | tuple):
        total.update(f"list {len(value)};".encode())
        for part in value:
            _feed(total, part)
    elif isinstance(value, str | bytes | bool | int | float | complex | None):
        text = repr(value)
        total.update(f"{kind.__name__} {len(text)} {text};".encode())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        total.update(f"{kind.__module__}.{kind.__qualname__} {names};".encode())
        for name in names:
            _feed(total, getattr(value, name))
    else:
        # Of an object of another kind only its class enters.
        total.update(f"object {kind.__module__}.{kind.__qualname__};".encode())
