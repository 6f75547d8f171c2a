"""One call of the user's model at the MAP: its outputs, weights and prior."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, final

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from pyro_subnet.curvature.density_term import DensityTerm
from pyro_subnet.curvature.jacobian.output_map import OutputMap
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.kept_bytes import counting_kept_bytes
from pyro_subnet.tensors.modes import differentiable
from pyro_subnet.tracing.arguments import run_on
from pyro_subnet.tracing.checked_map import check_finite_map, check_latents
from pyro_subnet.tracing.data_factors import data_factors, data_terms, factor_density
from pyro_subnet.tracing.log_prior import latent_parents, log_prior_terms
from pyro_subnet.tracing.output_site import OutputSite, data_sites, stand_alike
from pyro_subnet.tracing.plates import num_seen, num_shown
from pyro_subnet.tracing.repeats import check_same, hidden_latents
from pyro_subnet.tracing.trace import (
    Latents,
    Model,
    ModelAtMAP,
    Node,
    is_output,
    other_random_numbers,
    preserved_rng,
    refuse_training_mode,
    run_model,
)

# Data points of a run whose graph shows what a site moves, at less cost than all data.
_PROBE = 2
# Runs of a model that draws random numbers, which must agree with the first.
_MORE_RUNS = 16
# {output site: its parameters that the chosen elements move}
MovedParts = Mapping[str, tuple[str, ...]]


@final
@dataclass(frozen=True, eq=False)
class Graph:
    """One run of the model with its autograd graph; drop it to free the activations.

    Attributes:
        leaves: Unconstrained value of every latent site, a leaf that needs gradients.
        activation_bytes: What a run on all data keeps for its backward pass.
        has_drawn: Whether the run drew random numbers.
        whole: Whether the run was on all data of the call.
        factors: Names of the factors that are data.
    """

    leaves: Mapping[str, Tensor]
    trace: poutine.Trace
    activation_bytes: int
    latents: Latents
    has_drawn: bool
    whole: bool
    factors: tuple[str, ...]

    @cached_property
    def prior_terms(self) -> list[DensityTerm]:
        """Unconstrained log prior: one term for each latent site and its factors."""
        with differentiable():
            return log_prior_terms(self.trace, self.latents, self.leaves, self.factors)

    def data_terms(self, *, without_plates: bool) -> list[DensityTerm]:
        """Weighted log density of the factors that are data, of a run that is whole."""
        with differentiable():
            return data_terms(self.trace, self.factors, without_plates=without_plates)


@final
@dataclass(frozen=True, eq=False)
class ModelCall:
    """The model, called on some data, as a function of its latent sites.

    Attributes:
        fixed: Values of the sites that would be drawn anew in every run.
        trace: Reference trace at the MAP, without gradients.
        sites: The output sites, in trace order; without hyperparameters that are held.
    """

    at_map: ModelAtMAP
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    fixed: Mapping[str, Tensor]
    trace: poutine.Trace
    sites: tuple[OutputSite, ...]

    @classmethod
    def read(
        cls, at_map: ModelAtMAP, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> ModelCall:
        """The call, after a run at the MAP that checks sites, modes and finiteness."""
        latents = at_map.latents
        check_finite_map(latents)
        values = latents.constrain(latents.values)
        run = partial(_run_at, at_map.program, values)
        with torch.no_grad(), preserved_rng(), refuse_training_mode():
            found = run_on(run, at_map.model, args, kwargs, latents.loc)
        trace, (args, kwargs) = found
        check_latents(trace, latents)
        fixed = {
            name: node["value"]
            for name, node in trace.nodes.items()
            if _is_drawn(name, node, latents)
        }
        sites = tuple(
            OutputSite.read(name, node)
            for name, node in trace.nodes.items()
            if is_output(name, node, latents)
        )
        call = cls(at_map, args, kwargs, fixed, trace, sites)
        return call if stand_alike(sites) else call._of_data()

    def _of_data(self) -> ModelCall:
        """The call without hyperparameters that are held at a value."""
        # Hyperparameters of data are drawn before them: the last site is data.
        graph = replace(self, sites=self.sites[-1:]).graph(with_prior=False)
        leaves = list(graph.leaves.values())
        with differentiable():
            return replace(
                self, sites=data_sites(self.sites, graph.trace.nodes, leaves)
            )

    @property
    def latents(self) -> Latents:
        """The latent sites at the MAP."""
        return self.at_map.latents

    @cached_property
    def factors(self) -> Mapping[str, Node]:
        """Factors that are data, by name: terms of the log likelihood."""
        outputs = [site.name for site in self.sites]
        return data_factors(self.trace.nodes, outputs, self.latents)

    @property
    def num_data(self) -> int:
        """N, length of the data axis that all output sites share; 1 without one."""
        lengths = {site.leading for site in self.sites}
        return lengths.pop() if len(lengths) == 1 else 1

    @property
    def num_rows(self) -> int | None:
        """Rows of the first tensor, if any: they tell the data's plate from others."""
        first = next((leaf for leaf in self._flat[0] if _has_rows(leaf)), None)
        return None if first is None else int(first.shape[0])

    @property
    def num_seen(self) -> int:
        """Number of data points shown; an error where the sites leave it open."""
        rows = self.num_rows
        shown = self.shown(rows)
        names = [site.name for site in self.sites] or list(self.factors)
        nodes = [self.trace.nodes[name] for name in names]
        return num_seen({name: shown[name] for name in names}, nodes, rows)

    def shown(self, rows: int | None) -> dict[str, int | None]:
        """Data points that each site and factor shows; None if plates do not tell."""
        of_sites = {site.name: site.num_seen(rows) for site in self.sites}
        return of_sites | {n: num_shown(v, rows) for n, v in self.factors.items()}

    def own_subsample(self) -> str | None:
        """A plate whose subsample, drawn anew in every call, decides what is seen."""
        nodes = self.trace.nodes
        drawn = {n: v for n, v in self.fixed.items() if site_is_subsample(nodes[n])}
        for name, index in drawn.items():
            # Where the model ignores the index, its arguments are the subsample.
            fixed = {**self.fixed, name: (index + 1) % nodes[name]["fn"].size}
            values = self.latents.constrain(self.latents.values)
            with torch.no_grad():
                other = run_model(
                    self.at_map.program, self.args, self.kwargs, values, fixed
                )
            for site in self.sites:
                node, again = site.node, other.nodes[site.name]
                same = torch.equal(site.outputs(node), site.outputs(again))
                if not same or not torch.equal(node["value"], again["value"]):
                    return name
            for factor, node in self.factors.items():
                again = factor_density(other.nodes[factor])
                if not torch.equal(factor_density(node), again):
                    return name
        return None

    def run(
        self,
        unconstrained: Mapping[str, Tensor],
        rows: tuple[Tensor, ...] | None = None,
    ) -> poutine.Trace:
        """Trace at unconstrained values; ``rows`` stand in for :meth:`data_rows`."""
        args, kwargs, fixed = self.args, self.kwargs, self.fixed
        if rows is not None:
            args, kwargs, fixed = self._with_rows(rows)
        values = self.latents.constrain(unconstrained)
        return run_model(self.at_map.program, args, kwargs, values, fixed)

    def map_of(
        self,
        read: Callable[[poutine.Trace], tuple[Tensor, ...]],
        chosen: Mapping[str, Tensor],
        activation_bytes: int,
    ) -> OutputMap:
        """The map from the chosen flat positions of each site to what a run gives."""
        base = self.latents.values
        return OutputMap(
            base={site: base[site] for site in chosen},
            chosen=chosen,
            of_sites=partial(self._read_at, read, base),
            reference=_matrices(read(self.trace)),
            rows=self.data_rows(),
            num_data=self.num_data,
            activation_bytes=activation_bytes,
        )

    def _read_at(
        self,
        read: Callable[[poutine.Trace], tuple[Tensor, ...]],
        base: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        rows: tuple[Tensor, ...] | None,
    ) -> tuple[Tensor, ...]:
        """What :meth:`map_of` reads of a run at the values of some sites."""
        return _matrices(read(self.run({**base, **values}, rows)))

    def graph(self, *, with_prior: bool = True) -> Graph:
        """A run with its graph to the latent leaves, on few data if they suffice."""
        # The graph of a few data points serves if no output depends on other data
        # points and, where the prior will be read, if the prior is that of all data.
        # With it the factors of the data are read, which take all of them.
        needs_all = with_prior and bool(self.factors)
        if not needs_all and self.num_data > _PROBE and self.data_rows():
            rows = tuple(row[:_PROBE] for row in self.data_rows())
            try:
                graph = self._graph(rows)
                scaled = graph.activation_bytes * self.num_data // _PROBE
                graph = replace(graph, activation_bytes=scaled)
                tells_all = self._tells_all(graph, with_prior)
            # On fewer data the user's code may fail in ways of its own: a fixed plate
            # size, a view.
            except Exception:
                tells_all = False
            if tells_all:
                return graph
        graph = self._graph(None)
        self._check_repeats(graph, with_prior)
        return graph

    def _check_repeats(self, graph: Graph, with_prior: bool) -> None:
        """Refuses a random model, which has no Jacobian: all runs must agree."""
        prior = self.latents if with_prior else None
        hidden = partial(hidden_latents, self.at_map, self.args, self.kwargs)
        with torch.no_grad():
            check_same(self.sites, self.trace, graph.trace, prior, hidden)
            # A draw of few values, such as a switch, may be the same in two runs.
            for turn in range(1, _MORE_RUNS) if graph.has_drawn else ():
                with other_random_numbers(turn):
                    trace = self.run(self.latents.values)
                check_same(self.sites, self.trace, trace, prior, hidden)

    def _graph(self, rows: tuple[Tensor, ...] | None) -> Graph:
        # Others than the reference run's, to show a random model.
        with differentiable(), other_random_numbers(0) as has_drawn:
            leaves = self._leaves()
            weights = list(leaves.values())
            trace, nbytes = counting_kept_bytes(lambda: self.run(leaves, rows), weights)
            drawn = has_drawn()
        factors = tuple(self.factors)
        return Graph(leaves, trace, nbytes, self.latents, drawn, rows is None, factors)

    def _tells_all(self, graph: Graph, with_prior: bool) -> bool:
        """Whether a run on the first data has the reference's outputs and prior."""
        if graph.has_drawn or set(graph.trace.nodes) != set(self.trace.nodes):
            return False
        with torch.no_grad():
            for site in self.sites:
                whole = site.outputs(site.node)
                few = site.outputs(graph.trace.nodes[site.name])
                if few.shape[1:] != whole.shape[1:] or len(few) != _PROBE:
                    return False
                tolerance = torch.finfo(few.dtype).eps ** 0.5
                if not torch.allclose(few, whole[:_PROBE], tolerance, tolerance):
                    return False
            if not with_prior:
                return True
            values = self.latents.values
            ours = log_prior_terms(self.trace, self.latents, values, self.factors)
            return all(
                a.has_numbers_of(b)
                or torch.allclose(a.log_density, b.log_density.to(a.log_density))
                for a, b in zip(ours, graph.prior_terms, strict=True)
            )

    def latent_parents(self) -> dict[str, frozenset[str]]:
        """``{site: latent sites that its prior depends on}``, where there are any."""
        graph = self.graph()
        return latent_parents(graph.prior_terms, graph.leaves)

    def moved_parts(self, graph: Graph, subnet: Subnet) -> MovedParts:
        """Parameters of each output site that the subnet's sites move; () for none."""
        nodes = graph.trace.nodes
        with differentiable():
            leaves = [graph.leaves[site] for site in subnet.indices]
            moved = {
                site.name: site.moved_parts(nodes[site.name], leaves)
                for site in self.sites
            }
            if graph.whole or not any(
                site.varies(moved[site.name]) for site in self.sites
            ):
                return moved
            # Later data may move what the first do not: experts that data are sent to,
            # a part of the data that has a head of its own.
            leaves, nodes = self._structure(subnet)
            return {
                site.name: site.reached_parts(nodes[site.name], leaves)
                for site in self.sites
            }

    def _structure(self, subnet: Subnet) -> tuple[list[Tensor], Mapping[str, Node]]:
        """Leaves of a subnet's sites; a run on all data, whose graph keeps nothing."""
        leaves: Mapping[str, Tensor] = self._leaves()
        try:
            with (
                differentiable(),
                preserved_rng(),
                torch.autograd.graph.saved_tensors_hooks(_dropped, _dropped),
            ):
                nodes = self.run(leaves).nodes
        except Exception:  # as of a model that differentiates by itself
            graph = self._graph(None)
            leaves, nodes = graph.leaves, graph.trace.nodes
        return [leaves[site] for site in subnet.indices], nodes

    def _leaves(self) -> dict[str, Tensor]:
        """The MAP of every latent site, as leaves that need gradients."""
        return {
            site: value.detach().requires_grad_()
            for site, value in self.latents.values.items()
        }

    def data_rows(self) -> tuple[Tensor, ...]:
        """The tensors of the call whose first axis is as long as the data."""
        return tuple(leaf for leaf in self._flat[0] if self._is_row(leaf))

    def _is_row(self, leaf: Any) -> bool:
        # One that is sparse, as a graph's adjacency, has no views of a part.
        whole = not _has_rows(leaf) or leaf.layout != torch.strided
        return self.num_data > 1 and not whole and leaf.shape[0] == self.num_data

    @cached_property
    def _flat(self) -> tuple[list[Any], TreeSpec]:
        return tree_flatten((self.args, dict(self.kwargs), dict(self.fixed)))

    def _with_rows(
        self, rows: tuple[Tensor, ...]
    ) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Tensor]]:
        leaves, spec = self._flat
        left = iter(rows)
        swapped = [next(left) if self._is_row(leaf) else leaf for leaf in leaves]
        return tree_unflatten(swapped, spec)


def _dropped(saved: Any) -> Any:
    """Nothing, in place of what a graph would keep for its backward pass."""


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0


def _is_drawn(name: str, node: Node, latents: Latents) -> bool:
    """Whether a run draws this site anew: random subsamples, outputs without data."""
    if node["type"] != "sample":
        return False
    if site_is_subsample(node):
        fn = node["fn"]
        return fn.subsample_size is not None and fn.subsample_size < fn.size
    return is_output(name, node, latents) and not node["is_observed"]


def _run_at(
    model: Model, values: Mapping[str, Tensor], /, *args: Any, **kwargs: Any
) -> poutine.Trace:
    return run_model(model, args, kwargs, values, {})


def _matrices(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One matrix a tensor: its first axis, which goes with the data, by the rest."""
    return tuple(
        value.flatten(1) if value.ndim > 1 else value.reshape(-1, 1)
        for value in tensors
    )
