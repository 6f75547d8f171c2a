"""The oracle: every number the slow way, by loops and dense autograd in float64.

Imports nothing from the package, so that it cannot share its mistakes. Vectors over all
D latent elements are packed and unconstrained; matrices are never restricted to a
subnet before the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

Function = Callable[[Tensor], Tensor]


def dense_jacobian(outputs: Function, packed: Tensor) -> Tensor:
    """J of outputs (M, c), shape (M, c, D): one backward pass for each output."""
    return jacobian(outputs, packed)


def dense_ggn(
    outputs: Function, information: Function, weights: Tensor, packed: Tensor
) -> Tensor:
    """Sum over the M elements of w JᵀΛJ, shape (D, D)."""
    total = packed.new_zeros(packed.numel(), packed.numel())
    jac, eta = dense_jacobian(outputs, packed), outputs(packed)
    for element, weight in enumerate(weights):
        fisher = information(eta[element])
        total += weight * jac[element].T @ fisher @ jac[element]
    return total


def dense_negative_hessian(log_density: Function, packed: Tensor) -> Tensor:
    """Second derivatives of -log p, shape (D, D)."""
    return -hessian(log_density, packed)


def log_volume(to_support: Function, unconstrained: Tensor) -> Tensor:
    """Log of the change of volume of a map, from its dense Jacobian.

    A simplex has one coordinate more than it has dimensions: the last one is left out.
    """
    size, shape = unconstrained.numel(), unconstrained.shape
    square = jacobian(
        lambda u: to_support(u.reshape(shape)).flatten()[:size],
        unconstrained.flatten(),
        create_graph=True,
    )
    return torch.linalg.slogdet(square).logabsdet


def stick_breaking(unconstrained: Tensor) -> Tensor:
    """The simplex from breaking a stick; at zero all parts are equal."""
    parts, rest = [], torch.ones((), dtype=unconstrained.dtype)
    for left, value in zip(
        range(unconstrained.numel(), 0, -1), unconstrained, strict=True
    ):
        share = torch.sigmoid(value - math.log(left))
        parts.append(rest * share)
        rest = rest * (1 - share)
    return torch.stack([*parts, rest])


# Fisher information of one element in its unconstrained parameters η.


def location_information(scale: float | Tensor) -> Function:
    """Of normals in their locs, the scale of each being known: diag 1/σ²."""
    return lambda eta: torch.diag(torch.ones_like(eta) / scale**2)


def normal_information(eta: Tensor) -> Tensor:
    """Of a normal in (loc, log scale): E[(y-μ)²]/σ⁴ = 1/σ², E[((y-μ)²/σ² - 1)²] = 2."""
    scale = eta[1].exp()
    return torch.diag(torch.stack([1 / scale**2, torch.full_like(scale, 2.0)]))


def categorical_information(eta: Tensor) -> Tensor:
    """Of a categorical in its logits: scores e_y - p, averaged over the classes y."""
    p = eta.exp() / eta.exp().sum()
    total = torch.zeros(len(p), len(p), dtype=p.dtype)
    for label, probability in enumerate(p):
        score = -p.clone()
        score[label] += 1
        total += probability * torch.outer(score, score)
    return total


def bernoulli_information(eta: Tensor) -> Tensor:
    """Of a Bernoulli in its logit: p (1-p)² + (1-p) p²."""
    p = 1 / (1 + (-eta).exp())
    return (p * (1 - p) ** 2 + (1 - p) * p**2).reshape(1, 1)


def poisson_information(eta: Tensor) -> Tensor:
    """Of a Poisson in its log rate: Var(y) = λ."""
    return eta.exp().reshape(1, 1)


# Gaussians in closed form.


def conditional_covariance(covariance: Tensor, kept: Sequence[int]) -> Tensor:
    """Covariance of some elements of a Gaussian, given all the others."""
    rest = [i for i in range(len(covariance)) if i not in set(kept)]
    own = covariance[kept][:, kept]
    if not rest:
        return own
    cross = covariance[kept][:, rest]
    return own - cross @ torch.linalg.solve(covariance[rest][:, rest], cross.T)


def conjugate_posterior(
    design: Tensor,
    targets: Tensor,
    noise_scale: Tensor,
    prior_loc: Tensor,
    prior_covariance: Tensor,
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of θ for y = Xθ + σε, by conditioning on one y at a time."""
    loc, covariance = prior_loc.clone(), prior_covariance.clone()
    for row, target, scale in zip(design, targets, noise_scale, strict=True):
        gain = covariance @ row / (row @ covariance @ row + scale**2)
        loc = loc + gain * (target - row @ loc)
        covariance = covariance - torch.outer(gain, row @ covariance)
    return loc, covariance


def linear_predictive(
    design: Tensor, loc: Tensor, covariance: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean (M,) and covariance (M, M) of Xθ, without noise."""
    return design @ loc, design @ covariance @ design.T
