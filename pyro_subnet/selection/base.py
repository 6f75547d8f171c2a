"""What every selector is: a callable from a guide at its MAP and data to a subnet."""

from __future__ import annotations

from abc import ABC, abstractmethod
from numbers import Integral, Real
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.exceptions import SelectionError
from pyro_subnet.options import is_count
from pyro_subnet.subnet import Subnet
from pyro_subnet.tracing.data import Data
from pyro_subnet.tracing.trace import Latents, Model, ModelAtMAP


@runtime_checkable
class GuideAtMAP(Protocol):
    """What a selector may ask of a guide."""

    @property
    def latents(self) -> Latents:
        """The latent sites at the MAP."""

    @property
    def user_model(self) -> Model:
        """The model, as the user wrote it."""

    @property
    def at_map(self) -> ModelAtMAP:
        """The model and its latent sites together, as internal code takes them."""


class Selector(ABC):
    """A strategy that chooses the subnet.

    Attributes:
        passes_over_data: Whether choosing takes a pass over the training data, which
            one-shot batches do not allow.
    """

    passes_over_data: bool = False

    @abstractmethod
    def __call__(self, guide: GuideAtMAP, data: Data) -> Subnet:
        """Chooses a subnet.

        Args:
            guide: A guide at its MAP.
            data: The training data.

        Returns:
            The subnet.
        """


def check_size(size: Any) -> None:
    """Refuses a size that is neither a count nor a share in (0, 1]."""
    # NumPy's numbers are such numbers, too.
    share = isinstance(size, Real) and not isinstance(size, Integral)
    if not (is_count(size) or (share and 0.0 < float(size) <= 1.0)):
        raise SelectionError(
            "`size` must be a positive int (a count) or a float in (0, 1] (a share); "
            f"got {size!r}. Pass 0.05 for 5% of the weights."
        )


def resolve_size(size: int | float, num_params: int) -> int:
    """S, from a count or a share of D; a share gives the nearest count, at least 1."""
    count = max(1, round(float(size) * num_params))
    if isinstance(size, Integral):
        count = int(size)
    if count > num_params:
        raise SelectionError(
            f"`size` must be at most the number of latent parameters, {num_params}; "
            f"got {size}. Pass a share such as 0.05, or None for all."
        )
    return count


def largest(scores: Float[Tensor, " params"], size: int, noise: float = 0.0) -> Tensor:
    """Positions of the largest scores, shape (size,), best first; -inf excludes one."""
    # `noise` is the relative round-off of the scores. Those that agree to it count as
    # equal and go by position, so that the order of a sum does not decide between them.
    threshold = scores.kthvalue(len(scores) - size + 1).values
    # Only scores that may be among the largest are rounded and sorted. To sort all
    # would take a second, and memory of several times D, where D is ten million.
    reach = 4 * noise * threshold.abs() if bool(threshold.isfinite()) else 0.0
    candidates = (scores >= threshold - reach).nonzero().squeeze(-1)
    # Rounding keeps the order, so that the last one chosen is the rounded threshold.
    # What is equal to it, as weights that move no output mostly are, goes by position.
    few, last = _rounded(scores[candidates], noise), _rounded(threshold, noise)
    above, equal = (at.nonzero().squeeze(-1) for at in (few > last, few == last))
    above = above[few[above].sort(descending=True, stable=True).indices]
    return candidates[torch.cat([above, equal[: size - len(above)]])]


def _rounded(scores: Tensor, noise: float) -> Tensor:
    """Scores to a relative precision; what is not finite as it is."""
    if noise == 0:
        return scores
    mantissa, exponent = torch.frexp(scores)
    rounded = torch.ldexp((mantissa / noise).round() * noise, exponent)
    return rounded.where(scores.isfinite(), scores)
