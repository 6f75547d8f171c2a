r"""Curvature of the negative log joint over the data: likelihood plus prior."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_subnet.curvature.ggn import GGNSum, Held, ggn_diagonal
from pyro_subnet.curvature.hessian import subtract_hessian_
from pyro_subnet.curvature.jacobian.output_map import (
    Factors,
    OutputMap,
    identity_factors,
)
from pyro_subnet.curvature.prior import (
    DensityTerm,
    PriorPrecision,
    prior_diagonal,
    prior_precision,
)
from pyro_subnet.exceptions import CheckpointError, DataError, ModelError
from pyro_subnet.files.resume import FitCheckpoint
from pyro_subnet.fit.summary import FitSummary, SummaryTally, prior_gradient
from pyro_subnet.options import Curvature, FitOptions
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.memory import DEFAULT_BUDGET
from pyro_subnet.tensors.modes import at_least_float32
from pyro_subnet.tracing.call import Graph, ModelCall, MovedParts
from pyro_subnet.tracing.data import Batch, Data
from pyro_subnet.tracing.log_likelihood import log_likelihood_map
from pyro_subnet.tracing.trace import Latents, Model


@dataclass(frozen=True, eq=False)
class SubnetCurvature:
    r"""Both parts of the posterior precision over a subnet.

    Attributes:
        ggn: That of the likelihood, G, summed over the data, in nats per parameter
            squared, as ``held`` says.
        held: ``"matrix"``: shape (S, S), in the lower triangle; what stands above the
            diagonal has no meaning. ``"rows"``: W of shape (R, S) with
            :math:`G = W^\top W`. ``"diagonal"``: that of G, shape (S,).
        prior: Negative Hessian of the log prior, unscaled.
        has_outputs: Whether the model has any observed site.
        moves_outputs: Whether the curvature of the likelihood is anywhere nonzero.
        summary: The log joint density at the MAP.
    """

    ggn: Tensor
    held: Held
    prior: PriorPrecision
    has_outputs: bool
    moves_outputs: bool
    summary: FitSummary


@dataclass(frozen=True, eq=False)
class DiagonalCurvature:
    """Diagonals of both parts over all D elements.

    Attributes:
        ggn: Shape (D,), float64.
        prior: Shape (D,), float64.
    """

    ggn: Tensor
    prior: Tensor


def subnet_curvature(
    model: Model,
    latents: Latents,
    subnet: Subnet,
    data: Data,
    options: FitOptions = FitOptions(form="primal"),  # noqa: B008 - frozen
    *,
    budget: int = DEFAULT_BUDGET,
    checkpoint: FitCheckpoint | None = None,
) -> SubnetCurvature:
    r"""One pass over the data: the likelihood's curvature, and P0.

    With :math:`\ell_n = \sum_e \sqrt{w_{ne}} \log p(y_{ne} \mid \theta)` over the
    elements e of datum n, and labels :math:`\tilde y` drawn from the model at the MAP:

    ============= =====================================================================
    ``"ggn"``     :math:`\sum_n w_n J_n^\top \Lambda_n J_n`
    ``"ggn-mc"``  :math:`\sum_n \nabla_S \tilde\ell_n \nabla_S \tilde\ell_n^\top`
    ``"ef"``      :math:`\sum_n \nabla_S \ell_n \nabla_S \ell_n^\top`
    ``"hessian"`` :math:`-\nabla_S^2 \sum_{ne} w_{ne} \log p(y_{ne} \mid \theta)`
    ============= =====================================================================

    Args:
        model: The user's model.
        latents: Its latent sites at the MAP.
        subnet: The chosen elements.
        data: The training data.
        options: Which curvature, and how it is wanted.
        budget: Bytes of Jacobian and activations that may be held at once.
        checkpoint: Where the sums are kept, and resumed from.

    Returns:
        Curvature, in its lower triangle or as rows, prior precision and summary.

    Raises:
        MemoryLimitError: If the matrix is wanted and does not fit.
        OptionError: If rows are asked for where there are none.

    Source: Daxberger et al. (2021), eq. 4 and section 3, arXiv 2010.14689; Martens
    (2020), sections 8, 9.2 and 11, arXiv 1412.1193, for the other kinds.
    """
    sums = _FitSums(model, latents, subnet, data, options, budget=budget)
    calls = data.calls("GGN")
    if checkpoint is not None:
        calls = checkpoint.calls(data, "GGN", sums)
    for args, kwargs in calls:
        sums.add(args, kwargs)
    return sums.finish()


def diagonal_curvature(
    model: Model,
    latents: Latents,
    data: Data,
    *,
    kind: Literal["ggn", "ef"] = "ggn",
    budget: int = DEFAULT_BUDGET,
) -> DiagonalCurvature:
    """One pass over the data for the diagonals over all D elements.

    Args:
        model: The user's model.
        latents: Its latent sites at the MAP.
        data: The training data.
        kind: As for :func:`subnet_curvature`.
        budget: Bytes of Jacobian and activations that may be held at once.

    Returns:
        Both diagonals; no matrix over D is formed.
    """
    tally, prior = Tally(data), list[Tensor]()
    everything = whole_subnet(latents)
    ggn = torch.zeros(everything.size, dtype=torch.float64, device=latents.loc.device)
    for args, kwargs in data.calls("Variances"):
        call = ModelCall.read(model, latents, args, kwargs)
        graph = call.graph()
        terms = tally.check(call, graph)
        if not prior:
            prior.append(prior_diagonal(terms, graph.leaves, budget))
        moved, activations = call.moved_parts(graph, everything), graph.activation_bytes
        del graph, terms
        if any(moved.values()) and call.num_data:
            weighted = Weighted(call, everything, moved, activations, not data.whole)
            ggn += ggn_diagonal(*weighted.rows(kind), budget)
    return DiagonalCurvature(ggn * tally.scale(), prior[0].to(torch.float64))


def _is_nonzero(ggn: Tensor, held: Held) -> bool:
    # A positive semidefinite matrix is zero where its diagonal is.
    part = ggn.diagonal() if held == "matrix" else ggn
    return bool((part != 0).any())


def whole_subnet(latents: Latents) -> Subnet:
    """The subnet of every element.

    Args:
        latents: The latent sites.

    Returns:
        S = D.
    """
    count = latents.layout.num_params
    return Subnet(latents.layout, torch.arange(count, device=latents.loc.device))


@dataclass(frozen=True, eq=False)
class Weighted:
    """What the curvature of one call is made of."""

    call: ModelCall
    subnet: Subnet
    moved: MovedParts
    activation_bytes: int
    without_plates: bool

    def rows(self, kind: Curvature) -> tuple[OutputMap, Factors]:
        """A map and factors whose weighted Jacobian's Gram matrix is the curvature."""
        if kind == "ggn":
            outputs = self.call.output_map(
                self.subnet, self.moved, self.activation_bytes
            )
            return outputs, self.call.factors(self.moved, self.without_plates)
        outputs = self.log_likelihood(0.5, sampled=kind == "ggn-mc")
        return outputs, identity_factors(outputs)

    def log_likelihood(self, power: float, *, sampled: bool = False) -> OutputMap:
        """The log likelihood of each datum, elements weighted by a power of theirs."""
        return log_likelihood_map(
            self.call,
            self.subnet,
            self.moved,
            self.activation_bytes,
            power=power,
            without_plates=self.without_plates,
            sampled=sampled,
        )


class _FitSums:
    """What :func:`subnet_curvature` adds up; a file can hold it between two batches."""

    def __init__(
        self,
        model: Model,
        latents: Latents,
        subnet: Subnet,
        data: Data,
        options: FitOptions,
        *,
        budget: int,
    ):
        self.model, self.latents, self.subnet = model, latents, subnet
        self.data, self.options, self.budget = data, options, budget
        self.tally = Tally(data)
        self.dtype = at_least_float32(latents.loc.dtype)
        like = latents.loc.new_empty(0, dtype=self.dtype)
        self.total = GGNSum(subnet.size, like, options.held_as)
        self.prior: PriorPrecision | None = None
        self.gradient: Tensor | None = None
        self.last = 0.0

    def add(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Adds one call."""
        kind, tally, budget = self.options.curvature, self.tally, self.budget
        call = ModelCall.read(self.model, self.latents, args, kwargs)
        graph = call.graph()
        terms = tally.check(call, graph)
        if self.prior is None:
            prior = prior_precision(terms, graph.leaves, self.subnet, budget)
            self.prior = prior.to(self.dtype)
            self.gradient = prior_gradient(terms, graph.leaves, self.subnet)
            self.total.meet(self.prior, kind)
        moved = call.moved_parts(graph, self.subnet)
        activations = graph.activation_bytes
        del graph, terms  # frees the activations before the Jacobian needs the room
        before = float(tally.summary.numbers[0])
        tally.summary.add(call, moved, not self.data.whole)
        self.last = float(tally.summary.numbers[0]) - before
        if any(moved.values()) and call.num_data:
            weighted = Weighted(
                call, self.subnet, moved, activations, not self.data.whole
            )
            if kind == "hessian":
                likelihood = weighted.log_likelihood(1.0)
                subtract_hessian_(self.total.matrix(), likelihood, budget)
            else:
                self.total.add(*weighted.rows(kind), budget)

    def finish(self) -> SubnetCurvature:
        """The curvature of all that was added."""
        scale, tally = self.tally.scale(), self.tally
        prior, gradient = self._of_prior()
        summary = tally.summary.finish(scale, tally.log_prior or 0.0, gradient)
        ggn, held = self.total.finish(scale)
        return SubnetCurvature(
            ggn,
            held,
            prior,
            tally.has_outputs,
            _is_nonzero(ggn, held),
            summary,
        )

    def _of_prior(self) -> tuple[PriorPrecision, Tensor]:
        if self.prior is None or self.gradient is None:
            raise DataError(
                "`batches` must hold at least one batch; got none. Check the loader."
            )
        return self.prior, self.gradient

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that was added so far; see :class:`~pyro_subnet.files.resume.Sums`."""
        prior, gradient = self._of_prior()
        tensors = {
            **self.total.tensors(),
            "prior_diagonal": prior.diagonal,
            "prior_coupled": prior.coupled,
            "prior_columns": prior.columns,
            "prior_gradient": gradient,
            "summary": self.tally.summary.numbers,
        }
        content = {
            "form": self.total.form,
            "seen": self.tally.seen,
            "log_prior": self.tally.log_prior,
            "has_outputs": self.tally.has_outputs,
            "scales_noise": self.tally.summary.scales_noise,
            "last": self.last,
        }
        return tensors, content

    def restore(self, tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
        """Undoes :meth:`state`."""
        names = ("prior_diagonal", "prior_coupled", "prior_columns", "prior_gradient")
        parts = (tensors[name].to(self.latents.loc.device) for name in names)
        diagonal, coupled, columns, self.gradient = parts
        self.prior = PriorPrecision(diagonal, coupled, columns)
        self.total.restore(content["form"], tensors)
        self.tally.seen, self.last = content["seen"], content["last"]
        self.tally.log_prior = content["log_prior"]
        self.tally.has_outputs = content["has_outputs"]
        self.tally.summary.numbers = tensors["summary"]
        self.tally.summary.scales_noise = content["scales_noise"]

    def check_again(self, batch: Batch) -> None:
        """Holds the model to its log likelihood of the batch that was added last."""
        call = ModelCall.read(self.model, self.latents, *batch)
        tally = SummaryTally()
        tally.add(
            call, call.moved_parts(call.graph(), self.subnet), not self.data.whole
        )
        found, expected = float(tally.numbers[0]), self.last
        tolerance = torch.finfo(self.latents.loc.dtype).eps ** 0.5
        if abs(found - expected) > tolerance * (1 + abs(expected)):
            raise CheckpointError(
                "The model must be as it was when the file was written: the log "
                f"likelihood of the batch that was summed last was {expected:.6g}; got "
                f"{found:.6g}. Put its parameters back to resume, or delete the file "
                "to start over."
            )


class Tally:
    """Counts the data of a pass and holds the prior to one value in all its calls."""

    def __init__(self, data: Data):
        self.data = data
        self.seen = 0
        self.log_prior: float | None = None
        self.summary = SummaryTally()
        self.has_outputs = False

    def check(self, call: ModelCall, graph: Graph) -> list[DensityTerm]:
        """Counts one call; returns its log prior."""
        terms = graph.prior_terms
        value = sum(term.log_density.item() for term in terms)
        tolerance = torch.finfo(call.latents.loc.dtype).eps ** 0.5
        if self.log_prior is None:
            self.log_prior = value
        elif abs(value - self.log_prior) > tolerance * (1 + abs(value)):
            raise ModelError(
                "The log prior at the MAP must be the same for every batch; got "
                f"{self.log_prior:.6g} and {value:.6g}. A prior or `pyro.factor` that "
                "depends on the data needs `laplace_approximation` on all of them."
            )
        self.has_outputs |= bool(call.sites)
        _check_observed(call)
        if self.data.num_data is not None:
            self.seen += call.num_seen
        return terms

    def scale(self) -> float:
        """What the sum over the seen data is multiplied by."""
        if self.data.num_data is None:
            return 1.0
        return self.data.num_data / self.seen


def _check_observed(call: ModelCall) -> None:
    for site in call.sites:
        if not site.node["is_observed"]:
            raise ModelError(
                f"Every sample site must be latent in the guide or observed; got site "
                f"{site.name!r} without data. Pass its data to the Laplace "
                "approximation."
            )
