"""The latent sites as functions of the subnet, and their density as its prior."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import numpy as np
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_subnet.subnet import Subnet, place_elements
from pyro_subnet.tracing.log_prior import log_density
from pyro_subnet.tracing.plates import PlatesAround
from pyro_subnet.tracing.trace import Latents, Model, Node, run_model

# The one latent site of a hybrid model.
SITE = "subnet"


@final
class SubnetSites:
    """The user's latent sites as functions of the subnet, others at ``estimates``.

    Attributes:
        chosen: Positions of the chosen elements within each site.
        extra_dims: How many more axes each site has when unconstrained.
    """

    def __init__(
        self, latents: Latents, subnet: Subnet, estimates: Mapping[str, Tensor]
    ):
        self.latents = latents
        self.subnet = subnet
        self.chosen = subnet.indices
        self._estimates = estimates
        self._base = latents.values
        self._split: tuple[Tensor, dict[str, Tensor]] | None = None
        # A matrix of correlations has one axis less when unconstrained.
        self.extra_dims = {
            name: u.ndim - len(latents.transforms[name].forward_shape(u.shape))
            for name, u in self._base.items()
        }

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all latent sites."""
        return self.latents.layout.names

    def unconstrained(
        self, name: str, theta: Tensor, event_dim: int, depth: int = 0
    ) -> Tensor:
        """A site's value at ``theta``, (..., S).

        Args:
            name: Of the site.
            theta: Values of the subnet, whose batch goes left of the event.
            event_dim: Of the site, unconstrained.
            depth: Batch dimensions of the plates around ``theta``.

        Returns:
            The value.
        """
        base = self._base[name]
        # Elements that are not chosen have the site's parameter.
        if name in self._estimates:
            base = self.latents.transforms[name].inv(self._estimates[name])
        if name not in self.chosen:
            return base
        if self._split is None or self._split[0] is not theta:
            self._split = theta, self.subnet.split(theta)
        piece = self._split[1][name]
        batch = theta.shape[:-1]
        if 0 < len(batch) < depth:
            # `Predictive(parallel=True)` passes K draws without all the axes of the
            # plates inside theirs. Each site takes those that its value lacks, as
            # there, and keeps its own.
            while len(batch) > 1 and batch[-1] == 1:
                batch = batch[:-1]
            own = base.ndim - self.extra_dims[name]
            lacks = max(0, depth - len(batch) - own)
            axes = (1,) * (lacks + base.ndim - event_dim)
            piece = piece.reshape(*batch, *axes, piece.shape[-1])
        return place_elements(base, self.chosen[name], piece, event_dim)

    def constrained(self, name: str, unconstrained: Tensor) -> Tensor:
        """The value that the model sees."""
        if name not in self.chosen:  # as it is: no digit is lost on the way
            return self._estimates[name]
        return self.latents.transforms[name](unconstrained)


@final
class SubnetPrior(dist.TorchDistribution):
    """The prior of the user's latent sites as a distribution over the subnet.

    Its log density is the sum of theirs in unconstrained space, other elements at their
    parameters, so it is normalized only up to what those contribute. Draws are the
    elements that the user's model draws.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - torch's own interface
    support = constraints.real_vector
    has_rsample = False

    def __init__(
        self,
        model: Model,
        sites: SubnetSites,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ):
        self._model, self._sites = model, sites
        self._args, self._kwargs = args, kwargs
        self._known: tuple[Tensor, Callable[[], Tensor]] | None = None
        event_shape = torch.Size([sites.subnet.size])
        super().__init__(torch.Size(), event_shape, validate_args=False)

    def remember(self, value: Tensor, log_prior: Callable[[], Tensor]) -> None:
        """Spares another run of the model: the present one has met the sites."""
        # As a function: all D elements take part, which draws alone need not pay for.
        self._known = (value, log_prior)

    def expand(
        self, batch_shape: Sequence[int], _instance: SubnetPrior | None = None
    ) -> SubnetPrior:
        """The same for many independent draws."""
        new = SubnetPrior(self._model, self._sites, self._args, self._kwargs)
        new._batch_shape = torch.Size(batch_shape)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, by a run of the user's model for each unknown value."""
        if self._known is not None and value is self._known[0]:
            found = self._known[1]()
        else:
            rows = [self._log_prior(row) for row in value.reshape(-1, value.shape[-1])]
            found = torch.stack(rows).reshape(value.shape[:-1])
        # `Predictive(parallel=True)` passes K draws without the axes of inner plates.
        if self.batch_shape and found.numel() == self.batch_shape.numel():
            return found.reshape(self.batch_shape)
        return found.expand(np.broadcast_shapes(found.shape, self.batch_shape))

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Draws as the user's model does, by one run each."""
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            draws = [self._draw() for _ in range(shape[:-1].numel())]
        return torch.stack(draws).reshape(shape)

    def _draw(self) -> Tensor:
        trace = run_model(self._model, self._args, self._kwargs, {}, {})
        latents, parts = self._sites.latents, []
        for name, within in self._sites.chosen.items():
            u = latents.transforms[name].inv(trace.nodes[name]["value"])
            parts.append(u.flatten()[within])
        return torch.cat(parts)

    def _log_prior(self, theta: Tensor) -> Tensor:
        sites = self._sites
        u = {name: sites.unconstrained(name, theta, 0) for name in sites.names}
        values = {name: sites.constrained(name, u[name]) for name in u}
        nodes = run_model(self._model, self._args, self._kwargs, values, {}).nodes
        terms = [
            log_density(nodes[name], sites.latents.transforms[name], u[name])
            for name in sites.names
        ]
        return torch.stack(terms).sum()


@final
class GivenSites(Messenger):
    """Gives the latent sites their values at ``theta``, (..., S), and hides them.

    Args:
        sites: The sites.
        theta: Values of the subnet.
        around: The plates around them.
    """

    def __init__(self, sites: SubnetSites, theta: Tensor, around: PlatesAround):
        super().__init__()
        self._sites = sites
        self._theta, self._around = theta, around
        # By name: a network that is called twice in a run meets its sites again.
        self._met: dict[str, tuple[Node, int]] = {}
        # Values that a graph holds anyway; others not, as traces of many draws would
        # hold all D elements of each.
        self._held: dict[str, tuple[Tensor, Tensor]] = {}

    def log_prior(self) -> Tensor:
        """Unconstrained log density of the sites met, in nats, at ``theta`` (S,)."""
        terms = []
        for name, (node, event_dim) in self._met.items():
            u, value = self._values(name, event_dim)
            transform = self._sites.latents.transforms[name]
            terms.append(log_density({**node, "value": value}, transform, u))
        return torch.stack(terms).sum()

    def _values(self, name: str, event_dim: int) -> tuple[Tensor, Tensor]:
        """A site's value, unconstrained and as the model sees it."""
        found = self._held.get(name)
        if found is None:
            u = self._sites.unconstrained(
                name, self._theta, event_dim, self._around.depth
            )
            found = u, self._sites.constrained(name, u)
            if self._theta.requires_grad:
                self._held[name] = found
        return found

    def _pyro_sample(self, msg: Message) -> None:
        name, sites = msg["name"], self._sites
        if name not in sites.names or msg["is_observed"]:
            return
        event_dim = msg["fn"].event_dim + sites.extra_dims[name]
        self._met[name] = dict(msg), event_dim
        msg["value"] = self._values(name, event_dim)[1]
        msg["stop"] = True
        # Plates outside do not see the site, and yet it lies in them.
        msg["cond_indep_stack"] = self._around.stack + msg["cond_indep_stack"]
