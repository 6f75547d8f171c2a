"""Outputs of a model at draws of its subnet, as groups of named arrays."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from types import ModuleType
from typing import Any, final

import pyro
import torch
import xarray
from numpy.typing import NDArray
from torch import Tensor, nn

from pyro_subnet._version import __version__
from pyro_subnet.export.arrays import container, dataset, element_labels
from pyro_subnet.export.labels import check_labels
from pyro_subnet.export.output_draws import OutputDraws
from pyro_subnet.export.prior_draws import draw_prior
from pyro_subnet.export.subnet_values import site_elements
from pyro_subnet.subnet import Subnet
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.data import arguments
from pyro_subnet.tracing.data_values import check_data
from pyro_subnet.tracing.trace import ModelAtMAP


@final
@dataclass(frozen=True, eq=False)
class DrawnModel:
    """The model whose draws are shown; it gives the elements outside the subnet."""

    at_map: ModelAtMAP
    subnet: Subnet
    linearized: bool  # whether outputs are first-order expansions about the MAP


@final
@dataclass(eq=False)
class Groups:
    """The groups made so far, of one model and one set of draws."""

    source: DrawnModel
    chains: int  # that the posterior's draws are cut into
    dims: dict[str, Sequence[str]]  # names of axes, by variable
    coords: dict[str, Any]  # labels along axes, by their names; grows
    sites: Sequence[str] | None  # latent sites to show; None for all with elements
    found: dict[str, xarray.Dataset] = field(default_factory=dict)
    call: ModelCall = field(init=False)  # on the training data, by `add_data`

    def add(
        self,
        name: str,
        variables: Mapping[str, Tensor],
        *,
        chains: int | None = None,
        **attrs: Any,
    ) -> None:
        """Adds a group unless it is empty. All but data have draws on axis 0."""
        if not variables:
            return
        is_data, dims = name.endswith("_data"), dict(self.dims)
        if name in {"posterior", "prior"}:
            names = self.source.subnet.layout.names
            dims = {site: [f"{site}_elem"] for site in names} | dims
        self.found[name] = dataset(
            {key: _array(value) for key, value in variables.items()},
            chains=None if is_data else chains or self.chains,
            dims=dims,
            coords={} if name.startswith("predictions") else self.coords,
            attrs=attrs,
        )

    def add_data(
        self, theta: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> OutputDraws:
        """Adds draws theta, (K, S), at the training data; the observed sites there."""
        self.call = ModelCall.read(self.source.at_map, args, kwargs)
        check_labels(self.dims, self.coords, _shapes(self.call))
        for site in self.call.sites:
            check_data(site)
        self._add_elements("posterior", theta, self.chains)
        drawn = self._at_draws(self.call, theta)
        drawn = drawn.with_factors(self.call, self.source.subnet, theta)
        self.add("posterior_predictive", drawn.samples)
        self.add("log_likelihood", drawn.log_likelihood)
        observed = {
            site.name: site.node["value"]
            for site in self.call.sites
            if site.node["is_observed"]
        }
        self.add("observed_data", observed)
        self.add("constant_data", _constant_data(self.call))
        return drawn

    def add_predictions(self, theta: Tensor, predictions_args: Any) -> None:
        """Adds predictions at another call's arguments under draws theta, (K, S)."""
        call = ModelCall.read(self.source.at_map, *arguments(predictions_args))
        self.add("predictions", self._at_draws(call, theta).samples)
        self.add("predictions_constant_data", _constant_data(call))

    def add_prior(self, count: int) -> None:
        """Adds that many draws of the prior, in one chain."""
        theta = draw_prior(self.call, self.source.subnet, count)
        self._add_elements("prior", theta, 1)
        samples = self._at_draws(self.call, theta).samples
        self.add("prior_predictive", samples, chains=1)

    def joined(self, arviz: ModuleType, **attrs: Any) -> Any:
        """All groups in ArviZ's own container, with the attributes common to all."""
        subnet = self.source.subnet
        known = {
            "created_at": datetime.now(timezone.utc).isoformat(),
            "inference_library": "pyro_subnet",
            "inference_library_version": __version__,
            "arviz_version": arviz.__version__,
            "pyro_version": pyro.__version__,
            "torch_version": str(torch.__version__),
            "num_subnet": subnet.size,
            "num_params": subnet.num_params,
            "linearized": int(self.source.linearized),  # netCDF knows no bool
            **attrs,
        }
        groups = {
            name: group.assign_attrs({**known, **group.attrs})
            for name, group in self.found.items()
        }
        return container(arviz, groups, known)

    def _add_elements(self, name: str, theta: Tensor, chains: int) -> None:
        latents, subnet = self.source.at_map.latents, self.source.subnet
        elements = site_elements(latents, subnet, theta, self.sites, self.dims)
        variables = {}
        for site, part in elements.items():
            if site in self.dims or not part.shape:
                variables[site] = part.values.reshape(-1, *part.shape)
                continue
            where = part.positions.tolist()
            self.coords[f"{site}_elem"] = element_labels(where, part.shape)
            variables[site] = part.values
        self.add(name, variables, chains=chains)

    def _at_draws(self, call: ModelCall, theta: Tensor) -> OutputDraws:
        source = self.source
        return OutputDraws.of(
            call,
            source.subnet,
            theta,
            linearized=source.linearized,
        )


def _shapes(call: ModelCall) -> dict[str, torch.Size]:
    """Shapes of what a user may name the axes of: sites, and tensor arguments."""
    latents = call.latents
    found = {
        name: latents.transforms[name].forward_shape(value.shape)
        for name, value in latents.values.items()
    }
    for site in call.sites:
        taken = site.distribution
        found[site.name] = taken.element_shape + taken.base.event_shape
    for name, node in call.factors.items():
        found[name] = node["fn"].batch_shape
    named = _named(_by_parameter(call))
    return {name: leaf.shape for name, leaf in named} | found


def _array(value: Tensor) -> NDArray[Any]:
    value = value.detach().cpu()
    if value.dtype == torch.bfloat16:  # numpy has none
        value = value.float()
    return value.resolve_conj().resolve_neg().numpy()


def _constant_data(call: ModelCall) -> dict[str, Tensor]:
    """Unobserved tensors of a call that have a row for each data point, by name."""
    lengths = {site.leading for site in call.sites}
    observed = [site.node["value"] for site in call.sites if site.node["is_observed"]]
    return {
        name: leaf
        for name, leaf in _named(_by_parameter(call))
        if leaf.ndim
        and len(leaf) in lengths
        and not any(_is_same(leaf, value) for value in observed)
    }


def _by_parameter(call: ModelCall) -> Mapping[str, Any]:
    """Arguments of a call by the names of the model's parameters."""
    model = call.at_map.model
    model = model.forward if isinstance(model, nn.Module) else model
    try:
        bound = inspect.signature(model).bind(*call.args, **call.kwargs)
    except (TypeError, ValueError):  # a callable without a usable signature
        numbered = {f"arg_{i}": value for i, value in enumerate(call.args)}
        return {**numbered, **call.kwargs}
    return bound.arguments


def _named(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors inside mappings and sequences, named as ``batch.x`` or ``args.0``."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping | tuple | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _named(item, f"{name}.{key}" if name else str(key))


def _is_same(leaf: Tensor, value: Tensor) -> bool:
    same = leaf is value or leaf.data_ptr() == value.data_ptr()
    return leaf.shape == value.shape and (same or torch.equal(leaf.to(value), value))
