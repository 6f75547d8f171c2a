"""Which elements of the packed vector are random: positions, masks, names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pyro_subnet.exceptions import SelectionError


@final
@dataclass(frozen=True)
class Layout:
    """How the latent sites lie in the packed unconstrained vector of length D.

    Attributes:
        names: Latent sites in trace order, as ``AutoContinuous`` packs them.
        shapes: Their unconstrained shapes, in the same order.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of unconstrained elements of each site."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def num_params(self) -> int:
        """D, the length of the packed vector."""
        return sum(self.sizes)

    @cached_property
    def offsets(self) -> Mapping[str, int]:
        """Position of each site's first element in the packed vector."""
        starts = accumulate(self.sizes, initial=0)
        return dict(zip(self.names, starts, strict=False))

    def shape(self, site: str) -> torch.Size:
        """Unconstrained shape of one site.

        Args:
            site: Name of a latent site.

        Returns:
            The shape.

        Raises:
            SelectionError: If the site is not a latent site of the model.
        """
        if site not in self.names:
            raise SelectionError(
                f"`site` must be a latent site of the model, one of "
                f"{list(self.names)}; got {site!r}. Check the spelling, or print the "
                "guide's `prototype_trace`."
            )
        return self.shapes[self.names.index(site)]

    def unpack(
        self, packed: Float[Tensor, "... params"]
    ) -> dict[str, Float[Tensor, "..."]]:
        """Cuts a packed vector into the sites' unconstrained values.

        Args:
            packed: Shape (..., D), unconstrained.

        Returns:
            ``{site: value}`` with shapes ``(..., *site_shape)``; views where possible.
        """
        pieces = packed.split(self.sizes, dim=-1)
        return {
            name: piece.reshape(packed.shape[:-1] + shape)
            for name, shape, piece in zip(self.names, self.shapes, pieces, strict=True)
        }

    def element(self, position: int) -> str:
        """Name of the element at a position, such as ``"fc1.weight[3, 7]"``.

        Args:
            position: Position in the packed vector.

        Returns:
            The name.
        """
        return Subnet(self, torch.tensor([position])).names[0]


@final
@dataclass(frozen=True, eq=False)
class Subnet:
    """The S chosen elements of a packed latent vector of length D.

    Build one with :meth:`from_positions` or :meth:`from_sites`, which check it.

    Attributes:
        layout: Where the latent sites lie in the packed vector.
        flat: Positions in the packed vector, ascending, shape (S,), int64.
        explained_variance: Share, from 0 to 1, of the output variance on the training
            inputs that the chosen elements account for under a diagonal posterior;
            None when the selector did not measure it.
    """

    layout: Layout
    flat: Int[Tensor, " subnet"]
    explained_variance: float | None = None

    @classmethod
    def from_positions(
        cls, layout: Layout, positions: Tensor, explained_variance: float | None = None
    ) -> Subnet:
        """Checks positions in the packed vector and sorts them.

        Args:
            layout: Where the latent sites lie in the packed vector.
            positions: Integer positions, shape (S,), in any order.
            explained_variance: Share of the output variance, as the attribute.

        Returns:
            The subnet.

        Raises:
            SelectionError: If positions are empty, repeated or out of range.
        """
        flat = _checked_positions(positions, layout.num_params, "positions")
        return cls(layout, flat, explained_variance)

    @classmethod
    def whole(cls, layout: Layout, device: torch.device | str | None = None) -> Subnet:
        """The subnet of every element, S = D.

        Args:
            layout: Where the latent sites lie in the packed vector.
            device: Where the positions live.

        Returns:
            The subnet.
        """
        return cls(layout, torch.arange(layout.num_params, device=device))

    @classmethod
    def from_sites(cls, layout: Layout, chosen: Mapping[str, Tensor]) -> Subnet:
        """Builds a subnet from a mask or a list of positions for each site.

        Args:
            layout: Where the latent sites lie in the packed vector.
            chosen: ``{site: bool mask of the site's shape, or LongTensor of flat
                positions within the site}``; sites left out hold no chosen element.

        Returns:
            The subnet.

        Raises:
            SelectionError: If a site is unknown, a mask has another shape, positions
                repeat or are out of range, or nothing is chosen.
        """
        parts = []
        for site, choice in chosen.items():
            shape = layout.shape(site)
            within = _positions_within(site, torch.as_tensor(choice), shape)
            parts.append(within + layout.offsets[site])
        if sum(part.numel() for part in parts) == 0:
            raise SelectionError(
                "`subnet` must hold at least one element; got an empty selection over "
                f"sites {list(chosen)}. Choose at least one position."
            )
        return cls.from_positions(layout, torch.cat(parts))

    @property
    def size(self) -> int:
        """S, how many elements are random."""
        return self.flat.numel()

    @property
    def num_params(self) -> int:
        """D, how many elements the model has in all."""
        return self.layout.num_params

    @property
    def fraction(self) -> float:
        """S / D."""
        return self.size / self.num_params

    @property
    def indices(self) -> dict[str, Int[Tensor, " chosen"]]:
        """Flat positions within each site, for the sites that hold any, ascending."""
        return dict(self._within)

    @cached_property
    def _within(self) -> dict[str, Tensor]:
        # Samplers ask for it several times a step.
        edges = torch.tensor([*self.layout.offsets.values(), self.num_params])
        bounds = torch.searchsorted(self.flat, edges.to(self.flat.device)).tolist()
        cuts = zip(self.layout.names, bounds[:-1], bounds[1:], strict=True)
        offsets = self.layout.offsets
        return {
            site: self.flat[start:stop] - offsets[site]
            for site, start, stop in cuts
            if stop > start
        }

    @property
    def counts(self) -> dict[str, int]:
        """How many elements of each latent site are chosen, zeros included."""
        found = {site: within.numel() for site, within in self.indices.items()}
        return dict.fromkeys(self.layout.names, 0) | found

    @property
    def names(self) -> list[str]:
        """A readable name for each element, such as ``"fc1.weight[3, 7]"``."""
        return [
            name
            for site, within in self.indices.items()
            for name in _element_names(site, within, self.layout.shape(site))
        ]

    def mask(self, site: str) -> Bool[Tensor, "..."]:
        """Which elements of a site are chosen.

        Args:
            site: Name of a latent site.

        Returns:
            Bool tensor of the site's unconstrained shape.
        """
        shape = self.layout.shape(site)
        mask = torch.zeros(math.prod(shape), dtype=torch.bool, device=self.flat.device)
        mask[self.indices.get(site, [])] = True
        return mask.reshape(shape)

    def gather(
        self, packed: Float[Tensor, "... params"]
    ) -> Float[Tensor, "... subnet"]:
        """Takes the chosen elements out of a packed vector.

        Args:
            packed: Shape (..., D).

        Returns:
            Shape (..., S).
        """
        return packed.index_select(-1, self.flat)

    def split(self, values: Tensor) -> dict[str, Float[Tensor, "... chosen"]]:
        """Cuts values of the chosen elements into those of each site.

        Args:
            values: Shape (..., S).

        Returns:
            ``{site: shape (..., number of its chosen elements)}``, views, for the sites
            that hold any, in the order of :attr:`indices`.
        """
        chosen = self._within
        counts = [within.numel() for within in chosen.values()]
        return dict(zip(chosen, values.split(counts, dim=-1), strict=True))

    def __repr__(self) -> str:
        head = f"Subnet: {self.size} of {self.num_params} weights ({self.fraction:.2%})"
        if self.explained_variance is not None:
            share = f"{self.explained_variance:.2%}"
            head += f", {share} of the output variance on the training inputs"
        width = max(len(site) for site in self.layout.names)
        lines = [
            f"  {site:<{width}}  {count} of {math.prod(self.layout.shape(site))}"
            for site, count in self.counts.items()
            if count
        ]
        return "\n".join([head, *lines])


def place_elements(
    base: Float[Tensor, "..."],
    within: Int[Tensor, " chosen"],
    values: Float[Tensor, "... chosen"],
    event_dim: int,
) -> Float[Tensor, "..."]:
    """A new tensor: a site's values with elements ``within`` set to (batched) draws."""
    batch_shape = values.shape[:-1]
    value = values.to(base, copy=True)
    if within.numel() < base.numel():  # all of them, in order, are the site
        wide = base.flatten().expand(*batch_shape, -1)
        value = wide.scatter(-1, within.expand_as(values), value)
    # As in Pyro, batch dimensions stand left of the event's, in place of dimensions of
    # length 1 of the site's own.
    # Torch's own function imports a computer algebra system, for half a second.
    shape = np.broadcast_shapes(base.shape, batch_shape + (1,) * event_dim)
    return value.reshape(shape)


def _checked_positions(positions: Tensor, bound: int, name: str) -> Tensor:
    """Sorted unique int64 positions in [0, bound), or a SelectionError."""
    integer = not (
        positions.is_floating_point()
        or positions.is_complex()
        or positions.dtype == torch.bool
    )
    if not integer or positions.ndim != 1:
        raise SelectionError(
            f"`{name}` must be a 1-D integer tensor; got {positions.dtype} of shape "
            f"{tuple(positions.shape)}. Pass a LongTensor of flat positions."
        )
    if positions.numel() == 0:
        raise SelectionError(
            f"`{name}` must hold at least one element; got none. Choose at least one."
        )
    positions = positions.to(torch.int64)
    outside = positions[(positions < 0) | (positions >= bound)]
    if outside.numel():
        raise SelectionError(
            f"`{name}` must lie in [0, {bound}); got {outside.numel()} outside (first "
            f"{int(outside[0])}). Positions count elements in row-major order from 0."
        )
    flat = positions.sort().values
    repeats = flat[1:][flat[1:] == flat[:-1]]
    if repeats.numel():
        raise SelectionError(
            f"`{name}` must be unique; got {repeats.numel()} duplicates (first "
            f"{int(repeats[0])}). Pass `positions.unique()`."
        )
    return flat


def _positions_within(site: str, choice: Tensor, shape: torch.Size) -> Tensor:
    """Flat positions within a site, from a mask of its shape or from positions."""
    if choice.dtype == torch.bool:
        if choice.shape != shape:
            raise SelectionError(
                f"The mask of site {site!r} must have the site's unconstrained shape "
                f"{tuple(shape)}; got {tuple(choice.shape)}. Build it with "
                f"`torch.zeros({tuple(shape)}, dtype=torch.bool)`."
            )
        return choice.flatten().nonzero().squeeze(-1)
    if choice.numel() == 0:
        return choice.flatten().to(torch.int64)
    return _checked_positions(choice, math.prod(shape), f"positions of site {site!r}")


def _element_names(site: str, within: Tensor, shape: Sequence[int]) -> list[str]:
    """Names of the elements of one site at flat positions."""
    if not shape:
        return [site]
    columns = [axis.tolist() for axis in torch.unravel_index(within, tuple(shape))]
    return [f"{site}[{', '.join(map(str, i))}]" for i in zip(*columns, strict=True)]
