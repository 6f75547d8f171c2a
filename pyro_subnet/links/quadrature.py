"""Gauss-Hermite quadrature over one Gaussian dimension."""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

# Nodes of a mixture, and the most that one number a datum is integrated with. An error
# is stated as the difference that half the nodes make.
NUM_NODES = 64
_FEW_NODES, _MOST_NODES = 32, 1024
# Weights below this move no sum in float64, and their nodes may overflow.
_LEAST_WEIGHT = 1e-24


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
    loc: Float[Tensor, "*batch"], scale: Float[Tensor, "*batch"]
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    r"""Logit of :math:`E\, \sigma(f)` for :math:`f \sim N(\mu, s^2)`.

    The nodes are doubled, up to 1024, until half as many change no probability by more
    than round-off: 32 serve up to s of about 1, 1024 up to about 9.

    Args:
        loc: Means, any shape.
        scale: Standard deviations, the same shape.

    Returns:
        The logit with all nodes, and with half of them.
    """
    num_nodes, tolerance = _FEW_NODES, 16 * torch.finfo(loc.dtype).eps
    coarse = _mean_logistic(loc, scale, num_nodes // 2)
    fine = _mean_logistic(loc, scale, num_nodes)
    while num_nodes < _MOST_NODES and _gap(fine, coarse) > tolerance:
        num_nodes *= 2
        coarse, fine = fine, _mean_logistic(loc, scale, num_nodes)
    return fine, coarse


def _gap(first: Tensor, second: Tensor) -> float:
    gap = (first.detach().sigmoid() - second.detach().sigmoid()).abs()
    return float(gap.amax()) if gap.numel() else 0.0


def _mean_logistic(loc: Tensor, scale: Tensor, num_nodes: int) -> Tensor:
    nodes, log_weights = gauss_hermite(num_nodes, loc)
    f = loc.unsqueeze(-1) + scale.unsqueeze(-1) * nodes
    logsigmoid = torch.nn.functional.logsigmoid
    # Both tails keep their digits.
    one = (log_weights + logsigmoid(f)).logsumexp(-1)
    zero = (log_weights + logsigmoid(-f)).logsumexp(-1)
    return one - zero
