"""What a model says at draws of its subnet, as groups of named arrays."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from types import ModuleType
from typing import Any

import pyro
import torch
import xarray
from numpy.typing import NDArray
from torch import Tensor, nn

from pyro_subnet._version import __version__
from pyro_subnet.export.arrays import container, dataset, element_labels
from pyro_subnet.export.output_draws import OutputDraws
from pyro_subnet.export.prior_draws import draw_prior
from pyro_subnet.export.subnet_values import site_elements
from pyro_subnet.subnet import Subnet
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.data import arguments
from pyro_subnet.tracing.trace import Latents, Model


@dataclass(frozen=True, eq=False)
class DrawnModel:
    """The model whose draws are shown.

    Attributes:
        model: The user's model.
        latents: Its latent sites; other elements than the chosen are taken from there.
        subnet: The chosen elements.
        linearized: Whether outputs are first-order expansions about ``latents``.
        noise_scale: What normal noise is multiplied by in the linearized model.
    """

    model: Model
    latents: Latents
    subnet: Subnet
    linearized: bool
    noise_scale: float = 1.0


@dataclass(eq=False)
class Groups:
    """The groups made so far, of one model and one set of draws.

    Attributes:
        source: The model.
        chains: How many chains the posterior's draws are cut into.
        dims: Names of axes, by variable.
        coords: Labels along axes, by their names.
        sites: Latent sites to show; None for all that hold chosen elements.
        found: The groups.
        call: The call on the training data; set by :meth:`add_data`.
    """

    source: DrawnModel
    chains: int
    dims: dict[str, Sequence[str]]
    coords: dict[str, Any]
    sites: Sequence[str] | None
    found: dict[str, xarray.Dataset] = field(default_factory=dict)
    call: ModelCall = field(init=False)

    def add(
        self,
        name: str,
        variables: Mapping[str, Tensor],
        *,
        chains: int | None = None,
        **attrs: Any,
    ) -> None:
        """Adds a group, if it has any variable.

        Args:
            name: Of the group.
            variables: With draws on the first axis, unless they are data.
            chains: How many chains; by default the posterior's.
            attrs: What is known of the group.
        """
        if not variables:
            return
        is_data = name.endswith("_data")
        own: dict[str, Sequence[str]] = {**self.dims, **_elem_dims(self.source.subnet)}
        coords = self.coords
        if name.startswith("predictions"):
            coords = {}
        self.found[name] = dataset(
            {key: _array(value) for key, value in variables.items()},
            chains=None if is_data else chains or self.chains,
            dims=own if name in {"posterior", "prior"} else self.dims,
            coords=coords,
            attrs=attrs,
        )

    def add_data(
        self, theta: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> OutputDraws:
        """Adds the groups of the posterior's draws at the training data.

        Args:
            theta: The draws, chain by chain, shape (K, S).
            args: Positional arguments of the model.
            kwargs: Its keyword arguments.

        Returns:
            The observed sites at the draws.
        """
        self.call = self._read(args, kwargs)
        self._add_elements("posterior", theta, self.chains)
        drawn = self._at_draws(self.call, theta)
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
        """Adds the groups of the posterior's draws at other inputs.

        Args:
            theta: The draws, as for :meth:`add_data`.
            predictions_args: What one call of the model takes.
        """
        call = self._read(*arguments(predictions_args))
        self.add("predictions", self._at_draws(call, theta).samples)
        self.add("predictions_constant_data", _constant_data(call))

    def add_prior(self, count: int) -> None:
        """Adds the groups of the prior's draws, in one chain.

        Args:
            count: How many.
        """
        theta = draw_prior(self.call, self.source.subnet, count)
        self._add_elements("prior", theta, 1)
        samples = self._at_draws(self.call, theta).samples
        self.add("prior_predictive", samples, chains=1)

    def joined(self, arviz: ModuleType, **attrs: Any) -> Any:
        """All groups, each with what is known of all.

        Args:
            arviz: The library.
            attrs: What the caller knows.

        Returns:
            ArviZ's own container.
        """
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
        source = self.source
        elements = site_elements(source.latents, source.subnet, theta, self.sites)
        for site, part in elements.items():
            labels = element_labels(part.positions.tolist(), part.shape)
            self.coords[f"{site}_elem"] = labels
        variables = {
            site: part.values if part.shape else part.values.squeeze(-1)
            for site, part in elements.items()
        }
        self.add(name, variables, chains=chains)

    def _read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        return ModelCall.read(self.source.model, self.source.latents, args, kwargs)

    def _at_draws(self, call: ModelCall, theta: Tensor) -> OutputDraws:
        source = self.source
        return OutputDraws.of(
            call,
            source.subnet,
            theta,
            linearized=source.linearized,
            noise_scale=source.noise_scale,
        )


def _elem_dims(subnet: Subnet) -> dict[str, Sequence[str]]:
    return {site: [f"{site}_elem"] for site in subnet.layout.names}


def _array(value: Tensor) -> NDArray[Any]:
    value = value.detach().cpu()
    if value.dtype == torch.bfloat16:  # numpy has none
        value = value.float()
    return value.resolve_conj().resolve_neg().numpy()


def _constant_data(call: ModelCall) -> dict[str, Tensor]:
    """Tensors of a call that come datum by datum and are not observed, by name."""
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
    model = call.model.forward if isinstance(call.model, nn.Module) else call.model
    try:
        bound = inspect.signature(model).bind(*call.args, **call.kwargs)
    except (TypeError, ValueError):  # a callable whose signature does not tell
        numbered = {f"arg_{i}": value for i, value in enumerate(call.args)}
        return {**numbered, **call.kwargs}
    return bound.arguments


def _named(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors inside of mappings and sequences, as ``batch.x`` or ``args.0``."""
    if isinstance(value, Tensor):
        yield name, value
        return
    items: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(value, Mapping):
        items = iter(value.items())
    elif isinstance(value, tuple | list):
        items = iter(enumerate(value))
    for key, item in items:
        yield from _named(item, f"{name}.{key}" if name else str(key))


def _is_same(leaf: Tensor, value: Tensor) -> bool:
    same = leaf is value or leaf.data_ptr() == value.data_ptr()
    return leaf.shape == value.shape and (same or torch.equal(leaf.to(value), value))
