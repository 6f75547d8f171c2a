"""Class probabilities by MacKay's probit approximation."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributions as td
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.exceptions import ChoiceWarning, warn
from pyro_subnet.predictions.links.integration import Integrated, Integration, to_event

# Fewest labels, and the share of them, that may not change without a word; and how
# probable they are at the MAP. Of two that are nearly alike either may win.
_FEW, _MANY_CHANGED, _SURE = 20, 0.05, 0.5

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
        _check_classes(loc, logits, likelihood.rest)
        found = build(logits=logits.unflatten(-1, (*likelihood.rest, -1)))
    return Integrated(to_event(found, likelihood.rest))


def _check_classes(loc: Tensor, shrunk: Tensor, rest: torch.Size) -> None:
    """Warns where many labels that the means are sure of change."""
    before, after = (
        logits.detach().unflatten(-1, (*rest, -1)) for logits in (loc, shrunk)
    )
    sure, label = before.softmax(-1).max(-1)
    changed = int(((label != after.argmax(-1)) & (sure > _SURE)).sum())
    if label.numel() >= _FEW and changed > _MANY_CHANGED * label.numel():
        warn(
            "`link='probit'` shrinks each logit by its own variance, which may change "
            f"the most probable class; got {changed} of {label.numel()} labels changed "
            f"that have more than {_SURE} at the MAP. Pass `link='pairwise'`, which "
            "compares classes two by two, or `link='mc'`.",
            ChoiceWarning,
        )
