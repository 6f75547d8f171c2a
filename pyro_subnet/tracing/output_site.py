"""Output sites: distributions taken apart into independent elements of a family."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pyro.distributions.torch_distribution import (
    ExpandedDistribution,
    MaskedDistribution,
)
from torch import Tensor
from torch.distributions import Distribution

from pyro_subnet.curvature.likelihood import Family, find_family
from pyro_subnet.exceptions import ModelError, NonFiniteError
from pyro_subnet.tracing.trace import Node, plate_scale


@dataclass(frozen=True, eq=False)
class SiteDistribution:
    """A site's distribution, taken apart: independent elements of a plain family.

    Attributes:
        base: The family's distribution, without wrappers.
        element_shape: Shape of the independent elements: the batch, then the event
            dimensions that ``to_event`` declared.
        event_dim: How many of those ``to_event`` declared.
        mask: Bool tensor of the element shape from ``.mask()``, or None.
    """

    base: Distribution
    element_shape: torch.Size
    event_dim: int
    mask: Tensor | None

    @classmethod
    def of(cls, fn: Distribution, value: Tensor) -> SiteDistribution:
        """Takes a distribution apart.

        Args:
            fn: What the site samples from, under any of ``to_event``, ``mask``,
                ``expand``.
            value: The site's value; it may have more batch dimensions than ``fn``,
                which then count as that many data.

        Returns:
            The parts.
        """
        base, event_dim, masks = fn, 0, []
        while True:
            if isinstance(base, MaskedDistribution):
                masks.append((base._mask, event_dim))
                base = base.base_dist
            elif isinstance(base, ExpandedDistribution):
                base = base.base_dist
            elif isinstance(base, torch.distributions.Independent):
                event_dim += base.reinterpreted_batch_ndims
                base = base.base_dist
            else:
                break
        own = len(base.event_shape)
        event = fn.event_shape[: len(fn.event_shape) - own]
        sampled = value.shape[: value.ndim - own]
        shape = torch.broadcast_shapes(fn.batch_shape + event, sampled)
        mask = None
        for part, outside in masks:
            # Event dimensions declared outside a mask are batch dimensions to it.
            inside = event_dim - outside
            wide = _spread(part, inside, shape, value.device).to(torch.bool)
            mask = wide if mask is None else mask & wide
        return cls(base, shape, event_dim, mask)


@dataclass(frozen=True, eq=False)
class OutputSite:
    """A site whose distribution is the model's output, at the MAP.

    Attributes:
        name: Its name.
        family: Its family of distributions.
        distribution: Its distribution, taken apart.
        node: Its node in the reference trace.
    """

    name: str
    family: Family
    distribution: SiteDistribution
    node: Node

    @classmethod
    def read(cls, name: str, node: Node) -> OutputSite:
        """Reads a site of the reference trace.

        Args:
            name: Its name.
            node: Its node.

        Returns:
            The site.

        Raises:
            NonFiniteError: If a parameter of its distribution is not finite.
        """
        taken = SiteDistribution.of(node["fn"], node["value"])
        site = cls(name, find_family(taken.base), taken, node)
        for part, value in site.family.outputs(taken.base).items():
            # Minus infinity is a class or count of probability zero, as masks make it.
            bad = int((value.isnan() | value.isposinf()).sum())
            if bad:
                raise NonFiniteError(
                    f"The outputs must be finite at the MAP; got {bad} NaN or inf of "
                    f"{value.numel()} values of `{part}` at site {name!r}. Check the "
                    "inputs and the network."
                )
        return site

    @property
    def num_elements(self) -> int:
        """M, how many independent elements the site has."""
        return math.prod(self.distribution.element_shape)

    @property
    def leading(self) -> int:
        """Length of the first axis of its elements; 1 if it has none."""
        shape = self.distribution.element_shape
        return shape[0] if shape else 1

    def num_seen(self, rows: int | None) -> int | None:
        """How many data the site shows.

        Args:
            rows: Length of the first axis of the call's first tensor, which tells the
                plate over the data from others.

        Returns:
            The size of its one plate, or of the one that is as long as ``rows``; the
            length of its first axis without plates; None if that does not tell.
        """
        plates = [f.size for f in self.node["cond_indep_stack"] if f.vectorized]
        if not plates:
            return self.leading
        if len(plates) > 1:
            plates = [size for size in plates if size == rows]
        return plates[0] if len(plates) == 1 else None

    def widths(self, parts: Sequence[str]) -> list[int]:
        """How many numbers each of some parameters has in an element.

        Args:
            parts: Names of parameters.

        Returns:
            One width a parameter; their sum is c.
        """
        values = self.family.outputs(self.distribution.base)
        return [values[part].shape[-1] for part in parts]

    def outputs(self, node: Node, parts: Sequence[str] | None = None) -> Tensor:
        """Parameters of the site in some run, element by element.

        Args:
            node: Its node in that run's trace, perhaps over other data.
            parts: Names of the parameters; by default all.

        Returns:
            Unconstrained, shape (*element shape, c).
        """
        taken = SiteDistribution.of(node["fn"], node["value"])
        values = self.family.outputs(taken.base)
        chosen = list(values) if parts is None else parts
        joined = torch.cat([values[part] for part in chosen], dim=-1)
        return joined.expand(*taken.element_shape, joined.shape[-1])

    def moved_parts(self, node: Node, leaves: list[Tensor]) -> tuple[str, ...]:
        """Parameters that some leaves move.

        Args:
            node: Its node in a run with a graph from those leaves.
            leaves: Tensors that need gradients.

        Returns:
            Names of the parameters whose graph reaches any leaf.
        """
        base = SiteDistribution.of(node["fn"], node["value"]).base
        return tuple(
            part
            for part, value in self.family.outputs(base).items()
            if value.requires_grad and _reaches(value, leaves)
        )

    def weighted_root(self, parts: Sequence[str], without_plates: bool) -> Tensor:
        r"""Root of the weighted output Hessian, :math:`\sqrt{w} R`, of each element.

        Args:
            parts: Names of parameters.
            without_plates: Leaves out the N/B of subsampling plates.

        Returns:
            Shape (M, r, c) with :math:`R^\top R = \Lambda`, detached.
        """
        taken = self.distribution
        with torch.no_grad():
            root = self.family.root(taken.base, parts)
            shape = (*taken.element_shape, *root.shape[-2:])
            wide = root.expand(shape).reshape(-1, *root.shape[-2:])
            weights = site_weights(self.node, taken, without_plates).to(root)
            return wide * weights.sqrt()[:, None, None]

    def check_repeats(self, node: Node) -> None:
        """A random model has no Jacobian: two runs must give the same outputs.

        Args:
            node: The site's node in a second run.

        Raises:
            ModelError: If they differ beyond round-off.
        """
        again = self.family.outputs(SiteDistribution.of(node["fn"], node["value"]).base)
        for part, value in self.family.outputs(self.distribution.base).items():
            second = again[part].detach()
            tolerance = torch.finfo(value.dtype).eps ** 0.5
            if not torch.allclose(value, second, tolerance, tolerance):
                gap = (value - second).abs().amax()
                raise ModelError(
                    f"The model must give the same outputs in every run; got values of "
                    f"`{part}` at site {self.name!r} that differ by {float(gap):.3g} "
                    "between two runs. Switch dropout off with `.eval()` on the "
                    "network."
                )


def site_weights(node: Node, site: SiteDistribution, without_plates: bool) -> Tensor:
    """w of each element: the site's scale times its masks.

    Args:
        node: Node of a model trace.
        site: Its distribution, taken apart.
        without_plates: Leaves out the N/B of subsampling plates, so that minibatches
            which together hold every datum once can be summed.

    Returns:
        Shape (M,), non-negative, float64.

    Raises:
        ModelError: If a scale is negative.
    """
    device = node["value"].device
    dims = site.event_dim
    weights = _spread(node["scale"], dims, site.element_shape, device)
    weights = weights.to(torch.float64)
    if without_plates:
        weights = weights / plate_scale(node)
    if node["mask"] is not None:
        weights = weights * _spread(node["mask"], dims, site.element_shape, device)
    if site.mask is not None:
        weights = weights * site.mask
    if bool((weights < 0).any()):
        raise ModelError(
            f"The scale of site {node['name']!r} must not be negative; got "
            f"{float(weights.min())}. Check `poutine.scale` in the model."
        )
    return weights.reshape(-1)


def _reaches(value: Tensor, leaves: list[Tensor]) -> bool:
    found = torch.autograd.grad(
        value.sum(), leaves, retain_graph=True, allow_unused=True
    )
    return any(gradient is not None for gradient in found)


def _spread(
    part: Tensor | float | bool, dims: int, shape: torch.Size, device: torch.device
) -> Tensor:
    """Broadcasts a batch-shaped number over ``dims`` event dimensions to ``shape``."""
    if not isinstance(part, Tensor):
        part = torch.tensor(part, dtype=torch.float64)
    tensor = part.to(device)
    return tensor.reshape(tensor.shape + (1,) * dims).expand(shape)
