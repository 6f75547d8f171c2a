"""How many digits a posterior's precision leaves."""

from __future__ import annotations

import torch

from pyro_subnet.curvature_guide import CurvatureGuide
from pyro_subnet.diagonal_gaussian import DiagonalGaussian
from pyro_subnet.gaussian import PrecisionGaussian
from pyro_subnet.memory import check_factor_fits

# The matrix in float64, and LAPACK's room.
_MATRICES = 3.0


def condition_number(posterior: CurvatureGuide) -> float:
    r"""Ratio of the largest to the smallest eigenvalue of the precision P.

    Solutions with P lose about :math:`\log_{10}` of it in digits: of 7 in float32, of
    16 in float64. It is also the square of how much longer the posterior's longest axis
    is than its shortest. In float32 P itself is known to about 7 digits, so a number
    beyond 1e7 there says no more than that.

    Of a full covariance it takes the singular values of the factor L that is held,
    which are the roots of P's eigenvalues. Costs about S^3 operations and three S x S
    matrices in float64, also where the posterior is held in another form.

    Args:
        posterior: The posterior.

    Returns:
        At least 1.

    Raises:
        MemoryLimitError: If the matrices do not fit.

    Source: Higham (2002), "Accuracy and stability of numerical algorithms", section
    10.1.
    """
    gaussian = posterior.gaussian
    if isinstance(gaussian, DiagonalGaussian):
        variance = gaussian.variance()
        return float(variance.max() / variance.min())
    check_factor_fits(
        gaussian.size, torch.float64, gaussian.loc.device, matrices=_MATRICES
    )
    if isinstance(gaussian, PrecisionGaussian):
        values = torch.linalg.svdvals(gaussian.precision_tril.double().tril())
        return float((values[0] / values[-1]).square())
    values = torch.linalg.eigvalsh(gaussian.precision_matrix().double())
    return float(values[-1] / values[0])
