r"""A GGN held as its rows, from which a Gaussian in dual form comes under any prior.

Memory is R S numbers where the primal form holds an S x S matrix; what is cheaper,
:func:`dual_pays` says. More data are more rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.exceptions import OptionError
from pyro_subnet.gaussians.dual_gaussian import DualGaussian
from pyro_subnet.gaussians.dual_kernel import (
    check_diagonal,
    check_kernel,
    kernel_of_rows,
)
from pyro_subnet.tensors.modes import full_precision

# The kernel's factor C, and C + I for the while of a solve.
_KERNEL_MATRICES = 2


@final
@dataclass(frozen=True, eq=False)
class DualCurvature:
    r"""A GGN as the rows it is the Gram matrix of, :math:`G = W^\top W`, and a prior.

    Attributes:
        rows: W, shape (R, S): Jacobian rows times a root of the output Hessian.
        prior_diagonal: Diagonal of the prior's precision P0 at scale 1, shape (S,),
            positive; P0 has no other entries.
    """

    rows: Float[Tensor, "rows subnet"]
    prior_diagonal: Float[Tensor, " subnet"]

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> DualCurvature:
        """The inverse of :meth:`tensors`.

        Args:
            tensors: By attribute; other names are left alone.

        Returns:
            The curvature, which shares the tensors.
        """
        return cls(tensors["rows"], tensors["prior_diagonal"])

    def tensors(self) -> dict[str, Tensor]:
        """What a module keeps as buffers.

        Returns:
            Each tensor by its attribute's name.
        """
        return {"rows": self.rows, "prior_diagonal": self.prior_diagonal}

    def gaussian(
        self,
        loc: Float[Tensor, " subnet"],
        prior_scale: float | Float[Tensor, ""] | Float[Tensor, " subnet"] = 1.0,
    ) -> DualGaussian:
        r"""The Gaussian with precision :math:`G + s P_0`.

        Args:
            loc: Mean, shape (S,).
            prior_scale: s, dimensionless: one, or one for each weight, shape (S,).

        Returns:
            The Gaussian; shares W. See :meth:`DualGaussian.of` for what may fail.
        """
        scaled = (self.prior_diagonal * prior_scale).to(self.prior_diagonal.dtype)
        return DualGaussian.of(loc, self.rows, scaled)

    def log_det_precision(
        self, prior_scales: Float[Tensor, "*scales"]
    ) -> Float[Tensor, "*scales"]:
        r"""Log determinant of :math:`G + s P_0` at each prior scale s.

        The eigenvalues :math:`e_i` of :math:`W P_0^{-1} W^\top`, found once in float64,
        give all of them:

        .. math:: \log\det (G + s P_0) = S \log s + \sum_{i \le S} \log P_{0,ii}
            + \sum_{i \le R} \log (1 + e_i / s)

        That is R^2 S + 4/3 R^3 operations and two R x R matrices. Eigenvalues have an
        absolute error of about eps times the largest, in float64: scales below that are
        not resolved where rows repeat others.

        Args:
            prior_scales: s, positive and finite, of any shape; not checked here.

        Returns:
            The same shape, float64, in nats, on the rows' device. Not differentiable.

        Raises:
            NonFiniteError: If the prior's precision or the kernel is not finite.
            PrecisionError: If the prior's precision is not positive.

        Source: MacKay (1992), "Bayesian interpolation", doi 10.1162/neco.1992.4.3.415,
        for the prior in the eigenvalues of the data's curvature.
        """
        return self.log_det_function()(prior_scales)

    def log_det_function(self) -> Callable[[Tensor], Tensor]:
        """The map of :meth:`log_det_precision`, with the eigenvalues found once.

        Returns:
            A function of prior scales of any shape.

        Raises:
            NonFiniteError: If the prior's precision or the kernel is not finite.
            PrecisionError: If the prior's precision is not positive.
        """
        check_diagonal(self.prior_diagonal)
        size = self.rows.shape[1]
        kernel = kernel_of_rows(self.rows, self.prior_diagonal)
        check_kernel(kernel)
        # All beyond the largest S are 0, and none is negative: those are round-off.
        eigenvalues = torch.linalg.eigvalsh(kernel)[-size:].clamp_(min=0.0)
        constant = self.prior_diagonal.to(torch.float64).log().sum()

        def log_dets(prior_scales: Tensor) -> Tensor:
            scales = prior_scales.detach().to(eigenvalues)
            found = size * scales.flatten().log() + constant
            # One by one, so that many scales take no matrix.
            for k, scale in enumerate(scales.flatten()):
                found[k] += (eigenvalues / scale).log1p().sum()
            return found.reshape(scales.shape)

        return log_dets

    def with_rows(
        self, more: Float[Tensor, "more subnet"], forgetting: float = 1.0
    ) -> DualCurvature:
        r"""The curvature after more data, :math:`\gamma G + M^\top M`.

        Args:
            more: M, rows of the new data, shape (m, S); cast as the old ones are.
            forgetting: γ in (0, 1], the factor of what was known; 1 forgets nothing.

        Returns:
            The same prior with R + m rows.

        Raises:
            OptionError: If ``forgetting`` is outside (0, 1].
        """
        if not 0.0 < forgetting <= 1.0:
            raise OptionError(
                f"`forgetting` must be in (0, 1]; got {forgetting}. Pass 1.0 to keep "
                "all that was known."
            )
        known = len(self.rows)
        rows = torch.cat([self.rows, more.to(self.rows)])
        if forgetting != 1.0:
            rows[:known].mul_(math.sqrt(forgetting))
        return DualCurvature(rows, self.prior_diagonal)

    def ggn(self) -> Float[Tensor, "subnet subnet"]:
        r"""Returns :math:`G = W^\top W`, shape (S, S)."""
        with full_precision():
            return self.rows.mT @ self.rows


def dual_pays(num_rows: int, size: int, dtype: torch.dtype) -> bool:
    """Whether the dual form costs no more than the S x S factor, in all that counts.

    Rows and kernel are float64, whose operations count twice against a float32 factor.

    - Memory: R S numbers and two R x R matrices, against S^2 numbers.
    - Operations of a fit: R^2 S + R^3/3, against R S^2 + S^3/3.
    - Operations of each draw or whitened row: 4 R S + 2 R^2, against S^2. This decides
      nearly always, at R about 0.22 S for a float64 factor and 0.12 S for a float32
      one, where memory and fit have long been cheaper.

    Args:
        num_rows: R.
        size: S.
        dtype: Floating point type of the S x S factor.

    Returns:
        True where none of the three is larger.
    """
    width = torch.finfo(dtype).bits // 8
    own_bytes = 8 * (num_rows * size + _KERNEL_MATRICES * num_rows**2)
    in_memory = own_bytes <= width * size**2
    dearer = 8 // width
    # Both sides times three, to stay in whole numbers.
    own_fit = dearer * (3 * num_rows**2 * size + num_rows**3)
    fit = own_fit <= 3 * num_rows * size**2 + size**3
    each_row = dearer * (4 * num_rows * size + 2 * num_rows**2) <= size**2
    return in_memory and fit and each_row
