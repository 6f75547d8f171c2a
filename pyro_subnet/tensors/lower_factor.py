"""Lower triangular factors of covariances of any rank, with gradients for all."""

from __future__ import annotations

from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor


def lower_factor(
    rows: Float[Tensor, "*batch out subnet"],
) -> Float[Tensor, "*batch out out"]:
    r"""Lower triangular T with :math:`T T^\top = W W^\top`, for W of any rank.

    By QR of :math:`W^\top`: unlike a Cholesky factor of the product, T exists for
    singular covariances, and no digits are lost to squaring. Differentiable once in W:
    quantities that read T through :math:`T T^\top` (variances, covariances, sums of
    covariances) have their exact gradient, and so have means over draws :math:`T
    \epsilon`.

    Returns:
        Shape (..., C, C), with a non-negative diagonal.
    """
    if torch.is_grad_enabled() and rows.requires_grad:
        return _LowerFactor.apply(rows)
    if rows.shape[-2] == 1:  # the same, in a tenth of the time
        return torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    upper = torch.linalg.qr(rows.mT, mode="r").R
    return _padded(upper, _signs(upper)).mT


@final
class _LowerFactor(torch.autograd.Function):
    r"""T of W = T Q, by QR.

    With :math:`M = T^\top \bar T` and its lower triangle mirrored, :math:`\bar W =
    T^{-\top} \operatorname{sym}(M)\, Q`. Where the covariance is singular T has no
    derivative; T Q with the orthonormal Q held is differentiated in its place.

    Source: Roberts and Roberts (2020), "QR and LQ decomposition matrix backpropagation
    algorithms", arXiv 2009.10071, for the LQ decomposition without :math:`\bar Q`.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        basis, upper = torch.linalg.qr(rows.mT)
        sign = _signs(upper)
        factor = _padded(upper, sign).mT
        ctx.save_for_backward(factor, (basis * sign.unsqueeze(-2)).mT)
        return factor

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        factor, basis = ctx.saved_tensors
        diagonal = factor.diagonal(dim1=-2, dim2=-1)
        # Diagonal entries below this are, squared, round-off of the covariance.
        least = torch.finfo(factor.dtype).eps ** 0.5 * diagonal.amax(-1)
        regular = (diagonal.amin(-1) > least)[..., None, None]
        held = gradient[..., : basis.shape[-2]] @ basis  # bar T Q, with Q held
        if not bool(regular.any()):
            return held
        eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        safe = torch.where(regular, factor, eye)
        lower = (safe.mT @ gradient.tril()).tril()
        mirrored = lower + lower.tril(-1).mT  # sym(M)
        exact = torch.linalg.solve_triangular(safe.mT, mirrored, upper=True)
        return torch.where(regular, exact[..., : basis.shape[-2]] @ basis, held)


def _signs(upper: Tensor) -> Tensor:
    return torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(upper)


def _padded(upper: Tensor, sign: Tensor) -> Tensor:
    """The upper factor with a non-negative diagonal, and rows of zeros up to C."""
    upper = upper * sign.unsqueeze(-1)
    size, num_outputs = upper.shape[-2:]
    if size < num_outputs:
        padding = upper.new_zeros(*upper.shape[:-2], num_outputs - size, num_outputs)
        upper = torch.cat([upper, padding], dim=-2)
    return upper
