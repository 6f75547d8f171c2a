"""Predictive distributions over y: the links between outputs and observations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
import torch.distributions as td
from torch import Tensor

from pyro_subnet.exceptions import OptionError
from pyro_subnet.gaussians.factored import Gaussian
from pyro_subnet.models.draws import constructor
from pyro_subnet.predictions.functions import (
    check_num_samples,
    draw_functions,
    standard_normal,
)
from pyro_subnet.predictions.linearized_outputs import LinearizedOutputs, of_site
from pyro_subnet.predictions.links.categorical import bridge, probit
from pyro_subnet.predictions.links.gaussian_noise import (
    LogScaleGaussian,
    multivariate,
    noisy,
)
from pyro_subnet.predictions.links.mixture import Likelihood, mixture, standard_error
from pyro_subnet.predictions.links.options import Predictive, PredictiveOptions
from pyro_subnet.predictions.links.quadrature import (
    NUM_NODES,
    gauss_hermite,
    mean_logistic,
)
from pyro_subnet.predictions.links.reshaped import Reshaped
from pyro_subnet.predictions.outputs import moments
from pyro_subnet.predictions.raw_logits import CLASSES, outputs_of
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.grad_mode import outside_inference_mode
from pyro_subnet.tensors.lower_factor import lower_factor
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.output_site import SiteDistribution
from pyro_subnet.tracing.trace import Latents, Model

_NORMALS = (td.Normal, td.LogNormal)
_BRIDGES = ("bridge", "bridge-norm")


@outside_inference_mode()
def predictive_distribution(
    model: Model,
    latents: Latents,
    subnet: Subnet,
    gaussian: Gaussian,
    call_arguments: tuple[tuple[Any, ...], Mapping[str, Any]],
    *,
    options: PredictiveOptions,
) -> Predictive:
    r"""Distribution of y at each input, the linearized outputs integrated out.

    .. math:: p(y \mid x) = \int p(y \mid \eta)\,
        N\big(\eta;\, \eta(x; \hat\theta),\, J(x) P^{-1} J(x)^\top\big)\, d\eta

    Args:
        model: The user's model.
        latents: Its latent sites at the MAP.
        subnet: The chosen elements.
        gaussian: The posterior over them.
        call_arguments: Positional and keyword arguments of the model.
        options: The link, and what it needs.

    Links: ``"exact"`` for Gaussian noise whose scale no subnet weight moves;
    ``"quadrature"`` for one scalar output an element, and for noise with one log scale
    in the subnet; ``"probit"``, ``"bridge"`` and ``"bridge-norm"`` for classes, from
    logits as the model gave them, ``"probit"`` for Bernoulli as well; ``"mc"`` for all.
    All but ``"exact"`` and ``"mc"`` go element by element: the elements of one datum
    are independent then. Masks of the site do not enter.

    Returns:
        Batch shape (N,), and events of a datum's shape at the site. If joint, no batch
        shape, and events of shape (N, *datum), in a row where the link is exact.

    Raises:
        OptionError: If the link is unknown or means nothing for the family.
        ModelError: If the site is not clear, or the subnet does not move it.
        NonFiniteError: If a parameter overflows where it is integrated.

    Source: Daxberger et al. (2021), eqs. 5 and 6, arXiv 2010.14689.
    """
    check_num_samples(options.num_samples)
    call = of_site(ModelCall.read(model, latents, *call_arguments), options.site)
    return predictive_of(outputs_of(call, subnet, gaussian), options)


def predictive_of(outputs: LinearizedOutputs, options: PredictiveOptions) -> Predictive:
    """The predictive distribution of some outputs.

    Args:
        outputs: What :func:`outputs_of` gave, perhaps with another Gaussian.
        options: The link, and what it needs.

    Returns:
        As :func:`predictive_distribution`.
    """
    (site,) = outputs.sites
    node = outputs.nodes[site.name]
    likelihood = Likelihood(
        SiteDistribution.of(node["fn"], node["value"]),
        site.family,
        outputs.moved[site.name],
        outputs.gaussian.loc,
        outputs.follows_inputs,
        options.noise_scale,
    )
    if likelihood.scales_noise:
        likelihood.noise_factor()
    return _Integration(outputs, likelihood, options).predictive()


@dataclass(frozen=True, eq=False)
class _Integration:
    """One observed site's outputs, likelihood and options."""

    outputs: LinearizedOutputs
    likelihood: Likelihood
    options: PredictiveOptions

    def predictive(self) -> Predictive:
        link = self._link()
        kind, moved = self.likelihood.family.distribution, self.likelihood.moved
        if link == "exact":
            return self._gaussian()
        if kind in _NORMALS and "log_scale" in moved:
            return self._log_scale_mixture()
        if link in {"probit", *_BRIDGES}:
            return self._classes(link)
        if link == "quadrature":
            return self._quadrature()
        return self._monte_carlo()

    def _link(self) -> str:
        """The link that was asked for, or the best of those that are possible."""
        asked, possible = self.options.link, self._possible()
        if asked is None:
            return possible[0]
        if asked not in possible:
            joint = " with joint=True" if self.options.joint else ""
            raise OptionError(
                f"`link` must be one of {', '.join(map(repr, possible))} for "
                f"{self.likelihood.family.distribution.__name__}{joint}; got "
                f"{asked!r}. Pass one of these, or leave it out."
            )
        return asked

    def _possible(self) -> tuple[str, ...]:
        """The links of this family, the best first."""
        likelihood, joint = self.likelihood, self.options.joint
        kind, moved = likelihood.family.distribution, tuple(likelihood.moved)
        if moved == ("loc",) and kind in {*_NORMALS, td.MultivariateNormal}:
            return ("exact", "mc")
        if kind in _NORMALS:
            return ("quadrature", "mc")
        if joint:
            return ("mc",)
        if kind in CLASSES:
            return ("probit", *_BRIDGES, "mc")
        own = likelihood.own()
        if len(moved) > 1 or own[moved[0]].shape[-1] > 1:
            return ("mc",)
        single = likelihood.per_datum == 1
        links = ("quadrature", "probit") if kind is td.Bernoulli else ("quadrature",)
        # Elements of one datum share the subnet: draws keep their correlation.
        return (*links, "mc") if single else ("mc", *links)

    def _gaussian(self) -> Predictive:
        """Gaussian noise of a scale that no subnet weight moves."""
        likelihood, joint = self.likelihood, self.options.joint
        own = likelihood.own()
        loc, factor = moments(self.outputs, joint=joint)
        event = likelihood.rest
        if likelihood.family.distribution is td.MultivariateNormal:
            noise = likelihood.argument("scale_tril", own)
            event = event + noise.shape[-1:]
        else:
            noise = own["log_scale"].exp().unsqueeze(-1)
        if likelihood.scales_noise:
            noise = noise * likelihood.noise_factor()[..., None, None]
        num_data, width = likelihood.shape[0], noise.shape[-1]
        noise = noise.reshape(*(() if joint else (num_data,)), -1, width, width)
        noise = _block_diagonal(noise)
        if joint:
            return Predictive(
                self._exponential(multivariate(loc, factor, noise)), "exact"
            )
        return Predictive(self._of_shape(noisy(loc, factor, noise), event), "exact")

    def _log_scale_mixture(self) -> Predictive:
        """Gaussian noise whose log scale is an output: integrated over that alone."""
        likelihood, joint = self.likelihood, self.options.joint
        split = LogScaleGaussian.split(*self._log_scales_first())
        if split.rank > 1 and self.options.link == "quadrature":
            raise OptionError(
                "`link='quadrature'` must have one log scale to integrate over; got "
                f"{split.rank} for each datum that differ. Pass `link='mc'`."
            )
        event = likelihood.shape if joint else likelihood.rest

        def mixed(z: Tensor, log_weights: Tensor) -> Any:
            return split.mixture(z, log_weights, lambda d: self._of_shape(d, event))

        def by_nodes(z: Tensor, log_weights: Tensor) -> Any:
            return mixed(z.unsqueeze(-1), log_weights)

        if split.rank == 1 and self.options.link != "mc":
            return _by_halves(lambda coarse: by_nodes(*_nodes(split.loc, coarse)))
        noise_shape = (*split.log_scale.shape[:-1], split.rank)
        z, log_weights = self._draws(noise_shape)
        found = mixed(z, log_weights)
        return Predictive(found, "mc", lambda y: standard_error(found, y))

    def _log_scales_first(self) -> tuple[Tensor, Tensor]:
        """Mean and factor of all log scales of a datum, then of all locs."""
        likelihood, joint = self.likelihood, self.options.joint
        loc, factor = moments(self.outputs, joint=joint)
        num_data, each = likelihood.shape[0], likelihood.per_datum
        own = {
            name: value.reshape(num_data, each)
            for name, value in likelihood.own().items()
        }
        width = len(likelihood.moved) * each
        columns = torch.arange(loc.shape[-1], device=loc.device)
        columns = columns.reshape(-1, width)
        by_part = dict(zip(likelihood.moved, columns.split(each, dim=-1), strict=True))
        means, rows = [], []
        for name in ("log_scale", "loc"):
            fixed = own[name].flatten() if joint else own[name]
            if name in by_part:
                at = by_part[name].flatten()
                means.append(loc[..., at])
                rows.append(factor[..., at, :])
            else:
                means.append(fixed)
                rows.append(factor.new_zeros(*fixed.shape, factor.shape[-1]))
        if likelihood.scales_noise:
            shift = likelihood.noise_factor().log()
            means[0] = means[0] + shift.reshape(means[0].shape)
        return torch.cat(means, dim=-1), torch.cat(rows, dim=-2)

    def _classes(self, link: str) -> Predictive:
        """Closed forms, element by element, from the logits as the model gave them."""
        likelihood = self.likelihood
        build = constructor(likelihood.taken, likelihood.family)
        if likelihood.family.distribution is td.Bernoulli:
            loc, scale = self._elementwise()
            found: Any = build(logits=probit(loc, scale.square()))
        else:
            loc, factor = moments(self.outputs, joint=False)
            shape = likelihood.shape
            loc = loc.unflatten(-1, (*likelihood.rest, -1))
            rows = factor.unflatten(-2, loc.shape[1:])
            if link == "probit":
                variance = rows.square().sum(-1)
                found = build(logits=probit(loc, variance))
            else:
                flat = lower_factor(rows.reshape(-1, *rows.shape[-2:]))
                flat = flat.reshape(*shape, *flat.shape[-2:])
                probs = bridge(loc, flat, normalized=link == "bridge-norm")
                found = build(probs=probs)
        return Predictive(_event(found, len(likelihood.rest)), link)

    def _quadrature(self) -> Predictive:
        """One scalar output an element: Gauss-Hermite, element by element."""
        likelihood = self.likelihood
        loc, scale = self._elementwise()
        inner = len(likelihood.rest)
        if likelihood.family.distribution is td.Bernoulli:
            build = constructor(likelihood.taken, likelihood.family)

            def integrated(coarse: bool) -> Any:
                logits = mean_logistic(loc, scale, coarse=coarse)
                return _event(build(logits=logits), inner)

            return _by_halves(integrated)

        def mixed(coarse: bool) -> Any:
            z, log_weights = _nodes(loc, coarse)
            eta = loc + scale * z.reshape(-1, *(1 for _ in loc.shape))
            flat = eta.reshape(len(z), len(loc), -1)
            return mixture(likelihood, flat, log_weights, len(likelihood.shape))

        return _by_halves(mixed)

    def _monte_carlo(self) -> Predictive:
        """Any family: draws of its outputs."""
        likelihood, options = self.likelihood, self.options
        if options.joint:
            with torch.set_grad_enabled(self.outputs.follows_inputs):
                eta = draw_functions(
                    self.outputs, options.num_samples, options.generator
                )
            log_weights = _equal(options.num_samples, eta)
        else:
            loc, factor = moments(self.outputs, joint=False)
            z, log_weights = self._draws(loc.shape)
            eta = loc + (factor @ z.unsqueeze(-1)).squeeze(-1)
        mixed = mixture(likelihood, eta, log_weights, 0 if options.joint else 1)

        def error(y: Tensor) -> Tensor:
            return standard_error(mixed, y)

        collapsed = None if options.joint or likelihood.rest else self._mean(mixed)
        return Predictive(mixed if collapsed is None else collapsed, "mc", error)

    def _mean(self, mixed: Any) -> Any:
        """A mixture of distributions over classes is one as well; None for others."""
        likelihood = self.likelihood
        kind = likelihood.family.distribution
        build = constructor(likelihood.taken, likelihood.family)
        if kind not in {td.Bernoulli, *CLASSES}:
            return None
        logits = mixed.component_distribution.logits
        count = math.log(self.options.num_samples)
        if kind is td.Bernoulli:
            one = torch.nn.functional.logsigmoid(logits).logsumexp(-1)
            zero = torch.nn.functional.logsigmoid(-logits).logsumexp(-1)
            return build(logits=one - zero)
        return build(logits=logits.log_softmax(-1).logsumexp(-2) - count)

    def _elementwise(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of a scalar output, shape (N, *rest)."""
        loc, factor = moments(self.outputs, joint=False)
        # Unlike a root of the variance, it has a gradient where that is zero.
        scale = torch.linalg.vector_norm(factor, dim=-1)
        shape = self.likelihood.shape
        return loc.reshape(shape), scale.reshape(shape)

    def _draws(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        count = self.options.num_samples
        like = self.likelihood.like
        z = standard_normal((count, *shape), like, self.options.generator)
        return z, _equal(count, z)

    def _of_shape(self, gaussian: Any, event: torch.Size) -> Any:
        """A Gaussian over a vector, on the event shape and the scale of y."""
        if isinstance(gaussian, dist.Independent):  # a single element
            base, batch = gaussian.base_dist, gaussian.batch_shape
            parts = [part.reshape(batch + event) for part in (base.loc, base.scale)]
            log = self.likelihood.family.distribution is td.LogNormal
            return _event((dist.LogNormal if log else dist.Normal)(*parts), len(event))
        found = self._exponential(gaussian)
        return found if len(event) == 1 else Reshaped(found, event)

    def _exponential(self, gaussian: Any) -> Any:
        if self.likelihood.family.distribution is td.LogNormal:
            return dist.TransformedDistribution(gaussian, [td.ExpTransform()])
        return gaussian


def _by_halves(integrated: Callable[[bool], Any]) -> Predictive:
    """A sum over nodes, with the difference that half of them make."""
    fine = integrated(False)

    def error(y: Tensor) -> Tensor:
        return (fine.log_prob(y) - integrated(True).log_prob(y)).abs()

    return Predictive(fine, "quadrature", error)


def _nodes(like: Tensor, coarse: bool) -> tuple[Tensor, Tensor]:
    """Nodes of a mixture and their log weights."""
    return gauss_hermite(NUM_NODES // 2 if coarse else NUM_NODES, like)


def _equal(count: int, like: Tensor) -> Tensor:
    """Log weights of equal draws."""
    return like.new_full((count,), -math.log(count))


def _event(d: Any, count: int) -> Any:
    return d.to_event(count) if count else d


def _block_diagonal(blocks: Tensor) -> Tensor:
    """Blocks (..., E, w, w) on a diagonal, (..., E w, E w)."""
    count, width = blocks.shape[-3], blocks.shape[-1]
    eye = torch.eye(count, dtype=blocks.dtype, device=blocks.device)
    spread = torch.einsum("...eij,ef->...eifj", blocks, eye)
    return spread.reshape(*blocks.shape[:-3], count * width, count * width)
