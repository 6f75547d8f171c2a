"""Marginal variances of a diagonal posterior, and what they explain."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from pyro_subnet.exceptions import PrecisionError
from pyro_subnet.fit.sums import DiagonalCurvature
from pyro_subnet.subnet import Layout, Subnet


def marginal_variance(
    curvature: DiagonalCurvature, layout: Layout
) -> Float[Tensor, " params"]:
    r"""Variances :math:`1 / (G_{jj} + P_{0,jj})`.

    Args:
        curvature: Both diagonals.
        layout: Where the latent sites lie, for names.

    Returns:
        Shape (D,), float64.

    Raises:
        PrecisionError: If a precision is not positive.
    """
    precision = curvature.ggn + curvature.prior
    bad = (~(precision > 0)).nonzero().squeeze(-1)
    if bad.numel():
        first = Subnet(layout, bad[:1]).names[0]
        raise PrecisionError(
            f"The diagonal of the precision must be positive to rank weights; got "
            f"{float(precision[bad[0]]):.3e} at {first} ({bad.numel()} such weights). "
            "Train closer to the MAP, or choose sites whose prior has curvature with "
            "`Sites([...])`."
        )
    return precision.reciprocal()


def explained_variance(
    curvature: DiagonalCurvature,
    variance: Float[Tensor, " params"],
    positions: Tensor,
) -> float:
    """Share of the output variance on the training inputs that some weights explain.

    Under a diagonal posterior weight j adds G_jj sigma_j^2 of variance, outputs weighed
    by their Fisher information.

    Args:
        curvature: Both diagonals.
        variance: What :func:`marginal_variance` gives, shape (D,).
        positions: Of the chosen weights.

    Returns:
        From 0 to 1; 0 if no weight moves an output.
    """
    share = curvature.ggn * variance
    total = float(share.sum())
    return float(share[positions].sum()) / total if total > 0 else 0.0
