"""Mixtures of a site's family over values of its outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import Distribution

from pyro_subnet.curvature.likelihood import Family
from pyro_subnet.exceptions import NonFiniteError, OptionError
from pyro_subnet.models.draws import constructor
from pyro_subnet.tracing.output_site import SiteDistribution

# Families with Gaussian noise, and the argument that scales it.
NOISES: Mapping[type[Distribution], str] = {
    td.Normal: "scale",
    td.LogNormal: "scale",
    td.MultivariateNormal: "scale_tril",
}


@dataclass(frozen=True, eq=False)
class Likelihood:
    r"""One observed site: p(y | η) at each datum, as a function of η.

    Attributes:
        taken: The site's distribution at the MAP, taken apart.
        family: Its family.
        moved: Names of the parameters that the subnet moves.
        like: Dtype and device of η.
        follows_inputs: Whether the parameters keep their graph.
        noise_scale: Factor of the scale of Gaussian noise.
    """

    taken: SiteDistribution
    family: Family
    moved: Sequence[str]
    like: Tensor
    follows_inputs: bool = False
    noise_scale: float | Tensor = 1.0

    @property
    def shape(self) -> torch.Size:
        """Shape of the elements: the data, then what one datum has."""
        return self.taken.element_shape or torch.Size((1,))

    @property
    def rest(self) -> torch.Size:
        """Shape of the elements of one datum."""
        return self.shape[1:]

    @property
    def scales_noise(self) -> bool:
        """Whether ``noise_scale`` is anything but the number 1."""
        return isinstance(self.noise_scale, Tensor) or self.noise_scale != 1.0

    @property
    def per_datum(self) -> int:
        """E, how many elements a datum has."""
        return math.prod(self.rest)

    def own(self) -> dict[str, Tensor]:
        """Every parameter at the MAP, shape (N, *rest, width)."""
        found = {}
        for name, value in self.family.outputs(self.taken.base).items():
            wide = value.expand(*self.shape, value.shape[-1]).to(self.like)
            found[name] = wide if self.follows_inputs else wide.detach()
        return found

    def noise_factor(self) -> Tensor:
        """What the scale of each element's Gaussian noise is multiplied by.

        Returns:
            Shape (N, *rest).

        Raises:
            OptionError: If the family has no Gaussian noise, or shapes do not fit.
        """
        like = self.like
        factor = torch.as_tensor(self.noise_scale, dtype=like.dtype, device=like.device)
        if self.family.distribution not in NOISES:
            raise OptionError(
                "`noise_scale` must be 1.0 where y has no Gaussian noise; got "
                f"{self.noise_scale} for {self.family.distribution.__name__}. Leave it "
                "out."
            )
        try:
            return factor.expand(self.shape)
        except RuntimeError as err:
            raise OptionError(
                f"`noise_scale` must broadcast to {tuple(self.shape)}, the elements "
                f"of the site; got shape {tuple(factor.shape)}. Pass a number."
            ) from err

    def argument(self, name: str, outputs: Mapping[str, Tensor]) -> Tensor:
        """The constructor's argument at some parameters.

        Args:
            name: Its name.
            outputs: As :meth:`own` gives them.

        Returns:
            Shape (N, *rest, *event).
        """
        value: Tensor = self.family.parameters(self.taken.base, outputs)[name]
        return value

    def at(self, eta: Tensor, axis: int) -> Any:
        """The family at many η, their axis K among those of the elements.

        Args:
            eta: Shape (K, N, C), parameter by parameter.
            axis: Where K goes: before element axis ``axis``.

        Returns:
            Batch shape ``shape[:axis] + (K,)``, the other elements in the event.

        Raises:
            NonFiniteError: If a parameter overflows.
        """
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
            factor = self.noise_factor().unsqueeze(axis)
            parameters[name] = parameters[name] * factor[(..., *(None,) * extra)]
        for name in self.family.coordinates.constants:
            parameters[name] = self._constant(parameters[name], axis)
        for name, value in parameters.items():
            _check_finite(name, value)
        built: Any = constructor(self.taken, self.family)(**parameters)
        inner = len(self.shape) - axis
        return built.to_event(inner) if inner else built

    def _constant(self, value: Any, axis: int) -> Any:
        """A constant argument with an axis for K, if it differs between data."""
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        return value.expand(self.shape).unsqueeze(axis)


def mixture(likelihood: Likelihood, eta: Tensor, log_weights: Tensor, axis: int) -> Any:
    """The mixture of a site's family over values of η.

    Args:
        likelihood: The site.
        eta: Shape (K, N, C).
        log_weights: Shape (K,).
        axis: 0 mixes all data at once, 1 each datum, the number of axes each element.

    Returns:
        A ``MixtureSameFamily``; with ``axis`` 0 no batch shape, else batch shape (N,).
    """
    component = likelihood.at(eta, axis)
    logits = log_weights.expand(component.batch_shape)
    mixed = dist.MixtureSameFamily(dist.Categorical(logits=logits), component)
    outer = axis - 1
    return mixed.to_event(outer) if outer > 0 else mixed


def standard_error(mixed: Any, value: Tensor) -> Tensor:
    r"""Standard error of the log density of a mixture over K equal draws.

    .. math:: \frac{1}{\sqrt K}
        \operatorname{std}_k \Big(\frac{p(y \mid \eta_k)}{\bar p(y)}\Big)

    Args:
        mixed: A ``MixtureSameFamily``.
        value: y.

    Returns:
        Shape of ``mixed.log_prob(value)``, in nats.
    """
    component: Distribution = mixed.component_distribution
    log_prob = component.log_prob(mixed._pad(value))
    count = log_prob.shape[-1]
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
