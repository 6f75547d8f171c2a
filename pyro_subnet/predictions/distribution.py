"""Predictive distributions over y: which link a likelihood takes, and its answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch.distributions as td

from pyro_subnet.exceptions import ModelError, OptionError
from pyro_subnet.predictions.links.bridge import by_bridge
from pyro_subnet.predictions.links.exact import exact
from pyro_subnet.predictions.links.integration import (
    Integrated,
    Integration,
    PredictiveOptions,
)
from pyro_subnet.predictions.links.likelihood import CLASSES, Likelihood
from pyro_subnet.predictions.links.log_scale import over_log_scale
from pyro_subnet.predictions.links.monte_carlo import by_draws
from pyro_subnet.predictions.links.pairwise import by_pairs
from pyro_subnet.predictions.links.probit import by_probit
from pyro_subnet.predictions.links.quadrature import by_quadrature
from pyro_subnet.tracing.call import ModelCall

_NORMALS = (td.Normal, td.LogNormal)
_LINKS: dict[str, Callable[[Integration], Integrated]] = {
    "exact": exact,
    "probit": by_probit,
    "pairwise": by_pairs,
    "bridge": by_bridge,
    "bridge-norm": by_bridge,
    "quadrature": by_quadrature,
    "mc": by_draws,
}


def predictive_distribution(problem: Integration) -> Integrated:
    r"""Returns the distribution of y at each input, the outputs integrated out.

    .. math:: p(y \mid x) = \int p(y \mid \eta)\,
        N\big(\eta;\, \eta(x; \hat\theta),\, J(x) P^{-1} J(x)^\top\big)\, d\eta

    Its batch shape is (N,), and its events have a data point's shape at the site. If
    joint, one event holds all data points, flattened by the exact link. Masks do not
    enter.

    Source: Daxberger et al. (2021), eqs. 5 and 6, arXiv 2010.14689.
    """
    link = _link(problem.likelihood, problem.options)
    if link != "exact" and _is_scale_moved(problem.likelihood):
        return over_log_scale(problem)
    return _LINKS[link](problem)


def of_site(call: ModelCall, name: str | None) -> ModelCall:
    """A call with one observed site alone, the only one if ``name`` is None."""
    names = [site.name for site in call.sites]
    if name is None and len(names) != 1:
        raise ModelError(
            "A predictive distribution is over one observed site; got a model that "
            f"has {len(names)}: {names}. Name one with `site=`."
        )
    chosen = tuple(site for site in call.sites if name in {None, site.name})
    if not chosen:
        raise ModelError(
            f"`site` must name an observed site, of which the model has {names}; got "
            f"{name!r}. Pass one of these."
        )
    return replace(call, sites=chosen)


def _is_scale_moved(likelihood: Likelihood) -> bool:
    return (
        likelihood.family.distribution in _NORMALS and "log_scale" in likelihood.moved
    )


def _link(likelihood: Likelihood, options: PredictiveOptions) -> str:
    """The link that was asked for, or the best of those that are possible."""
    possible = _possible(likelihood, options.joint)
    if not isinstance(options.joint, bool):
        if possible[0] != "exact":
            raise OptionError(
                f"`joint` must be a bool for {likelihood.family.distribution.__name__} "
                f"whose {', '.join(likelihood.moved)} the subnet moves; got "
                f"{options.joint}. A number takes Gaussian noise of a fixed scale."
            )
        possible = ("exact",)
    if options.link is None:
        return possible[0]
    if options.link not in possible:
        joint = "" if options.joint is False else f" with joint={options.joint}"
        raise OptionError(
            f"`link` must be one of {', '.join(map(repr, possible))} for "
            f"{likelihood.family.distribution.__name__}{joint}; got "
            f"{options.link!r}. Pass one of these, or leave it out."
        )
    return options.link


def _possible(likelihood: Likelihood, joint: bool | int) -> tuple[str, ...]:
    """The links of a family, the best first."""
    kind, moved = likelihood.family.distribution, tuple(likelihood.moved)
    # exact: Gaussian noise of a fixed scale. quadrature: one scalar output an element,
    # or one log scale of the noise. probit, bridge: logits as the model gave them. All
    # but exact and mc take the elements of a data point for independent.
    if moved == ("loc",) and kind in {*_NORMALS, td.MultivariateNormal}:
        return ("exact", "mc")
    if kind in _NORMALS:
        return ("quadrature", "mc")
    if joint:
        return ("mc",)
    if kind in CLASSES:
        return ("probit", "pairwise", "bridge", "bridge-norm", "mc")
    if len(moved) > 1 or likelihood.own()[moved[0]].shape[-1] > 1:
        return ("mc",)
    # Of several elements a data point, too: what most ask for is each one's marginal,
    # which quadrature has to 1e-13, the same in every call.
    return ("quadrature", *(["probit"] if kind is td.Bernoulli else []), "mc")
