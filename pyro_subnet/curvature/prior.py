r"""Negative Hessian of the log prior, restricted to the chosen elements.

Most priors factorize over elements, so their Hessian is a diagonal. Hierarchical
scales, correlated priors and factors add a few dense columns: only those are computed
by Hessian-vector products, and only those are stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyro_subnet.exceptions import OptionError
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.grad_mode import differentiable


@dataclass(frozen=True, eq=False)
class DensityTerm:
    """One term of the log prior, a differentiable scalar.

    Attributes:
        log_density: Sum over the site's elements, with its scale, mask and the
            transform's Jacobian, as a function of the unconstrained leaves.
        site: The latent site that it is the prior of; None for a factor.
        elementwise: Whether, given the other sites, the elements of ``site`` are
            independent, so that their Hessian is diagonal.
    """

    log_density: Float[Tensor, ""]
    site: str | None
    elementwise: bool


@dataclass(frozen=True, eq=False)
class PriorPrecision:
    """P0 over the subnet: a diagonal, and dense columns where elements couple.

    Attributes:
        diagonal: Shape (S,).
        coupled: Positions within the subnet that have a dense column, shape (k,).
        columns: Those columns, shape (S, k).
    """

    diagonal: Float[Tensor, " subnet"]
    coupled: Int[Tensor, " coupled"]
    columns: Float[Tensor, "subnet coupled"]

    def to(self, dtype: torch.dtype) -> PriorPrecision:
        """The same in another floating point type.

        Args:
            dtype: The type.

        Returns:
            P0.
        """
        return PriorPrecision(
            self.diagonal.to(dtype), self.coupled, self.columns.to(dtype)
        )

    def scaled(self, scale: float | Tensor) -> PriorPrecision:
        """The precision multiplied by a scale.

        Args:
            scale: One number, or one for each element, shape (S,), where elements that
                couple share one.

        Returns:
            P0, scaled.

        Raises:
            OptionError: If elements that couple have different scales.
        """
        if not isinstance(scale, Tensor):
            return PriorPrecision(
                scale * self.diagonal, self.coupled, scale * self.columns
            )
        scale = scale.to(self.diagonal)
        theirs = scale[self.coupled]
        differ = (self.columns != 0) & (scale.unsqueeze(-1) != theirs)
        if bool(differ.any()):
            row, column = differ.nonzero()[0].tolist()
            raise OptionError(
                "Elements that the prior couples must have one prior scale; got "
                f"{float(scale[row]):g} and {float(theirs[column]):g} at positions "
                f"{row} and {int(self.coupled[column])} of the subnet. Give their "
                "sites the same scale."
            )
        return PriorPrecision(
            scale * self.diagonal, self.coupled, theirs * self.columns
        )

    def add_to_lower_(
        self, lower: Float[Tensor, "subnet subnet"], scale: float
    ) -> None:
        """Adds ``scale`` times P0 to the lower triangle of a matrix, in place.

        Args:
            lower: Shape (S, S); what is above its diagonal stays.
            scale: Factor of the prior precision, dimensionless.
        """
        lower.diagonal().add_(self.diagonal, alpha=scale)
        # Left of the diagonal only what couples to no column, which covers the rest.
        rows = self.columns.index_fill(0, self.coupled, 0.0)
        for k, position in enumerate(self.coupled.tolist()):
            below = slice(position + 1, None)
            lower[below, position].add_(self.columns[below, k], alpha=scale)
            lower[position, :position].add_(rows[:position, k], alpha=scale)


def prior_precision(
    terms: Sequence[DensityTerm],
    leaves: Mapping[str, Tensor],
    subnet: Subnet,
    budget: int,
) -> PriorPrecision:
    r"""P0 = :math:`-\nabla^2_S \log p(\theta)` at the leaves' values.

    Args:
        terms: The log prior, term by term, with its graph back to the leaves.
        leaves: Unconstrained value of every latent site.
        subnet: The chosen elements.
        budget: Bytes that a group of Hessian columns may take.

    Returns:
        P0 over the subnet.
    """
    with differentiable():
        gradients = _Gradients.of(terms, leaves)
    diagonal = subnet.gather(gradients.elementwise_curvature(leaves))
    chosen = subnet.indices
    sites = [site for site in subnet.layout.names if site in chosen]
    is_coupled = torch.cat(
        [
            torch.full((chosen[site].numel(),), site in gradients.coupled)
            for site in sites
        ]
    ).to(diagonal.device)
    coupled = is_coupled.nonzero().squeeze(-1)
    columns = diagonal.new_empty(subnet.size, coupled.numel())
    wanted = {site: chosen[site] for site in sites if site in gradients.coupled}
    start = 0
    for hessian in _hessian_rows(gradients, leaves, wanted, budget):
        count = hessian[sites[0]].shape[0]
        rows = [hessian[site].index_select(1, chosen[site]) for site in sites]
        columns[:, start : start + count] = torch.cat(rows, dim=1).mT
        start += count
    diagonal[coupled] = columns[coupled, torch.arange(coupled.numel())]
    return PriorPrecision(diagonal, coupled, columns)


def prior_diagonal(
    terms: Sequence[DensityTerm], leaves: Mapping[str, Tensor], budget: int
) -> Float[Tensor, " params"]:
    """Diagonal of P0 over all D elements.

    Args:
        terms: The log prior, term by term.
        leaves: Unconstrained value of every latent site, in packing order.
        budget: Bytes that a group of Hessian columns may take.

    Returns:
        Shape (D,).
    """
    with differentiable():
        gradients = _Gradients.of(terms, leaves)
    packed = gradients.elementwise_curvature(leaves)
    pieces = dict(
        zip(
            leaves,
            packed.split([leaf.numel() for leaf in leaves.values()]),
            strict=True,
        )
    )
    for site in gradients.coupled:
        everything = torch.arange(leaves[site].numel(), device=packed.device)
        start = 0
        for hessian in _hessian_rows(gradients, leaves, {site: everything}, budget):
            own = hessian[site]
            picked = torch.arange(own.shape[0], device=packed.device)
            pieces[site][start + picked] = own[picked, start + picked]
            start += own.shape[0]
    return packed


@dataclass(frozen=True, eq=False)
class _Gradients:
    """First derivatives of the log prior, kept with their graph."""

    total: Mapping[str, Tensor]
    coupled: frozenset[str]

    @classmethod
    def of(
        cls, terms: Sequence[DensityTerm], leaves: Mapping[str, Tensor]
    ) -> _Gradients:
        total = {site: torch.zeros_like(leaf) for site, leaf in leaves.items()}
        coupled = set()
        for term in terms:
            if not term.log_density.requires_grad:
                continue
            found = torch.autograd.grad(
                term.log_density,
                list(leaves.values()),
                create_graph=True,
                allow_unused=True,
            )
            for site, gradient in zip(leaves, found, strict=True):
                if gradient is None:
                    continue
                total[site] = total[site] + gradient
                if not term.elementwise or site != term.site:
                    coupled.add(site)
        return cls(total, frozenset(coupled))

    def elementwise_curvature(self, leaves: Mapping[str, Tensor]) -> Tensor:
        """Packed diagonal for the sites that couple to nothing; 0 for the others.

        Their Hessian is diagonal, so its row sums, one backward pass, are it.

        Args:
            leaves: Unconstrained value of every latent site.

        Returns:
            Shape (D,), detached.
        """
        parts = []
        for site, leaf in leaves.items():
            gradient = self.total[site]
            curvature = None
            if site not in self.coupled and gradient.requires_grad:
                (curvature,) = torch.autograd.grad(
                    gradient,
                    leaf,
                    torch.ones_like(gradient),
                    retain_graph=True,
                    allow_unused=True,
                )
            zero = torch.zeros_like(leaf)
            parts.append((zero if curvature is None else -curvature).flatten())
        return torch.cat(parts).detach()


def _hessian_rows(
    gradients: _Gradients,
    leaves: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    budget: int,
) -> Iterator[dict[str, Tensor]]:
    """Rows of P0 for the wanted elements, in groups: {site: (rows, site size)}."""
    if not wanted:
        return
    with differentiable():
        first = torch.cat(
            [gradients.total[site].flatten()[within] for site, within in wanted.items()]
        )
    total = sum(leaf.numel() for leaf in leaves.values())
    group = max(1, budget // (4 * total * first.element_size()))
    for start in range(0, first.numel(), group):
        count = min(group, first.numel() - start)
        directions = first.new_zeros(count, first.numel())
        directions[:, start : start + count].fill_diagonal_(1.0)
        second: Sequence[Tensor | None] = [None] * len(leaves)
        if first.requires_grad:
            second = torch.autograd.grad(
                first,
                list(leaves.values()),
                directions,
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=True,
            )
        yield {
            site: -row.reshape(count, -1)
            if row is not None
            else leaf.new_zeros(count, leaf.numel())
            for (site, leaf), row in zip(leaves.items(), second, strict=True)
        }
