r"""The precision :math:`G + s P_0` under any prior scale s, and its log determinant.

It is what the Laplace evidence asks for at every prior that is tried, and what changes
with s there. G is the GGN and P0 the prior's precision at scale 1. One S x S buffer
holds G in its strict upper triangle and a factor in its lower one; the diagonal of G
stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.curvature.prior import PriorPrecision
from pyro_subnet.exceptions import OptionError, PrecisionError
from pyro_subnet.gaussians.factored import factor_precision_
from pyro_subnet.tensors.memory import available_bytes
from pyro_subnet.tensors.triangular import mirror_

# Scales from which on the eigenvalues cost less than a factor for each. By measurement,
# in float32 and at S from 200 to 4,000, they take the time of 4 to 15 factors.
_SCALES_FOR_EIGENVALUES = 10
# The matrix of which they are sought, in float64, and LAPACK's copy of it.
_EIGENVALUE_MATRICES = 2


def restore_ggn_(
    factor_and_ggn: Float[Tensor, "subnet subnet"],
    ggn_diagonal: Float[Tensor, " subnet"],
) -> None:
    """Puts the GGN of the strict upper triangle into the lower one as well, in place.

    Args:
        factor_and_ggn: The buffer, shape (S, S).
        ggn_diagonal: Diagonal of the GGN, shape (S,).
    """
    mirror_(factor_and_ggn.mT)
    factor_and_ggn.diagonal().copy_(ggn_diagonal)


def factor_scaled_(
    ggn: Float[Tensor, "subnet subnet"],
    ggn_diagonal: Float[Tensor, " subnet"],
    prior: PriorPrecision,
    scale: float | Tensor,
) -> None:
    r"""Puts the factor of :math:`G + s P_0` into the lower triangle, in place.

    The GGN stays in the strict upper one. Costs S^3/3 operations.

    Args:
        ggn: G in both triangles, shape (S, S).
        ggn_diagonal: Its diagonal, shape (S,).
        prior: P0.
        scale: s, dimensionless: one number, or one for each weight, shape (S,).

    Raises:
        NonFiniteError: If an entry is NaN or infinite.
        PrecisionError: If the precision is not positive definite.
    """
    scaled = prior.scaled(scale)

    def restore() -> None:
        restore_ggn_(ggn, ggn_diagonal)
        scaled.add_to_lower_(ggn, 1.0)

    scaled.add_to_lower_(ggn, 1.0)
    factor_precision_(ggn, _remedy(scale), restore)


def log_det_precision(
    factor_and_ggn: Float[Tensor, "subnet subnet"],
    ggn_diagonal: Float[Tensor, " subnet"],
    prior: PriorPrecision,
    prior_scales: Tensor,
) -> Float[Tensor, "..."]:
    r"""Log determinant of :math:`G + s P_0` at each prior scale s.

    Where P0 is a positive diagonal D and the scales are many, the eigenvalues
    :math:`e_i` of :math:`D^{-1/2} G D^{-1/2}`, found once in float64, give all of them:

    .. math:: \log\det (G + s D) = \sum_i \log (e_i + s) + \sum_i \log D_{ii}

    That is about :math:`\tfrac43 S^3` operations and two S x S matrices in float64.
    Elsewhere, and where these do not fit in memory, each scale takes a factor: S^3/3
    operations, in one copy of the buffer and its dtype.

    A GGN has no negative eigenvalue: one that is no further below zero than
    :math:`S \epsilon\, e_{\max}`, the round-off of the buffer's dtype, counts as 0.

    Args:
        factor_and_ggn: The buffer, shape (S, S); it is left alone.
        ggn_diagonal: Diagonal of the GGN, shape (S,).
        prior: P0.
        prior_scales: s, any floating point type and shape; positive and finite.

    Returns:
        Shape of ``prior_scales``, float64, in nats, on the buffer's device. Not
        differentiable.

    Raises:
        OptionError: If a scale is not a positive finite number.
        PrecisionError: If the precision at a scale is not positive definite.

    Source: MacKay (1992), "Bayesian interpolation", doi 10.1162/neco.1992.4.3.415, for
    the prior in the eigenvalues of the data's curvature.
    """
    scales = checked_scales(prior_scales).to(factor_and_ggn.device)
    find = log_det_function(factor_and_ggn, ggn_diagonal, prior, scales.numel())
    return find(scales)


def log_det_function(
    factor_and_ggn: Float[Tensor, "subnet subnet"],
    ggn_diagonal: Float[Tensor, " subnet"],
    prior: PriorPrecision,
    num_scales: int,
) -> Callable[[Tensor], Tensor]:
    r"""The map from prior scales to :math:`\log\det (G + s P_0)`, ready for many.

    Args:
        factor_and_ggn: As for :func:`log_det_precision`.
        ggn_diagonal: Diagonal of the GGN, shape (S,).
        prior: P0.
        num_scales: How many scales will be asked for in all: decides whether the
            eigenvalues are found first, or each scale takes a factor.

    Returns:
        A function of checked scales, any shape, float64; see
        :func:`log_det_precision`.
    """
    if _eigenvalues_pay(factor_and_ggn, prior, num_scales):
        eigenvalues = _eigenvalues(factor_and_ggn, ggn_diagonal, prior.diagonal)
        constant = prior.diagonal.to(torch.float64).log().sum()

        def from_eigenvalues(scales: Tensor) -> Tensor:
            found = _log_dets(eigenvalues, scales.flatten()) + constant
            return found.reshape(scales.shape)

        return from_eigenvalues
    buffer = factor_and_ggn.clone()

    def from_factors(scales: Tensor) -> Tensor:
        found = torch.empty_like(scales).flatten()
        for k, scale in enumerate(scales.flatten().tolist()):
            restore_ggn_(buffer, ggn_diagonal)
            factor_scaled_(buffer, ggn_diagonal, prior, scale)
            found[k] = 2 * buffer.diagonal().to(torch.float64).log().sum()
        return found.reshape(scales.shape)

    return from_factors


def checked_scales(prior_scales: Tensor) -> Tensor:
    """The scales in float64, all of them positive and finite.

    Args:
        prior_scales: Any floating point type and shape.

    Returns:
        The same, detached.

    Raises:
        OptionError: If one is not a positive finite number.
    """
    if not prior_scales.is_floating_point():
        raise OptionError(
            "`prior_scales` must be a floating point tensor; got "
            f"{prior_scales.dtype}. Pass `prior_scales.double()`."
        )
    scales = prior_scales.detach().to(torch.float64)
    flat = scales.flatten()
    bad = (~(flat.isfinite() & (flat > 0))).nonzero().squeeze(-1)
    if bad.numel():
        first = int(bad[0])
        raise OptionError(
            f"`prior_scales` must be positive and finite; got {bad.numel()} of "
            f"{flat.numel()} that are not (first {float(flat[first])} at {first}). "
            "Pass 1.0 for the model's own prior precision."
        )
    return scales


def _eigenvalues_pay(matrix: Tensor, prior: PriorPrecision, num_scales: int) -> bool:
    """Whether the eigenvalues exist, cost less than the factors, and fit in memory."""
    if num_scales < _SCALES_FOR_EIGENVALUES or prior.coupled.numel():
        return False
    if not bool((prior.diagonal > 0).all()):
        return False
    needed = _EIGENVALUE_MATRICES * 8 * matrix.numel()
    return needed <= available_bytes(matrix.device)


def _eigenvalues(
    factor_and_ggn: Tensor, ggn_diagonal: Tensor, prior_diagonal: Tensor
) -> Tensor:
    """Ascending, of D^-1/2 G D^-1/2; those below zero by round-off alone are 0."""
    scaled = factor_and_ggn.to(torch.float64, copy=True)
    scaled.diagonal().copy_(ggn_diagonal)
    root = prior_diagonal.to(torch.float64).rsqrt()
    scaled.mul_(root).mul_(root.unsqueeze(-1))
    # G is above the diagonal, a factor below it.
    found = torch.linalg.eigvalsh(scaled, UPLO="U")
    round_off = len(found) * torch.finfo(factor_and_ggn.dtype).eps * found[-1]
    return found.masked_fill((found < 0) & (found >= -round_off), 0.0)


def _log_dets(eigenvalues: Tensor, scales: Tensor) -> Tensor:
    """Sums over the eigenvalues e of log(e + s), for each s."""
    smallest, least = float(eigenvalues[0]), float(scales.min())
    if not smallest + least > 0:
        raise PrecisionError(
            f"Posterior precision at S={len(eigenvalues)} must be positive definite; "
            f"got smallest eigenvalue {smallest + least:.3e} times the prior's "
            f"precision at scale {least:g}. {_remedy(least)}"
        )
    # One by one, so that many scales take no matrix.
    return torch.stack([(eigenvalues + scale).log().sum() for scale in scales])


def _remedy(scale: float | Tensor) -> str:
    least = float(torch.as_tensor(scale).min())
    return (
        "Train closer to the MAP, raise the prior's precision (now "
        f"{least:g} times the model's), or choose another subnet: a weight that "
        "neither the data nor the prior curve has no Gaussian."
    )
