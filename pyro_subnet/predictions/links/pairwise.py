"""Class probabilities from the probit approximation of every pair of classes."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.predictions.links.integration import Integrated, Integration, to_event

Logits = Float[Tensor, "*batch classes"]
Rows = Float[Tensor, "*batch classes rank"]


def pairwise(loc: Logits, factor: Rows) -> Logits:
    r"""Returns logits, up to a constant, from differences between logits.

    .. math:: \log p_k = -\log \sum_l e^{-z_{kl}} + \text{const}, \qquad
        z_{kl} = \frac{f_k - f_l}
            {\sqrt{1 + \tfrac{\pi}{8} \operatorname{Var}(f_k - f_l)}}

    A softmax is :math:`p_k = 1 / \sum_l e^{-(f_k - f_l)}`, each term that of two
    classes alone, for which the probit approximation is good. Two classes have it
    exactly, and what all logits of an input share changes nothing.

    Source: Lu, Ie and Sha (2020), arXiv 2006.07584, their second mean-field
    approximation, here normalized.
    """
    # What all logits share would be lost to round-off in a difference of variances.
    rest = factor - factor.mean(-2, keepdim=True)
    covariance = rest @ rest.mT
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    pairs = variance.unsqueeze(-1) + variance.unsqueeze(-2) - 2 * covariance
    # A class that is ruled out has an infinite logit, whose differences are no numbers.
    least = torch.finfo(loc.dtype).min / 4
    finite = loc.clamp(min=least)
    difference = finite.unsqueeze(-1) - finite.unsqueeze(-2)
    return -(-difference / (1 + math.pi / 8 * pairs.clamp(min=0)).sqrt()).logsumexp(-1)


def by_pairs(problem: Integration) -> Integrated:
    """The link ``"pairwise"``, for classes, by element."""
    likelihood = problem.likelihood
    loc, factor = problem.outputs.moments(joint=False)
    loc = loc.unflatten(-1, (*likelihood.rest, -1))
    rows = factor.unflatten(-2, loc.shape[1:])
    build = likelihood.taken.constructor(likelihood.family)
    return Integrated(to_event(build(logits=pairwise(loc, rows)), likelihood.rest))
