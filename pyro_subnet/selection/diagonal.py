"""Marginal variances of a diagonal posterior, and the variance of outputs from them."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from pyro_subnet.exceptions import PrecisionError
from pyro_subnet.fit.sums import DiagonalCurvature
from pyro_subnet.subnet import Layout


def marginal_variance(
    curvature: DiagonalCurvature, layout: Layout
) -> Float[Tensor, " params"]:
    r"""Variances :math:`1 / (G_{jj} + P_{0,jj})` of all weights, (D,), float64."""
    precision = curvature.ggn + curvature.prior
    bad = (~(precision > 0)).nonzero().squeeze(-1)
    if bad.numel():
        first = layout.element(int(bad[0]))
        raise PrecisionError(
            f"The diagonal of the precision must be positive to rank weights; got "
            f"{float(precision[bad[0]]):.3e} at {first} ({bad.numel()} such weights). "
            "Train closer to the MAP, or choose sites whose prior has curvature with "
            "`Sites([...])`."
        )
    return precision.reciprocal()


def explained_variance(
    curvature: DiagonalCurvature, variance: Float[Tensor, " params"], positions: Tensor
) -> float:
    """Share, 0 to 1, of the training outputs' variance that some weights explain."""
    # Under a diagonal posterior weight j adds G_jj sigma_j^2 to the variance of the
    # outputs, each weighted by its Fisher information.
    share = curvature.ggn * variance
    total = float(share.sum())
    return float(share[positions].sum()) / total if total > 0 else 0.0
