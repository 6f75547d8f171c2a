"""What the Jacobian routes differentiate: a function from the subnet to outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

# (values of the chosen sites, data rows or None for all data) -> per observed site
# (elements, parts)
OutputFunction = Callable[
    [Mapping[str, Tensor], tuple[Tensor, ...] | None], tuple[Tensor, ...]
]


@dataclass(frozen=True, eq=False)
class OutputMap:
    r"""The map :math:`\theta_S \mapsto \eta` of one call of a model.

    Outputs come site by site. A site has M independent elements (data, and event
    dimensions that the distribution factorizes over), each with c parameters.

    Attributes:
        base: The MAP of every site that holds a chosen element, unconstrained.
        chosen: Flat positions of the chosen elements within each of those, ascending.
        of_sites: Maps those sites' values to one (M, c) tensor an observed site. With
            ``rows`` (tensors whose first axis is a slice of the data) in place of the
            data of the call, M shrinks in proportion.
        reference: Its values at the MAP and the full data.
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
        """Outputs at values of the chosen elements.

        Args:
            theta: Shape (S,), unconstrained.
            rows: Replacements for :attr:`rows`; None for the data of the call.

        Returns:
            One (M, c) tensor for every observed site.
        """
        pieces = theta.split([at.numel() for at in self.chosen.values()])
        values = {
            site: _with_elements(self.base[site], at, piece)
            for (site, at), piece in zip(self.chosen.items(), pieces, strict=True)
        }
        return self.of_sites(values, rows)

    def outputs(self, theta: Float[Tensor, " subnet"]) -> tuple[Tensor, ...]:
        """Outputs at all data, one (M, c) tensor a site.

        Args:
            theta: Values of the chosen elements, shape (S,), unconstrained.

        Returns:
            One tensor for every observed site.
        """
        return self.function(theta, None)

    def datum_outputs(
        self, theta: Float[Tensor, " subnet"], datum: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """Outputs of one datum, one (M / N, c) tensor a site.

        Args:
            theta: Values of the chosen elements, shape (S,).
            datum: The rows of that datum, without the data axis.

        Returns:
            One tensor for every observed site.
        """
        return self.function(theta, tuple(row.unsqueeze(0) for row in datum))

    def at(self, start: int, stop: int) -> OutputMap:
        """The map of some consecutive data alone.

        Args:
            start: First datum.
            stop: One past the last.

        Returns:
            The map; this one if those are all data.
        """
        if stop - start == self.num_data:
            return self
        rows = tuple(row[start:stop] for row in self.rows)
        each = [len(value) // self.num_data for value in self.reference]

        def of_sites(
            values: Mapping[str, Tensor], other: tuple[Tensor, ...] | None
        ) -> tuple[Tensor, ...]:
            return self.of_sites(values, rows if other is None else other)

        return replace(
            self,
            of_sites=of_sites,
            reference=tuple(
                value[start * m : stop * m]
                for value, m in zip(self.reference, each, strict=True)
            ),
            rows=rows,
            num_data=stop - start,
            activation_bytes=self.activation_bytes * (stop - start) // self.num_data,
        )

    def over(self, sites: Collection[str]) -> OutputMap:
        """The map of some of the chosen sites alone, the others at the MAP.

        Args:
            sites: Names of sites that hold chosen elements.

        Returns:
            The map, its columns in the same order.
        """

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


@dataclass(frozen=True, eq=False)
class JacobianBlock:
    r"""Some rows of :math:`R J`, with R a factor per element (the identity for J).

    Attributes:
        site: Index of the observed site.
        start: First element of the site that the block covers.
        rows: Shape (m, r, S): for m elements, :math:`R_m J_m`.
    """

    site: int
    start: int
    rows: Float[Tensor, "elements rank subnet"]


# Types with a larger epsilon have too few digits for the tolerance of the others.
_HALF_EPS = 1e-4
# Any fixed seed serves the one random direction.
_SEED = 20_106_896
Point = TypeVar("Point")
Blocks = Iterator[JacobianBlock]
# One (M, r, c) factor a site.
Factors = tuple[Tensor, ...]


def identity_factors(outputs: OutputMap) -> Factors:
    """Factors that leave J as it is.

    Args:
        outputs: The map to be differentiated.

    Returns:
        One (M, c, c) identity a site, without memory of its own.
    """
    like = outputs.loc
    return tuple(
        torch.eye(width, dtype=like.dtype, device=like.device).expand(count, -1, -1)
        for count, width in outputs.shapes
    )


def agree(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are equal up to the round-off of another order of sums.

    Args:
        found: Shape (..., c).
        expected: What it should be.

    Returns:
        True if they are, relative to the largest entry; infinities must be the same.
    """
    if found.shape != expected.shape:
        return False
    if found.numel() == 0:
        return True
    finite = expected.isfinite()
    if not bool(finite.all()):  # minus infinity is a class of probability zero
        same = torch.equal(found.isfinite(), finite)
        return same and agree(found[finite], expected[finite])
    eps = max(torch.finfo(found.dtype).eps, torch.finfo(expected.dtype).eps)
    if eps > _HALF_EPS:  # what is wrong is off by a large part of the scale
        tolerance = 32 * eps
    else:
        tolerance = 100 * math.sqrt(found.shape[-1]) * eps**0.75
    scale = expected.abs().amax()
    return bool(((found - expected).abs() <= tolerance * scale).all())


def num_rows(factor: Tensor, num_data: int) -> int:
    """How many rows of R each datum has at an observed site.

    Args:
        factor: R of each element, shape (M, r, c).
        num_data: N.

    Returns:
        M r / N.
    """
    return len(factor) // num_data * factor.shape[1]


def directional_derivative(
    function: Callable[[Point], tuple[Tensor, ...]],
    point: Point,
    direction: Point,
    forward_mode: bool,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    r"""Value and derivative of a function along a direction.

    By forward mode, or by two reverse passes: :math:`u \mapsto J^\top u` is linear, and
    its transpose is :math:`J`.

    Args:
        function: Maps a tensor, or a mapping of tensors, to a tuple of tensors.
        point: Where.
        direction: Same structure and shapes as ``point``.
        forward_mode: Which; see :func:`forward_mode_agrees`.

    Returns:
        The outputs, and their derivatives, in the same shapes.
    """
    if forward_mode:
        outputs, tangents = torch.func.jvp(function, (point,), (direction,))[:2]
        return outputs, tangents
    outputs, pullback = torch.func.vjp(function, point)[:2]
    zeros = tuple(torch.zeros_like(output) for output in outputs)
    pushforward = torch.func.vjp(lambda *u: pullback(u)[0], *zeros)[1]
    return outputs, pushforward(direction)


def forward_mode_agrees(
    function: Callable[[Point], tuple[Tensor, ...]], point: Point
) -> bool:
    r"""Whether forward mode gives the Jacobian that reverse mode does.

    Some operations lack it, and some have another one: the padding row of an embedding
    is a constant to reverse mode, and so to training, but not to forward mode. One
    random pair shows it: :math:`u \cdot (J v) = (J^\top u) \cdot v`.

    Args:
        function: Maps a tensor, or a mapping of tensors, to a tuple of tensors.
        point: Where.

    Returns:
        True if forward mode runs under ``vmap``, and agrees up to round-off.
    """
    leaves, spec = tree_flatten(point)
    generator = torch.Generator().manual_seed(_SEED)

    def random_like(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        return noise.to(tensor)

    def push(direction: list[Tensor]) -> tuple[Tensor, ...]:
        at = tree_unflatten(direction, spec)
        return torch.func.jvp(function, (point,), (at,))[1]

    direction = [random_like(leaf) for leaf in leaves]
    try:
        # Under vmap, as it will be used.
        batched = torch.func.vmap(push)([leaf.unsqueeze(0) for leaf in direction])
        tangents = tuple(tangent.squeeze(0) for tangent in batched)
        cotangents = tuple(random_like(tangent) for tangent in tangents)
        pullback = torch.func.vjp(function, point)[1]
        gradients = tree_flatten(pullback(cotangents)[0])[0]
    # What an operation that cannot be transformed raises depends on the operation.
    except (NotImplementedError, RuntimeError):
        return False
    forward = _products(tangents, cotangents)
    reverse = _products(gradients, direction)
    scale = forward.abs().sum() + reverse.abs().sum()
    tolerance = torch.finfo(forward.dtype).eps ** 0.5 * scale
    return bool((forward.sum() - reverse.sum()).abs() <= tolerance)


def _products(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Elementwise products, flattened: their sum is the inner product."""
    pairs = zip(first, second, strict=True)
    return torch.cat([(a * b).flatten() for a, b in pairs])


def _with_elements(site: Tensor, within: Tensor, values: Tensor) -> Tensor:
    """A site's value with some of its elements replaced, out of place."""
    if within.numel() == site.numel():
        return values.reshape(site.shape)
    return site.flatten().scatter(0, within, values).reshape(site.shape)
