"""The Kronecker form: factors for each weight matrix, diagonals for what has none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from pyro_subnet.curvature.prior import PriorPrecision
from pyro_subnet.fit.kronecker import KroneckerCurvature
from pyro_subnet.gaussians.base import (
    CurvatureForm,
    PriorScale,
    diagonal_alone,
    prior_of,
    prior_tensors,
)
from pyro_subnet.gaussians.kronecker_gaussian import KroneckerGaussian
from pyro_subnet.gaussians.kronecker_precision import KroneckerPrecision
from pyro_subnet.subnet import Layout
from pyro_subnet.tensors.modes import at_least_float32

# Buffers of the factors, apart from those of the other forms.
_PREFIX = "kronecker_"


@final
@dataclass(frozen=True, eq=False)
class KroneckerForm(CurvatureForm):
    """Eigenvectors of every factor, which serve every prior scale.

    Attributes:
        factors: The factors of G, and the diagonal of P0.
        prior: P0's diagonal; what couples weights is left out.
        site_scales: s of each site, shape (number of sites,), float64.
    """

    factors: KroneckerPrecision
    prior: PriorPrecision
    site_scales: Tensor

    @classmethod
    def decomposed(
        cls, curvature: KroneckerCurvature, prior: PriorPrecision, layout: Layout
    ) -> KroneckerForm:
        """Decomposes the factors, at the model's own prior.

        Args:
            curvature: The factors.
            prior: P0.
            layout: Where the sites lie in the packed vector.

        Returns:
            The form.

        Raises:
            ModelError: If the prior's precision differs within a weight matrix.
            NonFiniteError: If a factor is not finite.
            PrecisionError: If the precision is not positive definite.
        """
        factors = KroneckerPrecision.decompose(
            curvature.blocks, curvature.diagonal, curvature.prior, layout
        )
        ones = torch.ones(len(layout.names), dtype=torch.float64)
        form = cls(factors, diagonal_alone(prior), ones.to(factors.ggn.device))
        return form.checked()

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], layout: Layout
    ) -> KroneckerForm:
        """Undoes :meth:`tensors`.

        Args:
            tensors: What it gave; others are not read.
            layout: Where the sites lie in the packed vector.

        Returns:
            The form.
        """
        own = {
            name.removeprefix(_PREFIX): value
            for name, value in tensors.items()
            if name.startswith(_PREFIX)
        }
        count = sum(name.endswith("_positions") for name in own)
        factors = KroneckerPrecision.from_tensors(own, {"num_blocks": count}, layout)
        return cls(factors, prior_of(tensors), tensors["site_scales"])

    def tensors(self) -> dict[str, Tensor]:
        """See :meth:`CurvatureForm.tensors`."""
        own = {_PREFIX + name: value for name, value in self.factors.tensors().items()}
        return {**own, "site_scales": self.site_scales, **prior_tensors(self.prior)}

    def gaussian(self, loc: Tensor) -> KroneckerGaussian:
        """See :meth:`CurvatureForm.gaussian`."""
        wide = loc.to(at_least_float32(loc.dtype))
        return self.factors.gaussian(wide, self.site_scales)

    def rescaled(
        self, prior_scale: PriorScale, likelihood_scale: float = 1.0
    ) -> KroneckerForm:
        """See :meth:`CurvatureForm.rescaled`; D operations."""
        layout, factors = self.factors.layout, self.factors
        scales = torch.as_tensor(prior_scale, dtype=torch.float64)
        if scales.ndim:  # one a weight, the same within a site
            starts = torch.tensor(list(layout.offsets.values()), device=scales.device)
            scales = scales[starts]
        scales = scales.expand(len(layout.names)).to(self.site_scales).clone()
        if likelihood_scale != 1.0:
            factors = factors.with_likelihood_scaled(likelihood_scale)
        return KroneckerForm(factors, self.prior, scales).checked()

    def updated(
        self, more: KroneckerCurvature, forgetting: float, prior_scale: PriorScale
    ) -> KroneckerForm:
        """See :meth:`CurvatureForm.updated`; decomposes the new factors."""
        factors = self.factors.updated(more.blocks, more.diagonal, forgetting)
        return replace(self, factors=factors).rescaled(prior_scale)

    def log_det_function(self, num_scales: int) -> Callable[[Tensor], Tensor]:
        """See :meth:`CurvatureForm.log_det_function`; D logarithms a scale."""
        return self.factors.log_det_precision

    def ggn(self) -> Tensor:
        """See :meth:`CurvatureForm.ggn`."""
        like = self.prior.diagonal
        found = self.gaussian(torch.zeros_like(like)).precision_matrix()
        sizes = torch.tensor(self.factors.layout.sizes, device=like.device)
        own = self.site_scales.repeat_interleave(sizes).to(like) * like
        return found - own.diag()

    def checked(self) -> KroneckerForm:
        """The form, if its precision is positive definite.

        Returns:
            Itself.

        Raises:
            PrecisionError: If it is not.
        """
        self.gaussian(self.prior.diagonal)
        return self
