"""Checks of numbers, class probabilities, labels and shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyro_subnet.exceptions import DataError, shown


def tensors_of(**given: Any) -> list[Tensor]:
    """Tensors of arguments by name: NumPy arrays, lists and numbers are taken as such.

    Args:
        given: What the user passed.

    Returns:
        A tensor for each, in order.

    Raises:
        DataError: Which one holds no numbers.
    """
    return [_tensor_of(name, value) for name, value in given.items()]


def _tensor_of(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(np.require(value, requirements=["C", "W"]))
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"`{name}` must be a tensor, or an array of numbers; got {shown(value)}. "
            f"Pass `torch.as_tensor({name})`."
        ) from error


def check_probabilities(probs: Float[Tensor, "*batch classes"]) -> None:
    """Refuses rows that are no distribution over classes, such as logits."""
    if not probs.numel():
        raise DataError(
            "`probs` must hold at least one observation and one class; got shape "
            f"{tuple(probs.shape)}. Pass the probabilities of some data."
        )
    if not probs.is_floating_point():
        raise DataError(
            f"`probs` must be probabilities; got {probs.dtype}. Pass "
            "`logits.softmax(-1)`."
        )
    tolerance = torch.finfo(probs.dtype).eps ** 0.5
    worst = float((probs.sum(-1) - 1).abs().max())
    lowest = float(probs.min())
    # Written so that NaN fails.
    if not (lowest >= 0 and worst <= tolerance * probs.shape[-1]):
        raise DataError(
            "`probs` must be probabilities, not negative, and sum to 1 over the last "
            f"axis; got a least entry of {lowest:.3g} and a sum that is off by "
            f"{worst:.3g}. Pass `logits.softmax(-1)`."
        )


def check_labels(
    probs: Float[Tensor, "data classes"], labels: Int[Tensor, " data"]
) -> None:
    """Refuses rows that are no probabilities, and labels outside [0, C)."""
    check_probabilities(probs)
    check_same_shape("labels", labels.shape, "probs", probs.shape[:-1])
    count = probs.shape[-1]
    broken = (
        labels[labels != labels.round()] if labels.is_floating_point() else labels[:0]
    )
    if broken.numel():
        raise DataError(
            f"`labels` must be class numbers; got {float(broken[0])}. Pass whole "
            "numbers, such as the `argmax(-1)` of soft labels."
        )
    if bool(((labels < 0) | (labels >= count)).any()):
        raise DataError(
            f"`labels` must be in [0, C={count}); got {int(labels.min())} to "
            f"{int(labels.max())}. Number the classes from 0."
        )


def check_same_shape(
    name: str, shape: torch.Size, other: str, expected: torch.Size
) -> None:
    """Refuses tensors of different data, which would broadcast, or of none."""
    if shape != expected or not expected.numel():
        raise DataError(
            f"`{name}` must have an observation for each of `{other}`, and at least "
            f"one; got shapes {tuple(shape)} and {tuple(expected)}. Pass both for the "
            "same data."
        )


def check_draws(
    draws: Float[Tensor, " draws *data"], y: Float[Tensor, "*data"]
) -> None:
    """Refuses draws of other data than the observations', and no draws."""
    check_same_shape("draws", draws.shape[1:], "y", y.shape)
    if not len(draws):
        raise DataError(
            "`draws` must be at least one of each observation; got shape "
            f"{tuple(draws.shape)}. Draw from the predictive distribution."
        )
