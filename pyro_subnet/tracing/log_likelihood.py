"""The log likelihood of one call, datum by datum, as a function of a subnet."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_subnet.curvature.jacobian.output_map import OutputMap
from pyro_subnet.subnet import Subnet
from pyro_subnet.tracing.call import ModelCall, MovedParts
from pyro_subnet.tracing.output_site import OutputSite, SiteDistribution, site_weights
from pyro_subnet.tracing.trace import preserved_rng


def log_likelihood_map(
    call: ModelCall,
    subnet: Subnet,
    moved: MovedParts,
    activation_bytes: int,
    *,
    power: float,
    without_plates: bool,
    sampled: bool = False,
) -> OutputMap:
    r"""The map :math:`\theta_S \mapsto \sum_e w_{ne}^p \log p(y_{ne} \mid \theta)`.

    A datum n is a row of the axis that all observed sites share; its elements e, at all
    sites, add up. Without such an axis each site's first one counts, site by site.

    Args:
        call: A call of the model.
        subnet: The chosen elements.
        moved: What they move; other sites are left out.
        activation_bytes: What a run keeps for its backward pass.
        power: p, of the elements' weights.
        without_plates: Leaves out the N/B of subsampling plates.
        sampled: Takes labels drawn from the model at the MAP in place of the data.

    Returns:
        One output a datum.
    """
    sites = [site for site in call.sites if moved[site.name]]
    labels = [_labels(site, without_plates, power, sampled) for site in sites]
    outputs = call.output_map(subnet, moved, activation_bytes)
    together = len({site.leading for site in sites}) == 1
    own = len(outputs.rows)
    base = call.latents.values

    def of_sites(
        values: Mapping[str, Tensor], rows: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, ...]:
        trace = call.run({**base, **values}, None if rows is None else rows[:own])
        given = [part for pair in labels for part in pair]
        if rows is not None:
            given = list(rows[own:])
        densities = [
            _density(trace.nodes[site.name]["fn"], value, weight)
            for site, value, weight in zip(sites, given[::2], given[1::2], strict=True)
        ]
        return (torch.stack(densities).sum(0),) if together else tuple(densities)

    rows = outputs.rows
    if rows:
        rows += tuple(part for pair in labels for part in pair)
    with torch.no_grad():
        reference = of_sites({}, None)
    return OutputMap(
        base=outputs.base,
        chosen=outputs.chosen,
        of_sites=of_sites,
        reference=reference,
        rows=rows,
        num_data=outputs.num_data,
        activation_bytes=activation_bytes,
    )


def _density(
    fn: torch.distributions.Distribution, value: Tensor, weight: Tensor
) -> Tensor:
    """Weighted log density of a site, datum by datum, shape (N, 1)."""
    taken = SiteDistribution.of(fn, value)
    density = taken.base.log_prob(value).expand(taken.element_shape)
    return (density.reshape(weight.shape) * weight).sum(1, keepdim=True)


def _labels(
    site: OutputSite, without_plates: bool, power: float, sampled: bool
) -> tuple[Tensor, Tensor]:
    """A site's labels, shape (N, ...), and its elements' weights, shape (N, M / N)."""
    taken = site.distribution
    weight = site_weights(site.node, taken, without_plates)
    weight = weight.pow(power).reshape(site.leading, -1)
    event = taken.base.event_shape
    value = site.node["value"].expand(taken.element_shape + event)
    with torch.no_grad():
        if sampled:
            value = taken.base.expand(taken.element_shape).sample()
        elif bool((weight == 0).any()):
            # What is masked may be NaN, which a weight of zero does not remove.
            with preserved_rng():
                other = taken.base.expand(taken.element_shape).sample()
            live = (weight != 0).reshape(taken.element_shape + (1,) * len(event))
            value = value.where(live, other)
    if not taken.element_shape:
        value = value.unsqueeze(0)
    dtype = next(iter(site.family.outputs(taken.base).values())).dtype
    return value.detach(), weight.to(dtype)
