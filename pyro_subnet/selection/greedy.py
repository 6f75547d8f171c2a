r"""Greedy choices among candidate weights that count how they interact.

Of a part T of the candidates, with precision P and Gram matrix A of output gradients,

.. math:: f(T) = \operatorname{tr}(P_{TT}^{-1} A_{TT})
    = \sum_n \operatorname{tr} J_T P_{TT}^{-1} J_T^\top

is the linearized predictive variance that it keeps. It never falls as T grows: with the
weights of T eliminated, a further weight j has the precision
:math:`s_j = P_{jj} - P_{jT} P_{TT}^{-1} P_{Tj}` and the output gradient
:math:`r_j = J_j - J_T P_{TT}^{-1} P_{Tj}`, and adds :math:`|r_j|^2 / s_j`.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyro_subnet.exceptions import MemoryLimitError, OptionError, PrecisionError
from pyro_subnet.selection.base import largest
from pyro_subnet.tensors.memory import available_bytes

# M x M matrices that are held at once, in float64: P, A, and blocks of S rows.
MATRICES_TO_ADD, MATRICES_TO_EXCHANGE = 3, 5
_BYTES = 8
# Candidates by default, at least: the best by single scores are often alike, and fill a
# pool of a few small subnets' size before weights enter that would add to them.
_LEAST_POOL = 2048
# Round-off that the gains below may carry, relative to what they are differences of.
_NOISE = 1e-12


def check_pool(pool: int | float | None) -> None:
    """Refuses a pool smaller than the subnet.

    Args:
        pool: Candidates per chosen weight; None for the default.

    Raises:
        OptionError: If it is less than 1, or NaN.
    """
    if pool is not None and not pool >= 1:
        raise OptionError(
            f"`pool` must be at least 1, a candidate for each chosen weight; got "
            f"{pool}. Leave it out for the default."
        )


def pool_size(
    pool: int | float | None, size: int, num_params: int, default: float
) -> int:
    """How many candidates there are.

    Args:
        pool: Candidates per chosen weight; None for ``default``, and at least 2,048 in
            all.
        size: S.
        num_params: D.
        default: Candidates per chosen weight of large subnets.

    Returns:
        M, from S to D.
    """
    wanted = max(default * size, _LEAST_POOL) if pool is None else pool * size
    return max(size, round(min(wanted, num_params)))


def check_pool_fits(num_candidates: int, matrices: int, device: torch.device) -> None:
    """Refuses a pool of candidates whose matrices cannot be held.

    Args:
        num_candidates: M.
        matrices: How many M x M matrices are held at once.
        device: Where they will live.

    Raises:
        MemoryLimitError: If they do not fit; says the largest M that does.
    """
    needed = matrices * _BYTES * num_candidates**2
    free = available_bytes(device)
    if needed > free:
        most = math.isqrt(free // (matrices * _BYTES))
        raise MemoryLimitError(
            f"A pool of M candidates must have {matrices} M x M matrices that fit in "
            f"memory; got M={num_candidates}, which needs {needed / 2**30:.1f} GiB "
            f"where {free / 2**30:.1f} GiB are free. Choose `size` and `pool` so that "
            f"their product is at most {most}, or a selector by diagonal scores."
        )


def relative_noise(dtype: torch.dtype) -> float:
    """How far gains may differ and still count as equal.

    Args:
        dtype: Floating point type of the network.

    Returns:
        A relative difference, at least 1e-9: elimination adds to the round-off.
    """
    return max(1e-9, torch.finfo(dtype).eps ** 0.75)


def add_in_blocks_(
    precision: Float[Tensor, "pool pool"],
    gram: Float[Tensor, "pool pool"],
    size: int,
    *,
    block_size: int,
    noise: float,
) -> Int[Tensor, " chosen"]:
    r"""Chooses weights a block at a time, those that add most variance first.

    Within a block interactions are not counted; between blocks they are, exactly: each
    block is eliminated from the candidates that are left,

    .. math:: P \leftarrow P - P_{\cdot B} P_{BB}^{-1} P_{B \cdot}, \qquad
        A \leftarrow (I - W)^\top A\, (I - W), \quad W = P_{BB}^{-1} P_{B \cdot},

    in place. Costs 6 M^2 S operations, and memory for a few rows a block. A gain that
    is round-off counts as zero, and equal gains go by position.

    Args:
        precision: P, shape (M, M), symmetric, float64; overwritten.
        gram: A, shape (M, M), symmetric, float64; overwritten.
        size: S, at most M.
        block_size: Weights a block.
        noise: See :func:`relative_noise`.

    Returns:
        Positions among the candidates, shape (S,), block by block.

    Raises:
        PrecisionError: If P is not positive definite.
    """
    is_left = torch.ones(len(precision), dtype=torch.bool, device=precision.device)
    floor = _NOISE * gram.diagonal().clone()
    chosen: list[Tensor] = []
    missing = size
    while missing:
        gains = _per_precision(precision, gram, floor).where(is_left, -torch.inf)
        block = largest(gains, min(block_size, missing), noise).sort().values
        is_left[block] = False
        chosen.append(block)
        missing -= len(block)
        if missing:
            _eliminate_(precision, gram, block)
    return torch.cat(chosen)


def exchange_(
    precision: Float[Tensor, "pool pool"],
    gram: Float[Tensor, "pool pool"],
    start: Int[Tensor, " chosen"],
    *,
    max_swaps: int,
    noise: float,
) -> Int[Tensor, " chosen"]:
    r"""Swaps weights of a set for others while that raises the variance it keeps.

    The chosen weight whose removal costs least leaves; of all others the one that then
    adds most enters; the first swap that adds nothing ends it. Both prices count all
    interactions: in the tableau of P swept on the set, with the columns of J reduced
    alongside, each is the Gram matrix's diagonal over the tableau's. So the variance
    kept rises with every swap, up to a set that no such swap improves.

    Costs 6 M^2 S operations to start and 16 M^2 a swap, and memory for a few S x M
    blocks.

    Args:
        precision: P, shape (M, M), symmetric, float64; overwritten.
        gram: A, shape (M, M), symmetric, float64; overwritten.
        start: The set to start from, shape (S,).
        max_swaps: How many at most.
        noise: See :func:`relative_noise`.

    Returns:
        Positions among the candidates, ascending, shape (S,).

    Raises:
        PrecisionError: If P is not positive definite.
    """
    inside = torch.zeros(len(precision), dtype=torch.bool, device=precision.device)
    inside[start] = True
    if bool(inside.all()) or not max_swaps:
        return start.sort().values
    floor = _NOISE * gram.diagonal().clone()
    _eliminate_(precision, gram, start, keep=True)
    for _ in range(max_swaps):
        losses = _per_precision(precision, gram, 0.0 * floor)
        leaves = largest((-losses).where(inside, -torch.inf), 1, noise)
        _sweep_(precision, gram, int(leaves), remove=True)
        inside[leaves] = False
        gains = _per_precision(precision, gram, floor).where(~inside, -torch.inf)
        enters = largest(gains, 1, noise)
        better = bool(gains[enters] > gains[leaves] * (1 + noise))
        enters = enters if better else leaves
        inside[enters] = True
        if not better:
            break
        _sweep_(precision, gram, int(enters), remove=False)
    return inside.nonzero().squeeze(-1)


def _per_precision(precision: Tensor, gram: Tensor, floor: Tensor) -> Tensor:
    """Variance that each weight adds, or takes away; 0 where that is round-off."""
    square = gram.diagonal()
    return (square / precision.diagonal().abs()).where(square > floor, 0.0)


def _eliminate_(
    precision: Tensor, gram: Tensor, block: Tensor, *, keep: bool = False
) -> None:
    """P and A of the other weights, given a block; in place.

    Args:
        precision: P, symmetric.
        gram: A, symmetric.
        block: Positions.
        keep: Whether to leave the block's part of the swept tableau, and of the Gram
            matrix, in its rows and columns; what stands there has no meaning otherwise.

    Raises:
        PrecisionError: If P is not positive definite.
    """
    cross, between = precision[block], gram[block]
    factor, info = torch.linalg.cholesky_ex(cross[:, block])
    if int(info):
        smallest = float(torch.linalg.eigvalsh(cross[:, block])[0])
        raise PrecisionError(
            "The precision over the candidates must be positive definite; got smallest "
            f"eigenvalue {smallest:.3e} in a block of {len(block)}. Train closer to "
            "the MAP, run the model in float64, or choose by diagonal scores."
        )
    weights = torch.cholesky_solve(cross, factor)
    inner = between[:, block]
    precision.addmm_(cross.mT, weights, alpha=-1.0)
    half = torch.addmm(between, inner, weights, alpha=-0.5)
    gram.addmm_(half.mT, weights, alpha=-1.0)
    gram.addmm_(weights.mT, half, alpha=-1.0)
    if not keep:
        return
    inverse = torch.cholesky_inverse(factor)
    _set_cross_(precision, block, weights, -inverse)
    reduced = inverse @ between.addmm_(inner.clone(), weights, alpha=-1.0)
    _set_cross_(gram, block, reduced, inverse @ inner @ inverse)


def _set_cross_(matrix: Tensor, block: Tensor, rows: Tensor, own: Tensor) -> None:
    """Sets the rows and columns of a block in a symmetric matrix."""
    matrix[block] = rows
    matrix[:, block] = rows.mT
    matrix[block[:, None], block] = own


def _sweep_(tableau: Tensor, gram: Tensor, k: int, *, remove: bool) -> None:
    r"""Sweeps weight k into the set, or out of it, in place.

    A column of the reduced gradients is :math:`r_j` outside the set and
    :math:`J_T P_{TT}^{-1} e_j` inside it. Both ways, with
    :math:`t_j = T_{kj} / T_{kk}`, column j loses :math:`t_j` times column k, and column
    k is scaled by :math:`\pm 1 / T_{kk}`.

    Source: Dempster (1969), "Elements of Continuous Multivariate Analysis", on the
    sweep and reverse sweep of symmetric matrices.
    """
    row, pivot = tableau[k].clone(), float(tableau[k, k])
    sign = -1.0 if remove else 1.0
    steps = row / pivot
    tableau.addr_(row, row, alpha=-1.0 / pivot)
    tableau[k] = sign * steps
    tableau[:, k] = sign * steps
    tableau[k, k] = -1.0 / pivot
    steps[k] = 1.0 - sign / pivot
    column = gram[:, k].clone()
    gram.addr_(column, steps, alpha=-1.0)
    gram.addr_(steps, column, alpha=-1.0)
    gram.addr_(steps, steps, alpha=float(column[k]))
