"""What the Jacobian routes differentiate: a function from the subnet to outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

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
    function: Callable[[Point], tuple[Tensor, ...]], point: Point, direction: Point
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    r"""Value and derivative of a function along a direction.

    Forward mode where every operation has it; else two reverse passes, since
    :math:`u \mapsto J^\\top u` is linear and its own transpose is :math:`J`.

    Args:
        function: Maps a tensor, or a mapping of tensors, to a tuple of tensors.
        point: Where.
        direction: Same structure and shapes as ``point``.

    Returns:
        The outputs, and their derivatives, in the same shapes.
    """
    try:
        outputs, tangents = torch.func.jvp(function, (point,), (direction,))[:2]
    except NotImplementedError:
        outputs, pullback = torch.func.vjp(function, point)[:2]
        zeros = tuple(torch.zeros_like(output) for output in outputs)
        pushforward = torch.func.vjp(lambda *u: pullback(u)[0], *zeros)[1]
        tangents = pushforward(direction)
    return outputs, tangents
