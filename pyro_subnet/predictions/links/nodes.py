"""Nodes of sums that stand for an integral over one Gaussian dimension."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

# Nodes of a mixture. An error is stated as the difference that half the nodes make.
_NUM_NODES = 64
# Weights below this move no sum in float64, and their nodes may overflow.
_LEAST_WEIGHT = 1e-24


def gauss_hermite(num_nodes: int, like: Tensor) -> tuple[Tensor, Tensor]:
    r"""Returns nodes and log weights, :math:`E g(z) \approx \sum_k w_k g(z_k)`, (K,).

    For z standard normal; exact for polynomials of degree 2K - 1. Nodes of weight below
    1e-24 are left out.

    Source: Golub and Welsch (1969), doi 10.1090/S0025-5718-69-99647-1.
    """
    nodes, log_weights = _hermite(num_nodes)
    return nodes.to(like), log_weights.to(like)


@lru_cache(maxsize=32)
def _hermite(num_nodes: int) -> tuple[Tensor, Tensor]:
    off = torch.arange(1, num_nodes, dtype=torch.float64).sqrt()
    # Eigenvalues of the Jacobi matrix of the Hermite polynomials are the nodes, and the
    # squared first components of its eigenvectors the weights.
    nodes, vectors = torch.linalg.eigh(off.diag(1) + off.diag(-1))
    weights = vectors[0].square()
    kept = weights > _LEAST_WEIGHT
    return nodes[kept], (weights[kept] / weights[kept].sum()).log()


def mixture_nodes(like: Tensor, coarse: bool) -> tuple[Tensor, Tensor]:
    """Nodes of a mixture and their log weights; half of them if coarse."""
    return gauss_hermite(_NUM_NODES // 2 if coarse else _NUM_NODES, like)
