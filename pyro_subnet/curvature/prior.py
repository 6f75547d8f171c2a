r"""Negative Hessian of the log prior, restricted to the chosen elements.

Most priors factorize over elements, so their Hessian is a diagonal: of normal ones by
its closed form, at the chosen elements alone. Hierarchical scales, correlated priors
and factors add a few dense columns: only those are computed by Hessian-vector products,
and only those are stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyro_subnet.curvature.density_term import DensityTerm, NormalPrior
from pyro_subnet.exceptions import OptionError
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.modes import differentiable
from pyro_subnet.tensors.row_gradients import RowGradients


@final
@dataclass(frozen=True, eq=False)
class PriorPrecision:
    """P0 over the subnet: a diagonal, and dense columns where elements couple.

    Attributes:
        diagonal: Diagonal of P0, in 1 / parameter squared, shape (S,).
        coupled: Positions within the subnet that have a dense column, shape (k,).
        columns: Those columns, shape (S, k).
    """

    diagonal: Float[Tensor, " subnet"]
    coupled: Int[Tensor, " coupled"]
    columns: Float[Tensor, "subnet coupled"]

    @classmethod
    def of_diagonal(cls, diagonal: Float[Tensor, " subnet"]) -> PriorPrecision:
        """P0 of a prior that couples no elements.

        Args:
            diagonal: Its diagonal, shape (S,).

        Returns:
            P0.
        """
        nothing = torch.empty(0, dtype=torch.long, device=diagonal.device)
        return cls(diagonal, nothing, diagonal.new_empty(len(diagonal), 0))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> PriorPrecision:
        """P0 from its tensors, the inverse of :meth:`tensors`.

        Args:
            tensors: What :meth:`tensors` returned, possibly among others.

        Returns:
            P0.
        """
        names = ("prior_diagonal", "prior_coupled", "prior_columns")
        return cls(*(tensors[name] for name in names))

    def tensors(self) -> dict[str, Tensor]:
        """P0 in tensors, for buffers and files.

        Returns:
            ``{name: tensor}``.
        """
        return {
            "prior_diagonal": self.diagonal,
            "prior_coupled": self.coupled,
            "prior_columns": self.columns,
        }

    @property
    def is_positive_diagonal(self) -> bool:
        """Whether P0 is diagonal, with every entry positive."""
        return not self.coupled.numel() and bool((self.diagonal > 0).all())

    @property
    def is_consistent(self) -> bool:
        """Whether its columns are those of one symmetric matrix with its diagonal."""
        at, size = self.coupled, len(self.diagonal)
        if not at.numel():
            return True
        inside = bool((at[0] >= 0) & (at[-1] < size) & (at[1:] > at[:-1]).all())
        if not inside:
            return False
        square = self.columns[at]
        # Autograd's rows are symmetric up to the round-off of a Hessian's sums.
        off = (square - square.mT).abs().amax()
        limit = torch.finfo(square.dtype).eps ** 0.5 * square.abs().amax()
        return bool(off <= limit) and torch.equal(square.diagonal(), self.diagonal[at])

    def times(self, vector: Float[Tensor, " subnet"]) -> Float[Tensor, " subnet"]:
        """The product of P0 with a vector.

        Args:
            vector: Shape (S,).

        Returns:
            Shape (S,).
        """
        found = self.diagonal * vector
        at = self.coupled
        # Their diagonal entries are in the diagonal already.
        columns = self.columns.clone()
        columns[at, torch.arange(len(at), device=at.device)] = 0.0
        rest = found + columns @ vector[at]
        rest[at] = found[at] + columns.mT @ vector
        return rest

    def to(self, dtype: torch.dtype) -> PriorPrecision:
        """P0 in another floating point type.

        Args:
            dtype: The type.

        Returns:
            P0.
        """
        return PriorPrecision(
            self.diagonal.to(dtype), self.coupled, self.columns.to(dtype)
        )

    def scaled(self, scale: float | Tensor) -> PriorPrecision:
        """P0 multiplied by a scale.

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
        # P0 is symmetric. An entry of two coupled elements is taken below the diagonal
        # of its column; row `position` takes those with elements that have no column.
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
    r"""P0 = :math:`-\nabla^2_S \log p(\theta)` at the values of the leaves."""
    with differentiable():
        gradients = _Gradients.of(terms, leaves)
    chosen = subnet.indices
    sites = [site for site in subnet.layout.names if site in chosen]
    diagonal = torch.cat(
        [gradients.curvature(site, leaves[site], chosen[site]) for site in sites]
    )
    flags = [torch.full(chosen[s].shape, s in gradients.coupled) for s in sites]
    coupled = torch.cat(flags).to(diagonal.device).nonzero().squeeze(-1)
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
    """Diagonal of P0 over all D elements; the leaves stand in packing order."""
    with differentiable():
        gradients = _Gradients.of(terms, leaves)
    packed = torch.cat(
        [gradients.curvature(site, leaf, None) for site, leaf in leaves.items()]
    )
    # Views of `packed`, so that writing to a piece fills its part of the diagonal.
    split = packed.split([leaf.numel() for leaf in leaves.values()])
    pieces = dict(zip(leaves, split, strict=True))
    for site in gradients.coupled:
        everything = torch.arange(leaves[site].numel(), device=packed.device)
        start = 0
        for hessian in _hessian_rows(gradients, leaves, {site: everything}, budget):
            own = hessian[site]
            picked = torch.arange(own.shape[0], device=packed.device)
            pieces[site][start + picked] = own[picked, start + picked]
            start += own.shape[0]
    return packed


def prior_gradient(
    terms: Sequence[DensityTerm], leaves: Mapping[str, Tensor], subnet: Subnet
) -> Float[Tensor, " subnet"]:
    r""":math:`\nabla_S \log p(\theta)` at the leaves in packing order, detached."""
    others = [term for term in terms if term.normal is None]
    live = [term.log_density for term in others if term.log_density.requires_grad]
    chosen = subnet.indices
    found = {
        site: leaves[site].new_zeros(within.shape) for site, within in chosen.items()
    }
    if live:
        with differentiable():
            total = torch.stack([density.sum() for density in live]).sum()
            gradients = torch.autograd.grad(
                total,
                [leaves[site] for site in chosen],
                retain_graph=True,
                allow_unused=True,
            )
        for (site, within), gradient in zip(chosen.items(), gradients, strict=True):
            if gradient is not None:
                found[site] = gradient.flatten()[within]
    for term in terms:
        if term.normal is not None and term.site in chosen:
            site = term.site
            found[site] = found[site] + term.normal.gradient(chosen[site])
    parts = [found[site] for site in subnet.layout.names if site in chosen]
    return torch.cat(parts).detach()


@final
@dataclass(frozen=True, eq=False)
class _Gradients:
    """First derivatives of the log prior, and what has a second one.

    Attributes:
        total: By site, with their graph; without those of normal priors that no other
            term couples.
        coupled: Sites whose curvature is no diagonal.
        normals: Normal priors of the other sites, in closed form.
    """

    total: Mapping[str, Tensor]
    coupled: frozenset[str]
    normals: Mapping[str, NormalPrior]

    @classmethod
    def of(
        cls, terms: Sequence[DensityTerm], leaves: Mapping[str, Tensor]
    ) -> _Gradients:
        total, coupled = dict[str, Tensor](), set[str]()

        def add(term: DensityTerm) -> None:
            if not term.log_density.requires_grad:
                return
            found = torch.autograd.grad(
                term.log_density,
                list(leaves.values()),
                create_graph=True,
                allow_unused=True,
            )
            for site, gradient in zip(leaves, found, strict=True):
                if gradient is None:
                    continue
                total[site] = total[site] + gradient if site in total else gradient
                # A hyperparameter couples to the site whose prior it enters.
                if not term.elementwise or site != term.site:
                    coupled.add(site)

        closed = [term for term in terms if term.normal is not None]
        for term in terms:
            if term.normal is None:
                add(term)
        # What couples a site takes rows of its whole Hessian.
        for term in closed:
            if term.site in coupled:
                add(term)
        normals = {
            term.site: term.normal
            for term in closed
            if term.normal is not None
            and term.site is not None
            and term.site not in coupled
        }
        return cls(total, frozenset(coupled), normals)

    def curvature(self, site: str, leaf: Tensor, within: Tensor | None) -> Tensor:
        """Diagonal of P0 at elements of a site (None: all); 0 where it couples."""
        count = leaf.numel() if within is None else len(within)
        found = leaf.new_zeros(count)
        if site in self.normals:
            found = found + self.normals[site].curvature(within)
        gradient = self.total.get(site)
        if site in self.coupled or gradient is None or not gradient.requires_grad:
            return found
        # A diagonal Hessian has its row sums for a diagonal: one backward pass a site.
        (hessian,) = torch.autograd.grad(
            gradient.sum(), leaf, retain_graph=True, allow_unused=True
        )
        if hessian is None:
            return found
        flat = hessian.detach().flatten()
        return found - (flat if within is None else flat[within])


def _hessian_rows(
    gradients: _Gradients,
    leaves: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    budget: int,
) -> Iterator[dict[str, Tensor]]:
    """Groups of rows of P0 for the wanted elements: {site: (rows, site size)}."""
    if not wanted:
        return
    with differentiable():
        first = torch.cat(
            [gradients.total[site].flatten()[within] for site, within in wanted.items()]
        )
    total = sum(leaf.numel() for leaf in leaves.values())
    group = max(1, budget // (4 * total * first.element_size()))
    rows_of = RowGradients(first, list(leaves.values()))
    for start in range(0, first.numel(), group):
        count = min(group, first.numel() - start)
        directions = first.new_zeros(count, first.numel())
        directions[:, start : start + count].fill_diagonal_(1.0)
        yield {
            site: -row.reshape(count, -1)
            for site, row in zip(leaves, rows_of(directions), strict=True)
        }
