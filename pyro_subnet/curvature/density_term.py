"""One term of the log prior, and the closed form of normal ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from typing import final

import torch
from torch import Tensor

# Elements that are summed at once: as many as a core's cache holds.
_PIECE = 2**16


@final
@dataclass(frozen=True, eq=False)
class NormalPrior:
    r"""The prior :math:`w \log N(u; \mu, \sigma^2)` of a site's independent elements.

    At chosen elements its derivatives read these alone: over all D of a network of
    :math:`10^8` weights they take several times its memory.

    Attributes:
        value: u, a site's unconstrained value.
        loc: :math:`\mu`, of u's shape, mostly a view of one number.
        scale: :math:`\sigma`, likewise.
        weight: w, the scale of the plates around the site.
    """

    value: Tensor
    loc: Tensor
    scale: Tensor
    weight: float

    def curvature(self, within: Tensor | None) -> Tensor:
        r""":math:`w / \sigma^2` at flat positions, or everywhere if None."""
        return self.weight / _at(self.scale, within).square()

    def gradient(self, within: Tensor | None) -> Tensor:
        r""":math:`w (\mu - u) / \sigma^2` at flat positions, or everywhere if None."""
        step = _at(self.loc, within) - _at(self.value.detach(), within)
        return step * self.curvature(within)

    def log_density(self) -> float:
        """The sum over all elements, in nats, in float64 and in little memory."""
        pieces = zip(
            self.value.detach().reshape(-1).split(_PIECE),
            _pieces(self.loc),
            _pieces(self.scale),
            strict=False,  # a single number serves all pieces
        )
        total = torch.zeros((), dtype=torch.float64, device=self.value.device)
        for u, loc, scale in pieces:
            step = (u.double() - loc.detach()) / scale.detach()
            of_scale = scale.detach().double().log().expand(u.shape).sum()
            total -= 0.5 * step.dot(step) + of_scale
        constant = 0.5 * math.log(2 * math.pi) * self.value.numel()
        return self.weight * (total.item() - constant)

    def has_numbers_of(self, other: NormalPrior) -> bool:
        """Whether two priors, at one value, are the same to the last digit."""
        return self.weight == other.weight and all(
            one.shape == two.shape and torch.equal(_stored(one), _stored(two))
            for one, two in ((self.loc, other.loc), (self.scale, other.scale))
        )


@final
@dataclass(frozen=True, eq=False)
class DensityTerm:
    """One term of the log prior, or a factor of the data.

    Attributes:
        density: Computes ``log_density``, with a graph where the term was made with
            gradients on.
        site: The latent site that it is the prior of, or a factor of the data; None for
            one of the prior.
        elementwise: Whether the site's elements are independent given other sites.
        normal: Its closed form, where it is normal and depends on no other site.
    """

    density: Callable[[], Tensor]
    site: str | None
    elementwise: bool
    normal: NormalPrior | None = None

    @classmethod
    def of_factor(cls, log_density: Tensor, site: str | None) -> DensityTerm:
        """A term that is a factor: of the data at ``site``, or of the prior."""
        return cls(lambda: log_density, site, elementwise=False)

    @cached_property
    def log_density(self) -> Tensor:
        """The sum over the site's elements, with its scale, mask and volume, in nats.

        A differentiable scalar, a function of the unconstrained leaves. Computed when
        it is first asked for.
        """
        return self.density()

    @property
    def value(self) -> float:
        """The log density as a number, of a normal prior by its closed form."""
        if self.normal is None:
            return self.log_density.item()
        return self.normal.log_density()

    def has_numbers_of(self, other: DensityTerm) -> bool:
        """Whether two terms are seen, without their densities, to be the same."""
        if self.normal is None or other.normal is None:
            return False
        return self.normal.has_numbers_of(other.normal)


def _at(values: Tensor, within: Tensor | None) -> Tensor:
    """Values at flat positions, or all of them, flat; expanded ones are not copied."""
    if within is None:
        return values.reshape(-1)
    if values.is_contiguous():
        return values.flatten()[within]
    # As `torch.unravel_index`, which imports an algebra system to check its arguments.
    places = list[Tensor]()
    for size in reversed(values.shape):
        places.append(within % size)
        within = within // size
    return values[tuple(reversed(places))].reshape(-1)


def _pieces(values: Tensor) -> Iterable[Tensor]:
    """Values in flat pieces; a single number that all share, over and over."""
    stored = _stored(values)
    if stored.numel() == 1:
        return repeat(stored.reshape(1).double())
    return values.reshape(-1).double().split(_PIECE)


def _stored(values: Tensor) -> Tensor:
    """Values without the copies that expanding them shows."""
    for axis, stride in enumerate(values.stride()):
        if stride == 0:
            values = values.narrow(axis, 0, min(1, values.shape[axis]))
    return values
