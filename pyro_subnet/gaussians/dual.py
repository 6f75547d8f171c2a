r"""The dual form: R weighted Jacobian rows and an R x R kernel, for R well below S.

Memory is R S numbers where the primal form holds an S x S matrix; what is cheaper,
:func:`~pyro_subnet.curvature.ggn.dual_pays` says. More data are more rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
    scaled_diagonal,
)
from pyro_subnet.gaussians.dual_gaussian import DualGaussian
from pyro_subnet.gaussians.dual_kernel import (
    check_diagonal,
    check_kernel,
    kernel_of_rows,
)
from pyro_subnet.options import FormName
from pyro_subnet.subnet import Layout
from pyro_subnet.tensors.memory import check_factor_fits
from pyro_subnet.tensors.modes import full_precision


@final
@dataclass(frozen=True, eq=False)
class DualForm(CurvatureForm):
    r"""Rows W with :math:`G = W^\top W`, and the factor of the kernel at one factor s.

    Attributes:
        rows: W, Jacobian rows times a root of the output Hessian, shape (R, S),
            float64: the part of a vector that the data hold back is subtracted from it,
            and in float32 too few digits would be left where they outweigh the prior by
            more than 1e4.
        prior: P0, a positive diagonal.
        scaled_prior: The diagonal of s P0, shape (S,), float64.
        kernel_tril: Cholesky factor of the kernel under it, shape (R, R).
    """

    rows: Float[Tensor, "rows subnet"]
    prior: PriorPrecision
    scaled_prior: Float[Tensor, " subnet"]
    kernel_tril: Float[Tensor, "rows rows"]

    name: ClassVar[FormName] = "dual"
    axes: ClassVar[Mapping[str, str]] = {
        "rows": "RS",
        "scaled_prior": "S",
        "kernel_tril": "RR",
    }

    @classmethod
    def new_sum(cls, size: int, like: Tensor) -> GGNSum:
        """See :meth:`CurvatureForm.new_sum`."""
        return GGNSum(size, like, "dual")

    @classmethod
    def of(cls, ggn: Tensor, prior: PriorPrecision, layout: Layout) -> DualForm:
        """See :meth:`CurvatureForm.of`; ``ggn`` are rows, kept if float64."""
        return cls._factored(ggn, prior, 1.0)

    @classmethod
    def _factored(
        cls, rows: Tensor, prior: PriorPrecision, prior_factor: PriorFactor
    ) -> DualForm:
        """Factors the kernel; R^2 S + R^3/3 operations."""
        rows = rows.to(torch.float64)
        precision = scaled_diagonal(prior.to(torch.float64), prior_factor)
        kernel_tril = DualGaussian.of(precision, rows, precision).kernel_tril
        return cls(rows, prior, precision, kernel_tril)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], layout: Layout) -> DualForm:
        """See :meth:`CurvatureForm.from_tensors`."""
        rows, scaled_prior, kernel_tril = (tensors[name] for name in cls.axes)
        prior = PriorPrecision.from_tensors(tensors)
        return cls(rows, prior, scaled_prior, kernel_tril)

    def tensors(self) -> dict[str, Tensor]:
        """See :meth:`CurvatureForm.tensors`."""
        return {
            "rows": self.rows,
            "scaled_prior": self.scaled_prior,
            "kernel_tril": self.kernel_tril,
            **self.prior.tensors(),
        }

    def is_consistent(self, prior_factor: PriorFactor) -> bool:
        """See :meth:`CurvatureForm.is_consistent`."""
        scaled = scaled_diagonal(self.prior.to(torch.float64), prior_factor)
        if not (
            self.prior.is_positive_diagonal
            and self.rows.dtype == self.kernel_tril.dtype == torch.float64
            and torch.allclose(self.scaled_prior, scaled, rtol=1e-12, atol=0.0)
        ):
            return False
        rows = self.rows

        def product(vector: Tensor) -> Tensor:
            return vector + rows @ ((vector @ rows) / scaled)

        kept = [row.square().div(scaled).sum() for row in rows]
        diagonal = 1 + torch.stack(kept) if kept else scaled[:0]
        return is_factor_of(self.kernel_tril, product, diagonal)

    def gaussian(self, loc: Tensor) -> DualGaussian:
        """See :meth:`CurvatureForm.gaussian`."""
        loc = loc.to(self.prior.diagonal)
        return DualGaussian(loc, self.rows, self.scaled_prior, self.kernel_tril)

    def rescaled(
        self, prior_factor: PriorFactor, likelihood_factor: float = 1.0
    ) -> DualForm:
        """See :meth:`CurvatureForm.rescaled`; R^2 S + R^3/3 operations."""
        rows = self.rows
        if likelihood_factor != 1.0:
            rows = rows * likelihood_factor**0.5
        return DualForm._factored(rows, self.prior, prior_factor)

    def updated(
        self,
        more: Tensor,
        prior_factor: PriorFactor,
        *,
        forgetting: float = 1.0,
        likelihood_factor: float = 1.0,
    ) -> DualForm:
        """See :meth:`CurvatureForm.updated`; ``more`` are rows."""
        if likelihood_factor != 1.0:
            more.mul_(likelihood_factor**0.5)
        rows = torch.cat([self.rows, more.to(self.rows)])
        if forgetting != 1.0:
            rows[: len(self.rows)].mul_(math.sqrt(forgetting))
        return DualForm._factored(rows, self.prior, prior_factor)

    def log_det_function(self, num_factors: int) -> Callable[[Tensor], Tensor]:
        r"""See :meth:`CurvatureForm.log_det_function`.

        The eigenvalues :math:`e_i` of :math:`W P_0^{-1} W^\top`, found once in float64,
        give all of them:

        .. math:: \log\det (G + s P_0) = S \log s + \sum_{i \le S} \log P_{0,ii}
            + \sum_{i \le R} \log (1 + e_i / s)

        That is R^2 S + 4/3 R^3 operations and two R x R matrices. Eigenvalues have an
        absolute error of about eps times the largest, in float64: factors below that
        are not resolved where rows repeat others.

        Returns:
            The map.
        """
        diagonal, size = self.prior.diagonal.double(), self.rows.shape[1]
        check_diagonal(diagonal)
        kernel = kernel_of_rows(self.rows, diagonal)
        check_kernel(kernel)
        # All beyond the largest S are 0, and none is negative: those are round-off.
        eigenvalues = torch.linalg.eigvalsh(kernel)[-size:].clamp_(min=0.0)
        constant = diagonal.log().sum()

        def log_dets(factors: Tensor) -> Tensor:
            s = factors.detach().to(eigenvalues)
            found = size * s.flatten().log() + constant
            # One by one, so that many factors take no matrix.
            for k, factor in enumerate(s.flatten()):
                found[k] += (eigenvalues / factor).log1p().sum()
            return found.reshape(factors.shape)

        return log_dets

    def ggn(self) -> Tensor:
        """See :meth:`CurvatureForm.ggn`."""
        size, device = self.rows.shape[1], self.rows.device
        check_factor_fits(size, torch.float64, device, matrices=2.0)
        with full_precision():
            return (self.rows.mT @ self.rows).to(self.prior.diagonal.dtype)
