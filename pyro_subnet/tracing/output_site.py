"""Output sites: observed distributions, and the weights of their elements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from pyro_subnet.curvature.likelihood import Family, readable_or_not
from pyro_subnet.exceptions import ModelError, NonFiniteError
from pyro_subnet.tensors.graph import leads_to
from pyro_subnet.tensors.memory import DEFAULT_BUDGET, check_fits
from pyro_subnet.tracing.plate_shape import check_shape
from pyro_subnet.tracing.plates import num_shown, plate_scale
from pyro_subnet.tracing.site_distribution import SiteDistribution, spread
from pyro_subnet.tracing.trace import Node, preserved_rng

# The roots, what they are made of, and their rows as cotangents.
_ROOTS_HELD = 4


@final
@dataclass(frozen=True, eq=False)
class OutputSite:
    """A site whose distribution is the model's output, read at the MAP."""

    name: str
    family: Family
    distribution: SiteDistribution
    node: Node

    @classmethod
    def read(cls, name: str, node: Node) -> OutputSite:
        """The site; an error if its shape is wrong, or a parameter is not finite."""
        check_shape(node)
        taken = SiteDistribution.of(node["fn"], node["value"])
        site = cls(name, readable_or_not(taken.base), taken, node)
        for part, value in site.own(node).items():
            # Minus infinity is a class or count of probability zero, as masks make it.
            bad = int((value.isnan() | value.isposinf()).sum())
            if bad:
                raise NonFiniteError(
                    f"The outputs must be finite at the MAP; got {bad} NaN or inf of "
                    f"{value.numel()} values of `{part}` at site {name!r}. Check the "
                    "inputs and the network."
                )
        return site

    def weights(self, *, without_plates: bool) -> Tensor:
        """w of each element, as `_site_weights` says, of the run at the MAP."""
        if without_plates and plate_scale(self.node) != 1:
            return _site_weights(self.node, self.distribution, without_plates=True)
        return self._weights

    @cached_property
    def _weights(self) -> Tensor:
        return _site_weights(self.node, self.distribution, without_plates=False)

    @cached_property
    def value(self) -> Tensor:
        """The data, (*element shape, *event); draws where the weight is zero."""
        # What is masked may be NaN, or a label that is no class: a weight of zero does
        # not remove the one, and the other has no density.
        taken = self.distribution
        event = taken.base.event_shape
        value: Tensor = self.node["value"].expand(taken.element_shape + event)
        left_out = self.weights(without_plates=False) == 0
        if bool(left_out.any()):
            with preserved_rng(), torch.no_grad():
                draws = taken.base.expand(taken.element_shape).sample()
            out = left_out.reshape(taken.element_shape + (1,) * len(event))
            value = draws.where(out, value)
        return value

    @cached_property
    def log_density(self) -> Tensor:
        """Unweighted log density of :attr:`value`, element by element, in nats."""
        taken = self.distribution
        with torch.no_grad():
            return taken.base.log_prob(self.value).expand(taken.element_shape)

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
        """Number of data points that the site shows; None if its plates do not tell."""
        if not self.node["cond_indep_stack"]:
            return self.leading
        return num_shown(self.node, rows)

    def own(self, node: Node) -> dict[str, Tensor]:
        """Unconstrained parameters in some run; of an unreadable family its density."""
        return self._own if node is self.node else self._own_of(node)

    @cached_property
    def _own(self) -> dict[str, Tensor]:
        return self._own_of(self.node)

    def _own_of(self, node: Node) -> dict[str, Tensor]:
        taken = self._taken(node)
        if self.family.unreadable is None:
            return self.family.outputs(taken.base)
        density = taken.base.log_prob(node["value"]).expand(taken.element_shape)
        # What is masked may be NaN.
        live = _site_weights(node, taken, False).reshape(density.shape) != 0
        return {"log_prob": density.where(live, 0.0).unsqueeze(-1)}

    def _taken(self, node: Node) -> SiteDistribution:
        """The site's distribution in some run, taken apart."""
        if node is self.node:
            return self.distribution
        return SiteDistribution.of(node["fn"], node["value"])

    def require_outputs(self) -> None:
        """Refuses a family that has a density alone.

        Raises:
            UnsupportedLikelihoodError: Why it cannot be taken apart.
        """
        if self.family.unreadable is not None:
            raise self.family.unreadable

    def widths(self, parts: Sequence[str]) -> list[int]:
        """Numbers that each of some parameters has in an element; they add up to c."""
        values = self.own(self.node)
        return [values[part].shape[-1] for part in parts]

    def outputs(self, node: Node, parts: Sequence[str] | None = None) -> Tensor:
        """Unconstrained parameters in some run, by default all, (*element shape, c)."""
        values = self.own(node)
        chosen = list(values) if parts is None else parts
        joined = torch.cat([values[part] for part in chosen], dim=-1)
        return joined.expand(*self._taken(node).element_shape, joined.shape[-1])

    def moved_parts(self, node: Node, leaves: list[Tensor]) -> tuple[str, ...]:
        """Names of the parameters whose graph, in ``node``'s run, reaches any leaf."""
        # One leaf tells, and the gradient of a small one costs least.
        ascending = sorted(leaves, key=Tensor.numel)
        return tuple(
            part
            for part, value in self.own(node).items()
            if value.requires_grad and any(_reached(value, [u]) for u in ascending)
        )

    def parts_like_the_first(self, node: Node, leaves: list[Tensor]) -> tuple[str, ...]:
        """Names of the parameters that share leaves with the first that has any."""
        for value in self.own(node).values():
            reached = _reached(value, leaves) if value.requires_grad else []
            if reached:
                return self.moved_parts(node, reached)
        return ()

    def reached_parts(self, node: Node, leaves: list[Tensor]) -> tuple[str, ...]:
        """The same, by the graph's structure alone."""
        return tuple(
            part
            for part, value in self.own(node).items()
            if value.requires_grad and leads_to(value, leaves)
        )

    def varies(self, known: Sequence[str]) -> bool:
        """Whether a parameter, other than those known, may differ from row to row."""
        base, shape = self.distribution.base, self.distribution.element_shape
        for part in self.family.coordinates.parts:
            value = getattr(base, part.argument)
            # A number that all data share is expanded along their axis, or has none.
            own = value.ndim - part.transform.codomain.event_dim
            shared = own < len(shape) or not value.ndim or value.stride(0) == 0
            if part.name not in known and not shared:
                return True
        return self.family.unreadable is not None and not known

    def root_bytes(self, width: int) -> int:
        """Bytes that making all roots of Λ takes, of ``width`` outputs an element."""
        like = next(iter(self.own(self.node).values()))
        return _ROOTS_HELD * self.num_elements * width**2 * like.element_size()

    def _check_roots_fit(self, width: int) -> None:
        needed, like = self.root_bytes(width), self.node["value"]
        if needed > DEFAULT_BUDGET:  # smaller ones are not worth asking for
            check_fits(
                needed,
                like.device,
                "Roots of the output Hessians of one call, C x C each, must fit in "
                f"memory; got {self.num_elements} of C={width} at site {self.name!r}",
                "Pass the data in smaller batches to `laplace_approximation_from`.",
            )

    def weighted_root(self, parts: Sequence[str], without_plates: bool) -> Tensor:
        r"""Root :math:`\sqrt{w} R` of each element, :math:`R^\top R = \Lambda`."""
        taken = self.distribution
        self._check_roots_fit(sum(self.widths(parts)))
        with torch.no_grad():
            root = self.family.root(taken.base, parts)
            shape = (*taken.element_shape, *root.shape[-2:])
            wide = root.expand(shape).reshape(-1, *root.shape[-2:])
            weights = self.weights(without_plates=without_plates).to(root)
            # (sqrt(w) R)^T (sqrt(w) R) = w Lambda
            return wide * weights.sqrt()[:, None, None]


def _site_weights(node: Node, site: SiteDistribution, without_plates: bool) -> Tensor:
    """w of each element, shape (M,), float64: the site's scale times its masks."""
    device = node["value"].device
    dims = site.event_dim
    weights = spread(node["scale"], dims, site.element_shape, device)
    weights = weights.to(torch.float64)
    # Minibatches that together hold every data point once are summed without N/B.
    if without_plates:
        weights = weights / plate_scale(node)
    if node["mask"] is not None:
        weights = weights * spread(node["mask"], dims, site.element_shape, device)
    if site.mask is not None:
        weights = weights * site.mask
    if bool((weights < 0).any()):
        raise ModelError(
            f"The scale of site {node['name']!r} must not be negative; got "
            f"{float(weights.min())}. Check `poutine.scale` in the model."
        )
    return weights.reshape(-1)


def _reached(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """The leaves that a value's graph leads to, with a gradient."""
    found = torch.autograd.grad(
        value.sum(), leaves, retain_graph=True, allow_unused=True
    )
    pairs = zip(leaves, found, strict=True)
    return [leaf for leaf, gradient in pairs if gradient is not None]


def stand_alike(sites: Sequence[OutputSite]) -> bool:
    """Whether all sites stand in the same plates, with one length: all are data."""
    return len({_place(site) for site in sites}) < 2  # noqa: PLR2004 - nothing to tell


def data_sites(
    sites: Sequence[OutputSite], nodes: Mapping[str, Any], leaves: list[Tensor]
) -> tuple[OutputSite, ...]:
    """The sites that are data, by the graph of a run to all latent leaves."""
    # `pyro.condition` makes an observed site of a hyperparameter as it does of data. No
    # latent site moves it, and it stands elsewhere than what they do move.
    moved = [site for site in sites if site.moved_parts(nodes[site.name], leaves)]
    places = {_place(site) for site in moved}
    return tuple(
        site
        for site in sites
        if not moved or not site.node["is_observed"] or _place(site) in places
    )


def _place(site: OutputSite) -> tuple[frozenset[str], tuple[int, ...]]:
    """The plates around a site, and the length of its first axis, if it has one."""
    frames = site.node["cond_indep_stack"]
    plates = frozenset(frame.name for frame in frames if frame.vectorized)
    return plates, tuple(site.distribution.element_shape[:1])
