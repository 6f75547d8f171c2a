"""One pass over the data, whatever is summed in it.

Every call is run at the MAP and counted, its prior is compared with that of the first
call, and its log likelihood is added up. What a fit, a selector or a diagnostic makes
of the calls is left to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar, final

import torch
from torch import Tensor

from pyro_subnet.curvature.density_term import DensityTerm
from pyro_subnet.exceptions import CheckpointError, DataError, ModelError
from pyro_subnet.fit.counts import DataCounts
from pyro_subnet.laplace.summary import FitSummary
from pyro_subnet.options import Curvature
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.ranks import first_with
from pyro_subnet.tensors.stored import check_stored
from pyro_subnet.tracing.call import Graph, ModelCall
from pyro_subnet.tracing.data import Batch, Data
from pyro_subnet.tracing.data_values import check_data
from pyro_subnet.tracing.forgotten_data import check_forgotten
from pyro_subnet.tracing.loader import (
    Marks,
    Part,
    check_apart,
    check_seen_once,
    marks,
)
from pyro_subnet.tracing.output_site import OutputSite
from pyro_subnet.tracing.squashed_logits import squashed_logits
from pyro_subnet.tracing.subnet_call import SubnetCall
from pyro_subnet.tracing.trace import ModelAtMAP

Prior = TypeVar("Prior")
# From the log prior, term by term, and the latent leaves of its graph.
ReadPrior = Callable[[Sequence[DensityTerm], Mapping[str, Tensor]], Prior]

# From the log densities of the data's factors in one call, and the leaves.
AddTerms = Callable[[Sequence[DensityTerm], Mapping[str, Tensor]], None]

# What a pass has counted besides its numbers.
_COUNTED = ("seen", "log_prior", "has_outputs", "scales_noise")


@final
class DataPass(Generic[Prior]):
    """One pass over the data, over a subnet.

    Args:
        read_prior: What is kept of the log prior; called once, with its graph.
        add_terms: Takes the factors that are data, in each call that has any.
        kind: The curvature that is summed; all but the GGN's take a density alone.

    Attributes:
        seen: Number of data points that were passed; None where plates do not tell.
        log_prior: The log prior of one call; all have the same.
        has_outputs: Whether the model has any observed site, or factor of the data.
        numbers: Sums of :class:`FitSummary` so far: log likelihood, noise weight and
            noise energy, shape (3,), float64.
        scales_noise: As in :class:`FitSummary`.
        counts: What plates and scales say of the data.
        squashed: Sites whose logits are probabilities, by what made them so.
    """

    def __init__(
        self,
        at_map: ModelAtMAP,
        subnet: Subnet,
        data: Data,
        read_prior: ReadPrior[Prior],
        add_terms: AddTerms,
        *,
        kind: Curvature = "ggn",
    ):
        self.seen: int | None = 0
        self.log_prior: float | None = None
        self.has_outputs = False
        self.numbers = torch.zeros(3, dtype=torch.float64)
        self.scales_noise = True
        self.counts = DataCounts(data)
        self.squashed = dict[str, str]()
        self._at_map, self._subnet, self._data = at_map, subnet, data
        self._read_prior, self._add_terms, self._kind = read_prior, add_terms, kind
        self._prior: Prior | None = None
        self._first: Marks | None = None  # of the first batch, where there are ranks

    def calls(self, batches: Iterable[Batch]) -> Iterator[SubnetCall]:
        """Passes over the data; yields the calls whose outputs the subnet moves."""
        for args, kwargs in batches:
            call = ModelCall.read(self._at_map, args, kwargs)
            if self._first is None and self._data.ranks is not None:
                self._first = marks(call.args, call.kwargs)
            if self._kind == "ggn":
                for site in call.sites:
                    site.require_outputs()
            graph = call.graph()
            check_forgotten(call, graph)
            self.squashed |= squashed_logits(call.sites, graph.trace.nodes)
            self._meet(call, graph)
            self._add_factors(graph)
            subnet_call = self._over_subnet(call, graph)
            del graph  # frees the activations before the Jacobian needs the room
            self._add_densities(subnet_call)
            if subnet_call.is_moved:
                yield subnet_call

    @property
    def prior(self) -> Prior:
        """What was kept of the log prior; an error if there was no batch."""
        if self._prior is None:
            raise DataError(
                "`batches` must hold at least one batch; got none. Check the loader."
            )
        return self._prior

    def join(self, device: torch.device) -> None:
        """Counts what all ranks have passed over, where there are several.

        Args:
            device: Where what was kept of the log prior is to lie.

        Raises:
            DataError: If their data are not all data, each once.
            ModelError: If their log priors differ.
        """
        ranks = self._data.ranks
        if ranks is None:
            return
        own = {name: getattr(self, name) for name in (*_COUNTED, "numbers", "squashed")}
        own |= {"counts": self.counts.state(), "part": Part.of(self._data.batches)}
        found = ranks.gathered({**own, "first": self._first})
        check_apart([each["first"] for each in found])
        source = first_with([each["log_prior"] for each in found])
        self.counts.join([each["counts"] for each in found])
        seen = [each["seen"] for each in found]
        check_seen_once([each["part"] for each in found], seen, self._data.num_data)
        self.seen = None if None in seen else sum(seen)
        self.numbers = torch.stack([each["numbers"] for each in found]).sum(0)
        self.has_outputs = any(each["has_outputs"] for each in found)
        self.scales_noise = all(each["scales_noise"] for each in found)
        for each in found:
            self.squashed |= each["squashed"]
            if each["log_prior"] is not None:
                self._check_prior(each["log_prior"], found[source]["log_prior"])
        self.log_prior = found[source]["log_prior"]
        self._prior = ranks.shared(self._prior, source, device)

    @property
    def scale(self) -> float:
        """What a sum over the data that were seen is multiplied by, for all data."""
        if self._data.num_data is None or self.seen is None:
            return 1.0
        return self._data.num_data / self.seen

    def summary(self, prior_gradient: Tensor) -> FitSummary:
        """The log joint density of all data, with the log prior's gradient, (S,)."""
        likelihood, weight, energy = (self.scale * self.numbers).tolist()
        gradient = prior_gradient.detach().to(torch.float64)
        scales = self.scales_noise and weight > 0
        log_prior = self.log_prior or 0.0
        return FitSummary(likelihood, log_prior, gradient, weight, energy, scales)

    def see_again(self, batch: Batch) -> float:
        """Reads the prior anew in a batch that was added; its log likelihood."""
        call = ModelCall.read(self._at_map, *batch)
        graph = call.graph()
        self.log_prior = None
        self._meet_prior(graph)
        weigh = self._over_subnet(call, graph).weights
        of_sites = sum(_log_likelihood(site, weigh(site)) for site in call.sites)
        return float(of_sites) + _total(self._data_terms(graph))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that was counted but the prior: tensors, and what JSON holds."""
        content = {name: getattr(self, name) for name in _COUNTED}
        return {"summary": self.numbers}, content

    def restore(
        self, tensors: Mapping[str, Tensor], content: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Undoes :meth:`state`, the prior still to be read; what is left of tensors."""
        own = {name: t for name, t in tensors.items() if name == "summary"}
        types = {"summary": self.numbers.dtype}
        check_stored(own, {"summary": ("n",)}, types, {"n": len(self.numbers)})
        self.numbers = own["summary"]
        self.counts.resume()
        for name in _COUNTED:
            setattr(self, name, content[name])
        # A file of an earlier version counts none where nothing depends on it.
        self.seen = self.seen or None
        if self.seen is None and self._data.num_data is not None:
            raise CheckpointError(
                "The file of a fit with `num_data` must count the data that it has "
                "seen; got none. Take another copy of it, or delete it to start over."
            )
        if self.log_prior is not None:
            self.log_prior = float(self.log_prior)
        return {name: t for name, t in tensors.items() if name not in own}

    def _over_subnet(self, call: ModelCall, graph: Graph) -> SubnetCall:
        whole = self._data.whole
        return SubnetCall.of(call, self._subnet, graph, without_plates=not whole)

    def _meet(self, call: ModelCall, graph: Graph) -> None:
        """Counts a call, and compares its prior with that of the others."""
        self._meet_prior(graph)
        self.has_outputs |= bool(call.sites or call.factors)
        for site in call.sites:
            if not site.node["is_observed"]:
                raise ModelError(
                    "Every sample site must be latent in the guide or observed; got "
                    f"site {site.name!r} without data. Pass its data to the Laplace "
                    "approximation."
                )
            check_data(site)
            # As where `poutine.reparam` moves a site that has data.
            if graph.trace.nodes[site.name]["value"].requires_grad:
                raise ModelError(
                    "Data must not depend on latent sites; got an observed site "
                    f"{site.name!r} whose value does. Reparametrize latent sites alone."
                )
        self.counts.add(call)
        num_data = self._data.num_data
        self._count(call)
        if num_data is not None and self.seen is not None:
            if self.seen > num_data:
                raise DataError(
                    "`num_data` must be at least the number of data in the batches; "
                    f"got {num_data}, and {self.seen} data so far. Pass the number of "
                    "all data, or leave it out if the batches hold all of them."
                )

    def _count(self, call: ModelCall) -> None:
        """Counts the data that a call shows; an error where that must be known."""
        try:
            shown = call.num_seen
        except DataError:
            if self._data.num_data is not None:
                raise
            self.seen = None
        else:
            self.seen = None if self.seen is None else self.seen + shown

    def _meet_prior(self, graph: Graph) -> None:
        terms = graph.prior_terms
        value = _total(terms)
        if self.log_prior is None:
            self.log_prior = value
        self._check_prior(value, self.log_prior)
        if self._prior is None:
            self._prior = self._read_prior(terms, graph.leaves)

    def _check_prior(self, value: float, first: float) -> None:
        """Refuses another log prior than that of the first call."""
        tolerance = torch.finfo(self._at_map.latents.loc.dtype).eps ** 0.5
        if abs(value - first) > tolerance * (1 + abs(value)):
            raise ModelError(
                "The log prior at the MAP must be the same for every batch; got "
                f"{first:.6g} and {value:.6g}. A prior or `pyro.factor` that "
                "depends on the data needs `laplace_approximation` on all of them; a "
                "factor that each observation has for itself belongs in the data's "
                "plate."
            )

    def _data_terms(self, graph: Graph) -> list[DensityTerm]:
        return graph.data_terms(without_plates=not self._data.whole)

    def _add_factors(self, graph: Graph) -> None:
        """Adds the factors that are data, while the graph is there."""
        terms = self._data_terms(graph)
        if terms:
            self.numbers[0] += _total(terms)
            self.scales_noise = False
            self._add_terms(terms, graph.leaves)

    def _add_densities(self, subnet_call: SubnetCall) -> None:
        for site in subnet_call.call.sites:
            weight = subnet_call.weights(site)
            self.numbers[0] += _log_likelihood(site, weight)
            # Normal sites of fixed scale: W = sum w, E = sum w (y - mu)^2 / sigma^2
            is_normal = site.family.distribution is torch.distributions.Normal
            if is_normal and set(subnet_call.moved[site.name]) <= {"loc"}:
                self.numbers[1] += weight.sum().cpu()
                self.numbers[2] += _noise_energy(site, weight)
            else:
                self.scales_noise = False


def _total(terms: Sequence[DensityTerm]) -> float:
    return float(sum(term.value for term in terms))


def _log_likelihood(site: OutputSite, weight: Tensor) -> Tensor:
    density = site.log_density.reshape(-1).to(torch.float64)
    return (density * weight).where(weight != 0, 0.0).sum().cpu()


@torch.no_grad()
def _noise_energy(site: OutputSite, weight: Tensor) -> Tensor:
    base: Any = site.distribution.base
    squared = ((site.value - base.loc) / base.scale).to(torch.float64).square()
    return (squared.reshape(-1) * weight).where(weight != 0, 0.0).sum().cpu()
