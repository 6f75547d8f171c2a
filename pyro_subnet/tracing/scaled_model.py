"""A user's model under factors of its own prior precision and of its own noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import (
    ExpandedDistribution,
    MaskedDistribution,
)
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import (
    Independent,
    MultivariateNormal,
    Normal,
)

from pyro_subnet.options import ModelFactors

# Pyro's and torch's own; a class that a user derives may be anything.
_NORMALS = (dist.Normal, dist.NanMaskedNormal, Normal)
_JOINT_NORMALS = (
    dist.MultivariateNormal,
    dist.NanMaskedMultivariateNormal,
    MultivariateNormal,
)
_WRAPPERS = (MaskedDistribution, ExpandedDistribution, Independent)


@final
class ScaledModel:
    """A model whose normal priors and normal noise are multiplied by factors.

    A prior that is not normal keeps its own precision. Everything else is the user's.

    Args:
        model: The user's model.
        factors: By latent site, and of the noise.
        latents: Names of the latent sites: every other site may hold noise.
    """

    def __init__(
        self, model: Callable[..., Any], factors: ModelFactors, latents: tuple[str, ...]
    ):
        self._model, self._factors = model, factors
        self._latents = frozenset(latents)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the user's model."""
        with _Scales(self._factors, self._latents):
            return self._model(*args, **kwargs)


@final
class _Scales(Messenger):
    """Multiplies the scale of each site's distribution before anything is drawn."""

    def __init__(self, factors: ModelFactors, latents: frozenset[str]):
        super().__init__()
        self._factors, self._latents = factors, latents

    def of(self, name: str, fn: Any) -> Any:
        """A site's distribution under its factor; itself without one."""
        scale = 1.0
        if name not in self._latents:
            scale = self._factors.noise if has_normal_noise(fn) else 1.0
        elif is_scalable(fn):
            scale = self._factors.prior.get(name, 1.0) ** -0.5
        return fn if scale == 1.0 else rescaled(fn, scale)

    def _pyro_sample(self, msg: Message) -> None:
        msg["fn"] = self.of(msg["name"], msg["fn"])


def charge(
    model: Callable[..., Any],
    factors: ModelFactors,
    values: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    r"""Adds to a guide's density what factors take from its model's.

    .. math:: \log p(y, \theta) - \log p_{s,r}(y, \theta)

    so that the guide's ELBO with the user's model is that with the model under the
    factors. To be called in the guide, whose trace is shown the model's subsamples.

    Args:
        model: The user's model.
        factors: Of its priors and noise.
        values: The latent sites, as the guide has drawn them.
        args: Positional arguments of the model.
        kwargs: Its keyword arguments.
    """
    with (
        poutine.block(hide_fn=lambda msg: not site_is_subsample(msg)),
        poutine.trace() as tracer,
        poutine.condition(data=dict(values)),
    ):
        model(*args, **kwargs)
    scales = _Scales(factors, frozenset(values))
    added = []
    for node in tracer.trace.nodes.values():
        if node["type"] != "sample" or site_is_subsample(node):
            continue
        if not node["is_observed"]:  # data that were not given
            continue
        scaled = scales.of(node["name"], node["fn"])
        if scaled is not node["fn"]:
            value = node["value"]
            density = node["fn"].log_prob(value) - scaled.log_prob(value)
            added.append(scale_and_mask(density, node["scale"], node["mask"]).sum())
    if added:  # a noise changes nothing where no data were given
        pyro.factor("_factors", torch.stack(added).sum(), has_rsample=True)


def has_normal_noise(fn: Any) -> bool:
    """Whether an observed site is normal, element by element."""
    return type(_plain(fn)) in _NORMALS


def is_joint(fn: Any) -> bool:
    """Whether a prior is normal over several elements at once."""
    return type(_plain(fn)) in _JOINT_NORMALS


def is_scalable(fn: Any) -> bool:
    """Whether a prior is normal, so that its precision can be multiplied."""
    return type(_plain(fn)) in (*_NORMALS, *_JOINT_NORMALS)


def rescaled(fn: Any, scale: float) -> Any:
    """A normal distribution, in any wrappers, of ``scale`` times the deviation."""
    if isinstance(fn, MaskedDistribution):
        return dist.MaskedDistribution(rescaled(fn.base_dist, scale), fn._mask)
    if isinstance(fn, ExpandedDistribution):
        return rescaled(fn.base_dist, scale).expand(fn.batch_shape)
    if isinstance(fn, Independent):
        inner = rescaled(fn.base_dist, scale)
        return dist.Independent(inner, fn.reinterpreted_batch_ndims)
    # Pyro's class for torch's, which has no `mask`.
    kind = type(fn) if isinstance(fn, dist.TorchDistribution) else None
    if type(fn) in _NORMALS:
        return (kind or dist.Normal)(fn.loc, fn.scale * scale, validate_args=False)
    return (kind or dist.MultivariateNormal)(
        fn.loc, scale_tril=fn.scale_tril * scale, validate_args=False
    )


def _plain(fn: Any) -> Any:
    while isinstance(fn, _WRAPPERS):
        fn = fn.base_dist
    return fn
