"""Latent sites, drawn from their priors without running the user's network.

A network cannot run on a whole batch of weights at once, but its latent sites can be
shown one by one to the handlers around it. A site's prior is known from a run at the
MAP or, where it depends on other latent sites, from a run at their drawn values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, TypeVar, final

import pyro
import torch
from pyro import poutine
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution

from pyro_subnet.curvature.likelihood import Family, find_family
from pyro_subnet.exceptions import ModelError
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.plates import PlatesAround, plate_scale
from pyro_subnet.tracing.site_distribution import SiteDistribution
from pyro_subnet.tracing.trace import Node

Result = TypeVar("Result")


@final
class Draws:
    """The latent sites of one call, drawn in trace order.

    Args:
        call: The call of the user's model.

    Attributes:
        values: Constrained value of each site, with its batch dimensions.
        count: K, the number of draws in the batch dimensions; None without any.
    """

    def __init__(self, call: ModelCall):
        self.call = call
        self.values: dict[str, Tensor] = {}
        self.count: int | None = None
        self._prefix: torch.Size = torch.Size()
        self._outer: dict[int, int] = {}
        self._plates: dict[str, pyro.plate] = {}
        self._parents: Mapping[str, frozenset[str]] = {}
        self._priors: dict[str, Distribution] = {}
        self._known: frozenset[str] = frozenset()

    def follow(self, call: ModelCall, parents: Mapping[str, frozenset[str]]) -> None:
        """Goes on with a call that was read anew.

        Args:
            call: It.
            parents: Latent sites that the prior of a latent site depends on.
        """
        self.call, self._parents = call, parents
        self._priors, self._known = {}, frozenset()

    def show(self, name: str) -> None:
        """Draws the next site, which the handlers around see."""
        node = self.call.trace.nodes[name]
        prior = node["fn"]
        if name in self._parents:
            # One that depends on a site drawn since needs all priors read anew.
            if not self._parents[name] <= self._known:
                self._priors = self._read_priors()
                self._known = frozenset(self.values)
            prior = self._priors[name]
        self._record(name, self._sample(node, prior))

    def directions(self) -> dict[str, Tensor]:
        """theta - MAP, unconstrained, shaped as :meth:`unconstrained`."""
        base = self.call.latents.values
        return {name: u - base[name] for name, u in self.unconstrained().items()}

    def unconstrained(self) -> dict[str, Tensor]:
        """Values, (K, *site shape); without K where all draws agree or none is."""
        result = dict(self.call.latents.values)
        for name, value in self.values.items():
            own = self.call.trace.nodes[name]["value"].shape
            # No more values than at the MAP: the same in all draws.
            many = value.numel() > math.prod(own)
            flat = value.reshape(-1, *own) if many else value.reshape(own)
            result[name] = self.call.latents.transforms[name].inv(flat)
        return result

    def over_draws(
        self,
        function: Callable[[dict[str, Tensor]], Result],
        values: dict[str, Tensor],
        chunk_size: int | None = None,
    ) -> Result:
        """Maps a function over the draws by ``vmap``; results have K in front."""
        if self.count is None:
            return function(values)
        base = self.call.latents.values
        in_dims = {
            name: 0 if value.ndim > base[name].ndim else None
            for name, value in values.items()
        }
        mapped = torch.func.vmap(function, in_dims=(in_dims,), chunk_size=chunk_size)
        return mapped(values)

    def spread(self, tensor: Tensor, shape: tuple[int, ...], batch_dim: int) -> Tensor:
        """Moves K, in front of ``shape``, to the dimensions of the plates outside."""
        if self.count is None:
            return tensor
        lead = self._prefix
        if self._outer:
            # The plates' dimensions, left of the value's own batch dimensions.
            depth = max(-dim for dim in self._outer)
            lead = torch.Size(
                self._outer.get(dim, 1) for dim in range(-depth, -batch_dim)
            )
        if math.prod(lead) != self.count:
            raise ModelError(
                "Batched latent values must lie along plates outside the model, left "
                f"of its own; got {self.count} draws where the plates at dimensions "
                f"{sorted(self._outer)} leave shape {tuple(lead)}. Give the outer "
                "plate a dimension further to the left."
            )
        return tensor.reshape(*lead, *shape)

    def _record(self, name: str, value: Tensor) -> None:
        own = self.call.trace.nodes[name]["value"].ndim
        prefix = value.shape[: value.ndim - own]
        self.values[name] = value
        if math.prod(prefix) > 1:
            self.count = math.prod(prefix)
            self._prefix = prefix

    def _sample(self, node: Node, fn: Distribution) -> Tensor:
        """Draws one site in its plates, as the model would."""
        with ExitStack() as stack:
            for frame in node["cond_indep_stack"]:
                if frame.vectorized:
                    stack.enter_context(self._plate(frame))
            # The plates, entered above, bring their own part of the scale.
            scale = node["scale"] / plate_scale(node)
            if isinstance(scale, Tensor) or scale != 1.0:
                stack.enter_context(poutine.scale(scale=scale))
            if node["mask"] is not None:
                stack.enter_context(poutine.mask(mask=node["mask"]))
            around = stack.enter_context(PlatesAround())
            value = pyro.sample(node["name"], fn, infer=dict(node["infer"]))
        inner = {frame.name for frame in node["cond_indep_stack"]}
        for frame in around.stack:
            if frame.vectorized and frame.name not in inner:
                self._outer[frame.dim] = frame.size
        return value

    def _plate(self, frame: CondIndepStackFrame) -> pyro.plate:
        if frame.name not in self._plates:
            options: dict[str, Any] = {"dim": frame.dim}
            if frame.size >= 0:
                options["size"] = frame.full_size or frame.size
                options["subsample"] = torch.arange(frame.size)
            # The model itself shows the plate's subsample site.
            with poutine.block(hide_fn=site_is_subsample):
                self._plates[frame.name] = pyro.plate(frame.name, **options)
        return self._plates[frame.name]

    def _read_priors(self) -> dict[str, Distribution]:
        """Priors of the sites with parents, at the values drawn so far."""
        base = self.call.latents.values
        parents, drawn = self._parents, self.unconstrained()
        if self.count is None:
            nodes = self.call.run(drawn).nodes
            return {name: nodes[name]["fn"] for name in parents}
        at_map = {
            name: SiteDistribution.of(node["fn"], node["value"])
            for name, node in self.call.trace.nodes.items()
            if name in parents
        }
        families = {name: find_family(taken.base) for name, taken in at_map.items()}

        def outputs(values: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
            nodes = self.call.run({**base, **values}).nodes
            return {
                name: SiteDistribution.of(
                    nodes[name]["fn"], nodes[name]["value"]
                ).outputs(family)
                for name, family in families.items()
            }

        batched = self.over_draws(outputs, drawn)
        return {
            name: self._prior(at_map[name], families[name], batched[name])
            for name in parents
        }

    def _prior(
        self, taken: SiteDistribution, family: Family, outputs: Mapping[str, Tensor]
    ) -> Distribution:
        batch_dim = len(taken.element_shape) - taken.event_dim
        spread = {
            part: self.spread(value, tuple(value.shape[1:]), batch_dim)
            for part, value in outputs.items()
        }
        return taken.at(family, spread)
