r"""The R x R kernel of weighted rows under a diagonal prior: summed, checked, factored.

All of it is float64, whatever the dtype of the rows: that costs R^2 numbers, and the
digits that a sum of squares takes away from a root stay.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.exceptions import NonFiniteError, PrecisionError
from pyro_subnet.tensors.memory import check_fits
from pyro_subnet.tensors.triangular import add_gram_, cholesky_

PRIMAL_FORM = "Use the primal form, an S x S factor of the precision."
# Columns of W that are scaled, and held in float64, at once: R x 2048 numbers.
_BLOCK_COLUMNS = 2048
# What a pivot must exceed the round-off of the kernel by, for two digits to be right.
# Where the rows are independent all pivots are large; rows that repeat others leave
# pivots near 1, the identity's, which a large kernel buries.
_DIGITS = 100.0
# The kernel's factor C, and C + I during a solve.
_KERNEL_MATRICES = 2


def check_diagonal(diagonal: Float[Tensor, " subnet"]) -> None:
    """Refuses a diagonal, shape (S,), that has no inverse root."""
    size = len(diagonal)
    bad = (~diagonal.isfinite()).nonzero().squeeze(1)
    if bad.numel():
        raise NonFiniteError(
            f"The prior's precision must be finite; got NaN or inf in {bad.numel()} of "
            f"{size} elements (first {int(bad[0])}). Check the prior at the MAP."
        )
    # Below the smallest normal number the inverse overflows.
    bad = (diagonal < torch.finfo(diagonal.dtype).tiny).nonzero().squeeze(1)
    if bad.numel():
        first = int(bad[0])
        raise PrecisionError(
            "The prior's precision must be a positive normal number in the dual form; "
            f"got {bad.numel()} of {size} elements that are not (first "
            f"{float(diagonal[first]):.3e} at {first}). {PRIMAL_FORM}"
        )


def column_blocks(size: int) -> list[slice]:
    """Groups of columns, of S in all, that are scaled at once."""
    starts = range(0, size, _BLOCK_COLUMNS)
    return [slice(start, min(start + _BLOCK_COLUMNS, size)) for start in starts]


def scaled_columns(
    rows: Float[Tensor, "rows subnet"], diagonal: Float[Tensor, " subnet"], block: slice
) -> Float[Tensor, "block rows"]:
    r"""Some columns of :math:`A = W D^{-1/2}`, as rows of a new matrix, float64."""
    root = diagonal[block].to(torch.float64).rsqrt()
    columns = torch.empty(
        len(root), len(rows), dtype=torch.float64, device=rows.device
    ).copy_(rows[:, block].mT)
    return columns.mul_(root.unsqueeze(-1))


def kernel_of_rows(
    rows: Float[Tensor, "rows subnet"], diagonal: Float[Tensor, " subnet"]
) -> Float[Tensor, "rows rows"]:
    r"""The kernel :math:`A A^\top = W D^{-1} W^\top`, float64, in the lower triangle.

    Costs R^2 S operations and R x 2048 numbers beside the result.

    Args:
        rows: W, shape (R, S).
        diagonal: D, shape (S,).

    Returns:
        Zeros above the diagonal, shape (R, R).
    """
    count = len(rows)
    check_fits(
        8 * _KERNEL_MATRICES * count**2,
        rows.device,
        f"The R x R kernel of the dual form must fit in memory; got R={count}",
        PRIMAL_FORM,
    )
    kernel = torch.zeros(count, count, dtype=torch.float64, device=rows.device)
    for block in column_blocks(rows.shape[1]):
        add_gram_(kernel, scaled_columns(rows, diagonal, block))
    return kernel


def check_kernel(kernel: Float[Tensor, "rows rows"]) -> None:
    """Refuses NaN and infinity, which reach the diagonal as it sums squares."""
    bad = (~kernel.diagonal().isfinite()).nonzero().squeeze(1)
    if bad.numel():
        raise NonFiniteError(
            "The weighted Jacobian rows must be finite, and so must their squares over "
            f"the prior's precision; got NaN or inf from {bad.numel()} of "
            f"{len(kernel)} rows (first {int(bad[0])}). Check the model's outputs and "
            "its prior at the MAP."
        )


def factor_kernel_(kernel: Float[Tensor, "rows rows"]) -> None:
    """Replaces K, at least the identity but for round-off, by its factor C, in place.

    Args:
        kernel: K in its lower triangle, shape (R, R), float64.

    Raises:
        NonFiniteError: If an entry is NaN or infinite.
        PrecisionError: If it is too badly conditioned for float64. No jitter is added.
    """
    check_kernel(kernel)
    if not len(kernel):
        return
    # Its trace bounds the largest eigenvalue.
    round_off = torch.finfo(kernel.dtype).eps * float(kernel.diagonal().sum())
    failed = cholesky_(kernel)
    smallest = 0.0 if failed else float(kernel.diagonal().min().square())
    if not smallest >= _DIGITS * round_off:
        raise PrecisionError(
            f"The kernel of R={len(kernel)} rows must have pivots of at least "
            f"{_DIGITS:g} times its round-off in float64; got one of {smallest:.1e} at "
            f"a round-off of {round_off:.1e}: some rows repeat others, and the data "
            "outweigh the prior too far. Raise the prior's precision, or use the "
            "primal form, an S x S factor of the precision."
        )
