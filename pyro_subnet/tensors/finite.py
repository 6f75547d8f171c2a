"""What the subnet adds to outputs must be finite."""

from __future__ import annotations

from torch import Tensor

from pyro_subnet.exceptions import NonFiniteError


def finite_rows(moved: Tensor) -> Tensor:
    """What a tensor holds, row by row.

    Args:
        moved: Deviations or shifts of outputs, first axis the rows.

    Returns:
        The same.

    Raises:
        NonFiniteError: If a number is NaN or infinite.
    """
    if not bool(moved.isfinite().all()):
        bad = (~moved.detach().reshape(len(moved), -1).isfinite()).any(1).nonzero()
        raise NonFiniteError(
            "Derivatives of the outputs must be finite; got NaN or inf in "
            f"{len(bad)} of {len(moved)} rows (first {int(bad[0])}). Check the inputs "
            "for infinite values, which a network may squash."
        )
    return moved
