"""The diagonal form: a variance for each weight, and no covariances."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyro_subnet.curvature.ggn import DiagonalSum
from pyro_subnet.curvature.prior import PriorPrecision
from pyro_subnet.gaussians.base import (
    CurvatureForm,
    Gaussian,
    PriorFactor,
    check_precisions,
    scaled_diagonal,
)
from pyro_subnet.options import FormName
from pyro_subnet.subnet import Layout
from pyro_subnet.tensors.memory import check_factor_fits


@final
@dataclass(frozen=True, eq=False)
class DiagonalGaussian(Gaussian):
    r"""The Gaussian :math:`N(\hat\theta, \operatorname{diag}(p)^{-1})`.

    Attributes:
        loc: Mean, shape (S,).
        precision: p, shape (S,), positive.
    """

    loc: Float[Tensor, " subnet"]
    precision: Float[Tensor, " subnet"]

    def draw(self, noise: Float[Tensor, "*batch subnet"]) -> Float[Tensor, "*batch s"]:
        r"""See :meth:`Gaussian.draw`: :math:`\hat\theta + p^{-1/2} z`."""
        return self.loc + noise * self.precision.rsqrt()

    def log_prob(self, value: Float[Tensor, "*batch subnet"]) -> Float[Tensor, "*b"]:
        """See :meth:`Gaussian.log_prob`."""
        quadratic = ((value - self.loc).square() * self.precision).sum(-1)
        return self._quadratic_log_prob(quadratic)

    def half_log_det(self) -> Float[Tensor, ""]:
        r"""See :meth:`Gaussian.half_log_det`: :math:`\frac12 \sum_i \log p_i`."""
        return 0.5 * self.precision.log().sum()

    def variance(self) -> Float[Tensor, " subnet"]:
        """See :meth:`Gaussian.variance`."""
        return self.precision.reciprocal()

    def whiten(self, jac: Float[Tensor, "*rows subnet"]) -> Float[Tensor, "*rows s"]:
        r"""See :meth:`Gaussian.whiten`: rows j become :math:`p^{-1/2} j`."""
        return jac * self.precision.rsqrt()

    def row_scales(
        self,
        rows: Float[Tensor, "*rows some"],
        columns: Int[Tensor, " some"] | None = None,
    ) -> Float[Tensor, "*rows"]:
        """See :meth:`Gaussian.row_scales`."""
        own = self.precision if columns is None else self.precision[columns]
        return torch.linalg.vector_norm(rows * own.rsqrt(), dim=-1)

    def precision_diagonal(self) -> Float[Tensor, " subnet"]:
        """See :meth:`Gaussian.precision_diagonal`."""
        return self.precision

    def precision_matrix(self) -> Float[Tensor, "subnet subnet"]:
        """See :meth:`Gaussian.precision_matrix`."""
        return self._dense(self.precision)

    def covariance_matrix(self) -> Float[Tensor, "subnet subnet"]:
        """See :meth:`Gaussian.covariance_matrix`."""
        return self._dense(self.variance())

    def scale_tril(self) -> Float[Tensor, "subnet subnet"]:
        """See :meth:`Gaussian.scale_tril`."""
        return self._dense(self.precision.rsqrt())

    def extreme_precisions(self) -> tuple[float, float]:
        """See :meth:`Gaussian.extreme_precisions`."""
        return float(self.precision.min()), float(self.precision.max())

    def _dense(self, diagonal: Tensor) -> Tensor:
        check_factor_fits(self.size, diagonal.dtype, diagonal.device)
        return diagonal.diag()


@final
@dataclass(frozen=True, eq=False)
class DiagonalForm(CurvatureForm):
    """Diagonals of G and of P0.

    Attributes:
        ggn_diagonal: That of G, shape (S,), float64.
        prior: P0's diagonal; what couples weights is left out.
        precision: Diagonal of the precision at one prior factor, shape (S,).
    """

    ggn_diagonal: Float[Tensor, " subnet"]
    prior: PriorPrecision
    precision: Float[Tensor, " subnet"]

    name: ClassVar[FormName] = "diagonal"
    axes: ClassVar[Mapping[str, str]] = {"ggn_diagonal": "S", "precision": "S"}

    @classmethod
    def new_sum(cls, size: int, like: Tensor) -> DiagonalSum:
        """See :meth:`CurvatureForm.new_sum`."""
        return DiagonalSum(size, like)

    @classmethod
    def of(cls, ggn: Tensor, prior: PriorPrecision, layout: Layout) -> DiagonalForm:
        """See :meth:`CurvatureForm.of`; ``ggn`` is a diagonal."""
        return cls._summed(ggn, PriorPrecision.of_diagonal(prior.diagonal), 1.0)

    @classmethod
    def _summed(
        cls, ggn_diagonal: Tensor, prior: PriorPrecision, prior_factor: PriorFactor
    ) -> DiagonalForm:
        precision = ggn_diagonal + scaled_diagonal(prior, prior_factor)
        _check(precision)
        return cls(ggn_diagonal, prior, precision.to(prior.diagonal.dtype))

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], layout: Layout
    ) -> DiagonalForm:
        """See :meth:`CurvatureForm.from_tensors`."""
        ggn_diagonal, precision = (tensors[name] for name in cls.axes)
        return cls(ggn_diagonal, PriorPrecision.from_tensors(tensors), precision)

    def tensors(self) -> dict[str, Tensor]:
        """See :meth:`CurvatureForm.tensors`."""
        return {
            "ggn_diagonal": self.ggn_diagonal,
            "precision": self.precision,
            **self.prior.tensors(),
        }

    def is_consistent(self, prior_factor: PriorFactor) -> bool:
        """See :meth:`CurvatureForm.is_consistent`."""
        found = self.ggn_diagonal + scaled_diagonal(self.prior, prior_factor)
        # G itself may be negative where a factor of the data is.
        positive = bool((self.precision > 0).all())
        rtol = 4 * torch.finfo(self.precision.dtype).eps
        precision = self.precision.to(found)
        return positive and torch.allclose(precision, found, rtol=rtol, atol=0.0)

    def gaussian(self, loc: Tensor) -> DiagonalGaussian:
        """See :meth:`CurvatureForm.gaussian`."""
        return DiagonalGaussian(loc.to(self.precision), self.precision)

    def rescaled(
        self, prior_factor: PriorFactor, likelihood_factor: float = 1.0
    ) -> DiagonalForm:
        """See :meth:`CurvatureForm.rescaled`; S operations."""
        ggn = self.ggn_diagonal * likelihood_factor
        return DiagonalForm._summed(ggn, self.prior, prior_factor)

    def updated(
        self,
        more: Tensor,
        prior_factor: PriorFactor,
        *,
        forgetting: float = 1.0,
        likelihood_factor: float = 1.0,
    ) -> DiagonalForm:
        """See :meth:`CurvatureForm.updated`; ``more`` is a diagonal."""
        ggn = forgetting * self.ggn_diagonal + more * likelihood_factor
        return DiagonalForm._summed(ggn, self.prior, prior_factor)

    def log_det_function(self, num_factors: int) -> Callable[[Tensor], Tensor]:
        """See :meth:`CurvatureForm.log_det_function`; S logarithms a factor."""
        ggn, prior = self.ggn_diagonal.double(), self.prior.diagonal.double()

        def log_dets(factors: Tensor) -> Tensor:
            found = torch.empty_like(factors).flatten()
            for k, factor in enumerate(factors.flatten().tolist()):
                precision = ggn + factor * prior
                _check(precision)
                found[k] = precision.log().sum()
            return found.reshape(factors.shape)

        return log_dets

    def ggn(self) -> Tensor:
        """See :meth:`CurvatureForm.ggn`."""
        like = self.precision
        check_factor_fits(len(like), like.dtype, like.device)
        return self.ggn_diagonal.to(like).diag()


def _check(precision: Tensor) -> None:
    check_precisions(precision, len(precision), "weight {} of the subnet".format)
