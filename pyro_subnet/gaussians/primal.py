r"""The primal form: one S x S buffer for the GGN and a factor of :math:`G + s P_0`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.curvature.ggn import GGNSum
from pyro_subnet.curvature.prior import PriorPrecision
from pyro_subnet.gaussians.base import (
    CurvatureForm,
    PriorFactor,
    is_factor_of,
    refuse_precision,
)
from pyro_subnet.gaussians.factored import FactoredGaussian, factor_precision_
from pyro_subnet.options import FormName
from pyro_subnet.subnet import Layout
from pyro_subnet.tensors.memory import available_bytes, check_factor_fits
from pyro_subnet.tensors.triangular import mirror_

# Prior factors from which on the eigenvalues cost less than a Cholesky factor for each.
# By measurement, in float32 and at S from 200 to 4,000, they take the time of 4 to 15.
_FACTORS_FOR_EIGENVALUES = 10
# The matrix of which they are sought, in float64, and LAPACK's copy of it.
_EIGENVALUE_MATRICES = 2
# Rows of the matrix that are multiplied at once.
_ROWS = 512


@final
@dataclass(frozen=True, eq=False)
class PrimalForm(CurvatureForm):
    r"""The factor L of the precision below, the GGN above the diagonal.

    No triangular solve reads above the diagonal, so another prior precision needs
    neither the data nor a second matrix.

    Attributes:
        factor_and_ggn: L of :math:`L L^\top = G + s P_0` in the lower triangle, G in
            the strict upper one, shape (S, S).
        ggn_diagonal: Diagonal of G, shape (S,).
        prior: P0.
    """

    factor_and_ggn: Float[Tensor, "subnet subnet"]
    ggn_diagonal: Float[Tensor, " subnet"]
    prior: PriorPrecision

    name: ClassVar[FormName] = "primal"
    axes: ClassVar[Mapping[str, str]] = {"factor_and_ggn": "SS", "ggn_diagonal": "S"}

    @classmethod
    def new_sum(cls, size: int, like: Tensor) -> GGNSum:
        """See :meth:`CurvatureForm.new_sum`."""
        return GGNSum(size, like, "primal")

    @classmethod
    def of(cls, ggn: Tensor, prior: PriorPrecision, layout: Layout) -> PrimalForm:
        """See :meth:`CurvatureForm.of`; ``ggn`` is a lower triangle, overwritten."""
        return cls.factored_(ggn, prior, 1.0)

    @classmethod
    def factored_(
        cls, lower: Tensor, prior: PriorPrecision, prior_factor: PriorFactor
    ) -> PrimalForm:
        """Factors a precision in place.

        Args:
            lower: G in the lower triangle of a matrix that becomes the form's buffer.
            prior: P0.
            prior_factor: s.

        Returns:
            The form.

        Raises:
            NonFiniteError: If the precision is not finite.
            PrecisionError: If it is not positive definite.
        """
        diagonal = lower.diagonal().clone()
        mirror_(lower)
        _factor_scaled_(lower, diagonal, prior, prior_factor)
        return cls(lower, diagonal, prior)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], layout: Layout) -> PrimalForm:
        """See :meth:`CurvatureForm.from_tensors`."""
        factor_and_ggn, ggn_diagonal = (tensors[name] for name in cls.axes)
        return cls(factor_and_ggn, ggn_diagonal, PriorPrecision.from_tensors(tensors))

    def tensors(self) -> dict[str, Tensor]:
        """See :meth:`CurvatureForm.tensors`."""
        return {
            "factor_and_ggn": self.factor_and_ggn,
            "ggn_diagonal": self.ggn_diagonal,
            **self.prior.tensors(),
        }

    def is_consistent(self, prior_factor: PriorFactor) -> bool:
        """See :meth:`CurvatureForm.is_consistent`."""
        matrix, diagonal = self.factor_and_ggn, self.ggn_diagonal.double()
        prior = self.prior.scaled(prior_factor).to(torch.float64)

        def product(vector: Tensor) -> Tensor:
            found = diagonal * vector + prior.times(vector)
            for start in range(0, len(matrix), _ROWS):
                stop = start + _ROWS
                rows = matrix[start:stop].triu(start + 1).to(torch.float64)
                found[start:stop] += rows @ vector
                found += rows.mT @ vector[start:stop]
            return found

        return is_factor_of(matrix, product, diagonal + prior.diagonal)

    def gaussian(self, loc: Tensor) -> FactoredGaussian:
        """See :meth:`CurvatureForm.gaussian`."""
        return FactoredGaussian(loc.to(self.factor_and_ggn), self.factor_and_ggn)

    def rescaled(
        self, prior_factor: PriorFactor, likelihood_factor: float = 1.0
    ) -> PrimalForm:
        """See :meth:`CurvatureForm.rescaled`; S^3/3 operations, one more matrix."""
        ggn = self.ggn()
        if likelihood_factor != 1.0:
            ggn.mul_(likelihood_factor)
        return PrimalForm.factored_(ggn, self.prior, prior_factor)

    def updated(
        self,
        more: Tensor,
        prior_factor: PriorFactor,
        *,
        forgetting: float = 1.0,
        likelihood_factor: float = 1.0,
    ) -> PrimalForm:
        """See :meth:`CurvatureForm.updated`; ``more`` is a lower triangle."""
        if likelihood_factor != 1.0:
            more.mul_(likelihood_factor)
        more.add_(self.ggn(), alpha=forgetting)
        return PrimalForm.factored_(more, self.prior, prior_factor)

    def log_det_function(self, num_factors: int) -> Callable[[Tensor], Tensor]:
        r"""See :meth:`CurvatureForm.log_det_function`.

        Where P0 is a positive diagonal D and the factors are many, the eigenvalues
        :math:`e_i` of :math:`D^{-1/2} G D^{-1/2}`, found once in float64, give all:

        .. math:: \log\det (G + s D) = \sum_i \log (e_i + s) + \sum_i \log D_{ii}

        That is about :math:`\tfrac43 S^3` operations and two S x S matrices in float64.
        Elsewhere, and where these do not fit in memory, each takes a Cholesky factor:
        S^3/3 operations, in one copy of the buffer and its dtype.

        A GGN has no negative eigenvalue: one that is no further below zero than
        :math:`S \epsilon\, e_{\max}`, the round-off of the buffer's dtype, counts as 0.

        Returns:
            The map.
        """
        if self._eigenvalues_pay(num_factors):
            return self._log_dets_by_eigenvalues()
        buffer = self.factor_and_ggn.clone()

        def log_dets(factors: Tensor) -> Tensor:
            found = torch.empty_like(factors).flatten()
            for k, factor in enumerate(factors.flatten().tolist()):
                _restore_ggn_(buffer, self.ggn_diagonal)
                _factor_scaled_(buffer, self.ggn_diagonal, self.prior, factor)
                found[k] = 2 * buffer.diagonal().to(torch.float64).log().sum()
            return found.reshape(factors.shape)

        return log_dets

    def ggn(self) -> Tensor:
        """See :meth:`CurvatureForm.ggn`."""
        like = self.factor_and_ggn
        check_factor_fits(len(like), like.dtype, like.device, matrices=1.0)
        ggn = like.clone()
        _restore_ggn_(ggn, self.ggn_diagonal)
        return ggn

    def _eigenvalues_pay(self, num_factors: int) -> bool:
        """Whether the eigenvalues exist, cost less than factors, and fit in memory."""
        if (
            num_factors < _FACTORS_FOR_EIGENVALUES
            or not self.prior.is_positive_diagonal
        ):
            return False
        matrix = self.factor_and_ggn
        needed = _EIGENVALUE_MATRICES * 8 * matrix.numel()
        return needed <= available_bytes(matrix.device)

    def _log_dets_by_eigenvalues(self) -> Callable[[Tensor], Tensor]:
        diagonal = self.prior.diagonal.to(torch.float64)
        eigenvalues, constant = self._eigenvalues(), diagonal.log().sum()

        def log_dets(factors: Tensor) -> Tensor:
            smallest, least = float(eigenvalues[0]), float(factors.detach().min())
            if not smallest + least > 0:
                found = f"smallest eigenvalue {smallest + least:.3e} times the prior's"
                refuse_precision(len(eigenvalues), found, least)
            # One by one, so that many factors take no matrix.
            flat = factors.detach().flatten()
            parts = [(eigenvalues + s).log().sum() for s in flat]
            return (torch.stack(parts) + constant).reshape(factors.shape)

        return log_dets

    def _eigenvalues(self) -> Tensor:
        """Ascending, of D^-1/2 G D^-1/2; those below zero by round-off alone are 0."""
        scaled = self.factor_and_ggn.to(torch.float64, copy=True)
        scaled.diagonal().copy_(self.ggn_diagonal)
        root = self.prior.diagonal.to(torch.float64).rsqrt()
        scaled.mul_(root).mul_(root.unsqueeze(-1))
        # G is above the diagonal, a factor below it.
        found = torch.linalg.eigvalsh(scaled, UPLO="U")
        eps = torch.finfo(self.factor_and_ggn.dtype).eps
        round_off = len(found) * eps * found[-1]
        return found.masked_fill((found < 0) & (found >= -round_off), 0.0)


def _restore_ggn_(factor_and_ggn: Tensor, ggn_diagonal: Tensor) -> None:
    """Puts the GGN of the strict upper triangle into the lower one too, in place."""
    mirror_(factor_and_ggn.mT)
    factor_and_ggn.diagonal().copy_(ggn_diagonal)


def _factor_scaled_(
    ggn: Tensor, ggn_diagonal: Tensor, prior: PriorPrecision, factor: PriorFactor
) -> None:
    """Puts the factor of G + s P0 into the lower triangle, in place; G stays above."""
    scaled = prior.scaled(factor)
    scaled.add_to_lower_(ggn, 1.0)
    restore = partial(_restore_precision_, ggn, ggn_diagonal, scaled)
    factor_precision_(ggn, restore, factor)


def _restore_precision_(
    factor_and_ggn: Tensor, ggn_diagonal: Tensor, prior: PriorPrecision
) -> None:
    """Puts G and a prior's precision into the lower triangle, in place."""
    _restore_ggn_(factor_and_ggn, ggn_diagonal)
    prior.add_to_lower_(factor_and_ggn, 1.0)
