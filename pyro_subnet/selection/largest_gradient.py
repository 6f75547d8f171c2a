"""The weights with the largest output gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch

from pyro_subnet.selection.base import (
    GuideAtMAP,
    Selector,
    check_size,
    largest,
    resolve_size,
)
from pyro_subnet.selection.output_variance import (
    check_inputs,
    reference_data,
    squared_gradients,
)
from pyro_subnet.subnet import Subnet
from pyro_subnet.tracing.data import Data


@final
@dataclass(frozen=True, eq=False)
class LargestGradient(Selector):
    r"""Keeps the weights of largest mean squared output gradient (Gradient-Laplace).

    .. math:: s_j = \operatorname{E}_x \sum_c J_{cj}(x)^2

    over all unconstrained parameters c of the observed distributions that a latent site
    moves: for classes their log-probabilities, for a heteroscedastic normal its loc and
    its log scale. Neither the prior nor the number of data enters, so a weight that
    moves the outputs much is chosen even where the data determine it well. It
    prefers weights that :class:`LargestVariance` leaves out.

    Costs one pass over the reference inputs, with C backward passes for each, and
    memory linear in D. ``explained_variance`` is not measured.

    Attributes:
        size: A count (int) or a share in (0, 1] (float).
        inputs: Where the outputs matter: a tensor, a tuple of arguments, a mapping of
            keyword arguments, ``(args, kwargs)``, or a list of such batches; None for
            the training data.

    Raises:
        SelectionError: If ``size`` is neither a count nor a share; when called, if no
            weight moves an output at the inputs.
        OptionError: If ``inputs`` are nothing that the model can take.

    Source: Raha, Khare and Patra (2026), arXiv 2605.09075, by its abstract; the sum
    over several outputs is ours.
    """

    size: int | float
    inputs: Any = None

    def __post_init__(self) -> None:
        check_size(self.size)
        check_inputs(self.inputs)
        object.__setattr__(self, "passes_over_data", self.inputs is None)

    def __call__(self, guide: GuideAtMAP, data: Data) -> Subnet:
        """See :meth:`Selector.__call__`."""
        latents = guide.latents
        size = resolve_size(self.size, latents.layout.num_params)
        inputs = reference_data(self.inputs, data)
        scores = squared_gradients(guide.at_map, inputs, "equal").total
        noise = torch.finfo(latents.loc.dtype).eps ** 0.75
        positions = largest(scores, size, noise)
        return Subnet.from_positions(latents.layout, positions)
