r"""Kronecker-factored curvature of a Pyro model over all D elements."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from pyro_subnet.curvature.kronecker import KroneckerBlock, KroneckerTotal
from pyro_subnet.curvature.prior import prior_diagonal
from pyro_subnet.exceptions import NoKroneckerFactorsWarning, warn
from pyro_subnet.fit.summary import FitSummary, prior_gradient
from pyro_subnet.fit.sums import Tally, Weighted, whole_subnet
from pyro_subnet.tensors.memory import DEFAULT_BUDGET
from pyro_subnet.tracing.call import ModelCall, MovedParts
from pyro_subnet.tracing.data import Data
from pyro_subnet.tracing.output_site import site_weights
from pyro_subnet.tracing.trace import Latents, Model


@dataclass(frozen=True, eq=False)
class KroneckerCurvature:
    """Kronecker factors over all D elements, and diagonals of what has none.

    Attributes:
        blocks: Factors of weight matrices and of vectors that are added.
        diagonal: The likelihood's exact diagonal at elements in no block, 0 at the
            others, shape (D,), float64.
        prior: Diagonal of P0, shape (D,), float64.
        has_outputs: Whether the model has any observed site.
        summary: The log joint density at the MAP.
    """

    blocks: tuple[KroneckerBlock, ...]
    diagonal: Tensor
    prior: Tensor
    has_outputs: bool
    summary: FitSummary

    @property
    def moves_outputs(self) -> bool:
        """Whether the curvature of the likelihood is anywhere nonzero."""
        return bool((self.ggn_diagonal() != 0).any())

    def likelihood_scaled(self, factor: float) -> KroneckerCurvature:
        """The curvature of a likelihood whose curvature is a multiple of this one's.

        Args:
            factor: The multiple, positive.

        Returns:
            The curvature.
        """
        blocks = tuple(
            replace(block, output=block.output * factor) for block in self.blocks
        )
        return replace(self, blocks=blocks, diagonal=self.diagonal * factor)

    def ggn_diagonal(self) -> Tensor:
        """The likelihood's diagonal, from the factors where there are any.

        Returns:
            Shape (D,), float64.
        """
        full = self.diagonal.clone()
        for block in self.blocks:
            outer = block.output.diagonal().outer(block.input.diagonal())
            full[block.positions] = outer.to(full)
        return full


def kronecker_curvature(
    model: Model,
    latents: Latents,
    data: Data,
    *,
    kind: Literal["ggn", "ggn-mc", "ef"] = "ggn",
    budget: int = DEFAULT_BUDGET,
) -> KroneckerCurvature:
    r"""One pass over the data for the Kronecker factors over all D elements.

    See :mod:`~pyro_subnet.curvature.kronecker` for what they are. A datum's weight in
    the mean that A is, is the sum of its elements' :math:`w_{ne}` at all observed
    sites: a masked datum is left out, and one of weight two counts as two.

    Matrices that enter linear layers, convolutions of one group and products ``x @ w``
    have factors, and so do vectors that are added. Norm layers, embeddings,
    elements of the likelihood (a noise scale), sites that enter a function in any other
    way or several layers in different arrangements, and models whose layers couple
    data, have the exact diagonal.

    Args:
        model: The user's model.
        latents: Its latent sites at the MAP.
        data: The training data.
        kind: As for :func:`~pyro_subnet.fit.sums.subnet_curvature`.
        budget: Bytes of activations that may be held at once.

    Returns:
        Factors and diagonals; no matrix over D is formed.

    Raises:
        ModelError: If weights enter other layers in one batch than in another.
        MemoryLimitError: If the factors do not fit in memory.

    Source: Martens and Grosse (2015), section 3, arXiv 1503.05671; Eschenhagen et al.
    (2023), "expand" in section 3, arXiv 2311.00636; Ritter et al. (2018), for the
    Laplace approximation. Departs from them in the weights of A, which they lack.
    """
    tally, prior, gradient = Tally(data), list[Tensor](), list[Tensor]()
    everything = whole_subnet(latents)
    total = KroneckerTotal(everything.size, latents.loc)
    for args, kwargs in data.calls("Kronecker factors"):
        call = ModelCall.read(model, latents, args, kwargs)
        graph = call.graph()
        terms = tally.check(call, graph)
        if not prior:
            prior.append(prior_diagonal(terms, graph.leaves, budget))
            gradient.append(prior_gradient(terms, graph.leaves, everything))
        moved, activations = call.moved_parts(graph, everything), graph.activation_bytes
        del graph, terms
        tally.summary.add(call, moved, not data.whole)
        if any(moved.values()) and call.num_data:
            weighted = Weighted(call, everything, moved, activations, not data.whole)
            weights = _data_weights(call, moved, not data.whole)
            total.add(*weighted.rows(kind), weights, budget)
    scale = tally.scale()
    blocks = total.blocks(scale)
    if tally.has_outputs and not blocks:
        warn(
            "Kronecker factors need weights that enter layers, data on their first "
            f"axis and uncoupled; got none ({total.reason or 'no such weight'}), so "
            f"all {everything.size} elements have their diagonal alone. Check with "
            "`.eval()` and `F.linear`-like layers, or choose another covariance.",
            NoKroneckerFactorsWarning,
        )
    return KroneckerCurvature(
        blocks,
        total.diagonal * scale,
        prior[0].to(torch.float64),
        tally.has_outputs,
        tally.summary.finish(scale, tally.log_prior or 0.0, gradient[0]),
    )


def _data_weights(call: ModelCall, moved: MovedParts, without_plates: bool) -> Tensor:
    """w of each datum, the sum of its elements', shape (N,), float64."""
    return torch.stack(
        [
            site_weights(site.node, site.distribution, without_plates)
            .reshape(call.num_data, -1)
            .sum(1)
            for site in call.sites
            if moved[site.name]
        ]
    ).sum(0)
