"""Factors in the plates of the data: terms of the log likelihood, not of the prior."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_subnet.curvature.density_term import DensityTerm
from pyro_subnet.tracing.plates import plate_scale
from pyro_subnet.tracing.trace import Latents, Node, is_factor


def data_factors(
    nodes: Mapping[str, Node], outputs: Collection[str], latents: Latents
) -> dict[str, Node]:
    """Nodes of the factors that are data, by name.

    A factor is data in a plate that holds an output site and no latent one; without any
    output site, in any plate that holds no latent one.

    Args:
        nodes: Those of a run.
        outputs: Names of the output sites.
        latents: The latent sites.

    Returns:
        ``{name: node}``, in trace order.
    """
    factors = {name: node for name, node in nodes.items() if is_factor(node)}
    if not factors:
        return {}
    of_data = _plates(nodes[name] for name in outputs or factors)
    of_data -= _plates(nodes[name] for name in latents.layout.names)
    return {name: node for name, node in factors.items() if _plates([node]) & of_data}


def data_terms(
    trace: poutine.Trace, names: Iterable[str], *, without_plates: bool
) -> list[DensityTerm]:
    """One term for each of these factors, weighted as observed sites are."""
    terms = []
    for name in names:
        node = trace.nodes[name]
        scale = node["scale"] / plate_scale(node) if without_plates else node["scale"]
        total = scale_and_mask(factor_density(node), scale, node["mask"]).sum()
        terms.append(DensityTerm.of_factor(total, name))
    return terms


def factor_density(node: Node) -> Tensor:
    """Unweighted log density of a factor, in the shape of its plates."""
    density: Tensor = node["fn"].log_prob(node["value"])
    return density


def _plates(nodes: Iterable[Node]) -> set[str]:
    return {frame.name for node in nodes for frame in node["cond_indep_stack"]}
