"""A posterior of the model, of several, whose training ends in the highest evidence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pyro_subnet.exceptions import OptionError
from pyro_subnet.guides.map import AutoSubnetLaplace
from pyro_subnet.guides.posterior import AutoSubnetMultivariateNormal
from pyro_subnet.tracing.trace import Model


def posterior_by_evidence(
    model_of: Callable[..., Model],
    prior_scales: float | Sequence[float],
    subnet: Any,
    batches: Sequence[Any],
    *,
    num_epochs: int,
    lr: float,
    val: Any = None,
) -> AutoSubnetMultivariateNormal:
    """Trains from each scale of the prior, and keeps what has most evidence.

    From wide priors the evidence may rise to a network that fits the noise, from narrow
    ones to one that fits nothing.

    Args:
        model_of: Makes the model, from ``prior_scale``, a standard deviation.
        prior_scales: Where training begins: one, or several.
        subnet: As for :class:`AutoSubnetLaplace`.
        batches: As for :meth:`AutoSubnetLaplace.train_by_evidence`.
        num_epochs: As there.
        lr: As there.
        val: As there.

    Returns:
        The posterior.

    Raises:
        OptionError: If there is no scale.
    """
    best, found = -math.inf, None
    for scale in np.atleast_1d(np.asarray(prior_scales, dtype=float)):
        guide = AutoSubnetLaplace(model_of(prior_scale=float(scale)), subnet)
        guide.train_by_evidence(batches, num_epochs=num_epochs, lr=lr, val=val)
        if not guide.evidence_history:  # of few epochs, in batches
            guide.evidence_step(batches, val=val)
        evidence = max(step.log_evidence for step in guide.evidence_history)
        if evidence > best or found is None:
            best, found = evidence, guide.laplace_approximation_from(batches)
    if found is None:
        raise OptionError(
            "`prior_scale` must name one standard deviation at least; got none. Pass "
            "1.0, say."
        )
    return found
