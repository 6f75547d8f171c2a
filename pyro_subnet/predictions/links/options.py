"""What a predictive distribution is asked for, and what comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PredictiveOptions:
    """How a predictive distribution is computed.

    Attributes:
        link: The link; None for the family's best.
        joint: Whether over all inputs at once.
        site: Name of the observed site; None for the only one.
        num_samples: Draws of the outputs where a link needs them.
        noise_scale: Factor of the scale of Gaussian noise.
        generator: Source of the random numbers; torch's own by default.
    """

    link: str | None = None
    joint: bool = False
    site: str | None = None
    num_samples: int = 1000
    noise_scale: float | Tensor = 1.0
    generator: torch.Generator | None = None


@dataclass(frozen=True, eq=False)
class Predictive:
    """A distribution over y, and how far its log density may be off.

    Attributes:
        distribution: The distribution.
        link: The link that it comes from.
        log_prob_error: From y to the estimated error of its log density, in nats, of
            the sum that stands for an integral; None where there is no such sum.
    """

    distribution: Any
    link: str
    log_prob_error: Callable[[Tensor], Tensor] | None = None
