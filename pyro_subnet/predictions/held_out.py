"""Tuning by the predictive density of held-out data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_subnet.exceptions import (
    DataError,
    NonFiniteError,
    OptionError,
    PrecisionError,
)
from pyro_subnet.laplace.search import Tuning, check_bounds, minimize, nearest_to_own
from pyro_subnet.laplace.state import PosteriorState
from pyro_subnet.predictions.distribution import of_site, predictive_distribution
from pyro_subnet.predictions.links.integration import PredictiveOptions
from pyro_subnet.predictions.outputs import OutputGaussian
from pyro_subnet.predictions.raw_logits import with_raw_logits
from pyro_subnet.tensors.memory import available_bytes
from pyro_subnet.tensors.modes import outside_inference_mode
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.data import arguments
from pyro_subnet.tracing.data_values import check_data
from pyro_subnet.tracing.linearized_outputs import LinearizedOutputs
from pyro_subnet.tracing.output_site import OutputSite, site_weights
from pyro_subnet.tracing.trace import ModelAtMAP

# Share of the free memory that the Jacobian of the held-out data may take.
_SHARE = 0.25


@torch.no_grad()
@outside_inference_mode()
def tune_by_nll(
    at_map: ModelAtMAP,
    state: PosteriorState,
    val: Any,
    bounds: tuple[float, float],
    rescaled: Callable[[float], PosteriorState],
    *,
    standard_errors: int | float = 0.0,
) -> Tuning:
    r"""Returns the scale whose closed-form predictions of held-out data are best.

    .. math:: -\frac1N \sum_n \log p(y_n \mid x_n)

    The Jacobian of the held-out data is computed once, N C S numbers, if they take at
    most a quarter of the free memory, and anew at each scale otherwise. A scale costs a
    factorization, and N C S^2 operations. With ``standard_errors`` k the NLL may be k
    of them worse than the best, for a scale nearer the model's own.

    Raises:
        DataError: If ``val`` is no set of arguments, lacks observations, or holds some
            that the likelihood forbids.
    """
    call = of_site(ModelCall.read(at_map, *arguments(val)), None)
    (site,) = call.sites
    if not site.node["is_observed"]:
        raise DataError(
            f"`val` must hold observations; got none at site {site.name!r}. Pass what "
            "training takes, such as `val=(x, y)`."
        )
    check_data(site)
    outputs = with_raw_logits(LinearizedOutputs.read(call, state.subnet))
    weights, value = _weights(site, call.num_data), site.value
    like = state.gaussian.loc
    # N C S numbers of the Gaussian's dtype.
    numbers = sum(rows * width for rows, width in outputs.outputs.shapes)
    held = numbers * outputs.outputs.size * like.element_size()
    if held <= _SHARE * available_bytes(value.device):
        outputs = outputs.holding_rows(like)

    generator = torch.Generator(value.device)
    losses: dict[float, Tensor] = {}

    def loss(scale: float) -> float:
        other = rescaled(scale)
        # The same draws at every scale, where a family needs any.
        options = PredictiveOptions(
            noise_factor=other.noise_factor, generator=generator.manual_seed(0)
        )
        problem = OutputGaussian(outputs, other.gaussian).problem(options)
        found = predictive_distribution(problem)
        density = found.distribution.log_prob(value).to(torch.float64)
        # What is left out may be NaN, which a weight of zero does not remove.
        density = density.where(weights > 0, 0.0)
        if standard_errors:
            losses[scale] = -density
        return -float((weights * density).sum() / weights.sum())

    tuning = minimize(loss, bounds, "nll")
    if not standard_errors or tuning.is_flat:
        return tuning
    low, high = check_bounds(bounds)
    own = min(max(1.0, low), high)
    with contextlib.suppress(PrecisionError, NonFiniteError):
        tuning = tuning.with_tried(own, loss(own))
    return nearest_to_own(tuning, losses, weights, standard_errors, bounds)


def _weights(site: OutputSite, num_data: int) -> Tensor:
    """w of each data point, shape (N,), float64; its elements must agree."""
    weights = site_weights(site.node, site.distribution, without_plates=True)
    by_datum = weights.reshape(num_data, -1)
    if bool((by_datum != by_datum[:, :1]).any()):
        raise OptionError(
            "`val` must have one weight for all elements of a datum; got masks or "
            f"scales that differ within data of site {site.name!r}. Leave partly "
            "observed data out."
        )
    return by_datum[:, 0]
