"""Whether the structured route gives a call's Jacobian: compared before it is used.

Two linear maps that agree on a random vector are equal with probability one. A model
that couples its data, or whose layers have them on another axis, does not agree.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_subnet.curvature.jacobian.output_map import (
    Factors,
    OutputMap,
    agree,
    num_rows,
)
from pyro_subnet.curvature.jacobian.structured.recording import (
    Gradients,
    NotLayered,
    Recording,
)
from pyro_subnet.tensors.modes import differentiable

# The checks draw one vector; any fixed seed serves.
_SEED = 20_106_896
# Data that are differentiated together and apart. Odd, so that steps of a power of two
# from datum to datum do not end where they began.
_FEW = 7
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


def check_separation(outputs: OutputMap) -> None:
    """Compares gradients of a few data with those of each part of them.

    For a random cotangent. With :func:`check_gradient` or :class:`MixtureCheck` on
    every group of data, and every group's values those of the whole call
    (``recording.py``), it makes sure that groups may be differentiated by themselves.
    What those two miss is a derivative that follows other data, or a datum's place,
    where values do not: a term whose gradient is stopped, a row of a constant weight.

    Args:
        outputs: The map of the whole call, of two data at least.

    Raises:
        NotLayered: If they disagree, or the model does not run on fewer data.
    """
    stop = outputs.num_data
    start = max(0, stop - _FEW)
    middle = (start + stop) // 2
    try:
        together = outputs.at(start, stop)
        cotangents = [_random(value.shape, value) for value in together.reference]
        for first, last in ((start, middle), (middle, stop)):
            inside = slice(first - start, last - start)
            own = [_of_data(u, together.num_data, inside) for u in cotangents]
            alone = _gradient(outputs.at(first, last), own)
            among = [torch.zeros_like(u) for u in cotangents]
            for u, part in zip(among, own, strict=True):
                _of_data(u, together.num_data, inside).copy_(part)
            if not agree(alone, _gradient(together, among)):
                raise NotLayered(_COUPLED)
    except NotLayered:
        raise
    # On fewer data the user's code may fail in ways of its own.
    except Exception as error:
        raise NotLayered("fewer data do not pass the layers") from error


def _of_data(elements: Tensor, num_data: int, which: slice) -> Tensor:
    """Elements of some data, a view."""
    return elements.unflatten(0, (num_data, -1))[which].flatten(0, 1)


def _gradient(outputs: OutputMap, cotangents: Sequence[Tensor]) -> Tensor:
    """Gradient at the chosen elements, (S, 1), by plain reverse mode."""
    leaves = {s: v.detach().requires_grad_() for s, v in outputs.base.items()}
    with differentiable():
        values = outputs.of_sites(leaves, None)
    pairs = zip(values, cotangents, strict=True)
    live = [(value, u.to(value)) for value, u in pairs if value.requires_grad]
    if not live:
        return outputs.loc.new_zeros(outputs.size, 1)
    gradients = torch.autograd.grad(
        [value for value, _ in live],
        list(leaves.values()),
        [u for _, u in live],
        materialize_grads=True,
    )
    pieces = zip(gradients, outputs.chosen.values(), strict=True)
    return torch.cat([part.flatten()[at] for part, at in pieces]).unsqueeze(-1)


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
