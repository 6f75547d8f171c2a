r"""The Laplace evidence of the subnet, under any prior precision and noise scale.

Only what the fit has summed is read: no function here passes over the data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.curvature.prior import PriorPrecision
from pyro_subnet.exceptions import OptionError, PrecisionError
from pyro_subnet.fit.summary import FitSummary
from pyro_subnet.gaussians.base import CurvatureForm
from pyro_subnet.gaussians.factored import Gaussian
from pyro_subnet.subnet import Subnet

# What a prior precision may be multiplied by: one number for all sites, or one a site.
SiteScales = float | Tensor | Mapping[str, float | Tensor]


def log_evidence(
    form: CurvatureForm,
    summary: FitSummary,
    prior_scale: Float[Tensor, ""] | Float[Tensor, " subnet"],
    noise_scale: Float[Tensor, ""],
    likelihood_scale: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    r"""Laplace's approximation of the log marginal likelihood.

    .. math:: \log p(D \mid \hat\theta) + \log p(\hat\theta) + \tfrac S2 \log 2\pi
        - \tfrac12 \log\det P

    Args:
        form: Curvature of likelihood and prior.
        summary: The log joint density at the MAP.
        prior_scale: s of each weight's prior, or of all: differentiable once.
        noise_scale: r, what the model's noise is multiplied by: differentiable once.
        likelihood_scale: What the curvature of ``form`` is to be multiplied by at that
            r, differentiable once.

    Returns:
        Nats, float64.

    Raises:
        OptionError: If the noise is to be scaled and is not normal and fixed.
        PrecisionError: If the precision, or a prior that is scaled, is not positive
            definite.

    Source: MacKay (1992), "A practical Bayesian framework for backpropagation
    networks", doi 10.1162/neco.1992.4.3.448; Immer et al. (2021), arXiv 2104.04975.
    """
    size = len(summary.prior_gradient)
    prior_scale, noise_scale = prior_scale.double().cpu(), noise_scale.double().cpu()
    likelihood_scale = likelihood_scale.double().cpu()
    log_det: Tensor = _LogDet.apply(prior_scale, likelihood_scale, form)
    return (
        scaled_log_likelihood(summary, noise_scale)
        + scaled_log_prior(summary, form.prior, prior_scale)
        + 0.5 * size * math.log(2 * math.pi)
        - 0.5 * log_det
    )


def scaled_log_likelihood(
    summary: FitSummary, noise_scale: Float[Tensor, "*scales"]
) -> Float[Tensor, "*scales"]:
    r"""Log likelihood at the MAP with all noise multiplied by r.

    .. math:: \log p(D) - W \log r + \tfrac12 E (1 - r^{-2})

    with the weight W of the data and the energy E of :class:`FitSummary`.

    Args:
        summary: The log joint density at the MAP.
        noise_scale: r, any shape.

    Returns:
        Nats, the same shape.

    Raises:
        OptionError: If r is not 1, and the noise is not normal and fixed.
    """
    if not summary.scales_noise:
        if noise_scale.requires_grad or bool((noise_scale != 1).any()):
            raise OptionError(
                "A noise scale must be that of normal observed sites whose scale no "
                "chosen weight moves; got other observed sites, or a noise in the "
                "subnet, which the posterior knows already. Leave `noise_scale` out."
            )
        return torch.full_like(noise_scale, summary.log_likelihood)
    excess = 0.5 * summary.noise_energy * (1 - noise_scale.pow(-2))
    return summary.log_likelihood - summary.noise_weight * noise_scale.log() + excess


def scaled_log_prior(
    summary: FitSummary, prior: PriorPrecision, prior_scale: Tensor
) -> Tensor:
    r"""Log prior at the MAP with the subnet's precision multiplied by s.

    .. math:: \log p(\hat\theta) + \tfrac12 \sum_i \log s_i
        - \tfrac12 \sum_i (s_i - 1)\, g_i (P_0^{-1} g)_i

    with the log prior's gradient g: exact for normal priors, whose quadratic form this
    is. Any other prior is taken as the normal of the same value, gradient and curvature
    at the MAP.

    Args:
        summary: The log joint density at the MAP.
        prior: P0.
        prior_scale: s, shape () or (S,), float64.

    Returns:
        Nats, float64.

    Raises:
        PrecisionError: If s is not 1, and the prior has no positive precision.
    """
    size = len(summary.prior_gradient)
    if not prior_scale.requires_grad and bool((prior_scale == 1).all()):
        return prior_scale.new_tensor(summary.log_prior)
    energy = prior_energy(summary, prior)
    logs, excess = prior_scale.log(), (prior_scale - 1) * energy
    half = 0.5 * (logs.expand(size).sum() - excess.sum())
    return summary.log_prior + half


def prior_energy(
    summary: FitSummary, prior: PriorPrecision
) -> Float[Tensor, " subnet"]:
    r"""Terms :math:`g_i (P_0^{-1} g)_i`, for a normal prior :math:`(\theta-m)^2 / v`.

    Args:
        summary: The log joint density at the MAP.
        prior: P0.

    Returns:
        Shape (S,), float64, on the CPU.

    Raises:
        PrecisionError: If P0 is not positive definite.
    """
    gradient = summary.prior_gradient.cpu()
    diagonal = prior.diagonal.to(torch.float64).cpu()
    failed = bool((diagonal <= 0).any())
    found = gradient / diagonal
    if prior.coupled.numel() and not failed:
        dense = torch.zeros(len(diagonal), len(diagonal), dtype=torch.float64)
        on_cpu = PriorPrecision(
            diagonal, prior.coupled.cpu(), prior.columns.to(torch.float64).cpu()
        )
        on_cpu.add_to_lower_(dense, 1.0)
        factor, info = torch.linalg.cholesky_ex(dense)
        failed = bool(info)
        found = torch.cholesky_solve(gradient.unsqueeze(-1), factor).squeeze(-1)
    if failed:
        raise PrecisionError(
            "A prior that is scaled must have a positive definite precision over the "
            f"subnet; got one with diagonal entries from {float(diagonal.min()):.3e}. "
            "Leave `prior_scale` at 1, or choose sites whose prior curves."
        )
    return gradient * found


def prior_traces(gaussian: Gaussian, prior: PriorPrecision) -> Float[Tensor, " subnet"]:
    r"""Diagonal of :math:`P^{-1} P_0`: how much of each weight is left to the prior.

    Args:
        gaussian: The Gaussian of precision P.
        prior: P0.

    Returns:
        Shape (S,), float64, on the CPU.
    """
    traces = (gaussian.variance() * prior.diagonal).to(torch.float64)
    at = prior.coupled
    if at.numel():
        unit = gaussian.loc.new_zeros(at.numel(), gaussian.size)
        unit[torch.arange(at.numel(), device=at.device), at] = 1.0
        # Columns of the covariance, and of P0 without its diagonal.
        covariance = (gaussian.draw(gaussian.whiten(unit)) - gaussian.loc).mT
        own = torch.zeros_like(prior.columns, dtype=torch.bool)
        own[at, torch.arange(at.numel(), device=at.device)] = True
        products = (covariance * prior.columns.masked_fill(own, 0.0)).double()
        free = torch.ones_like(traces, dtype=torch.bool).index_fill(0, at, False)
        traces += products.sum(1).where(free, 0.0)
        traces[at] += products.sum(0)
    return traces.cpu()


def site_scales(
    prior_scale: SiteScales, subnet: Subnet, name: str = "prior_scale"
) -> Tensor:
    """What each weight's prior precision is multiplied by.

    Args:
        prior_scale: One number, or ``{site: number}``; sites that are left out keep
            the model's own prior precision.
        subnet: The chosen elements.
        name: The argument's name, for the message of an error.

    Returns:
        Shape () or (S,), float64, differentiable.

    Raises:
        OptionError: If a scale is not a positive finite number.
        SelectionError: If a site is not a latent site of the model.
    """
    if not isinstance(prior_scale, Mapping):
        scale = torch.as_tensor(prior_scale, dtype=torch.float64)
        _check_scale(scale, f"`{name}`")
        return scale
    for site, value in prior_scale.items():
        subnet.layout.shape(site)
        _check_scale(torch.as_tensor(value), f"`{name}` of site {site!r}")
    parts = [
        torch.as_tensor(prior_scale.get(site, 1.0), dtype=torch.float64).expand(count)
        for site, count in subnet.counts.items()
    ]
    return torch.cat(parts)


def _check_scale(scale: Tensor, name: str) -> None:
    if scale.ndim or not bool(scale.isfinite() & (scale > 0)):
        raise OptionError(
            f"{name} must be positive and finite; got {scale.tolist()}. Pass 1.0 for "
            "the model's own prior precision."
        )


@final
class _LogDet(torch.autograd.Function):
    r""":math:`\log\det (c G + s P_0)`, once differentiable in s and c.

    .. math:: \partial_{s_i} = (P^{-1} P_0)_{ii},\qquad
        \partial_c = (S - \textstyle\sum_i s_i (P^{-1} P_0)_{ii}) / c
    """

    @staticmethod
    def forward(
        ctx: Any, prior_scale: Tensor, likelihood_scale: Tensor, form: CurvatureForm
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        s, c = prior_scale.detach(), float(likelihood_scale)
        needs = any(ctx.needs_input_grad[:2])
        if not s.ndim and not needs:
            size = len(form.prior.diagonal)
            find = form.log_det_function(1)
            return size * math.log(c) + find(s / c).cpu()
        scaled = form.rescaled(float(s) if not s.ndim else s, c)
        gaussian = scaled.gaussian(form.prior.diagonal)
        if needs:
            traces = prior_traces(gaussian, form.prior)
            ctx.save_for_backward(traces, s, likelihood_scale)
        return 2 * gaussian.half_log_det().to(torch.float64).cpu()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, output_gradient: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        if output_gradient is None:
            return None, None, None
        traces, s, c = ctx.saved_tensors
        along_s = traces if s.ndim else traces.sum()
        along_c = (len(traces) - (s * traces).sum()) / c
        return output_gradient * along_s, output_gradient * along_c, None
