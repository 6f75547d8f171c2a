"""Gaussian noise on Gaussian outputs: known exactly, or up to its log scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.tensors.lower_factor import lower_factor

# Columns of a factor this far below the largest entry are round-off.
_ROUND_OFF_POWER = 0.75


def noisy(
    loc: Float[Tensor, "*batch out"],
    factor: Float[Tensor, "*batch out k"],
    noise: Float[Tensor, "*batch out out"],
) -> Any:
    r"""Distribution of f plus independent noise, :math:`N(\mu, T T^\top + N N^\top)`.

    Args:
        loc: Mean of f, shape (..., E).
        factor: T of the covariance of f, shape (..., E, K).
        noise: Factor N of the covariance of the noise, shape (..., E, E).

    Returns:
        Normal of event shape (1,) if E is 1, else multivariate normal. Factored without
        squaring, so that no noise is too small beside the covariance of f.

    Source: Daxberger et al. (2021), eq. 6, arXiv 2010.14689.
    """
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
    """The same as a multivariate normal, whatever E is.

    Args:
        loc: Mean of f, shape (..., E).
        factor: T of the covariance of f, shape (..., E, K).
        noise: Factor of the covariance of the noise, shape (..., E, E).

    Returns:
        Event shape (E,).
    """
    scale_tril = lower_factor(torch.cat([factor, noise], dim=-1))
    return dist.MultivariateNormal(loc, scale_tril=scale_tril)


@dataclass(frozen=True, eq=False)
class LogScaleGaussian:
    r"""Joint Gaussian over locs and log scales, split for integration.

    With :math:`z \sim N(0, I)` and R rows of it moving the log scales,

    .. math:: \log\sigma = m_s + H_s z,\qquad
        y \mid z \sim N(m + H z,\; T T^\top + \operatorname{diag} \sigma^2)

    exactly: only z is integrated by a sum, over as few dimensions as can be.

    Attributes:
        loc: m, shape (..., E).
        log_scale: m_s, shape (..., E).
        loc_head: H, shape (..., E, R).
        log_scale_head: H_s, shape (..., E, R).
        residual: T, shape (..., E, K).
    """

    loc: Tensor
    log_scale: Tensor
    loc_head: Tensor
    log_scale_head: Tensor
    residual: Tensor

    @classmethod
    def split(
        cls, mean: Float[Tensor, "*batch both"], rows: Float[Tensor, "*batch both k"]
    ) -> LogScaleGaussian:
        """Splits a joint Gaussian.

        Args:
            mean: E log scales, then E locs, shape (..., 2 E).
            rows: Factor W of their covariance, shape (..., 2 E, K).

        Returns:
            The split; R is 1 where one number moves all log scales.
        """
        num_elements = mean.shape[-1] // 2
        factor = lower_factor(rows)
        head = factor[..., :num_elements, :num_elements]
        rank = 1 if _is_rank_one(head.detach()) else num_elements
        return cls(
            mean[..., num_elements:],
            mean[..., :num_elements],
            factor[..., num_elements:, :rank],
            head[..., :rank],
            factor[..., num_elements:, rank:],
        )

    @property
    def rank(self) -> int:
        """R, how many dimensions are integrated by a sum."""
        return self.log_scale_head.shape[-1]

    def mixture(
        self, z: Tensor, log_weights: Tensor, of_shape: Callable[[Any], Any]
    ) -> Any:
        """The distribution of y as a mixture over values of z.

        Args:
            z: Shape (K, ..., R), or (K, R).
            log_weights: Shape (K,).
            of_shape: Puts a Gaussian over (E,) on the shape and the scale of y.

        Returns:
            A ``MixtureSameFamily``.
        """
        # (..., K, R): components are the last batch dimension
        z = z.movedim(0, -2).expand(*self.loc.shape[:-1], len(z), self.rank)
        loc = self.loc.unsqueeze(-2) + z @ self.loc_head.mT
        log_scale = self.log_scale.unsqueeze(-2) + z @ self.log_scale_head.mT
        residual = self.residual.unsqueeze(-3).expand(*loc.shape, -1)
        noise = log_scale.exp().diag_embed()
        component = of_shape(noisy(loc, residual, noise))
        logits = log_weights.expand(component.batch_shape)
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), component)


def _is_rank_one(head: Tensor) -> bool:
    if head.shape[-1] == 1:
        return True
    largest = float(head.abs().amax()) if head.numel() else 0.0
    others = float(head[..., 1:].abs().amax()) if head.numel() else 0.0
    return others <= torch.finfo(head.dtype).eps ** _ROUND_OFF_POWER * largest
