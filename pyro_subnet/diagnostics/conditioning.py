"""The condition number of a posterior's precision."""

from __future__ import annotations

from pyro_subnet.guides.posterior import AutoSubnetMultivariateNormal
from pyro_subnet.tensors.modes import full_precision


@full_precision()
def condition_number(posterior: AutoSubnetMultivariateNormal) -> float:
    r"""Ratio of the largest to the smallest eigenvalue of the precision P.

    Solving with P loses about :math:`\log_{10}` of it in digits, of 7 in float32 and 16
    in float64. It is also the squared ratio of the posterior's longest axis to its
    shortest. In float32 P itself is known to about 7 digits, so numbers beyond 1e7 only
    say that it is large.

    A full covariance takes the singular values of the Cholesky factor that is held,
    which are the roots of P's eigenvalues, or P's eigenvalues if it is held in dual
    form. Both cost about S^3 operations and three S x S matrices in float64. Diagonal
    and Kronecker-factored precisions have their eigenvalues at hand.

    Args:
        posterior: The posterior.

    Returns:
        At least 1.

    Raises:
        MemoryLimitError: If the matrices do not fit.

    Source: Higham (2002), "Accuracy and stability of numerical algorithms", chapter 10.
    """
    smallest, largest = posterior.gaussian.extreme_precisions()
    return largest / smallest
