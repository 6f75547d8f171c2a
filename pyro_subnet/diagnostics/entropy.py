r"""Entropy of predicted classes, split into what more data could reduce and the rest.

.. math:: \underbrace{H\big[E_\theta p(y \mid x, \theta)\big]}_{\text{total}} =
    \underbrace{E_\theta H\big[p(y \mid x, \theta)\big]}_{\text{aleatoric}} +
    \underbrace{I(y; \theta \mid x)}_{\text{epistemic}}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.diagnostics.probabilities import check_probabilities, tensors_of
from pyro_subnet.exceptions import DataError

_AXES = 3  # of draws: K, N and C


@final
@dataclass(frozen=True, eq=False)
class EntropyDecomposition:
    """Entropies at each input, in nats, shape (N,).

    Attributes:
        total: Entropy of the predictive.
        aleatoric: Mean entropy under one draw of the weights.
        epistemic: Mutual information of class and weights, the difference.
    """

    total: Float[Tensor, " data"]
    aleatoric: Float[Tensor, " data"]
    epistemic: Float[Tensor, " data"]


def predictive_entropy(
    probs: Float[Tensor, "*batch classes"],
) -> Float[Tensor, "*batch"]:
    """Entropy of class probabilities.

    Args:
        probs: Shape (..., C).

    Returns:
        Shape (...), in nats, from 0 to log C.

    Raises:
        DataError: If rows are no probabilities.
    """
    (probs,) = tensors_of(probs=probs)
    check_probabilities(probs)
    return torch.special.entr(probs).sum(-1)


def decompose_entropy(
    draws: Float[Tensor, "draws data classes"],
) -> EntropyDecomposition:
    """Splits predictive entropy into its aleatoric and its epistemic part.

    Args:
        draws: Class probabilities under draws of the weights, shape (K, N, C), such as
            ``posterior.sample_functions(K, x).softmax(-1)``.

    Returns:
        The parts. With few draws the epistemic part is too small on average, by about
        :math:`(C - 1) / 2 K` nats where each draw is sure of a class, else by less.

    Raises:
        DataError: If rows are no probabilities, or axes are missing.

    Source: Depeweg et al. (2018), arXiv 1710.07283; Houlsby et al. (2011),
    eq. 2, arXiv 1112.5745.
    """
    (draws,) = tensors_of(draws=draws)
    if draws.ndim != _AXES:
        raise DataError(
            "`draws` must have shape (K, N, C), class probabilities of each draw of "
            f"the weights; got {tuple(draws.shape)}. Pass "
            "`posterior.sample_functions(K, x).softmax(-1)`."
        )
    each = predictive_entropy(draws).mean(0)
    total = torch.special.entr(draws.mean(0)).sum(-1)
    # Entropy is concave, so that only round-off can make the difference negative.
    return EntropyDecomposition(total, each, (total - each).clamp(min=0.0))
