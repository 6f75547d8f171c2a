"""Mixtures of a site's family over values of its outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import pyro.distributions as dist
import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import Distribution

from pyro_subnet.curvature.likelihood import Family
from pyro_subnet.exceptions import NonFiniteError, OptionError
from pyro_subnet.tracing.site_distribution import SiteDistribution

# Families over classes, with one logit each.
CLASSES = (td.Categorical, td.OneHotCategorical)
# Families with Gaussian noise, and the argument that scales it.
NOISES: Mapping[type[Distribution], str] = {
    td.Normal: "scale",
    td.LogNormal: "scale",
    td.MultivariateNormal: "scale_tril",
}


@final
@dataclass(frozen=True, eq=False)
class Likelihood:
    """One observed site: p(y | η) at each data point, as a function of η.

    Attributes:
        taken: The site's distribution at the MAP.
        moved: Names of the parameters that the subnet moves.
        like: Dtype and device of η.
        follows_inputs: Whether the parameters keep their graph.
        noise_factor: Factor of the scale of Gaussian noise.
    """

    taken: SiteDistribution
    family: Family
    moved: Sequence[str]
    like: Tensor
    follows_inputs: bool = False
    noise_factor: float | Tensor = 1.0

    @property
    def shape(self) -> torch.Size:
        """Shape of the elements: the data points, then the elements of each."""
        return self.taken.element_shape or torch.Size((1,))

    @property
    def rest(self) -> torch.Size:
        """Shape of the elements of one data point."""
        return self.shape[1:]

    @property
    def scales_noise(self) -> bool:
        """Whether ``noise_factor`` is anything but the number 1."""
        return isinstance(self.noise_factor, Tensor) or self.noise_factor != 1.0

    @property
    def per_datum(self) -> int:
        """E, the number of elements of a data point."""
        return math.prod(self.rest)

    def own(self) -> dict[str, Tensor]:
        """Every parameter at the MAP, shape (N, *rest, width)."""
        found = {}
        for name, value in self.family.outputs(self.taken.base).items():
            wide = value.expand(*self.shape, value.shape[-1]).to(self.like)
            found[name] = wide if self.follows_inputs else wide.detach()
        return found

    def noise_of_elements(self) -> Tensor:
        """Factor of each element's Gaussian noise scale, (N, *rest)."""
        like = self.like
        factor = torch.as_tensor(
            self.noise_factor, dtype=like.dtype, device=like.device
        )
        if self.family.distribution not in NOISES:
            raise OptionError(
                "`noise_factor` must be 1.0 where y has no Gaussian noise; got "
                f"{self.noise_factor} for {self.family.distribution.__name__}. Pass "
                "1.0."
            )
        try:
            return factor.expand(self.shape)
        except RuntimeError as err:
            raise OptionError(
                f"`noise_factor` must broadcast to {tuple(self.shape)}, the elements "
                f"of the site; got shape {tuple(factor.shape)}. Pass a number."
            ) from err

    def argument(self, name: str, outputs: Mapping[str, Tensor]) -> Tensor:
        """The constructor's argument at some parameters, (N, *rest, *event)."""
        value: Tensor = self.family.parameters(self.taken.base, outputs)[name]
        return value

    def at(self, eta: Tensor, axis: int) -> Any:
        """The family at η, (K, N, C), with K before element axis ``axis``."""
        own = self.own()
        widths = [own[name].shape[-1] for name in self.moved]
        split = eta.split([self.per_datum * width for width in widths], dim=-1)
        outputs = {
            name: value.unsqueeze(0).expand(len(eta), *value.shape)
            for name, value in own.items()
        }
        for name, width, part in zip(self.moved, widths, split, strict=True):
            outputs[name] = part.reshape(len(eta), *self.shape, width)
        placed = {name: value.movedim(0, axis) for name, value in outputs.items()}
        parameters = self.family.parameters(self.taken.base, placed)
        if self.scales_noise:
            name = NOISES[self.family.distribution]
            extra = parameters[name].ndim - len(self.shape) - 1
            factor = self.noise_of_elements().unsqueeze(axis)
            parameters[name] = parameters[name] * factor[(..., *(None,) * extra)]
        # A constant, such as a count of trials, may differ between data points.
        for name in self.family.coordinates.constants:
            parameters[name] = self._constant(parameters[name], axis)
        for name, value in parameters.items():
            _check_finite(name, value)
        built: Any = self.taken.constructor(self.family)(**parameters)
        # Batch shape[:axis] + (K,); the elements on the right of K are in the event.
        inner = len(self.shape) - axis
        return built.to_event(inner) if inner else built

    def _constant(self, value: Any, axis: int) -> Any:
        """A constant argument with an axis for K, if it differs between elements."""
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        return value.expand(self.shape).unsqueeze(axis)


def mixture(likelihood: Likelihood, eta: Tensor, log_weights: Tensor, axis: int) -> Any:
    """The mixture of the family over η, (K, N, C): batch (N,), or () if axis 0."""
    component = likelihood.at(eta, axis)
    logits = log_weights.expand(component.batch_shape)
    mixed = dist.MixtureSameFamily(dist.Categorical(logits=logits), component)
    # 0 mixes all data points at once, 1 each of them, the number of axes each element.
    outer = axis - 1
    return mixed.to_event(outer) if outer > 0 else mixed


def standard_error(mixed: Any, value: Tensor) -> Tensor:
    """Standard error in nats of the log density of a mixture over K equal draws."""
    component: Distribution = mixed.component_distribution
    log_prob = component.log_prob(mixed._pad(value))
    count = log_prob.shape[-1]
    # std_k(p(y | eta_k) / mean_k p(y | eta_k)) / sqrt(K)
    relative = (log_prob - mixed.log_prob(value).unsqueeze(-1)).exp()
    return relative.std(-1) / math.sqrt(count)


def _check_finite(name: str, value: Any) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return
    bad = int((value.isnan() | value.isposinf()).sum())
    if bad:
        raise NonFiniteError(
            f"`{name}` must be finite wherever the predictive integrates; got {bad} "
            f"non-finite of {value.numel()} values in {value.dtype}. Predict in "
            "float64, or train closer to the MAP."
        )
