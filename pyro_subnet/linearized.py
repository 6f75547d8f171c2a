r"""The user's model with its outputs expanded to first order about the MAP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_subnet.curvature.jacobian.output_map import (
    OutputMap,
    directional_derivative,
    forward_mode_agrees,
    identity_factors,
)
from pyro_subnet.curvature.jacobian.route import jacobian_blocks
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
# A row of a datum's Jacobian costs about as much as the derivative along a draw, and
# the checks behind it a few more.
_ROW_COST = 1


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
        if self._structure is None:
            expansion = _Expansion(call, _expanded_keys(call))
            with torch.no_grad():
                agrees = forward_mode_agrees(expansion, call.latents.values)
            self._structure = latent_parents(call), agrees
        parents, forward_mode = self._structure
        draws = Draws(call, parents)
        tangents = _tangents(call, draws, forward_mode)
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
    for term in graph.prior_terms:
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
    """What of a call is expanded, as a function of the latent sites.

    Attributes:
        keys: What is expanded, in order.
    """

    def __init__(self, call: ModelCall, keys: Sequence[_Key]):
        self.call = call
        self.keys = keys

    def __call__(self, unconstrained: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return self.read(self.call.run(unconstrained))

    def read(self, trace: poutine.Trace) -> tuple[Tensor, ...]:
        """Values of a run.

        Args:
            trace: The run.

        Returns:
            One tensor a key.
        """
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


def _tangents(call: ModelCall, draws: Draws, forward_mode: bool) -> dict[_Key, Tensor]:
    r""":math:`J (\theta - \hat\theta)` of everything that is expanded.

    For many draws J is formed once, for the elements that any draw moves; otherwise one
    derivative a draw is cheaper.

    Returns:
        For each key the tangent in the value's shape (for outputs: element shape, then
        all parameters), with one leading axis for the draws if there are any.
    """
    keys = _expanded_keys(call)
    directions = draws.directions()
    graph = call.graph(with_prior=False)
    dense = _keys_of_data(call, keys, draws, directions)
    rest = [key for key in keys if key not in dense]
    found: dict[_Key, Tensor] = {}
    if dense:
        expansion = _Expansion(call, dense)
        products = _jacobian_products(
            expansion, directions, draws, graph.activation_bytes
        )
        found.update(zip(dense, products, strict=True))
    if rest:
        expansion = _Expansion(call, rest)
        base = call.latents.values

        def push(direction: dict[str, Tensor]) -> tuple[Tensor, ...]:
            return directional_derivative(expansion, base, direction, forward_mode)[1]

        one = graph.activation_bytes + call.latents.loc.nbytes
        group = None if draws.count is None else max(1, DEFAULT_BUDGET // (2 * one))
        pushed = draws.over_draws(push, directions, group)
        found.update(zip(rest, pushed, strict=True))
    return found


def _keys_of_data(
    call: ModelCall,
    keys: Sequence[_Key],
    draws: Draws,
    directions: Mapping[str, Tensor],
) -> list[_Key]:
    """Keys whose Jacobian costs less than one derivative for every draw.

    Returns:
        Those with the data on their first axis; none where gradients flow to the draws
        (also elements that no draw moves would have some).
    """
    if draws.count is None or any(u.requires_grad for u in directions.values()):
        return []
    values = _Expansion(call, keys).read(call.trace)
    dense, rows = [], 0
    for key, value in zip(keys, values, strict=True):
        if value.ndim and len(value) == call.num_data:
            dense.append(key)
            rows += value[0].numel()
    return dense if _ROW_COST * rows < draws.count else []


def _jacobian_products(
    expansion: _Expansion,
    directions: Mapping[str, Tensor],
    draws: Draws,
    activation_bytes: int,
) -> list[Tensor]:
    """Products of one Jacobian with the directions of all draws: (K, *shape) a key."""
    call, count = expansion.call, draws.count or 1
    base = call.latents.values
    flat = {
        site: u.reshape(-1, base[site].numel()).expand(count, -1)
        for site, u in directions.items()
    }
    moved = {site: (u != 0).any(0).nonzero().squeeze(-1) for site, u in flat.items()}
    chosen = {site: at for site, at in moved.items() if at.numel()}
    values = expansion.read(call.trace)
    if not chosen:
        return [value.new_zeros(count, *value.shape) for value in values]

    def of_sites(
        sites: Mapping[str, Tensor], rows: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, ...]:
        found = expansion.read(call.run({**base, **sites}, rows))
        return tuple(value.reshape(len(value), -1) for value in found)

    outputs = OutputMap(
        base={site: base[site] for site in chosen},
        chosen=chosen,
        of_sites=of_sites,
        reference=tuple(value.reshape(len(value), -1) for value in values),
        rows=call.data_rows(),
        num_data=call.num_data,
        activation_bytes=activation_bytes,
    )
    columns = torch.cat([flat[site][:, at] for site, at in chosen.items()], dim=1)
    parts: list[list[Tensor]] = [[] for _ in values]
    blocks = jacobian_blocks(outputs, identity_factors(outputs), DEFAULT_BUDGET)
    for block in blocks:
        product = block.rows.flatten(0, 1) @ columns.to(block.rows).mT
        parts[block.site].append(product.unflatten(0, block.rows.shape[:2]))
    return [
        torch.cat(part).movedim(-1, 0).reshape(count, *value.shape)
        for part, value in zip(parts, values, strict=True)
    ]


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
