"""The subnet's Gaussian as a Pyro distribution."""

from __future__ import annotations

from typing import final

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from pyro_subnet.gaussians.base import Gaussian
from pyro_subnet.tensors.modes import full_precision


@final
class SubnetNormal(TorchDistribution):
    """Multivariate normal over the subnet, in whatever form its precision is held.

    Draws, log density and entropy are computed from that form. The covariance, its
    factor and the precision are computed anew each time they are asked for.

    Args:
        gaussian: The normal without torch's interface.
        validate_args: As in every torch distribution.
    """

    arg_constraints = {"loc": constraints.real_vector}  # noqa: RUF012 - torch's own
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, gaussian: Gaussian, validate_args: bool | None = None):
        self.gaussian = gaussian
        super().__init__(torch.Size(), gaussian.loc.shape, validate_args=validate_args)

    def __repr__(self) -> str:
        held = type(self.gaussian).__name__
        size, dtype = self.loc.numel(), str(self.loc.dtype).removeprefix("torch.")
        return f"{type(self).__name__}(S={size}, held as {held}, {dtype})"

    @property
    def loc(self) -> Tensor:
        """Mean, shape (S,)."""
        return self.gaussian.loc

    @property
    def mean(self) -> Tensor:
        """Mean, shape (S,)."""
        return self.gaussian.loc

    @property
    def mode(self) -> Tensor:
        """Mode, shape (S,)."""
        return self.gaussian.loc

    @property
    @full_precision()
    def precision_matrix(self) -> Tensor:
        """Inverse of the covariance, shape (S, S)."""
        return self.gaussian.precision_matrix()

    @property
    @full_precision()
    def covariance_matrix(self) -> Tensor:
        """Covariance, shape (S, S)."""
        return self.gaussian.covariance_matrix()

    @property
    @full_precision()
    def scale_tril(self) -> Tensor:
        """Lower Cholesky factor of the covariance, shape (S, S)."""
        return self.gaussian.scale_tril()

    @property
    @full_precision()
    def variance(self) -> Tensor:
        """Marginal variances, shape (S,)."""
        return self.gaussian.variance()

    @full_precision()
    def log_prob(self, value: Tensor) -> Tensor:
        """Log density.

        Args:
            value: Shape (..., S).

        Returns:
            Shape (...), in nats.
        """
        if self._validate_args:
            self._validate_sample(value)
        return self.gaussian.log_prob(value)

    @full_precision()
    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Draws, differentiable in ``loc``.

        Args:
            sample_shape: How many.

        Returns:
            Shape ``sample_shape + (S,)``.
        """
        noise = torch.randn(
            self._extended_shape(sample_shape),
            dtype=self.loc.dtype,
            device=self.loc.device,
        )
        return self.gaussian.draw(noise)

    @full_precision()
    def entropy(self) -> Tensor:
        """Differential entropy in nats."""
        return self.gaussian.entropy()
