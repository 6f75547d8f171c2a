r"""First-order expansions of a call about the MAP: :math:`J (\theta - \hat\theta)`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from pyro import poutine
from torch import Tensor
from torch.utils._pytree import tree_flatten

from pyro_subnet.curvature.jacobian.directional import (
    directional_derivative,
    forward_mode_agrees,
    plain_derivative,
    tangents_hold,
)
from pyro_subnet.curvature.jacobian.general.full_batch import reverse_blocks
from pyro_subnet.curvature.jacobian.output_map import identity_factors
from pyro_subnet.curvature.jacobian.route import jacobian_blocks, joined_rows
from pyro_subnet.models.draws import Draws
from pyro_subnet.models.kept_jacobian import (
    KeptJacobian,
    Key,
    Link,
    flat_values,
    followed,
    moved_elements,
    other_elements,
    steps_from_map,
)
from pyro_subnet.models.links import find_links
from pyro_subnet.models.seen import Seen
from pyro_subnet.tensors.memory import DEFAULT_BUDGET
from pyro_subnet.tensors.modes import differentiable, full_precision
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.trace import is_deterministic, preserved_rng

# A row of a data point's Jacobian costs about as much as the derivative along a draw,
# and the checks behind it a few more.
_ROW_COST = 1
# A call without gradients makes further calls likely, enough to pay for this many rows:
# `Predictive` calls a model twice before it draws, then once for each draw.
_ROWS_PER_CALL = 32
# Calls before the first draw, which are at draws of the prior, and move everything.
_PROBES = 2


@final
class Expansion:
    """What is expanded of a call, by key, as a function of the latent sites."""

    def __init__(self, call: ModelCall, keys: Sequence[Key]):
        self.call = call
        self.keys = keys

    def __call__(self, unconstrained: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Values at unconstrained values of the latent sites."""
        return self.read(self.call.run(unconstrained))

    def read(self, trace: poutine.Trace) -> tuple[Tensor, ...]:
        """Values of a run."""
        nodes = trace.nodes
        sites = {site.name: site for site in self.call.sites}
        returned = tree_flatten(nodes["_RETURN"]["value"])[0]
        found = []
        for kind, name in self.keys:
            if kind == "output":
                found.append(sites[name].outputs(nodes[name]))
            elif kind == "deterministic":
                found.append(nodes[name]["value"])
            else:
                found.append(returned[int(name)])
        return tuple(found)


@final
class Expander:
    """Expands calls of one model, and keeps the Jacobian of one that comes again.

    A call comes again if its arguments are the same objects, not written to since, and
    the model gives the same values at the MAP. Where gradients are wanted, nothing is
    kept.
    """

    def __init__(self) -> None:
        self._seen: Seen | None = None
        self._values: Mapping[Key, Tensor] = {}
        self._repeats = 0
        # What is returned of a draw, which the weights do not move.
        self._still: frozenset[Key] = frozenset()
        # All columns that were asked for, and those of the usual draws among them.
        self._jacobian: KeptJacobian | None = None
        self._narrow: KeptJacobian | None = None
        self._uses = 0
        self._forward_mode: bool | None = None
        # Whether derivatives hold, by what is expanded and how many draws at once.
        self._held: dict[Any, bool] = {}

    @property
    def keys(self) -> Collection[Key]:
        """What is expanded of the present call."""
        return self._values.keys()

    def meet(self, call: ModelCall, seen: Seen) -> None:
        """Takes up a call, on the arguments ``seen``, that was read."""
        if self._seen is None or not self._seen.has_arguments_of(seen):
            self._still = _still_returns(call)
        # A returned draw, another in each call, would be taken for another call.
        keys = [key for key in expanded_keys(call) if key not in self._still]
        values = Expansion(call, keys).read(call.trace)
        self._values = dict(zip(keys, values, strict=True))
        seen = replace(seen, values=values)
        if self._seen is not None and self._seen.is_same(seen):
            self._repeats += 1
            return
        self._seen, self._repeats = seen, 0
        self._jacobian = self._narrow = None

    def meet_again(self) -> None:
        """Takes up the same call once more."""
        self._repeats += 1

    @property
    def is_kept(self) -> bool:
        """Whether there is a Jacobian of all that is expanded."""
        return self._jacobian is not None and self._jacobian.keys == (*self.keys,)

    @full_precision()
    def tangents(self, draws: Draws) -> dict[Key, Tensor]:
        r""":math:`J (\theta - \hat\theta)` by key, K in front if there are draws."""
        # For many draws, or a call that comes again, J is formed once, for the elements
        # that are moved. Otherwise one derivative for each draw is cheaper.
        found: dict[Key, Tensor] = {}
        if not torch.is_grad_enabled():
            found = self._by_jacobian(draws)
        rest = [key for key in self._values if key not in found]
        if rest:
            found.update(zip(rest, self._by_derivative(draws, rest), strict=True))
        return found

    @full_precision()
    def tangents_by_kept(self, draws: Draws) -> dict[Key, Tensor] | None:
        """The same without a run of the model; None if J lacks what the draws move."""
        u = flat_values(draws.unconstrained(), draws.call.latents.values)
        jacobian = self._covering(list(self._values), u)
        return None if jacobian is None else self._products(jacobian, draws, u)

    def _by_jacobian(self, draws: Draws) -> dict[Key, Tensor]:
        """Tangents of the keys that a Jacobian serves at less cost, if any."""
        call = draws.call
        dense = {
            key: value
            for key, value in self._values.items()
            if value.ndim and len(value) == call.num_data
        }
        rows = sum(value[0].numel() for value in dense.values())
        count = draws.count or 1
        calls = self._repeats + 1
        # J pays for its rows by this call's draws, or by calls that are likely.
        pays = _ROW_COST * rows < count or rows <= _ROWS_PER_CALL * calls
        if not dense or not (pays or self._jacobian is not None):
            return {}
        u = flat_values(draws.unconstrained(), draws.call.latents.values)
        jacobian = self._covering(list(dense), u)
        if jacobian is None:
            moved = moved_elements(u, call.latents.values)
            size = sum(at.numel() for at in moved.values())
            room = DEFAULT_BUDGET // (max(1, size) * call.latents.loc.element_size())
            few = _ROW_COST * rows >= count
            if few and max(value.numel() for value in dense.values()) > room:
                return {}
            links = _links(call, list(dense))
            own = {key: value for key, value in dense.items() if key not in links}
            fits = sum(value.numel() for value in own.values()) <= room
            if few and not fits:
                return {}
            # J is too large to keep: (theta - MAP) J^T, block by block.
            if not fits:
                columns = steps_from_map(u, moved, call.latents.values, count)
                products = _from_blocks(
                    call, own, moved, count, lambda rows: columns.to(rows) @ rows.mT
                )
                return _shaped(followed(products, links), dense, draws.count)
            transposed = _from_blocks(call, own, moved, size, lambda rows: rows.mT)
            rows_by_key = {key: part.mT for key, part in transposed.items()}
            others = other_elements(moved, call.latents.values)
            jacobian = KeptJacobian(tuple(dense), moved, rows_by_key, links, others)
            self._jacobian = jacobian
            self._narrow, self._uses = None, 0
        return self._products(jacobian, draws, u)

    def _covering(
        self, keys: Sequence[Key], u: Mapping[str, Tensor]
    ) -> KeptJacobian | None:
        """The smallest kept Jacobian that has these keys and all that is moved."""
        kept = (self._narrow, self._jacobian)
        return next((j for j in kept if j is not None and j.covers(keys, u)), None)

    def _products(
        self, jacobian: KeptJacobian, draws: Draws, u: Mapping[str, Tensor]
    ) -> dict[Key, Tensor]:
        """(theta - MAP) J^T of all draws, by one product for each key."""
        base = draws.call.latents.values
        self._uses += 1
        if self._uses == _PROBES + 1:  # to what a draw moves
            jacobian = self._narrow = jacobian.narrowed(moved_elements(u, base), base)
        columns = steps_from_map(u, jacobian.chosen, base, draws.count or 1)
        values = {key: self._values[key] for key in jacobian.keys}
        return _shaped(jacobian.products(columns), values, draws.count)

    def _by_derivative(self, draws: Draws, keys: Sequence[Key]) -> tuple[Tensor, ...]:
        """Tangents by one derivative for each draw."""
        call = draws.call
        expansion, base = Expansion(call, keys), call.latents.values
        again = draws.count is not None or self._repeats >= _PROBES
        again = again or torch.is_grad_enabled()
        if self._forward_mode is None and again:
            # Further derivatives are likely, which pay for this check.
            with torch.no_grad():
                self._forward_mode = forward_mode_agrees(expansion, base)
        forward_mode = bool(self._forward_mode)

        def push(direction: dict[str, Tensor]) -> tuple[Tensor, ...]:
            if not again:
                return plain_derivative(expansion, base, direction)
            return directional_derivative(expansion, base, direction, forward_mode)[1]

        group = None
        if draws.count is not None:
            activations = call.graph(with_prior=False).activation_bytes
            one = activations + call.latents.loc.nbytes
            group = max(1, DEFAULT_BUDGET // (2 * one))
        directions = draws.directions()
        shapes = tuple(value.shape for value in call.latents.values.values())
        kind = (tuple(keys), shapes, call.num_data, draws.count, forward_mode)
        if self._held.get(kind, True):
            try:
                found = draws.over_draws(push, directions, group)
                if kind not in self._held:
                    with torch.no_grad():
                        hold = tangents_hold(expansion, base, directions, found)
                    self._held[kind] = hold
            except RuntimeError:  # an operation has no such derivative
                self._held[kind] = False
            if self._held[kind]:
                return found
        return _by_rows(expansion, directions, draws.count)


def _still_returns(call: ModelCall) -> frozenset[Key]:
    """What is returned of sites that are drawn anew, and has no derivative at them."""
    drawn = [site for site in call.sites if site.name in call.fixed]
    returned = [key for key in expanded_keys(call) if key[0] == "return"]
    if not drawn or not returned:
        return frozenset()
    # As `return pyro.sample(...)` does; what is made of a draw shows in the graph of a
    # run in which the draws are held.
    leaves = tree_flatten(call.trace.nodes["_RETURN"]["value"])[0]
    same = [id(site.node["value"]) for site in drawn]
    if all(id(leaves[int(name)]) in same for _, name in returned):
        return frozenset(returned)
    with differentiable(), preserved_rng():
        values = {
            name: value.detach().clone().requires_grad_()
            for name, value in call.latents.values.items()
        }
        run = Expansion(call, returned)(values)
    pairs = zip(returned, run, strict=True)
    return frozenset(key for key, value in pairs if not value.requires_grad)


def expanded_keys(call: ModelCall) -> list[Key]:
    """The output sites, deterministic sites and returned tensors of a call."""
    for site in call.sites:
        site.require_outputs()
    keys: list[Key] = [("output", site.name) for site in call.sites]
    for name, node in call.trace.nodes.items():
        if is_deterministic(node) and node["value"].is_floating_point():
            keys.append(("deterministic", name))
    for i, leaf in enumerate(tree_flatten(call.trace.nodes["_RETURN"]["value"])[0]):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            keys.append(("return", str(i)))
    return keys


def _by_rows(
    expansion: Expansion, directions: Mapping[str, Tensor], count: int | None
) -> tuple[Tensor, ...]:
    """Tangents by plain reverse mode, which any model has: a pass for each number."""
    call, like = expansion.call, expansion.call.latents.loc
    values = expansion.read(call.trace)
    everything = {
        site: torch.arange(value.numel(), device=value.device)
        for site, value in call.latents.values.items()
    }
    outputs = call.map_of(expansion.read, everything, activation_bytes=0)
    blocks = reverse_blocks(
        outputs,
        identity_factors(outputs),
        DEFAULT_BUDGET,
        create_graph=torch.is_grad_enabled(),
    )
    flat = [
        directions[site].reshape(-1, at.numel()).expand(count or 1, -1)
        for site, at in everything.items()
    ]
    steps = torch.cat(flat, dim=1).to(like)
    products = joined_rows(
        blocks, len(values), lambda rows: steps.to(rows) @ rows.flatten(0, 1).mT, dim=1
    )
    leading = () if count is None else (count,)
    return tuple(
        product.reshape(*leading, *value.shape)
        for product, value in zip(products, values, strict=True)
    )


def _from_blocks(
    call: ModelCall,
    values: Mapping[Key, Tensor],
    chosen: Mapping[str, Tensor],
    count: int,
    function: Callable[[Tensor], Tensor],
) -> dict[Key, Tensor]:
    """A function of J's rows, (count, rows) for each block, joined by key."""
    if not chosen:
        like = call.latents.loc
        return {key: like.new_zeros(count, v.numel()) for key, v in values.items()}
    expansion = Expansion(call, list(values))
    activations = call.graph(with_prior=False).activation_bytes
    outputs = call.map_of(expansion.read, chosen, activations)
    blocks = jacobian_blocks(outputs, identity_factors(outputs), DEFAULT_BUDGET)
    joined = joined_rows(
        blocks, len(values), lambda rows: function(rows.flatten(0, 1)), dim=1
    )
    return dict(zip(values, joined, strict=True))


def _links(call: ModelCall, keys: Sequence[Key]) -> dict[Key, Link]:
    """Which values follow from others, datum by datum."""
    if len(keys) < 2:  # noqa: PLR2004 - nothing to link
        return {}
    expansion = Expansion(call, keys)

    def read(trace: poutine.Trace) -> dict[Key, Tensor]:
        return dict(zip(keys, expansion.read(trace), strict=True))

    return find_links(call, keys, read)


def _shaped(
    products: Mapping[Key, Tensor], values: Mapping[Key, Tensor], count: int | None
) -> dict[Key, Tensor]:
    leading = () if count is None else (count,)
    return {
        key: products[key].reshape(*leading, *value.shape)
        for key, value in values.items()
    }
