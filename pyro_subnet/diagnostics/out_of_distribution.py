"""Whether uncertainty tells inputs out of distribution from those inside."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.diagnostics.entropy import predictive_entropy
from pyro_subnet.diagnostics.probabilities import tensors_of
from pyro_subnet.exceptions import DataError


def auroc(
    negatives: Float[Tensor, " data"], positives: Float[Tensor, " others"]
) -> float:
    r"""Area under the receiver operating characteristic.

    It is the probability that a positive scores higher than a negative; ties count
    half.

    Args:
        negatives: Scores of inputs that should score low, such as those in
            distribution, shape (N,).
        positives: Scores of inputs that should score high, shape (M,).

    Returns:
        From 0 to 1; 0.5 is no better than chance. Costs a sort.

    Raises:
        DataError: If either is empty, or a score is NaN.

    Source: Hanley and McNeil (1982), doi 10.1148/radiology.143.1.7063747.
    """
    negatives, positives = tensors_of(negatives=negatives, positives=positives)
    for name, scores in (("negatives", negatives), ("positives", positives)):
        if not scores.numel() or bool(scores.isnan().any()):
            raise DataError(
                f"`{name}` must be numbers, one at least; got {scores.numel()}, of "
                f"which {int(scores.isnan().sum())} NaN. Check the predictions."
            )
    # Not by torchmetrics, which puts scores outside [0, 1] through a sigmoid, in
    # float32, and so ties them; nor by scikit-learn, which refuses infinite ones.
    negatives, positives = negatives.flatten(), positives.flatten()
    dtype = torch.promote_types(negatives.dtype, positives.dtype)
    ordered = negatives.to(dtype).sort().values
    above = positives.to(dtype).contiguous()
    below = torch.searchsorted(ordered, above)
    not_above = torch.searchsorted(ordered, above, right=True)
    return float((below + not_above).double().mean()) / (2 * len(ordered))


def out_of_distribution_auroc(
    inside: Float[Tensor, "data classes"], outside: Float[Tensor, "others classes"]
) -> float:
    """AUROC of predictive entropy, with outside inputs as the positives.

    Args:
        inside: Class probabilities at inputs in distribution, shape (N, C).
        outside: Class probabilities at inputs out of distribution, shape (M, C).

    Returns:
        From 0 to 1. For another score, such as mutual information, use :func:`auroc`.

    Raises:
        DataError: If rows are no probabilities.

    Source: Hendrycks and Gimpel (2017), arXiv 1610.02136, for the task, with the
    largest probability as the score; Lakshminarayanan et al. (2017), arXiv 1612.01474,
    for entropy.
    """
    return auroc(predictive_entropy(inside), predictive_entropy(outside))
