"""One call of the user's model, read at the MAP: its outputs, weights and prior."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from pyro_subnet.curvature.jacobian.output_map import Factors, OutputMap
from pyro_subnet.curvature.prior import DensityTerm
from pyro_subnet.exceptions import DataError, ModelError, NonFiniteError
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.grad_mode import differentiable
from pyro_subnet.tracing.log_prior import log_prior_terms
from pyro_subnet.tracing.output_site import OutputSite
from pyro_subnet.tracing.trace import (
    Latents,
    Model,
    Node,
    is_output,
    preserved_rng,
    refuse_training_mode,
    run_model,
)

# How many data tell what the sites' graph and prior are like.
_PROBE = 2
# {output site: its parameters that the chosen elements move}
MovedParts = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class Graph:
    """One run of the model with its autograd graph; drop it to free the activations.

    Attributes:
        leaves: Unconstrained value of every latent site, a leaf that needs gradients.
        trace: The run's trace.
        activation_bytes: What the run keeps for its backward pass.
        latents: The latent sites.
    """

    leaves: Mapping[str, Tensor]
    trace: poutine.Trace
    activation_bytes: int
    latents: Latents

    @cached_property
    def prior_terms(self) -> list[DensityTerm]:
        """The log prior in unconstrained space, with its graph to the latent sites.

        One term for each latent site and each factor.
        """
        with differentiable():
            return log_prior_terms(self.trace, self.latents, self.leaves)


@dataclass(frozen=True, eq=False)
class ModelCall:
    """The model, called on some data, as a function of its latent sites.

    Build one with :meth:`read`, which runs and checks the model.

    Attributes:
        model: The user's model.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        latents: The latent sites at the MAP.
        fixed: Values of sites that would be drawn anew in every run.
        trace: Reference trace at the MAP, detached.
        sites: The output sites.
    """

    model: Model
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    latents: Latents
    fixed: Mapping[str, Tensor]
    trace: poutine.Trace
    sites: tuple[OutputSite, ...]

    @classmethod
    def read(
        cls,
        model: Model,
        latents: Latents,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> ModelCall:
        """Runs a model at the MAP and checks what it did.

        Args:
            model: The user's model.
            latents: Its latent sites at the MAP.
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.

        Returns:
            The call.

        Raises:
            ModelError: If a layer is in training mode, or the latent sites are not
                those of the guide.
            NonFiniteError: If the MAP or an output is NaN or infinite.
        """
        _check_finite_map(latents)
        values = latents.constrain(latents.values)
        with torch.no_grad(), preserved_rng(), refuse_training_mode():
            trace = run_model(model, args, kwargs, values, {})
        _check_latents(trace, latents)
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
        return cls(model, args, kwargs, latents, fixed, trace, sites)

    @property
    def num_data(self) -> int:
        """N, length of the data axis that all output sites share; 1 without one."""
        lengths = {site.leading for site in self.sites}
        return lengths.pop() if len(lengths) == 1 else 1

    @property
    def num_seen(self) -> int:
        """How many data the call shows.

        Raises:
            DataError: If the output sites differ in it, or it cannot be told.
        """
        first = next((leaf for leaf in self._flatten()[0] if _has_rows(leaf)), None)
        rows = None if first is None else first.shape[0]
        counts = {site.name: site.num_seen(rows) for site in self.sites}
        lengths = set(counts.values())
        seen = lengths.pop() if len(lengths) == 1 else None
        if seen is None:
            raise DataError(
                f"`num_data` needs observed sites of one length; got {counts} (None: "
                "no plate stands out as the one over the data). Leave it out and pass "
                "all data."
            )
        return seen

    def run(
        self,
        unconstrained: Mapping[str, Tensor],
        rows: tuple[Tensor, ...] | None = None,
    ) -> poutine.Trace:
        """Runs the model at given latent values, hidden from everything around.

        Args:
            unconstrained: Unconstrained value of every latent site.
            rows: Replacements for the tensors that :meth:`data_rows` lists.

        Returns:
            The trace.
        """
        args, kwargs, fixed = self.args, self.kwargs, self.fixed
        if rows is not None:
            args, kwargs, fixed = self._with_rows(rows)
        values = self.latents.constrain(unconstrained)
        return run_model(self.model, args, kwargs, values, fixed)

    def output_map(
        self, subnet: Subnet, moved: MovedParts, activation_bytes: int
    ) -> OutputMap:
        """The outputs that a subnet moves, as a function of its elements.

        Args:
            subnet: The chosen elements.
            moved: What :meth:`moved_parts` says of them.
            activation_bytes: What a run keeps for its backward pass.

        Returns:
            The map; sites and parameters that no chosen site moves are left out.
        """
        sites = [site for site in self.sites if moved[site.name]]
        base = self.latents.values
        chosen = subnet.indices

        def of_sites(
            values: Mapping[str, Tensor], rows: tuple[Tensor, ...] | None
        ) -> tuple[Tensor, ...]:
            return read(self.run({**base, **values}, rows))

        def read(trace: poutine.Trace) -> tuple[Tensor, ...]:
            found = [
                site.outputs(trace.nodes[site.name], moved[site.name]) for site in sites
            ]
            return tuple(value.reshape(-1, value.shape[-1]) for value in found)

        return OutputMap(
            base={site: base[site] for site in chosen},
            chosen=chosen,
            of_sites=of_sites,
            reference=read(self.trace),
            rows=self.data_rows(),
            num_data=self.num_data,
            activation_bytes=activation_bytes,
        )

    def factors(self, moved: MovedParts, without_plates: bool) -> Factors:
        r"""Roots of the weighted output Hessians, :math:`\sqrt{w} R`, of each site.

        Args:
            moved: Which outputs: what :meth:`moved_parts` says of a subnet.
            without_plates: Leaves out the N/B of subsampling plates.

        Returns:
            One (M, r, c) tensor for every site that is moved.
        """
        return tuple(
            site.weighted_root(moved[site.name], without_plates)
            for site in self.sites
            if moved[site.name]
        )

    def graph(self, *, with_prior: bool = True) -> Graph:
        """Runs the model with a graph from latent leaves to everything.

        On a few of the data if they tell the same: outputs that do not depend on other
        data, and the same prior.

        Args:
            with_prior: Whether its prior will be read, and so must be that of all data.

        Returns:
            The run.

        Raises:
            ModelError: If the outputs differ from those of the reference run.
        """
        if self.num_data > _PROBE and self.data_rows():
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
        for site in self.sites:
            site.check_repeats(graph.trace.nodes[site.name])
        return graph

    def _graph(self, rows: tuple[Tensor, ...] | None) -> Graph:
        saved: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            # By its own size: some data are a view of all.
            storage = tensor.untyped_storage().data_ptr()
            saved[storage] = max(saved.get(storage, 0), tensor.nbytes)
            return tensor

        with (
            differentiable(),
            preserved_rng(),
            torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
        ):
            leaves = {
                site: value.detach().clone().requires_grad_()
                for site, value in self.latents.values.items()
            }
            weights = {leaf.untyped_storage().data_ptr() for leaf in leaves.values()}
            # Other random numbers than the reference run's, to show a random model.
            torch.rand((), device=self.latents.loc.device)
            trace = self.run(leaves, rows)
        activations = sum(size for at, size in saved.items() if at not in weights)
        return Graph(leaves, trace, activations, self.latents)

    def _tells_all(self, graph: Graph, with_prior: bool) -> bool:
        """Whether a run on the first data has the reference's outputs and prior."""
        if set(graph.trace.nodes) != set(self.trace.nodes):
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
            base = self.latents.values
            ours = [
                term.log_density
                for term in log_prior_terms(self.trace, self.latents, base)
            ]
            theirs = [term.log_density for term in graph.prior_terms]
            return all(
                torch.allclose(a, b.to(a)) for a, b in zip(ours, theirs, strict=True)
            )

    def moved_parts(self, graph: Graph, subnet: Subnet) -> MovedParts:
        """Parameters of each output site that the subnet's sites move.

        Args:
            graph: A run of this call.
            subnet: The chosen elements.

        Returns:
            ``{site: names of parts}``; () for a site that none moves.
        """
        leaves = [graph.leaves[site] for site in subnet.indices]
        nodes = graph.trace.nodes
        with differentiable():
            return {
                site.name: site.moved_parts(nodes[site.name], leaves)
                for site in self.sites
            }

    def data_rows(self) -> tuple[Tensor, ...]:
        """Tensors of the call whose first axis is as long as the data."""
        leaves, _ = self._flatten()
        return tuple(leaf for leaf in leaves if self._is_row(leaf))

    def _is_row(self, leaf: Any) -> bool:
        return self.num_data > 1 and _has_rows(leaf) and leaf.shape[0] == self.num_data

    def _flatten(self) -> tuple[list[Any], TreeSpec]:
        return tree_flatten((self.args, dict(self.kwargs), dict(self.fixed)))

    def _with_rows(
        self, rows: tuple[Tensor, ...]
    ) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Tensor]]:
        leaves, spec = self._flatten()
        left = iter(rows)
        swapped = [next(left) if self._is_row(leaf) else leaf for leaf in leaves]
        return tree_unflatten(swapped, spec)


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


def _check_finite_map(latents: Latents) -> None:
    for site, value in latents.values.items():
        bad = int((~value.isfinite()).sum())
        if bad:
            raise NonFiniteError(
                f"The MAP must be finite; got {bad} non-finite of {value.numel()} "
                f"values at site {site!r}. Train again with a smaller learning rate, "
                "or start from other values with `init_loc_fn`."
            )


def _check_latents(trace: poutine.Trace, latents: Latents) -> None:
    for name in latents.layout.names:
        node = trace.nodes.get(name)
        if node is None:
            raise ModelError(
                f"The model must have the guide's latent sites in every call; got a "
                f"call without site {name!r}. Make its sites independent of the data."
            )
        if node["is_observed"]:
            raise ModelError(
                f"A latent site of the guide must not be observed; got data for site "
                f"{name!r}. The guide was first called without them, so it took the "
                "site for a latent one: make a new guide and call it with the data."
            )
