"""The log prior of a traced model, term by term, in unconstrained space."""

from __future__ import annotations

from collections.abc import Mapping

from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import Transform
from torch.distributions.transforms import IndependentTransform

from pyro_subnet.curvature.prior import DensityTerm
from pyro_subnet.tracing.output_site import SiteDistribution
from pyro_subnet.tracing.trace import Latents, Node, is_factor, plate_scale


def log_prior_terms(
    trace: poutine.Trace, latents: Latents, unconstrained: Mapping[str, Tensor]
) -> list[DensityTerm]:
    """Terms of the log prior, changes of volume included.

    Args:
        trace: A run of the model.
        latents: The latent sites.
        unconstrained: The values that the run had, ``{site: value}``.

    Returns:
        One term for each latent site and each factor.
    """
    nodes = trace.nodes
    return [
        prior_term(nodes[name], latents.transforms[name], value)
        for name, value in unconstrained.items()
    ] + [_factor_term(node) for node in nodes.values() if is_factor(node)]


def _factor_term(node: Node) -> DensityTerm:
    density = node["fn"].log_prob(node["value"])
    total = scale_and_mask(density, node["scale"], node["mask"]).sum()
    return DensityTerm(total, None, elementwise=False)


def prior_term(node: Node, transform: Transform, leaf: Tensor) -> DensityTerm:
    """Log density of one latent site, in unconstrained space.

    Args:
        node: The site in a run of the model.
        transform: From its unconstrained to its constrained values.
        leaf: The unconstrained value that the run had.

    Returns:
        The term, summed over the site.
    """
    fn, value = node["fn"], node["value"]
    density = scale_and_mask(fn.log_prob(value), node["scale"], node["mask"]).sum()
    # As in a Pyro guide, the change of volume takes the plates' scale alone.
    volume = transform.log_abs_det_jacobian(leaf, value).sum() * plate_scale(node)
    base = SiteDistribution.of(fn, value).base
    while isinstance(transform, IndependentTransform):  # what `to_event` makes of one
        transform = transform.base_transform
    plain = base.event_shape == () and transform.domain.event_dim == 0
    return DensityTerm(density + volume, node["name"], elementwise=plain)
