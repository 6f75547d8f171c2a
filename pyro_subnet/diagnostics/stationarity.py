"""Whether the MAP is stationary: the gradient there, against the curvature."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.curvature.density_term import DensityTerm
from pyro_subnet.curvature.jacobian.output_map import OutputMap
from pyro_subnet.curvature.prior import prior_gradient
from pyro_subnet.exceptions import NonFiniteError
from pyro_subnet.fit.passes import DataPass
from pyro_subnet.guides.posterior import AutoSubnetMultivariateNormal
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.modes import differentiable, full_precision
from pyro_subnet.tracing.data import Data

# Our choice: in a picture a tenth of a standard deviation is not seen, and one is.
_NEGLIGIBLE, _LARGE = 0.1, 1.0


@final
@dataclass(frozen=True, eq=False)
class Stationarity:
    r"""How far the MAP is from where the log joint is stationary; ``print`` judges it.

    Attributes:
        gradient: :math:`g = \nabla_S \log p(D, \hat\theta)`, at the posterior's prior
            and noise scales, unconstrained, shape (S,), float64.
        newton_decrement: :math:`\lambda = \sqrt{g^\top P^{-1} g}`: length of the Newton
            step :math:`P^{-1} g` in posterior standard deviations; a draw lies about
            :math:`\sqrt S` away. The step would move no linearized output by more than
            λ of its own standard deviations.
        largest_step: Largest :math:`|g_i| / \sqrt{P_{ii}}`: the step of one weight by
            itself, in its standard deviations given all others; at most λ.
        worst: Name of that weight.

    Source: Boyd and Vandenberghe (2004), "Convex optimization", section 9.5.1, for λ.
    """

    gradient: Float[Tensor, " subnet"]
    newton_decrement: float
    largest_step: float
    worst: str

    @property
    def expected_gain(self) -> float:
        r"""Nats that a Newton step would add to the log joint, :math:`\lambda^2 / 2`.

        Also the Kullback-Leibler divergence between the posterior and its copy moved by
        that step.
        """
        return 0.5 * self.newton_decrement**2

    def __str__(self) -> str:
        numbers = (
            f"Newton decrement {self.newton_decrement:.3g}, expected gain "
            f"{self.expected_gain:.3g} nats, largest step {self.largest_step:.3g} "
            f"standard deviations at {self.worst}"
        )
        if self.newton_decrement <= _NEGLIGIBLE:
            verdict = (
                "over the subnet the MAP is stationary for all that predictions see"
            )
        elif self.newton_decrement <= _LARGE:
            verdict = "the MAP is off by less than the posterior's own uncertainty"
        else:
            verdict = (
                "over the subnet the MAP is not stationary; train on, with a smaller "
                "learning rate, before the approximation"
            )
        return f"{numbers}: {verdict}."


def stationarity(
    posterior: AutoSubnetMultivariateNormal, *args: Any, **kwargs: Any
) -> Stationarity:
    """Measures the gradient at the MAP against the posterior's curvature.

    The Laplace approximation takes the gradient to be zero. Weights outside the subnet
    are not looked at. The gradient is that under the posterior's own prior and noise
    factors, so it is large if these are far from what the MAP was trained with. It
    takes one pass over the data.

    Args:
        posterior: The posterior.
        args: The training data, as the model takes them.
        kwargs: Keyword arguments of the model.

    Returns:
        The gradient and its sizes; ``print`` shows a verdict.

    Raises:
        NonFiniteError: If the gradient is not finite.
        SubnetError: As for ``laplace_approximation``.
    """
    return _stationarity(posterior, Data.single(args, kwargs))


def stationarity_from(
    posterior: AutoSubnetMultivariateNormal,
    batches: Iterable[Any],
    *,
    num_data: int | None = None,
    progress: bool = False,
) -> Stationarity:
    """As :func:`stationarity`, from minibatches that show each data point once.

    Args:
        posterior: The posterior.
        batches: As for ``laplace_approximation_from``.
        num_data: As for ``laplace_approximation_from``.
        progress: Whether to show a progress bar.

    Returns:
        The gradient and its sizes.
    """
    data = Data(batches, whole=False, num_data=num_data, progress=progress)
    return _stationarity(posterior, data)


@torch.inference_mode(False)
@full_precision()
def _stationarity(posterior: AutoSubnetMultivariateNormal, data: Data) -> Stationarity:
    at_map, state = posterior.at_map, posterior.state
    subnet, gaussian = state.subnet, state.gaussian

    def read_prior(
        terms: Sequence[DensityTerm], leaves: Mapping[str, Tensor]
    ) -> Tensor:
        return prior_gradient(terms, leaves, subnet).double()

    likelihood = torch.zeros(subnet.size).to(gaussian.loc.device, torch.float64)

    def add_terms(terms: Sequence[DensityTerm], leaves: Mapping[str, Tensor]) -> None:
        likelihood.add_(prior_gradient(terms, leaves, subnet))

    passed = DataPass(at_map, subnet, data, read_prior, add_terms)
    for call in passed.calls(data.calls("Gradient")):
        likelihood += _gradient(call.log_likelihood(1.0), subnet)
    scales = state.prior_factors.to(passed.prior.device)
    # Only normal noise is scaled, and a normal's gradient is proportional to sigma^-2.
    noise = state.noise_factor**-2
    gradient = passed.scale * noise * likelihood + scales * passed.prior
    if not bool(gradient.isfinite().all()):
        raise NonFiniteError(
            "The gradient of the log joint must be finite; got NaN or inf at "
            f"{int((~gradient.isfinite()).sum())} of {subnet.size} weights. Check the "
            "model's densities at the MAP."
        )
    whitened = gaussian.whiten(gradient.to(gaussian.loc)).double()
    steps = gradient.abs() / gaussian.precision_diagonal().double().sqrt()
    return Stationarity(
        gradient,
        math.sqrt(float(whitened.square().sum())),
        float(steps.max()),
        subnet.layout.element(int(subnet.flat[steps.argmax()])),
    )


def _gradient(density: OutputMap, subnet: Subnet) -> Tensor:
    """Gradient of a sum over data, for the subnet's elements, shape (S,), float64."""
    with differentiable():
        leaves = {
            site: u.detach().clone().requires_grad_()
            for site, u in density.base.items()
        }
        parts = density.of_sites(leaves, None)
        total = torch.stack([part.sum() for part in parts]).sum()
        found = torch.autograd.grad(
            total, list(leaves.values()), allow_unused=True, materialize_grads=True
        )
    of_site = dict(zip(leaves, found, strict=True))
    chosen = subnet.indices.items()
    return torch.cat([of_site[site].flatten()[at] for site, at in chosen]).double()
