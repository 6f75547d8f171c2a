"""Whether the structured route gives a call's Jacobian: compared before it is used.

Two linear maps that agree on a random vector are equal with probability one. A model
that couples its data, or whose layers have them on another axis, does not agree.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from pyro_subnet.curvature.jacobian.output_map import (
    Factors,
    OutputMap,
    agree,
    directional_derivative,
    num_rows,
)
from pyro_subnet.curvature.jacobian.recording import (
    Gradients,
    NotLayered,
    Recording,
)

# The checks draw one vector; any fixed seed serves.
_SEED = 20_106_896
_COUPLED = "the layers couple data, or have them on another axis than the first"


def _random(size: torch.Size | tuple[int, ...], like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(like)


def check_gradient(recording: Recording, factors: Factors, rows: Tensor) -> None:
    r"""Compares with autograd's gradient of the whole call, for a random cotangent u.

    Two linear maps that agree on a random vector, :math:`(R J)^\top u`, are equal with
    probability one: a model that couples its data, or whose layers have them on another
    axis, fails. Costs one backward pass.

    Args:
        recording: A run on all data.
        factors: R of each element.
        rows: Shape (N, rows of a datum, S).

    Raises:
        NotLayered: If they disagree.
    """
    outputs, num_data = recording.outputs, recording.outputs.num_data
    weights = _random(rows.shape[:2], rows)
    found = weights.flatten() @ rows.flatten(0, 1)
    counts = [num_rows(factor, num_data) for factor in factors]
    live, cotangents = [], []
    for value, factor, part in zip(
        recording.values, factors, weights.split(counts, dim=1), strict=True
    ):
        if value.requires_grad:
            u = part.reshape(len(factor), 1, -1)
            live.append(value)
            cotangents.append((u.to(factor) @ factor).squeeze(1).to(value))
    if not live:
        return
    sites = recording.layered_sites
    gradients = torch.autograd.grad(
        live,
        [recording.leaves[site] for site in sites],
        cotangents,
        retain_graph=bool(recording.tape.escaped),
        materialize_grads=True,
    )
    sizes = [at.numel() for at in outputs.chosen.values()]
    pieces = dict(zip(outputs.chosen, found.split(sizes), strict=True))
    ours = torch.cat([pieces[site] for site in sites])
    theirs = torch.cat(
        [
            gradient.flatten()[outputs.chosen[site]]
            for site, gradient in zip(sites, gradients, strict=True)
        ]
    )
    if not agree(ours.unsqueeze(-1), theirs.unsqueeze(-1)):
        raise NotLayered(_COUPLED)


class DerivativeCheck:
    """Compares with the derivative of the whole call along a random direction.

    As :func:`check_gradient`, for groups of data: forward mode keeps no activations.

    Args:
        outputs: The map of the whole call.
    """

    def __init__(self, outputs: OutputMap):
        self.outputs = outputs
        self._direction = _random((outputs.size,), outputs.loc)
        self._modes = [False, True]  # of differentiation: the last one is tried first
        self._escaped: frozenset[str] | None = None
        self._tangents: tuple[Tensor, ...] = ()

    def __call__(
        self, rows: Tensor, factors: Factors, start: int, escaped: Collection[str]
    ) -> None:
        """Checks the rows of a group of data.

        Args:
            rows: Shape (B, rows of a datum, S).
            factors: R of the group's elements.
            start: First datum of the group.
            escaped: Sites whose columns are not filled yet.

        Raises:
            NotLayered: If they disagree.
        """
        if self._escaped != frozenset(escaped):
            self._escaped = frozenset(escaped)
            self._direction = self._without(escaped)
            self._tangents = ()
        found = rows @ self._direction
        while self._tangents or self._modes:
            if self._tangents and agree(found, self._expected(factors, start)):
                return
            self._tangents = ()
            if self._modes:
                self._differentiate(forward_mode=self._modes.pop())
        raise NotLayered(_COUPLED)

    def _without(self, escaped: Collection[str]) -> Tensor:
        sizes = [at.numel() for at in self.outputs.chosen.values()]
        pieces = self._direction.split(sizes)
        return torch.cat(
            [
                torch.zeros_like(piece) if site in escaped else piece
                for site, piece in zip(self.outputs.chosen, pieces, strict=True)
            ]
        )

    def _differentiate(self, forward_mode: bool) -> None:
        outputs = self.outputs
        try:
            self._tangents = directional_derivative(
                outputs.outputs, outputs.loc, self._direction, forward_mode
            )[1]
        # What an operation that cannot be transformed raises depends on it.
        except (NotImplementedError, RuntimeError):
            self._tangents = ()

    def _expected(self, factors: Factors, start: int) -> Tensor:
        num_data = len(factors[0]) // (len(self._tangents[0]) // self.outputs.num_data)
        parts = []
        for factor, tangent in zip(factors, self._tangents, strict=True):
            first = start * len(tangent) // self.outputs.num_data
            part = tangent[first : first + len(factor)].unsqueeze(1).to(factor)
            parts.append(torch.linalg.vecdot(factor, part).reshape(num_data, -1))
        return torch.cat(parts, dim=1)


class SeparationCheck:
    """Compares the derivative of a group of data with that of the whole call.

    Along one random direction, for groups whose rows of J are never formed.

    Args:
        outputs: The map of the whole call.

    Raises:
        NotLayered: If no mode of differentiation serves.
    """

    def __init__(self, outputs: OutputMap):
        self._direction = _random((outputs.size,), outputs.loc)
        for self._forward_mode in (True, False):
            try:
                self._tangents = self._differentiate(outputs)
            except (NotImplementedError, RuntimeError):
                continue
            return
        raise NotLayered("the model has no derivative along a direction")

    def __call__(self, part: OutputMap, start: int) -> None:
        """Checks a group.

        Args:
            part: The map of its data alone.
            start: Its first datum.

        Raises:
            NotLayered: If the derivatives disagree.
        """
        for whole, few in zip(self._tangents, self._differentiate(part), strict=True):
            first = start * len(few) // part.num_data
            if not agree(few, whole[first : first + len(few)]):
                raise NotLayered(_COUPLED)

    def _differentiate(self, outputs: OutputMap) -> tuple[Tensor, ...]:
        return directional_derivative(
            outputs.outputs, outputs.loc, self._direction, self._forward_mode
        )[1]


class MixtureCheck:
    r"""Compares gradients of all data's rows, mixed at random, with one of the mixture.

    Row by row the cotangents of all data are pulled back together. If no layer couples
    data, then datum b of :math:`\sum_k u_{bk}\, \delta_k` is datum b of the gradient of
    :math:`\sum_k u_{bk} R_{bk}\, \eta_b`. Costs one backward pass.

    Args:
        recording: A run of the group's data.
        factors: R of the group's elements.
    """

    def __init__(self, recording: Recording, factors: Factors):
        self._recording = recording
        self._factors = factors
        num_data = recording.outputs.num_data
        counts = [num_rows(factor, num_data) for factor in factors]
        shape = (num_data, sum(counts))
        self._weights = _random(shape, recording.outputs.loc)
        self._per_site = self._weights.split(counts, dim=1)
        self._mixed: list[Tensor | None] = [None] * len(recording.edges)

    def add(self, row: int, deltas: Gradients) -> None:
        """Adds the gradients of one row of every datum.

        Args:
            row: Which, counted over all sites.
            deltas: Gradients of the layers' outputs.
        """
        weights = self._weights[:, row : row + 1]
        for edge, delta in enumerate(deltas):
            if delta is None:
                continue
            part = delta.reshape(len(weights), -1) * weights.to(delta)
            before = self._mixed[edge]
            self._mixed[edge] = part if before is None else before.add_(part)

    def finish(self) -> None:
        """Compares.

        Raises:
            NotLayered: If they disagree.
        """
        sums = list[Tensor | None]([None] * len(self._mixed))
        for site, (factor, weights) in enumerate(
            zip(self._factors, self._per_site, strict=True)
        ):
            u = weights.reshape(len(factor), 1, -1).to(factor)
            cotangent = (u @ factor).squeeze(1).unsqueeze(0)
            (deltas,) = self._recording.gradients(site, cotangent)
            for edge, delta in enumerate(deltas):
                before = sums[edge]
                if delta is not None:
                    sums[edge] = delta if before is None else before + delta
        for mixed, total in zip(self._mixed, sums, strict=True):
            if mixed is None or total is None:
                continue
            if not agree(mixed.reshape(-1, 1), total.reshape(-1, 1)):
                raise NotLayered(_COUPLED)
