"""Posteriors in files, and back."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor
from torch.distributions import biject_to

from pyro_subnet.exceptions import CheckpointError, SelectionError
from pyro_subnet.files.fingerprint import (
    SiteRecord,
    check_names,
    check_sites,
    prior_kind,
    site_records,
)
from pyro_subnet.files.safe_file import Content, read_file, write_file
from pyro_subnet.fit.dispatch import FORM_MAKERS
from pyro_subnet.fit.summary import FitSummary
from pyro_subnet.guides.curvature import CurvatureGuide
from pyro_subnet.laplace.search import Tuning
from pyro_subnet.options import FitOptions
from pyro_subnet.subnet import Layout, Subnet
from pyro_subnet.tracing.trace import (
    Latents,
    Model,
    apart,
    preserved_rng,
    refuse_training_mode,
)

Guide = TypeVar("Guide", bound=CurvatureGuide)
KIND = "posterior"

# The axes of every tensor of a file, a letter each. Axes of one name have one length: D
# and S of the posterior, R rows, n sites, k weights whose priors couple, 5 numbers of
# the summary.
_AXES = {
    "loc": "D",
    "subnet_positions": "S",
    "prior_diagonal": "S",
    "prior_coupled": "k",
    "prior_columns": "Sk",
    "prior_gradient": "S",
    "fit_numbers": "5",
}
_BLOCK = re.compile(r"kronecker_block_\d+_")
# Those that a form has besides. A new form is one entry here and in `FORM_MAKERS`.
FORM_AXES = {
    "primal": {"factor_and_ggn": "SS", "ggn_diagonal": "S"},
    "dual": {"rows": "RS", "scaled_prior": "S", "kernel_tril": "RR"},
    "diagonal": {"ggn_diagonal": "S", "precision": "S"},
    "kronecker": {"kronecker_ggn": "D", "kronecker_prior": "D", "site_scales": "n"},
}
# Those of each Kronecker block, which has lengths p and q of its own.
_BLOCK_AXES = {
    "positions": "pq",
    "output_vectors": "pp",
    "output_values": "p",
    "input_vectors": "qq",
    "input_values": "q",
    "weight": "",
    "prior": "",
    "site": "",
}
_KEYS = (
    "sites",
    "form",
    "prior_scale",
    "noise_scale",
    "options",
    "explained_variance",
    "tuning",
)
_INTEGER = ("subnet_positions", "prior_coupled", "positions", "site")
_TUNING = ("tuning_scales", "tuning_objective")


def save_posterior(guide: CurvatureGuide, path: str | os.PathLike[str]) -> None:
    """Writes all that a posterior is, whole or not at all.

    Args:
        guide: The posterior.
        path: Where to.

    Raises:
        CheckpointError: If it cannot be written.
    """
    tensors = {
        "loc": guide.loc,
        "subnet_positions": guide.subnet_positions,
        **guide.form.tensors(),
        **guide.summary.tensors(),
    }
    scale = guide.prior_scale
    content: Content = {
        "sites": site_records(guide),
        "form": guide.form_name,
        "prior_scale": (
            {site: float(number) for site, number in scale.items()}
            if isinstance(scale, Mapping)
            else float(scale)
        ),
        "noise_scale": float(guide.noise_scale),
        "options": asdict(guide.options),
        "explained_variance": guide.explained_variance,
        "tuning": None,
    }
    if (tuning := guide.tuning) is not None:
        tensors.update(tuning_scales=tuning.scales, tuning_objective=tuning.objective)
        content["tuning"] = {
            "method": tuning.method,
            "best": float(tuning.best),
            "at_bound": bool(tuning.at_bound),
            "is_flat": bool(tuning.is_flat),
            "by_site": (
                None
                if tuning.by_site is None
                else {site: float(number) for site, number in tuning.by_site.items()}
            ),
        }
    write_file(path, KIND, tensors, content)


@torch.inference_mode(False)
def load_posterior(
    cls: type[Guide],
    path: str | os.PathLike[str],
    model: Model,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Guide:
    """Makes a posterior of what a file holds and of the model that it was fitted to.

    Args:
        cls: Of the posterior.
        path: Where from.
        model: The user's model, which runs once.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        The posterior, on the device of the model's latent sites.

    Raises:
        CheckpointError: If the file is none of ours, truncated, altered, newer, or of
            another model.
        FileNotFoundError: If there is none.
    """
    tensors, content = read_file(path, KIND)
    _check_tensors(tensors, content)
    sites = content["sites"]
    prototype = _prototype(model, args, kwargs, sites, tensors["loc"])
    check_sites(site_records(prototype), sites)
    _, node = next(iter(prototype.prototype_trace.iter_stochastic_nodes()))
    device = node["value"].device
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    layout = Latents.from_guide(prototype, moved["loc"]).layout
    new = cls(model, prototype)
    new._register(
        loc=moved["loc"], subnet_positions=_checked_subnet(layout, moved).flat
    )
    new._hold(
        FORM_MAKERS[content["form"]](moved, layout), FitSummary.from_tensors(moved)
    )
    new.prior_scale = content["prior_scale"]
    new.noise_scale = content["noise_scale"]
    new.options = FitOptions(**content["options"])
    new.explained_variance = content["explained_variance"]
    if content["tuning"] is not None:
        scales, objective = (tensors[name] for name in _TUNING)
        new.tuning = Tuning(scales=scales, objective=objective, **content["tuning"])
    return new


def _prototype(
    model: Model,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    sites: list[SiteRecord],
    loc: Tensor,
) -> AutoContinuous:
    """A guide set up by one run of the model at the MAP, apart from everything."""
    shapes = tuple(torch.Size(site["unconstrained"]) for site in sites)
    layout = Layout(tuple(site["name"] for site in sites), shapes)
    if layout.num_params != len(loc):
        raise CheckpointError(
            f"The file must hold a value for each element of its sites, "
            f"{layout.num_params}; got {len(loc)}. Take another copy of it."
        )
    pieces = layout.unpack(loc)

    expected = {site["name"]: site for site in sites}

    def start(site: dict[str, Any]) -> Tensor:
        name, fn = site["name"], site["fn"]
        if name not in pieces or fn.support.is_discrete:
            # Another model's site: its error comes when the sites are compared.
            return fn.sample()
        dtype, device = prior_kind(fn, pieces[name])
        transform = biject_to(fn.support)
        fits = transform.inverse_shape(fn.shape()) == pieces[name].shape
        if fits and str(dtype) == expected[name]["dtype"]:
            return transform(pieces[name].to(device))
        return fn.sample()

    guide = AutoContinuous(model, start)
    try:
        with torch.no_grad(), preserved_rng(), apart(), refuse_training_mode():
            guide._setup_prototype(*args, **kwargs)
    except ValueError:
        # A discrete site ends the set-up before the sites are compared.
        if guide.prototype_trace is not None:
            nodes = guide.prototype_trace.iter_stochastic_nodes()
            check_names([name for name, _ in nodes], list(layout.names))
        raise
    return guide


def _checked_subnet(layout: Layout, tensors: Mapping[str, Tensor]) -> Subnet:
    positions = tensors["subnet_positions"]
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
    return subnet


def _axes(form: str, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Names of the axes of each tensor that a form's file has."""
    axes = {name: tuple(own) for name, own in {**_AXES, **FORM_AXES[form]}.items()}
    blocks = {found.group() for found in map(_BLOCK.match, tensors) if found}
    if form == "kronecker":
        for block in blocks:
            for part, own in _BLOCK_AXES.items():
                axes[block + part] = tuple(block + letter for letter in own)
    return axes


def _check_tensors(tensors: Mapping[str, Tensor], content: Content) -> None:
    """Holds names, shapes and kinds of numbers to what a posterior has."""
    if missing := [key for key in _KEYS if key not in content]:
        raise CheckpointError(
            f"The file must hold {', '.join(_KEYS)}; got none of {missing}. Take "
            "another copy of it."
        )
    form = content["form"]
    if form not in FORM_MAKERS:
        raise CheckpointError(
            f"The file's form must be one of {', '.join(map(repr, FORM_MAKERS))}; got "
            f"{form!r}. Upgrade pyro_subnet."
        )
    axes = _axes(form, tensors)
    found = set(tensors) - set(_TUNING)
    if found != set(axes):
        raise CheckpointError(
            f"The file must hold the tensors {sorted(axes)}; got {sorted(found)}. Take "
            "another copy of it."
        )
    lengths = {"5": 5}
    for name, letters in axes.items():
        part = _BLOCK.sub("", name)
        shape, whole = tensors[name].shape, part in _INTEGER
        fits = len(shape) == len(letters) and all(
            lengths.setdefault(letter, length) == length
            for letter, length in zip(letters, shape, strict=True)
        )
        if not fits or whole == tensors[name].is_floating_point():
            wanted = [str(lengths.get(letter, letter)) for letter in letters]
            raise CheckpointError(
                f"The file's tensor {name!r} must have shape ({', '.join(wanted)}) of "
                f"{'integers' if whole else 'floating point'}; got {tuple(shape)} of "
                f"{tensors[name].dtype}. Take another copy of it."
            )
