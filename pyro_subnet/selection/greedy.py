r"""Greedy choices among candidate weights, with their interactions counted.

For a subset T of the candidates, with precision P and Gram matrix A of output
gradients,

.. math:: f(T) = \operatorname{tr}(P_{TT}^{-1} A_{TT})
    = \sum_n \operatorname{tr} J_T P_{TT}^{-1} J_T^\top

is the linearized predictive variance that the subset keeps. It never falls as T grows.
With the weights of T eliminated, a further weight j has the precision
:math:`s_j = P_{jj} - P_{jT} P_{TT}^{-1} P_{Tj}` and the output gradient
:math:`r_j = J_j - J_T P_{TT}^{-1} P_{Tj}`, and adds :math:`|r_j|^2 / s_j`.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyro_subnet.exceptions import MemoryLimitError, OptionError
from pyro_subnet.selection.base import largest
from pyro_subnet.selection.held_gram import HeldGram, lower_factor
from pyro_subnet.tensors.memory import available_bytes
from pyro_subnet.tensors.modes import at_least_float32

# M x M float64 matrices that an exchange holds at once: P, A, and blocks of S rows.
MATRICES_TO_EXCHANGE = 5.0
_BYTES = 8
# Fewest candidates by default. The best weights by single scores are often alike: of a
# small subnet they fill the pool, and weights that would add to them stay outside.
_LEAST_POOL = 2048
# Round-off of a gain, relative to the numbers whose difference it is.
_NOISE = 1e-12


def check_pool(pool: int | float | None) -> None:
    """Refuses a pool smaller than the subnet, in candidates per chosen weight."""
    if pool is not None and not pool >= 1:
        raise OptionError(
            f"`pool` must be at least 1, a candidate for each chosen weight; got "
            f"{pool}. Leave it out for the default."
        )


def pool_size(
    pool: int | float | None, size: int, num_params: int, default: float
) -> int:
    """M, from S to D; ``default`` is the candidates per chosen weight."""
    wanted = max(default * size, _LEAST_POOL) if pool is None else pool * size
    return max(size, round(min(wanted, num_params)))


def matrices_to_add(num_candidates: int, size: int, dtype: torch.dtype) -> float:
    """M x M float64 matrices held to choose S weights: P, A, J, and three of S rows."""
    # J has two rows for each candidate, in the network's type or in float32.
    width = torch.finfo(at_least_float32(dtype)).bits // 8
    return 2.0 + 2.0 * width / _BYTES + 3.0 * size / num_candidates


def check_pool_fits(num_candidates: int, matrices: float, device: torch.device) -> None:
    """Refuses M candidates whose M x M float64 matrices do not fit in memory."""
    needed = matrices * _BYTES * num_candidates**2
    free = available_bytes(device)
    if needed > free:
        most = math.isqrt(int(free / (matrices * _BYTES)))
        raise MemoryLimitError(
            f"A pool of M candidates must have {matrices:.3g} M x M matrices fit in "
            f"memory; got M={num_candidates}, which needs {needed / 2**30:.1f} GiB "
            f"where {free / 2**30:.1f} GiB are free. Choose `size` and `pool` so that "
            f"their product is at most {most}, or a selector by diagonal scores."
        )


def relative_noise(dtype: torch.dtype) -> float:
    """Relative difference below which gains count as equal, at least 1e-9."""
    # Elimination adds to the round-off of the network's own dtype.
    return max(1e-9, torch.finfo(dtype).eps ** 0.75)


def add_in_blocks(
    precision: Float[Tensor, "pool pool"],
    gram: HeldGram,
    size: int,
    *,
    block_size: int,
    noise: float,
    start: Int[Tensor, " start"] | None = None,
) -> Int[Tensor, " chosen"]:
    """Positions of S weights, a block at a time, those that add most variance first."""
    # Those of `start` come before all others, as one block.
    # Interactions are counted exactly between blocks, not within one. A block B with
    # P_BB = L L^T leaves P - R^T R and A - H^T W - W^T H, where R = L^-1 P_B.,
    # W = L^-T R and H = A_B. - A_BB W / 2. Only diagonals and chosen rows of these are
    # made. Costs 3 M S^2 operations, and memory for three S x M matrices.
    is_left = torch.ones(len(precision), dtype=torch.bool, device=precision.device)
    alone, square = precision.diagonal().clone(), gram.diagonal()
    floor = _NOISE * square
    roots, weights, halves = (precision.new_empty(size, len(alone)) for _ in range(3))
    chosen = torch.empty(size, dtype=torch.int64, device=precision.device)
    done = 0
    while done < size:
        # |r_j|^2 / s_j; a gain within round-off is zero, and ties go by position.
        gains = _per_precision(alone, square, floor).where(is_left, -torch.inf)
        block = largest(gains, min(block_size, size - done), noise).sort().values
        if start is not None and len(start) and not done:
            block = start
        is_left[block] = False
        now = slice(done, done + len(block))
        chosen[now] = block
        root, weight, half = (rows[:done] for rows in (roots, weights, halves))
        cross = torch.addmm(precision[block], root[:, block].mT, root, alpha=-1.0)
        between = torch.addmm(gram.rows(block), half[:, block].mT, weight, alpha=-1.0)
        between.addmm_(weight[:, block].mT, half, alpha=-1.0)
        lower = lower_factor(cross[:, block])
        roots[now] = torch.linalg.solve_triangular(lower, cross, upper=False)
        weights[now] = torch.linalg.solve_triangular(lower.mT, roots[now], upper=True)
        halves[now] = torch.addmm(between, between[:, block], weights[now], alpha=-0.5)
        alone -= roots[now].square().sum(0)
        square -= 2 * (halves[now] * weights[now]).sum(0)
        done += len(block)
    return chosen


def exchange_(
    precision: Float[Tensor, "pool pool"],
    gram: Float[Tensor, "pool pool"],
    start: Int[Tensor, " chosen"],
    *,
    max_swaps: int,
    noise: float,
) -> Int[Tensor, " chosen"]:
    """Positions, ascending, after swaps that raise the variance that the set keeps."""
    # The chosen weight whose removal costs least leaves, of all others the one that
    # then adds most enters, and the first swap that adds nothing ends it. So the
    # variance kept rises with every swap, up to a set that no such swap improves. P and
    # A, both symmetric, are overwritten. Costs 6 M^2 S operations to start and 16 M^2 a
    # swap, and memory for a few S x M blocks.
    inside = torch.zeros(len(precision), dtype=torch.bool, device=precision.device)
    inside[start] = True
    if bool(inside.all()) or not max_swaps:
        return start.sort().values
    floor = _NOISE * gram.diagonal().clone()
    _sweep_all_(precision, gram, start)
    # In the tableau of P swept on the set, with the columns of J reduced alongside, the
    # Gram matrix's diagonal over the tableau's is a weight's loss inside the set and
    # its gain outside, with all interactions counted.
    for _ in range(max_swaps):
        square, pivots = gram.diagonal(), precision.diagonal()
        losses = _per_precision(pivots, square, 0.0 * floor)
        leaves = largest((-losses).where(inside, -torch.inf), 1, noise)
        _sweep_(precision, gram, int(leaves), remove=True)
        inside[leaves] = False
        gains = _per_precision(pivots, square, floor).where(~inside, -torch.inf)
        enters = largest(gains, 1, noise)
        if not bool(gains[enters] > gains[leaves] * (1 + noise)):
            inside[leaves] = True
            break
        inside[enters] = True
        _sweep_(precision, gram, int(enters), remove=False)
    return inside.nonzero().squeeze(-1)


def _per_precision(alone: Tensor, square: Tensor, floor: Tensor) -> Tensor:
    """A_jj / |P_jj|: variance that each weight adds or takes away; 0 if round-off."""
    return (square / alone.abs()).where(square > floor, 0.0)


def _sweep_all_(tableau: Tensor, gram: Tensor, block: Tensor) -> None:
    """Sweeps a block of weights into the set, in place."""
    cross, between = tableau[block], gram[block]
    factor = lower_factor(cross[:, block])
    weights = torch.cholesky_solve(cross, factor)  # W = P_BB^-1 P_B.
    inner = between[:, block]
    # P -> P - P_.B W, and A -> (I - W)^T A (I - W).
    tableau.addmm_(cross.mT, weights, alpha=-1.0)
    half = torch.addmm(between, inner, weights, alpha=-0.5)
    gram.addmm_(half.mT, weights, alpha=-1.0)
    gram.addmm_(weights.mT, half, alpha=-1.0)
    inverse = torch.cholesky_inverse(factor)
    _set_cross_(tableau, block, weights, -inverse)
    reduced = inverse @ between.addmm_(inner.clone(), weights, alpha=-1.0)
    _set_cross_(gram, block, reduced, inverse @ inner @ inverse)


def _set_cross_(matrix: Tensor, block: Tensor, rows: Tensor, own: Tensor) -> None:
    """Sets the rows and columns of a block in a symmetric matrix."""
    matrix[block] = rows
    matrix[:, block] = rows.mT
    matrix[block[:, None], block] = own


def _sweep_(tableau: Tensor, gram: Tensor, k: int, *, remove: bool) -> None:
    r"""Sweeps weight k into the set, or out of it, in place.

    Source: Dempster (1969), "Elements of Continuous Multivariate Analysis", on the
    sweep and reverse sweep of symmetric matrices.
    """
    # A column of the reduced gradients is r_j outside the set, J_T P_TT^-1 e_j inside.
    # Both ways, with t_j = T_kj / T_kk, column j loses t_j times column k, and column k
    # is scaled by +-1 / T_kk.
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
