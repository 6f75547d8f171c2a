"""Whether the MAP is one: the gradient that is left, against the curvature."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.diagnostics.conditioning import precision_diagonal
from pyro_subnet.exceptions import NonFiniteError
from pyro_subnet.fit.summary import prior_gradient
from pyro_subnet.fit.sums import Tally
from pyro_subnet.guides.curvature import CurvatureGuide
from pyro_subnet.laplace.evidence import site_scales
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.grad_mode import differentiable
from pyro_subnet.tensors.modes import full_precision
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.data import Data
from pyro_subnet.tracing.log_likelihood import log_likelihood_map

# Ours: a tenth of a standard deviation is not seen in a picture, one is.
_NEGLIGIBLE, _LARGE = 0.1, 1.0


@dataclass(frozen=True, eq=False)
class Stationarity:
    r"""How far the MAP is from where the log joint is stationary; ``print`` judges it.

    Attributes:
        gradient: :math:`g = \nabla_S \log p(D, \hat\theta)`, at the posterior's prior
            and noise scales, unconstrained, shape (S,), float64.
        newton_decrement: :math:`\lambda = \sqrt{g^\top P^{-1} g}`: length of the Newton
            step :math:`P^{-1} g` in posterior standard deviations, where a draw lies
            about :math:`\sqrt S` away. That step would move no linearized output by
            more than λ of its own standard deviations.
        largest_step: Largest :math:`|g_i| / \sqrt{P_{ii}}`: the step of one weight
            alone, in its standard deviations given all others; at most λ.
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

        Also the Kullback-Leibler divergence between the posterior and the one moved by
        that step.
        """
        return 0.5 * self.newton_decrement**2

    def __str__(self) -> str:
        """The verdict."""
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


def stationarity(posterior: CurvatureGuide, *args: Any, **kwargs: Any) -> Stationarity:
    """Measures the gradient at the MAP against the posterior's curvature.

    The Laplace approximation takes it for zero. Weights outside the subnet are not
    looked at. Of a posterior under another prior or noise it is the gradient under
    those: large where they are far from what the MAP was trained with. One pass over
    the data.

    Args:
        posterior: The posterior.
        args: The training data, as the model takes them.
        kwargs: Keyword arguments of the model.

    Returns:
        The gradient, and what it says; its ``str`` is a verdict.

    Raises:
        NonFiniteError: If the gradient is not finite.
        SubnetError: As for ``laplace_approximation``.
    """
    return _stationarity(posterior, Data.single(args, kwargs))


def stationarity_from(
    posterior: CurvatureGuide,
    batches: Iterable[Any],
    *,
    num_data: int | None = None,
    progress: bool = False,
) -> Stationarity:
    """The same, from minibatches that show each datum once.

    Args:
        posterior: The posterior.
        batches: As for ``laplace_approximation_from``.
        num_data: As there.
        progress: Whether to show a progress bar.

    Returns:
        The gradient, and what it says.
    """
    data = Data(batches, whole=False, num_data=num_data, progress=progress)
    return _stationarity(posterior, data)


@torch.inference_mode(False)
@full_precision()
def _stationarity(posterior: CurvatureGuide, data: Data) -> Stationarity:
    latents, subnet, gaussian = posterior.latents, posterior.subnet, posterior.gaussian
    tally, prior = Tally(data), list[Tensor]()
    likelihood = torch.zeros(subnet.size).to(latents.loc.device, torch.float64)
    for args, kwargs in data.calls("Gradient"):
        call = ModelCall.read(posterior.user_model, latents, args, kwargs)
        graph = call.graph()
        terms = tally.check(call, graph)
        if not prior:
            prior.append(prior_gradient(terms, graph.leaves, subnet).double())
        moved = call.moved_parts(graph, subnet)
        del graph, terms  # frees the activations
        if any(moved.values()) and call.num_data:
            density = log_likelihood_map(
                call, subnet, moved, 0, power=1.0, without_plates=not data.whole
            )
            likelihood += _gradient(density.of_sites, density.base, subnet)
    scales = site_scales(posterior.prior_scale, subnet).to(prior[0].device)
    # A normal's log density falls with the square of its scale, and is the only one
    # whose noise is scaled.
    noise = posterior.noise_scale**-2
    gradient = tally.scale() * noise * likelihood + scales * prior[0]
    if not bool(gradient.isfinite().all()):
        raise NonFiniteError(
            "The gradient of the log joint must be finite; got NaN or inf at "
            f"{int((~gradient.isfinite()).sum())} of {subnet.size} weights. Check the "
            "model's densities at the MAP."
        )
    whitened = gaussian.whiten(gradient.to(gaussian.loc)).double()
    steps = gradient.abs() / precision_diagonal(gaussian).double().sqrt()
    return Stationarity(
        gradient,
        math.sqrt(float(whitened.square().sum())),
        float(steps.max()),
        _name(subnet, int(steps.argmax())),
    )


def _gradient(of_sites: Any, base: Any, subnet: Subnet) -> Tensor:
    """Gradient over the subnet of a sum over data, shape (S,), float64."""
    with differentiable():
        leaves = {site: u.detach().clone().requires_grad_() for site, u in base.items()}
        total = sum(part.sum() for part in of_sites(leaves, None))
        found = torch.autograd.grad(
            total, list(leaves.values()), allow_unused=True, materialize_grads=True
        )
    parts = dict(zip(leaves, found, strict=True))
    chosen = subnet.indices.items()
    return torch.cat([parts[site].flatten()[at] for site, at in chosen]).double()


def _name(subnet: Subnet, position: int) -> str:
    """Name of one element, without those of all."""
    one = Subnet(subnet.layout, subnet.flat[position : position + 1])
    return one.names[0]
