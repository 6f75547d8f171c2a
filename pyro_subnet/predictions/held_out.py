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
from pyro_subnet.guides.curvature import CurvatureGuide
from pyro_subnet.laplace.search import Tuning, check_bounds, minimize, nearest_to_own
from pyro_subnet.predictions.distribution import predictive_of
from pyro_subnet.predictions.linearized_outputs import LinearizedOutputs, of_site
from pyro_subnet.predictions.links.options import PredictiveOptions
from pyro_subnet.predictions.raw_logits import outputs_of
from pyro_subnet.tensors.grad_mode import outside_inference_mode
from pyro_subnet.tensors.memory import available_bytes
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.data import arguments
from pyro_subnet.tracing.output_site import OutputSite, site_weights

# Share of the free memory that the Jacobian of the held-out data may take.
_SHARE = 0.25


@torch.no_grad()
@outside_inference_mode()
def tune_by_nll(
    guide: CurvatureGuide,
    val: Any,
    bounds: tuple[float, float],
    rescaled: Callable[[float], CurvatureGuide],
    standard_errors: int | float = 0.0,
) -> Tuning:
    r"""The scale whose closed-form predictions of held-out data are best.

    .. math:: -\frac1N \sum_n \log p(y_n \mid x_n)

    The Jacobian of the held-out data is made once, N C S numbers, if they take at most
    a quarter of the free memory, and anew at each scale otherwise. A scale costs a
    factorization, and N C S^2 operations.

    Args:
        guide: The posterior.
        val: Held-out data: what one call of the model takes.
        bounds: Least and largest scale.
        rescaled: The posterior at another scale.
        standard_errors: How many the NLL may be worse than the best by, for a scale
            nearer the model's own; see
            :func:`~pyro_subnet.laplace.search.nearest_to_own`.

    Returns:
        The scale, and the mean negative log density at each that was tried.

    Raises:
        DataError: If ``val`` is no set of arguments, or lacks observations.
        OptionError: If the data have weights that a mean cannot take.
    """
    call = of_site(
        ModelCall.read(guide.user_model, guide.latents, *arguments(val)), None
    )
    (site,) = call.sites
    if not site.node["is_observed"]:
        raise DataError(
            f"`val` must hold observations; got none at site {site.name!r}. Pass what "
            "training takes, such as `val=(x, y)`."
        )
    outputs = outputs_of(call, guide.subnet, guide.gaussian)
    weights = _weights(site, call.num_data)
    value = site.node["value"]
    if _jacobian_bytes(outputs) <= _SHARE * available_bytes(value.device):
        outputs = outputs.holding_rows()

    generator = torch.Generator(value.device)
    losses: dict[float, Tensor] = {}

    def loss(scale: float) -> float:
        other = rescaled(scale)
        # The same draws at every scale, where a family needs any.
        options = PredictiveOptions(
            noise_scale=other.noise_scale, generator=generator.manual_seed(0)
        )
        predictive = predictive_of(outputs.with_gaussian(other.gaussian), options)
        density = predictive.distribution.log_prob(value).to(torch.float64)
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
    """w of each datum, shape (N,), float64."""
    weights = site_weights(site.node, site.distribution, without_plates=True)
    by_datum = weights.reshape(num_data, -1)
    if bool((by_datum != by_datum[:, :1]).any()):
        raise OptionError(
            "`val` must have one weight for all elements of a datum; got masks or "
            f"scales that differ within data of site {site.name!r}. Leave partly "
            "observed data out."
        )
    return by_datum[:, 0]


def _jacobian_bytes(outputs: LinearizedOutputs) -> int:
    numbers = sum(rows * width for rows, width in outputs.outputs.shapes)
    return numbers * outputs.outputs.size * outputs.gaussian.loc.element_size()
