r"""The user's model with its outputs expanded to first order about the MAP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_subnet.curvature.jacobian.output_map import directional_derivative
from pyro_subnet.draws import Draws, rebuilt
from pyro_subnet.memory import DEFAULT_BUDGET
from pyro_subnet.model_call import ModelCall
from pyro_subnet.output_site import SiteDistribution
from pyro_subnet.trace import (
    Latents,
    Model,
    is_deterministic,
    is_output,
)

# What is expanded: the parameters of an output site, a deterministic site, or a tensor
# among what the model returns.
_Key = tuple[str, str | int]


class LinearizedModel:
    r"""A Pyro model whose outputs are linear in its latent sites' unconstrained values.

    .. math:: \eta_\text{lin}(x; \theta) = \eta(x; \hat\theta) + J(x)(\theta-\hat\theta)

    Latent sites keep their priors. The network itself only ever runs at the MAP, so
    batched latent values (``Predictive(parallel=True)``, vectorized particles) need no
    batched layers.

    Args:
        model: The user's model.
        latents: Its latent sites at the MAP.

    Source: Daxberger et al. (2021), eq. 5, arXiv 2010.14689.
    """

    def __init__(self, model: Model, latents: Latents):
        self._model = model
        self._latents = latents
        self._parents: dict[str, frozenset[str]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the linearized model.

        Args:
            args: Positional arguments of the user's model.
            kwargs: Its keyword arguments.

        Returns:
            What the user's model returns, tensors expanded to first order.
        """
        call = ModelCall.read(self._model, self._latents, args, kwargs)
        if self._parents is None:
            self._parents = latent_parents(call)
        draws = Draws(call, self._parents)
        tangents = _tangents(call, draws)
        with _LinearizedOutputs(call, draws, tangents):
            returned = self._model(*args, **kwargs)
        leaves, spec = tree_flatten(returned)
        shifted = [
            leaf + tangents["return", i] if ("return", i) in tangents else leaf
            for i, leaf in enumerate(leaves)
        ]
        return tree_unflatten(shifted, spec)


class _LinearizedOutputs(Messenger):
    """Runs the model at the MAP and puts first-order outputs in place of its own.

    Latent sites are hidden: :class:`Draws` has shown them to the handlers outside. The
    model's own code goes on with values at the MAP.
    """

    def __init__(self, call: ModelCall, draws: Draws, tangents: Mapping[_Key, Tensor]):
        super().__init__()
        self.call = call
        self.draws = draws
        self.tangents = tangents
        self.latent_values = call.latents.constrain(call.latents.values)
        self._own_values: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Message) -> None:
        name = msg["name"]
        if name in self.latent_values:
            msg["value"] = self.latent_values[name]
            msg["stop"] = True
        elif is_deterministic(msg):
            self._expand_deterministic(msg)
        elif is_output(name, msg, self.call.latents):
            self._expand_output(msg)

    def _expand_deterministic(self, msg: Message) -> None:
        tangent = self.tangents.get(("deterministic", msg["name"]))
        if tangent is None:
            return
        self._own_values[msg["name"]] = own = msg["value"]
        event_dim = msg["fn"].event_dim
        value = own + self.draws.spread(tangent, own.shape, own.ndim - event_dim)
        msg["value"] = value
        msg["fn"] = dist.Delta(value, event_dim=event_dim).mask(False)

    def _expand_output(self, msg: Message) -> None:
        name, fn = msg["name"], msg["fn"]
        site = next(site for site in self.call.sites if site.name == name)
        taken = SiteDistribution.of(fn, site.node["value"])
        own = site.family.outputs(taken.base)
        tangent = self.tangents["output", name]
        shape = taken.element_shape
        pieces = tangent.split([part.shape[-1] for part in own.values()], dim=-1)
        outputs = {}
        for (part, value), piece in zip(own.items(), pieces, strict=True):
            wide = (*shape, value.shape[-1])
            batch_dim = len(shape) - taken.event_dim
            outputs[part] = value + self.draws.spread(piece, wide, batch_dim)
        msg["fn"] = rebuilt(taken, site.family, outputs)

    def _pyro_post_sample(self, msg: Message) -> None:
        # The handlers outside have seen the expanded value; the model's own code, run
        # at the MAP, must not: what it computes from it is expanded by itself.
        if msg["name"] in self._own_values:
            msg["value"] = self._own_values[msg["name"]]


def latent_parents(call: ModelCall) -> dict[str, frozenset[str]]:
    """Which latent sites the prior of each latent site depends on.

    Args:
        call: A call of the model.

    Returns:
        ``{site: its parents}``, for the sites that have any.
    """
    graph = call.graph()
    found = {}
    for term in call.prior_terms(graph):
        if term.site is None or not term.log_density.requires_grad:
            continue
        others = {site: u for site, u in graph.leaves.items() if site != term.site}
        gradients = torch.autograd.grad(
            term.log_density,
            list(others.values()),
            retain_graph=True,
            allow_unused=True,
        )
        parents = {
            site
            for site, gradient in zip(others, gradients, strict=True)
            if gradient is not None
        }
        if parents:
            found[term.site] = frozenset(parents)
    return found


def _tangents(call: ModelCall, draws: Draws) -> dict[_Key, Tensor]:
    r""":math:`J (\theta - \hat\theta)` of everything that is expanded.

    Returns:
        For each key the tangent in the value's shape (for outputs: element shape, then
        all parameters), with one leading axis for the draws if there are any.
    """
    keys = _expanded_keys(call)
    base = call.latents.values

    def values(unconstrained: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        nodes = call.run(unconstrained).nodes
        found: dict[_Key, Tensor] = {}
        for site in call.sites:
            found["output", site.name] = site.outputs(nodes[site.name])
        for kind, name in keys:
            if kind == "deterministic":
                found[kind, name] = nodes[name]["value"]
        for i, leaf in enumerate(tree_flatten(nodes["_RETURN"]["value"])[0]):
            found["return", i] = leaf
        return tuple(found[key] for key in keys)

    def push(directions: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return directional_derivative(values, base, directions)[1]

    directions = draws.directions()
    if draws.count is None:
        return dict(zip(keys, push(directions), strict=True))
    one = call.graph().activation_bytes + call.latents.loc.nbytes
    in_dims = {
        site: 0 if direction.ndim > base[site].ndim else None
        for site, direction in directions.items()
    }
    group = max(1, DEFAULT_BUDGET // (2 * one))
    batched = torch.func.vmap(push, in_dims=(in_dims,), chunk_size=group)
    return dict(zip(keys, batched(directions), strict=True))


def _expanded_keys(call: ModelCall) -> list[_Key]:
    keys: list[_Key] = [("output", site.name) for site in call.sites]
    for name, node in call.trace.nodes.items():
        if is_deterministic(node) and node["value"].is_floating_point():
            keys.append(("deterministic", name))
    for i, leaf in enumerate(tree_flatten(call.trace.nodes["_RETURN"]["value"])[0]):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            keys.append(("return", i))
    return keys
