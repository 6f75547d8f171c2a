"""Posteriors in files, and back."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from typing import Any

import torch
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor
from torch.distributions import biject_to

from pyro_subnet.exceptions import CheckpointError, ModelError, SelectionError
from pyro_subnet.files.constants import check_constants, constants_of
from pyro_subnet.files.fields import POSTERIOR, TUNING, check_fields
from pyro_subnet.files.fingerprint import (
    SiteRecord,
    check_names,
    check_sites,
    prior_kind,
    site_records,
)
from pyro_subnet.files.safe_file import Content, read_file, write_file
from pyro_subnet.gaussians.registry import FORMS
from pyro_subnet.laplace.search import Tuning
from pyro_subnet.laplace.state import PosteriorFacts, PosteriorState
from pyro_subnet.options import FitOptions
from pyro_subnet.subnet import Layout, Subnet
from pyro_subnet.tensors.stored import check_stored
from pyro_subnet.tracing.set_up import set_up
from pyro_subnet.tracing.trace import (
    Latents,
    Model,
    apart,
    preserved_rng,
    refuse_training_mode,
)

KIND = "posterior"

# The axes of every tensor of a file but those of its form, a letter each. Axes of one
# name have one length: D and S of the posterior, k weights whose priors couple, 5
# numbers of the summary.
_AXES = {
    "loc": "D",
    "subnet_positions": "S",
    "prior_diagonal": "S",
    "prior_coupled": "k",
    "prior_columns": "Sk",
    "prior_gradient": "S",
    "fit_numbers": "5",
}
# Tensors of whole numbers, by the end of their names.
_INTEGER = ("subnet_positions", "prior_coupled", "_positions", "_site")
# Where the records of tuning stand, in order; one of the two factors each.
_TUNINGS = ("tuning_before", "tuning")


def save_posterior(
    state: PosteriorState, guide: AutoContinuous, path: str | os.PathLike[str]
) -> None:
    """Writes all that a posterior is, whole or not at all."""
    facts, tensors = state.facts, state.tensors()
    content: Content = {
        "sites": site_records(guide),
        "form": facts.form,
        "prior_scale": _plain(facts.prior_factor),
        "noise_scale": float(facts.noise_factor),
        "options": asdict(facts.options),
        "explained_variance": facts.explained_variance,
        **dict.fromkeys(_TUNINGS),
        "chosen_by": facts.chosen_by,
        "num_seen": facts.num_seen,
    }
    records = reversed(facts.tunings.items())
    for name, (of, tuning) in zip(reversed(_TUNINGS), records, strict=False):
        tensors[f"{name}_scales"] = tuning.scales
        tensors[f"{name}_objective"] = tuning.objective
        content[name] = {
            "of": of,
            "method": tuning.method,
            "best": float(tuning.best),
            "at_bound": bool(tuning.at_bound),
            "is_flat": bool(tuning.is_flat),
            "by_site": None if tuning.by_site is None else _plain(tuning.by_site),
        }
    # An unpickled guide has left its model behind.
    with suppress(ModelError):
        model: Any = guide.user_model
        content["constants"] = constants_of(model)
    write_file(path, KIND, tensors, content)


@torch.inference_mode(False)
def load_posterior(
    path: str | os.PathLike[str],
    model: Model,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[AutoContinuous, PosteriorState]:
    """A guide that one run of the model has set up, and the file's posterior."""
    tensors, content = read_file(path, KIND)
    # Fields that files of an earlier version lack.
    content = {"chosen_by": None, "num_seen": None, "tuning_before": None, **content}
    _check_tensors(tensors, content)
    sites = content["sites"]
    prototype = _prototype(model, args, kwargs, sites, tensors["loc"])
    check_sites(site_records(prototype), sites)
    check_constants(constants_of(model), content.get("constants"))
    _, node = next(iter(prototype.prototype_trace.iter_stochastic_nodes()))
    # The posterior goes where the model's latent sites are.
    moved = {name: tensor.to(node["value"].device) for name, tensor in tensors.items()}
    layout = Latents.from_guide(prototype, moved["loc"]).layout
    check_subnet(layout, moved["subnet_positions"])
    share = content["explained_variance"]
    facts = PosteriorFacts(
        content["form"],
        FitOptions(**content["options"]),
        _plain(content["prior_scale"]),
        float(content["noise_scale"]),
        None if share is None else float(share),
        {told["of"]: _tuning(name, told, tensors) for name, told in _tunings(content)},
        content["chosen_by"],
        content["num_seen"],
    )
    state = PosteriorState.from_tensors(moved, facts, layout)
    _check_state(state)
    return prototype, state


def _check_state(state: PosteriorState) -> None:
    """Refuses tensors and factors that do not belong together."""
    prior = state.form.prior
    names = set(state.subnet.layout.names)
    by_site = isinstance(state.prior_factor, Mapping) and set(state.prior_factor)
    known = not by_site or by_site <= names
    held_as = state.options.held_as
    asked = {"primal", "dual"} if held_as == "auto" else {held_as}
    if not (
        known
        and state.form.name in asked
        and prior.is_consistent
        and state.form.is_consistent(state.factor_for_form)
    ):
        raise CheckpointError(
            "The file's curvature, factors and options must belong together; got a "
            f"{state.form.name} form of S={state.subnet.size} that is not what they "
            "make. Take another copy of it."
        )


def _tunings(content: Content) -> list[tuple[str, Content]]:
    """What is told of each tuning, the last one last, by the name of its tensors."""
    told = [(name, content[name]) for name in _TUNINGS if content[name] is not None]
    # A file of an earlier version does not say of what: it gives one of the factors.
    prior, noise = content["prior_scale"], content["noise_scale"]
    return [
        (
            name,
            {"of": "noise" if prior != each.get("best") == noise else "prior", **each},
        )
        for name, each in told
    ]


def _tuning(name: str, told: Content, tensors: Mapping[str, Tensor]) -> Tuning:
    names = [field.name for field in fields(Tuning)]
    numbers = {key: told[key] for key in names if key in TUNING}
    scales, objective = tensors[f"{name}_scales"], tensors[f"{name}_objective"]
    return Tuning(scales=scales, objective=objective, **numbers)


def _plain(factor: float | Mapping[str, float]) -> float | dict[str, float]:
    """One factor, or one for each site, as JSON holds them."""
    if isinstance(factor, Mapping):
        return {site: float(number) for site, number in factor.items()}
    return float(factor)


def _prototype(
    model: Model,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    sites: list[SiteRecord],
    loc: Tensor,
) -> AutoContinuous:
    """A guide that one run of the model at the MAP sets up, apart from everything."""
    # As Python's numbers: torch's sizes overflow.
    size = sum(math.prod(site["unconstrained"]) for site in sites)
    if size != len(loc):
        raise CheckpointError(
            "The file must hold a value for each element of its sites, "
            f"{size}; got {len(loc)}. Take another copy of it."
        )
    shapes = tuple(torch.Size(site["unconstrained"]) for site in sites)
    layout = Layout(tuple(site["name"] for site in sites), shapes)
    pieces = layout.unpack(loc)

    expected = {site["name"]: site for site in sites}
    mixed = len({site["dtype"] for site in sites}) > 1

    def start(site: dict[str, Any]) -> Tensor:
        name, fn = site["name"], site["fn"]
        if name not in pieces or fn.support.is_discrete:
            # Another model's site: its error comes when the sites are compared.
            return fn.sample()
        dtype, device = prior_kind(fn, pieces[name])
        transform = biject_to(fn.support)
        fits = transform.inverse_shape(fn.shape()) == pieces[name].shape
        if fits and str(dtype) == expected[name]["dtype"]:
            # Sites of several types were packed in the widest: each goes back to its
            # own. Those of one type may have been started in another than the prior's.
            own = dtype if mixed else loc.dtype
            value = transform(pieces[name].to(device, own))
            if not bool(fn.support.check(value).all() & value.isfinite().all()):
                raise CheckpointError(
                    f"The file's MAP of site {name!r} must lie in its support; got "
                    "values that do not. Take another copy of it."
                )
            return value
        return fn.sample()

    guide = AutoContinuous(model, start)
    try:
        with torch.no_grad(), preserved_rng(), apart(), refuse_training_mode():
            set_up(guide, guide._setup_prototype, model, (args, dict(kwargs)), loc)
    except ValueError:
        # A discrete site ends the set-up before the sites are compared.
        if guide.prototype_trace is not None:
            nodes = guide.prototype_trace.iter_stochastic_nodes()
            check_names([name for name, _ in nodes], list(layout.names))
        raise
    return guide


def check_subnet(layout: Layout, positions: Tensor) -> None:
    """Refuses positions that are not those of a subnet, in ascending order."""
    try:
        subnet = Subnet.from_positions(layout, positions)
    except SelectionError as error:
        raise CheckpointError(
            f"The file must hold positions of a subnet; got others: {error}"
        ) from error
    if not torch.equal(subnet.flat, positions):
        raise CheckpointError(
            "The file's subnet positions must ascend; got others. Take another copy of "
            "the file."
        )


def _check_tensors(tensors: Mapping[str, Tensor], content: Content) -> None:
    """Checks names, shapes and numbers against what a posterior has."""
    check_fields(content, POSTERIOR)
    axes = {name: tuple(letters) for name, letters in _AXES.items()}
    axes |= FORMS[content["form"]].axes_of(tensors)
    whole = {name: torch.int64 for name in axes if name.endswith(_INTEGER)}
    # What was tried may be impossible, and so may the data be.
    infinite = ["fit_numbers"]
    tuned = _tunings(content)
    for name, told in tuned:
        check_fields(told, TUNING, f"{name}.")
        # One scale a trial, or one for each site.
        scales = tensors.get(f"{name}_scales")
        by_site = scales is not None and scales.ndim > 1
        tried = f"K of {name}"
        axes[f"{name}_scales"] = (tried, "sites") if by_site else (tried,)
        axes[f"{name}_objective"] = (tried,)
        infinite.append(f"{name}_objective")
    check_stored(tensors, axes, whole, {"5": 5}, tuple(infinite))
    positive = all(bool((tensors[f"{name}_scales"] > 0).all()) for name, _ in tuned)
    positive &= len({told["of"] for _, told in tuned}) == len(tuned)
    likelihood, *rest = tensors["fit_numbers"].tolist()
    if not (positive and likelihood < math.inf and all(map(math.isfinite, rest))):
        raise CheckpointError(
            "The file's fit and tuning must be numbers that a fit gives; got "
            f"{[likelihood, *rest]}. Take another copy of it."
        )
