"""The sums over the data that a fit takes: the likelihood's curvature G, and P0."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.curvature.density_term import DensityTerm
from pyro_subnet.curvature.ggn import GGNSum
from pyro_subnet.curvature.hessian import subtract_hessian_
from pyro_subnet.curvature.jacobian.output_map import Factors, some_of
from pyro_subnet.curvature.jacobian.part import RandomPart
from pyro_subnet.curvature.jacobian.route import squared_columns
from pyro_subnet.curvature.prior import (
    PriorPrecision,
    prior_diagonal,
    prior_gradient,
)
from pyro_subnet.curvature.scores import MAX_OUTPUTS, Departure, ScoreSum, Watch
from pyro_subnet.curvature.sums import Summed
from pyro_subnet.exceptions import (
    CheckpointError,
    DataCountWarning,
    NoObservedSiteWarning,
    NoOutputVarianceWarning,
    SquashedLogitsWarning,
    UntrainedWarning,
    warn,
)
from pyro_subnet.fit.passes import DataPass
from pyro_subnet.gaussians.registry import new_sum
from pyro_subnet.laplace.summary import FitSummary
from pyro_subnet.options import FitOptions
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.memory import DEFAULT_BUDGET
from pyro_subnet.tensors.modes import at_least_float32
from pyro_subnet.tracing.data import Batch, Data
from pyro_subnet.tracing.subnet_call import SubnetCall
from pyro_subnet.tracing.trace import ModelAtMAP

# Share of the outputs' variance, over that of the weights, below which a choice is
# poor. A random one has 1 on average, and of half of all weights nearly any.
_POOR = 0.5


@final
@dataclass(frozen=True, eq=False)
class SubnetCurvature:
    """Both parts of the posterior precision over a subnet.

    Attributes:
        likelihood: G, the likelihood's curvature, summed over the data, nats / param².
        prior: P0, the negative Hessian of the log prior, unscaled.
        has_outputs: Whether the model has any observed site.
        doubts: Why data may count never, or several times.
        num_seen: Number of data points that were seen; None where plates do not tell.
        departure_by: From the posterior's :meth:`Gaussian.whiten`, how far the weights
            are from where the data would have them; None where that is not known.
    """

    likelihood: Summed
    prior: PriorPrecision
    summary: FitSummary
    has_outputs: bool
    doubts: Sequence[str]
    num_seen: int | None
    departure_by: Callable[[Callable[[Tensor], Tensor]], Departure] | None = None

    def warn_of_training(self, whiten: Callable[[Tensor], Tensor]) -> None:
        """Says where the weights seem not to be trained on the data."""
        found = None if self.departure_by is None else self.departure_by(whiten)
        if found is not None and found.is_far:
            warn(
                "The weights do not seem to be trained on these data: a Newton step of "
                f"the subnet would gain {found.gain:.2g} nats an observed element, "
                f"{found.times:.2g} times what data drawn from this model would let it "
                "gain. Train the guide, or let it start at the trained network, by "
                "`init_loc_fn=`; `diagnostics.stationarity` says more.",
                UntrainedWarning,
            )

    def warn_of_doubts(self) -> None:
        """Says why data may count never, or several times."""
        for doubt in self.doubts:
            warn(doubt, DataCountWarning)

    def warn_of_no_data(self, subnet: Subnet) -> None:
        """Says where the likelihood adds nothing to the prior, or little."""
        if not self.has_outputs:
            warn(
                "The model has no observed site, so the posterior is the prior's "
                "curvature alone. If a likelihood is hidden by `poutine.block`, pass "
                "the full model.",
                NoObservedSiteWarning,
            )
        elif self.likelihood.is_zero:
            warn(
                "The subnet moves no output at any training input: there the "
                "predictive is the MAP's. Its weights may still matter on other "
                "inputs; choose more weights, or another selector such as "
                "`PredictiveVariance`, to have variance on these.",
                NoOutputVarianceWarning,
            )
        elif (explained := subnet.explained_variance) is not None and (
            explained < _POOR * subnet.fraction
        ):
            warn(
                "The subnet explains less of the outputs' variance at the training "
                f"inputs than random weights would: {explained:.2%} of a diagonal "
                f"posterior's, with {subnet.fraction:.2%} of them. Predictions may be "
                "the MAP's there and near. Pass a number as `subnet=`, for the weights "
                "that explain most; keep this choice for other inputs, such as strokes "
                "on pixels that are blank in all of these.",
                NoOutputVarianceWarning,
            )


@final
class FitSums:
    r"""The sums of one fit, which a file can hold between two batches.

    With :math:`\ell_n = \sum_e \sqrt{w_{ne}} \log p(y_{ne} \mid \theta)` over the
    elements e of data point n, and labels :math:`\tilde y` drawn from the model at the
    MAP:

    ============= =====================================================================
    ``"ggn"``     :math:`\sum_n w_n J_n^\top \Lambda_n J_n`
    ``"ggn-mc"``  :math:`\sum_n \nabla_S \tilde\ell_n \nabla_S \tilde\ell_n^\top`
    ``"ef"``      :math:`\sum_n \nabla_S \ell_n \nabla_S \ell_n^\top`
    ``"hessian"`` :math:`-\nabla_S^2 \sum_{ne} w_{ne} \log p(y_{ne} \mid \theta)`
    ============= =====================================================================

    A factor in the data's plate has no outputs: all take its exact negative Hessian.

    Args:
        subnet: The chosen elements; all of them for Kronecker factors.
        budget: Bytes of Jacobian and activations that may be held at once.
        scores: Whether to sum the data's gradient as well, where the rows of the
            Gauss-Newton matrix are made anyway.
        share: Of the data whose rows are summed, about, a random choice; each then
            counts 1 / share times.

    Source: Daxberger et al. (2021), eq. 4 and section 3, arXiv 2010.14689; Martens
    (2020), sections 8, 9.2 and 11, arXiv 1412.1193, for the other kinds.
    """

    def __init__(
        self,
        at_map: ModelAtMAP,
        subnet: Subnet,
        data: Data,
        options: FitOptions,
        *,
        budget: int = DEFAULT_BUDGET,
        scores: bool = False,
        share: float = 1.0,
    ):
        loc = at_map.latents.loc
        like = loc.new_empty(0, dtype=at_least_float32(loc.dtype))
        self.total = new_sum(options.held_as, subnet.size, like)
        self._subnet, self._like, self._budget = subnet, like, budget
        self._kind, self._data = options.curvature, data
        self._tolerance = torch.finfo(loc.dtype).eps ** 0.5
        reads = self._read_prior, self._add_terms
        self._pass = DataPass(at_map, subnet, data, *reads, kind=self._kind)
        kept = scores and self._kind == "ggn" and isinstance(self.total, GGNSum)
        rank = 0 if data.ranks is None else data.ranks.rank
        self._scores = ScoreSum(subnet.size, loc.device, rank) if kept else None
        self._part = RandomPart(share)
        self._last = 0.0  # log likelihood of the batch that was added last

    def over(self, batches: Iterable[Batch]) -> SubnetCurvature:
        """The curvature, summed over all batches."""
        with self._data.together():
            self._add(batches)
        self._join()
        prior, gradient = self._pass.prior
        for site, function in self._pass.squashed.items():
            warn(
                f"The logits of site {site!r} are the output of a {function}, that is "
                "probabilities: they would be taken through it once more. Pass them as "
                f"`probs=`, or leave out the {function}.",
                SquashedLogitsWarning,
            )
        return SubnetCurvature(
            self.total.finish(self._pass.scale),
            prior,
            self._pass.summary(gradient),
            self._pass.has_outputs,
            self._pass.counts.doubts(),
            self._pass.seen,
            self._departure_by(gradient),
        )

    def _add(self, batches: Iterable[Batch]) -> None:
        """Adds all batches of this process."""
        kind, budget = self._kind, self._budget
        for call in self._pass.calls(self._noting_last(batches)):
            if kind == "hessian" and isinstance(self.total, GGNSum):
                # G = -Hessian of sum_ne w_ne log p(y_ne), which no rows give.
                likelihood = call.log_likelihood(1.0)
                subtract_hessian_(self.total.matrix(), likelihood, budget)
            elif (
                kind == "ggn"
                and isinstance(self.total, GGNSum)
                and self.total.form != "dual"
                and call.is_wide(budget)
            ):
                # G = Hessian of sum_ne w_ne KL, where roots of Lambda are too large.
                self.total.form = "primal"
                self._scores = None  # no rows are made
                subtract_hessian_(self.total.matrix(), call.divergence(), budget)
            else:
                outputs, factors = call.rows(kind)
                weights, index = call.data_weights(), self._part.drawn(outputs)
                if index is not None:
                    if not len(index):
                        continue
                    several = some_of(factors, outputs.num_data, index)
                    factors = tuple(each * self._part.share**-0.5 for each in several)
                    outputs, weights = outputs.some(index), weights[index]
                given = outputs, factors, weights, budget
                if isinstance(self.total, GGNSum):
                    self.total.add(*given, self._watch(call, factors))
                else:
                    self.total.add(*given)

    def _join(self) -> None:
        """Adds up the sums of all ranks, where there are several."""
        ranks = self._data.ranks
        if ranks is None:
            return
        self._pass.join(self._like.device)
        self.total.meet(self._pass.prior[0], self._kind)  # it saw none without a batch
        self.total.join(ranks)
        scores = self._scores
        known = all(ranks.gathered(scores is not None))
        self._scores = scores if known else None
        if self._scores is not None:
            self._scores.join(ranks)

    def _watch(self, call: SubnetCall, factors: Factors) -> Watch | None:
        """What adds the data's gradient, while it is known for all data."""
        if self._scores is None:
            return None
        few = all(factor.shape[-1] <= MAX_OUTPUTS for factor in factors)
        scores = call.scores() if few else None
        if scores is None:
            self._scores = None
            return None
        weights = tuple(call.weights(site) for site in call.sites)
        return self._scores.watching(factors, scores, weights)

    def _departure_by(
        self, gradient: Tensor
    ) -> Callable[[Callable[[Tensor], Tensor]], Departure] | None:
        if self._scores is None:
            return None
        scale = self._pass.scale
        return partial(
            self._scores.departure, prior_gradient=gradient.detach(), scale=scale
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that was added so far: tensors, and what JSON holds."""
        # Without the prior, which may be another one when the fit goes on.
        tensors, content = self._pass.state()
        content = {"form": self.total.form, "last": self._last, **content}
        return {**self.total.tensors(), **tensors}, content

    def restore(self, tensors: dict[str, Tensor], content: Mapping[str, Any]) -> None:
        """Undoes :meth:`state`; a CheckpointError if it is none of this fit."""
        form = content["form"]
        if form != self.total.form and (self.total.form, form) != ("auto", "primal"):
            raise CheckpointError(
                f"The file's form must be {self.total.form!r}, as the options ask for; "
                f"got {form!r}. Take another copy of it."
            )
        # Files of an earlier version hold the prior as well, which is read anew.
        held = {n: t for n, t in tensors.items() if not n.startswith("prior_")}
        rest = self._pass.restore(held, content)
        self._scores = None  # a file has not the gradient of what it has summed
        self.total.restore(form, rest)
        self._last = float(content["last"])

    def check_again(self, batch: Batch, *, same_prior: bool) -> None:
        """Compares the model with the file's in the last batch; reads its prior."""
        # The prior of now is taken: a fit that failed may go on under another one.
        prior, expected = self._pass.log_prior, self._last
        found = self._pass.see_again(batch)
        if self._differ(found, expected):
            raise CheckpointError(
                "The model must be as it was when the file was written: the log "
                f"likelihood of the batch that was summed last was {expected:.6g}; got "
                f"{found:.6g}. Put its parameters back to resume, or delete the file "
                "to start over."
            )
        now = self._pass.log_prior
        if same_prior and prior is not None and now is not None:
            if self._differ(now, prior):
                raise CheckpointError(
                    "The prior must be the one under which `subnet` was chosen: its "
                    f"log density at the MAP was {prior:.6g}; got {now:.6g}. Put it "
                    "back to resume, or delete the file to start over."
                )

    def _differ(self, found: float, expected: float) -> bool:
        return abs(found - expected) > self._tolerance * (1 + abs(expected))

    def _noting_last(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        for batch in batches:
            before = float(self._pass.numbers[0])
            yield batch
            self._last = float(self._pass.numbers[0]) - before

    def _read_prior(
        self, terms: Sequence[DensityTerm], leaves: Mapping[str, Tensor]
    ) -> tuple[PriorPrecision, Tensor]:
        prior = self.total.read_prior(terms, leaves, self._subnet, self._budget)
        prior = prior.to(self._like.dtype)
        self.total.meet(prior, self._kind)
        return prior, prior_gradient(terms, leaves, self._subnet)

    def _add_terms(
        self, terms: Sequence[DensityTerm], leaves: Mapping[str, Tensor]
    ) -> None:
        self._scores = None  # their gradient is not summed
        self.total.add_terms(terms, leaves, self._subnet, self._budget)


@final
@dataclass(frozen=True, eq=False)
class DiagonalCurvature:
    """Diagonals of both parts over all D elements, float64."""

    ggn: Float[Tensor, " params"]
    prior: Float[Tensor, " params"]


def subnet_curvature(
    at_map: ModelAtMAP,
    subnet: Subnet,
    data: Data,
    options: FitOptions = FitOptions(form="primal"),  # noqa: B008 - frozen
    *,
    budget: int = DEFAULT_BUDGET,
    share: float = 1.0,
) -> SubnetCurvature:
    """The curvature over a subnet, by one pass over the data; see :class:`FitSums`."""
    sums = FitSums(at_map, subnet, data, options, budget=budget, share=share)
    return sums.over(data.calls("Curvature"))


def diagonal_curvature(
    at_map: ModelAtMAP,
    data: Data,
    *,
    kind: Literal["ggn", "ef"] = "ggn",
    budget: int = DEFAULT_BUDGET,
) -> DiagonalCurvature:
    """Both diagonals over all D elements, by one pass; no matrix over D is formed."""
    everything = at_map.latents.everything
    read_prior = partial(prior_diagonal, budget=budget)
    ggn = torch.zeros(everything.size).to(everything.flat.device, torch.float64)

    def add_terms(terms: Sequence[DensityTerm], leaves: Mapping[str, Tensor]) -> None:
        ggn.add_(prior_diagonal(terms, leaves, budget))

    passed = DataPass(at_map, everything, data, read_prior, add_terms, kind=kind)
    with data.together():
        for call in passed.calls(data.calls("Variances")):
            ggn += squared_columns(*call.rows(kind), budget)
    passed.join(ggn.device)
    data.sum_(ggn)
    return DiagonalCurvature(ggn * passed.scale, passed.prior.to(torch.float64))
