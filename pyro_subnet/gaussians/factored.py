r"""The Gaussian that is held as one Cholesky factor of its precision.

With :math:`P = L L^\top` the covariance :math:`\Sigma = L^{-\top} L^{-1}` is never
formed: draws, log density, marginal and projected variances are triangular solves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.exceptions import NonFiniteError
from pyro_subnet.gaussians.base import Gaussian, refuse_precision
from pyro_subnet.tensors.memory import check_factor_fits
from pyro_subnet.tensors.triangular import (
    cholesky_,
    mirror_,
    multiply_rows,
    solve_rows_,
)

# Rows of the identity that are solved for, or rows of a matrix that are looked through,
# at once: bounds the extra memory to S x 512 instead of S x S.
_BLOCK_ROWS = 512
# Above this size the eigenvalues behind an error message would take minutes.
_MAX_EIGENVALUE_SIZE = 4096


@final
@dataclass(frozen=True, eq=False)
class FactoredGaussian(Gaussian):
    r"""The Gaussian :math:`N(\hat\theta_S, P^{-1})` with :math:`P = L L^\top`.

    Attributes:
        loc: Mean, shape (S,).
        precision_tril: L, shape (S, S), with positive diagonal. Only its lower triangle
            is read: the strict upper one may hold something else.
    """

    loc: Float[Tensor, " subnet"]
    precision_tril: Float[Tensor, "subnet subnet"]

    @classmethod
    def of_(
        cls,
        loc: Float[Tensor, " subnet"],
        precision: Float[Tensor, "subnet subnet"],
    ) -> FactoredGaussian:
        """The Gaussian of a dense precision, factored in place.

        Args:
            loc: Mean, shape (S,), cast to the dtype of P.
            precision: P in both triangles, shape (S, S); overwritten.

        Returns:
            The Gaussian; the strict upper triangle of its factor is zero.

        Raises:
            NonFiniteError: If an entry is NaN or infinite.
            PrecisionError: If P is not positive definite.
        """
        diagonal = precision.diagonal().clone()

        def restore() -> None:
            mirror_(precision.mT)
            precision.diagonal().copy_(diagonal)

        factor_precision_(precision, restore)
        return cls(loc.to(precision), precision.tril_())

    def draw(self, noise: Float[Tensor, "*batch subnet"]) -> Float[Tensor, "*batch s"]:
        r"""See :meth:`Gaussian.draw`: :math:`\hat\theta + L^{-\top} z`."""
        columns = noise.reshape(-1, self.size).mT
        solved = torch.linalg.solve_triangular(
            self.precision_tril.mT, columns, upper=True
        )
        return self.loc + solved.mT.reshape(noise.shape)

    def log_prob(self, value: Float[Tensor, "*batch subnet"]) -> Float[Tensor, "*b"]:
        r"""See :meth:`Gaussian.log_prob`: :math:`q = |L^\top (v - \hat\theta)|^2`."""
        centred = (value - self.loc).reshape(-1, self.size)
        whitened = multiply_rows(centred, self.precision_tril).reshape(value.shape)
        return self._quadratic_log_prob(whitened.square().sum(-1))

    def half_log_det(self) -> Float[Tensor, ""]:
        r"""See :meth:`Gaussian.half_log_det`: :math:`\sum_i \log L_{ii}`."""
        return self.precision_tril.diagonal().log().sum()

    def variance(self) -> Float[Tensor, " subnet"]:
        r"""See :meth:`Gaussian.variance`.

        Costs S^3/3 operations and S x 512 numbers, not an S x S inverse. Not
        differentiable.

        Returns:
            Shape (S,).
        """
        parts = []
        block = self.precision_tril.new_empty(_BLOCK_ROWS, self.size)
        for start in range(0, self.size, _BLOCK_ROWS):
            count = min(_BLOCK_ROWS, self.size - start)
            # Columns of L^-1, as rows. They vanish above row `start`, so the solve
            # needs only the trailing triangle.
            rows = block[:count, start:].zero_().fill_diagonal_(1.0)
            solve_rows_(self.precision_tril[start:, start:], rows)
            parts.append(rows.square_().sum(1))
        return torch.cat(parts)

    def whiten(self, jac: Float[Tensor, "*rows subnet"]) -> Float[Tensor, "*rows s"]:
        r"""See :meth:`Gaussian.whiten`: rows j become :math:`L^{-1} j`."""
        columns = jac.reshape(-1, self.size).mT
        solved = torch.linalg.solve_triangular(
            self.precision_tril, columns, upper=False
        )
        return solved.mT.reshape(jac.shape)

    def precision_diagonal(self) -> Float[Tensor, " subnet"]:
        r"""See :meth:`Gaussian.precision_diagonal`: :math:`\sum_j L_{ij}^2`."""
        blocks = self.precision_tril.split(_BLOCK_ROWS)
        starts = range(0, self.size, _BLOCK_ROWS)
        return torch.cat(
            [
                rows.tril(start).square_().sum(1)
                for start, rows in zip(starts, blocks, strict=True)
            ]
        )

    def least_pivot(self) -> float:
        r"""What is left of an element's precision, at least, given those before it.

        It is a difference of numbers as large as :math:`P_{ii}`, whose rounding is
        about the dtype's epsilon: a share as small as that has no digit that is right.

        Returns:
            The least :math:`L_{ii}^2 / P_{ii}`, in (0, 1].
        """
        pivots = self.precision_tril.diagonal().square()
        return float((pivots / self.precision_diagonal()).min())

    def precision_matrix(self) -> Float[Tensor, "subnet subnet"]:
        r"""Returns :math:`P = L L^\top`, shape (S, S)."""
        self._check_fits(2.0)
        factor = self.precision_tril.tril()
        return factor @ factor.mT

    def covariance_matrix(self) -> Float[Tensor, "subnet subnet"]:
        r"""Returns :math:`\Sigma = P^{-1}`, shape (S, S)."""
        self._check_fits(2.0)
        return torch.cholesky_inverse(self.precision_tril)

    def scale_tril(self) -> Float[Tensor, "subnet subnet"]:
        r"""Lower factor of the covariance.

        With J the exchange matrix, the Cholesky factor M of :math:`J P J` gives
        :math:`\Sigma = (J M^{-\top} J)(J M^{-\top} J)^\top`, lower triangular.

        Returns:
            Shape (S, S).
        """
        self._check_fits(4.0)
        flipped = self.precision_matrix().flip(-2, -1)
        factor = torch.linalg.cholesky(flipped)
        identity = torch.eye(self.size, dtype=self.loc.dtype, device=self.loc.device)
        inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
        return inverse.mT.flip(-2, -1).contiguous()

    def _check_fits(self, matrices: float) -> None:
        like = self.precision_tril
        check_factor_fits(self.size, like.dtype, like.device, matrices=matrices)

    def extreme_precisions(self) -> tuple[float, float]:
        """See :meth:`Gaussian.extreme_precisions`: squared singular values of L."""
        self._check_eigenvalues_fit()
        values = torch.linalg.svdvals(self.precision_tril.double().tril()).square()
        return float(values.min()), float(values.max())


def factor_precision_(
    precision: Float[Tensor, "subnet subnet"],
    restore: Callable[[], object],
    factor: float | Tensor | None = None,
) -> None:
    """Replaces a precision matrix by its Cholesky factor L, in the lower triangle.

    No jitter is ever added: a matrix that is not positive definite is an error. The
    strict upper triangle is neither read nor written.

    Args:
        precision: P in its lower triangle, shape (S, S).
        restore: Puts P back into the lower triangle, where a failed factorization has
            overwritten it and the message needs it.
        factor: What the prior's precision was multiplied by, for the message.

    Raises:
        NonFiniteError: If an entry is NaN or infinite.
        PrecisionError: If the matrix is not positive definite.
    """
    failed = cholesky_(precision)
    # LAPACK's info is no word on NaN, but any NaN reaches the factor's diagonal.
    if failed == 0 and bool(precision.diagonal().isfinite().all()):
        return
    restore()
    size = precision.shape[-1]
    bad = _rows_not_finite(precision)
    if bad.numel():
        raise NonFiniteError(
            f"The precision must be finite; got NaN or inf in {bad.numel()} of {size} "
            f"rows (first {int(bad[0])}). Check the model's outputs and its prior at "
            "the MAP."
        )
    if size > _MAX_EIGENVALUE_SIZE:
        found = f"its leading block of size {failed} is not positive definite"
        refuse_precision(size, found, factor)
    eigenvalues = torch.linalg.eigvalsh(precision)
    smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    found = f"smallest eigenvalue {smallest:.3e}"
    resolved = size * torch.finfo(precision.dtype).eps * largest
    rounding = precision.dtype != torch.float64 and abs(smallest) <= resolved
    if rounding:
        found += f", which rounding makes of the largest, {largest:.3e}"
    refuse_precision(size, found, factor, rounding=rounding)


def _rows_not_finite(lower: Tensor) -> Tensor:
    """Positions of the rows that are not finite up to the diagonal."""
    return torch.cat(
        [
            (~rows.tril(start).isfinite()).any(dim=1).nonzero().squeeze(1) + start
            for start, rows in zip(
                range(0, len(lower), _BLOCK_ROWS), lower.split(_BLOCK_ROWS), strict=True
            )
        ]
    )
