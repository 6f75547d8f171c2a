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

from pyro_subnet.curvature.jacobian.output_map import (
    directional_derivative,
    forward_mode_agrees,
)
from pyro_subnet.draws import Draws, rebuilt
from pyro_subnet.memory import DEFAULT_BUDGET
from pyro_subnet.model_call import ModelCall
from pyro_subnet.output_site import SiteDistribution
from pyro_subnet.trace import (
    Latents,
    Model,
    is_deterministic,
    is_factor,
    is_output,
)

# What is expanded: the parameters of an output site, a deterministic site, or a tensor
# among what the model returns.
_Key = tuple[str, str]


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
        # Found out in the first call: parents of latent sites, use of forward mode.
        self._structure: tuple[dict[str, frozenset[str]], bool] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the linearized model.

        Args:
            args: Positional arguments of the user's model.
            kwargs: Its keyword arguments.

        Returns:
            What the user's model returns, tensors expanded to first order.
        """
        call = ModelCall.read(self._model, self._latents, args, kwargs)
        expansion = _Expansion(call)
        if self._structure is None:
            with torch.no_grad():
                agrees = forward_mode_agrees(expansion, call.latents.values)
            self._structure = latent_parents(call), agrees
        parents, forward_mode = self._structure
        draws = Draws(call, parents)
        tangents = _tangents(expansion, draws, forward_mode)
        factors = _log_factors(call, draws)
        with _LinearizedOutputs(call, draws, tangents, factors):
            returned = self._model(*args, **kwargs)
        leaves, spec = tree_flatten(returned)
        shifted = [
            leaf + tangents["return", str(i)]
            if ("return", str(i)) in tangents
            else leaf
            for i, leaf in enumerate(leaves)
        ]
        return tree_unflatten(shifted, spec)


class _LinearizedOutputs(Messenger):
    """Runs the model at the MAP and puts first-order outputs in place of its own.

    Latent sites are hidden: :class:`Draws` has shown them to the handlers outside. The
    model's own code goes on with values at the MAP.
    """

    def __init__(
        self,
        call: ModelCall,
        draws: Draws,
        tangents: Mapping[_Key, Tensor],
        log_factors: Mapping[str, Tensor],
    ):
        super().__init__()
        self.call = call
        self.draws = draws
        self.tangents = tangents
        self.log_factors = log_factors
        self.latent_values = call.latents.constrain(call.latents.values)
        self._own_values: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Message) -> None:
        name = msg["name"]
        if name in self.latent_values:
            msg["value"] = self.latent_values[name]
            msg["stop"] = True
        elif is_deterministic(msg):
            self._expand_deterministic(msg)
        elif name in self.log_factors:
            own = msg["fn"].log_factor.shape
            factor = self.draws.spread(self.log_factors[name], own, len(own))
            msg["fn"] = dist.Unit(factor)
            msg["value"] = msg["fn"].sample()
        elif is_output(name, msg, self.call.latents):
            self._expand_output(msg)

    def _expand_deterministic(self, msg: Message) -> None:
        tangent = self.tangents.get(("deterministic", msg["name"]))
        if tangent is None:
            return
        self._own_values[msg["name"]] = own = msg["value"]
        fn = msg["fn"]
        # In a plate the value may lack a batch dimension that the site has.
        missing = len(fn.batch_shape) + fn.event_dim - own.ndim
        shape = (1,) * missing + own.shape if self.draws.count else own.shape
        value = own + self.draws.spread(tangent, shape, len(fn.batch_shape))
        delta = dist.Delta(value, event_dim=fn.event_dim).mask(False)
        batch_shape = torch.broadcast_shapes(fn.batch_shape, delta.batch_shape)
        msg["value"] = value
        msg["fn"] = delta.expand(batch_shape)

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
        if not others:
            continue
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


class _Expansion:
    """Everything of a call that is expanded, as a function of the latent sites.

    Attributes:
        keys: What is expanded, in order.
    """

    def __init__(self, call: ModelCall):
        self.call = call
        self.keys = _expanded_keys(call)

    def __call__(self, unconstrained: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        nodes = self.call.run(unconstrained).nodes
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


def _tangents(
    expansion: _Expansion, draws: Draws, forward_mode: bool
) -> dict[_Key, Tensor]:
    r""":math:`J (\theta - \hat\theta)` of everything that is expanded.

    Returns:
        For each key the tangent in the value's shape (for outputs: element shape, then
        all parameters), with one leading axis for the draws if there are any.
    """
    call = expansion.call
    base = call.latents.values

    def push(directions: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return directional_derivative(expansion, base, directions, forward_mode)[1]

    group = None
    if draws.count is not None:
        one = call.graph().activation_bytes + call.latents.loc.nbytes
        group = max(1, DEFAULT_BUDGET // (2 * one))
    found = draws.over_draws(push, draws.directions(), group)
    return dict(zip(expansion.keys, found, strict=True))


def _log_factors(call: ModelCall, draws: Draws) -> dict[str, Tensor]:
    """Log factors at the drawn values: a factor is a term of the prior, not an output.

    Returns:
        ``{site: log factor}``, with one leading axis for the draws if there are any.
    """
    names = [name for name, node in call.trace.nodes.items() if is_factor(node)]
    if not names:
        return {}

    def log_factors(values: dict[str, Tensor]) -> dict[str, Tensor]:
        nodes = call.run(values).nodes
        return {name: nodes[name]["fn"].log_factor for name in names}

    return draws.over_draws(log_factors, draws.unconstrained())


def _expanded_keys(call: ModelCall) -> list[_Key]:
    keys: list[_Key] = [("output", site.name) for site in call.sites]
    for name, node in call.trace.nodes.items():
        if is_deterministic(node) and node["value"].is_floating_point():
            keys.append(("deterministic", name))
    for i, leaf in enumerate(tree_flatten(call.trace.nodes["_RETURN"]["value"])[0]):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            keys.append(("return", str(i)))
    return keys
