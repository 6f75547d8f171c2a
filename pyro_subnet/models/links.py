"""Expanded values that follow from one another: one Jacobian serves them all.

A model that names its logits, or returns its mean, expands the same numbers several
times: the parameters of its output site are a function of them, datum by datum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from pyro import poutine
from torch import Tensor

from pyro_subnet.models.kept_jacobian import Key, Link
from pyro_subnet.tensors.agreement import agree, random_direction
from pyro_subnet.tensors.graph import leads_to
from pyro_subnet.tensors.memory import DEFAULT_BUDGET
from pyro_subnet.tensors.modes import differentiable
from pyro_subnet.tensors.pullback import weighted_sum
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.trace import preserved_rng

# Values of a run by key.
Read = Callable[[poutine.Trace], Mapping[Key, Tensor]]


def find_links(
    call: ModelCall, keys: Sequence[Key], read: Read, budget: int = DEFAULT_BUDGET
) -> dict[Key, Link]:
    """Which of several values follow from another one, which itself follows from none.

    Args:
        call: Of the model.
        keys: Of values that have the data along their first axis.
        read: Their values in a run.
        budget: Bytes that a run with its graph may take, for which data go in parts,
            and those of a link, which is left out if it takes more.

    Returns:
        The links, by the keys of the values that follow.
    """
    graph, reference = call.graph(with_prior=False), read(call.trace)
    with differentiable():  # outputs are made of a distribution's parameters as read
        values = read(graph.trace)
    sources = _sources(keys, values, graph.leaves)
    links, made = {}, {}
    for key, source in sources.items():
        own, other = reference[key], reference[source]
        if own is other and values[key] is values[source]:
            links[key] = Link(source, None)
        elif own.numel() * other[0].numel() * own.element_size() <= budget:
            made[key] = source
    if made:
        # Data at once.
        size = max(1, budget * call.num_data // max(1, graph.activation_bytes))
        try:
            links |= _local_links(call, made, read, size)
        # On some of the data the user's code may fail in ways of its own, and not every
        # operation has a derivative: then each value has a Jacobian by itself.
        except Exception:
            return links
    return links


def _sources(
    keys: Sequence[Key], values: Mapping[Key, Tensor], leaves: Mapping[str, Tensor]
) -> dict[Key, Key]:
    found: dict[Key, Key] = {}
    for key in keys:
        for other in keys:
            if other == key or other in found:
                continue
            if _follows(values[key], values[other], leaves):
                found[key] = other
                break
    # What a value follows from may follow from another one in turn.
    return {key: _end(source, found) for key, source in found.items()}


def _end(source: Key, sources: Mapping[Key, Key]) -> Key:
    while source in sources:
        source = sources[source]
    return source


def _follows(value: Tensor, source: Tensor, leaves: Mapping[str, Tensor]) -> bool:
    """Whether all ways from a value to the leaves, in its graph, pass another one."""
    if value is source:
        return True
    live = value.grad_fn is not None and source.grad_fn is not None
    return live and not leads_to(value, leaves.values(), past=source)


def _local_links(
    call: ModelCall, sources: Mapping[Key, Key], read: Read, size: int
) -> dict[Key, Link]:
    """Links by local Jacobians, from runs on some data at once."""
    num_data, rows = call.num_data, call.data_rows()
    if size < num_data and not rows:
        return {}
    reference = read(call.trace)
    parts: dict[Key, list[Tensor]] = {key: [] for key in sources}
    for start in range(0, num_data, size):
        some = slice(start, start + size)
        with differentiable(), preserved_rng():
            leaves = {
                name: value.detach().clone().requires_grad_()
                for name, value in call.latents.values.items()
            }
            own = tuple(row[some] for row in rows) if size < num_data else None
            values = read(call.run(leaves, own))
            for key in list(parts):
                value, source = values[key], values[sources[key]]
                # The graph of few data does not tell what weights move the others.
                follows = _follows(value, source, leaves)
                part = _local_jacobian(value, source) if follows else None
                if part is None or not agree(value, reference[key][some]):
                    del parts[key]
                else:
                    parts[key].append(part)
    return {key: Link(sources[key], torch.cat(found)) for key, found in parts.items()}


def _local_jacobian(
    value: Tensor, source: Tensor
) -> Float[Tensor, "data own other"] | None:
    """Of each datum's value in its source; None if data move those of others."""
    flat = value.flatten(1) if value.ndim > 1 else value.unsqueeze(1)

    def pull(u: Tensor) -> Tensor:
        found = torch.autograd.grad(
            weighted_sum([flat], [u]), source, retain_graph=True, materialize_grads=True
        )[0]
        return found.reshape(len(flat), -1)

    units = torch.eye(flat.shape[1], dtype=flat.dtype, device=flat.device)
    jacobian = torch.stack([pull(unit.expand_as(flat)) for unit in units], dim=1)
    u = random_direction(flat.shape, flat)
    if not agree(torch.einsum("nij,ni->nj", jacobian, u), pull(u)):
        return None
    return jacobian
