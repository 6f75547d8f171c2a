"""What every selector is: a callable from a guide at its MAP and data to a subnet."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.data import Data
from pyro_subnet.exceptions import SelectionError
from pyro_subnet.subnet import Subnet
from pyro_subnet.trace import Latents, Model


@runtime_checkable
class GuideAtMAP(Protocol):
    """What a selector may ask of a guide."""

    @property
    def latents(self) -> Latents:
        """The latent sites at the MAP."""

    @property
    def user_model(self) -> Model:
        """The model, as the user wrote it."""


class Selector(ABC):
    """A strategy that chooses the subnet.

    Attributes:
        passes_over_data: Whether choosing takes a pass over the training data, which
            one-shot batches cannot give.
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


def check_size(size: float) -> None:
    """Checks a size before the number of parameters is known.

    Args:
        size: A count (int) or a share in (0, 1] (float).

    Raises:
        SelectionError: If it is neither.
    """
    count = isinstance(size, int) and not isinstance(size, bool) and size >= 1
    share = isinstance(size, float) and 0.0 < size <= 1.0
    if not (count or share):
        raise SelectionError(
            "`size` must be a positive int (a count) or a float in (0, 1] (a share); "
            f"got {size!r}. Pass 0.05 for 5% of the weights."
        )


def resolve_size(size: float, num_params: int) -> int:
    """How many elements a count or a share means.

    Args:
        size: A count (int), or a share in (0, 1] (float).
        num_params: D.

    Returns:
        S, at least 1; a share is rounded to the nearest count.

    Raises:
        SelectionError: If a count exceeds D.
    """
    count = size if isinstance(size, int) else max(1, round(size * num_params))
    if count > num_params:
        raise SelectionError(
            f"`size` must be at most the number of latent parameters, {num_params}; "
            f"got {size}. Pass a share such as 0.05, or None for all."
        )
    return count


def largest(scores: Float[Tensor, " params"], size: int) -> Tensor:
    """Positions of the largest scores; equal scores go by position.

    Scores are first rounded to about half their digits, so that the round-off of
    another order of sums does not decide between weights that are equal.

    Args:
        scores: Non-negative, shape (D,); -inf excludes an element.
        size: How many to take.

    Returns:
        Positions, shape (size,), unordered.
    """
    digits = 0.5 * torch.finfo(torch.float32).eps ** 0.5
    mantissa, exponent = torch.frexp(scores)
    rounded = torch.ldexp((mantissa / digits).round() * digits, exponent)
    order = rounded.sort(descending=True, stable=True).indices
    return order[:size]
