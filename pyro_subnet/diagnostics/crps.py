r"""The continuous ranked probability score: a proper score in the unit of y.

.. math:: \operatorname{CRPS}(F, y) = \int (F(z) - 1[y \le z])^2\, dz
    = E|Y - y| - \tfrac12 E|Y - Y'|

An outlier costs less than under the log density. For a point prediction the score is
the absolute error.

Source: Gneiting and Raftery (2007), section 4.2, doi 10.1198/016214506000001437.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from pyro.ops.stats import crps_empirical
from torch import Tensor

from pyro_subnet.diagnostics.probabilities import (
    check_draws,
    check_same_shape,
    tensors_of,
)
from pyro_subnet.exceptions import DataError


def crps_normal(
    loc: Float[Tensor, "*data"],
    scale: Float[Tensor, "*data"],
    y: Float[Tensor, "*data"],
) -> Float[Tensor, "*data"]:
    r"""CRPS of normal predictions, in closed form.

    .. math:: \sigma \big( z (2 \Phi(z) - 1) + 2 \varphi(z) - \pi^{-1/2} \big),
        \qquad z = (y - \mu) / \sigma

    Args:
        loc: Predicted mean of y, shape (N, ...).
        scale: Predicted standard deviation of y, noise included.
        y: Observations.

    Returns:
        Shape (N, ...), in the unit of y.

    Raises:
        DataError: If shapes differ, or a scale is not positive.

    Source: Gneiting and Raftery (2007), section 4.2.
    """
    loc, scale, y = tensors_of(loc=loc, scale=scale, y=y)
    check_same_shape("loc", loc.shape, "y", y.shape)
    check_same_shape("scale", scale.shape, "y", y.shape)
    if not bool((scale > 0).all()):
        raise DataError(
            f"`scale` must be standard deviations, positive; got {float(scale.min())}. "
            "Pass `predictive.stddev`."
        )
    # Pyro's score is of draws alone.
    z = (y - loc) / scale
    density = (-0.5 * z.square()).exp() / math.sqrt(2 * math.pi)
    centred = torch.erf(z / math.sqrt(2))  # 2 Φ(z) - 1
    return scale * (z * centred + 2 * density - 1 / math.sqrt(math.pi))


def crps_from_draws(
    draws: Float[Tensor, " draws *data"], y: Float[Tensor, "*data"]
) -> Float[Tensor, "*data"]:
    r"""CRPS of the distribution that gives each of K draws the weight 1 / K.

    Args:
        draws: Of the predictive distribution, noise included, shape (K, N, ...).
        y: Observations, shape (N, ...).

    Returns:
        Shape (N, ...), in the unit of y: on average :math:`\tfrac1{2K} E|Y - Y'|` above
        the score of the distribution that was drawn from. Costs a sort.

    Raises:
        DataError: If draws and observations are of different data, or there is none.
    """
    draws, y = tensors_of(draws=draws, y=y)
    check_draws(draws, y)
    return crps_empirical(draws, y)
