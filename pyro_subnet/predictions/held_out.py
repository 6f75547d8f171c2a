"""Tuning by the evidence, or by the predictive density of held-out data."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from pyro_subnet.exceptions import (
    DataError,
    ModelError,
    NonFiniteError,
    OptionError,
    PrecisionError,
    TuningWarning,
    warn,
)
from pyro_subnet.gaussians.base import Gaussian
from pyro_subnet.laplace.search import check_bounds, minimize, nearest_to_own
from pyro_subnet.laplace.state import PosteriorState
from pyro_subnet.laplace.tuning import check_tuning
from pyro_subnet.predictions.distribution import of_site, predictive_distribution
from pyro_subnet.predictions.links.integration import PredictiveOptions
from pyro_subnet.predictions.outputs import OutputGaussian
from pyro_subnet.predictions.raw_logits import with_raw_logits
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.memory import available_bytes
from pyro_subnet.tensors.modes import outside_inference_mode
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.data import held_out_data
from pyro_subnet.tracing.data_values import check_data
from pyro_subnet.tracing.linearized_outputs import LinearizedOutputs
from pyro_subnet.tracing.output_site import OutputSite
from pyro_subnet.tracing.trace import ModelAtMAP

# Share of the free memory that the Jacobian of the held-out data may take.
_SHARE = 0.25
# By how many standard errors held-out data must argue against the model's own prior.
_STANDARD_ERRORS = 2
# Times the model's own noise: more is no noise of a trained network.
_MOST_NOISE = 1e3


@final
@dataclass(frozen=True, eq=False)
class HowToTune:
    """What was asked for; see ``tune_prior_precision`` of the posterior guide."""

    method: str
    val: Any
    bounds: tuple[float, float]
    per_site: bool = False
    standard_errors: int | float | None = None

    def __post_init__(self) -> None:
        check_tuning(self.method, self.val, self.per_site, self.standard_errors)


def tuned_prior(
    at_map: ModelAtMAP, state: PosteriorState, how: HowToTune
) -> PosteriorState:
    """The state under the prior precision that serves best."""
    if how.method == "evidence":
        return state.tuned_prior(how.bounds, per_site=how.per_site)
    errors = how.standard_errors
    found = _tuned_by_nll(
        at_map,
        state,
        state.with_prior_factor,
        how.val,
        how.bounds,
        standard_errors=_STANDARD_ERRORS if errors is None else errors,
    )
    low, high = how.bounds
    unasked = errors is None and low <= 1 <= high
    return _with_prior_of(state, found) if unasked and found.is_deleted else found


def _with_prior_of(state: PosteriorState, found: PosteriorState) -> PosteriorState:
    """The state under the prior it had, where the chosen one leaves nothing."""
    tuning = found.tunings["prior"]
    warn(
        f"The held-out data ask for {tuning.best:.1g} times the prior's precision, "
        "which leaves nothing of the posterior: the model's own prior stays. They show "
        "no shift, or the noise is too large for them: tune by 'evidence', or set the "
        "noise first, `posterior.tune(val=...)`. To take their choice all the same, "
        "pass `standard_errors=2`.",
        TuningWarning,
    )
    own, by_site = state.prior_factor, None
    if isinstance(own, Mapping):
        by_site, own = own, statistics.geometric_mean(own.values())
    kept = replace(tuning, best=own, by_site=by_site, at_bound=False)
    return found.with_prior_factor(by_site or own, kept)


def tuned_noise(
    at_map: ModelAtMAP, state: PosteriorState, how: HowToTune
) -> PosteriorState:
    """The state under the normal noise that serves best."""
    if how.method == "evidence":
        return state.tuned_noise(how.bounds)
    return _tuned_by_nll(at_map, state, state.with_noise_factor, how.val, how.bounds)


def held_out_noise(
    at_map: ModelAtMAP, state: PosteriorState, val: Any, least: float
) -> float:
    """The factor of the noise under which held-out data are predicted best.

    Data that the posterior's own variance covers ask for no noise at all, which
    residuals on the training data contradict.

    Args:
        at_map: The model at the MAP.
        state: The posterior.
        val: Held-out data.
        least: The least factor, that of the residuals on the training data.

    Returns:
        The factor.
    """
    how = HowToTune("nll", val, (least, _MOST_NOISE * max(least, 1.0)))
    return tuned_noise(at_map, state, how).noise_factor


@torch.no_grad()
@outside_inference_mode()
def _tuned_by_nll(
    at_map: ModelAtMAP,
    state: PosteriorState,
    rescaled: Callable[..., PosteriorState],
    val: Any,
    bounds: tuple[float, float],
    *,
    standard_errors: int | float = 0.0,
) -> PosteriorState:
    r"""Returns the state whose closed-form predictions of held-out data are best.

    .. math:: -\frac1N \sum_n \log p(y_n \mid x_n)

    ``rescaled`` makes it of a scale, and of how that was chosen. Data of several
    observed sites count alike, each by its own density.

    The Jacobian of the held-out data is computed once, N C S numbers, if they take at
    most a quarter of the free memory, and anew at each scale otherwise. A scale costs a
    factorization, and N C S^2 operations. With ``standard_errors`` k the NLL may be k
    of them worse than the best, for a scale nearer the model's own.

    Raises:
        DataError: If ``val`` is no set of arguments, lacks observations, or holds some
            that the likelihood forbids.
    """
    data = held_out_data(val)
    held_out = [
        part
        for batch in data.calls("Held-out")
        for part in _HeldOut.of_call(at_map, state.subnet, *batch)
    ]
    like = state.gaussian.loc
    numbers = sum(part.num_elements for part in held_out)
    device = held_out[0].value.device
    if numbers * like.element_size() <= _SHARE * available_bytes(device):
        held_out = [part.holding_rows(like) for part in held_out]
    weights = torch.cat([part.weights for part in held_out])

    generator = torch.Generator(device)
    losses: dict[float, Tensor] = {}

    def loss(scale: float) -> float:
        other = rescaled(scale)
        # The same draws at every scale, where a family needs any.
        options = PredictiveOptions(
            noise_factor=other.noise_factor, generator=generator.manual_seed(0)
        )
        gaussian = other.gaussian
        density = torch.cat([part.log_density(gaussian, options) for part in held_out])
        # What is left out may be NaN, which a weight of zero does not remove.
        density = density.where(weights > 0, 0.0)
        if standard_errors:
            losses[scale] = -density
        return -float((weights * density).sum() / weights.sum())

    tuning = minimize(loss, bounds, "nll")
    if standard_errors and not tuning.is_flat:
        low, high = check_bounds(bounds)
        nearest = min(max(1.0, low), high)
        with contextlib.suppress(PrecisionError, NonFiniteError):
            tuning = tuning.with_tried(nearest, loss(nearest))
        tuning = nearest_to_own(tuning, losses, weights, standard_errors, bounds)
    return rescaled(tuning.best, tuning)


@final
@dataclass(frozen=True, eq=False)
class _HeldOut:
    """A site in one call: its outputs, y, and w of each data point, (N,)."""

    outputs: LinearizedOutputs
    weights: Tensor
    value: Tensor

    @classmethod
    def of_call(
        cls,
        at_map: ModelAtMAP,
        subnet: Subnet,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> list[_HeldOut]:
        """Each observed site in one call on held-out data."""
        call = ModelCall.read(at_map, args, kwargs)
        if call.factors:
            raise ModelError(
                "Held-out data must all be observed, for a predictive density; got "
                f"`pyro.factor` site {next(iter(call.factors))!r} in the data's plate. "
                "Observe them by a distribution, or tune by method='evidence'."
            )
        return [cls.read(of_site(call, site.name), site, subnet) for site in call.sites]

    @classmethod
    def read(cls, call: ModelCall, site: OutputSite, subnet: Subnet) -> _HeldOut:
        """The one site of a call."""
        if not site.node["is_observed"]:
            raise DataError(
                f"`val` must hold observations; got none at site {site.name!r}. Pass "
                "what training takes, such as `val=(x, y)`."
            )
        check_data(site)
        outputs = with_raw_logits(LinearizedOutputs.read(call, subnet))
        return cls(outputs, _weights(site, call.num_data), site.value)

    @property
    def num_elements(self) -> int:
        """N C S, the numbers of the Jacobian."""
        outputs = self.outputs.outputs
        return sum(rows * width for rows, width in outputs.shapes) * outputs.size

    def holding_rows(self, like: Tensor) -> _HeldOut:
        return replace(self, outputs=self.outputs.holding_rows(like))

    def log_density(self, gaussian: Gaussian, options: PredictiveOptions) -> Tensor:
        problem = OutputGaussian(self.outputs, gaussian).problem(options)
        found = predictive_distribution(problem).distribution
        return found.log_prob(self.value).to(torch.float64)


def _weights(site: OutputSite, num_data: int) -> Tensor:
    """w of each data point, shape (N,), float64; its elements must agree."""
    weights = site.weights(without_plates=True)
    by_datum = weights.reshape(num_data, -1)
    if bool((by_datum != by_datum[:, :1]).any()):
        raise OptionError(
            "`val` must have one weight for all elements of an observation; got masks "
            f"or scales that differ within data of site {site.name!r}. Leave partly "
            "observed data out."
        )
    return by_datum[:, 0]
