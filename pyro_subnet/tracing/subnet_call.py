"""One call of the model as a function of its subnet: η, Λ and log densities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from pyro import poutine
from torch import Tensor
from torch.distributions import (
    Categorical,
    MultivariateNormal,
    OneHotCategorical,
    kl_divergence,
)

from pyro_subnet.curvature.jacobian.output_map import (
    Factors,
    OutputMap,
    identity_factors,
)
from pyro_subnet.options import Curvature
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.modes import differentiable
from pyro_subnet.tracing.call import Graph, ModelCall, MovedParts
from pyro_subnet.tracing.output_site import OutputSite
from pyro_subnet.tracing.site_distribution import SiteDistribution
from pyro_subnet.tracing.trace import preserved_rng

# Families of many outputs whose divergence has a closed form, twice differentiable.
_DIVERGENT = (MultivariateNormal, Categorical, OneHotCategorical)


@final
@dataclass(frozen=True, eq=False)
class SubnetCall:
    """One call of the model over a subnet, other elements at the MAP.

    Attributes:
        moved: Parameters of each output site that the chosen sites move.
        activation_bytes: What a run keeps for its backward pass.
        without_plates: Whether weights leave out the N/B of subsampling plates, so that
            minibatches which together hold every data point once can be summed.
    """

    call: ModelCall
    subnet: Subnet
    moved: MovedParts
    activation_bytes: int
    without_plates: bool = False

    @classmethod
    def of(
        cls,
        call: ModelCall,
        subnet: Subnet,
        graph: Graph | None = None,
        *,
        without_plates: bool = False,
    ) -> SubnetCall:
        """The call over a subnet, with ``graph`` as its run if there is one already."""
        graph = call.graph(with_prior=False) if graph is None else graph
        moved = call.moved_parts(graph, subnet)
        return cls(call, subnet, moved, graph.activation_bytes, without_plates)

    def of_network(self, graph: Graph) -> SubnetCall:
        """The same call with the network's parameters as moved, though none is."""
        # Those that share latent sites with a site's first: a noise has its own.
        leaves, nodes = list(graph.leaves.values()), graph.trace.nodes
        with differentiable():
            moved = {
                site.name: site.parts_like_the_first(nodes[site.name], leaves)
                for site in self.call.sites
            }
        return replace(self, moved=moved)

    @property
    def sites(self) -> tuple[OutputSite, ...]:
        """Observed sites with a parameter that the subnet moves, in trace order."""
        return tuple(site for site in self.call.sites if self.moved[site.name])

    @property
    def is_moved(self) -> bool:
        """Whether there are data, and an output that the subnet moves."""
        return bool(self.sites) and self.call.num_data > 0

    def outputs(self) -> OutputMap:
        r"""Map :math:`\theta_S \mapsto \eta` of the moved parameters, by site."""
        for site in self.sites:
            site.require_outputs()
        return self._own()

    def _own(self) -> OutputMap:
        """The same; of an unreadable family the log density."""
        return self.call.map_of(self.read, self.subnet.indices, self.activation_bytes)

    def read(self, trace: poutine.Trace) -> tuple[Tensor, ...]:
        """The moved parameters in some run, one (M, c) tensor a site."""
        found = (
            site.outputs(trace.nodes[site.name], self.moved[site.name])
            for site in self.sites
        )
        return tuple(value.reshape(-1, value.shape[-1]) for value in found)

    def factors(self) -> Factors:
        r"""Roots :math:`\sqrt{w} R` of weighted output Hessians, one a moved site."""
        return tuple(
            site.weighted_root(self.moved[site.name], self.without_plates)
            for site in self.sites
        )

    def scores(self) -> Factors | None:
        r"""Scores :math:`w \nabla_\eta \log p` of each element, (M, c) a moved site.

        Returns:
            The scores; None where a density has no such gradient.
        """
        try:
            return tuple(self._score(site) for site in self.sites)
        except Exception:  # whatever a density of the user's own may raise
            return None

    def _score(self, site: OutputSite) -> Tensor:
        family, taken = site.family, site.distribution
        parts = self.moved[site.name]
        with differentiable(), preserved_rng():
            outputs = {
                part: value.detach().clone().requires_grad_()
                for part, value in taken.outputs(family).items()
                if part in parts
            }
            density = taken.plain_at(family, outputs).log_prob(site.value).sum()
            found = torch.autograd.grad(density, list(outputs.values()))
        joined = torch.cat(found, -1).flatten(0, -2)
        return joined * self.weights(site).unsqueeze(-1).to(joined)

    def rows(self, kind: Curvature) -> tuple[OutputMap, Factors]:
        """A map and factors whose weighted Jacobian's Gram matrix is the curvature."""
        # G = A^T A: A = sqrt(w) R J for the GGN, else a row of A is the gradient of
        # sum_e sqrt(w_ne) log p(y_ne). The Hessian is no such sum over rows.
        if kind == "ggn":
            return self.outputs(), self.factors()
        outputs = self.log_likelihood(0.5, sampled=kind == "ggn-mc")
        return outputs, identity_factors(outputs)

    def data_weights(self) -> Float[Tensor, " data"]:
        """Sum of w over a data point's moved elements, shape (N,), float64."""
        weights = [
            self.weights(site).reshape(self.call.num_data, -1).sum(1)
            for site in self.sites
        ]
        return torch.stack(weights).sum(0)

    def log_likelihood(self, power: float, *, sampled: bool = False) -> OutputMap:
        r"""Map :math:`\theta_S \mapsto \sum_e w_{ne}^p \log p(y_{ne} \mid \theta)`."""
        sites, base = self.sites, self.call.latents.values
        # With `sampled`, labels that the model draws at the MAP replace the data.
        labels = [part for site in sites for part in self._labels(site, power, sampled)]
        outputs = self._own()
        # A data point is a row of the axis that all observed sites share: its elements
        # e, at all sites, add up. Without such an axis they add up within each site.
        together = len({site.leading for site in sites}) == 1
        own = len(outputs.rows)

        def of_sites(
            values: Mapping[str, Tensor], rows: tuple[Tensor, ...] | None
        ) -> tuple[Tensor, ...]:
            given = labels if rows is None else list(rows[own:])
            rows = None if rows is None else rows[:own]
            nodes = self.call.run({**base, **values}, rows).nodes
            densities = [
                _density(nodes[site.name]["fn"], value, weight)
                for site, value, weight in zip(
                    sites, given[::2], given[1::2], strict=True
                )
            ]
            return (torch.stack(densities).sum(0),) if together else tuple(densities)

        with torch.no_grad():
            reference = of_sites({}, None)
        rows = (*outputs.rows, *labels) if outputs.rows else ()
        return replace(outputs, of_sites=of_sites, reference=reference, rows=rows)

    def is_wide(self, budget: int) -> bool:
        r"""Whether S divergences' Hessian rows cost less than roots of Λ that large."""
        sites = self.sites
        widths = [sum(site.widths(self.moved[site.name])) for site in sites]
        return (
            max(map(OutputSite.root_bytes, sites, widths)) > budget
            and self.subnet.size <= max(widths)
            and all(isinstance(site.distribution.base, _DIVERGENT) for site in sites)
        )

    def divergence(self) -> OutputMap:
        r"""Map :math:`\theta_S \mapsto -\sum_e w_e KL(p_{\hat\theta} \| p_\theta)`.

        Its Hessian at the MAP is that of the Gauss-Newton matrix, with the sign turned,
        as the divergence has no gradient there: without a root of Λ, which has the
        square of the outputs' numbers, 7,000 for a Gaussian process at 120 inputs.

        Returns:
            The map to one number, of all data at once.
        """
        sites, base = self.sites, self.call.latents.values
        outputs = self._own()
        at_map = {site.name: site.distribution for site in sites}
        weights = {site.name: self.weights(site) for site in sites}

        def of_sites(
            values: Mapping[str, Tensor], rows: tuple[Tensor, ...] | None
        ) -> tuple[Tensor, ...]:
            nodes, total = self.call.run({**base, **values}, None).nodes, []
            for site in sites:
                taken = SiteDistribution.of(nodes[site.name]["fn"], site.value)
                found = kl_divergence(at_map[site.name].base, taken.base)
                each = found.expand(taken.element_shape).reshape(-1)
                total.append((each * weights[site.name].to(each)).sum())
            return (-torch.stack(total).sum().reshape(1, 1),)

        # All data at once: what is held at the MAP goes with no part of them.
        reference = (outputs.loc.new_zeros(1, 1),)
        return replace(
            outputs, of_sites=of_sites, reference=reference, rows=(), num_data=1
        )

    def weights(self, site: OutputSite) -> Float[Tensor, " elements"]:
        """w of each element of a site, shape (M,), float64."""
        return site.weights(without_plates=self.without_plates)

    def _labels(
        self, site: OutputSite, power: float, sampled: bool
    ) -> tuple[Tensor, Tensor]:
        """A site's labels, (N, ...), and its elements' weights, (N, M / N)."""
        taken = site.distribution
        weight = self.weights(site).pow(power).reshape(site.leading, -1)
        value = site.value
        if sampled:
            with torch.no_grad():
                value = taken.base.expand(taken.element_shape).sample()
        if not taken.element_shape:
            value = value.unsqueeze(0)
        dtype = next(iter(site.own(site.node).values())).dtype
        return value.detach(), weight.to(dtype)


def _density(
    fn: torch.distributions.Distribution, value: Tensor, weight: Tensor
) -> Tensor:
    """Weighted log density of a site, data point by data point, shape (N, 1)."""
    taken = SiteDistribution.of(fn, value)
    density = taken.base.log_prob(value).expand(taken.element_shape)
    return (density.reshape(weight.shape) * weight).sum(1, keepdim=True)
