r"""The Kronecker form: factors for each weight matrix, diagonals for what has none.

With :math:`B = Q_B \Lambda_B Q_B^\top` and :math:`A = Q_A \Lambda_A Q_A^\top` the block
of a weight matrix with prior precision p is

.. math:: B \otimes A + s p I = (Q_B \otimes Q_A)
    (\Lambda_B \otimes \Lambda_A + s p I) (Q_B \otimes Q_A)^\top

so that the two decompositions, made once, serve every prior factor s.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyro_subnet.curvature.kronecker import KroneckerSum
from pyro_subnet.curvature.kronecker_factors import KroneckerBlock, KroneckerFactors
from pyro_subnet.curvature.prior import PriorPrecision
from pyro_subnet.exceptions import ModelError, NonFiniteError, PrecisionError
from pyro_subnet.gaussians.base import CurvatureForm, PriorFactor, check_precisions
from pyro_subnet.gaussians.kronecker_gaussian import EigenBlock, KroneckerGaussian
from pyro_subnet.options import FormName
from pyro_subnet.subnet import Layout
from pyro_subnet.tensors.modes import at_least_float32

# Tensors of each block, in the order of its fields, and their axes.
_BLOCK_AXES = {
    "positions": "pq",
    "output_vectors": "pp",
    "output_values": "p",
    "input_vectors": "qq",
    "input_values": "q",
    "weight": "",
    "prior": "",
    "site": "",
}
_BLOCK = re.compile(r"kronecker_block_(\d+)_")


@final
@dataclass(frozen=True, eq=False)
class DecomposedBlock:
    """A block of G in the eigenvectors of its Kronecker factors, and its prior.

    Attributes:
        positions: Where its elements lie in the packed vector, shape (P, Q).
        output_vectors: Q_B, shape (P, P).
        output_values: Eigenvalues of B, non-negative, shape (P,).
        input_vectors: Q_A, shape (Q, Q).
        input_values: Eigenvalues of A, non-negative, shape (Q,).
        weight: Sum of the weights that A is a mean under, a scalar.
        prior: p of its elements, at s = 1, a scalar in float64.
        site: Number of its site in the layout, a scalar.
    """

    positions: Int[Tensor, "out in"]
    output_vectors: Float[Tensor, "out out"]
    output_values: Float[Tensor, " out"]
    input_vectors: Float[Tensor, "in in"]
    input_values: Float[Tensor, " in"]
    weight: Float[Tensor, ""]
    prior: Float[Tensor, ""]
    site: Int[Tensor, ""]

    @classmethod
    def of(
        cls, block: KroneckerBlock, prior: Tensor, layout: Layout
    ) -> DecomposedBlock:
        r"""Decomposes both factors; about :math:`9 (P^3 + Q^3)` operations."""
        own = prior[block.positions]
        low, high = float(own.min()), float(own.max())
        if not high - low <= torch.finfo(block.output.dtype).eps ** 0.75 * abs(high):
            raise ModelError(
                "A prior must have one precision within a site for Kronecker factors; "
                f"got {low:.6g} to {high:.6g} at site {block.site!r}. Give the site's "
                "elements one prior scale, or choose a diagonal or full covariance."
            )
        output_values, output_vectors = _eigen(block.output, block.site)
        input_values, input_vectors = _eigen(block.input, block.site)
        return cls(
            block.positions,
            output_vectors,
            output_values,
            input_vectors,
            input_values,
            block.weight,
            own.mean(),
            torch.tensor(layout.names.index(block.site), device=own.device),
        )

    def fits(self, layout: Layout, prior: Tensor) -> bool:
        """Whether a file's block lies in its site, is orthogonal and has its prior."""
        number, at = int(self.site), self.positions
        if not 0 <= number < len(layout.names) or not at.numel():
            return False
        start = list(layout.offsets.values())[number]
        if not start <= int(at.min()) <= int(at.max()) < start + layout.sizes[number]:
            return False
        return (
            _is_orthogonal(self.output_vectors)
            and _is_orthogonal(self.input_vectors)
            and bool((self.output_values >= 0).all() & (self.input_values >= 0).all())
            and float(self.weight) >= 0
            and torch.allclose(self.prior.double(), prior[at].mean())
        )

    def factors(self, layout: Layout, forgetting: float) -> KroneckerBlock:
        """The factors, of data whose weights are multiplied by a number."""
        output = (self.output_vectors * self.output_values) @ self.output_vectors.mT
        return KroneckerBlock(
            layout.names[int(self.site)],
            self.positions,
            output * forgetting,
            (self.input_vectors * self.input_values) @ self.input_vectors.mT,
            self.weight * forgetting,
        )


@final
@dataclass(frozen=True, eq=False)
class KroneckerForm(CurvatureForm):
    """Eigenvectors of every Kronecker factor of G, which serve every prior factor.

    Attributes:
        layout: Where the sites lie in the packed vector.
        blocks: The factors, decomposed.
        diagonal: G at elements in no block, 0 at the others, shape (D,), float64.
        prior: P0's diagonal; what couples weights is left out.
        site_factors: s of each site, shape (number of sites,), float64.
    """

    layout: Layout
    blocks: tuple[DecomposedBlock, ...]
    diagonal: Float[Tensor, " params"]
    prior: PriorPrecision
    site_factors: Float[Tensor, " sites"]

    name: ClassVar[FormName] = "kronecker"
    axes: ClassVar[Mapping[str, str]] = {
        "kronecker_ggn": "D",
        "kronecker_prior": "D",
        "site_scales": "n",
    }

    @classmethod
    def axes_of(cls, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """See :meth:`CurvatureForm.axes_of`; each block has lengths of its own."""
        found = super().axes_of(names)
        numbers = {match[1] for match in map(_BLOCK.match, names) if match}
        for k in range(len(numbers)):  # from 0 on, without a gap
            block = f"kronecker_block_{k}_"
            for part, axes in _BLOCK_AXES.items():
                found[block + part] = tuple(block + axis for axis in axes)
        return found

    @classmethod
    def new_sum(cls, size: int, like: Tensor) -> KroneckerSum:
        """See :meth:`CurvatureForm.new_sum`."""
        return KroneckerSum(size, like)

    @classmethod
    def of(
        cls, ggn: KroneckerFactors, prior: PriorPrecision, layout: Layout
    ) -> KroneckerForm:
        """See :meth:`CurvatureForm.of`.

        Returns:
            The form.

        Raises:
            ModelError: If the prior's precision differs within a weight matrix.
        """
        factors = prior.diagonal.new_ones(len(layout.names), dtype=torch.float64)
        prior = PriorPrecision.of_diagonal(prior.diagonal.clone())
        return cls._decomposed(ggn, prior, layout, factors)

    @classmethod
    def _decomposed(
        cls,
        ggn: KroneckerFactors,
        prior: PriorPrecision,
        layout: Layout,
        site_factors: Tensor,
    ) -> KroneckerForm:
        wide = prior.diagonal.to(torch.float64)
        blocks = tuple(DecomposedBlock.of(block, wide, layout) for block in ggn.blocks)
        diagonal = ggn.diagonal.to(torch.float64)
        return cls(layout, blocks, diagonal, prior, site_factors)._checked()

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], layout: Layout
    ) -> KroneckerForm:
        """See :meth:`CurvatureForm.from_tensors`."""
        numbers = {int(match[1]) for match in map(_BLOCK.match, tensors) if match}
        blocks = tuple(
            DecomposedBlock(
                *(tensors[f"kronecker_block_{k}_{part}"] for part in _BLOCK_AXES)
            )
            for k in sorted(numbers)
        )
        prior = PriorPrecision.from_tensors(tensors)
        diagonal, site_factors = tensors["kronecker_ggn"], tensors["site_scales"]
        return cls(layout, blocks, diagonal, prior, site_factors)

    def tensors(self) -> dict[str, Tensor]:
        """See :meth:`CurvatureForm.tensors`."""
        blocks = {
            f"kronecker_block_{k}_{part}": getattr(block, part)
            for k, block in enumerate(self.blocks)
            for part in _BLOCK_AXES
        }
        return {
            "kronecker_ggn": self.diagonal,
            "kronecker_prior": self.prior.diagonal.double(),
            **blocks,
            "site_scales": self.site_factors,
            **self.prior.tensors(),
        }

    def is_consistent(self, prior_factor: PriorFactor) -> bool:
        """See :meth:`CurvatureForm.is_consistent`."""
        size, wide = self.layout.num_params, self.prior.diagonal.double()
        if not (
            len(wide) == size
            and len(self.site_factors) == len(self.layout.names)
            and torch.allclose(self.site_factors, self._by_site(prior_factor))
            and all(block.fits(self.layout, wide) for block in self.blocks)
        ):
            return False
        held = [block.positions.flatten() for block in self.blocks]
        inside = torch.cat([*held, wide.new_empty(0, dtype=torch.long)])
        return (
            len(inside.unique()) == len(inside)
            and bool((self.diagonal >= 0).all())
            and not bool(self.diagonal[inside].any())
        )

    def gaussian(self, loc: Tensor) -> KroneckerGaussian:
        """See :meth:`CurvatureForm.gaussian`."""
        loc = loc.to(at_least_float32(loc.dtype))
        blocks = tuple(
            EigenBlock(
                block.positions,
                block.output_vectors.to(loc),
                block.input_vectors.to(loc),
                self._eigenvalues(block, self.site_factors).to(loc),
            )
            for block in self.blocks
        )
        rest, precision = self._rest(self.site_factors)
        return KroneckerGaussian(loc, blocks, rest, precision.to(loc))

    def rescaled(
        self, prior_factor: PriorFactor, likelihood_factor: float = 1.0
    ) -> KroneckerForm:
        """See :meth:`CurvatureForm.rescaled`; D operations."""
        new = replace(self, site_factors=self._by_site(prior_factor))
        if likelihood_factor != 1.0:
            blocks = tuple(
                replace(block, output_values=block.output_values * likelihood_factor)
                for block in self.blocks
            )
            new = replace(
                new, blocks=blocks, diagonal=self.diagonal * likelihood_factor
            )
        return new._checked()

    def updated(
        self,
        more: KroneckerFactors,
        prior_factor: PriorFactor,
        *,
        forgetting: float = 1.0,
        likelihood_factor: float = 1.0,
    ) -> KroneckerForm:
        """See :meth:`CurvatureForm.updated`; decomposes the new factors.

        Returns:
            The form.

        Raises:
            ModelError: If the new data's blocks are not the same.
        """
        more = more.scaled(likelihood_factor)
        if len(more.blocks) != len(self.blocks):
            raise ModelError(
                f"New data must have the same {len(self.blocks)} Kronecker blocks; got "
                f"{len(more.blocks)}. Pass data that take the same way through the "
                "layers."
            )
        blocks = tuple(
            known.factors(self.layout, forgetting).plus(new)
            for known, new in zip(self.blocks, more.blocks, strict=True)
        )
        diagonal = forgetting * self.diagonal + more.diagonal.to(self.diagonal)
        return KroneckerForm._decomposed(
            KroneckerFactors(blocks, diagonal),
            self.prior,
            self.layout,
            self._by_site(prior_factor),
        )

    def log_det_function(self, num_factors: int) -> Callable[[Tensor], Tensor]:
        """See :meth:`CurvatureForm.log_det_function`; D logarithms a factor."""

        def log_dets(factors: Tensor) -> Tensor:
            found = []
            for factor in factors.detach().flatten():
                s = factor.to(self.site_factors).expand(len(self.layout.names))
                parts = [self._eigenvalues(block, s) for block in self.blocks]
                parts.append(self._rest(s)[1])
                found.append(torch.stack([part.log().sum() for part in parts]).sum())
            return torch.stack(found).reshape(factors.shape)

        return log_dets

    def ggn(self) -> Tensor:
        """See :meth:`CurvatureForm.ggn`."""
        like = self.prior.diagonal
        found = self.gaussian(torch.zeros_like(like)).precision_matrix()
        return found - (self._each(self.site_factors).to(like) * like).diag()

    def _checked(self) -> KroneckerForm:
        """The form, if its precision is positive definite."""
        self.gaussian(self.prior.diagonal)
        return self

    def _eigenvalues(self, block: DecomposedBlock, site_factors: Tensor) -> Tensor:
        r""":math:`\Lambda_B \otimes \Lambda_A + s p`, (P, Q), float64."""
        ggn = block.output_values.double().outer(block.input_values.double())
        values = ggn + site_factors.index_select(0, block.site.reshape(1)) * block.prior
        self._check(values, block.positions)
        return values

    def _rest(self, site_factors: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of the elements in no block, and P there, float64."""
        free = torch.ones_like(self.diagonal, dtype=torch.bool)
        for block in self.blocks:
            free[block.positions] = False
        rest = free.nonzero().squeeze(-1)
        prior = self._each(site_factors)[rest] * self.prior.diagonal.double()[rest]
        precision = self.diagonal[rest] + prior
        self._check(precision, rest)
        return rest, precision

    def _check(self, values: Tensor, positions: Tensor) -> None:
        flat, names = positions.flatten(), self.layout.names
        starts = torch.tensor(list(self.layout.offsets.values())[1:])

        def site(place: int) -> str:
            number = int((starts <= int(flat[place])).sum())
            return f"site {names[number]!r}"

        check_precisions(values, self.layout.num_params, site)

    def _each(self, site_factors: Tensor) -> Tensor:
        """s of each element, from that of its site."""
        sizes = torch.tensor(self.layout.sizes, device=site_factors.device)
        return site_factors.repeat_interleave(sizes)

    def _by_site(self, prior_factor: PriorFactor) -> Tensor:
        """s of each site, from one of all or from that of each element."""
        factors = torch.as_tensor(prior_factor, dtype=torch.float64)
        if factors.ndim:  # the same within a site
            starts = list(self.layout.offsets.values())
            factors = factors[torch.tensor(starts, device=factors.device)]
        factors = factors.expand(len(self.layout.names))
        return factors.to(self.site_factors).clone()


def _is_orthogonal(vectors: Tensor) -> bool:
    """Whether V^T V = I, by its product with ones."""
    ones = torch.ones(len(vectors), dtype=torch.float64, device=vectors.device)
    found = (vectors.mT.double() @ (vectors.double() @ ones)) - ones
    return float(found.abs().max()) <= torch.finfo(vectors.dtype).eps ** 0.75


def _eigen(factor: Tensor, site: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors; what round-off alone could have made is 0."""
    if not bool(factor.isfinite().all()):
        raise NonFiniteError(
            f"Kronecker factors must be finite; got NaN or inf at site {site!r}. Check "
            "the model's outputs and inputs at the MAP."
        )
    values, vectors = torch.linalg.eigh(factor.to(torch.float64))
    round_off = len(factor) * torch.finfo(factor.dtype).eps * float(values[-1])
    if float(values[0]) < -round_off:
        raise PrecisionError(
            f"A Kronecker factor must be positive semidefinite; got smallest "
            f"eigenvalue {float(values[0]):.3e} at site {site!r}, the largest being "
            f"{float(values[-1]):.3e}. Run the model in float64."
        )
    # Else the sign of the round-off would decide whether a direction that neither the
    # data nor the prior curve has a variance.
    values = values.where(values > round_off, 0.0)
    # Row-major, as a file gives them back: products round by the layout.
    return values.to(factor), vectors.to(factor).contiguous()
