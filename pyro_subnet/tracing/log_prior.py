"""The log prior of a traced model, term by term, in unconstrained space."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import ComposeTransform, Normal, Transform
from torch.distributions.transforms import IndependentTransform

from pyro_subnet.curvature.density_term import DensityTerm, NormalPrior
from pyro_subnet.tracing.plates import plate_scale
from pyro_subnet.tracing.site_distribution import SiteDistribution
from pyro_subnet.tracing.trace import Latents, Node, is_factor

# Pyro's and torch's own; a class that a user derives may be anything.
_NORMALS = (dist.Normal, Normal)


def log_prior_terms(
    trace: poutine.Trace,
    latents: Latents,
    unconstrained: Mapping[str, Tensor],
    data: Collection[str],
) -> list[DensityTerm]:
    """One term for each latent site, and factor that is not ``data``, of a run."""
    nodes = trace.nodes
    return [
        prior_term(nodes[name], latents.transforms[name], value)
        for name, value in unconstrained.items()
    ] + [
        _factor_term(node)
        for name, node in nodes.items()
        if is_factor(node) and name not in data
    ]


def _factor_term(node: Node) -> DensityTerm:
    density = node["fn"].log_prob(node["value"])
    total = scale_and_mask(density, node["scale"], node["mask"]).sum()
    return DensityTerm.of_factor(total, None)


def prior_term(node: Node, transform: Transform, leaf: Tensor) -> DensityTerm:
    """Log density of one latent site whose unconstrained value is ``leaf``."""
    taken = SiteDistribution.of(node["fn"], node["value"])
    while isinstance(transform, IndependentTransform):  # what `to_event` makes of one
        transform = transform.base_transform
    plain = taken.base.event_shape == () and transform.domain.event_dim == 0
    return DensityTerm(
        partial(_with_graph, node, transform, leaf, torch.is_grad_enabled()),
        node["name"],
        elementwise=plain,
        normal=_normal(node, taken, transform, leaf),
    )


def _with_graph(node: Node, transform: Transform, leaf: Tensor, graph: bool) -> Tensor:
    with torch.set_grad_enabled(graph):
        return log_density(node, transform, leaf)


def log_density(node: Node, transform: Transform, leaf: Tensor) -> Tensor:
    """Log density in nats of one latent site whose unconstrained value is ``leaf``."""
    fn, value = node["fn"], node["value"]
    # log p(u) = log p(theta) + log |d theta / d u|
    density = scale_and_mask(fn.log_prob(value), node["scale"], node["mask"]).sum()
    # As in a Pyro guide, the change of volume takes the plates' scale alone.
    volume = transform.log_abs_det_jacobian(leaf, value).sum() * plate_scale(node)
    return density + volume


def _normal(
    node: Node, taken: SiteDistribution, transform: Transform, leaf: Tensor
) -> NormalPrior | None:
    """A site's prior if it is normal and known, with nothing left out; else None."""
    base: Any = taken.base
    weight = node["scale"]
    is_identity = isinstance(transform, ComposeTransform) and not transform.parts
    if (
        type(base) not in _NORMALS
        or not is_identity
        or taken.element_shape != leaf.shape
        or taken.mask is not None
        or node["mask"] is not None
        or isinstance(weight, Tensor)
        or base.loc.requires_grad  # as where it is another latent site
        or base.scale.requires_grad
    ):
        return None
    loc, scale = (part.expand(leaf.shape) for part in (base.loc, base.scale))
    return NormalPrior(leaf, loc, scale, float(weight))


def latent_parents(
    terms: Sequence[DensityTerm], leaves: Mapping[str, Tensor]
) -> dict[str, frozenset[str]]:
    """``{site: latent sites that its prior depends on}``, where there are any."""
    found = {}
    for term in terms:
        others = {site: u for site, u in leaves.items() if site != term.site}
        if term.site is None or term.normal is not None or not others:
            continue
        if not term.log_density.requires_grad:
            continue
        # A graph from the prior to another site's leaf makes that site a parent.
        gradients = torch.autograd.grad(
            term.log_density,
            list(others.values()),
            retain_graph=True,
            allow_unused=True,
        )
        pairs = zip(others, gradients, strict=True)
        parents = frozenset(site for site, gradient in pairs if gradient is not None)
        if parents:
            found[term.site] = parents
    return found
