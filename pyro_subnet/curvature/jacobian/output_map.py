"""What the Jacobian routes differentiate: a function from the subnet to outputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

# (values of the chosen sites, rows of data or None for all data)
# -> one (elements, parameters) tensor for every observed site
OutputFunction = Callable[
    [Mapping[str, Tensor], tuple[Tensor, ...] | None], tuple[Tensor, ...]
]


@final
@dataclass(frozen=True, eq=False)
class OutputMap:
    r"""The map :math:`\theta_S \mapsto \eta` of one call of a model.

    Outputs come site by site. A site has M independent elements (data, and event
    dimensions that the distribution factorizes over), each with c parameters.

    Attributes:
        base: The MAP of every site that holds a chosen element, unconstrained.
        chosen: Flat positions of the chosen elements within each of those, ascending.
        of_sites: Maps those sites' values to one (M, c) tensor an observed site. Given
            ``rows`` of fewer data, M shrinks in proportion.
        reference: Its values at the MAP and all data of the call.
        rows: Tensors of the call whose first axis is the data, () when there is no
            data axis that all observed sites share.
        num_data: N, length of that axis; 1 when there is none.
        activation_bytes: What one call keeps for its backward pass.
    """

    base: Mapping[str, Tensor]
    chosen: Mapping[str, Tensor]
    of_sites: OutputFunction = field(repr=False)
    reference: tuple[Tensor, ...]
    rows: tuple[Tensor, ...]
    num_data: int
    activation_bytes: int

    @cached_property
    def loc(self) -> Float[Tensor, " subnet"]:
        """The MAP of the subnet, shape (S,)."""
        parts = [self.base[site].flatten()[at] for site, at in self.chosen.items()]
        return torch.cat(parts)

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(M, c) of every observed site at the full data."""
        return tuple((value.shape[0], value.shape[1]) for value in self.reference)

    @property
    def num_touched(self) -> int:
        """Elements of all sites that hold a chosen one: size of a dense gradient."""
        return sum(value.numel() for value in self.base.values())

    @property
    def size(self) -> int:
        """S, the number of columns of the Jacobian."""
        return sum(at.numel() for at in self.chosen.values())

    def function(
        self, theta: Float[Tensor, " subnet"], rows: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, ...]:
        """Outputs at values of the chosen elements, one (M, c) tensor a site."""
        pieces = theta.split([at.numel() for at in self.chosen.values()])
        values = {
            site: _with_elements(self.base[site], at, piece)
            for (site, at), piece in zip(self.chosen.items(), pieces, strict=True)
        }
        return self.of_sites(values, rows)

    def outputs(self, theta: Float[Tensor, " subnet"]) -> tuple[Tensor, ...]:
        """Outputs at all data, one (M, c) tensor a site."""
        return self.function(theta, None)

    def datum_outputs(
        self, theta: Float[Tensor, " subnet"], datum: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """Outputs of one data point, given without the data axis: (M / N, c) a site."""
        return self.function(theta, tuple(row.unsqueeze(0) for row in datum))

    def at(self, start: int, stop: int) -> OutputMap:
        """The map of consecutive data alone, ``start`` to ``stop`` - 1."""
        if stop - start == self.num_data:
            return self
        return self._part(slice(start, stop), stop - start)

    def some(self, index: Int[Tensor, " some"]) -> OutputMap:
        """The map of some data alone."""
        return self._part(index, len(index))

    def _part(self, which: slice | Tensor, num_data: int) -> OutputMap:
        rows = tuple(row[which] for row in self.rows)
        return replace(
            self,
            of_sites=partial(self._of_rows, rows),
            reference=some_of(self.reference, self.num_data, which),
            rows=rows,
            num_data=num_data,
            activation_bytes=self.activation_bytes * num_data // self.num_data,
        )

    def _of_rows(
        self,
        rows: tuple[Tensor, ...],
        values: Mapping[str, Tensor],
        other: tuple[Tensor, ...] | None,
    ) -> tuple[Tensor, ...]:
        """The outputs of some rows of the data, unless others are given."""
        return self.of_sites(values, rows if other is None else other)

    def over(self, sites: Collection[str]) -> OutputMap:
        """The map of some of the chosen sites alone, the others fixed at the MAP."""

        def of_sites(
            values: Mapping[str, Tensor], rows: tuple[Tensor, ...] | None
        ) -> tuple[Tensor, ...]:
            return self.of_sites({**self.base, **values}, rows)

        return replace(
            self,
            base={site: v for site, v in self.base.items() if site in sites},
            chosen={site: at for site, at in self.chosen.items() if site in sites},
            of_sites=of_sites,
        )


@final
@dataclass(frozen=True, eq=False)
class JacobianBlock:
    """Some rows of :math:`R J`, with one factor R an element of an observed site."""

    site: int  # index of the observed site
    start: int  # first of the site's elements in this block
    rows: Float[Tensor, "elements rank subnet"]  # R_m J_m of consecutive elements m


Blocks = Iterator[JacobianBlock]
# R of each element: one (M, r, c) tensor for every observed site.
Factors = tuple[Tensor, ...]


def identity_factors(outputs: OutputMap) -> Factors:
    """Factors that leave J as it is; they take no memory."""
    like = outputs.loc
    return tuple(
        torch.eye(width, dtype=like.dtype, device=like.device).expand(count, -1, -1)
        for count, width in outputs.shapes
    )


def factors_of(factors: Factors, num_data: int, start: int, stop: int) -> Factors:
    """Factors, or other tensors by element, of the data from start to stop - 1."""
    return some_of(factors, num_data, slice(start, stop))


def some_of(
    factors: tuple[Tensor, ...], num_data: int, which: slice | Tensor
) -> tuple[Tensor, ...]:
    """Factors, or other tensors by element, of some data."""
    by_datum = (factor.unflatten(0, (num_data, -1)) for factor in factors)
    return tuple(factor[which].flatten(0, 1) for factor in by_datum)


def cotangent_rows(factor: Tensor, num_data: int) -> Tensor:
    """Rows of R, one of each data point at a time, (rows of a data point, M, c)."""
    # Row (m, r) of every data point: R_m[r] at its element m, zero at its others.
    per_datum = factor.unflatten(0, (num_data, -1))
    _, count, rank, width = per_datum.shape
    spread = factor.new_zeros(count, rank, num_data, count, width)
    for element in range(count):
        spread[element, :, :, element] = per_datum[:, element].transpose(0, 1)
    return spread.reshape(count * rank, num_data * count, width)


def num_rows(factor: Tensor, num_data: int) -> int:
    """How many rows of R, shape (M, r, c), belong to each data point: M r / N."""
    return len(factor) // num_data * factor.shape[1]


def _with_elements(site: Tensor, within: Tensor, values: Tensor) -> Tensor:
    """A site's value with some of its elements replaced, out of place."""
    if within.numel() == site.numel():
        return values.reshape(site.shape)
    return site.flatten().scatter(0, within, values).reshape(site.shape)
