"""Torch networks as Pyro modules, with priors on their weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide.initialization import init_to_median
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_subnet.exceptions import ModelError, OptionError

Prior = Callable[[str, Tensor], Distribution]


@final
@dataclass(frozen=True)
class _NormalPrior:
    """Independent zero-mean normal priors of one scale."""

    scale: float

    def __call__(self, name: str, parameter: Tensor) -> Distribution:
        scale = torch.full_like(parameter, self.scale)
        return dist.Normal(torch.zeros_like(scale), scale).to_event(parameter.ndim)


@final
class BayesianModule(PyroModule):
    """A network whose trainable parameters are sample sites of the same names.

    Made by :func:`bayesianize` of any ``torch.nn`` network. The sampled values take the
    parameters' places during a call. Tied parameters are one site; buffers, such as the
    running statistics of norms, move and save with the module. The padding row of an
    embedding, which torch never trains, keeps the network's value at every draw.

    Args:
        net: The network; copied.
        prior: Distribution of each parameter, from its name and value.
    """

    def __init__(self, net: nn.Module, prior: Prior):
        super().__init__()
        self.net = copy.deepcopy(net)
        self._prior = prior
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
        _parameters_to_buffers(self.net)
        self._priors = self._make_priors()

    def _make_priors(self) -> dict[str, Distribution]:
        return {
            name: _checked(self._prior(name, value), name, value)
            for name, value in self.pretrained_values().items()
        }

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> BayesianModule:
        """Moves the priors with the buffers, as ``.to`` and similar methods do."""
        super()._apply(fn, recurse)
        self._priors = self._make_priors()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Samples the weights, and runs the network with them."""
        weights = {}
        for site, names in self._names.items():
            weights.update(dict.fromkeys(names, self._weight(site)))
        for name, row in self._padding_rows.items():
            weights[name] = _with_row(weights[name], row, self.net.get_buffer(name))
        return torch.func.functional_call(self.net, weights, args, kwargs)

    def _weight(self, name: str) -> Tensor:
        """Samples a weight once in a call, as ``PyroSample`` attributes do."""
        site = self._pyro_get_fullname(name)
        value = self._pyro_context.get(site)
        if value is None:
            value = pyro.sample(site, self._priors[name])
            self._pyro_context.set(site, value)
        return value

    def pretrained_values(self) -> dict[str, Tensor]:
        """The values in the network of the parameters that have a prior.

        Returns:
            ``{parameter name: value}``.
        """
        values = dict(self.net.named_buffers(remove_duplicate=False))
        return {name: values[name] for name in self._names}


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
            not changed. Parameters with ``requires_grad=False`` stay constants.
        prior_scale: Standard deviation of the independent normal priors.
        prior: In place of normal priors, a function from a parameter's name and value
            to a distribution over values of its shape.

    Returns:
        The module; its sample sites have the parameters' names.

    Raises:
        OptionError: If ``prior_scale`` is not positive and finite, or a prior is not of
            its parameter's shape.
        ModelError: If no parameter of the network has ``requires_grad=True``.
    """
    if not (math.isfinite(prior_scale) and prior_scale > 0):
        raise OptionError(
            "`prior_scale` must be positive and finite, a standard deviation; got "
            f"{prior_scale}. Pass 1.0 for standard normal priors."
        )
    return BayesianModule(net, _NormalPrior(prior_scale) if prior is None else prior)


def init_to_module(
    net: nn.Module, *, fallback: Callable[..., Any] = init_to_median
) -> Callable[..., Any]:
    """Starts a guide at a network's weights, so that no training is needed.

    A site takes the value of the parameter with its name. If the network is part of
    another module, so that a site is called, say, ``"encoder.fc1.weight"``, the site
    takes the value of the longest name that it ends with and whose shape it has.

    Args:
        net: A trained network, or what :func:`bayesianize` made of it.
        fallback: Initializes all other sites, such as a latent noise scale.

    Returns:
        An ``init_loc_fn`` for any Pyro guide.
    """
    if isinstance(net, BayesianModule):
        values = net.pretrained_values()
    else:
        values = dict(net.named_parameters())
    values = {name: value.detach().clone() for name, value in values.items()}

    def init(site: dict[str, Any] | None = None) -> Any:
        if site is None:
            return init
        shape = site["fn"].batch_shape + site["fn"].event_shape
        endings = [
            name
            for name, value in values.items()
            if f".{site['name']}".endswith(f".{name}") and value.shape == shape
        ]
        if not endings:
            return fallback(site)
        return values[max(endings, key=len)].clone()

    return init


def _checked(prior: Distribution, name: str, parameter: Tensor) -> Distribution:
    """The prior with all its dimensions those of the event; refuses another shape."""
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


def _parameters_to_buffers(net: nn.Module) -> None:
    """Keeps a network's values, but no parameters for Pyro to register or train."""
    for module in net.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                del module._parameters[name]
                module.register_buffer(name, parameter.detach().clone())
