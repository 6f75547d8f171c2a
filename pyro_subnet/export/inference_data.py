"""Posteriors as ArviZ reads them: draws of the subnet, of predictions, of densities.

Needs the extra ``arviz``; the package imports this module on demand.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import arviz
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

from pyro_subnet.exceptions import (
    ChoiceWarning,
    ModelError,
    OptionError,
    shown,
    warn,
)
from pyro_subnet.export.groups import DrawnModel, Groups
from pyro_subnet.export.labels import (
    labels_along_axes,
    names_of_axes,
    names_of_sites,
)
from pyro_subnet.export.prior_draws import log_prior_at
from pyro_subnet.gaussians.base import standard_normal
from pyro_subnet.guides.posterior import AutoSubnetMultivariateNormal
from pyro_subnet.models.hybrid import HybridModel
from pyro_subnet.models.subnet_prior import SITE
from pyro_subnet.options import check_num_samples, is_count
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.modes import full_precision, outside_inference_mode
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.scaled_model import is_scalable
from pyro_subnet.tracing.trace import preserved_rng

Dims = Mapping[str, str | Sequence[str]]
Coords = Mapping[str, Any]


@torch.no_grad()
@outside_inference_mode()
@full_precision()
def to_inference_data(
    posterior: AutoSubnetMultivariateNormal,
    *args: Any,
    num_samples: int = 1000,
    linearized: bool = True,
    predictions_args: Any = None,
    prior: bool = True,
    chains: int = 1,
    coords: Coords | None = None,
    dims: Dims | None = None,
    sites: str | Sequence[str] | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> Any:
    r"""A Laplace posterior as ArviZ reads it: ``InferenceData``, or 1.x's ``DataTree``.

    Groups, for K draws :math:`\theta_k` of the subnet:

    - ``posterior``: for each site a variable of its name, with the elements that the
      subnet moves, as the model sees them (constrained). Axes ``("chain", "draw",
      "<site>_elem")``, labelled ``"3, 7"``; a scalar site has no third one, and one
      that ``dims`` names has its own axes. Where a constraint ties elements together (a
      simplex), all of these appear.
    - ``sample_stats``: ``lp``, :math:`\log q(\theta_k)` of the Laplace posterior, and
      ``log_importance_ratio``, :math:`\log p(y, \theta_k) - \log q(\theta_k)`, which is
      constant where the posterior is exact. The model is the user's under the
      posterior's ``prior_factor`` and ``noise_factor``, here and in all groups. The
      ratio is left out without data, and where a ``prior_factor`` is of a prior that is
      not normal, which no model has.
    - ``log_likelihood``: :math:`\log p(y_n \mid \theta_k)`, with an entry for each
      element of an observed site's batch, or of its first axis where all axes are its
      event's. Scales (``poutine.scale``, N/B of plates) do not enter; data that a mask
      or a scale of zero leaves out count 0. A ``pyro.factor`` in the data's plate adds
      to the one observed site there, or has a variable of its name.
    - ``posterior_predictive``, ``observed_data``, and ``constant_data``: draws of y, y,
      and the other tensor arguments whose first axis is as long as the data.
    - ``prior``, ``prior_predictive``: the subnet's elements as the user's model draws
      them, all others at the MAP, in one chain.
    - ``predictions``, ``predictions_constant_data``: y at ``predictions_args``.

    No array of K times D numbers is made: memory is for K S numbers, K times the data,
    and, for the network itself, one set of D weights at a time.

    Args:
        posterior: The posterior.
        args: Training data, as the model takes them; without observations there is no
            ``log_likelihood``.
        num_samples: K, over all chains.
        linearized: Whether all densities and predictions are those of
            ``posterior.linearized_model``, as in the paper, the prior's too; otherwise
            the network's own, with one run for each draw.
        predictions_args: Other inputs to predict at: a tensor, a tuple of arguments, a
            mapping of keyword arguments, or ``(args, kwargs)``.
        prior: Whether to draw the prior.
        chains: How many chains the draws are cut into. The draws are independent, and
            diagnostics of chains show no more than that.
        coords: Labels along axes, by their names: ``{"site": ["a", "b"]}``.
            ``predictions`` take none: their rows are numbered.
        dims: Names of axes by variable, of y, arguments and latent sites: ``{"y":
            ["site"]}``. A latent site that is named here is shown in its own shape, K
            times all its elements, those outside the subnet at the MAP; ArviZ has no
            diagnostics of draws that are constant.
        sites: Latent sites to show; by default all that hold chosen elements.
        seed: Seed of a random state of its own, which leaves the global one as it was;
            by default the global one is used.
        kwargs: Keyword arguments of the model.

    Returns:
        An ``arviz.InferenceData``; with ArviZ 1.0 and later, which have none, an
        ``xarray.DataTree`` of the same groups.

    Raises:
        OptionError: If the draws cannot be cut into that many chains, ``dims`` or
            ``coords`` do not fit the variables, or ``seed`` is no whole number.
        SelectionError: If one of ``sites`` holds no chosen element.
        SubnetError: If the model does not fit the posterior.

    Source: Kumar, Carroll, Hartikainen and Martin (2019), doi 10.21105/joss.01143, for
    the groups.
    """
    check_num_samples(num_samples)
    if not isinstance(posterior, AutoSubnetMultivariateNormal):
        raise OptionError(
            "`posterior` must be what `guide.laplace_approximation` returns; got "
            f"{shown(posterior)}. Pass it first, then the data."
        )
    if not is_count(chains) or num_samples % chains:
        divisor = int(chains) if is_count(chains) else 1
        raise OptionError(
            "`chains` must be positive and divide `num_samples`; got "
            f"chains={chains!r} and num_samples={num_samples}. Pass "
            f"num_samples={max(1, num_samples // divisor) * divisor}."
        )
    named = names_of_axes(dims), labels_along_axes(coords), names_of_sites(sites)
    source = DrawnModel(posterior.scaled_at_map, posterior.subnet, linearized)
    gaussian = posterior.gaussian
    with _random_numbers(seed):
        standard = standard_normal((num_samples, gaussian.size), gaussian.loc, None)
        theta = gaussian.draw(standard)
        log_q = gaussian.log_prob(theta).double()
        groups = Groups(source, chains, *named)
        drawn = groups.add_data(theta, args, kwargs)
        if not drawn.log_likelihood:
            warn(
                "`to_inference_data` has a `log_likelihood` for data alone; got no "
                "observations, so that `az.loo` and `az.compare` have nothing to go "
                "by. Pass what training takes, such as `(posterior, x, y)`, and other "
                "inputs as `predictions_args=`.",
                ChoiceWarning,
            )
        stats = {"lp": log_q}
        if drawn.log_likelihood and _is_scaled(groups.call):
            log_prior = log_prior_at(groups.call, source.subnet, theta)
            stats["log_importance_ratio"] = drawn.total + log_prior - log_q
        groups.add("sample_stats", stats)
        if predictions_args is not None:
            groups.add_predictions(theta, predictions_args)
        if prior:
            groups.add_prior(num_samples)
    return groups.joined(
        arviz,
        curvature=posterior.options.curvature,
        covariance=posterior.options.covariance,
        prior_factor=json.dumps(posterior.prior_factor),
        noise_factor=posterior.noise_factor,
        seed="global random state" if seed is None else int(seed),
    )


@torch.no_grad()
@outside_inference_mode()
@full_precision()
def from_hybrid_mcmc(
    mcmc: MCMC,
    posterior: AutoSubnetMultivariateNormal | HybridModel,
    *args: Any,
    linearized: bool | None = None,
    predictions_args: Any = None,
    prior: bool = True,
    coords: Coords | None = None,
    dims: Dims | None = None,
    sites: str | Sequence[str] | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> Any:
    """MCMC on a hybrid model as ArviZ reads it, to compare with Laplace.

    Groups, variables and labels are those of :func:`to_inference_data`, so that ArviZ
    can plot and compare both. ``sample_stats`` has ``lp``, the hybrid model's log
    density, if there are data, and ``diverging``, if the kernel reports it; each
    chain's acceptance rate is an attribute of the group.

    Args:
        mcmc: A finished run on ``posterior.hybrid_model()``.
        posterior: The posterior, or the hybrid model itself.
        args: Training data, as the model takes them.
        linearized: Whether the run was on a linearized hybrid model; by default as the
            hybrid model says, and False for a posterior.
        predictions_args: As for :func:`to_inference_data`.
        prior: Whether to draw the prior: as many draws as there are of the posterior.
        coords: As for :func:`to_inference_data`.
        dims: As for :func:`to_inference_data`.
        sites: As for :func:`to_inference_data`.
        seed: As for :func:`to_inference_data`.
        kwargs: Keyword arguments of the model.

    Returns:
        As :func:`to_inference_data`.

    Raises:
        OptionError: If the run has no draws of this subnet, or ``linearized`` is not
            the hybrid model's.
        ModelError: If a linearized hybrid model's parameters have left the MAP.
        SubnetError: If the model does not fit.
    """
    named = names_of_axes(dims), labels_along_axes(coords), names_of_sites(sites)
    source = _source_of(posterior, linearized)
    by_chain = _subnet_draws(mcmc, source.subnet)
    theta, chains = by_chain.flatten(0, 1), len(by_chain)
    with _random_numbers(seed):
        groups = Groups(source, chains, *named)
        drawn = groups.add_data(theta, args, kwargs)
        stats = {}
        if drawn.log_likelihood:
            log_prior = log_prior_at(groups.call, source.subnet, theta)
            stats["lp"] = drawn.total + log_prior
        found, rates = _diagnostics(mcmc, chains, by_chain.shape[1])
        groups.add("sample_stats", {**stats, **found}, **rates)
        if predictions_args is not None:
            groups.add_predictions(theta, predictions_args)
        if prior:
            groups.add_prior(len(theta))
    return groups.joined(
        arviz,
        sampler=_name_of(mcmc.kernel),
        seed="global random state" if seed is None else int(seed),
    )


@contextmanager
def _random_numbers(seed: int | None) -> Iterator[None]:
    """Seeds torch's random state for a while and restores it; None leaves it alone."""
    if seed is None:
        yield
        return
    if not isinstance(seed, Integral) or isinstance(seed, bool):
        raise OptionError(
            f"`seed` must be a whole number; got {shown(seed)}. Pass 0, say, or leave "
            "it out for the global random state."
        )
    with preserved_rng():
        torch.default_generator.manual_seed(int(seed))
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(int(seed))
        yield


def _is_scaled(call: ModelCall) -> bool:
    """Whether every prior with a factor is one that factors scale."""
    priors = ((name, call.trace.nodes[name]["fn"]) for name in call.latents.values)
    factors = call.at_map.factors.prior
    return all(factors.get(name, 1.0) == 1.0 or is_scalable(fn) for name, fn in priors)


def _source_of(
    posterior: AutoSubnetMultivariateNormal | HybridModel, linearized: bool | None
) -> DrawnModel:
    """The model that a run was on, at its parameters' present values."""
    if not isinstance(posterior, HybridModel):
        at_map = posterior.scaled_at_map
        return DrawnModel(at_map, posterior.subnet, bool(linearized))
    if linearized not in (None, posterior.linearized):
        raise OptionError(
            f"`linearized` must be the hybrid model's, {posterior.linearized}; got "
            f"{linearized}. Leave it out."
        )
    at_map = posterior.at_parameters()
    moved = not torch.equal(at_map.latents.loc, posterior.at_map.latents.loc)
    if moved and posterior.linearized:
        raise ModelError(
            "A linearized hybrid model must have its parameters at the MAP; got some "
            "that were trained. Fit a posterior anew at these values."
        )
    return DrawnModel(at_map, posterior.subnet, posterior.linearized)


def _subnet_draws(mcmc: MCMC, subnet: Subnet) -> Tensor:
    """Draws of the subnet by chain, shape (chains, draws, S)."""
    samples = mcmc.get_samples(group_by_chain=True)
    draws: Tensor | None = samples.get(SITE)
    if draws is None or draws.shape[-1] != subnet.size:
        came = {name: tuple(value.shape) for name, value in samples.items()}
        raise OptionError(
            f"`mcmc` must hold draws of site {SITE!r} with {subnet.size} elements; got "
            f"{came}. Run it on this posterior's `hybrid_model()`."
        )
    return draws


def _name_of(kernel: Any) -> str:
    """The sampler's name: a kernel made of Pyro's NUTS is one."""
    return NUTS.__name__ if isinstance(kernel, NUTS) else type(kernel).__name__


def _diagnostics(
    mcmc: MCMC, chains: int, draws: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Which draws diverged, and the chains' acceptance rates, if the kernel tells."""
    told = mcmc._diagnostics
    if any(chain is None for chain in told):
        told = [{}] * chains
    variables, attrs = {}, {}
    if all("divergences" in chain for chain in told):
        diverging = torch.zeros(chains, draws, dtype=torch.bool)
        for row, chain in zip(diverging, told, strict=True):
            row[torch.tensor(chain["divergences"], dtype=torch.long)] = True
        variables["diverging"] = diverging.flatten()
    if all("acceptance rate" in chain for chain in told):
        attrs["acceptance_rate"] = [float(c["acceptance rate"]) for c in told]
    return variables, attrs
