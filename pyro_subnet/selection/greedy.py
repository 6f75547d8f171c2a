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

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyro_subnet.exceptions import MemoryLimitError, OptionError, PrecisionError
from pyro_subnet.memory import available_bytes
from pyro_subnet.selection.base import largest

# P and A in float64, and as much again while they are made or eliminated from.
_MATRICES = 4
_BYTES = 8
# Gains and losses closer than this count as equal: a cycle of exchanges ends.
_RELATIVE = 1e-9
# Round-off that the gains below may carry, relative to what they are differences of.
_NOISE = 1e-12


def check_pool(pool: int | float) -> None:
    """Refuses a pool smaller than the subnet.

    Args:
        pool: Candidates per chosen weight.

    Raises:
        OptionError: If it is less than 1, or NaN.
    """
    if not pool >= 1:
        raise OptionError(
            f"`pool` must be at least 1, a candidate for each chosen weight; got "
            f"{pool}. Leave it out for the default."
        )


def pool_size(pool: int | float, size: int, num_params: int) -> int:
    """How many candidates there are.

    Args:
        pool: Candidates per chosen weight.
        size: S.
        num_params: D.

    Returns:
        M, from S to D.
    """
    return max(size, round(min(pool * size, num_params)))


def check_pool_fits(num_candidates: int, device: torch.device) -> None:
    """Refuses a pool of candidates whose matrices cannot be held.

    Args:
        num_candidates: M.
        device: Where they will live.

    Raises:
        MemoryLimitError: If four M x M matrices do not fit; says the largest M that
            does.
    """
    needed = _MATRICES * _BYTES * num_candidates**2
    free = available_bytes(device)
    if needed > free:
        most = int((free / (_MATRICES * _BYTES)) ** 0.5)
        raise MemoryLimitError(
            f"A pool of M candidates must have {_MATRICES} M x M matrices that fit in "
            f"memory; got M={num_candidates}, which needs {needed / 2**30:.1f} GiB "
            f"where {free / 2**30:.1f} GiB are free. Choose a size and `pool` whose "
            f"product is at most {most}, or method='diagonal'."
        )


def add_in_blocks(
    precision: Float[Tensor, "pool pool"],
    gram: Float[Tensor, "pool pool"],
    size: int,
    block_size: int,
) -> Int[Tensor, " chosen"]:
    r"""Chooses weights a block at a time, those that add most variance first.

    Within a block interactions are not counted; between blocks they are, exactly: each
    block is eliminated from the candidates that are left,

    .. math:: P \leftarrow P - P_{\cdot B} P_{BB}^{-1} P_{B \cdot}, \qquad
        A \leftarrow (I - W)^\top A\, (I - W), \quad W = P_{BB}^{-1} P_{B \cdot}.

    Costs about 6 M^2 S operations, and memory for two M x M matrices beside its
    arguments. A gain that is round-off counts as zero, and equal gains go by position.

    Args:
        precision: P, shape (M, M), symmetric, float64.
        gram: A, shape (M, M), symmetric, float64.
        size: S, at most M.
        block_size: Weights a block.

    Returns:
        Positions among the candidates, shape (S,), in the order of choice.

    Raises:
        PrecisionError: If P is not positive definite.
    """
    left = torch.arange(len(precision), device=precision.device)
    alone = gram.diagonal()
    chosen: list[Tensor] = []
    missing = size
    while missing:
        gains = _per_precision(precision, gram, _NOISE * alone)
        block = largest(gains, min(block_size, missing), _RELATIVE).sort().values
        chosen.append(left[block])
        missing -= len(block)
        rest = torch.ones_like(left, dtype=torch.bool).index_fill_(0, block, False)
        left, alone = left[rest], alone[rest]
        if missing:
            precision, gram = _eliminated(precision, gram, block, rest)
    return torch.cat(chosen)


def exchange(
    precision: Float[Tensor, "pool pool"],
    gram: Float[Tensor, "pool pool"],
    start: Int[Tensor, " chosen"],
    max_swaps: int,
) -> Int[Tensor, " chosen"]:
    r"""Swaps weights of a set for others while that raises the variance it keeps.

    The chosen weight whose removal costs least leaves; of all others the one that then
    adds most enters; the first swap that adds nothing ends it. Both prices count all
    interactions: in the tableau of P swept on the set, with the rows of J reduced
    alongside, each is the Gram matrix's diagonal over the tableau's. So the variance
    kept rises with every swap, up to a set that no such swap improves.

    Costs 6 M^2 S operations to start, about 14 M^2 a swap, and memory for two M x M
    matrices beside its arguments.

    Args:
        precision: P, shape (M, M), symmetric, float64.
        gram: A, shape (M, M), symmetric, float64.
        start: The set to start from, shape (S,).
        max_swaps: How many at most.

    Returns:
        Positions among the candidates, ascending, shape (S,).

    Raises:
        PrecisionError: If P is not positive definite.
    """
    order = torch.cat([start, _others(len(precision), start)])
    size = len(start)
    tableau, reduced = precision[order][:, order], gram[order][:, order]
    alone = reduced.diagonal().clone()
    _sweep_leading_(tableau, reduced, size)
    inside = torch.arange(len(order), device=order.device) < size
    for _ in range(max_swaps if size < len(order) else 0):
        losses = _per_precision(tableau, reduced, torch.zeros_like(alone))
        out = largest((-losses).where(inside, -torch.inf), 1, _RELATIVE)
        _sweep_(tableau, reduced, int(out), remove=True)
        inside[out] = False
        gains = _per_precision(tableau, reduced, _NOISE * alone)
        enters = largest(gains.where(~inside, -torch.inf), 1, _RELATIVE)
        better = bool(gains[enters] > gains[out] * (1 + _RELATIVE))
        enters = enters if better else out
        _sweep_(tableau, reduced, int(enters), remove=False)
        inside[enters] = True
        if not better:
            break
    return order[inside].sort().values


def _others(count: int, chosen: Tensor) -> Tensor:
    mask = torch.ones(count, dtype=torch.bool, device=chosen.device)
    return mask.index_fill_(0, chosen, False).nonzero().squeeze(-1)


def _per_precision(precision: Tensor, gram: Tensor, floor: Tensor) -> Tensor:
    """Variance that each weight adds, or takes away; 0 where that is round-off."""
    square = gram.diagonal()
    return (square / precision.diagonal().abs()).where(square > floor, 0.0)


def _factor(block: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(block)
    if int(info):
        smallest = float(torch.linalg.eigvalsh(block)[0])
        raise PrecisionError(
            "The precision over the candidates must be positive definite; got "
            f"smallest eigenvalue {smallest:.3e} in a block of {len(block)}. Train "
            "closer to the MAP, run the model in float64, or use method='diagonal'."
        )
    return factor


def _eliminated(
    precision: Tensor, gram: Tensor, block: Tensor, rest: Tensor
) -> tuple[Tensor, Tensor]:
    """P and A of the rest, given a block."""
    cross = precision[block][:, rest]
    weights = torch.cholesky_solve(cross, _factor(precision[block][:, block]))
    inner, between = gram[block][:, block], gram[block][:, rest]
    # (A_rB - W^T A_BB / 2) W, and its transpose
    half = (between - 0.5 * inner @ weights).mT @ weights
    left = precision[rest][:, rest].addmm_(cross.mT, weights, alpha=-1.0)
    reduced = gram[rest][:, rest].sub_(half).sub_(half.mT)
    return left, reduced


def _sweep_leading_(tableau: Tensor, gram: Tensor, size: int) -> None:
    """Sweeps the first S weights at once."""
    cross, own = tableau[:size, size:].clone(), tableau[:size, :size]
    factor = _factor(own)
    inverse = torch.cholesky_inverse(factor)
    weights = torch.cholesky_solve(cross, factor)
    inner, between = gram[:size, :size].clone(), gram[:size, size:].clone()
    tableau[size:, size:].addmm_(cross.mT, weights, alpha=-1.0)
    tableau[:size, :size] = -inverse
    tableau[:size, size:] = weights
    tableau[size:, :size] = weights.mT
    half = (between - 0.5 * inner @ weights).mT @ weights
    gram[size:, size:].sub_(half).sub_(half.mT)
    gram[:size, :size] = inverse @ inner @ inverse
    gram[:size, size:] = inverse @ (between - inner @ weights)
    gram[size:, :size] = gram[:size, size:].mT


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
