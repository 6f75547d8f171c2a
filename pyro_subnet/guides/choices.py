"""What a user hands to a guide when it is made: model, subnet and start, checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from numbers import Integral
from typing import Any, final

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.indep_messenger import IndepMessenger
from torch import Tensor, nn
from torch.distributions import Distribution, biject_to

from pyro_subnet.exceptions import (
    ChoiceWarning,
    ModelError,
    OptionError,
    SelectionError,
    shown,
    warn,
)
from pyro_subnet.selection.base import Selector
from pyro_subnet.subnet import Subnet

# What a guide has once its model was run.
_AFTER_SET_UP = ("loc", "latent_dim")
_DRAWS = "_num_predictive_samples"  # the plate of draws of Pyro's `Predictive`
# Weights beyond which a subnet of one is more likely to be meant as all of them.
_MANY = 20
SubnetChoice = None | int | float | Mapping[str, Tensor] | Callable[..., Subnet]


def checked_selector(subnet: Any) -> Callable[..., Subnet]:
    """A selector, or what is meant for one; refuses what cannot be."""
    way_out = "Pass 0.05 for 5% of the weights"
    if isinstance(subnet, type):
        way_out = f"Make one of the class, such as `{subnet.__name__}(0.05)`"
    elif isinstance(subnet, str) or _holds_names(subnet):
        way_out += (
            ", `LastLayer()` for the last layer, `Sites([...])` for sites or "
            "`Modules([...])` for modules by their names, all of "
            "`pyro_subnet.selection`"
        )
    elif callable(subnet) and not isinstance(subnet, nn.Module | Distribution):
        _check_signature(subnet)
        return subnet
    raise OptionError(
        "`subnet` must be None, an int, a float in (0, 1], a selector, or a mapping "
        f"from sites to masks or positions; got {shown(subnet)}. {way_out}."
    )


def checked_subnet(subnet: Any) -> Subnet:
    """What a selector returned; refuses what is no subnet."""
    if not isinstance(subnet, Subnet):
        raise SelectionError(
            "A selector must return a Subnet; got "
            f"{type(subnet).__name__}. Build one with "
            "`Subnet.from_positions(guide.latents.layout, positions)`."
        )
    return subnet


def is_one(subnet: Any) -> bool:
    """Whether a ``subnet=`` argument is the count 1, which 1.0 may be meant by."""
    return isinstance(subnet, Integral) and subnet == 1


def warn_of_one_weight(num_params: int) -> None:
    """Says what a count of 1 is, in a model of many weights."""
    if num_params > _MANY:
        warn(
            f"`subnet=1` is one weight; got a model of {num_params}. Leave it out for "
            "all of them, or pass 1.0; 0.05 is 5% of them.",
            ChoiceWarning,
        )


@final
class MAPDraws:
    """Notices where many draws are asked of a MAP guide that has a posterior.

    Attributes:
        matter: Whether the guide has a posterior, and nothing was said since.
    """

    def __init__(self) -> None:
        self.matter = False
        self._count = 0

    def see(self) -> None:
        """Is told of every run of the guide; warns once."""
        # SVI wants densities, also where it evaluates a loss without gradients.
        for_draws = poutine.get_mask() is False and not torch.is_grad_enabled()
        if not (self.matter and for_draws):
            return
        # `Predictive` runs a guide to look at it, with initial values, then once a
        # draw; or once for all of them, in a plate of its own.
        stack = poutine.runtime._PYRO_STACK
        if any(isinstance(each, InitMessenger) for each in stack):
            self._count = 0
            return
        plates = [each for each in stack if isinstance(each, IndepMessenger)]
        at_once = [each.size for each in plates if each.name == _DRAWS]
        self._count += max(at_once, default=1)
        if self._count == 1:
            return
        self.matter = False
        warn(
            "Draws of the guide are the MAP, all alike: its Laplace approximation is "
            "another guide. Pass what `laplace_approximation` returned, "
            "`Predictive(model, guide=posterior)`; for the MAP itself, `num_samples=1` "
            "says it all.",
            ChoiceWarning,
        )


def short_name(selector: Callable[..., Subnet] | None) -> str:
    """What chooses a subnet, in a few words: of ours, what is not left at defaults."""
    if selector is None:
        return "all weights"
    kind = type(selector)
    if isinstance(selector, Selector) and is_dataclass(selector):
        told = []
        for field in fields(selector):
            value, default = getattr(selector, field.name), field.default
            if default is MISSING and field.default_factory is MISSING:
                told.append(shown(value))
            elif value is not default and shown(value) != shown(default):
                told.append(f"{field.name}={shown(value)}")
        return f"{kind.__name__}({', '.join(told)})"
    # An address in memory tells nothing, least of all in a file.
    has_own = any("__repr__" in vars(parent) for parent in kind.__mro__[:-1])
    return shown(selector) if has_own else kind.__name__


def _check_signature(selector: Callable[..., Any]) -> None:
    """Refuses a selector that cannot be called with a guide and the data."""
    try:
        signature = inspect.signature(selector)
    except (TypeError, ValueError):
        return  # what is written in C may not tell
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise OptionError(
            "A selector must take the guide and the data, `(guide, data)`; got "
            f"{signature}. Give it these two arguments, used or not."
        ) from error


def check_model(model: Any) -> None:
    """Refuses what is no Pyro model, as far as that shows before it is run."""
    way_out = ""
    if isinstance(model, type):
        way_out = f"Make one of the class, such as `{model.__name__}()`."
    elif isinstance(model, AutoGuide):
        way_out = "Pass the model that the guide was made for."
    elif not callable(model) or isinstance(model, Distribution):
        way_out = "The order is `AutoSubnetLaplace(model, subnet)`."
    elif inspect.isfunction(model) and str(model.__module__).startswith("pyro_subnet."):
        if model.__qualname__ == model.__name__:  # not what one of ours returned
            way_out = f"Pass a model that calls `{model.__name__}(net)`'s result."
    if way_out:
        raise OptionError(
            "`model` must be a Pyro model: a function or a PyroModule that is called "
            f"with the data; got {shown(model)}. {way_out}"
        )


def check_start(init_loc_fn: Any) -> None:
    """Refuses what is no function from a site to where it starts; None is none."""
    way_out = ""
    if init_loc_fn is None:
        return
    if isinstance(init_loc_fn, nn.Module):
        way_out = "Pass `init_to_module(net)`, of `pyro_subnet.nn`."
    elif isinstance(init_loc_fn, Mapping):
        way_out = "Pass `init_to_value(values=...)`, of `pyro.infer.autoguide`."
    elif not callable(init_loc_fn) or isinstance(init_loc_fn, type | Distribution):
        way_out = "Leave it out, or pass `init_to_module(net)`, of `pyro_subnet.nn`."
    if way_out:
        raise OptionError(
            "`init_loc_fn` must be a function from a site to its first value; got "
            f"{shown(init_loc_fn)}. {way_out}"
        )


def not_here(name: str, guide: type, posterior: type, is_set_up: bool) -> str | None:
    """How to come to what a MAP guide has not, or not yet; None for unknown names."""
    own = hasattr(guide, name) or name in _AFTER_SET_UP
    if own and not is_set_up:
        return (
            f"`{name}` must wait for the guide's first call, which sets it up; got "
            "none so far. Train it with SVI, or call `guide(x, y)`."
        )
    if own or name.startswith("_") or not hasattr(posterior, name):
        return None
    return (
        f"`{name}` must be asked of a posterior; got a MAP guide, which has none. Call "
        "`posterior = guide.laplace_approximation(x, y)` first."
    )


def _holds_names(value: Any) -> bool:
    sequence = isinstance(value, list | tuple | set) and bool(value)
    return sequence and all(isinstance(name, str) for name in value)


def check_in_support(nodes: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Refuses a start that no unconstrained value stands for.

    Args:
        nodes: The latent sites by name, at the values that they start at.

    Raises:
        ModelError: If a value is outside of its prior's support.
    """
    for name, node in nodes:
        support, value = node["fn"].support, node["value"].detach()
        inside = support.check(value)
        if bool(inside.all()):
            continue
        # A check is strict where round-off decides, as on a simplex: what comes back
        # from unconstrained space as it was is inside.
        transform = biject_to(support)
        tolerance = torch.finfo(value.dtype).eps ** 0.5
        same = torch.isclose(
            transform(transform.inv(value)), value, tolerance, tolerance
        )
        outside = value[~same & value.isfinite()]
        if outside.numel():
            raise ModelError(
                f"A latent site must start in the support of its prior; got "
                f"{float(outside[0]):.6g} at site {name!r}, whose support is {support} "
                f"({outside.numel()} of {value.numel()} values lie outside). Take a "
                "prior that the network's own values are possible under, or start "
                "elsewhere with `init_loc_fn`."
            )


def discrete_site(trace: Any) -> str | None:
    """The first latent site of a prototype trace with discrete support."""
    if trace is None:
        return None
    for name, node in trace.iter_stochastic_nodes():
        if node["fn"].support.is_discrete:
            return name
    return None
