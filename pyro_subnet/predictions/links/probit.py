"""Class probabilities by MacKay's probit approximation."""

from __future__ import annotations

import math
from typing import Any

import torch.distributions as td
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.predictions.links.integration import Integrated, Integration, to_event

Logits = Float[Tensor, "*batch classes"]


def probit(loc: Logits, variance: Logits) -> Logits:
    r"""Returns logits, each shrunk by its own variance.

    .. math:: f_c \big/ \sqrt{1 + \tfrac{\pi}{8} \operatorname{Var} f_c}

    For one logit and the logistic function this is MacKay's approximation, off by at
    most 0.02 in probability. For classes it ignores covariances between logits, and
    depends on a constant that is added to all of them: where a subnet moves some logits
    much more than others, the class of the largest mean logit may lose.

    Source: MacKay (1992), "The evidence framework applied to classification networks",
    doi 10.1162/neco.1992.4.5.720; Gibbs (1998), thesis, for several classes.
    """
    return loc / (1 + math.pi / 8 * variance).sqrt()


def by_probit(problem: Integration) -> Integrated:
    """The link ``"probit"``, for classes or Bernoulli, element by element."""
    likelihood = problem.likelihood
    build = likelihood.taken.constructor(likelihood.family)
    if likelihood.family.distribution is td.Bernoulli:
        loc, scale = problem.elementwise()
        found: Any = build(logits=probit(loc, scale.square()))
    else:
        loc, scale = problem.outputs.marginals()
        logits = probit(loc, scale.square())
        found = build(logits=logits.unflatten(-1, (*likelihood.rest, -1)))
    return Integrated(to_event(found, likelihood.rest))
