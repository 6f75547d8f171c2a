"""The log joint density at the MAP, in the few numbers that the evidence needs.

They are gathered while the curvature is summed, so that priors and noise scales are
compared later without another pass over the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor


@final
@dataclass(frozen=True, eq=False)
class FitSummary:
    r"""The log joint density of data and prior at the MAP.

    Attributes:
        log_likelihood: :math:`\sum_n w_n \log p(y_n \mid \hat\theta)`, nats.
        log_prior: :math:`\log p(\hat\theta)` of all D elements, in unconstrained space,
            factors included, nats.
        prior_gradient: Its gradient over the subnet, shape (S,), float64.
        noise_weight: :math:`\sum_n w_n` over the elements of normal observed sites.
        noise_energy: :math:`\sum_n w_n (y_n - \mu_n)^2 / \sigma_n^2` over the same.
        scales_noise: Whether all observed sites are normal, with scales that the subnet
            does not move, so that their noise may be scaled afterwards.
    """

    log_likelihood: float
    log_prior: float
    prior_gradient: Float[Tensor, " subnet"]
    noise_weight: float
    noise_energy: float
    scales_noise: bool

    def plus(self, more: FitSummary, forgetting: float) -> FitSummary:
        """The summary of these data and more of them, under one prior.

        Args:
            more: That of the new data alone.
            forgetting: What the log likelihood of the old data is multiplied by.

        Returns:
            The sum.
        """
        return replace(
            self,
            log_likelihood=forgetting * self.log_likelihood + more.log_likelihood,
            noise_weight=forgetting * self.noise_weight + more.noise_weight,
            noise_energy=forgetting * self.noise_energy + more.noise_energy,
            scales_noise=self.scales_noise and more.scales_noise,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The summary in tensors, for buffers and files.

        Returns:
            ``{name: float64 tensor}``.
        """
        numbers = [
            self.log_likelihood,
            self.log_prior,
            self.noise_weight,
            self.noise_energy,
            float(self.scales_noise),
        ]
        return {
            "fit_numbers": torch.tensor(numbers, dtype=torch.float64),
            "prior_gradient": self.prior_gradient,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> FitSummary:
        """Undoes :meth:`tensors`.

        Args:
            tensors: What it gave; others are not read.

        Returns:
            The summary.
        """
        likelihood, prior, weight, energy, scales = tensors["fit_numbers"].tolist()
        gradient = tensors["prior_gradient"]
        return cls(likelihood, prior, gradient, weight, energy, bool(scales))
