"""The weights of largest magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from pyro_subnet.selection.base import (
    GuideAtMAP,
    Selector,
    check_size,
    largest,
    resolve_size,
)
from pyro_subnet.subnet import Subnet
from pyro_subnet.tracing.data import Data


@final
@dataclass(frozen=True)
class LargestMagnitude(Selector):
    r"""Keeps the weights of largest :math:`|\hat\theta_j|`, unconstrained.

    Attributes:
        size: A count (int) or a share in (0, 1] (float).

    Raises:
        SelectionError: If ``size`` is neither a count nor a share.

    Source: a baseline of pruning; laplace-torch's ``LargestMagnitudeSubnetMask``.
    """

    size: int | float

    def __post_init__(self) -> None:
        check_size(self.size)

    def __call__(self, guide: GuideAtMAP, data: Data) -> Subnet:
        """See :meth:`Selector.__call__`."""
        layout = guide.latents.layout
        size = resolve_size(self.size, layout.num_params)
        positions = largest(guide.latents.loc.abs(), size)
        return Subnet.from_positions(layout, positions)
