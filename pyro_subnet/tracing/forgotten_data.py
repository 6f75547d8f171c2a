"""Latent sites that are data which nobody gave."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_subnet.exceptions import ModelError
from pyro_subnet.tensors.modes import differentiable
from pyro_subnet.tracing.arguments import arguments_without_value
from pyro_subnet.tracing.call import Graph, ModelCall
from pyro_subnet.tracing.trace import Node


def check_forgotten(call: ModelCall, graph: Graph) -> None:
    """Refuses a latent site that is an observation without its data.

    Where ``y=None``, Pyro takes an observed site for a latent one, and the fit would
    take it for a weight. Such a site stands where the data do, depends on other latent
    sites, and nothing depends on it: a local latent site has data that depend on it.

    Raises:
        ModelError: If there is one.
    """
    plates = set[str]().union(*(_plates(site.node) for site in call.sites))
    leaves = tree_leaves((call.args, dict(call.kwargs)))
    rows = {leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim}
    empty = [] if call.sites else _empty_arguments(call)
    for name in call.latents.layout.names:
        stands = _stands_with_data(call.trace.nodes[name], plates, rows)
        if (stands or empty) and _is_leaf(call, graph, name):
            raise ModelError(_message(name, _empty_arguments(call)))


def _stands_with_data(node: Node, plates: set[str], rows: set[int]) -> bool:
    """Whether a latent site is in an observed one's plate, or has a row for each."""
    value = node["value"]
    return bool(plates & _plates(node)) or (value.ndim > 0 and value.shape[0] in rows)


def _plates(node: Node) -> set[str]:
    return {frame.name for frame in node["cond_indep_stack"]}


def _is_leaf(call: ModelCall, graph: Graph, name: str) -> bool:
    """Whether a site depends on other latent sites, and nothing on it."""
    leaf, nodes = graph.leaves[name], graph.trace.nodes
    others = {site: u for site, u in graph.leaves.items() if site != name}
    with differentiable():
        for term in graph.prior_terms + graph.data_terms(without_plates=False):
            if term.normal is not None:  # of its own site alone
                if term.site == name:
                    return False
            elif term.site == name:
                if not _reaches(term.log_density, others):
                    return False
            elif _reaches(term.log_density, {name: leaf}):
                return False
        return not any(
            site.moved_parts(nodes[site.name], [leaf]) for site in call.sites
        )


def _reaches(density: Tensor, leaves: Mapping[str, Tensor]) -> bool:
    if not density.requires_grad or not leaves:
        return False
    found = torch.autograd.grad(
        density, list(leaves.values()), retain_graph=True, allow_unused=True
    )
    return any(gradient is not None for gradient in found)


def _empty_arguments(call: ModelCall) -> list[str]:
    return arguments_without_value(call.at_map.model, call.args, call.kwargs)


def _message(name: str, empty: list[str]) -> str:
    way = f"Pass the data of site {name!r}"
    if empty:
        way += f" (no value came for {', '.join(f'`{one}`' for one in empty)})"
    if name.endswith("_unobserved"):
        way = "`obs_mask=` makes missing data latent: leave them out by `poutine.mask`"
    return (
        "Every site of the data must be observed in a fit; got no data for site "
        f"{name!r}, which depends on the weights and on which nothing depends: it "
        f"would count as a weight. {way}. A guide that was set up without them is to "
        "be made anew."
    )
