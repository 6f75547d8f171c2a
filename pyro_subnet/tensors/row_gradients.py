"""Gradients of one tensor for several cotangents, a row each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.tensors.agreement import agree, random_direction
from pyro_subnet.tensors.pullback import weighted_sum

Cotangents = Float[Tensor, "rows *shape"]


@final
class RowGradients:
    """Gradients of ``value`` at ``points``, by one backward pass for many cotangents.

    Operations may lack a rule for batched passes, or have a wrong one: one mixture of
    each batch's rows is held to plain reverse mode, and from the first that disagrees
    on, each row has a pass of its own.

    Args:
        create_graph: Whether rows carry gradients; then each has a pass of its own.
    """

    def __init__(
        self, value: Tensor, points: Sequence[Tensor], *, create_graph: bool = False
    ):
        self._value, self._points = value, list(points)
        self._create_graph = create_graph
        self._batched = not create_graph  # not every second derivative can be batched

    def __call__(self, cotangents: Cotangents) -> list[Tensor]:
        """Rows at each of the points, (rows, *its shape); zeros where it is unused."""
        if not self._value.requires_grad:
            return [p.new_zeros(len(cotangents), *p.shape) for p in self._points]
        if self._batched and len(cotangents) > 1:
            rows = self._checked_batch(cotangents)
            if rows is not None:
                return rows
            self._batched = False
        found = [self._pull(cotangent) for cotangent in cotangents]
        return [torch.stack(own) for own in zip(*found, strict=True)]

    def _checked_batch(self, cotangents: Tensor) -> list[Tensor] | None:
        """All rows by one pass; None if it fails, or is not plain reverse mode's."""
        try:
            found = torch.autograd.grad(
                self._value,
                self._points,
                cotangents,
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=True,
            )
        except RuntimeError:  # an operation has no batching rule
            return None
        rows = [
            point.new_zeros(len(cotangents), *point.shape) if part is None else part
            for part, point in zip(found, self._points, strict=True)
        ]
        u = random_direction((len(cotangents),), self._value)
        expected = self._pull(torch.tensordot(u.to(cotangents), cotangents, 1))
        mixed = [torch.tensordot(u.to(part), part, 1) for part in rows]
        is_right = agree(_column(mixed), _column(expected))
        return rows if is_right else None

    def _pull(self, cotangent: Tensor) -> Sequence[Tensor]:
        return torch.autograd.grad(
            weighted_sum([self._value], [cotangent]),
            self._points,
            retain_graph=True,
            create_graph=self._create_graph,
            materialize_grads=True,
        )


def _column(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts]).unsqueeze(-1)
