r"""Whether predicted classes come true as often as their probabilities promise.

:math:`\operatorname{ECE} = \sum_b \tfrac{n_b}{n} |\operatorname{acc}_b -
\operatorname{conf}_b|` over bins b of equal width. It is no proper score: a model that
always predicts the classes' frequencies has an ECE of zero. Read it beside the negative
log likelihood or the Brier score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pyro_subnet.diagnostics.probabilities import check_labels, tensors_of
from pyro_subnet.exceptions import OptionError, shown
from pyro_subnet.options import is_count


@final
@dataclass(frozen=True, eq=False)
class Reliability:
    """Confidence and accuracy in bins of confidence, of equal width.

    Attributes:
        edges: Edges of the bins, from 0 to 1, shape (bins + 1,).
        counts: Predictions in each bin, shape (bins,).
        confidence: Their mean confidence; NaN in an empty bin.
        accuracy: Their share that comes true; NaN in an empty bin.
    """

    edges: Float[Tensor, " edges"]
    counts: Int[Tensor, " bins"]
    confidence: Float[Tensor, " bins"]
    accuracy: Float[Tensor, " bins"]

    @property
    def ece(self) -> float:
        """Expected calibration error, from 0 to 1."""
        share = self.counts / self.counts.sum()
        gap = (self.accuracy - self.confidence).abs()
        return float((share * gap)[self.counts > 0].sum())


def reliability(
    probs: Float[Tensor, "data classes"],
    labels: Int[Tensor, " data"],
    *,
    num_bins: int = 15,
) -> Reliability:
    """Confidence in the most probable class against accuracy.

    Args:
        probs: Class probabilities, shape (N, C).
        labels: True classes, shape (N,).
        num_bins: Number of bins.

    Returns:
        The bins, for ``plot_reliability``; its ``ece`` sums them up.

    Raises:
        DataError: If rows are no probabilities, or a label is outside [0, C).
        OptionError: If there is no bin.

    Source: Guo, Pleiss, Sun and Weinberger (2017), section 2, arXiv 1706.04599.
    """
    probs, labels = tensors_of(probs=probs, labels=labels)
    check_labels(probs, labels)
    confidence, predicted = probs.max(-1)
    return binned(confidence, predicted == labels, num_bins)


def expected_calibration_error(
    probs: Float[Tensor, "data classes"],
    labels: Int[Tensor, " data"],
    *,
    num_bins: int = 15,
) -> float:
    """Expected calibration error of the most probable class (top-label ECE).

    Args:
        probs: Class probabilities, shape (N, C).
        labels: True classes, shape (N,).
        num_bins: Number of bins.

    Returns:
        From 0 to 1. It is biased upwards if bins hold few data, so compare models on
        the same data and bins.

    Raises:
        DataError: As for :func:`reliability`.
        OptionError: If there is no bin.

    Source: Naeini, Cooper and Hauskrecht (2015), "Obtaining well calibrated
    probabilities using Bayesian binning"; Guo et al. (2017), eq. 3, arXiv 1706.04599.
    """
    return reliability(probs, labels, num_bins=num_bins).ece


def classwise_calibration_error(
    probs: Float[Tensor, "data classes"],
    labels: Int[Tensor, " data"],
    *,
    num_bins: int = 15,
) -> float:
    """Calibration error of each class's probability, averaged over classes.

    Args:
        probs: Class probabilities, shape (N, C).
        labels: True classes, shape (N,).
        num_bins: Number of bins.

    Returns:
        From 0 to 1. With many classes most probabilities are near zero, and so is this.

    Raises:
        DataError: As for :func:`reliability`.
        OptionError: If there is no bin.

    Source: Kull et al. (2019), arXiv 1910.12656; Nixon et al. (2019), arXiv
    1904.01685, as "static calibration error".
    """
    probs, labels = tensors_of(probs=probs, labels=labels)
    check_labels(probs, labels)
    hits = F.one_hot(labels.long(), probs.shape[-1]).bool()
    errors = [
        binned(confidence, hit, num_bins).ece
        for confidence, hit in zip(probs.mT, hits.mT, strict=True)
    ]
    return sum(errors) / len(errors)


def binned(
    confidence: Float[Tensor, " data"], hits: Bool[Tensor, " data"], num_bins: int
) -> Reliability:
    """Sorts predictions into bins (a, b] of confidence; 0 falls in the first bin."""
    if not is_count(num_bins):
        raise OptionError(
            f"`num_bins` must be positive; got {shown(num_bins)}. Pass a whole number, "
            "or leave it out for 15."
        )
    # Not by torchmetrics, whose bins are [a, b), in float32, and have no counts.
    confidence = confidence.to(torch.float64).contiguous()
    edges = torch.linspace(0, 1, num_bins + 1).to(confidence)
    at = torch.bucketize(confidence, edges[1:-1])
    counts = at.bincount(minlength=num_bins)
    promised = torch.zeros_like(edges[1:]).index_add(0, at, confidence)
    true = torch.zeros_like(edges[1:]).index_add(0, at, hits.to(confidence))
    return Reliability(edges, counts, promised / counts, true / counts)
