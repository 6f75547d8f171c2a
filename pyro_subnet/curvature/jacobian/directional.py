"""Derivatives along one direction, and whether forward mode gives them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_subnet.tensors.agreement import random_direction, random_stream
from pyro_subnet.tensors.modes import differentiable, one_thread_at_a_time
from pyro_subnet.tensors.pullback import weighted_sum

Point = TypeVar("Point")


def forward_derivative(
    function: Callable[[Point], tuple[Tensor, ...]], point: Point, direction: Point
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Outputs of a function, and their derivatives along a direction, forward mode."""
    # Torch counts the levels of forward mode for the whole process: a second thread
    # would be nested in the first one's level, and lose it in the middle.
    with one_thread_at_a_time():
        _set_forward_mode_up()
        outputs, tangents = torch.func.jvp(function, (point,), (direction,))[:2]
    return outputs, tangents


@cache
def _set_forward_mode_up() -> None:
    """Lets torch set its forward mode up, without the warning that this brings."""
    # At its first dual number torch scripts decompositions, and since 2.13 warns that
    # scripting is deprecated (since 2.14 by a FutureWarning, which users see): of that
    # they can mend nothing. Their own function runs under their own filters.
    zero = torch.zeros((), device="cpu")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.script` is")
        torch.func.jvp(torch.neg, (zero,), (zero,))


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


def plain_derivative(
    function: Callable[[Point], tuple[Tensor, ...]], point: Point, direction: Point
) -> tuple[Tensor, ...]:
    """Derivatives of outputs along a direction by plain reverse mode, as constants."""
    # Without `torch.func`, whose first transforms import for seconds.
    leaves, spec = tree_flatten(point)
    live = [leaf.detach().requires_grad_() for leaf in leaves]
    with differentiable():
        values = function(tree_unflatten(live, spec))
        cotangents = [torch.zeros_like(value, requires_grad=True) for value in values]
        # u -> J^T u is linear in u, and its own reverse pass is v -> J v
        gradients = torch.autograd.grad(
            weighted_sum(values, cotangents),
            live,
            create_graph=True,
            materialize_grads=True,
        )
        along = weighted_sum(gradients, tree_flatten(direction)[0])
        if not along.requires_grad:  # no output depends on the point
            return tuple(torch.zeros_like(value) for value in values)
        return torch.autograd.grad(along, cotangents, materialize_grads=True)


def forward_mode_agrees(
    function: Callable[[Point], tuple[Tensor, ...]], point: Point
) -> bool:
    """Whether forward mode runs under ``vmap`` and gives reverse mode's Jacobian."""
    # Some operations lack forward mode, and some have another Jacobian in it: the
    # padding row of an embedding is a constant only in reverse mode, as in training.
    leaves, spec = tree_flatten(point)
    generator = random_stream()

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
        gradients = _plain_gradients(function, point, cotangents)
    # Operations that cannot be transformed raise errors of these kinds.
    except (NotImplementedError, RuntimeError):
        return False
    # u . (J v) = (J^T u) . v
    forward = _products(tangents, cotangents)
    reverse = _products(gradients, direction)
    scale = forward.abs().sum() + reverse.abs().sum()
    tolerance = torch.finfo(forward.dtype).eps ** 0.5 * scale
    return bool((forward.sum() - reverse.sum()).abs() <= tolerance)


def _plain_gradients(
    function: Callable[[Point], tuple[Tensor, ...]],
    point: Point,
    cotangents: Sequence[Tensor],
) -> Sequence[Tensor]:
    """J^T u by leaf of the point, by plain reverse mode."""
    # Without `torch.func.vjp`, whose first call imports for half a second.
    leaves, spec = tree_flatten(point)
    live = [leaf.detach().requires_grad_() for leaf in leaves]
    with differentiable():
        values = function(tree_unflatten(live, spec))
    pairs = zip(values, cotangents, strict=True)
    known = [(value, u) for value, u in pairs if value.requires_grad]
    if not known:
        return [torch.zeros_like(leaf) for leaf in live]
    return torch.autograd.grad(
        weighted_sum(*zip(*known, strict=True)), live, materialize_grads=True
    )


def tangents_hold(
    function: Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]],
    point: Mapping[str, Tensor],
    directions: Mapping[str, Tensor],
    tangents: Sequence[Tensor],
) -> bool:
    """Whether derivatives along directions are those of plain reverse mode."""
    # An axis of several directions may lead, in front of a point's or a value's own.
    leaves = {name: value.detach().requires_grad_() for name, value in point.items()}
    with differentiable():
        values = function(leaves)
    stream, live, cotangents, forward = random_stream(), [], [], []
    for value, tangent in zip(values, tangents, strict=True):
        many = _led(tangent, value)
        # What has no derivative, as the log of probability zero, is left out.
        known = many.isfinite().all(0)
        u = random_direction(value.shape, value, stream).where(known, 0.0)
        forward.append((many.where(known, 0.0) * u).reshape(len(many), -1))
        if value.requires_grad:
            live.append(value)
            cotangents.append(u)
    reverse = [torch.zeros_like(forward[0][:, :1])]
    if live:
        points = list(leaves.values())
        found = torch.autograd.grad(live, points, cotangents, materialize_grads=True)
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True):
            own = _led(directions[name], leaf) * gradient
            reverse.append(own.reshape(len(own), -1).expand(len(forward[0]), -1))
    # u . (J v) = (J^T u) . v
    ours, theirs = torch.cat(forward, dim=1), torch.cat(reverse, dim=1)
    scale = ours.abs().sum(1) + theirs.abs().sum(1)
    tolerance = torch.finfo(ours.dtype).eps ** 0.5 * scale
    return bool(((ours.sum(1) - theirs.sum(1)).abs() <= tolerance).all())


def _led(tensor: Tensor, single: Tensor) -> Tensor:
    """A tensor led by an axis of several, or of one."""
    tensor = tensor.detach()
    return tensor if tensor.ndim > single.ndim else tensor.unsqueeze(0)


def _products(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Elementwise products, flattened: their sum is the inner product."""
    pairs = zip(first, second, strict=True)
    return torch.cat([(a * b).flatten() for a, b in pairs])
