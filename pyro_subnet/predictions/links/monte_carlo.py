"""Any family: draws of its outputs."""

from __future__ import annotations

import math
from typing import Any

import torch.distributions as td
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_subnet.predictions.links.integration import (
    Integrated,
    Integration,
    equal_weights,
)
from pyro_subnet.predictions.links.likelihood import CLASSES, mixture, standard_error


def by_draws(problem: Integration) -> Integrated:
    """The link ``"mc"``: a mixture over draws of the outputs, kept correlated."""
    likelihood, options = problem.likelihood, problem.options
    if options.joint:
        count = options.num_samples
        eta = problem.outputs.draw_functions(count, options.generator)
        log_weights = equal_weights(count, eta)
    else:
        loc, factor = problem.moments()
        z, log_weights = problem.draws(loc.shape)
        eta = loc + (factor @ z.unsqueeze(-1)).squeeze(-1)
    mixed = mixture(likelihood, eta, log_weights, 0 if options.joint else 1)

    def error(y: Tensor) -> Tensor:
        return standard_error(mixed, y)

    collapsed = None if options.joint or likelihood.rest else _mean(problem, mixed)
    return Integrated(mixed if collapsed is None else collapsed, error)


def _mean(problem: Integration, mixed: Any) -> Any:
    """The mixture over classes as one distribution; None for other families."""
    likelihood = problem.likelihood
    kind = likelihood.family.distribution
    build = likelihood.taken.constructor(likelihood.family)
    if kind not in {td.Bernoulli, *CLASSES}:
        return None
    logits = mixed.component_distribution.logits
    if kind is td.Bernoulli:
        # mean_k sigma(f_k) as a logit: 1/K drops out of the difference.
        one, zero = logsigmoid(logits), logsigmoid(-logits)
        return build(logits=one.logsumexp(-1) - zero.logsumexp(-1))
    # log mean_k softmax(f_k)
    count = math.log(problem.options.num_samples)
    return build(logits=logits.log_softmax(-1).logsumexp(-2) - count)
