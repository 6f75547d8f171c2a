"""Weights drawn at random."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pyro_subnet.data import Data
from pyro_subnet.selection.base import GuideAtMAP, Selector, check_size, resolve_size
from pyro_subnet.subnet import Subnet


@dataclass(frozen=True)
class RandomSubnet(Selector):
    """Draws weights uniformly, without replacement.

    The stream is the selector's own, on the CPU: the global RNG is left alone, and a
    seed gives the same subnet on every device.

    Attributes:
        size: A count (int) or a share in (0, 1] (float).
        seed: Seed of the draw.

    Raises:
        SelectionError: If ``size`` is neither a count nor a share.

    Source: Daxberger et al. (2021), section 6, arXiv 2010.14689, as a baseline.
    """

    size: int | float
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the size."""
        check_size(self.size)

    def __call__(self, guide: GuideAtMAP, data: Data) -> Subnet:
        """Chooses the subnet.

        Args:
            guide: A guide at its MAP.
            data: Not used.

        Returns:
            The subnet.
        """
        latents = guide.latents
        size = resolve_size(self.size, latents.layout.num_params)
        generator = torch.Generator().manual_seed(self.seed)
        shuffled = torch.randperm(latents.layout.num_params, generator=generator)
        positions = shuffled[:size].to(latents.loc.device)
        return Subnet.from_positions(latents.layout, positions)
