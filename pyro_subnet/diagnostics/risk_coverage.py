"""Selective prediction: the risk of the data answered, if the uncertain are not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.diagnostics.probabilities import check_same_shape, tensors_of
from pyro_subnet.exceptions import DataError


@final
@dataclass(frozen=True, eq=False)
class RiskCoverage:
    """Mean loss of the most certain data, against their share.

    Attributes:
        coverage: Shares of the data that are answered, ascending to 1, one for each
            distinct uncertainty, shape (T,).
        risk: Mean loss of those answered, shape (T,).
        aurc: Mean over n of the risk of the n most certain: the area under the curve.
            Data that are equally uncertain are each taken at their mean loss.
    """

    coverage: Float[Tensor, " thresholds"]
    risk: Float[Tensor, " thresholds"]
    aurc: float


def risk_coverage(
    uncertainty: Float[Tensor, " data"], loss: Float[Tensor, " data"]
) -> RiskCoverage:
    """Sorts data by uncertainty and averages the loss of the most certain.

    Args:
        uncertainty: The score by which answers are withheld, such as predictive
            entropy, shape (N,).
        loss: What an answer costs, such as ``(predicted != labels).double()``, (N,).

    Returns:
        The curve, for ``plot_risk_coverage``.

    Raises:
        DataError: If there are no data, or an uncertainty is NaN.

    Source: El-Yaniv and Wiener (2010), "On the foundations of noise-free selective
    classification"; Geifman, Uziel and El-Yaniv (2019), arXiv 1805.08206, for the area.
    """
    uncertainty, loss = tensors_of(uncertainty=uncertainty, loss=loss)
    check_same_shape("uncertainty", uncertainty.shape, "loss", loss.shape)
    if bool(uncertainty.isnan().any()):
        raise DataError(
            f"`uncertainty` must be numbers; got {int(uncertainty.isnan().sum())} NaN. "
            "Check the predictions."
        )
    loss = loss.to(torch.float64)
    _, at, sizes = uncertainty.unique(return_inverse=True, return_counts=True)
    # No threshold separates data of equal uncertainty: each group counts as a whole.
    grouped = torch.zeros(len(sizes)).to(loss).index_add(0, at, loss)
    answered = sizes.cumsum(0)
    risk = grouped.cumsum(0) / answered
    each = (grouped / sizes).repeat_interleave(sizes).cumsum(0)
    counts = torch.arange(1, len(loss) + 1).to(loss)
    return RiskCoverage(answered / len(loss), risk, float((each / counts).mean()))
