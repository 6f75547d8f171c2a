"""Selectors that were tried for the default and are not in the package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, final

import torch
from torch import Tensor

from pyro_subnet.selection import LargestVariance, PredictiveVariance
from pyro_subnet.selection.base import GuideAtMAP, Selector, resolve_size
from pyro_subnet.selection.output_variance import dense_precision, output_gram
from pyro_subnet.subnet import Layout, Subnet
from pyro_subnet.tracing.data import Data

# How far from their mean inputs "around" lie, in units of the data's own distance.
_AROUND = 2.0


@final
@dataclass(frozen=True, eq=False)
class HalfAndHalf(Selector):
    """Half by largest variance, half by what keeps most predictive variance."""

    size: float
    passes_over_data = True

    def __call__(self, guide: GuideAtMAP, data: Data) -> Subnet:
        layout = guide.latents.layout
        size = resolve_size(self.size, layout.num_params)
        chosen = set(LargestVariance(max(1, size // 2))(guide, data).flat.tolist())
        count = 0
        while len(chosen) < size:  # both may have chosen a weight
            count += size - len(chosen)
            chosen |= set(_greedy(count)(guide, data).flat.tolist())
        return Subnet.from_positions(layout, torch.tensor(sorted(chosen)))


@final
@dataclass(frozen=True, eq=False)
class Beyond(Selector):
    """What keeps most variance at the training inputs and as many others.

    Attributes:
        where: Midpoints of random pairs of inputs, or inputs twice as far from their
            mean.
    """

    size: float
    where: Literal["between", "around"]
    seed: int
    passes_over_data = True

    def __call__(self, guide: GuideAtMAP, data: Data) -> Subnet:
        (((x, _), _),) = data.calls("")
        if self.where == "between":
            generator = torch.Generator().manual_seed(self.seed)
            others = (x + x[torch.randperm(len(x), generator=generator)]) / 2
        else:
            others = x.mean(0) + _AROUND * (x - x.mean(0))
        inputs = torch.cat([x, others])
        selector = PredictiveVariance(
            self.size, inputs, method="greedy", weighting="equal"
        )
        return selector(guide, data)


@final
@dataclass(frozen=True, eq=False)
class WholeUnits(Selector):
    """Hidden units with all that goes in and out, those that keep most variance.

    The rest of the size, less than a unit, is filled by the greedy choice of weights.
    The network is a chain of linear layers and convolutions.
    """

    size: float
    passes_over_data = True

    def __call__(self, guide: GuideAtMAP, data: Data) -> Subnet:
        layout = guide.latents.layout
        size = resolve_size(self.size, layout.num_params)
        units = list(_units(layout))
        everything = guide.latents.everything
        precision = dense_precision(guide.at_map, everything, data)
        gram = output_gram(guide.at_map, everything, data, "equal")
        chosen = torch.empty(0, dtype=torch.int64)
        while units := [unit for unit in units if len(chosen) + len(unit) <= size]:
            gains = [gain(precision, gram, unit) for unit in units]
            best = units.pop(gains.index(max(gains)))
            eliminate_(precision, gram, best)
            chosen = torch.cat([chosen, best]).unique()
            units = [_without(unit, chosen) for unit in units]
        count, positions = 0, set(chosen.tolist())
        while len(positions) < size:
            count += size - len(positions)
            positions |= set(_greedy(count)(guide, data).flat.tolist())
        return Subnet.from_positions(layout, torch.tensor(sorted(positions)))


def _greedy(count: int) -> PredictiveVariance:
    # Classes as the default had them when these were measured.
    return PredictiveVariance(count, method="greedy", weighting="equal")


def _units(layout: Layout) -> Iterator[Tensor]:
    """Positions of each hidden unit's weights: row, bias, and columns of the next."""
    weights = [name for name in layout.names if name.endswith("weight")]
    numbers = torch.arange(layout.num_params, dtype=torch.float64)
    place = {name: part.long() for name, part in layout.unpack(numbers).items()}
    for name, after in pairwise(weights):
        ingoing, bias = place[name], place[name.removesuffix("weight") + "bias"]
        # Flattening a channel gives several columns.
        outgoing = place[after].unflatten(1, (len(ingoing), -1))
        for unit, row in enumerate(ingoing):
            parts = (row, bias[unit], outgoing[:, unit])
            yield torch.cat([part.flatten() for part in parts])


def _without(unit: Tensor, chosen: Tensor) -> Tensor:
    return unit[~torch.isin(unit, chosen)]


def gain(precision: Tensor, gram: Tensor, unit: Tensor) -> float:
    """tr P_UU^-1 A_UU, given all that was eliminated."""
    factor = torch.linalg.cholesky(precision[unit][:, unit])
    return float(torch.cholesky_solve(gram[unit][:, unit], factor).trace())


def eliminate_(precision: Tensor, gram: Tensor, unit: Tensor) -> None:
    """Conditions both on a unit's weights.

    With B = P_UU^-1 P_U:, the precision loses B^T P_U:, and the output gradients J lose
    J_U B, so that their Gram matrix A becomes A - A_:U B - B^T A_U: + B^T A_UU B.
    """
    rows, own = precision[unit], gram[unit]
    ahead = torch.cholesky_solve(rows, torch.linalg.cholesky(rows[:, unit]))
    cross = own.T @ ahead
    precision -= rows.T @ ahead
    gram -= cross + cross.T - ahead.T @ (own[:, unit] @ ahead)
    # What was chosen has nothing left, but for round-off.
    for matrix in (precision, gram):
        matrix[unit] = 0
        matrix[:, unit] = 0
