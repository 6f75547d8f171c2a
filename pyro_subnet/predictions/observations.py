"""Observations that a predictive distribution is held to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_subnet.exceptions import DataError, shown
from pyro_subnet.predictions.links.integration import Integrated
from pyro_subnet.tracing.arguments import as_tensors


def error_at(y: Any, found: Integrated, like: Tensor) -> Tensor:
    """How far the log density of observations may be off, shape (N,), nats.

    Args:
        y: Observations, as a tensor or an array.
        found: The predictive distribution.
        like: Of the dtype and device that an array is taken in.

    Returns:
        Shape (N,); zero where no sum stands for an integral.

    Raises:
        DataError: As for :func:`log_density_of`.
    """
    ((y,), _), _ = as_tensors(((y,), {}), log_density_of, like)
    density = log_density_of(found.distribution, y)
    if found.log_prob_error is None:
        return torch.zeros_like(density)
    return found.log_prob_error(y)


def log_density_of(predictive: Any, y: Tensor) -> Tensor:
    """Log predictive density of each observation, shape (N,), nats.

    Args:
        predictive: The distribution of y at each input, batch shape (N,).
        y: Observations, shape (N, ...).

    Returns:
        Shape (N,).

    Raises:
        DataError: If y is of other data than the predictions, or none of their values.
    """
    if not isinstance(y, Tensor):
        raise DataError(
            f"`y` must be a tensor; got {shown(y)}. Pass `torch.as_tensor(y)`."
        )
    # A batch of length one would broadcast to more data, and so would y of (N, 1).
    count = len(y) if y.ndim else 0
    if not count or tuple(predictive.batch_shape) != (count,):
        raise DataError(
            f"`predictive` must have batch shape ({count},), one for each of `y`, and "
            f"at least one; got {tuple(predictive.batch_shape)}. Pass both for the "
            "same data, and not `joint=True`."
        )
    shape = tuple(predictive.batch_shape + predictive.event_shape)
    if tuple(y.shape) != shape:
        raise DataError(
            f"`y` must have the shape of the predictions, {shape}; got "
            f"{tuple(y.shape)}. Pass `y.reshape(...)`, or labels without an axis of "
            "classes."
        )
    try:
        density: Tensor = predictive.log_prob(y)
    except (ValueError, RuntimeError, IndexError, TypeError) as err:
        raise DataError(
            "`y` must hold values that the predictions allow; got "
            f"{type(predictive).__name__}, which says: {err} Leave out what is missing."
        ) from err
    if bool(density.isnan().any()):
        raise DataError(
            "`y` must hold values that the predictions allow; got a score of NaN at "
            f"index {int(density.isnan().nonzero()[0])}. Leave out what is missing."
        )
    return density
