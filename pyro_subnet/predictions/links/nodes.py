"""Nodes of sums that stand for an integral over one Gaussian dimension."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor

# Nodes of a mixture. An error is stated as the difference that half the nodes make.
_NUM_NODES = 64
# Weights below this move no sum in float64, and their nodes may overflow.
_LEAST_WEIGHT = 1e-24
# As arrays: a tensor that was first made in inference mode would have no gradients.
_hermite = lru_cache(maxsize=32)(hermegauss)


def gauss_hermite(num_nodes: int, like: Tensor) -> tuple[Tensor, Tensor]:
    r"""Returns nodes and log weights, :math:`E g(z) \approx \sum_k w_k g(z_k)`, (K,).

    For z standard normal; exact for polynomials of degree 2K - 1. Nodes of weight below
    1e-24 are left out.
    """
    nodes, weights = _hermite(num_nodes)
    weights = weights / weights.sum()
    kept = weights > _LEAST_WEIGHT
    at, log_weights = (torch.as_tensor(a[kept]) for a in (nodes, np.log(weights)))
    return at.to(like), log_weights.to(like)


def mixture_nodes(like: Tensor, coarse: bool) -> tuple[Tensor, Tensor]:
    """Nodes of a mixture and their log weights; half of them if coarse."""
    return gauss_hermite(_NUM_NODES // 2 if coarse else _NUM_NODES, like)
