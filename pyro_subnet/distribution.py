"""The subnet's Gaussian as a Pyro distribution."""

from __future__ import annotations

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from pyro_subnet.gaussian import PrecisionGaussian


class PrecisionNormal(TorchDistribution):
    r"""Multivariate normal held as the Cholesky factor L of its precision.

    Draws, log density and entropy need L alone; the covariance and its factor are
    computed when they are asked for, anew each time.

    Args:
        loc: Mean, shape (S,).
        precision_tril: L with :math:`P = L L^\top`, shape (S, S); only the lower
            triangle is read.
        validate_args: As in every torch distribution.
    """

    arg_constraints = {  # noqa: RUF012 - torch's own interface
        "loc": constraints.real_vector,
        "precision_tril": constraints.dependent(event_dim=2),
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self, loc: Tensor, precision_tril: Tensor, validate_args: bool | None = None
    ):
        self.gaussian = PrecisionGaussian(loc, precision_tril)
        super().__init__(torch.Size(), loc.shape, validate_args=validate_args)

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
    def precision_tril(self) -> Tensor:
        """L, lower triangular, shape (S, S)."""
        return self.gaussian.precision_tril.tril()

    @property
    def precision_matrix(self) -> Tensor:
        r""":math:`P = L L^\top`, shape (S, S)."""
        return self.gaussian.precision_matrix()

    @property
    def covariance_matrix(self) -> Tensor:
        r""":math:`P^{-1}`, shape (S, S)."""
        return self.gaussian.covariance_matrix()

    @property
    def scale_tril(self) -> Tensor:
        """Lower Cholesky factor of the covariance, shape (S, S)."""
        return self.gaussian.scale_tril()

    @property
    def variance(self) -> Tensor:
        """Marginal variances, shape (S,)."""
        return self.gaussian.variance()

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

    def entropy(self) -> Tensor:
        """Differential entropy in nats."""
        return self.gaussian.entropy()
