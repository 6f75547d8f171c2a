"""The subspace that keeps most predictive variance: what no subset can beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.exceptions import SelectionError
from pyro_subnet.gaussians.factored import FactoredGaussian
from pyro_subnet.laplace.state import SiteFactors
from pyro_subnet.selection.base import GuideAtMAP, check_size, resolve_size
from pyro_subnet.selection.output_variance import (
    Weighting,
    check_inputs,
    check_weighting,
    dense_precision,
    output_gram,
    output_rows,
    reference_data,
)
from pyro_subnet.tensors.memory import check_factor_fits
from pyro_subnet.tensors.modes import full_precision
from pyro_subnet.tracing.data import Data
from pyro_subnet.tracing.trace import ModelAtMAP

# D x D matrices held at once: factor of the precision, Gram matrix, its whitened form,
# and its eigenvectors with LAPACK's workspace.
_MATRICES = 6.0


@final
@dataclass(frozen=True, eq=False)
class SubspacePosterior:
    r"""A Gaussian on an affine subspace of all weights.

    .. math:: \theta = \hat\theta + B z, \qquad z \sim N(0, I_S), \qquad
        B^\top P B = I_S

    Attributes:
        basis: B, shape (D, S), float64, in packing order; the best direction first.
        kept_variance: Share of the full posterior's linearized predictive variance, at
            the inputs it was made for, that the first 1, ..., S directions keep, (S,).
    """

    basis: Float[Tensor, "params subspace"]
    kept_variance: Float[Tensor, " subspace"]


@final
@dataclass(frozen=True, eq=False)
class Subspace:
    r"""The S directions that keep most linearized predictive variance at given inputs.

    With :math:`P = L L^\top` over all weights and X the rows :math:`J L^{-\top}`, the
    full posterior's predictive covariance is :math:`X X^\top`. A subspace with basis B
    keeps :math:`X \Pi X^\top` of it, where :math:`\Pi` projects onto the columns of
    :math:`L^\top B`. The best is therefore spanned by the leading eigenvectors V of
    :math:`X^\top X`: :math:`B = L^{-\top} V`, or :math:`P^{-1} J^\top U` up to scale,
    with U the eigenvectors of the predictive covariance. A subnet of S weights is one
    such subspace, so it keeps no more at these inputs.

    This is a diagnostic and no selector, since each direction mixes all weights. It
    holds up to six D x D matrices in float64. It costs about D^3 operations for the
    posterior, and the eigenvectors of a matrix of side D or N C, whichever is smaller
    (D if S is larger). ::

        bound = Subspace(50, x_shifted).fit(guide, x, y)
        bound.kept_variance[-1]

    Attributes:
        size: A count (int) or a share in (0, 1] (float) of D.
        inputs: Where the outputs matter: a tensor, a tuple of arguments, a mapping of
            keyword arguments, ``(args, kwargs)``, or a list of such batches; None for
            the training data.
        weighting: As for :class:`PredictiveVariance`.

    Raises:
        SelectionError: If ``size`` is neither a count nor a share.
        OptionError: If another option has a value outside those it allows.

    Source: Faller and Martin (2026), arXiv 2502.02345, by its abstract; the derivation
    above is what is computed.
    """

    size: int | float
    inputs: Any = None
    weighting: Weighting = "equal"

    def __post_init__(self) -> None:
        check_size(self.size)
        check_inputs(self.inputs)
        check_weighting(self.weighting)

    def fit(self, guide: GuideAtMAP, *args: Any, **kwargs: Any) -> SubspacePosterior:
        """Finds the subspace, with all training data in one call.

        Args:
            guide: A guide at its MAP.
            args: Positional arguments of the model, with the training data.
            kwargs: Keyword arguments of the model.

        Returns:
            The posterior on the subspace.

        Raises:
            MemoryLimitError: If matrices over all weights do not fit.
            PrecisionError: If the precision is not positive definite.
            SelectionError: If no weight moves an output at the inputs.
        """
        return self(guide, Data.single(args, kwargs))

    @torch.inference_mode(False)
    @full_precision()
    def __call__(self, guide: GuideAtMAP, data: Data) -> SubspacePosterior:
        """See :meth:`fit`; the training data may come in several calls."""
        at_map, latents = guide.at_map, guide.latents
        size = resolve_size(self.size, latents.layout.num_params)
        device = latents.loc.device
        check_factor_fits(
            latents.layout.num_params, torch.float64, device, matrices=_MATRICES
        )
        gaussian = full_gaussian(at_map, data)
        inputs = reference_data(self.inputs, data)
        gradients = WhitenedGradients.read(at_map, inputs, gaussian, self.weighting)
        values, directions = gradients.leading(size)
        # B = L^-T V.
        basis = torch.linalg.solve_triangular(
            gaussian.precision_tril.mT, directions, upper=True
        )
        kept = (values.cumsum(0) / gradients.total).clamp(max=1.0)
        return SubspacePosterior(basis, kept)


def full_gaussian(
    at_map: ModelAtMAP,
    data: Data,
    prior_factor: SiteFactors = 1.0,
    noise_factor: float = 1.0,
) -> FactoredGaussian:
    """The Laplace posterior over all weights, in float64."""
    loc, everything = at_map.latents.loc, at_map.latents.everything
    precision = dense_precision(at_map, everything, data, prior_factor, noise_factor)
    # `of_` clears the factor's strict upper triangle, so that its rows can be read
    # whole.
    return FactoredGaussian.of_(loc, precision)


@final
@dataclass(frozen=True, eq=False)
class WhitenedGradients:
    r"""X of a predictive covariance :math:`X X^\top`, over all weights.

    Attributes:
        rows: X, shape (rows, D), where it has fewer than D rows; else None.
        gram: :math:`X^\top X`, shape (D, D), where it has not.
    """

    rows: Tensor | None
    gram: Tensor | None

    @classmethod
    def read(
        cls,
        at_map: ModelAtMAP,
        inputs: Data,
        gaussian: FactoredGaussian,
        weighting: Weighting,
    ) -> WhitenedGradients:
        r"""Reads :math:`X = J L^{-\top}` at reference inputs; refuses J = 0."""
        found = cls(output_rows(at_map, inputs, weighting), None)
        if found.rows is None:
            everything = at_map.latents.everything
            found = cls(None, output_gram(at_map, everything, inputs, weighting))
        if not found.total > 0:
            raise SelectionError(
                "`inputs` must be such that some weight moves an output; got gradients "
                "that are all zero. Pass inputs like those to predict at."
            )
        if found.rows is not None:
            return cls(gaussian.whiten(found.rows), None)
        # The Gram matrix is symmetric, so its rows are its columns.
        half = gaussian.whiten(found._dense())
        return cls(None, gaussian.whiten(half.mT))

    @property
    def total(self) -> float:
        """Sum of the outputs' variances, the trace of X X^T."""
        if self.rows is not None:
            return float(self.rows.square().sum())
        return float(self._dense().trace())

    def kept(self, basis: Float[Tensor, "params subspace"]) -> float:
        """Share, from 0 to 1, of `total` on the span of an orthonormal basis."""
        if self.rows is not None:
            return float((self.rows @ basis).square().sum()) / self.total
        return float((basis * (self._dense() @ basis)).sum()) / self.total

    def leading(
        self, size: int
    ) -> tuple[Float[Tensor, " subspace"], Float[Tensor, "params subspace"]]:
        """Variances along the S best directions, descending, and the directions."""
        # By the eigenvectors of X X^T, mapped back to the weights, where that is
        # smaller than X^T X and has enough of them.
        if self.rows is None or len(self.rows) < size:
            values, vectors = torch.linalg.eigh(self._dense())
            return values[-size:].flip(0).clamp(min=0.0), vectors[:, -size:].flip(1)
        values, vectors = torch.linalg.eigh(self.rows @ self.rows.mT)
        # Descending, so that the round-off of a later, shorter column lies along those
        # before it, which QR takes out.
        mapped = self.rows.mT @ vectors[:, -size:].flip(1)
        basis, _ = torch.linalg.qr(mapped)
        return values[-size:].flip(0).clamp(min=0.0), basis

    def _dense(self) -> Tensor:
        if self.rows is not None:
            return self.rows.mT @ self.rows
        return torch.as_tensor(self.gram)
