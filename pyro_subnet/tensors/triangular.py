r"""Work on the lower triangle of one S x S buffer, in place.

The rank-k update, the Cholesky factorization and the products here touch the lower
triangle alone, diagonal included, so that the strict upper one can hold another matrix.
LAPACK could do so too, but torch copies what it hands to LAPACK, clears the other
triangle, and offers no symmetric update. Matrices are halved until a block is small:
nearly all operations are then large in-place products, with blocks of memory only.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# Side of the blocks at which halving stops, and rows of a triangular solve at once,
# both by measurement: smaller ones lose time to calls, larger ones do twice the needed
# operations on a triangle (CPU), or leave a GPU idle.
_LEAF = {"cpu": 128, "cuda": 512}
# Side up to which a whole matrix, or a block of a larger one, is factored by LAPACK:
# it is faster than the calls here, and copies little.
_FACTOR_WHOLE, _FACTOR_LEAF = 2048, 1024
_SOLVE_ROWS = _MIRROR_ROWS = 512


def add_gram_(
    lower: Float[Tensor, "subnet subnet"],
    rows: Float[Tensor, "rows subnet"],
    alpha: float = 1.0,
) -> None:
    r"""Adds :math:`\alpha R^\top R` to the lower triangle, at half a product's cost."""
    # Float32 sums do not drift where rows come in batches. At S = 200 and 1e5 normal
    # rows of mean 0 or 1, the largest error against float64, relative to sqrt(G_ii
    # G_jj), was 1.3e-6 in one product, 1.7e-6 in batches of 100 (root mean square
    # 2.4e-7, mean of the diagonal 5e-8), 4.7e-6 in batches of 10, and 1.1e-5 row by row
    # after 2e4 rows (mean -1.7e-6).
    if lower.shape[-1] <= _leaf(lower):
        _set_lower_(lower, torch.addmm(lower, rows.mT, rows, alpha=alpha))
        return
    half = _half(lower)
    add_gram_(lower[:half, :half], rows[:, :half], alpha)
    lower[half:, :half].addmm_(rows[:, half:].mT, rows[:, :half], alpha=alpha)
    add_gram_(lower[half:, half:], rows[:, half:], alpha)


def cholesky_(lower: Float[Tensor, "subnet subnet"]) -> int:
    r"""Replaces the lower triangle of P by its Cholesky factor, :math:`P = L L^\top`.

    Costs S^3/3 operations. No jitter is added. A failure leaves the triangle half done.

    Returns:
        0, or the order of the first leading minor that is not positive definite, as
        LAPACK's ``info``. NaN may go unnoticed here, but reaches the diagonal.
    """
    return _cholesky_(lower, _FACTOR_WHOLE)


def _cholesky_(lower: Float[Tensor, "subnet subnet"], leaf: int) -> int:
    """As :func:`cholesky_`; by LAPACK where the side is at most ``leaf``."""
    if lower.shape[-1] <= leaf:
        factor, info = torch.linalg.cholesky_ex(lower)
        _set_lower_(lower, factor)
        return int(info)
    half = _half(lower)
    leading, below = lower[:half, :half], lower[half:, :half]
    trailing = lower[half:, half:]
    # L_11 from P_11; L_21 = P_21 L_11^-T; L_22 from P_22 - L_21 L_21^T.
    if failed := _cholesky_(leading, _FACTOR_LEAF):
        return failed
    solve_rows_(leading, below)
    add_gram_(trailing, below.mT, alpha=-1.0)
    failed = _cholesky_(trailing, _FACTOR_LEAF)
    return half + failed if failed else 0


def solve_rows_(
    lower: Float[Tensor, "subnet subnet"], rows: Float[Tensor, "rows subnet"]
) -> None:
    r"""Replaces R by :math:`R L^{-\top}`: each row j becomes :math:`L^{-1} j`."""
    # Unlike torch's solve this copies of an L inside a larger matrix only blocks on its
    # diagonal. It writes over R, so it is not differentiable.
    if lower.shape[-1] <= _leaf(lower):
        # Column-major, as LAPACK reads it. With torch's own copy, which is laid out by
        # rows, the solve takes a tenth longer.
        block = lower.mT.contiguous()
        for some in rows.split(_SOLVE_ROWS):
            solved = torch.linalg.solve_triangular(block, some, upper=True, left=False)
            some.copy_(solved)
        return
    half = _half(lower)
    left, right = rows[:, :half], rows[:, half:]
    solve_rows_(lower[:half, :half], left)
    right.addmm_(left, lower[half:, :half].mT, alpha=-1.0)
    solve_rows_(lower[half:, half:], right)


def multiply_rows(
    rows: Float[Tensor, "rows subnet"], lower: Float[Tensor, "subnet subnet"]
) -> Float[Tensor, "rows subnet"]:
    r"""Returns :math:`R L`, for L in its lower triangle."""
    if lower.shape[-1] <= _leaf(lower):
        return rows @ lower.tril()
    half = _half(lower)
    left = multiply_rows(rows[:, :half], lower[:half, :half])
    left = torch.addmm(left, rows[:, half:], lower[half:, :half])
    right = multiply_rows(rows[:, half:], lower[half:, half:])
    return torch.cat([left, right], dim=1)


def mirror_(matrix: Float[Tensor, "subnet subnet"]) -> None:
    """Copies the strict lower triangle into the strict upper one, in place."""
    for start in range(0, matrix.shape[-1], _MIRROR_ROWS):
        stop = start + _MIRROR_ROWS
        matrix[:start, start:stop].copy_(matrix[start:stop, :start].mT)
        block = matrix[start:stop, start:stop]
        _set_lower_(block.mT, block.clone())


def _leaf(matrix: Tensor) -> int:
    """Side of the blocks at which halving stops."""
    return _LEAF.get(matrix.device.type, _LEAF["cpu"])


def _half(matrix: Tensor) -> int:
    """Where a matrix is cut in two: near the middle, after full blocks."""
    leaf = _leaf(matrix)
    return -(-matrix.shape[-1] // (2 * leaf)) * leaf


def _set_lower_(block: Tensor, values: Tensor) -> None:
    """Sets the lower triangle; the strict upper one keeps its bits."""
    is_lower = torch.ones_like(block, dtype=torch.bool).tril_()
    torch.where(is_lower, values, block, out=block)
