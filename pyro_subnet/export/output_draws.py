r"""The observed sites of one call at draws of the subnet: log densities and samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import pyro
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from pyro_subnet.curvature.jacobian.output_map import identity_factors
from pyro_subnet.curvature.jacobian.route import jacobian_blocks
from pyro_subnet.models.draws import constructor
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.memory import DEFAULT_BUDGET
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.output_site import OutputSite, SiteDistribution, site_weights


@dataclass(frozen=True, eq=False)
class OutputDraws:
    """What a call says at K draws of the subnet, other elements at the MAP.

    Attributes:
        samples: Of each output site, shape (K, *site shape).
        log_likelihood: Of each site with data, datum by datum, in nats, (K, *data):
            the axes of its batch, or the first one where all are its event's. Neither
            scaled nor weighted; what a mask or a scale of zero leaves out counts 0.
        total: Log likelihood as the model weighs it, over all sites with data, (K,).
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
        noise_scale: float = 1.0,
    ) -> OutputDraws:
        r"""Evaluates the observed sites at draws.

        Linearized outputs cost one Jacobian of the chosen elements and one product;
        the network itself runs once a draw, with one set of D weights at a time.

        Args:
            call: A call of the model.
            subnet: The chosen elements.
            theta: Draws of them, unconstrained.
            linearized: Whether outputs are first-order expansions about the MAP.
            noise_scale: What normal noise is multiplied by in the linearized model.

        Returns:
            Log densities and samples, which take the global random numbers.
        """
        with pyro.validation_enabled(False):
            if linearized:
                return _linearized(call, subnet, theta, math.log(noise_scale))
            return _sampled_network(call, subnet, theta)


def values_at(
    call: ModelCall, subnet: Subnet, theta: Float[Tensor, " subnet"]
) -> dict[str, Tensor]:
    """Unconstrained values of all latent sites at one draw.

    Args:
        call: A call of the model.
        subnet: The chosen elements.
        theta: Their values.

    Returns:
        ``{site: value}``, others than the chosen at the MAP.
    """
    packed = call.latents.loc.index_copy(0, subnet.flat, theta.to(call.latents.loc))
    return call.latents.layout.unpack(packed)


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
        nodes = call.run(values_at(call, subnet, row)).nodes
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
    graph = call.graph(with_prior=False)
    moved, activations = call.moved_parts(graph, subnet), graph.activation_bytes
    del graph
    sites = [site for site in call.sites if moved[site.name]]
    if not sites:
        return {}
    outputs = call.output_map(subnet, moved, activations)
    steps = theta - call.latents.loc.index_select(0, subnet.flat).to(theta)
    products: list[list[Tensor]] = [[] for _ in sites]
    for block in jacobian_blocks(outputs, identity_factors(outputs), DEFAULT_BUDGET):
        rows = block.rows.flatten(0, 1)
        products[block.site].append(steps @ rows.to(steps).mT)
    found = {}
    for site, parts in zip(sites, products, strict=True):
        widths = site.widths(moved[site.name])
        wide = (len(theta), *site.distribution.element_shape, sum(widths))
        pieces = torch.cat(parts, dim=1).reshape(wide).split(widths, dim=-1)
        found[site.name] = dict(zip(moved[site.name], pieces, strict=True))
    return found


def _shifted(
    site: OutputSite, shifts: Mapping[str, Tensor], log_noise: float
) -> Distribution:
    """A site's family at shifted parameters, element by element, without masks."""
    taken, family = site.distribution, site.family
    outputs = {
        part: value.expand(*taken.element_shape, value.shape[-1])
        for part, value in family.outputs(taken.base).items()
    }
    for part, shift in shifts.items():
        outputs[part] = outputs[part] + shift
    if log_noise and family.distribution is torch.distributions.Normal:
        outputs["log_scale"] = outputs["log_scale"] + log_noise
    return constructor(taken, family)(**family.parameters(taken.base, outputs))


def _log_likelihood(site: OutputSite, fn: Distribution) -> tuple[Tensor, Tensor]:
    """Log density of the data, by datum as it is, and in sum as it is weighed."""
    taken = site.distribution
    shape, event = taken.element_shape, taken.base.event_shape
    weights = site_weights(site.node, taken, without_plates=False).reshape(shape)
    live = weights != 0
    value = site.node["value"].expand(shape + event)
    if not bool(live.all()):
        # What is masked may be NaN, which a weight of zero does not remove.
        inside = live.reshape(live.shape + (1,) * len(event))
        value = value.where(inside, fn.sample()[0])
    density = fn.log_prob(value).where(live, 0.0)
    total = (density.double() * weights).reshape(len(density), -1).sum(1)
    batch_dim = len(shape) - taken.event_dim
    summed = range(1 + max(batch_dim, min(1, len(shape))), density.ndim)
    return (density.sum(list(summed)) if summed else density), total
