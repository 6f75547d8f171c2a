r"""A Gaussian over all D elements whose precision has Kronecker products as vectors.

The block of a weight matrix is :math:`(Q_B \otimes Q_A) \Lambda (Q_B \otimes Q_A)^\top`
with orthogonal Q and diagonal :math:`\Lambda`; no matrix over the block is formed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyro_subnet.gaussians.base import Gaussian
from pyro_subnet.tensors.memory import check_factor_fits

# Rows whose products with a block's eigenvectors are held at once.
_BLOCK_ELEMENTS = 2**24


@final
@dataclass(frozen=True, eq=False)
class EigenBlock:
    """A block of the precision in the eigenvectors of its Kronecker factors.

    Attributes:
        positions: Where its elements lie among the D, shape (P, Q).
        output_vectors: Q_B, shape (P, P), an eigenvector a column.
        input_vectors: Q_A, shape (Q, Q).
        values: Eigenvalues of the precision, positive, shape (P, Q).
    """

    positions: Int[Tensor, "out in"]
    output_vectors: Float[Tensor, "out out"]
    input_vectors: Float[Tensor, "in in"]
    values: Float[Tensor, "out in"]

    def from_eigen(self, rows: Float[Tensor, "*b out in"]) -> Tensor:
        """Rows in eigen coordinates, (..., P, Q), times Q_B and Q_A."""
        return self.output_vectors @ rows @ self.input_vectors.mT

    def to_eigen(self, rows: Float[Tensor, "*b out in"]) -> Tensor:
        """The inverse of :meth:`from_eigen`."""
        return self.output_vectors.mT @ rows @ self.input_vectors

    def diagonal(self, values: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Diagonal of the matrix with other eigenvalues and these eigenvectors."""
        squares = self.output_vectors.square(), self.input_vectors.square()
        return squares[0] @ values @ squares[1].mT

    def dense(self, values: Float[Tensor, "out in"]) -> Float[Tensor, "size size"]:
        """The matrix with other eigenvalues and these eigenvectors, (P Q, P Q)."""
        vectors = torch.kron(self.output_vectors, self.input_vectors)
        return (vectors * values.flatten()) @ vectors.mT


@final
@dataclass(frozen=True, eq=False)
class KroneckerGaussian(Gaussian):
    r"""The Gaussian :math:`N(\hat\theta, P^{-1})` with P in blocks and a diagonal.

    Attributes:
        loc: Mean, shape (D,).
        blocks: Blocks of P.
        positions: Elements in no block, shape (k,).
        precision: P at those, shape (k,).
    """

    loc: Float[Tensor, " params"]
    blocks: tuple[EigenBlock, ...]
    positions: Int[Tensor, " rest"]
    precision: Float[Tensor, " rest"]

    def draw(self, noise: Float[Tensor, "*batch params"]) -> Float[Tensor, "*batch d"]:
        r"""See :meth:`Gaussian.draw`.

        .. math:: \hat\theta + (Q_B \otimes Q_A) \Lambda^{-1/2} z

        Returns:
            Draws.
        """

        def spread(block: EigenBlock, z: Tensor) -> Tensor:
            return block.from_eigen(z * block.values.rsqrt())

        return self.loc + self._mapped(noise, spread, self.precision.rsqrt())

    def log_prob(self, value: Float[Tensor, "*batch params"]) -> Float[Tensor, "*b"]:
        """See :meth:`Gaussian.log_prob`."""

        def whitened(block: EigenBlock, rows: Tensor) -> Tensor:
            return block.to_eigen(rows) * block.values.sqrt()

        rows = self._mapped(value - self.loc, whitened, self.precision.sqrt())
        return self._quadratic_log_prob(rows.square().sum(-1))

    def half_log_det(self) -> Float[Tensor, ""]:
        r"""See :meth:`Gaussian.half_log_det`: :math:`\frac12 \sum \log \Lambda`."""
        parts = [block.values.log().sum() for block in self.blocks]
        return 0.5 * torch.stack([*parts, self.precision.log().sum()]).sum()

    def variance(self) -> Float[Tensor, " params"]:
        """See :meth:`Gaussian.variance`; costs as much as one draw."""
        return self._diagonal(torch.reciprocal)

    def whiten(self, jac: Float[Tensor, "*rows params"]) -> Float[Tensor, "*rows d"]:
        r"""See :meth:`Gaussian.whiten`.

        .. math:: j \mapsto \Lambda^{-1/2} (Q_B \otimes Q_A)^\top j

        Returns:
            Rows of unit variance.
        """

        def scaled(block: EigenBlock, rows: Tensor) -> Tensor:
            return block.to_eigen(rows) * block.values.rsqrt()

        return self._mapped(jac, scaled, self.precision.rsqrt())

    def row_scales(
        self,
        rows: Float[Tensor, "*rows some"],
        columns: Int[Tensor, " some"] | None = None,
    ) -> Float[Tensor, "*rows"]:
        r"""See :meth:`Gaussian.row_scales`.

        Rows j that meet a block in one row p of its matrix have, in it, the variance

        .. math:: \sum_i (j\, Q_A)_i^2 \sum_o (Q_B)_{po}^2 / \Lambda_{oi}

        Returns:
            Shape (...).
        """
        if columns is None:
            return super().row_scales(rows)
        places, start = self._places[columns], len(self.positions)
        at = (places < start).nonzero().squeeze(-1)
        squares = [rows[..., at].square() * self.precision[places[at]].reciprocal()]
        for block in self.blocks:
            stop = start + block.positions.numel()
            at = ((places >= start) & (places < stop)).nonzero().squeeze(-1)
            within, width = places[at] - start, block.positions.shape[1]
            out, into = within // width, within % width
            start = stop
            if not len(at):
                continue
            if bool((out != out[0]).any()):
                return super().row_scales(rows, columns)
            eigen = rows[..., at] @ block.input_vectors[into]
            scale = block.output_vectors[out[0]].square() @ block.values.reciprocal()
            squares.append(eigen.square() * scale)
        return torch.cat(squares, dim=-1).sum(-1).sqrt()

    def precision_diagonal(self) -> Float[Tensor, " params"]:
        """See :meth:`Gaussian.precision_diagonal`."""
        return self._diagonal(lambda values: values)

    def precision_matrix(self) -> Float[Tensor, "params params"]:
        """Returns P as a dense matrix, shape (D, D)."""
        return self._dense(lambda block: block.dense(block.values), self.precision)

    def covariance_matrix(self) -> Float[Tensor, "params params"]:
        r"""Returns :math:`\Sigma = P^{-1}` as a dense matrix, shape (D, D)."""
        variance = self.precision.reciprocal()
        return self._dense(lambda block: block.dense(1 / block.values), variance)

    def scale_tril(self) -> Float[Tensor, "params params"]:
        """Returns the lower Cholesky factor of the covariance, shape (D, D)."""
        return torch.linalg.cholesky(self.covariance_matrix())

    def extreme_precisions(self) -> tuple[float, float]:
        """See :meth:`Gaussian.extreme_precisions`."""
        parts = [block.values.flatten() for block in self.blocks]
        values = torch.cat([*parts, self.precision])
        return float(values.min()), float(values.max())

    def _diagonal(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Diagonal of a function of P, by its eigenvalues, shape (D,)."""
        found = torch.empty_like(self.loc)
        found[self.positions] = function(self.precision)
        for block in self.blocks:
            found[block.positions] = block.diagonal(function(block.values))
        return found

    def _mapped(
        self,
        rows: Tensor,
        of_block: Callable[[EigenBlock, Tensor], Tensor],
        of_rest: Tensor,
    ) -> Tensor:
        """Maps rows (..., D) block by block, and multiplies the other elements."""
        flat = rows.reshape(-1, self.size)
        parts = [flat.index_select(1, self.positions) * of_rest]
        for block in self.blocks:
            at = block.positions.flatten()
            own = flat.index_select(1, at).unflatten(1, block.positions.shape)
            # Few rows at once: the products on the way are as large again.
            step = max(1, _BLOCK_ELEMENTS // at.numel())
            mapped = [of_block(block, some).flatten(1) for some in own.split(step)]
            parts.append(torch.cat(mapped))
        # Out of place, as autograd and vmap need it.
        mapped_rows = torch.cat(parts, dim=1).index_select(1, self._places)
        return mapped_rows.reshape(rows.shape)

    @cached_property
    def _places(self) -> Tensor:
        """Where each element stands when the rest comes first, then block by block."""
        parts = [self.positions, *(block.positions.flatten() for block in self.blocks)]
        order = torch.cat(parts)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        return places

    def _dense(
        self, of_block: Callable[[EigenBlock], Tensor], of_rest: Tensor
    ) -> Tensor:
        check_factor_fits(self.size, self.loc.dtype, self.loc.device)
        found = self.loc.new_zeros(self.size, self.size)
        found[self.positions, self.positions] = of_rest
        for block in self.blocks:
            at = block.positions.flatten()
            found[at.unsqueeze(1), at] = of_block(block)
        return found
