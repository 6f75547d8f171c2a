"""Pyro models of a torch network in one line: of classes, and of real numbers."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, final

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_subnet.exceptions import DataError, ModelError, OptionError, shown
from pyro_subnet.nn.bayesian import BayesianModule, Prior, bayesianize
from pyro_subnet.nn.start import STARTS_AT

# A network's outputs have a row for each observation, and one more axis where they
# are many.
_ROWS, _MATRIX = 1, 2
# What a network's outputs are called where it returns a mapping.
_OUTPUT = "logits"


def classifier(
    net: nn.Module, *, prior_scale: float = 1.0, prior: Prior | None = None
) -> NetworkClassifier:
    r"""A Pyro model of classes, whose logits are a network's outputs.

    Outputs of shape (N, C) are logits of C classes, and labels integers, (N,); outputs
    (N,) or (N, 1) are those of a Bernoulli, and labels are 0 or 1. A guide starts at
    the network's weights, so that a trained network needs no more::

        guide = AutoSubnetLaplace(classifier(net), 0.05)
        posterior = guide.laplace_approximation_from(loader)

    Args:
        net: The network; copied, and its copy put in eval mode. What it returns is a
            tensor, or has one as ``logits``, as Hugging Face's do.
        prior_scale: As for :func:`bayesianize`.
        prior: As there.

    Returns:
        The model.

    Raises:
        OptionError: As for :func:`bayesianize`.
        ModelError: As there.
    """
    return NetworkClassifier(_in_eval_mode(net, prior_scale, prior))


def regressor(
    net: nn.Module,
    *,
    noise: float | Tensor | Distribution | str,
    prior_scale: float = 1.0,
    prior: Prior | None = None,
) -> NetworkRegressor:
    r"""A Pyro model of real numbers: a network's outputs, with normal noise.

    Outputs have shape (N,) or (N, 1), of one number, or (N, E). The noise of a trained
    network is that on data that it was not trained on: give their root mean square
    residual, or set it later by ``posterior.tune(val=(x_val, y_val))``.

    Args:
        net: As for :func:`classifier`.
        noise: Standard deviation, fixed: a number, or a tensor (E,). A distribution, to
            learn it: it is a latent site, ``"noise"``, which starts at the root mean
            square residual of the first data that the guide is called on. Or
            ``"head"``, where the network has 2 E outputs, means first and then the
            logarithms of standard deviations.
        prior_scale: As for :func:`bayesianize`.
        prior: As there.

    Returns:
        The model.

    Raises:
        OptionError: If the noise is not positive, or none of those.
        ModelError: As for :func:`bayesianize`.
    """
    bnn = _in_eval_mode(net, prior_scale, prior)
    return NetworkRegressor(bnn, _checked_noise(noise, bnn))


class NetworkModel(nn.Module, ABC):
    """A Pyro model around a bayesianized network: ``model(x, y)``, ``model(**batch)``.

    The network's arguments come as it takes them, the observations by position after
    those that it requires, or by name, as ``y`` or ``labels``. They may be left out.
    The site of observations is ``"y"``, in the plate ``"data"``; weights are sites of
    their own names. Returns the network's outputs.

    Args:
        net: The bayesianized network.
    """

    def __init__(self, net: BayesianModule):
        super().__init__()
        self.net = net
        self._required = _num_required(net.net)

    def forward(
        self, *args: Any, y: Any = None, labels: Any = None, **kwargs: Any
    ) -> Tensor:
        """Runs the network, and samples or observes ``"y"``."""
        given = [value for value in (y, labels) if value is not None]
        if len(args) > self._required:
            given += [] if args[-1] is None else [args[-1]]
            args = args[:-1]
        if len(given) > 1:
            raise DataError(
                f"Observations must be given once; got {len(given)} of them. Pass them "
                "after the network's inputs, or as `y`, or as `labels`."
            )
        outputs = _tensor(self.net(*args, **kwargs))
        observed = given[0] if given else None
        likelihood = self._likelihood(outputs, observed)
        if observed is not None:
            observed = self._observed(observed, likelihood)
        with pyro.plate("data", len(outputs)):
            pyro.sample("y", likelihood, obs=observed)
        return outputs

    @abstractmethod
    def _likelihood(self, outputs: Tensor, y: Tensor | None) -> Any:
        """The distribution of the observations, of batch shape (N,)."""

    @abstractmethod
    def _observed(self, y: Tensor, likelihood: Any) -> Tensor:
        """Observations in the likelihood's shape and type."""


@final
class NetworkClassifier(NetworkModel):
    """Made by :func:`classifier`."""

    def _likelihood(self, outputs: Tensor, y: Tensor | None) -> Any:
        if outputs.ndim == _MATRIX and outputs.shape[1] > 1:
            return dist.Categorical(logits=outputs)
        if outputs.ndim == _ROWS or (outputs.ndim == _MATRIX and outputs.shape[1] == 1):
            return dist.Bernoulli(logits=outputs.reshape(-1))
        raise ModelError(
            "Outputs must be logits of shape (N, C), or (N,) for two classes; got "
            f"{tuple(outputs.shape)}. Write a Pyro model of your own for labels of "
            "pixels or tokens: see `bayesianize`."
        )

    def _observed(self, y: Tensor, likelihood: Any) -> Tensor:
        found = _of_rows(y, likelihood)
        if isinstance(likelihood, dist.Bernoulli):
            return found.to(likelihood.logits)
        if found.is_floating_point():
            raise DataError(
                f"Labels must be class numbers, integers; got {found.dtype}. Convert "
                "them with `.long()`."
            )
        return found.long()


@final
class NetworkRegressor(NetworkModel):
    """Made by :func:`regressor`.

    Args:
        net: The bayesianized network.
        noise: As for :func:`regressor`.
    """

    def __init__(self, net: BayesianModule, noise: Tensor | Distribution | None):
        super().__init__(net)
        self._prior = noise if isinstance(noise, Distribution) else None
        fixed = noise if isinstance(noise, Tensor) else None
        self.register_buffer("noise", fixed)

    def _likelihood(self, outputs: Tensor, y: Tensor | None) -> Any:
        if outputs.ndim not in (_ROWS, _MATRIX):
            raise ModelError(
                "Outputs must have shape (N,) or (N, E); got "
                f"{tuple(outputs.shape)}. Write a Pyro model of your own for images "
                "or sequences of numbers: see `bayesianize`."
            )
        if self._prior is not None:
            start = _residual_scale(outputs, y, self._prior)
            infer = {} if start is None else {STARTS_AT: start}
            return _normal(outputs, pyro.sample("noise", self._prior, infer=infer))
        fixed = self.get_buffer("noise")
        if fixed is not None:
            return _normal(outputs, fixed)
        if outputs.ndim != _MATRIX or outputs.shape[1] % 2:
            raise ModelError(
                "Outputs must come in pairs with noise='head', (N, 2 E): means and "
                "logarithms of standard deviations; got "
                f"{tuple(outputs.shape)}. Give the network's last layer twice as many "
                "outputs."
            )
        loc, log_scale = outputs.chunk(2, dim=1)
        return _normal(loc, log_scale.exp())

    def _observed(self, y: Tensor, likelihood: Any) -> Tensor:
        return _of_rows(y, likelihood).to(likelihood.mean)


def _in_eval_mode(
    net: nn.Module, prior_scale: float, prior: Prior | None
) -> BayesianModule:
    """The network's copy with priors, where dropout and norms do as in predictions."""
    return bayesianize(net, prior_scale=prior_scale, prior=prior).eval()


def _checked_noise(
    noise: float | Tensor | Distribution | str, net: BayesianModule
) -> Tensor | Distribution | None:
    """A standard deviation as a tensor, or its prior; None for a network's head."""
    if isinstance(noise, str):
        if noise == "head":
            return None
        raise OptionError(
            "`noise` must be a standard deviation, a distribution or 'head'; got "
            f"{noise!r}. Pass 'head' for a network that has its logarithm as outputs."
        )
    if isinstance(noise, Distribution):
        support = getattr(noise.support, "base_constraint", noise.support)
        lower = getattr(support, "lower_bound", None)
        if lower is None or not bool((torch.as_tensor(lower) >= 0).all()):
            raise OptionError(
                "The prior of `noise` must be of positive numbers; got "
                f"{shown(noise)}. Pass `dist.HalfNormal(1.0)`, say."
            )
        # Its batch dimensions, which have no plate, would be taken for data.
        return dist.Independent(noise, len(noise.batch_shape))
    like = next(iter(net.pretrained_values().values()))
    found = torch.as_tensor(noise, dtype=like.dtype, device=like.device)
    if not bool(((found > 0) & found.isfinite()).all()) or found.ndim > _ROWS:
        raise OptionError(
            "`noise` must be positive and finite, a standard deviation, or one for "
            f"each output; got {shown(noise)}. Pass the root mean square residual on "
            "held-out data."
        )
    return found.squeeze()


def _normal(loc: Tensor, scale: Tensor) -> Any:
    """Normal noise around outputs of shape (N,), (N, 1) or (N, E)."""
    width = loc.shape[1] if loc.ndim == _MATRIX else 1
    if scale.ndim == _ROWS and len(scale) != width:
        raise ModelError(
            "`noise` must be one number, or one for each output of the network; got "
            f"{len(scale)} for {width} outputs. Pass a number."
        )
    if width > 1:
        return dist.Normal(loc, scale).to_event(1)
    return dist.Normal(loc.flatten(), scale.flatten() if scale.ndim > 1 else scale)


@torch.no_grad()
def _residual_scale(
    outputs: Tensor, y: Tensor | None, prior: Distribution
) -> Tensor | None:
    """Root mean square residual, in the shape of its prior, where data are given."""
    if y is None or y.numel() != outputs.numel():
        return None
    squares = (y.reshape(outputs.shape) - outputs).square()
    dims = 0 if prior.event_shape.numel() > 1 else None
    smallest = torch.finfo(squares.dtype).tiny ** 0.5
    return squares.mean(dims).sqrt().clamp(smallest).reshape(prior.event_shape)


def _num_required(net: nn.Module) -> int:
    """How many positional arguments a network requires; at least its input."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(net.forward).parameters.values()
    except (TypeError, ValueError):  # as of a scripted part
        return 1
    empty = inspect.Parameter.empty
    return max(1, sum(p.kind in kinds and p.default is empty for p in parameters))


def _tensor(outputs: Any) -> Tensor:
    """The tensor that a network returned, by itself or as ``logits``."""
    found = outputs
    if isinstance(outputs, Mapping):
        found = outputs.get(_OUTPUT)
    elif not isinstance(outputs, Tensor):
        found = getattr(outputs, _OUTPUT, None)
    if not isinstance(found, Tensor):
        raise ModelError(
            "The network must return a tensor, or something that has one as `logits`; "
            f"got {type(outputs).__name__}. Wrap it in a module that returns its "
            "outputs."
        )
    return found


def _of_rows(y: Tensor, likelihood: Any) -> Tensor:
    """Observations in a likelihood's shape: (N, 1) for (N,), but none is broadcast."""
    needed = likelihood.batch_shape + likelihood.event_shape
    columns = y.shape == (*needed, 1) or needed == (*y.shape, 1)
    if y.shape != needed and not columns:
        raise DataError(
            f"Observations must have shape {tuple(needed)} with this network and these "
            f"inputs; got {tuple(y.shape)}. Check the labels, and the network's last "
            "layer."
        )
    return y.reshape(needed)
