"""A multivariate normal that names its columns, and that autocast does not round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.utils import lazy_property

from pyro_subnet.tensors.modes import full_precision


@final
class FullNormal(dist.MultivariateNormal):
    """A multivariate normal in full precision, inside ``torch.autocast`` as well.

    Torch multiplies when it is asked for a covariance or a draw, which may be long
    after the computation that made the distribution.

    Attributes:
        names: What each element of an event is, such as ``("loc", "log_scale")``; empty
            where nothing names them.
    """

    names: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, loc: Tensor, scale_tril: Tensor, *, validate_args: bool | None = None
    ) -> FullNormal:
        """The distribution of a mean and a lower factor of one batch shape.

        Args:
            loc: Mean, shape (..., C).
            scale_tril: Lower factor of the covariance, shape (..., C, C).
            validate_args: As of torch's class.

        Returns:
            The distribution.
        """
        # As torch constructs it, but for the comparison of batch shapes, whose first
        # use imports a computer algebra system: half a second.
        new: FullNormal = object.__new__(cls)
        new.loc, new.scale_tril = loc, scale_tril
        new._unbroadcasted_scale_tril = scale_tril
        shapes = loc.shape[:-1], loc.shape[-1:]
        Distribution.__init__(new, *shapes, validate_args=validate_args)
        return new

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> FullNormal:
        """The same for each element of a larger batch."""
        new: FullNormal = super().expand(batch_shape, _instance)
        new.names = self.names
        return new

    @lazy_property
    @full_precision()
    def covariance_matrix(self) -> Tensor:
        """Covariance, shape (..., C, C)."""
        factor = self._unbroadcasted_scale_tril
        return (factor @ factor.mT).expand(self.scale_tril.shape)

    @full_precision()
    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws, shape ``sample_shape + batch_shape + (C,)``, differentiable."""
        return super().rsample(torch.Size(sample_shape))

    @full_precision()
    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of values of shape (..., C), in nats."""
        return super().log_prob(value)
