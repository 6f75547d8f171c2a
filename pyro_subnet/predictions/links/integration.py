"""What a link is given and returns, and what links share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, final, runtime_checkable

import pyro.distributions as dist
import torch
import torch.distributions as td
from torch import Tensor

from pyro_subnet.exceptions import OptionError, shown
from pyro_subnet.gaussians.base import standard_normal
from pyro_subnet.predictions.links.likelihood import Likelihood
from pyro_subnet.predictions.links.reshaped import Reshaped


@final
@dataclass(frozen=True)
class PredictiveOptions:
    """How a predictive distribution is computed.

    Attributes:
        link: The link; None for the family's best.
        joint: Whether over all inputs at once, or over how many that follow each other.
        site: Name of the observed site; None for the only one.
        num_samples: Draws of the outputs where a link needs them.
        noise_factor: Factor of the scale of Gaussian noise.
        generator: Source of the random numbers; torch's own by default.
    """

    link: str | None = None
    joint: bool | int = False
    site: str | None = None
    num_samples: int = 1000
    noise_factor: float | Tensor = 1.0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.generator, torch.Generator | None):
            raise OptionError(
                "`generator` must be a `torch.Generator`; got "
                f"{shown(self.generator)}. Pass "
                "`torch.Generator().manual_seed(0)`, say."
            )


@final
@dataclass(frozen=True, eq=False)
class Integrated:
    """A distribution over y, and how far its log density may be off.

    Attributes:
        log_prob_error: From y to the estimated error of its log density, in nats, where
            a sum stands for the integral; None elsewhere.
    """

    distribution: Any
    log_prob_error: Callable[[Tensor], Tensor] | None = None


@runtime_checkable
class GaussianOutputs(Protocol):
    """A Gaussian over the outputs of some inputs."""

    def moments(self, *, joint: bool | int) -> tuple[Tensor, Tensor]:
        """Mean and factor of the covariance, across inputs if joint."""

    def marginals(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each output, (N, C)."""

    def draw_functions(
        self, num_samples: int, generator: torch.Generator | None
    ) -> Tensor:
        """Draws over all inputs, (K, N, C)."""


@final
@dataclass(frozen=True, eq=False)
class Integration:
    r"""The integral :math:`\int p(y \mid \eta) N(\eta) d\eta` at one observed site."""

    outputs: GaussianOutputs
    likelihood: Likelihood
    options: PredictiveOptions

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean of the outputs and factor of their covariance, joint if asked for."""
        return self.outputs.moments(joint=self.options.joint)

    def elementwise(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of a scalar output, shape (N, *rest)."""
        loc, scale = self.outputs.marginals()
        shape = self.likelihood.shape
        return loc.reshape(shape), scale.reshape(shape)

    def draws(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Standard normal draws, (K, *shape), and their log weights, (K,)."""
        count, like = self.options.num_samples, self.likelihood.like
        z = standard_normal((count, *shape), like, self.options.generator)
        return z, equal_weights(count, z)

    def of_shape(self, gaussian: Any, event: torch.Size) -> Any:
        """A Gaussian over a vector, on the event shape and the scale of y."""
        if isinstance(gaussian, dist.Independent):  # a single element
            base, batch = gaussian.base_dist, gaussian.batch_shape
            parts = [part.reshape(batch + event) for part in (base.loc, base.scale)]
            log = self.likelihood.family.distribution is td.LogNormal
            return to_event((dist.LogNormal if log else dist.Normal)(*parts), event)
        found = self.on_scale_of_y(gaussian)
        return found if len(event) == 1 else Reshaped(found, event)

    def on_scale_of_y(self, gaussian: Any) -> Any:
        """The Gaussian, or its exponential where it is over the logarithm of y."""
        if self.likelihood.family.distribution is td.LogNormal:
            return dist.TransformedDistribution(gaussian, [td.ExpTransform()])
        return gaussian


def by_halves(integrated: Callable[[bool], Any]) -> Integrated:
    """The sum over all nodes; the difference that half of them make is its error."""
    fine = integrated(False)

    def error(y: Tensor) -> Tensor:
        return (fine.log_prob(y) - integrated(True).log_prob(y)).abs()

    return Integrated(fine, error)


def equal_weights(count: int, like: Tensor) -> Tensor:
    """Log weights of equal draws, shape (count,)."""
    return like.new_full((count,), -math.log(count))


def to_event(distribution: Any, axes: torch.Size) -> Any:
    """A distribution whose last ``len(axes)`` batch axes belong to its event."""
    return distribution.to_event(len(axes)) if axes else distribution
