"""Gaussian noise whose log scale is an output: integrated over that alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.exceptions import OptionError
from pyro_subnet.predictions.links.gaussian_noise import noisy
from pyro_subnet.predictions.links.integration import Integrated, Integration, by_halves
from pyro_subnet.predictions.links.likelihood import standard_error
from pyro_subnet.predictions.links.nodes import mixture_nodes
from pyro_subnet.tensors.lower_factor import lower_factor

# Columns of a factor this far below the largest entry are round-off.
_ROUND_OFF_POWER = 0.75


@final
@dataclass(frozen=True, eq=False)
class LogScaleGaussian:
    r"""Joint Gaussian over E locs and E log scales, split for integration.

    With :math:`z \sim N(0, I_R)` for what moves the log scales,

    .. math:: \log\sigma = m_s + H_s z,\qquad
        y \mid z \sim N(m + H z,\; T T^\top + \operatorname{diag} \sigma^2)

    exactly, so that a sum integrates z alone, over as few dimensions R as possible.

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
        """Splits N(mean, W Wᵀ) over E log scales, then E locs; W are the ``rows``."""
        num_elements = mean.shape[-1] // 2
        # W W^T = L L^T, L = [[H_s, 0], [H, T]]; R = 1 if one number moves all scales.
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
        """R, the number of dimensions that are integrated by a sum."""
        return self.log_scale_head.shape[-1]

    def mixture(
        self, z: Tensor, log_weights: Tensor, of_shape: Callable[[Any], Any]
    ) -> Any:
        """The distribution of y as a mixture over z, shape (K, ..., R) or (K, R)."""
        # (..., K, R): components are the last batch dimension
        z = z.movedim(0, -2).expand(*self.loc.shape[:-1], len(z), self.rank)
        loc = self.loc.unsqueeze(-2) + z @ self.loc_head.mT
        log_scale = self.log_scale.unsqueeze(-2) + z @ self.log_scale_head.mT
        residual = self.residual.unsqueeze(-3).expand(*loc.shape, -1)
        noise = log_scale.exp().diag_embed()
        component = of_shape(noisy(loc, residual, noise))
        logits = log_weights.expand(component.batch_shape)
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), component)


def over_log_scale(problem: Integration) -> Integrated:
    """Noise that the subnet moves, by quadrature over its log scale or by draws."""
    likelihood, options = problem.likelihood, problem.options
    split = LogScaleGaussian.split(*_log_scales_first(problem))
    if split.rank > 1 and options.link == "quadrature":
        raise OptionError(
            "`link='quadrature'` must have one log scale to integrate over; got "
            f"{split.rank} for each observation that differ. Pass `link='mc'`."
        )
    event = likelihood.shape if options.joint else likelihood.rest

    def mixed(z: Tensor, log_weights: Tensor) -> Any:
        return split.mixture(z, log_weights, lambda d: problem.of_shape(d, event))

    def by_nodes(coarse: bool) -> Any:
        z, log_weights = mixture_nodes(split.loc, coarse)
        return mixed(z.unsqueeze(-1), log_weights)

    if split.rank == 1 and options.link != "mc":
        return by_halves(by_nodes)
    z, log_weights = problem.draws((*split.log_scale.shape[:-1], split.rank))
    found = mixed(z, log_weights)
    return Integrated(found, lambda y: standard_error(found, y))


def _log_scales_first(problem: Integration) -> tuple[Tensor, Tensor]:
    """Mean and factor of all log scales of a data point, then of all its locs."""
    likelihood, joint = problem.likelihood, problem.options.joint
    loc, factor = problem.moments()
    num_data, each = likelihood.shape[0], likelihood.per_datum
    own = {
        name: value.reshape(num_data, each) for name, value in likelihood.own().items()
    }
    width = len(likelihood.moved) * each
    columns = torch.arange(loc.shape[-1], device=loc.device).reshape(-1, width)
    by_part = dict(zip(likelihood.moved, columns.split(each, dim=-1), strict=True))
    means, rows = [], []
    for name in ("log_scale", "loc"):
        fixed = own[name].flatten() if joint else own[name]
        if name in by_part:
            at = by_part[name].flatten()
            means.append(loc[..., at])
            rows.append(factor[..., at, :])
        else:
            means.append(fixed)
            rows.append(factor.new_zeros(*fixed.shape, factor.shape[-1]))
    # log(r sigma) = log r + log sigma
    if likelihood.scales_noise:
        shift = likelihood.noise_of_elements().log()
        means[0] = means[0] + shift.reshape(means[0].shape)
    return torch.cat(means, dim=-1), torch.cat(rows, dim=-2)


def _is_rank_one(head: Tensor) -> bool:
    if head.shape[-1] == 1:
        return True
    # One column moves all log scales if the others are round-off beside it.
    largest = float(head.abs().amax()) if head.numel() else 0.0
    others = float(head[..., 1:].abs().amax()) if head.numel() else 0.0
    return others <= torch.finfo(head.dtype).eps ** _ROUND_OFF_POWER * largest
