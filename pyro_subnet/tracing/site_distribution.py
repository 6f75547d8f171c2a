"""A site's distribution, split into independent elements of a family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import (
    ExpandedDistribution,
    MaskedDistribution,
    TorchDistributionMixin,
)
from torch import Tensor
from torch.distributions import Distribution

from pyro_subnet.curvature.families.family import Family

# Pyro's families that take NaN for a missing value, as the plain family: elsewhere a
# mask says what is missing, which needs no branch on values.
_LEAVE_OUT_NAN: Mapping[type, Callable[[Any], Distribution]] = {
    dist.NanMaskedNormal: lambda d: dist.Normal(d.loc, d.scale, validate_args=False),
    dist.NanMaskedMultivariateNormal: lambda d: dist.MultivariateNormal(
        d.loc, scale_tril=d.scale_tril, validate_args=False
    ),
}


@final
@dataclass(frozen=True, eq=False)
class SiteDistribution:
    """Independent elements of a plain family, which a site's wrappers put together.

    Attributes:
        base: The family's distribution, without wrappers.
        element_shape: Shape of the independent elements: the batch, then the event
            dimensions that ``to_event`` declared.
        event_dim: How many of those ``to_event`` declared.
        mask: Bool tensor of the element shape, or None: what ``.mask()`` leaves in, and
            what is not missing where Pyro's class leaves out NaN.
        leaves_out_nan: That class of Pyro's; None for others.
    """

    base: Distribution
    element_shape: torch.Size
    event_dim: int
    mask: Tensor | None
    leaves_out_nan: Callable[..., Distribution] | None = None

    @classmethod
    def of(cls, fn: Distribution, value: Tensor) -> SiteDistribution:
        """Takes a distribution out of any ``to_event``, ``mask`` and ``expand``."""
        base, event_dim, masks = fn, 0, []
        while True:
            if isinstance(base, MaskedDistribution):
                masks.append((base._mask, event_dim))
                base = base.base_dist
            elif isinstance(base, ExpandedDistribution):
                base = base.base_dist
            elif isinstance(base, torch.distributions.Independent):
                event_dim += base.reinterpreted_batch_ndims
                base = base.base_dist
            else:
                break
        own = len(base.event_shape)
        event = fn.event_shape[: len(fn.event_shape) - own]
        # The value may have more batch dimensions than the distribution.
        sampled = value.shape[: value.ndim - own]
        shape = torch.Size((*fn.batch_shape, *event))  # a tuple, of some of Pyro's
        if shape != sampled:
            shape = torch.Size(np.broadcast_shapes(shape, sampled))
        mask = kind = None
        if type(base) in _LEAVE_OUT_NAN:
            kind, seen = type(base), value.isfinite()
            # An event of which a part is missing is seen: `check_data` refuses it.
            mask = (seen.any(-1) if own else seen).expand(shape)
            base = _LEAVE_OUT_NAN[kind](base)
        for part, outside in masks:
            # Event dimensions declared outside a mask are batch dimensions to it.
            inside = event_dim - outside
            wide = spread(part, inside, shape, value.device).to(torch.bool)
            mask = wide if mask is None else mask & wide
        return cls(base, shape, event_dim, mask, kind)

    def outputs(self, family: Family) -> dict[str, Tensor]:
        """Every unconstrained parameter, shape (*element shape, width)."""
        return {
            part: value.expand(*self.element_shape, value.shape[-1])
            for part, value in family.outputs(self.base).items()
        }

    def constructor(self, family: Family) -> Callable[..., Distribution]:
        """Pyro's class of the family, which takes the family's parameters."""
        # The plainest class of the distribution that is both Pyro's and the family's;
        # for a family by density alone, Pyro's own of the family's name.
        known = (
            parent
            for parent in reversed(type(self.base).__mro__)
            if issubclass(parent, family.distribution)
            and issubclass(parent, TorchDistributionMixin)
        )
        found: Callable[..., Distribution] | None = next(known, None)
        return found or getattr(dist, family.distribution.__name__)

    def plain_at(self, family: Family, outputs: Mapping[str, Tensor]) -> Distribution:
        """The family at other unconstrained parameters, without mask and event axes."""
        return self.constructor(family)(**family.parameters(self.base, outputs))

    def at(self, family: Family, outputs: Mapping[str, Tensor]) -> Distribution:
        """The same with the site's mask and event axes."""
        constructor = self.leaves_out_nan or self.constructor(family)
        new: Any = constructor(**family.parameters(self.base, outputs))
        if self.mask is not None:
            new = dist.MaskedDistribution(new, self.mask)
        return dist.Independent(new, self.event_dim) if self.event_dim else new


def spread(
    part: Tensor | float | bool, dims: int, shape: torch.Size, device: torch.device
) -> Tensor:
    """Broadcasts a batch-shaped number over ``dims`` event dimensions to ``shape``."""
    if not isinstance(part, Tensor):
        part = torch.tensor(part, dtype=torch.float64)
    tensor = part.to(device)
    return tensor.reshape(tensor.shape + (1,) * dims).expand(shape)
