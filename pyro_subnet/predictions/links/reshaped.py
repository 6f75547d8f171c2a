"""A distribution over vectors as one over arrays of another shape."""

from __future__ import annotations

import math
from typing import Any, final

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor


@final
class Reshaped(TorchDistribution):
    """A distribution of event shape (E,) whose values are read as arrays."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - torch's own interface

    def __init__(self, base_dist: Any, shape: torch.Size):
        self.base_dist = base_dist
        super().__init__(base_dist.batch_shape, shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:
        """Whether draws carry gradients."""
        return self.base_dist.has_rsample

    @property
    def support(self) -> Any:
        """Support, as that of independent elements."""
        inner = self.base_dist.support
        elementwise = getattr(inner, "base_constraint", constraints.real)
        return constraints.independent(elementwise, len(self.event_shape))

    @property
    def mean(self) -> Tensor:
        """Mean, of the array's shape."""
        return self._shaped(self.base_dist.mean)

    @property
    def variance(self) -> Tensor:
        """Marginal variances, of the array's shape."""
        return self._shaped(self.base_dist.variance)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws without gradients."""
        return self._shaped(self.base_dist.sample(sample_shape))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws with gradients."""
        return self._shaped(self.base_dist.rsample(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, of values of shape (..., *shape)."""
        lead = value.shape[: value.ndim - len(self.event_shape)]
        return self.base_dist.log_prob(
            value.reshape(*lead, math.prod(self.event_shape))
        )

    def _shaped(self, flat: Tensor) -> Tensor:
        return flat.reshape(flat.shape[:-1] + self.event_shape)
