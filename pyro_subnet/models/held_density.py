r"""The density of one call of a linearized hybrid model, as two products a gradient.

While a call's data stay as they are, so do f and J, and the outputs at any subnet are
:math:`f + J (\theta_S - \hat\theta_S)`: the network need not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.curvature.jacobian.output_map import identity_factors
from pyro_subnet.curvature.jacobian.route import jacobian_blocks, joined_rows
from pyro_subnet.gaussians.base import Gaussian, standard_normal
from pyro_subnet.models.subnet_prior import SubnetSites
from pyro_subnet.tensors.agreement import agree, random_stream
from pyro_subnet.tensors.memory import DEFAULT_BUDGET
from pyro_subnet.tensors.modes import differentiable, full_precision
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.log_prior import prior_term
from pyro_subnet.tracing.output_site import OutputSite
from pyro_subnet.tracing.subnet_call import SubnetCall
from pyro_subnet.tracing.trace import Node, is_factor

LogDensity = Callable[[Tensor], Tensor]
# Draws at which a held density is compared with the model's own.
_COMPARED = 2


@final
@dataclass(frozen=True, eq=False)
class _Likelihood:
    """One observed site at the call's data, and the rows of J for its outputs."""

    site: OutputSite
    outputs: Mapping[str, Tensor]
    moved: Sequence[str]
    rows: Float[Tensor, "numbers subnet"]
    weights: Float[Tensor, "*elements"]

    @classmethod
    def of(cls, site: OutputSite, call: SubnetCall, rows: Tensor) -> _Likelihood:
        """Of the site's rows of J, (M, c, S)."""
        taken, moved = site.distribution, call.moved[site.name]
        outputs = {
            part: value.detach() for part, value in taken.outputs(site.family).items()
        }
        weights = call.weights(site).reshape(taken.element_shape).to(rows)
        return cls(site, outputs, moved, rows.flatten(0, 1), weights)

    def log_density(self, step: Float[Tensor, " subnet"]) -> Tensor:
        """Sum over the site's elements, in nats, at a step from the MAP."""
        taken, outputs = self.site.distribution, dict(self.outputs)
        shifts = (self.rows @ step).reshape(*taken.element_shape, -1)
        pieces = shifts.split([outputs[part].shape[-1] for part in self.moved], dim=-1)
        for part, piece in zip(self.moved, pieces, strict=True):
            outputs[part] = outputs[part] + piece
        density = taken.plain_at(self.site.family, outputs).log_prob(self.site.value)
        return (density * self.weights).sum()


@final
@dataclass(frozen=True, eq=False)
class _NormalPrior:
    """Independent normal priors of some chosen elements."""

    columns: Tensor
    loc: Tensor
    scale: Tensor

    def __call__(self, theta: Tensor) -> Tensor:
        """Log density, in nats, up to a constant."""
        standard = (theta[self.columns] - self.loc) / self.scale
        return -0.5 * (standard * standard).sum()


@final
class HeldDensity:
    r"""The log density :math:`\log p(y, \theta_S)` of one call.

    Made by :func:`hold`, which has compared it with the model's own.

    Args:
        loc: The MAP of the subnet, shape (S,).
        priors: Log densities of the chosen sites.
        likelihoods: The observed sites that the subnet moves.
        constant: What else the density has.
    """

    def __init__(
        self,
        loc: Float[Tensor, " subnet"],
        priors: Sequence[LogDensity],
        likelihoods: Sequence[_Likelihood],
        constant: float = 0.0,
    ):
        self._constant = constant
        self._loc = loc
        self._priors = priors
        self._likelihoods = likelihoods

    @full_precision()
    def __call__(self, theta: Float[Tensor, " subnet"]) -> Float[Tensor, ""]:
        """The log density of a subnet, in nats."""
        step = theta - self._loc
        terms = [prior(theta) for prior in self._priors]
        terms += [each.log_density(step) for each in self._likelihoods]
        return torch.stack(terms).sum() + self._constant

    def plus(self, constant: float) -> HeldDensity:
        """The same with a constant added."""
        constant += self._constant
        return HeldDensity(self._loc, self._priors, self._likelihoods, constant)


def _with_gradient(function: LogDensity, theta: Tensor) -> tuple[float, Tensor]:
    """A log density and its gradient."""
    leaf = theta.detach().clone().requires_grad_()
    with differentiable():
        value = function(leaf)
        return float(value.detach()), torch.autograd.grad(value, leaf)[0]


def hold(
    call: ModelCall, sites: SubnetSites, gaussian: Gaussian, own: LogDensity
) -> HeldDensity | None:
    """The density of a call, held, if it is the model's own.

    Args:
        call: The call of the user's model.
        sites: Its latent sites as functions of the subnet.
        gaussian: The Laplace posterior.
        own: The linearized model's log density of a subnet, by a run of it.

    Returns:
        The density, whose gradients at two draws are those of ``own``; None where the
        priors of the chosen sites depend on each other, the model has factors, its
        rows of J do not fit, or its parameters are no longer at the MAP.
    """
    held = _read(call, sites)
    if held is None:
        return None
    noise = standard_normal((_COMPARED, gaussian.size), gaussian.loc, random_stream())
    apart = []
    for theta in gaussian.draw(noise):
        found, gradient = _with_gradient(held, theta)
        expected, its_gradient = _with_gradient(own, theta)
        if not agree(gradient, its_gradient):
            return None
        apart.append(expected - found)
    # Of what the subnet does not move: other sites, and the constants of normal ones.
    return held.plus(sum(apart) / len(apart))


def _read(call: ModelCall, sites: SubnetSites) -> HeldDensity | None:
    nodes = call.trace.nodes.values()
    if any(map(is_factor, nodes)) or call.latent_parents():
        return None
    subnet_call = SubnetCall.of(call, sites.subnet)
    outputs = subnet_call.outputs()
    numbers = sum(count * width for count, width in outputs.shapes) * outputs.size
    if not outputs.shapes or numbers * outputs.loc.element_size() > DEFAULT_BUDGET:
        return None
    with torch.no_grad():
        blocks = jacobian_blocks(outputs, identity_factors(outputs), DEFAULT_BUDGET)
        rows = joined_rows(blocks, len(outputs.shapes), lambda rows: rows)
    like = outputs.loc
    likelihoods = [
        _Likelihood.of(site, subnet_call, own.to(like))
        for site, own in zip(subnet_call.sites, rows, strict=True)
    ]
    return HeldDensity(like, _priors(call, sites, like), likelihoods)


def _priors(call: ModelCall, sites: SubnetSites, like: Tensor) -> list[LogDensity]:
    """The chosen sites' log densities; all normal ones as one."""
    found, columns, locs, scales = list[LogDensity](), [], [], []
    order = torch.arange(sites.subnet.size, device=like.device)
    place = sites.subnet.split(order.double())  # exact
    for name, within in sites.chosen.items():
        node = call.trace.nodes[name]
        moments = _normal_moments(node)
        if moments is None:
            found.append(_prior_of(sites, name, node))
            continue
        columns.append(place[name].long())
        locs.append(moments[0].flatten()[within].to(like))
        scales.append(moments[1].flatten()[within].to(like))
    if columns:
        found.append(_NormalPrior(*map(torch.cat, (columns, locs, scales))))
    return found


def _normal_moments(node: Node) -> tuple[Tensor, Tensor] | None:
    """Loc and scale of each element of a plain normal site; None of another."""
    fn, value, scale = node["fn"], node["value"], node["scale"]
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    plain = isinstance(fn, torch.distributions.Normal) and node["mask"] is None
    if not plain or isinstance(scale, Tensor) or scale != 1.0:
        return None
    loc, deviation = fn.loc.detach(), fn.scale.detach()
    return loc.expand(value.shape), deviation.expand(value.shape)


def _prior_of(sites: SubnetSites, name: str, node: Node) -> LogDensity:
    transform = sites.latents.transforms[name]

    def log_density(theta: Tensor) -> Tensor:
        u = sites.unconstrained(name, theta, 0)
        given: dict[str, Any] = {**node, "value": transform(u)}
        return prior_term(given, transform, u).log_density

    return log_density
