r"""The observed sites of one call at draws of the subnet: log densities and samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

import pyro
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from pyro_subnet.curvature.jacobian.output_map import identity_factors
from pyro_subnet.curvature.jacobian.route import jacobian_blocks, joined_rows
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.finite import finite_rows
from pyro_subnet.tensors.memory import DEFAULT_BUDGET
from pyro_subnet.tensors.modes import one_thread_at_a_time
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.data_factors import data_terms, factor_density
from pyro_subnet.tracing.drawn_data import check_data_are_given
from pyro_subnet.tracing.output_site import OutputSite
from pyro_subnet.tracing.site_distribution import SiteDistribution
from pyro_subnet.tracing.subnet_call import SubnetCall
from pyro_subnet.tracing.trace import Node


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

    Factors of the data are in both after :meth:`with_factors`.
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
    ) -> OutputDraws:
        r"""Log densities, and samples by the global random state, at draws theta."""
        check_data_are_given(call)
        # Linearized outputs cost one Jacobian of the chosen elements and one product.
        # The network itself runs once for each draw, with one set of D weights at a
        # time.
        with one_thread_at_a_time(), pyro.validation_enabled(False):
            if linearized:
                return _linearized(call, subnet, theta)
            return _sampled_network(call, subnet, theta)

    def with_factors(
        self, call: ModelCall, subnet: Subnet, theta: Float[Tensor, "draws subnet"]
    ) -> OutputDraws:
        """The same with the factors of the data, where all sites have theirs.

        A factor adds to the one observed site whose plates it shares, observation by
        observation, or else stands under its own name. The network runs once for each
        draw.

        Args:
            call: The call, as before.
            subnet: The chosen elements.
            theta: Their draws, shape (K, S).

        Returns:
            The same, or new draws.
        """
        if not call.factors or any(not s.node["is_observed"] for s in call.sites):
            return self
        found: dict[str, list[Tensor]] = {name: [] for name in call.factors}
        totals = []
        with one_thread_at_a_time(), pyro.validation_enabled(False):
            for row in theta:
                trace = call.run(call.latents.values_with(subnet, row))
                terms = data_terms(trace, call.factors, without_plates=False)
                totals.append(torch.stack([t.log_density.double() for t in terms]))
                for name, parts in found.items():
                    parts.append(_factor_log_likelihood(trace.nodes[name]))
        pointwise = dict(self.log_likelihood)
        for name, parts in found.items():
            density = torch.stack(parts)
            where = self._site_of(call, name, density) or name
            pointwise[where] = pointwise[where] + density if where != name else density
        total = self.total + torch.stack(totals).sum(1)
        return replace(self, log_likelihood=pointwise, total=total)

    def _site_of(self, call: ModelCall, factor: str, density: Tensor) -> str | None:
        """The one observed site in a factor's plates, observation by observation."""
        plates = set(call.factors[factor]["cond_indep_stack"])
        alike = [
            site.name
            for site in call.sites
            if set(site.node["cond_indep_stack"]) == plates
        ]
        same = len(alike) == 1 and self.log_likelihood[alike[0]].shape == density.shape
        return alike[0] if same else None


def _factor_log_likelihood(node: Node) -> Tensor:
    """Unweighted log density of a factor; 0 where a mask or a scale leaves it out."""
    density = factor_density(node)
    live = torch.as_tensor(node["scale"], device=density.device) != 0
    if node["mask"] is not None:
        live = live & torch.as_tensor(node["mask"], device=density.device)
    return density.where(live, 0.0)


def _linearized(call: ModelCall, subnet: Subnet, theta: Tensor) -> OutputDraws:
    shifts = _shifts(call, subnet, theta)
    samples, pointwise, totals = {}, {}, [theta.new_zeros(len(theta)).double()]
    for site in call.sites:
        shape = torch.Size([len(theta), *site.distribution.element_shape])
        fn = _shifted(site, shifts.get(site.name, {})).expand(shape)
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
        finite_rows(product.mT)
        widths = site.widths(moved[site.name])
        wide = (len(theta), *site.distribution.element_shape, sum(widths))
        pieces = product.reshape(wide).split(widths, dim=-1)
        found[site.name] = dict(zip(moved[site.name], pieces, strict=True))
    return found


def _shifted(site: OutputSite, shifts: Mapping[str, Tensor]) -> Distribution:
    """A site's family at shifted parameters, elementwise and without masks."""
    taken, family = site.distribution, site.family
    outputs = taken.outputs(family)
    for part, shift in shifts.items():
        outputs[part] = outputs[part] + shift
    return taken.plain_at(family, outputs)


def _log_likelihood(site: OutputSite, fn: Distribution) -> tuple[Tensor, Tensor]:
    """Log density of the data: by data point unweighted, and its weighted sum."""
    taken = site.distribution
    shape = taken.element_shape
    weights = site.weights(without_plates=False).reshape(shape)
    live = weights != 0
    density = fn.log_prob(site.value).where(live, 0.0)
    total = (density.double() * weights).reshape(len(density), -1).sum(1)
    batch_dim = len(shape) - taken.event_dim
    summed = range(1 + max(batch_dim, min(1, len(shape))), density.ndim)
    return (density.sum(list(summed)) if summed else density), total
