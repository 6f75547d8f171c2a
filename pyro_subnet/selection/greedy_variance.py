"""The weights of largest output gradient, refined by how they interact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

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

# Default candidates per chosen weight, for large subnets.
_CANDIDATES = 2.0


@final
@dataclass(frozen=True, eq=False)
class GreedyVariance(Selector):
    r"""Refines :class:`LargestGradient` by off-diagonal interactions (Greedy-Laplace).

    Starts from the S weights of largest mean squared output gradient, and swaps single
    weights, among the M = ``pool`` x S of largest gradient, while that raises the
    linearized predictive variance that is kept,

    .. math:: f(S) = \sum_x \operatorname{tr} J_S(x)\, P_{SS}^{-1} J_S(x)^\top

    with P the GGN of the training data plus the prior's precision. The weight whose
    removal costs least leaves, the one that then adds most enters, and the first swap
    that adds nothing ends the search. So f is never below that of
    :class:`LargestGradient`. All weights considered have large gradients, though:
    :class:`PredictiveVariance` with ``"greedy"`` takes its candidates by their
    variance, and builds its set up from nothing.

    Costs one pass over the inputs for the gradients, and over the candidates one more
    and one over the training data, each with 2 M^2 operations a row of J; then 6 M^2 S
    operations to start and 16 M^2 a swap. Holds five M x M matrices in float64.
    ``explained_variance`` is not measured.

    Attributes:
        size: A count (int) or a share in (0, 1] (float).
        inputs: As for :class:`LargestGradient`; None for the training data.
        pool: Candidates per chosen weight, at least 1; None for 2, but at least 2,048
            candidates in all.
        max_swaps: How many weights may be swapped.

    Raises:
        SelectionError: If ``size`` is neither a count nor a share; when called, if no
            weight moves an output at the inputs.
        OptionError: If another option has a value outside those it allows.
        PrecisionError: When called, if the precision over the candidates is not
            positive definite.
        MemoryLimitError: When called, if the candidates' matrices do not fit.

    Source: Raha, Khare and Patra (2026), arXiv 2605.09075, by its abstract, for the
    start and the objective. The exchange of single weights by sweeps, the pool and the
    sum over several outputs are ours, and may choose other weights than theirs.
    """

    size: int | float
    inputs: Any = None
    pool: int | float | None = None
    max_swaps: int = 200

    passes_over_data = True

    def __post_init__(self) -> None:
        check_size(self.size)
        check_inputs(self.inputs)
        check_pool(self.pool)
        if self.max_swaps < 0:
            raise OptionError(
                f"`max_swaps` must be a count; got {self.max_swaps}. Leave it out for "
                "200."
            )

    def __call__(self, guide: GuideAtMAP, data: Data) -> Subnet:
        """See :meth:`Selector.__call__`."""
        at_map = guide.at_map
        latents, layout = at_map.latents, at_map.latents.layout
        size = resolve_size(self.size, layout.num_params)
        num_candidates = pool_size(self.pool, size, layout.num_params, _CANDIDATES)
        check_pool_fits(num_candidates, MATRICES_TO_EXCHANGE, latents.loc.device)
        inputs = reference_data(self.inputs, data)
        scores = squared_gradients(at_map, inputs, "equal").total
        noise = torch.finfo(latents.loc.dtype).eps ** 0.75
        # Noise that all data share is no candidate.
        others = max(size, int((scores > -torch.inf).sum()))
        best = largest(scores, min(num_candidates, others), noise)
        pool = Subnet.from_positions(layout, best)
        start = torch.searchsorted(pool.flat, best[:size])
        chosen = exchange_(
            dense_precision(at_map, pool, data),
            output_gram(at_map, pool, inputs, "equal"),
            start,
            max_swaps=self.max_swaps,
            noise=relative_noise(latents.loc.dtype),
        )
        return Subnet.from_positions(layout, pool.flat[chosen])
