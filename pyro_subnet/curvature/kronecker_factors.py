"""Kronecker factors of G, block by block, and the diagonal of the rest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

from jaxtyping import Float, Int
from torch import Tensor

from pyro_subnet.curvature.jacobian.structured.grids import same_positions
from pyro_subnet.exceptions import ModelError


@final
@dataclass(frozen=True, eq=False)
class KroneckerBlock:
    """Kronecker factors of one weight matrix, or of one vector that is added."""

    site: str
    positions: Int[Tensor, "out in"]  # in the packed vector; "in" is 1 for a vector
    output: Float[Tensor, "out out"]  # B, nats / output squared, a **sum**
    input: Float[Tensor, "in in"]  # A, input squared, a **mean**; 1 for a vector
    weight: Float[Tensor, ""]  # sum of the mean's weights, over data and positions

    def plus(self, other: KroneckerBlock) -> KroneckerBlock:
        """The block of the data of both; a ModelError if they are different blocks."""
        if not same_positions(self.positions, other.positions):
            raise ModelError(changed(f"site {self.site!r} in other layers"))
        weight = self.weight + other.weight
        both = self.input * self.weight + other.input * other.weight
        return KroneckerBlock(
            self.site,
            self.positions,
            self.output + other.output,
            both / weight.where(weight > 0, 1.0),
            weight,
        )


@final
@dataclass(frozen=True, eq=False)
class KroneckerFactors:
    """G over all D elements: Kronecker factors, and the exact diagonal elsewhere."""

    blocks: tuple[KroneckerBlock, ...]
    diagonal: Float[Tensor, " params"]  # 0 at the elements of blocks, float64

    def scaled(self, factor: float) -> KroneckerFactors:
        """The factors of a positive multiple of G."""
        blocks = tuple(
            replace(block, output=block.output * factor) for block in self.blocks
        )
        return KroneckerFactors(blocks, self.diagonal * factor)

    def ggn_diagonal(self) -> Float[Tensor, " params"]:
        """Diagonal of G, from the factors where there are any, float64."""
        full = self.diagonal.clone()
        for block in self.blocks:
            outer = block.output.diagonal().outer(block.input.diagonal())
            full[block.positions] = outer.to(full)
        return full


def changed(found: str) -> str:
    """What is said where blocks are not those of the data before."""
    return (
        "Weights must enter the same layers in every batch and group of data for "
        f"Kronecker factors; got a change ({found}). Pass batches of one kind, or "
        "choose a diagonal or full covariance."
    )
