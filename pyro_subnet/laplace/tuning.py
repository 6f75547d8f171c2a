"""Prior precisions and noise scales of highest evidence, from what the fit summed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_subnet.exceptions import OptionError
from pyro_subnet.gaussians.base import CurvatureForm
from pyro_subnet.laplace.evidence import (
    prior_energy,
    prior_traces,
    scaled_log_likelihood,
    scaled_log_prior,
)
from pyro_subnet.laplace.search import (
    AT_BOUND,
    NUM_TRIED,
    Tuning,
    check_bounds,
    minimize,
)
from pyro_subnet.laplace.summary import FitSummary
from pyro_subnet.options import as_number
from pyro_subnet.subnet import Subnet

# Fixed-point rounds for one scale a site, halvings of a step that gains nothing, and
# the change in logarithms at which they have converged.
_ROUNDS = 100
_HALVINGS = 6
_CONVERGED = 1e-6


def check_tuning(
    method: str,
    val: Any,
    per_site: bool = False,
    standard_errors: int | float | None = None,
) -> None:
    """Refuses options of tuning that do not go together."""
    if method not in ("evidence", "nll"):
        raise OptionError(
            f"`method` must be 'evidence' or 'nll'; got {method!r}. Leave it out for "
            "the evidence."
        )
    if (method == "nll") != (val is not None):
        raise OptionError(
            "`val` must be given for method='nll', and only there; got "
            f"method={method!r} and {'no' if val is None else 'some'} `val`. Pass "
            "held-out data, such as `val=(x, y)`, with method='nll'."
        )
    if per_site and method == "nll":
        raise OptionError(
            "`per_site` must go with method='evidence'; got method='nll', for which a "
            "search over many scales would fit the held-out data. Leave it out."
        )
    if standard_errors is None:
        return
    as_number(standard_errors, "standard_errors", "2, say")
    if not 0 <= standard_errors < math.inf:
        raise OptionError(
            f"`standard_errors` must be finite and at least 0; got {standard_errors}. "
            "Leave it out for 2, or pass 0 for the best scale."
        )
    if standard_errors and method != "nll":
        raise OptionError(
            "`standard_errors` must go with method='nll', whose errors held-out data "
            f"tell; got method={method!r}. Leave it out."
        )


def check_noise_scales(summary: FitSummary) -> None:
    """Refuses held-out data for a noise that cannot be scaled."""
    if not summary.scales_noise:
        raise OptionError(
            "`val` must be for a model of normal noise, whose scale is all that `tune` "
            "sets on it; got observed sites that are not normal, such as classes, or a "
            "noise that chosen weights move, which the posterior knows already. Leave "
            "`val` out, which tunes the prior by the evidence."
        )


def tune_prior(
    form: CurvatureForm,
    summary: FitSummary,
    noise_factor: float,
    bounds: tuple[float, float],
) -> Tuning:
    r"""Returns the one prior scale s of highest evidence, and what was tried.

    Each s costs :math:`\log\det (G + s P_0)` alone: from one eigenvalue decomposition
    where P0 is a positive diagonal and memory allows, else from a factorization each.
    The noise factor is in ``form`` already.

    Source: MacKay (1992), "Bayesian interpolation", doi 10.1162/neco.1992.4.3.415.
    """
    check_bounds(bounds)
    size = len(summary.prior_gradient)
    energy = float(prior_energy(summary, form.prior).sum())
    noise = torch.tensor(noise_factor, dtype=torch.float64)
    constant = float(scaled_log_likelihood(summary, noise)) + summary.log_prior
    constant += 0.5 * size * math.log(2 * math.pi)
    find = form.log_det_function(NUM_TRIED)

    def loss(scale: float) -> float:
        log_det = float(find(torch.tensor(scale, dtype=torch.float64)))
        # The log prior's change: S/2 log s - (s - 1) / 2 sum_i g_i (P0^-1 g)_i
        log_prior = 0.5 * (size * math.log(scale) - (scale - 1) * energy)
        return -(constant + log_prior - 0.5 * log_det)

    return minimize(loss, bounds, "evidence", sign=-1.0)


def tune_site_priors(
    form: CurvatureForm,
    summary: FitSummary,
    subnet: Subnet,
    noise_factor: float,
    bounds: tuple[float, float],
) -> Tuning:
    r"""Returns one prior scale of highest evidence for each site with chosen weights.

    MacKay's fixed point for all sites at once,

    .. math:: s_k \leftarrow \gamma_k \,/\, \sum_{i \in k} g_i (P_0^{-1} g)_i,\qquad
        \gamma_k = S_k - s_k \sum_{i \in k} (P^{-1} P_0)_{ii}

    where :math:`\gamma_k` counts the weights of site k that the data determine. Steps
    that lower the evidence are halved. A round costs a factorization and the marginal
    variances. The noise factor is in ``form`` already.

    Source: MacKay (1992), "A practical Bayesian framework for backpropagation
    networks", doi 10.1162/neco.1992.4.3.448.
    """
    low, high = check_bounds(bounds)
    counts = {site: count for site, count in subnet.counts.items() if count}
    widths = list(counts.values())
    number = torch.tensor(widths, dtype=torch.float64)
    energy = _by_site(prior_energy(summary, form.prior), widths)
    noise = torch.tensor(noise_factor, dtype=torch.float64)
    fixed = float(scaled_log_likelihood(summary, noise))
    fixed += 0.5 * subnet.size * math.log(2 * math.pi)

    def look(scales: Tensor) -> tuple[float, Tensor]:
        each = scales.repeat_interleave(torch.tensor(widths))
        gaussian = form.rescaled(each).gaussian(form.prior.diagonal)
        # log p(D) + log p_s(MAP) + S/2 log 2 pi - 1/2 log det P
        evidence = float(scaled_log_prior(summary, form.prior, each)) + fixed
        evidence -= float(gaussian.half_log_det())
        return evidence, _by_site(prior_traces(gaussian, form.prior), widths)

    scales = torch.ones_like(number).clamp(low, high)
    best, traces = look(scales)
    tried = [(scales, best)]
    for _ in range(_ROUNDS):
        # gamma_k = S_k - s_k sum_i (P^-1 P0)_ii
        determined = (number - scales * traces).clamp(min=0.0)
        # A site whose weights all sit at the prior's mean is best held there.
        target = _ratio(determined, energy, high).clamp(min=low)
        step = target.log() - scales.log()
        gained = False
        for _ in range(_HALVINGS):
            proposal = scales * step.exp()
            found, new_traces = look(proposal)
            tried.append((proposal, found))
            if found >= best:
                scales, best, traces, gained = proposal, found, new_traces, True
                break
            step = 0.5 * step
        if not gained or float(step.abs().max()) < _CONVERGED:
            break
    chosen = dict(zip(counts, scales.tolist(), strict=True))
    edges = torch.tensor([low, high], dtype=torch.float64).log()
    gap = (scales.log().unsqueeze(-1) - edges).abs().min()
    return Tuning(
        "evidence",
        torch.stack([pair[0] for pair in tried]),
        torch.tensor([pair[1] for pair in tried], dtype=torch.float64),
        float(scales.log().mean().exp()),
        bool(gap < AT_BOUND),
        chosen,
    )


def tune_noise(
    form: CurvatureForm,
    summary: FitSummary,
    prior_factor: Tensor,
    likelihood_factors: Callable[[float], float],
    bounds: tuple[float, float],
) -> Tuning:
    r"""Returns the noise scale r of highest evidence, the prior precision held.

    .. math:: \log p(D) - W \log r + \tfrac12 E (1 - r^{-2})
        - \tfrac12 \log\det (r^{-2} G + s P_0)

    ``likelihood_factors`` gives the factor of the curvature of ``form`` at r.
    """
    check_bounds(bounds)
    size = len(summary.prior_gradient)
    # Raises an error if the noise is not normal and fixed.
    scaled_log_likelihood(summary, torch.tensor([0.5], dtype=torch.float64))
    constant = float(scaled_log_prior(summary, form.prior, prior_factor))
    constant += 0.5 * size * math.log(2 * math.pi)
    uniform = not prior_factor.ndim
    find = form.log_det_function(NUM_TRIED) if uniform else None

    def loss(scale: float) -> float:
        likelihood_factor = likelihood_factors(scale)
        if find is not None:
            # log det (c G + s P0) = S log c + log det (G + s/c P0)
            log_det = size * math.log(likelihood_factor)
            log_det += float(find(prior_factor / likelihood_factor))
        else:
            scaled = form.rescaled(prior_factor, likelihood_factor)
            gaussian = scaled.gaussian(form.prior.diagonal)
            log_det = 2 * float(gaussian.half_log_det())
        noise = torch.tensor(scale, dtype=torch.float64)
        likelihood = float(scaled_log_likelihood(summary, noise))
        return -(likelihood + constant - 0.5 * log_det)

    return minimize(loss, bounds, "evidence", sign=-1.0)


def _by_site(values: Tensor, widths: list[int]) -> Tensor:
    return torch.stack([part.sum() for part in values.split(widths)])


def _ratio(numerator: Tensor, denominator: Tensor, largest: float) -> Tensor:
    """A quotient that is at most ``largest``, also where nothing is divided by."""
    bounded = denominator.clamp(min=torch.finfo(denominator.dtype).tiny)
    return (numerator / bounded).clamp(max=largest)
