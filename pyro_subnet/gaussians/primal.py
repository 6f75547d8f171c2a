r"""The primal form: one S x S buffer for the GGN and the precision's factor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor

from pyro_subnet.curvature.prior import PriorPrecision
from pyro_subnet.gaussians.base import (
    CurvatureForm,
    PriorScale,
    prior_of,
    prior_tensors,
)
from pyro_subnet.gaussians.factored import PrecisionGaussian
from pyro_subnet.gaussians.scaled_precision import (
    factor_scaled_,
    log_det_function,
    restore_ggn_,
)
from pyro_subnet.subnet import Layout
from pyro_subnet.tensors.triangular import mirror_


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

    @classmethod
    def factored_(
        cls, lower: Tensor, prior: PriorPrecision, prior_scale: PriorScale
    ) -> PrimalForm:
        """Factors a precision in place.

        Args:
            lower: G in the lower triangle of a matrix that becomes the form's buffer.
            prior: P0.
            prior_scale: s.

        Returns:
            The form.

        Raises:
            NonFiniteError: If the precision is not finite.
            PrecisionError: If it is not positive definite.
        """
        diagonal = lower.diagonal().clone()
        mirror_(lower)
        factor_scaled_(lower, diagonal, prior, prior_scale)
        return cls(lower, diagonal, prior)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], layout: Layout) -> PrimalForm:
        """Undoes :meth:`tensors`.

        Args:
            tensors: What it gave; others are not read.
            layout: Not used.

        Returns:
            The form.
        """
        return cls(
            tensors["factor_and_ggn"], tensors["ggn_diagonal"], prior_of(tensors)
        )

    def tensors(self) -> dict[str, Tensor]:
        """See :meth:`CurvatureForm.tensors`."""
        return {
            "factor_and_ggn": self.factor_and_ggn,
            "ggn_diagonal": self.ggn_diagonal,
            **prior_tensors(self.prior),
        }

    def gaussian(self, loc: Tensor) -> PrecisionGaussian:
        """See :meth:`CurvatureForm.gaussian`."""
        return PrecisionGaussian(loc.to(self.factor_and_ggn), self.factor_and_ggn)

    def rescaled(
        self, prior_scale: PriorScale, likelihood_scale: float = 1.0
    ) -> PrimalForm:
        """See :meth:`CurvatureForm.rescaled`; S^3/3 operations, one more matrix."""
        ggn = self.ggn()
        if likelihood_scale != 1.0:
            ggn.mul_(likelihood_scale)
        return PrimalForm.factored_(ggn, self.prior, prior_scale)

    def updated(
        self, more: Tensor, forgetting: float, prior_scale: PriorScale
    ) -> PrimalForm:
        """See :meth:`CurvatureForm.updated`; ``more`` is a matrix, written over."""
        known = self.ggn()
        more.add_(known, alpha=forgetting)
        return PrimalForm.factored_(more, self.prior, prior_scale)

    def log_det_function(self, num_scales: int) -> Callable[[Tensor], Tensor]:
        """See :meth:`CurvatureForm.log_det_function`, and ``log_det_precision``."""
        return log_det_function(
            self.factor_and_ggn, self.ggn_diagonal, self.prior, num_scales
        )

    def ggn(self) -> Tensor:
        """See :meth:`CurvatureForm.ggn`."""
        ggn = self.factor_and_ggn.clone()
        restore_ggn_(ggn, self.ggn_diagonal)
        return ggn
