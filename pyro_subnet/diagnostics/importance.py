"""Importance sampling: whether weighted draws reach the exact posterior."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from pyro import poutine
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor
from tqdm import tqdm

from pyro_subnet.diagnostics.probabilities import tensors_of
from pyro_subnet.exceptions import DataError, NonFiniteError, OptionError, shown
from pyro_subnet.guides.posterior import AutoSubnetMultivariateNormal
from pyro_subnet.models.subnet_prior import SITE
from pyro_subnet.options import is_count
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.trace import apart

# Fewest weights to fit a Pareto tail to, and fewest draws for smoothing to be of use.
_MIN_TAIL, _MIN_SAMPLES = 5, 25
# Log weights that differ by less are equal up to round-off.
_EQUAL = 1e-6
# Vehtari et al. (2024), section 3.2.
_GOOD, _OK = 0.5, 0.7


@final
@dataclass(frozen=True, eq=False)
class ImportanceCheck:
    r"""What importance sampling says about a posterior; ``print`` says it in words.

    Attributes:
        log_weights: Pareto-smoothed, normalized log weights of the draws, shape (K,).
        draws: The draws of the subnet, unconstrained, shape (K, S).
        k_hat: Shape of the generalized Pareto distribution that fits the largest raw
            weights, whose moments are finite below order :math:`1/\hat k`. Below 0.7,
            Monte Carlo estimates with these weights can be trusted. Minus infinity
            where all weights are equal, since there is no tail to fit.
        effective_sample_size: How many independent draws of the exact posterior the
            weighted draws are worth, :math:`1 / \sum_k \tilde w_k^2`.
        linearized: Whether the exact posterior is that of the linearized model.

    Source: Vehtari, Simpson, Gelman, Yao and Gabry (2024), "Pareto smoothed importance
    sampling", arXiv 1507.02646; Yao et al. (2018), "Yes, but did it work?",
    arXiv 1802.02538.
    """

    log_weights: Float[Tensor, " draws"]
    draws: Float[Tensor, "draws subnet"]
    k_hat: float
    effective_sample_size: float
    linearized: bool

    @property
    def max_k_hat(self) -> float:
        r"""Largest k-hat for K draws, :math:`\min(1 - 1/\log_{10} K,\; 0.7)`."""
        return min(1 - 1 / math.log10(len(self.log_weights)), _OK)

    @property
    def is_reliable(self) -> bool:
        """Whether weighted draws represent the exact posterior."""
        return self.k_hat < self.max_k_hat

    def posterior_samples(self) -> dict[str, Tensor]:
        """Draws of the exact posterior: these draws resampled by weight.

        Returns:
            ``{"subnet": shape (K, S)}``, for ``Predictive(hybrid_model, ...)``.
        """
        count = len(self.log_weights)
        picked = self.log_weights.exp().multinomial(count, replacement=True)
        return {SITE: self.draws[picked]}

    def __str__(self) -> str:
        count, ess = len(self.log_weights), self.effective_sample_size
        target = "linearized model" if self.linearized else "network"
        exact = f"the exact posterior of the {target}"
        if self.k_hat < min(_GOOD, self.max_k_hat):
            verdict = f"the Laplace posterior is close to {exact}"
        elif self.is_reliable:
            verdict = (
                f"the Laplace posterior differs from {exact}, but weighted draws "
                "correct it"
            )
        elif self.k_hat < _OK:
            verdict = (
                f"{count} draws are too few to tell (they serve up to k-hat "
                f"{self.max_k_hat:.2f}); draw more"
            )
        else:
            verdict = (
                f"the Laplace posterior misses much of {exact}, and weights cannot "
                "correct it; run MCMC on the hybrid model, choose fewer weights, or "
                "judge by held-out data"
            )
        size = f"effective sample size {ess:.0f} of {count} draws"
        tail = f"k-hat {self.k_hat:.2f}"
        if self.k_hat == -math.inf:  # no tail to fit
            tail = "all weights equal"
        return f"{tail}, {size}: {verdict}."


def importance_check(
    posterior: AutoSubnetMultivariateNormal,
    *args: Any,
    num_samples: int = 1000,
    linearized: bool = False,
    progress: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
) -> ImportanceCheck:
    r"""Compares the Laplace posterior with the exact posterior of the hybrid model.

    Draws from the Laplace posterior q are weighted by :math:`w_k = p(y, \theta_k) /
    q(\theta_k)`, and the largest weights are smoothed. The model runs once for each
    draw. A mismatch that is small in each of many dimensions adds up: with hundreds of
    weights k-hat is often large though predictions are good. A large k-hat says what
    weighting cannot correct; judge predictions by held-out data. The prior is the
    model's own, also if the posterior has another prior precision
    (``with_prior_precision``).

    Args:
        posterior: The posterior.
        args: The training data, as the model takes them.
        num_samples: K, the number of draws.
        linearized: Whether to compare with the linearized model, which the Laplace
            posterior is made for, rather than the network.
        progress: Whether to show a progress bar.
        model_kwargs: Keyword arguments of the model.

    Returns:
        k-hat, effective sample size and weights; its ``str`` is a verdict.

    Raises:
        OptionError: If there are fewer than 25 draws.
        DataError: If observations are missing.
        NonFiniteError: If a weight is NaN, or all are zero.

    Source: Vehtari et al. (2024), arXiv 1507.02646.
    """
    if not is_count(num_samples) or num_samples < _MIN_SAMPLES:
        raise OptionError(
            f"`num_samples` must be at least {_MIN_SAMPLES}, for a tail to be seen; "
            f"got {shown(num_samples)}. Take 1000 or more."
        )
    kwargs = dict(model_kwargs or {})
    _check_observed(ModelCall.read(posterior.at_map, args, kwargs))
    hybrid = posterior.hybrid_model(linearized=linearized)
    q = posterior.get_posterior()
    with torch.no_grad(), apart():
        draws = q.sample(torch.Size([num_samples]))
        found = []
        for theta in tqdm(draws, "Weights", disable=not progress):
            given = poutine.condition(hybrid, data={SITE: theta})
            with poutine.block():
                trace = poutine.trace(given).get_trace(*args, **kwargs)
                found.append(trace.log_prob_sum())
        # log w_k = log p(y, theta_k) - log q(theta_k)
        raw = torch.stack(found).double() - q.log_prob(draws).double()
    if bool(raw.isnan().any()) or not bool(raw.isfinite().any()):
        raise NonFiniteError(
            "Log weights must be numbers, and not all minus infinity; got "
            f"{int(raw.isnan().sum())} NaN and {int(raw.isinf().sum())} infinite of "
            f"{num_samples}. Check the model at draws of the posterior."
        )
    log_weights, k_hat = pareto_smoothed(raw)
    size = float((-(2 * log_weights).logsumexp(0)).exp())
    return ImportanceCheck(log_weights, draws, k_hat, size, linearized)


def _check_observed(call: ModelCall) -> None:
    """Refuses a call without data: reading it has refused those of other shapes."""
    for site in call.sites:
        if not site.node["is_observed"]:
            raise DataError(
                "The training data must be given, as weights are those of their "
                f"likelihood; got none at site {site.name!r}. Pass what the fit took, "
                "such as `(x, y)`."
            )


def pareto_smoothed(
    log_weights: Float[Tensor, " draws"],
) -> tuple[Float[Tensor, " draws"], float]:
    r"""Replaces the largest weights by quantiles of a Pareto distribution.

    Args:
        log_weights: Raw log weights, up to a constant, shape (K,).

    Returns:
        Normalized smoothed log weights, in float64, and :math:`\hat k`: minus infinity
        if all are equal, infinity if too few differ for a fit.

    The fit is Pyro's, whose ``psis_diagnostic`` returns :math:`\hat k` without weights;
    ArviZ has both, and would bring pandas, xarray and SciPy for these lines.

    Source: Vehtari et al. (2024), algorithm 1, arXiv 1507.02646.
    """
    (log_weights,) = tensors_of(log_weights=log_weights)
    raw = log_weights.double() - log_weights.max()
    count = len(raw)
    if -float(raw.min()) < _EQUAL:
        return raw - raw.logsumexp(0), -math.inf
    num_tail = math.ceil(min(0.2 * count, 3 * math.sqrt(count)))
    values, order = raw.sort()
    # At least the smallest float: weights above a cutoff of zero would be no tail.
    smallest = torch.full_like(values[0], math.log(torch.finfo(raw.dtype).tiny))
    cutoff = values[-num_tail - 1].maximum(smallest)
    is_tail = values > cutoff
    tail = values[is_tail]
    if len(tail) < _MIN_TAIL:
        return raw - raw.logsumexp(0), math.inf
    # On the CPU, where Pyro makes the grid of its fit.
    k_hat, sigma = fit_generalized_pareto((tail.exp() - cutoff.exp()).cpu())
    if math.isfinite(k_hat):
        places = (torch.arange(len(tail)).to(raw) + 0.5) / len(tail)
        excess = _pareto_quantiles(places, k_hat, sigma)
        smoothed = (excess + cutoff.exp()).log()
        raw = raw.index_put((order[is_tail],), smoothed)
        raw = raw.clamp(max=0.0)  # no weight above the largest raw one
    return raw - raw.logsumexp(0), float(k_hat)


def _pareto_quantiles(places: Tensor, k: float, sigma: float) -> Tensor:
    """sigma ((1 - p)^-k - 1) / k, at places p."""
    if abs(k) < torch.finfo(places.dtype).eps:
        return -sigma * (-places).log1p()
    return sigma / k * torch.expm1(-k * (-places).log1p())
