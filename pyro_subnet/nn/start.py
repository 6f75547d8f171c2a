"""Where a guide starts: at a network's weights, each site at the one of its name."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, chain
from typing import Any, final

from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor, nn

from pyro_subnet.exceptions import ModelError, OptionError
from pyro_subnet.nn.bayesian import BayesianModule, Drawing, drawing, same_numbers

InitFunction = Callable[..., Any]
Named = list[tuple[str, Tensor]]
# Modules that hold a network under a name of their own, which its weights do not have.
_WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "AveragedModel": "module",
    "OptimizedModule": "_orig_mod",
    "BayesianModule": "net",
}
# What a site's `infer` may hold: the value that it starts at.
STARTS_AT = "starts_at"
# Counts of a norm's batches, which no prediction depends on.
_COUNTERS = ("num_batches_tracked",)
# Names that a message lists.
_SHOWN = 6


def init_to_module(
    net: object, *, fallback: InitFunction | None = None
) -> InitToModule:
    r"""Starts a guide at a network's weights, so that no training is needed.

    A site takes the value of the parameter with its name, as it is when the guide is
    first called. If the network is part of another module, so that a site is called,
    say, ``"encoder.fc1.weight"``, or if it is wrapped (``DataParallel``, a compiled
    network, a module that trains it), the longest common ending of the names counts.

    What is asked for is used, or it is an error: a site of a
    :func:`bayesianize`\\ d network must find its parameter, and what it does not sample
    (running statistics, frozen parameters) must be the network's too.

    Args:
        net: A trained network, what :func:`bayesianize` made of it, or a module that
            holds or wraps it.
        fallback: Initializes the sites that no parameter has the name and shape of. By
            default sites of one number, such as a latent noise scale, start at their
            median, and larger ones are an error.

    Returns:
        An ``init_loc_fn`` for any Pyro guide.

    Raises:
        OptionError: If ``net`` is no module, or has no parameters.
    """
    if not isinstance(net, nn.Module):
        raise OptionError(
            "`net` must be a torch.nn.Module; got "
            f"{type(net).__name__}. Pass the trained network itself."
        )
    if not _weights(net):
        raise OptionError(
            f"`net` must have parameters to start at; got a {type(net).__name__} "
            "without any. Pass the trained network."
        )
    return InitToModule(net, fallback)


def start_of_guide(init_loc_fn: InitFunction | None) -> InitFunction:
    """What a guide starts at; without a function, each network's own weights."""
    if init_loc_fn is None:
        return InitToModule(None, init_to_median)
    if isinstance(init_loc_fn, InitToModule):
        # One of its own, which counts the sites of this guide alone.
        return InitToModule(init_loc_fn.net, init_loc_fn.fallback)
    return init_loc_fn


@final
class InitToModule:
    """An ``init_loc_fn``: a site starts at the parameter of its name.

    Made by :func:`init_to_module`.

    Args:
        net: The network; None for each bayesianized network's own.
        fallback: Initializes all other sites.
    """

    def __init__(self, net: nn.Module | None, fallback: InitFunction | None):
        self.net = net
        self.fallback = fallback
        # Parameters that sites have started at, with the sites' names.
        self._taken: list[tuple[Tensor, str]] = []
        self._last_call: object = None

    def __call__(self, site: dict[str, Any] | None = None) -> Any:
        """The value of a site, a tensor of its own; without a site, this function."""
        if site is None:
            return self
        drawn = drawing()
        if drawn is None:
            return self._of_site(site)
        module = drawn.module
        outside = site["name"].removesuffix(drawn.name)
        if drawn.call is not self._last_call:
            self._last_call = drawn.call
            self._compare(module, outside)
        if self.net is None:
            return module.pretrained_values()[drawn.name].clone()
        return self._of_weight(site, drawn, self.net)

    def _compare(self, module: BayesianModule, outside: str) -> None:
        """Brings a copy up to date; refuses one that has another network's constants.

        Raises:
            ModelError: If running statistics or frozen parameters differ.
        """
        net = self.net
        if net is None or _holds(net, module) or _holds(net, module.source):
            module.follow_source()
        if net is None:
            return
        tensors = _tensors(net)
        shorten = _shortener(module.net)
        weights = module.pretrained_values()
        for name, value in module.net.named_buffers(remove_duplicate=False):
            if name in weights or name.endswith(_COUNTERS):
                continue
            short = shorten(name)
            found = _of_either_name(outside + short, short, tensors)
            if found is not None and not same_numbers(found[1], value):
                raise ModelError(
                    "A bayesianized network must have the running statistics and "
                    "frozen parameters of the network to start at; got another "
                    f"{name!r}. Call `bayesianize(net)` on that network, after its "
                    "training."
                )

    def _of_weight(self, site: dict[str, Any], drawn: Drawing, net: nn.Module) -> Any:
        """The value of a bayesianized network's weight."""
        weights = _weights(net)
        own = drawn.module.pretrained_values()[drawn.name]
        plain = _shortener(drawn.module.net)(drawn.name)
        whole = site["name"].removesuffix(drawn.name) + plain
        found = _of_either_name(whole, plain, weights)
        if found is None and isinstance(self.fallback, InitToModule):
            return self.fallback(site)
        if found is None or found[1].shape != own.shape:
            got = "none" if found is None else f"one of shape {tuple(found[1].shape)}"
            raise ModelError(
                "`init_to_module` must find a parameter for each weight of a "
                f"bayesianized network; got {got} for site {site['name']!r} of shape "
                f"{tuple(own.shape)}, among {_shown(weights)}. Pass the network that "
                "was bayesianized, or one of the same layers."
            )
        name, value = found
        other = next((s for t, s in self._taken if t is value), site["name"])
        if other != site["name"] and not same_numbers(value, own):
            raise ModelError(
                "`init_to_module` must know which network a site belongs to; got "
                f"sites {other!r} and {site['name']!r} for one parameter, {name!r}. "
                "Pass an `nn.ModuleDict` of both networks, by their names in the model."
            )
        self._taken.append((value, site["name"]))
        return value.detach().to(own, copy=True)

    def _of_site(self, site: dict[str, Any]) -> Any:
        """The value of any other site."""
        weights = [] if self.net is None else _weights(self.net)
        shape = site["fn"].batch_shape + site["fn"].event_shape
        found = _of_name(site["name"], weights)
        if found is not None and found[1].shape == shape:
            return found[1].detach().clone()
        start = site.get("infer", {}).get(STARTS_AT)
        if start is not None:
            return start.clone()
        if self.fallback is not None:
            return self.fallback(site)
        if shape.numel() > 1 or any(value.shape == shape for _, value in weights):
            raise ModelError(
                "`init_to_module` must find a parameter of each site's name and shape; "
                f"got none for site {site['name']!r} of shape {tuple(shape)}, among "
                f"{_shown(weights)}. Pass its data if it has any, rename the site, or "
                "say where such sites start, as in `fallback=init_to_median`."
            )
        return init_to_median(site)


def _holds(net: nn.Module, part: nn.Module | None) -> bool:
    """Whether a module is another, or one of its parts."""
    return any(module is part for module in net.modules())


def _weights(net: nn.Module) -> Named:
    """Parameters, and weights of bayesianized networks, by their short names."""
    found: Named = list(net.named_parameters(remove_duplicate=False))
    for path, module in net.named_modules(remove_duplicate=False):
        if isinstance(module, BayesianModule):
            own = f"{path}.net".removeprefix(".")
            found += [
                (f"{own}.{name}", value)
                for name, value in module.pretrained_values().items()
            ]
    shorten = _shortener(net)
    return [(shorten(name), value) for name, value in found]


def _tensors(net: nn.Module) -> Named:
    """Parameters and buffers by their short names."""
    shorten = _shortener(net)
    every = chain(
        net.named_parameters(remove_duplicate=False),
        net.named_buffers(remove_duplicate=False),
    )
    return [(shorten(name), value) for name, value in every]


def _shortener(net: nn.Module) -> Callable[[str], str]:
    """What takes the parts that wrappers of networks add out of a tensor's name."""
    added = {
        f"{path}.{_WRAPPERS[type(module).__name__]}".removeprefix(".")
        for path, module in net.named_modules(remove_duplicate=False)
        if type(module).__name__ in _WRAPPERS
    }

    def shorten(name: str) -> str:
        parts = name.split(".")
        paths = accumulate(parts, lambda path, part: f"{path}.{part}")
        return ".".join(
            part for part, path in zip(parts, paths, strict=True) if path not in added
        )

    return shorten


def _of_either_name(whole: str, own: str, named: Named) -> tuple[str, Tensor] | None:
    """The tensor of a name in the whole model, or else in its network."""
    return _of_name(whole, named) or _of_name(own, named)


def _of_name(name: str, named: Named) -> tuple[str, Tensor] | None:
    """The tensor of a name, or the one whose name has the longest ending in common."""
    # Of names that end alike, one must be the ending of the other.
    found, longest = list[tuple[str, Tensor]](), 0
    for other, value in named:
        if other == name:
            return other, value
        if f".{name}".endswith(f".{other}") or f".{other}".endswith(f".{name}"):
            common = min(name.count("."), other.count(".")) + 1
            if common > longest:
                found, longest = [], common
            if common == longest:
                found.append((other, value))
    if len({id(value) for _, value in found}) > 1:
        raise ModelError(
            f"`init_to_module` must find one parameter for {name!r}; got "
            f"{[other for other, _ in found]}. Pass the network that is meant, such as "
            "`module.net`."
        )
    return found[0] if found else None


def _shown(named: Named) -> str:
    """The first names of a list, for a message."""
    names = [name for name, _ in named]
    more = len(names) - _SHOWN
    return str(names) if more <= 0 else f"{names[:_SHOWN]} and {more} more"
