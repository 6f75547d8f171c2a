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
from pyro_subnet.tensors.memory import DEFAULT_BUDGET, check_fits

# Tensors of the draws' size: noise, outputs, logits, log densities, and their sums.
_DRAWS_HELD = 5


def by_draws(problem: Integration) -> Integrated:
    """The link ``"mc"``: a mixture over draws of the outputs, kept correlated."""
    likelihood, options = problem.likelihood, problem.options
    if options.joint:
        count = options.num_samples
        eta = problem.outputs.draw_functions(count, options.generator)
        log_weights = equal_weights(count, eta)
    else:
        loc, factor = problem.moments()
        _check_draws_fit(loc, options.num_samples)
        z, log_weights = problem.draws(loc.shape)
        # All draws of a data point at once: (N, C, C) (N, C, K), without K factors.
        eta = loc + (factor @ z.movedim(0, -1)).movedim(-1, 0)
    mixed = mixture(likelihood, eta, log_weights, 0 if options.joint else 1)

    def error(y: Tensor) -> Tensor:
        return standard_error(mixed, y)

    collapsed = None if options.joint or likelihood.rest else _mean(problem, mixed)
    return Integrated(mixed if collapsed is None else collapsed, error)


def _check_draws_fit(loc: Tensor, num_samples: int) -> None:
    needed = _DRAWS_HELD * num_samples * loc.numel() * loc.element_size()
    if needed > DEFAULT_BUDGET:  # smaller ones are not worth asking for
        check_fits(
            needed,
            loc.device,
            f"Draws of `link='mc'` must fit in memory; got num_samples={num_samples} "
            f"of {tuple(loc.shape)} outputs",
            "Lower `num_samples`, or predict at fewer inputs at once.",
        )


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
