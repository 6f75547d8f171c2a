r"""The log joint density at the MAP, in the few numbers that the evidence reads.

They are gathered while the curvature is summed, so that priors and noise scales are
compared later without another pass over the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.curvature.prior import DensityTerm
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.grad_mode import differentiable
from pyro_subnet.tracing.call import ModelCall, MovedParts
from pyro_subnet.tracing.output_site import OutputSite, site_weights


@dataclass(frozen=True, eq=False)
class FitSummary:
    r"""What the data and the prior say of the MAP.

    Attributes:
        log_likelihood: :math:`\sum_n w_n \log p(y_n \mid \hat\theta)`, nats.
        log_prior: :math:`\log p(\hat\theta)` of all D elements, in unconstrained
            space, factors included, nats.
        prior_gradient: Its gradient over the subnet, shape (S,), float64.
        noise_weight: :math:`\sum_n w_n` over the elements of normal observed sites.
        noise_energy: :math:`\sum_n w_n (y_n - \mu_n)^2 / \sigma_n^2` over the same.
        scales_noise: Whether all observed sites are normal, with scales that the
            subnet does not move: then their noise may be scaled afterwards.
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


class SummaryTally:
    """Sums :class:`FitSummary` over the calls of a pass.

    Attributes:
        numbers: Log likelihood, weight and energy so far, shape (3,), float64.
        scales_noise: See :class:`FitSummary`.
    """

    def __init__(self) -> None:
        self.numbers = torch.zeros(3, dtype=torch.float64)
        self.scales_noise = True

    def add(self, call: ModelCall, moved: MovedParts, without_plates: bool) -> None:
        """Adds one call.

        Args:
            call: The call.
            moved: What the subnet moves.
            without_plates: Leaves out the N/B of subsampling plates.
        """
        for site in call.sites:
            weight = site_weights(site.node, site.distribution, without_plates)
            self.numbers[0] += _log_likelihood(site, weight)
            is_normal = site.family.distribution is torch.distributions.Normal
            if is_normal and set(moved[site.name]) <= {"loc"}:
                self.numbers[1] += weight.sum().cpu()
                self.numbers[2] += _noise_energy(site, weight)
            else:
                self.scales_noise = False

    def finish(
        self, scale: float, log_prior: float, prior_gradient: Tensor
    ) -> FitSummary:
        """The summary of all calls.

        Args:
            scale: What sums over the seen data are multiplied by.
            log_prior: That of one call; all have the same.
            prior_gradient: Its gradient over the subnet, shape (S,).

        Returns:
            The summary.
        """
        likelihood, weight, energy = (scale * self.numbers).tolist()
        gradient = prior_gradient.detach().to(torch.float64)
        scales = self.scales_noise and weight > 0
        return FitSummary(likelihood, log_prior, gradient, weight, energy, scales)


def prior_gradient(
    terms: Sequence[DensityTerm], leaves: Mapping[str, Tensor], subnet: Subnet
) -> Float[Tensor, " subnet"]:
    r"""Returns :math:`\nabla_S \log p(\theta)` at the leaves' values.

    Args:
        terms: The log prior, term by term, with its graph to the leaves.
        leaves: Unconstrained value of every latent site, in packing order.
        subnet: The chosen elements.

    Returns:
        Shape (S,), detached.
    """
    live = [term.log_density for term in terms if term.log_density.requires_grad]
    packed = [torch.zeros_like(leaf) for leaf in leaves.values()]
    if live:
        with differentiable():
            total = torch.stack([density.sum() for density in live]).sum()
            packed = list(
                torch.autograd.grad(
                    total,
                    list(leaves.values()),
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
            )
    return subnet.gather(torch.cat([part.flatten() for part in packed])).detach()


@torch.no_grad()
def _log_likelihood(site: OutputSite, weight: Tensor) -> Tensor:
    taken = site.distribution
    density = taken.base.log_prob(site.node["value"]).expand(taken.element_shape)
    density = density.reshape(-1).to(torch.float64)
    # What is masked may be NaN, which a weight of zero does not remove.
    return (density * weight).where(weight != 0, 0.0).sum().cpu()


@torch.no_grad()
def _noise_energy(site: OutputSite, weight: Tensor) -> Tensor:
    base: Any = site.distribution.base
    residual = ((site.node["value"] - base.loc) / base.scale).to(torch.float64)
    squared = residual.square().expand(site.distribution.element_shape).reshape(-1)
    return (squared * weight).where(weight != 0, 0.0).sum().cpu()
