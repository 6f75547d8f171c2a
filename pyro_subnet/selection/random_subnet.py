"""Weights drawn at random."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import final

import torch
from torch import Tensor

from pyro_subnet.exceptions import SelectionError, shown
from pyro_subnet.selection.base import GuideAtMAP, Selector, check_size, resolve_size
from pyro_subnet.subnet import Subnet
from pyro_subnet.tracing.data import Data


@final
@dataclass(frozen=True)
class RandomSubnet(Selector):
    """Draws weights uniformly, without replacement.

    The random numbers are the selector's own, drawn on the CPU: the global state is
    left alone, and a seed gives the same subnet on every device.

    Attributes:
        size: A count (int) or a share in (0, 1] (float).
        seed: Seed of the draw.

    Raises:
        SelectionError: If ``size`` is neither a count nor a share, or ``seed`` no whole
            number.

    Source: Daxberger et al. (2021), section 6, arXiv 2010.14689, as a baseline.
    """

    size: int | float
    seed: int = 0

    def __post_init__(self) -> None:
        check_size(self.size)
        if not isinstance(self.seed, Integral) or isinstance(self.seed, bool):
            raise SelectionError(
                f"`seed` must be a whole number; got {shown(self.seed)}. Pass 0, say."
            )

    def __call__(self, guide: GuideAtMAP, data: Data) -> Subnet:
        """See :meth:`Selector.__call__`."""
        latents = guide.latents
        size = resolve_size(self.size, latents.layout.num_params)
        generator = torch.Generator().manual_seed(int(self.seed))
        positions = _draw(latents.layout.num_params, size, generator)
        return Subnet.from_positions(latents.layout, positions.to(latents.loc.device))


def _draw(total: int, size: int, generator: torch.Generator) -> Tensor:
    """Distinct numbers below ``total``, every set of ``size`` equally likely."""
    # Shuffling takes half a second at D = 11M. Drawing one by one would often repeat
    # where nearly all are wanted.
    if 2 * size > total:
        return torch.randperm(total, generator=generator)[:size]
    # The first distinct values of draws with replacement: the next new one is equally
    # likely to be any of those not seen yet.
    drawn = torch.empty(0, dtype=torch.int64)
    while drawn.numel() < size:
        more = torch.randint(total, (size - drawn.numel(),), generator=generator)
        drawn = torch.cat([drawn, more]).unique()
    return drawn
