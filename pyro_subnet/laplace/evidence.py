r"""The Laplace evidence of the subnet, under any prior precision and noise scale.

Only what the fit has summed is read: no function here passes over the data.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.curvature.prior import PriorPrecision
from pyro_subnet.exceptions import OptionError, PrecisionError
from pyro_subnet.gaussians.base import CurvatureForm, Gaussian
from pyro_subnet.laplace.summary import FitSummary


def log_evidence(
    form: CurvatureForm,
    summary: FitSummary,
    prior_factor: Float[Tensor, ""] | Float[Tensor, " subnet"],
    noise_factor: Float[Tensor, ""],
    likelihood_factor: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    r"""Returns Laplace's approximation of the log marginal likelihood, nats, float64.

    .. math:: \log p(D \mid \hat\theta) + \log p(\hat\theta) + \tfrac S2 \log 2\pi
        - \tfrac12 \log\det P

    It is differentiable once in all three factors: s of each weight's prior, or of all;
    r of the model's noise; and what the curvature of ``form`` is to be multiplied by at
    r.

    Source: MacKay (1992), "A practical Bayesian framework for backpropagation
    networks", doi 10.1162/neco.1992.4.3.448; Immer et al. (2021), arXiv 2104.04975.
    """
    size = len(summary.prior_gradient)
    prior_factor = prior_factor.double().cpu()
    noise_factor = noise_factor.double().cpu()
    likelihood_factor = likelihood_factor.double().cpu()
    log_det: Tensor = _LogDet.apply(prior_factor, likelihood_factor, form)
    return (
        scaled_log_likelihood(summary, noise_factor)
        + scaled_log_prior(summary, form.prior, prior_factor)
        + 0.5 * size * math.log(2 * math.pi)
        - 0.5 * log_det
    )


def scaled_log_likelihood(
    summary: FitSummary, noise_factor: Float[Tensor, "*factors"]
) -> Float[Tensor, "*factors"]:
    """Log likelihood at the MAP with all noise multiplied by r, any shape; nats."""
    if not summary.scales_noise:
        if noise_factor.requires_grad or bool((noise_factor != 1).any()):
            raise OptionError(
                "A noise scale must be that of normal observed sites whose scale no "
                "chosen weight moves; got other observed sites, or a noise in the "
                "subnet, which the posterior knows already. Leave `noise_factor` out."
            )
        return torch.full_like(noise_factor, summary.log_likelihood)
    # log p(D) - W log r + E (1 - r^-2) / 2: the weight W and energy E of the noise
    excess = 0.5 * summary.noise_energy * (1 - noise_factor.pow(-2))
    return summary.log_likelihood - summary.noise_weight * noise_factor.log() + excess


def scaled_log_prior(
    summary: FitSummary, prior: PriorPrecision, prior_factor: Tensor
) -> Tensor:
    r"""Returns the log prior at the MAP with the subnet's precision multiplied by s.

    .. math:: \log p(\hat\theta) + \tfrac12 \sum_i \log s_i
        - \tfrac12 \sum_i (s_i - 1)\, g_i (P_0^{-1} g)_i

    with the log prior's gradient g: exact for normal priors, whose quadratic form this
    is. Any other prior is taken as the normal of the same value, gradient and curvature
    at the MAP. In nats, float64.
    """
    size = len(summary.prior_gradient)
    if not prior_factor.requires_grad and bool((prior_factor == 1).all()):
        return prior_factor.new_tensor(summary.log_prior)
    energy = prior_energy(summary, prior)
    logs, excess = prior_factor.log(), (prior_factor - 1) * energy
    half = 0.5 * (logs.expand(size).sum() - excess.sum())
    return summary.log_prior + half


def unscaled_summary(
    scaled: FitSummary, prior: PriorPrecision, prior_factor: Tensor, noise_factor: float
) -> FitSummary:
    """Undoes both of the above: the summary of a model from that under its factors.

    Args:
        scaled: The summary under the factors.
        prior: P0 of the model's own prior.
        prior_factor: s, () or (S,), float64.
        noise_factor: r.

    Returns:
        The summary, to which the factors give ``scaled``. What elements outside the
        subnet add to the log prior is left as it is.
    """
    gradient = scaled.prior_gradient / prior_factor.to(scaled.prior_gradient.device)
    energy = scaled.noise_energy * noise_factor**2
    # What the factors add to either log density does not depend on it.
    zero = replace(
        scaled,
        log_likelihood=0.0,
        log_prior=0.0,
        prior_gradient=gradient,
        noise_energy=energy,
    )
    noise = torch.tensor(noise_factor, dtype=torch.float64)
    return replace(
        zero,
        log_likelihood=scaled.log_likelihood
        - float(scaled_log_likelihood(zero, noise)),
        log_prior=scaled.log_prior - float(scaled_log_prior(zero, prior, prior_factor)),
    )


def prior_energy(
    summary: FitSummary, prior: PriorPrecision
) -> Float[Tensor, " subnet"]:
    """Terms :math:`g_i (P_0^{-1} g)_i`, (S,), float64, on the CPU."""
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
            "Leave `prior_factor` at 1, or choose sites whose prior curves."
        )
    # The sum is (theta - m)^T P0 (theta - m) for a normal prior of mean m.
    return gradient * found


def prior_traces(gaussian: Gaussian, prior: PriorPrecision) -> Float[Tensor, " subnet"]:
    """Diagonal of :math:`P^{-1} P_0`, float64: what is left to each weight's prior."""
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
        # (P^-1 P0)_ii: sum over coupled columns for a free i, else over all rows.
        free = torch.ones_like(traces, dtype=torch.bool).index_fill(0, at, False)
        traces += products.sum(1).where(free, 0.0)
        traces[at] += products.sum(0)
    return traces.cpu()


@final
class _LogDet(torch.autograd.Function):
    r""":math:`\log\det (c G + s P_0)`, once differentiable in s and c.

    .. math:: \partial_{s_i} = (P^{-1} P_0)_{ii},\qquad
        \partial_c = (S - \textstyle\sum_i s_i (P^{-1} P_0)_{ii}) / c
    """

    @staticmethod
    def forward(
        ctx: Any, prior_factor: Tensor, likelihood_factor: Tensor, form: CurvatureForm
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        s, c = prior_factor.detach(), float(likelihood_factor)
        needs = any(ctx.needs_input_grad[:2])
        if not s.ndim and not needs:
            # log det (c G + s P0) = S log c + log det (G + s/c P0)
            size = len(form.prior.diagonal)
            find = form.log_det_function(1)
            return size * math.log(c) + find(s / c).cpu()
        scaled = form.rescaled(float(s) if not s.ndim else s, c)
        gaussian = scaled.gaussian(form.prior.diagonal)
        if needs:
            traces = prior_traces(gaussian, form.prior)
            ctx.save_for_backward(traces, s, likelihood_factor)
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
