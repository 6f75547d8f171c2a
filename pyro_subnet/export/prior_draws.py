"""The user's prior over the subnet: draws of it, and its log density at draws."""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.modes import one_thread_at_a_time
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.log_prior import log_prior_terms, prior_term
from pyro_subnet.tracing.trace import is_factor, run_model


def draw_prior(
    call: ModelCall, subnet: Subnet, count: int
) -> Float[Tensor, "count subnet"]:
    """K draws of the chosen elements' marginal prior, unconstrained, shape (K, S)."""
    # A site whose prior depends on no other site is drawn by itself. If any other holds
    # chosen elements, the model runs once for each draw, and its other sites are
    # dropped.
    chosen = subnet.indices
    runs = bool(set(chosen) & set(call.latent_parents()))
    rows = []
    for _ in range(count):
        nodes = call.trace.nodes
        if runs:
            nodes = run_model(call.at_map.program, call.args, call.kwargs, {}, {}).nodes
        parts = []
        for name, within in chosen.items():
            node = nodes[name]
            value = node["value"] if runs else node["fn"].sample()
            u = call.latents.transforms[name].inv(value)
            parts.append(u.flatten()[within])
        rows.append(torch.cat(parts))
    return torch.stack(rows).detach()


def log_prior_at(
    call: ModelCall, subnet: Subnet, theta: Float[Tensor, "draws subnet"]
) -> Float[Tensor, " draws"]:
    """Unconstrained log density of latent sites and their factors, (K,), in nats."""
    # Where no prior depends on a chosen site and there are no factors, only the sites
    # with chosen elements are evaluated anew. Otherwise the model runs once for each
    # draw.
    nodes, latents = call.trace.nodes, call.latents
    chosen = set(subnet.indices)
    parents = set[str]().union(*call.latent_parents().values())
    factors = {name for name, node in nodes.items() if is_factor(node)}
    runs = bool(chosen & parents or factors - set(call.factors))
    with one_thread_at_a_time(), pyro.validation_enabled(False):
        if runs:
            found = []
            for row in theta:
                u = latents.values_with(subnet, row)
                terms = log_prior_terms(call.run(u), latents, u, call.factors)
                found.append(_sum([term.log_density for term in terms]))
            return torch.stack(found)
        rest = _terms(call, latents.values, set(latents.layout.names) - chosen)
        return torch.stack(
            [
                _sum([*rest, *_terms(call, latents.values_with(subnet, row), chosen)])
                for row in theta
            ]
        )


def _terms(call: ModelCall, u: Mapping[str, Tensor], sites: set[str]) -> list[Tensor]:
    """Log densities of sites at the values u, under the reference run's priors."""
    transforms = call.latents.transforms
    return [
        prior_term(
            {**call.trace.nodes[name], "value": transforms[name](u[name])},
            transforms[name],
            u[name],
        ).log_density
        for name in call.latents.layout.names
        if name in sites
    ]


def _sum(terms: list[Tensor]) -> Tensor:
    return torch.stack([term.double() for term in terms]).sum()
