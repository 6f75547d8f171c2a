"""The diagonal form: a variance for each weight, and no covariances."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.curvature.prior import PriorPrecision
from pyro_subnet.exceptions import NonFiniteError, PrecisionError
from pyro_subnet.gaussians.base import (
    CurvatureForm,
    PriorScale,
    diagonal_alone,
    prior_of,
    prior_tensors,
    scaled_diagonal,
)
from pyro_subnet.gaussians.diagonal_gaussian import DiagonalGaussian
from pyro_subnet.subnet import Layout


@final
@dataclass(frozen=True, eq=False)
class DiagonalForm(CurvatureForm):
    """Diagonals of G and of P0.

    Attributes:
        ggn_diagonal: That of G, shape (S,), float64.
        prior: P0's diagonal; what couples weights is left out.
        precision: Diagonal of the precision at one scale, shape (S,).
    """

    ggn_diagonal: Float[Tensor, " subnet"]
    prior: PriorPrecision
    precision: Float[Tensor, " subnet"]

    @classmethod
    def summed(
        cls, ggn_diagonal: Tensor, prior: PriorPrecision, prior_scale: PriorScale
    ) -> DiagonalForm:
        """Adds the diagonals.

        Args:
            ggn_diagonal: That of G, shape (S,).
            prior: P0.
            prior_scale: s.

        Returns:
            The form.

        Raises:
            NonFiniteError: If a precision is NaN or infinite.
            PrecisionError: If one is not positive.
        """
        prior = diagonal_alone(prior)
        precision = _checked(ggn_diagonal + scaled_diagonal(prior, prior_scale))
        return cls(ggn_diagonal, prior, precision.to(prior.diagonal.dtype))

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], layout: Layout
    ) -> DiagonalForm:
        """Undoes :meth:`tensors`.

        Args:
            tensors: What it gave; others are not read.
            layout: Not used.

        Returns:
            The form.
        """
        return cls(tensors["ggn_diagonal"], prior_of(tensors), tensors["precision"])

    def tensors(self) -> dict[str, Tensor]:
        """See :meth:`CurvatureForm.tensors`."""
        return {
            "ggn_diagonal": self.ggn_diagonal,
            "precision": self.precision,
            **prior_tensors(self.prior),
        }

    def gaussian(self, loc: Tensor) -> DiagonalGaussian:
        """See :meth:`CurvatureForm.gaussian`."""
        return DiagonalGaussian(loc.to(self.precision), self.precision)

    def rescaled(
        self, prior_scale: PriorScale, likelihood_scale: float = 1.0
    ) -> DiagonalForm:
        """See :meth:`CurvatureForm.rescaled`; S operations."""
        ggn = self.ggn_diagonal * likelihood_scale
        return DiagonalForm.summed(ggn, self.prior, prior_scale)

    def updated(
        self, more: Tensor, forgetting: float, prior_scale: PriorScale
    ) -> DiagonalForm:
        """See :meth:`CurvatureForm.updated`; ``more`` is a diagonal."""
        ggn = forgetting * self.ggn_diagonal + more
        return DiagonalForm.summed(ggn, self.prior, prior_scale)

    def log_det_function(self, num_scales: int) -> Callable[[Tensor], Tensor]:
        """See :meth:`CurvatureForm.log_det_function`; S logarithms a scale."""
        ggn, prior = self.ggn_diagonal.double(), self.prior.diagonal.double()

        def log_dets(scales: Tensor) -> Tensor:
            found = [
                _checked(ggn + float(scale) * prior).log().sum()
                for scale in scales.flatten()
            ]
            return torch.stack(found).reshape(scales.shape) if found else scales.clone()

        return log_dets

    def ggn(self) -> Tensor:
        """See :meth:`CurvatureForm.ggn`."""
        return self.ggn_diagonal.to(self.precision).diag()


def _checked(precision: Tensor) -> Tensor:
    if not bool(precision.isfinite().all()):
        bad = (~precision.isfinite()).nonzero().squeeze(-1)
        raise NonFiniteError(
            f"The precision must be finite; got NaN or inf for {bad.numel()} of "
            f"{len(precision)} weights (first {int(bad[0])}). Check the model's "
            "outputs and its prior at the MAP."
        )
    if not bool((precision > 0).all()):
        raise PrecisionError(
            f"Posterior precision at S={len(precision)} must be positive; got smallest "
            f"entry {float(precision.min()):.3e}. Train closer to the MAP, raise the "
            "prior's precision, or choose another subnet: a weight that neither the "
            "data nor the prior curve has no Gaussian."
        )
    return precision
