"""The weights of largest output gradient, refined by how they interact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pyro_subnet.exceptions import OptionError
from pyro_subnet.selection.base import (
    GuideAtMAP,
    Selector,
    check_size,
    largest,
    resolve_size,
)
from pyro_subnet.selection.greedy import (
    MATRICES_TO_EXCHANGE,
    check_pool,
    check_pool_fits,
    exchange_,
    pool_size,
    relative_noise,
)
from pyro_subnet.selection.output_variance import (
    check_inputs,
    dense_precision,
    output_gram,
    reference_data,
    squared_gradients,
)
from pyro_subnet.subnet import Subnet
from pyro_subnet.tracing.data import Data

# Candidates per chosen weight of large subnets, by default.
_CANDIDATES = 2.0


@dataclass(frozen=True, eq=False)
class GreedyVariance(Selector):
    r"""Refines :class:`LargestGradient` by off-diagonal interactions (Greedy-Laplace).

    Starts from the S weights of largest mean squared output gradient, and swaps single
    weights, among the M = ``pool`` x S of largest gradient, while that raises the
    linearized predictive variance that is kept,

    .. math:: f(S) = \sum_x \operatorname{tr} J_S(x)\, P_{SS}^{-1} J_S(x)^\top

    with P the training data's GGN plus the prior's precision: the weight whose removal
    costs least leaves, the one that then adds most enters, and the first swap that adds
    nothing ends it. So f is never below that of :class:`LargestGradient`, but the
    weights are of large gradient first: :class:`PredictiveVariance` with ``"greedy"``
    starts from the variances instead, and builds its set up.

    Costs a pass over the inputs for the gradients; over the candidates one more, and
    one over the training data, with 2 M^2 operations a row of J; 6 M^2 S to start and
    16 M^2 a swap; five M x M matrices of memory in float64.
    ``explained_variance`` is not measured.

    Attributes:
        size: A count (int) or a share in (0, 1] (float).
        inputs: As for :class:`LargestGradient`; None for the training data.
        pool: Candidates per chosen weight, at least 1; None for 2, and at least 2,048
            candidates in all.
        max_swaps: How many weights may be swapped.

    Raises:
        SelectionError: If ``size`` is neither a count nor a share.
        OptionError: If another option has no value of those it allows.

    Source: Raha, Khare and Patra (2026), arXiv 2605.09075, by its abstract: start and
    objective. The exchange of single weights by sweeps, the pool and the sum over
    several outputs are ours, and need not choose the weights that theirs does.
    """

    size: int | float
    inputs: Any = None
    pool: int | float | None = None
    max_swaps: int = 200

    passes_over_data = True

    def __post_init__(self) -> None:
        """Checks the options."""
        check_size(self.size)
        check_inputs(self.inputs)
        check_pool(self.pool)
        if self.max_swaps < 0:
            raise OptionError(
                f"`max_swaps` must be a count; got {self.max_swaps}. Leave it out for "
                "200."
            )

    def __call__(self, guide: GuideAtMAP, data: Data) -> Subnet:
        """Chooses the subnet.

        Args:
            guide: A guide at its MAP.
            data: The training data.

        Returns:
            The subnet.

        Raises:
            PrecisionError: If the precision over the candidates is not positive
                definite.
            MemoryLimitError: If the candidates' matrices do not fit.
            SelectionError: If no weight moves an output at the inputs.
        """
        latents, model = guide.latents, guide.user_model
        layout = latents.layout
        size = resolve_size(self.size, layout.num_params)
        num_candidates = pool_size(self.pool, size, layout.num_params, _CANDIDATES)
        check_pool_fits(num_candidates, MATRICES_TO_EXCHANGE, latents.loc.device)
        inputs = reference_data(self.inputs, data)
        scores = squared_gradients(model, latents, inputs, "equal")
        noise = torch.finfo(latents.loc.dtype).eps ** 0.75
        best = largest(scores, num_candidates, noise)
        pool = Subnet.from_positions(layout, best)
        start = torch.searchsorted(pool.flat, best[:size])
        chosen = exchange_(
            dense_precision(model, latents, pool, data),
            output_gram(model, latents, pool, inputs, "equal"),
            start,
            max_swaps=self.max_swaps,
            noise=relative_noise(latents.loc.dtype),
        )
        return Subnet.from_positions(layout, pool.flat[chosen])
