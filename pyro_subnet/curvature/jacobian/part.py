"""A random part of the data, where a sum over all would say little more."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyro_subnet.curvature.jacobian.output_map import OutputMap
from pyro_subnet.curvature.jacobian.structured.recording import is_separable
from pyro_subnet.tensors.agreement import random_stream


@final
class RandomPart:
    """Some of the data of each call, the same in every pass over the same calls.

    Args:
        share: Of the data that are drawn, about.
    """

    def __init__(self, share: float):
        self.share = share
        self._stream = random_stream()
        self._is_apart: bool | None = None if share < 1 else False

    def drawn(self, outputs: OutputMap) -> Int[Tensor, " some"] | None:
        """Positions of the drawn data of a call.

        Args:
            outputs: Of all its data.

        Returns:
            The positions; None stands for all data, also where they cannot be taken
            apart.
        """
        if self._is_apart is None:
            self._is_apart = is_separable(outputs)
        if not self._is_apart:
            return None
        return self._some(outputs.num_data).to(outputs.reference[0].device)

    def elements(
        self, rows: Float[Tensor, "all outputs subnet"]
    ) -> Float[Tensor, "some outputs subnet"]:
        """The rows of J of drawn elements, where data could not be taken apart."""
        if self.share >= 1 or self._is_apart:
            return rows
        return rows[self._some(len(rows)).to(rows.device)]

    def _some(self, count: int) -> Int[Tensor, " some"]:
        # One by one: a step from one to the next might meet one class alone.
        is_drawn = torch.rand(count, generator=self._stream) < self.share
        return is_drawn.nonzero().squeeze(-1)
