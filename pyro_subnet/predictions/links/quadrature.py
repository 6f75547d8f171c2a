"""Quadrature over one Gaussian dimension."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributions as td
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_subnet.predictions.links.integration import (
    Integrated,
    Integration,
    by_halves,
    to_event,
)
from pyro_subnet.predictions.links.likelihood import mixture
from pyro_subnet.predictions.links.nodes import gauss_hermite, mixture_nodes

# Nodes and step of the two rules for the logistic function, and the standard deviation
# at which they change over: both are good to 1e-13 there.
_LOGISTIC_NODES, _LOGISTIC_STEP, _WIDE = 32, 0.5, 1.0
_LOGISTIC_REACH = 40.0


def mean_logistic(
    loc: Float[Tensor, "*batch"], scale: Float[Tensor, "*batch"], *, coarse: bool
) -> Float[Tensor, "*batch"]:
    r"""Returns the logit of :math:`E\, \sigma(f)` for :math:`f \sim N(\mu, s^2)`.

    To 1e-13 in probability at every s, with the digits of both tails: by Gauss-Hermite
    up to s = 1. Beyond, where that would take thousands of nodes, the two densities
    change places,

    .. math:: E\, \sigma(f) = P(t < f)
        = \int \sigma'(t)\, \Phi\big((\mu - t)/s\big)\, dt,

    and the trapezoidal rule has an error of :math:`e^{-2 \pi^2 / h}` at step h = 0.5.

    Source: Trefethen and Weideman (2014), doi 10.1137/130932132, for the rule.
    """
    half = 2 if coarse else 1
    wide = scale > _WIDE
    narrow_logit = _by_outputs(loc, scale.where(~wide, _WIDE), _LOGISTIC_NODES // half)
    wide_logit = _by_thresholds(loc, scale.where(wide, _WIDE), _LOGISTIC_STEP * half)
    return torch.where(wide, wide_logit, narrow_logit)


def by_quadrature(problem: Integration) -> Integrated:
    """The link ``"quadrature"``, for one scalar output an element."""
    likelihood = problem.likelihood
    loc, scale = problem.elementwise()
    if likelihood.family.distribution is td.Bernoulli:
        build: Any = likelihood.taken.constructor(likelihood.family)

        def integrated(coarse: bool) -> Any:
            logits = mean_logistic(loc, scale, coarse=coarse)
            return to_event(build(logits=logits), likelihood.rest)

        return by_halves(integrated)

    def mixed(coarse: bool) -> Any:
        z, log_weights = mixture_nodes(loc, coarse)
        eta = loc + scale * z.reshape(-1, *(1 for _ in loc.shape))
        flat = eta.reshape(len(z), len(loc), -1)
        return mixture(likelihood, flat, log_weights, len(likelihood.shape))

    return by_halves(mixed)


def _by_outputs(loc: Tensor, scale: Tensor, num_nodes: int) -> Tensor:
    """Sums the logistic function over values of the output."""
    nodes, log_weights = gauss_hermite(num_nodes, loc)
    f = loc.unsqueeze(-1) + scale.unsqueeze(-1) * nodes
    # logit E sigma(f) = log E sigma(f) - log E sigma(-f)
    one = (log_weights + logsigmoid(f)).logsumexp(-1)
    zero = (log_weights + logsigmoid(-f)).logsumexp(-1)
    return one - zero


def _by_thresholds(loc: Tensor, scale: Tensor, step: float) -> Tensor:
    """Sums the normal distribution function over values of a logistic threshold."""
    count = round(_LOGISTIC_REACH / step)
    nodes = step * torch.arange(-count, count + 1, dtype=loc.dtype, device=loc.device)
    log_weights = (logsigmoid(nodes) + logsigmoid(-nodes)).log_softmax(-1)
    z = (loc.unsqueeze(-1) - nodes) / scale.unsqueeze(-1)
    one = (log_weights + torch.special.log_ndtr(z)).logsumexp(-1)
    zero = (log_weights + torch.special.log_ndtr(-z)).logsumexp(-1)
    return one - zero
