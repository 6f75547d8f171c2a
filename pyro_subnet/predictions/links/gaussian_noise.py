"""Gaussian outputs with independent Gaussian noise of a known covariance."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.predictions.full_normal import FullNormal
from pyro_subnet.tensors.lower_factor import lower_factor


def noisy(
    loc: Float[Tensor, "*batch out"],
    factor: Float[Tensor, "*batch out k"],
    noise: Float[Tensor, "*batch out out"],
) -> Any:
    r"""f plus independent noise, :math:`N(\mu, T T^\top + N N^\top)`, over (E,)."""
    # T T^T + N N^T is factored without squaring (Daxberger et al. 2021, eq. 6), so that
    # no noise is too small beside the covariance of f.
    if loc.shape[-1] == 1:
        parts = torch.cat([factor, noise], dim=-1)
        scale = torch.linalg.vector_norm(parts, dim=-1)
        return dist.Normal(loc, scale).to_event(1)
    return multivariate(loc, factor, noise)


def multivariate(
    loc: Float[Tensor, "*batch out"],
    factor: Float[Tensor, "*batch out k"],
    noise: Float[Tensor, "*batch out out"],
) -> dist.MultivariateNormal:
    """The same as a multivariate normal, also for a single output."""
    scale_tril = lower_factor(torch.cat([factor, noise], dim=-1))
    return FullNormal.of(loc, scale_tril)
