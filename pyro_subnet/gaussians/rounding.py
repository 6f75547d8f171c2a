"""Whether a precision's factor has digits that are right."""

from __future__ import annotations

import torch

from pyro_subnet.exceptions import RoundingWarning, warn
from pyro_subnet.gaussians.base import Gaussian
from pyro_subnet.gaussians.factored import FactoredGaussian

# Measured on networks of collinear inputs: where the least pivot was 14 times float32's
# epsilon, deviations of weights were off by 9%, at 3 times by 40%, at 70 times by 1%.
_FEW_EPS = 10.0


def warn_of_rounding(gaussian: Gaussian) -> None:
    """Says where the factor of a float32 precision is hardly more than rounding.

    Args:
        gaussian: The posterior of a fit; one that is not factored passes.
    """
    if not isinstance(gaussian, FactoredGaussian):
        return
    factor = gaussian.precision_tril
    if factor.dtype == torch.float64:
        return
    eps, least = torch.finfo(factor.dtype).eps, gaussian.least_pivot()
    if least < _FEW_EPS * eps:
        warn(
            "float32 hardly resolves the posterior precision: given the others, a "
            f"weight's precision is {least:.0e} of its own, and rounding is {eps:.0e}. "
            "Variances may be off by tens of percent. Run the model in float64, raise "
            "the prior's precision, or scale inputs to unit deviation.",
            RoundingWarning,
        )
