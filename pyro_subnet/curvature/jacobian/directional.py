"""Derivatives along one direction, and whether two linear maps agree along it.

Two linear maps that agree on a random vector are equal with probability one: so two
ways to a Jacobian are compared before their numbers are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_subnet.tensors.modes import one_thread_at_a_time

# Types with a larger epsilon have too few digits for the tolerance of the others.
_HALF_EPS = 1e-4
# Any fixed seed serves: what is checked holds for nearly all directions.
_SEED = 20_106_896
Point = TypeVar("Point")


def random_direction(
    shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """A standard normal tensor, the same at every call without a generator."""
    stream = generator or torch.Generator().manual_seed(_SEED)
    return torch.randn(shape, generator=stream, dtype=torch.float64).to(like)


def agree(found: Tensor, expected: Tensor) -> bool:
    """Whether tensors are equal up to the round-off of sums in another order."""
    if found.shape != expected.shape:
        return False
    if found.numel() == 0:
        return True
    finite = expected.isfinite()
    # Infinities must be in the same places: minus infinity is a class of probability 0.
    if not bool(finite.all()):
        same = torch.equal(found.isfinite(), finite)
        return same and agree(found[finite], expected[finite])
    eps = max(torch.finfo(found.dtype).eps, torch.finfo(expected.dtype).eps)
    if eps > _HALF_EPS:  # wrong numbers are off by a large part of the scale
        tolerance = 32 * eps
    else:
        tolerance = 100 * math.sqrt(found.shape[-1]) * eps**0.75
    scale = expected.abs().amax()
    return bool(((found - expected).abs() <= tolerance * scale).all())


def forward_derivative(
    function: Callable[[Point], tuple[Tensor, ...]], point: Point, direction: Point
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Outputs of a function, and their derivatives along a direction, forward mode."""
    # Torch counts the levels of forward mode for the whole process: a second thread
    # would be nested in the first one's level, and lose it in the middle.
    with one_thread_at_a_time():
        outputs, tangents = torch.func.jvp(function, (point,), (direction,))[:2]
    return outputs, tangents


def directional_derivative(
    function: Callable[[Point], tuple[Tensor, ...]],
    point: Point,
    direction: Point,
    forward_mode: bool,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Outputs of a function, and their derivatives along a direction."""
    if forward_mode:
        return forward_derivative(function, point, direction)
    # u -> J^T u is linear in u, and its own reverse pass is v -> J v
    outputs, pullback = torch.func.vjp(function, point)[:2]
    zeros = tuple(torch.zeros_like(output) for output in outputs)
    pushforward = torch.func.vjp(lambda *u: pullback(u)[0], *zeros)[1]
    return outputs, pushforward(direction)


def forward_mode_agrees(
    function: Callable[[Point], tuple[Tensor, ...]], point: Point
) -> bool:
    """Whether forward mode runs under ``vmap`` and gives reverse mode's Jacobian."""
    # Some operations lack forward mode, and some have another Jacobian in it: the
    # padding row of an embedding is a constant only in reverse mode, as in training.
    leaves, spec = tree_flatten(point)
    generator = torch.Generator().manual_seed(_SEED)

    def random_like(tensor: Tensor) -> Tensor:
        return random_direction(tensor.shape, tensor, generator)

    def push(direction: list[Tensor]) -> tuple[Tensor, ...]:
        at = tree_unflatten(direction, spec)
        return forward_derivative(function, point, at)[1]

    direction = [random_like(leaf) for leaf in leaves]
    try:
        batched = torch.func.vmap(push)([leaf.unsqueeze(0) for leaf in direction])
        tangents = tuple(tangent.squeeze(0) for tangent in batched)
        cotangents = tuple(random_like(tangent) for tangent in tangents)
        pullback = torch.func.vjp(function, point)[1]
        gradients = tree_flatten(pullback(cotangents)[0])[0]
    # Operations that cannot be transformed raise errors of these kinds.
    except (NotImplementedError, RuntimeError):
        return False
    # u . (J v) = (J^T u) . v
    forward = _products(tangents, cotangents)
    reverse = _products(gradients, direction)
    scale = forward.abs().sum() + reverse.abs().sum()
    tolerance = torch.finfo(forward.dtype).eps ** 0.5 * scale
    return bool((forward.sum() - reverse.sum()).abs() <= tolerance)


def _products(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Elementwise products, flattened: their sum is the inner product."""
    pairs = zip(first, second, strict=True)
    return torch.cat([(a * b).flatten() for a, b in pairs])
