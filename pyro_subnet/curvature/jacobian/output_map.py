"""What the Jacobian routes differentiate: a function from the subnet to outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

# (theta_S, data rows or None for all data) -> per observed site (elements, parts)
OutputFunction = Callable[[Tensor, tuple[Tensor, ...] | None], tuple[Tensor, ...]]


@dataclass(frozen=True, eq=False)
class OutputMap:
    r"""The map :math:`\theta_S \mapsto \eta` of one call of a model.

    Outputs come site by site. A site has M independent elements (data, and event
    dimensions that the distribution factorizes over), each with c parameters.

    Attributes:
        loc: The MAP of the subnet, shape (S,).
        function: Maps ``(theta_s, rows)`` to one (M, c) tensor a site. With ``rows``
            (tensors whose first axis is a slice of the data) in place of the data of
            the call, M shrinks in proportion.
        shapes: (M, c) of every site at the full data.
        rows: Tensors of the call whose first axis is the data, () when there is no
            data axis that all observed sites share.
        num_data: N, length of that axis; 1 when there is none.
        num_touched: Elements of all sites that hold a chosen element; the size of one
            dense gradient.
        activation_bytes: What one call keeps for its backward pass.
    """

    loc: Float[Tensor, " subnet"]
    function: OutputFunction = field(repr=False)
    shapes: tuple[tuple[int, int], ...]
    rows: tuple[Tensor, ...]
    num_data: int
    num_touched: int
    activation_bytes: int

    @property
    def size(self) -> int:
        """S, the number of columns of the Jacobian."""
        return self.loc.numel()

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
