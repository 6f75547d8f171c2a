"""Proper scores of predictions, one for each data point.

Each has shape (N,). Its mean is the score of the data, with the standard error
``score.std() / len(score) ** 0.5``.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from pyro_subnet.diagnostics.probabilities import check_labels
from pyro_subnet.exceptions import DataError


def negative_log_likelihood(predictive: Any, y: Tensor) -> Float[Tensor, " data"]:
    r"""Negative log predictive density, :math:`-\log p(y_n \mid x_n)`.

    Args:
        predictive: The distribution of y at each input, batch shape (N,), as
            ``posterior.predictive_distribution`` gives it.
        y: Observations, shape (N, ...).

    Returns:
        Shape (N,), nats. For continuous y it is that of a density: it depends on the
        unit of y and may be negative.

    Raises:
        DataError: If the distribution and y do not match, or there are no data.

    Source: Good (1952), "Rational decisions"; Gneiting and Raftery (2007), doi
    10.1198/016214506000001437.
    """
    # A batch of length one would broadcast to more data, and so would y of (N, 1).
    if not len(y) or tuple(predictive.batch_shape) != (len(y),):
        raise DataError(
            f"`predictive` must have batch shape ({len(y)},), one for each of `y`, and "
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
        scores: Tensor = -predictive.log_prob(y)
    except (ValueError, RuntimeError, IndexError) as err:
        raise DataError(
            "`y` must hold values that the predictions allow; got "
            f"{type(predictive).__name__}, which says: {err} Leave out what is missing."
        ) from err
    if bool(scores.isnan().any()):
        raise DataError(
            "`y` must hold values that the predictions allow; got a score of NaN at "
            f"index {int(scores.isnan().nonzero()[0])}. Leave out what is missing."
        )
    return scores


def brier_score(
    probs: Float[Tensor, "data classes"], labels: Int[Tensor, " data"]
) -> Float[Tensor, " data"]:
    r"""Squared distance from the label, :math:`\sum_c (p_{nc} - 1[y_n = c])^2`.

    This is Brier's own definition, over all classes, from 0 to 2. For two classes it is
    twice the score that looks at one of them.

    Args:
        probs: Class probabilities, shape (N, C).
        labels: True classes, shape (N,).

    Returns:
        Shape (N,).

    Raises:
        DataError: If rows are no probabilities, or a label is outside [0, C).

    Source: Brier (1950), "Verification of forecasts expressed in terms of
    probability"; as printed, without the mean.
    """
    check_labels(probs, labels)
    target = F.one_hot(labels.long(), probs.shape[-1]).to(probs)
    return (probs - target).square().sum(-1)
