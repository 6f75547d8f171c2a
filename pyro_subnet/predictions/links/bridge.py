"""Class probabilities by the Laplace bridge to a Dirichlet distribution."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.exceptions import OptionError
from pyro_subnet.predictions.links.integration import Integrated, Integration, to_event
from pyro_subnet.tensors.lower_factor import lower_factor

Logits = Float[Tensor, "*batch classes"]
Factor = Float[Tensor, "*batch classes classes"]


def bridge(loc: Logits, factor: Factor, *, normalized: bool) -> Logits:
    r"""Returns mean class probabilities of the Laplace bridge's Dirichlet, (..., K).

    The Gaussian is conditioned on logits that sum to zero. Then, with K classes,

    .. math:: \alpha_k = \frac{1}{\Sigma_{kk}} \Big(1 - \frac 2K
        + \frac{e^{\mu_k}}{K^2} \sum_l e^{-\mu_l}\Big),
        \qquad p = \alpha \Big/ \sum_k \alpha_k.

    If ``normalized``, :math:`\Sigma` is first divided by :math:`c =
    \operatorname{mean}_k \Sigma_{kk} / \sqrt{K/2}` and :math:`\mu` by its root, so that
    variances stay where the bridge is good. Data points without any variance have the
    softmax of their logits.

    Source: Hobbhahn, Kristiadi and Hennig (2022), arXiv 2003.01227; the normalization
    as in laplace-torch's ``bridge_norm``.
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


def by_bridge(problem: Integration) -> Integrated:
    """The links ``"bridge"`` and ``"bridge-norm"``, for classes, by element."""
    likelihood = problem.likelihood
    loc, factor = problem.outputs.moments(joint=False)
    loc = loc.unflatten(-1, (*likelihood.rest, -1))
    rows = factor.unflatten(-2, loc.shape[1:])
    flat = lower_factor(rows.reshape(-1, *rows.shape[-2:]))
    flat = flat.reshape(*likelihood.shape, *flat.shape[-2:])
    probs = bridge(loc, flat, normalized=problem.options.link == "bridge-norm")
    build = likelihood.taken.constructor(likelihood.family)
    return Integrated(to_event(build(probs=probs), likelihood.rest))


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
