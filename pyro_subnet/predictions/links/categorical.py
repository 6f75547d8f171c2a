"""Class probabilities under Gaussian logits, in closed form."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.exceptions import OptionError

Logits = Float[Tensor, "*batch classes"]
Factor = Float[Tensor, "*batch classes classes"]


def probit(loc: Logits, variance: Logits) -> Logits:
    r"""Logits, each shrunk by its own variance.

    .. math:: f_c \big/ \sqrt{1 + \tfrac{\pi}{8} \operatorname{Var} f_c}

    For one logit and the logistic function this is MacKay's approximation, off by at
    most 0.02 in probability. For classes it ignores covariances between logits, and is
    not blind to a constant that is added to all of them.

    Args:
        loc: Means of the logits, shape (..., C).
        variance: Their variances, shape (..., C).

    Returns:
        Shape (..., C).

    Source: MacKay (1992), "The evidence framework applied to classification networks",
    doi 10.1162/neco.1992.4.5.720; Gibbs (1998), thesis, for several classes.
    """
    return loc / (1 + math.pi / 8 * variance).sqrt()


def bridge(loc: Logits, factor: Factor, *, normalized: bool) -> Logits:
    r"""Mean class probabilities of the Dirichlet that the Laplace bridge gives.

    The Gaussian is conditioned on logits that sum to zero, then, with K classes,

    .. math:: \alpha_k = \frac{1}{\Sigma_{kk}} \Big(1 - \frac 2K
        + \frac{e^{\mu_k}}{K^2} \sum_l e^{-\mu_l}\Big),
        \qquad p = \alpha \Big/ \sum_k \alpha_k.

    Data without any variance have the softmax of their logits.

    Args:
        loc: Means of the logits, shape (..., K).
        factor: T with covariance T Tᵀ, shape (..., K, K).
        normalized: Whether to divide :math:`\Sigma` by
            :math:`c = \operatorname{mean}_k \Sigma_{kk} / \sqrt{K/2}`, and
            :math:`\mu` by its root, first: variances stay where the bridge is good.

    Returns:
        Probabilities, shape (..., K).

    Raises:
        OptionError: If a class has no variance of its own, or no finite logit.

    Source: Hobbhahn, Kristiadi and Hennig (2022), arXiv 2003.01227; the
    normalization as in laplace-torch's ``bridge_norm``.
    """
    num_classes = loc.shape[-1]
    flat = factor.detach().flatten(-2)
    still = (flat == 0).all(-1)
    eye = torch.eye(num_classes, dtype=loc.dtype, device=loc.device)
    factor = torch.where(still[..., None, None], eye, factor)
    # (I - V 1 1ᵀ / 1ᵀ V 1) T, with V 1 = T t and 1ᵀ V 1 = tᵀ t
    total = factor.sum(-2)
    size = total.square().sum(-1, keepdim=True)
    shared = (factor @ total.unsqueeze(-1)).squeeze(-1) / size
    mean = loc - shared * loc.sum(-1, keepdim=True)
    rest = factor - shared.unsqueeze(-1) * total.unsqueeze(-2)
    variance = rest.square().sum(-1)
    _check_variance(variance.detach(), factor.detach(), mean.detach())
    if normalized:
        level = variance.mean(-1, keepdim=True) / math.sqrt(num_classes / 2)
        mean, variance = mean / level.sqrt(), variance / level
    # alpha without overflow: divide by its largest sum of exponentials
    spread = mean + (-mean).logsumexp(-1, keepdim=True) - 2 * math.log(num_classes)
    constant = torch.full_like(spread, 1 - 2 / num_classes).log()
    weights = (torch.logaddexp(constant, spread) - variance.log()).softmax(-1)
    return torch.where(still.unsqueeze(-1), loc.softmax(-1), weights)


def _check_variance(variance: Tensor, factor: Tensor, mean: Tensor) -> None:
    scale = factor.square().sum((-2, -1)).unsqueeze(-1)
    bad = (variance <= torch.finfo(variance.dtype).eps * scale) | ~mean.isfinite()
    if bool(bad.any()):
        raise OptionError(
            "`link` may be a Laplace bridge where every class has a finite logit, and "
            "variance left when logits are made to sum to zero; got "
            f"{int(bad.any(-1).sum())} of {bad[..., 0].numel()} elements without. Pass "
            "`link='probit'` or `link='mc'`, or choose more weights."
        )
