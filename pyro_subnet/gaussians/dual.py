"""The dual form: R weighted Jacobian rows and an R x R kernel, for R well below S."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.curvature.prior import PriorPrecision
from pyro_subnet.gaussians.base import (
    CurvatureForm,
    PriorScale,
    prior_of,
    prior_tensors,
    scaled_diagonal,
)
from pyro_subnet.gaussians.dual_curvature import DualCurvature
from pyro_subnet.gaussians.dual_gaussian import DualGaussian
from pyro_subnet.subnet import Layout


@final
@dataclass(frozen=True, eq=False)
class DualForm(CurvatureForm):
    r"""Rows W with :math:`G = W^\top W`, and the factor of the kernel at one scale.

    Attributes:
        curvature: W and the diagonal of P0, float64: the part of a vector that the data
            hold back is subtracted from it, and in float32 too few digits would be left
            where they outweigh the prior by more than 1e4.
        prior: P0.
        scaled_prior: The scaled diagonal, shape (S,), float64.
        kernel_tril: Cholesky factor of the kernel under it, shape (R, R).
    """

    curvature: DualCurvature
    prior: PriorPrecision
    scaled_prior: Float[Tensor, " subnet"]
    kernel_tril: Float[Tensor, "rows rows"]

    @classmethod
    def factored(
        cls, rows: Tensor, prior: PriorPrecision, prior_scale: PriorScale
    ) -> DualForm:
        """Factors the kernel.

        Args:
            rows: W, shape (R, S); kept, not copied, if float64.
            prior: P0, which couples nothing.
            prior_scale: s.

        Returns:
            The form.

        Raises:
            NonFiniteError: If the prior or the kernel is not finite.
            PrecisionError: If the prior is not positive.
        """
        rows = rows.to(torch.float64)
        precision = scaled_diagonal(prior.to(torch.float64), prior_scale)
        factored = DualGaussian.of(precision, rows, precision)
        curvature = DualCurvature(rows, prior.diagonal.double())
        return cls(curvature, prior, precision, factored.kernel_tril)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], layout: Layout) -> DualForm:
        """Undoes :meth:`tensors`.

        Args:
            tensors: What it gave; others are not read.
            layout: Not used.

        Returns:
            The form.
        """
        prior = prior_of(tensors)
        curvature = DualCurvature(tensors["rows"], prior.diagonal.double())
        return cls(curvature, prior, tensors["scaled_prior"], tensors["kernel_tril"])

    def tensors(self) -> dict[str, Tensor]:
        """See :meth:`CurvatureForm.tensors`."""
        return {
            "rows": self.curvature.rows,
            "scaled_prior": self.scaled_prior,
            "kernel_tril": self.kernel_tril,
            **prior_tensors(self.prior),
        }

    def gaussian(self, loc: Tensor) -> DualGaussian:
        """See :meth:`CurvatureForm.gaussian`."""
        return DualGaussian(
            loc.to(self.prior.diagonal),
            self.curvature.rows,
            self.scaled_prior,
            self.kernel_tril,
        )

    def rescaled(
        self, prior_scale: PriorScale, likelihood_scale: float = 1.0
    ) -> DualForm:
        """See :meth:`CurvatureForm.rescaled`; R^2 S + R^3/3 operations."""
        rows = self.curvature.rows
        if likelihood_scale != 1.0:
            rows = rows * likelihood_scale**0.5
        return DualForm.factored(rows, self.prior, prior_scale)

    def updated(
        self, more: Tensor, forgetting: float, prior_scale: PriorScale
    ) -> DualForm:
        """See :meth:`CurvatureForm.updated`; ``more`` are rows."""
        rows = self.curvature.with_rows(more, forgetting).rows
        return DualForm.factored(rows, self.prior, prior_scale)

    def log_det_function(self, num_scales: int) -> Callable[[Tensor], Tensor]:
        """See :meth:`CurvatureForm.log_det_function`; one R x R decomposition."""
        return self.curvature.log_det_function()

    def ggn(self) -> Tensor:
        """See :meth:`CurvatureForm.ggn`."""
        return self.curvature.ggn().to(self.prior.diagonal.dtype)
