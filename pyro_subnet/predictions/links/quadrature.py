"""Quadrature over one Gaussian dimension."""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

# Nodes of a mixture. An error is stated as the difference that half the nodes make.
NUM_NODES = 64
# Weights below this move no sum in float64, and their nodes may overflow.
_LEAST_WEIGHT = 1e-24
# Nodes and step of the two rules for the logistic function, and the standard deviation
# at which they change over: both are good to 1e-13 there.
_LOGISTIC_NODES, _LOGISTIC_STEP, _WIDE = 32, 0.5, 1.0
_LOGISTIC_REACH = 40.0


def gauss_hermite(num_nodes: int, like: Tensor) -> tuple[Tensor, Tensor]:
    r"""Nodes and log weights with :math:`E g(z) \approx \sum_k w_k g(z_k)`.

    For z standard normal; exact for polynomials of degree 2K - 1. Nodes of weight below
    1e-24 are left out.

    Args:
        num_nodes: K.
        like: Dtype and device of the results.

    Returns:
        Nodes and log weights, shape (K,).

    Source: Golub and Welsch (1969), doi 10.1090/S0025-5718-69-99647-1.
    """
    nodes, log_weights = _hermite(num_nodes)
    return nodes.to(like), log_weights.to(like)


@lru_cache(maxsize=32)
def _hermite(num_nodes: int) -> tuple[Tensor, Tensor]:
    off = torch.arange(1, num_nodes, dtype=torch.float64).sqrt()
    nodes, vectors = torch.linalg.eigh(off.diag(1) + off.diag(-1))
    weights = vectors[0].square()
    kept = weights > _LEAST_WEIGHT
    return nodes[kept], (weights[kept] / weights[kept].sum()).log()


def mean_logistic(
    loc: Float[Tensor, "*batch"], scale: Float[Tensor, "*batch"], *, coarse: bool
) -> Float[Tensor, "*batch"]:
    r"""Logit of :math:`E\, \sigma(f)` for :math:`f \sim N(\mu, s^2)`.

    To 1e-13 in probability at every s: by Gauss-Hermite up to s = 1, and beyond, where
    that would take thousands of nodes, with the two densities changing places,

    .. math:: E\, \sigma(f) = P(t < f)
        = \int \sigma'(t)\, \Phi\big((\mu - t)/s\big)\, dt,

    by the trapezoidal rule, whose error is :math:`e^{-2 \pi^2 / h}` at step h = 0.5.

    Args:
        loc: Means, any shape.
        scale: Standard deviations, the same shape.
        coarse: Whether to take half of the nodes, for an estimate of the error.

    Returns:
        The same shape; both tails keep their digits.

    Source: Trefethen and Weideman (2014), doi 10.1137/130932132, for the rule.
    """
    half = 2 if coarse else 1
    wide = scale > _WIDE
    narrow_logit = _by_outputs(loc, scale.where(~wide, _WIDE), _LOGISTIC_NODES // half)
    wide_logit = _by_thresholds(loc, scale.where(wide, _WIDE), _LOGISTIC_STEP * half)
    return torch.where(wide, wide_logit, narrow_logit)


def _by_outputs(loc: Tensor, scale: Tensor, num_nodes: int) -> Tensor:
    """Sums the logistic function over values of the output."""
    nodes, log_weights = gauss_hermite(num_nodes, loc)
    f = loc.unsqueeze(-1) + scale.unsqueeze(-1) * nodes
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
