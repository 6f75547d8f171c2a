r"""A Gaussian whose precision is a few rows plus a diagonal, in its dual form.

With weighted Jacobian rows W, shape (R, S), and a positive diagonal D the precision is
:math:`P = W^\top W + D`. Where R is well below S its S x S factor is mostly prior. The
R x R kernel says the same:

.. math:: K = I + A A^\top = C C^\top,\qquad A = W D^{-1/2}

From its Cholesky factor C come the determinant, :math:`\det P = \det D \det K`, and a
square root of the covariance :math:`\Sigma = D^{-1/2} B B^\top D^{-1/2}`, which takes
no eigenvectors:

.. math:: B = I - A^\top C^{-\top} (C + I)^{-1} A,\qquad B B^\top = (I + A^\top A)^{-1}

W and C are all that is held: A stands nowhere, its columns are scaled when they are
used. The kernel is summed and factored in float64 whatever the dtype of the rows.

Let k be the largest eigenvalue of K: up to so many times the data outweigh the prior.
Determinants and variances keep a relative accuracy of k times float64's eps. Where R is
below S and no rows repeat others they keep nearly all digits, whatever k is. ``draw``
and ``whiten`` take from a vector what the data hold back of it, in the dtype of the
rows: the worst error is again k times that dtype's eps, in directions that the data fix
to :math:`1/\sqrt k` of the prior's scale. Measured in float32 at R = 50, S = 1,000 and
k = 8e4, relative and beside a primal factor: variances along the rows themselves 3e-5
(primal 3e-7), along random directions 1e-8 (6e-5), marginal ones 6e-8 (5e-4).

Source: Woodbury (1950), "Inverting modified matrices"; Andrews (1968), "A square root
formulation of the Kalman covariance equations", AIAA Journal 6, 1165, for B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.exceptions import PrecisionError
from pyro_subnet.gaussians.base import Gaussian
from pyro_subnet.gaussians.dual_kernel import (
    PRIMAL_FORM,
    check_diagonal,
    column_blocks,
    factor_kernel_,
    kernel_of_rows,
    scaled_columns,
)
from pyro_subnet.tensors.modes import full_precision
from pyro_subnet.tensors.triangular import solve_rows_

# A dense matrix in float64, and what it is returned as.
_MATRICES = 2.0


@final
@dataclass(frozen=True, eq=False)
class DualGaussian(Gaussian):
    r"""The Gaussian :math:`N(\hat\theta_S, P^{-1})` with :math:`P = W^\top W + D`.

    Made by :meth:`of`. Holds R S + R^2 numbers. A draw or a whitened row takes
    4 R S + 2 R^2 operations; while a batch of them is made, C + I takes R^2 numbers.

    Attributes:
        loc: Mean, shape (S,), whose dtype draws and variances have.
        rows: W, shape (R, S), perhaps in more digits than ``loc``.
        prior_precision: D, shape (S,), positive, in the dtype of the rows.
        kernel_tril: C, shape (R, R), float64. Only its lower triangle is read.
    """

    loc: Float[Tensor, " subnet"]
    rows: Float[Tensor, "rows subnet"]
    prior_precision: Float[Tensor, " subnet"]
    kernel_tril: Float[Tensor, "rows rows"]

    @classmethod
    def of(
        cls,
        loc: Float[Tensor, " subnet"],
        rows: Float[Tensor, "rows subnet"],
        prior_precision: Float[Tensor, " subnet"],
    ) -> DualGaussian:
        r"""Factors the kernel; R^2 S + R^3/3 operations in float64.

        Args:
            loc: Mean, shape (S,).
            rows: W, shape (R, S); kept, not copied.
            prior_precision: D, shape (S,).

        Returns:
            The Gaussian.

        Raises:
            NonFiniteError: If the prior's precision or the kernel is not finite.
            PrecisionError: If the prior's precision is not positive, or the kernel is
                too badly conditioned for float64.
        """
        check_diagonal(prior_precision)
        kernel = kernel_of_rows(rows, prior_precision)
        kernel.diagonal().add_(1.0)
        factor_kernel_(kernel)
        return cls(loc, rows, prior_precision, kernel)

    @full_precision()
    def draw(self, noise: Float[Tensor, "*batch subnet"]) -> Float[Tensor, "*batch s"]:
        r"""See :meth:`Gaussian.draw`: :math:`\hat\theta + D^{-1/2} B z`."""
        root, wide = self.prior_precision.rsqrt(), noise.to(self.rows.dtype)
        columns = self._products(wide * root)
        # z -> C^-T (C + I)^-1 A z
        columns = torch.linalg.solve_triangular(self._shifted(), columns, upper=False)
        columns = torch.linalg.solve_triangular(
            self.kernel_tril.mT, columns, upper=True
        )
        held_back = self._combinations(columns).reshape(noise.shape) * root
        return self.loc + ((wide - held_back) * root).to(self.loc.dtype)

    def log_prob(self, value: Float[Tensor, "*batch subnet"]) -> Float[Tensor, "*b"]:
        r"""See :meth:`Gaussian.log_prob`.

        .. math:: q = |W d|^2 + d^\top D d,\qquad d = v - \hat\theta

        Returns:
            Shape (...).
        """
        centred = (value - self.loc).to(self.rows.dtype)
        with full_precision():
            from_data = (centred @ self.rows.mT).square().sum(-1)
        from_prior = (centred.square() * self.prior_precision).sum(-1)
        return self._quadratic_log_prob((from_data + from_prior).to(self.loc.dtype))

    def half_log_det(self) -> Float[Tensor, ""]:
        """See :meth:`Gaussian.half_log_det`: half of D's, and the sum over log C."""
        from_prior = 0.5 * self.prior_precision.to(torch.float64).log().sum()
        from_data = self.kernel_tril.diagonal().log().sum()
        return (from_prior + from_data).to(self.loc.dtype)

    def variance(self) -> Float[Tensor, " subnet"]:
        r"""See :meth:`Gaussian.variance`; in float64 until they are returned.

        .. math:: \Sigma_{ii} = \frac{1 - |C^{-1} a_i|^2}{D_{ii}}

        with a_i the columns of A. Costs R^2 S operations and R x 2048 numbers. The
        subtraction leaves a relative accuracy of k times eps, as the kernel itself
        does. Not differentiable.

        Returns:
            Shape (S,).

        Raises:
            PrecisionError: If round-off has left a variance that is not positive.
        """
        diagonal = self.prior_precision.to(torch.float64)
        held_back = torch.cat(
            [
                solved.square_().sum(1)
                for solved in map(self._solved, column_blocks(self.size))
            ]
        )
        left = 1 - held_back
        if not bool((left > 0).all()):
            raise PrecisionError(
                f"Marginal variances at S={self.size} must be positive; got "
                f"{int((left <= 0).sum())} that round-off has taken below: the data "
                f"outweigh the prior by more than float64 can tell. {PRIMAL_FORM}"
            )
        return (left / diagonal).to(self.loc.dtype)

    @full_precision()
    def whiten(self, jac: Float[Tensor, "*rows subnet"]) -> Float[Tensor, "*rows s"]:
        r"""See :meth:`Gaussian.whiten`: rows j become :math:`B^\top D^{-1/2} j`."""
        root = self.prior_precision.rsqrt()
        scaled = jac.to(self.rows.dtype) * root
        columns = self._products(scaled * root)
        # x -> (C + I)^-T C^-1 A x
        columns = torch.linalg.solve_triangular(self.kernel_tril, columns, upper=False)
        columns = torch.linalg.solve_triangular(self._shifted().mT, columns, upper=True)
        held_back = self._combinations(columns).reshape(jac.shape) * root
        return (scaled - held_back).to(jac.dtype)

    def precision_diagonal(self) -> Float[Tensor, " subnet"]:
        """See :meth:`Gaussian.precision_diagonal`."""
        found = self.rows.square().sum(0) + self.prior_precision
        return found.to(self.loc.dtype)

    def precision_matrix(self) -> Float[Tensor, "subnet subnet"]:
        """Returns P, shape (S, S)."""
        self._check_dense_fits(_MATRICES)
        with full_precision():
            precision = self.rows.mT @ self.rows
        precision.diagonal().add_(self.prior_precision)
        return precision.to(self.loc.dtype)

    def covariance_matrix(self) -> Float[Tensor, "subnet subnet"]:
        r"""Returns :math:`\Sigma = P^{-1}`, shape (S, S); made in float64."""
        self._check_dense_fits(_MATRICES)
        return self._covariance().to(self.loc.dtype)

    def scale_tril(self) -> Float[Tensor, "subnet subnet"]:
        """Lower factor of the covariance, (S, S); both are made in float64."""
        self._check_dense_fits(_MATRICES + 1)
        return torch.linalg.cholesky(self._covariance()).to(self.loc.dtype)

    def _covariance(self) -> Tensor:
        """Σ in float64: D^-1/2 (I - A^T K^-1 A) D^-1/2."""
        root = self.prior_precision.to(torch.float64).rsqrt()
        solved = torch.cat([self._solved(block) for block in column_blocks(self.size)])
        covariance = (solved @ solved.mT).neg_()
        covariance.diagonal().add_(1.0)
        return covariance.mul_(root).mul_(root.unsqueeze(-1))

    def _solved(self, block: slice) -> Tensor:
        """Rows C^-1 a_i for the columns a_i of A in a block, float64."""
        scaled = scaled_columns(self.rows, self.prior_precision, block)
        solve_rows_(self.kernel_tril, scaled)
        return scaled

    def _products(self, values: Tensor) -> Tensor:
        """W v for each v of a batch (..., S), as columns (R, n) in float64."""
        flat = values.reshape(-1, self.size)
        return (self.rows @ flat.mT).to(torch.float64)

    def _combinations(self, columns: Tensor) -> Tensor:
        """W^T u for each column u of (R, n), as rows (n, S) in the rows' dtype."""
        return columns.to(self.rows.dtype).mT @ self.rows

    def _shifted(self) -> Tensor:
        """C + I."""
        shifted = self.kernel_tril.clone()
        shifted.diagonal().add_(1.0)
        return shifted
