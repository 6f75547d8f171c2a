r"""The user's model with its outputs expanded to first order about the MAP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import numpy as np
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from pyro_subnet.models.draws import Draws
from pyro_subnet.models.expansion import Expander, Key
from pyro_subnet.tensors.modes import without_autocast
from pyro_subnet.tensors.plain_calls import plain_calls
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.plates import WidePlates
from pyro_subnet.tracing.site_distribution import SiteDistribution
from pyro_subnet.tracing.trace import (
    DIFFERENTIATES,
    ModelAtMAP,
    is_deterministic,
    is_factor,
)


@final
class LinearizedModel:
    r"""A Pyro model whose outputs are linear in its latent sites' unconstrained values.

    .. math:: \eta_\text{lin}(x; \theta) = \eta(x; \hat\theta) + J(x)(\theta-\hat\theta)

    Latent sites keep their priors. The network itself only ever runs at the MAP, so
    batched latent values (``Predictive(parallel=True)``, vectorized particles) need no
    batched layers.

    Many draws cost one Jacobian and one product. So do many calls: where no gradients
    are wanted, the Jacobian of a call that comes again with the same tensors is kept
    until another call comes, if it takes no more than 256 MiB.

    Args:
        at_map: The user's model and its latent sites.

    Source: Daxberger et al. (2021), eq. 5, arXiv 2010.14689.
    """

    def __init__(self, at_map: ModelAtMAP):
        self._at_map = at_map
        self._expander = Expander()
        # Parents of latent sites; found out in the first call.
        self._parents: dict[str, frozenset[str]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model; the returned tensors are expanded to first order as well."""
        call = ModelCall.read(self._at_map, args, kwargs)
        if self._parents is None:
            self._parents = call.latent_parents()
        draws = Draws(call, self._parents)
        tangents = self._expander.tangents(call, draws)
        factors = _log_factors(call, draws)
        sites = _LinearizedSites(call, draws, tangents, factors)
        wanted = torch.is_grad_enabled()
        on = wanted or DIFFERENTIATES in call.trace.nodes["_RETURN"]
        with (
            without_autocast(),
            plain_calls(),
            torch.set_grad_enabled(on),
            WidePlates(),
            sites,
        ):
            returned = self._at_map.program(*args, **kwargs)
        if not wanted:
            returned = tree_map_only(Tensor, Tensor.detach, returned)
        leaves, spec = tree_flatten(returned)
        for i, leaf in enumerate(leaves):
            if ("return", str(i)) in tangents:
                leaves[i] = leaf + tangents["return", str(i)]
        return tree_unflatten(leaves, spec)

    def __getstate__(self) -> dict[str, Any]:
        """State for pickling: without what is kept of the last call."""
        return {**self.__dict__, "_expander": Expander()}


@final
class _LinearizedSites(Messenger):
    """Runs the model at the MAP and puts first-order outputs in place of its own."""

    def __init__(
        self,
        call: ModelCall,
        draws: Draws,
        tangents: Mapping[Key, Tensor],
        log_factors: Mapping[str, Tensor],
    ):
        super().__init__()
        self.call = call
        self.wants_gradients = torch.is_grad_enabled()
        self.draws = draws
        self.tangents = tangents
        self.log_factors = log_factors
        self.latent_values = call.latents.constrain(call.latents.values)
        self._own_values: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Message) -> None:
        name = msg["name"]
        # Hidden: `Draws` has shown the latent sites to the handlers outside, and the
        # model's own code goes on with values at the MAP.
        if name in self.latent_values:
            msg["value"] = self.latent_values[name]
            msg["stop"] = True
        elif is_deterministic(msg):
            self._expand_deterministic(msg)
        elif name in self.log_factors:
            # A factor is a term of the prior: it is taken at the draws, not expanded.
            own = msg["fn"].log_factor.shape
            factor = self.draws.spread(self.log_factors[name], own, len(own))
            msg["fn"] = dist.Unit(factor)
            msg["value"] = msg["fn"].sample()
        elif any(site.name == name for site in self.call.sites):
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
        batch_shape = np.broadcast_shapes(fn.batch_shape, delta.batch_shape)
        msg["value"] = value
        msg["fn"] = delta.expand(batch_shape)

    def _expand_output(self, msg: Message) -> None:
        name, fn = msg["name"], msg["fn"]
        site = next(site for site in self.call.sites if site.name == name)
        taken = SiteDistribution.of(fn, site.node["value"])
        own = site.family.outputs(taken.base)
        if not self.wants_gradients:
            own = {part: value.detach() for part, value in own.items()}
        tangent = self.tangents["output", name]
        shape = taken.element_shape
        # eta_lin = eta + J (theta - MAP), parameter by parameter.
        pieces = tangent.split([part.shape[-1] for part in own.values()], dim=-1)
        outputs = {}
        for (part, value), piece in zip(own.items(), pieces, strict=True):
            wide = (*shape, value.shape[-1])
            batch_dim = len(shape) - taken.event_dim
            outputs[part] = value + self.draws.spread(piece, wide, batch_dim)
        msg["fn"] = taken.at(site.family, outputs)

    def _pyro_post_sample(self, msg: Message) -> None:
        # The handlers outside have seen the expanded value; the model's own code, run
        # at the MAP, must not: what it computes from it is expanded by itself.
        if msg["name"] in self._own_values:
            msg["value"] = self._own_values[msg["name"]]


def _log_factors(call: ModelCall, draws: Draws) -> dict[str, Tensor]:
    """Log factors at the drawn values, led by K if there are draws."""
    names = [name for name, node in call.trace.nodes.items() if is_factor(node)]
    if not names:
        return {}

    def log_factors(values: dict[str, Tensor]) -> dict[str, Tensor]:
        nodes = call.run(values).nodes
        return {name: nodes[name]["fn"].log_factor for name in names}

    return draws.over_draws(log_factors, draws.unconstrained())
