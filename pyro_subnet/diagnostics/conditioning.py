"""How many digits a posterior's precision leaves, and its diagonal."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_subnet.gaussians.diagonal_gaussian import DiagonalGaussian
from pyro_subnet.gaussians.dual_gaussian import DualGaussian
from pyro_subnet.gaussians.factored import Gaussian, PrecisionGaussian
from pyro_subnet.gaussians.kronecker_gaussian import KroneckerGaussian
from pyro_subnet.guides.curvature import CurvatureGuide
from pyro_subnet.tensors.memory import check_factor_fits
from pyro_subnet.tensors.modes import full_precision

# The matrix in float64, and LAPACK's room.
_MATRICES = 3.0


@full_precision()
def condition_number(posterior: CurvatureGuide) -> float:
    r"""Ratio of the largest to the smallest eigenvalue of the precision P.

    Solutions with P lose about :math:`\log_{10}` of it in digits: of 7 in float32, of
    16 in float64. It is also the square of how much longer the posterior's longest axis
    is than its shortest. In float32 P itself is known to about 7 digits, so a number
    beyond 1e7 there says no more than that.

    Of a full covariance it takes the singular values of the factor L that is held,
    which are the roots of P's eigenvalues, or the eigenvalues of P itself where it is
    held in its dual form. Both cost about S^3 operations and three S x S matrices in
    float64; diagonal and Kronecker-factored precisions have theirs at hand.

    Args:
        posterior: The posterior.

    Returns:
        At least 1.

    Raises:
        MemoryLimitError: If the matrices do not fit.

    Source: Higham (2002), "Accuracy and stability of numerical algorithms", chapter 10.
    """
    gaussian = posterior.gaussian
    if isinstance(gaussian, DiagonalGaussian):
        values = gaussian.precision
    elif isinstance(gaussian, KroneckerGaussian):
        parts = [block.values.flatten() for block in gaussian.blocks]
        values = torch.cat([*parts, gaussian.precision])
    else:
        device = gaussian.loc.device
        check_factor_fits(gaussian.size, torch.float64, device, matrices=_MATRICES)
        if isinstance(gaussian, PrecisionGaussian):
            factor = gaussian.precision_tril.double().tril()
            values = torch.linalg.svdvals(factor).square()
        else:
            values = torch.linalg.eigvalsh(gaussian.precision_matrix().double())
    return float(values.max().double() / values.min().double())


def precision_diagonal(gaussian: Gaussian) -> Tensor:
    """Diagonal of the precision, without the matrix where a form allows it.

    Args:
        gaussian: A Gaussian.

    Returns:
        Shape (S,).
    """
    if isinstance(gaussian, PrecisionGaussian):
        return gaussian.precision_tril.tril().square().sum(1)
    if isinstance(gaussian, DualGaussian):
        return gaussian.rows.square().sum(0) + gaussian.prior_precision
    if isinstance(gaussian, DiagonalGaussian):
        return gaussian.precision
    if isinstance(gaussian, KroneckerGaussian):
        found = torch.empty_like(gaussian.loc)
        found[gaussian.positions] = gaussian.precision
        for block in gaussian.blocks:
            found[block.positions] = block.diagonal(block.values)
        return found
    return gaussian.precision_matrix().diagonal()
