"""A torch network whose weights are sample sites, with priors on them."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain
from numbers import Real
from typing import Any, final

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_subnet.exceptions import ModelError, OptionError, shown
from pyro_subnet.nn.copying import copied
from pyro_subnet.nn.weight_site import Drawn, weight_site
from pyro_subnet.tensors.plain_calls import plain_calls

Prior = Callable[[str, Tensor], Distribution]
Version = tuple[int, int]  # of a tensor: which one, and how often it was changed


@final
@dataclass(frozen=True)
class _NormalPrior:
    """Independent zero-mean normal priors of one scale."""

    scale: float

    def __call__(self, name: str, parameter: Tensor) -> Distribution:
        # One number each for all weights, which would take the network's memory twice.
        scale = parameter.new_full((), float(self.scale)).expand(parameter.shape)
        loc = parameter.new_zeros(()).expand(parameter.shape)
        return dist.Normal(loc, scale).to_event(parameter.ndim)


@final
@dataclass(frozen=True, eq=False)
class Drawing:
    """One weight that a module is drawing.

    Attributes:
        name: The weight's name in the module.
        call: What tells one call of the module from another.
    """

    module: BayesianModule
    name: str
    call: object


_DRAWING: ContextVar[Drawing | None] = ContextVar("drawing", default=None)


def drawing() -> Drawing | None:
    """The weight of a bayesianized network that is being drawn, if any is."""
    return _DRAWING.get()


@final
class BayesianModule(PyroModule):
    """A network whose trainable parameters are sample sites of the same names.

    Made by :func:`bayesianize` of any ``torch.nn`` network. The sampled values take the
    parameters' places during a call. Tied parameters are one site; buffers, such as the
    running statistics of norms, move and save with the module. The padding row of an
    embedding, which torch never trains, keeps the network's value at every draw.
    Called more than once in a run of a model it has the same weights, and inside a
    plate one weight for all data.

    Args:
        net: The network; copied.
        prior: Distribution of each parameter, from its name and value.
    """

    def __init__(self, net: nn.Module, prior: Prior):
        super().__init__()
        # Wrapped for several devices, torch cannot run it with weights from outside;
        # compiled, it would be compiled anew for each.
        while True:
            if isinstance(net, nn.DataParallel | nn.parallel.DistributedDataParallel):
                net = net.module
            elif type(net).__name__ == "OptimizedModule":
                net = net.get_submodule("_orig_mod")
            else:
                break
        self.net = copied(net)
        self._prior = prior
        self._used = False
        self._drawn: Drawn = {}
        everywhere = list(self.net.named_parameters(remove_duplicate=False))
        self._names = {
            name: [other for other, tied in everywhere if tied is parameter]
            for name, parameter in self.net.named_parameters()
            if parameter.requires_grad
        }
        if not self._names:
            raise ModelError(
                "A network must have a parameter with `requires_grad=True` to be made "
                "Bayesian; got none. Parameters without it stay constants: switch it "
                "on for those that should have a prior."
            )
        self._padding_rows = _padding_rows(self.net)
        # Names of frozen parameters, whose values are the network's own.
        self._frozen = _parameters_to_buffers(self.net)
        self.register_load_state_dict_pre_hook(_copy_frozen)
        # They, and how often each had been changed, at the first call.
        self._seen: list[tuple[str, Tensor, Version]] | None = None
        self._priors = self._make_priors()
        self._source: weakref.ref[nn.Module] | None = weakref.ref(net)
        self._source_as_copied = _versions(net)
        self._own_as_copied = self._own_versions()

    def _own_versions(self) -> dict[str, Version]:
        """Versions of what is a copy."""
        found = _versions(self.net)
        return {name: found[name] for name in found.keys() - self._frozen}

    def _set_frozen(self, name: str, value: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        self.net.get_submodule(path).register_buffer(leaf, value)
        self._seen = None

    def _check_frozen(self) -> None:
        """Refuses to run on what has become of frozen parameters since the first call.

        Raises:
            ModelError: If one was changed in place.
        """
        if self._seen is None:
            buffers = dict(self.net.named_buffers(remove_duplicate=False))
            frozen = [(name, buffers[name]) for name in sorted(self._frozen)]
            self._seen = [(name, value, _version(value)) for name, value in frozen]
        changed = [name for name, value, seen in self._seen if _version(value) != seen]
        if changed:
            raise ModelError(_trained_on(changed))

    def _make_priors(self) -> dict[str, Distribution]:
        return {
            name: _checked(self._prior(name, value), name, value)
            for name, value in self.pretrained_values().items()
        }

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> BayesianModule:
        """Moves the priors with the buffers, as ``.to`` and similar methods do."""
        unchanged = self._own_as_copied == self._own_versions()
        super()._apply(fn, recurse)
        self._seen = None
        self._priors = self._make_priors()
        if unchanged:
            self._own_as_copied = self._own_versions()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """A copy is no longer a copy of the network, but of this module."""
        state: dict[str, Any] = super().__getstate__()
        return {**state, "_source": None, "_drawn": {}, "_seen": None}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Samples the weights, and runs the network with them."""
        self._check_frozen()
        weights = {}
        call = object()
        for site, names in self._names.items():
            weights.update(dict.fromkeys(names, self._weight(site, call)))
        for name, row in self._padding_rows.items():
            weights[name] = _with_row(weights[name], row, self.net.get_buffer(name))
        self._used = True
        with plain_calls(trains=True):
            return torch.func.functional_call(self.net, weights, args, kwargs)

    def _weight(self, name: str, call: object) -> Tensor:
        """Samples a weight once in a call, as ``PyroSample`` attributes do."""
        site = self._pyro_get_fullname(name)
        value = self._pyro_context.get(site)
        if value is None:
            token = _DRAWING.set(Drawing(self, name, call))
            try:
                value = weight_site(site, self._priors[name], self._drawn)
            finally:
                _DRAWING.reset(token)
            self._pyro_context.set(site, value)
        return value

    def pretrained_values(self) -> dict[str, Tensor]:
        """The values in the network of the parameters that have a prior.

        Returns:
            ``{parameter name: value}``.
        """
        values = dict(self.net.named_buffers(remove_duplicate=False))
        return {name: values[name] for name in self._names}

    @property
    def source(self) -> nn.Module | None:
        """The network that was copied, while it lives; None for a copy of this."""
        return None if self._source is None else self._source()

    def follow_source(self) -> None:
        """Takes up what has become of the network, if nothing knows the copy yet.

        A script may copy its network before it trains it. Until the first call nobody
        has seen the copy's values, so those of the present count: of weights, running
        statistics and frozen parameters.

        Raises:
            ModelError: If the network was trained after the first call.
        """
        source = self.source
        if (
            source is None
            or self._own_as_copied != self._own_versions()
            or self._source_as_copied == (now := _versions(source))
        ):
            return
        own = dict(self.net.named_buffers(remove_duplicate=False))
        found = _tensors(source)
        changed = [
            name
            for name, value in own.items()
            if name in found and not same_numbers(found[name], value)
        ]
        changed += [
            name
            for name in self._frozen - set(changed)
            if now.get(name) != self._source_as_copied.get(name)
        ]
        fits = all(
            name in found and found[name].shape == value.shape
            for name, value in own.items()
        )
        if (changed and self._used) or not fits:
            raise ModelError(_trained_on(changed))
        with torch.no_grad():
            for name in changed:
                if name in self._frozen:
                    self._set_frozen(name, _not_copied(found[name]))
                else:
                    own[name].copy_(found[name])
        self._priors = self._make_priors()
        self._source_as_copied = now
        self._own_as_copied = self._own_versions()


def _trained_on(changed: list[str]) -> str:
    return (
        "A network must stay as it was copied once its copy has been called, frozen "
        "parameters too, which are not copied; got other values of "
        f"{changed[:3] or 'other tensors'}. Call `bayesianize(net)` after the last "
        "step of training, or keep the old values with `copy.deepcopy(bnn)`."
    )


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in the lower of their precisions, NaN with NaN."""
    lower = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    a, b = a.detach().to(b.device, lower), b.detach().to(lower)
    # Torch compares no sparse tensors, and in some layouts not even two shapes.
    a, b = (t if t.layout == torch.strided else t.to_dense() for t in (a, b))
    gap = (a != b) & ~(a.isnan() & b.isnan()) if a.shape == b.shape else True
    return not bool(torch.as_tensor(gap).any())


def bayesianize(
    net: nn.Module, prior_scale: int | float = 1.0, *, prior: Prior | None = None
) -> BayesianModule:
    """A network with priors on its weights, as a Pyro module.

    ::

        bnn = bayesianize(net.eval())


        def model(x, y=None):
            logits = bnn(x)
            with pyro.plate("data", len(x)):
                return pyro.sample("y", dist.Categorical(logits=logits), obs=y)


        guide = AutoSubnetLaplace(model, 0.05, init_loc_fn=init_to_module(net))
        posterior = guide.laplace_approximation(x, y)

    Args:
        net: Any ``torch.nn`` network; it is copied with its buffers and its mode, and
            not changed. Parameters with ``requires_grad=False`` stay constants, and are
            not copied: a frozen backbone is held once. A copy that a guide starts at
            before it was ever called takes up what training made of the network since;
            after that it is an error. Of ``DistributedDataParallel``, the network
            inside.
        prior_scale: Standard deviation of the independent normal priors.
        prior: In place of normal priors, a function from a parameter's name and value
            to a distribution over values of its shape.

    Returns:
        The module; its sample sites have the parameters' names.

    Raises:
        OptionError: If ``prior_scale`` is not positive and finite, or a prior is not of
            its parameter's shape.
        ModelError: If no parameter of the network has ``requires_grad=True``, a part
            with such parameters is TorchScript, a lazy layer has not been called, or
            there is no deep copy.
    """
    # What trains a network on several devices is no part of it.
    while isinstance(net, nn.DataParallel | nn.parallel.DistributedDataParallel):
        net = net.module
    if not isinstance(net, nn.Module) or isinstance(net, BayesianModule):
        raise OptionError(
            "`net` must be a `torch.nn.Module` that is not Bayesian yet; got "
            f"{shown(net)}. Pass the network itself."
        )
    if isinstance(prior_scale, Distribution) or isinstance(prior, Distribution):
        raise OptionError(
            "`prior_scale` must be a number, and `prior` a function from a parameter's "
            "name and value to a distribution of its shape; got a distribution. Pass "
            "`prior=lambda name, p: dist.Normal(0.0, 1.0).expand(p.shape)"
            ".to_event(p.ndim)`."
        )
    if prior is not None and not callable(prior):
        raise OptionError(
            "`prior` must be a function from a parameter's name and value to a "
            f"distribution; got {shown(prior)}. Pass a number as `prior_scale`."
        )
    number = (
        isinstance(prior_scale, Real | Tensor)
        and math.prod(getattr(prior_scale, "shape", ())) == 1
    )
    if not (number and math.isfinite(prior_scale) and prior_scale > 0):
        raise OptionError(
            "`prior_scale` must be positive and finite, a standard deviation; got "
            f"{prior_scale!r}. Pass 1.0 for standard normal priors."
        )
    return BayesianModule(net, _NormalPrior(prior_scale) if prior is None else prior)


def _checked(prior: Distribution, name: str, parameter: Tensor) -> Distribution:
    """The prior with all its dimensions those of the event; refuses another shape."""
    if not isinstance(prior, Distribution):
        raise OptionError(
            f"The prior of parameter {name!r} must be a distribution; got "
            f"{shown(prior)}. Return one from `prior`."
        )
    shape = prior.batch_shape + prior.event_shape
    if shape != parameter.shape:
        raise OptionError(
            f"The prior of parameter {name!r} must have its shape, "
            f"{tuple(parameter.shape)}; got {tuple(shape)}. Use "
            "`.expand(parameter.shape).to_event(parameter.ndim)`."
        )
    # Batch dimensions of a weight, which has no plate, would be taken for data.
    return dist.Independent(prior, len(prior.batch_shape))


def _padding_rows(net: nn.Module) -> dict[str, int]:
    """The padding row of each trainable embedding's weight."""
    return {
        f"{path}.weight" if path else "weight": module.padding_idx
        for path, module in net.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        and module.padding_idx is not None
        and module.weight.requires_grad
    }


def _with_row(weight: Tensor, row: int, source: Tensor) -> Tensor:
    """A weight with one row taken from another of its shape."""
    is_row = torch.arange(len(source), device=source.device) == row
    return torch.where(is_row.unsqueeze(-1), source, weight)


def _tensors(net: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, tied ones under each of their names."""
    parameters = net.named_parameters(remove_duplicate=False)
    return dict(chain(parameters, net.named_buffers(remove_duplicate=False)))


def _versions(net: nn.Module) -> dict[str, Version]:
    """What tells whether any tensor of a network was changed or replaced since."""
    return {name: _version(tensor) for name, tensor in _tensors(net).items()}


def _version(tensor: Tensor) -> Version:
    # Tensors made in inference mode count no versions.
    return id(tensor), 0 if tensor.is_inference() else tensor._version


def _parameters_to_buffers(net: nn.Module) -> frozenset[str]:
    """Keeps a network's values, but no parameters for Pyro to register or train.

    Returns:
        Names of the frozen ones, which are not copied.
    """
    everywhere = net.named_parameters(remove_duplicate=False)
    frozen = frozenset(name for name, value in everywhere if not value.requires_grad)
    for module in net.modules():
        if isinstance(module, torch.jit.ScriptModule):  # frozen, or there is no copy
            continue
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                del module._parameters[name]
                if parameter.requires_grad:
                    module.register_buffer(name, parameter.detach().clone())
                else:
                    module.register_buffer(name, _not_copied(parameter))
    # A scripted part has a copy of its own.
    return frozen.intersection(dict(net.named_buffers(remove_duplicate=False)))


def _copy_frozen(module: BayesianModule, *_: Any) -> None:
    """Before values are loaded in place: the network's own stay as they are."""
    for name in module._frozen:
        module._set_frozen(name, module.net.get_buffer(name).clone())


def _not_copied(parameter: Tensor) -> Tensor:
    """A frozen parameter's values, where they are."""
    # A quantized one is what it is by more than its numbers.
    return parameter.detach() if type(parameter) is nn.Parameter else parameter
