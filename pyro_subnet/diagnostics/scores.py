"""Proper scores of predictions, one for each data point.

Each has shape (N,). Its mean is the score of the data, with the standard error
``score.std() / len(score) ** 0.5``.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from pyro_subnet.diagnostics.probabilities import check_labels, tensors_of
from pyro_subnet.predictions.observations import log_density_of


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
    (y,) = tensors_of(y=y)
    return -log_density_of(predictive, y)


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
    probs, labels = tensors_of(probs=probs, labels=labels)
    check_labels(probs, labels)
    # Each observation's own: scikit-learn has the mean alone, torchmetrics nothing.
    target = F.one_hot(labels.long(), probs.shape[-1]).to(probs)
    return (probs - target).square().sum(-1)
