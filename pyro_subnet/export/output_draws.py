r"""The observed sites of one call at draws of the subnet: log densities and samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import pyro
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from pyro_subnet.curvature.jacobian.output_map import identity_factors
from pyro_subnet.curvature.jacobian.route import jacobian_blocks, joined_rows
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.memory import DEFAULT_BUDGET
from pyro_subnet.tensors.modes import one_thread_at_a_time
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.output_site import OutputSite, site_weights
from pyro_subnet.tracing.site_distribution import SiteDistribution
from pyro_subnet.tracing.subnet_call import SubnetCall


@final
@dataclass(frozen=True, eq=False)
class OutputDraws:
    """Observed sites of a call at K draws of the subnet, other elements at the MAP.

    Attributes:
        samples: Of each output site, shape (K, *site shape).
        log_likelihood: Of each site with data, in nats, shape (K, *data), by elements
            of its batch, or of its first axis where all are its event's. Neither scaled
            nor weighted; what a mask or a scale of zero leaves out counts 0.
        total: Log likelihood as the model weights it, over all sites with data, (K,).
    """

    samples: Mapping[str, Tensor]
    log_likelihood: Mapping[str, Tensor]
    total: Float[Tensor, " draws"]

    @classmethod
    def of(
        cls,
        call: ModelCall,
        subnet: Subnet,
        theta: Float[Tensor, "draws subnet"],
        *,
        linearized: bool,
        noise_factor: float = 1.0,
    ) -> OutputDraws:
        r"""Log densities, and samples by the global random state, at draws theta."""
        # Linearized outputs cost one Jacobian of the chosen elements and one product.
        # The network itself runs once for each draw, with one set of D weights at a
        # time.
        with one_thread_at_a_time(), pyro.validation_enabled(False):
            if linearized:
                return _linearized(call, subnet, theta, math.log(noise_factor))
            return _sampled_network(call, subnet, theta)


def _linearized(
    call: ModelCall, subnet: Subnet, theta: Tensor, log_noise: float
) -> OutputDraws:
    shifts = _shifts(call, subnet, theta)
    samples, pointwise, totals = {}, {}, [theta.new_zeros(len(theta)).double()]
    for site in call.sites:
        shape = torch.Size([len(theta), *site.distribution.element_shape])
        fn = _shifted(site, shifts.get(site.name, {}), log_noise).expand(shape)
        samples[site.name] = fn.sample()
        if site.node["is_observed"]:
            pointwise[site.name], total = _log_likelihood(site, fn)
            totals.append(total)
    return OutputDraws(samples, pointwise, torch.stack(totals).sum(0))


def _sampled_network(call: ModelCall, subnet: Subnet, theta: Tensor) -> OutputDraws:
    samples: dict[str, list[Tensor]] = {site.name: [] for site in call.sites}
    pointwise: dict[str, list[Tensor]] = {
        site.name: [] for site in call.sites if site.node["is_observed"]
    }
    totals = []
    for row in theta:
        nodes = call.run(call.latents.values_with(subnet, row)).nodes
        total = theta.new_zeros(1).double()
        for site in call.sites:
            node = nodes[site.name]
            base = SiteDistribution.of(node["fn"], node["value"]).base
            fn = base.expand(torch.Size([1, *site.distribution.element_shape]))
            samples[site.name].append(fn.sample())
            if site.name in pointwise:
                density, part = _log_likelihood(site, fn)
                pointwise[site.name].append(density)
                total = total + part
        totals.append(total)
    return OutputDraws(
        {name: torch.cat(parts) for name, parts in samples.items()},
        {name: torch.cat(parts) for name, parts in pointwise.items()},
        torch.cat(totals),
    )


def _shifts(
    call: ModelCall, subnet: Subnet, theta: Tensor
) -> dict[str, dict[str, Tensor]]:
    r""":math:`J (\theta_k - \hat\theta)` by site and parameter, (K, *elements, c)."""
    subnet_call = SubnetCall.of(call, subnet)
    sites, moved = subnet_call.sites, subnet_call.moved
    if not sites:
        return {}
    outputs = subnet_call.outputs()
    steps = theta - outputs.loc.to(theta)
    products = joined_rows(
        jacobian_blocks(outputs, identity_factors(outputs), DEFAULT_BUDGET),
        len(sites),
        lambda rows: steps @ rows.flatten(0, 1).to(steps).mT,
        dim=1,
    )
    found = {}
    for site, product in zip(sites, products, strict=True):
        widths = site.widths(moved[site.name])
        wide = (len(theta), *site.distribution.element_shape, sum(widths))
        pieces = product.reshape(wide).split(widths, dim=-1)
        found[site.name] = dict(zip(moved[site.name], pieces, strict=True))
    return found


def _shifted(
    site: OutputSite, shifts: Mapping[str, Tensor], log_noise: float
) -> Distribution:
    """A site's family at shifted parameters, elementwise and without masks."""
    taken, family = site.distribution, site.family
    outputs = taken.outputs(family)
    for part, shift in shifts.items():
        outputs[part] = outputs[part] + shift
    if log_noise and family.distribution is torch.distributions.Normal:
        outputs["log_scale"] = outputs["log_scale"] + log_noise
    return taken.plain_at(family, outputs)


def _log_likelihood(site: OutputSite, fn: Distribution) -> tuple[Tensor, Tensor]:
    """Log density of the data: by data point unweighted, and its weighted sum."""
    taken = site.distribution
    shape = taken.element_shape
    weights = site_weights(site.node, taken, without_plates=False).reshape(shape)
    live = weights != 0
    density = fn.log_prob(site.value).where(live, 0.0)
    total = (density.double() * weights).reshape(len(density), -1).sum(1)
    batch_dim = len(shape) - taken.event_dim
    summed = range(1 + max(batch_dim, min(1, len(shape))), density.ndim)
    return (density.sum(list(summed)) if summed else density), total
