"""The subspace that keeps most predictive variance: what no subset can beat."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.exceptions import SelectionError
from pyro_subnet.fit.sums import whole_subnet
from pyro_subnet.gaussians.factored import PrecisionGaussian, factor_precision_
from pyro_subnet.selection.base import GuideAtMAP, check_size, resolve_size
from pyro_subnet.selection.output_variance import (
    DenseOutputs,
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
from pyro_subnet.tensors.triangular import mirror_
from pyro_subnet.tracing.data import Data
from pyro_subnet.tracing.trace import Latents, Model

# Factor of the precision, Gram matrix, its whitened form, and its eigenvectors with
# LAPACK's room.
_MATRICES = 6.0


@dataclass(frozen=True, eq=False)
class SubspacePosterior:
    r"""A Gaussian on an affine subspace of all weights.

    .. math:: \theta = \hat\theta + B z, \qquad z \sim N(0, I_S), \qquad
        B^\top P B = I_S

    Attributes:
        basis: B, shape (D, S), float64, in packing order; the best direction first.
        kept_variance: Share of the full posterior's linearized predictive variance, at
            the inputs it was made for, that the first 1, ..., S directions keep, (S,).
        model: The user's model.
        latents: Its latent sites at the MAP.
    """

    basis: Float[Tensor, "params subspace"]
    kept_variance: Float[Tensor, " subspace"]
    model: Model = field(repr=False)
    latents: Latents = field(repr=False)

    @torch.inference_mode(False)
    @full_precision()
    def output_moments(
        self, *args: Any, **kwargs: Any
    ) -> tuple[Float[Tensor, "batch out"], Float[Tensor, "batch out out"]]:
        r"""Mean and covariance of the linearized outputs, :math:`J B B^\top J^\top`.

        Holds the Jacobian over all weights, N C D numbers.

        Args:
            args: Positional arguments of the model.
            kwargs: Its keyword arguments.

        Returns:
            Shapes (N, C) and (N, C, C), float64, before any noise; C counts the
            parameters that any latent moves.

        Raises:
            ModelError: If none does, or observed sites differ in length.
        """
        outputs = DenseOutputs.read(self.model, self.latents, (args, kwargs))
        rows = outputs.jac @ self.basis
        return outputs.loc, rows @ rows.mT


@dataclass(frozen=True, eq=False)
class Subspace:
    r"""The S directions that keep most linearized predictive variance at given inputs.

    With :math:`P = L L^\top` over all weights and X the rows :math:`J L^{-\top}`, the
    full posterior's predictive covariance is :math:`X X^\top`. A subspace with basis B
    keeps :math:`X \Pi X^\top` of it, :math:`\Pi` the projection onto the columns of
    :math:`L^\top B`, so the best is spanned by the leading eigenvectors V of
    :math:`X^\top X`: :math:`B = L^{-\top} V`, or :math:`P^{-1} J^\top U` up to scale,
    with U those of the predictive covariance. A subnet of S weights is one such
    subspace, so it keeps no more at these inputs.

    A diagnostic, no selector: it mixes all weights. It holds up to six D x D matrices
    in float64, and costs about D^3 operations for the posterior, and the eigenvectors
    of a matrix of side D or N C, whichever is smaller (D if S is larger). ::

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
        OptionError: If another option has no value of those it allows.

    Source: Faller and Martin (2026), arXiv 2502.02345, by its abstract; the derivation
    above is what is computed.
    """

    size: int | float
    inputs: Any = None
    weighting: Weighting = "equal"

    def __post_init__(self) -> None:
        """Checks the options."""
        check_size(self.size)
        check_inputs(self.inputs)
        check_weighting(self.weighting)

    def fit(self, guide: GuideAtMAP, *args: Any, **kwargs: Any) -> SubspacePosterior:
        """Finds the subspace, with all training data in one call.

        Args:
            guide: A guide at its MAP.
            args: Positional arguments of the model, with the training data.
            kwargs: Its keyword arguments.

        Returns:
            The posterior on it.
        """
        return self(guide, Data.single(args, kwargs))

    @torch.inference_mode(False)
    @full_precision()
    def __call__(self, guide: GuideAtMAP, data: Data) -> SubspacePosterior:
        """Finds the subspace.

        Args:
            guide: A guide at its MAP.
            data: The training data.

        Returns:
            The posterior on it.

        Raises:
            MemoryLimitError: If matrices over all weights do not fit.
            PrecisionError: If the precision is not positive definite.
            SelectionError: If no weight moves an output at the inputs.
        """
        latents, model = guide.latents, guide.user_model
        size = resolve_size(self.size, latents.layout.num_params)
        check_factor_fits(
            latents.layout.num_params,
            torch.float64,
            latents.loc.device,
            matrices=_MATRICES,
        )
        gaussian = full_gaussian(model, latents, data)
        inputs = reference_data(self.inputs, data)
        gradients = WhitenedGradients.read(guide, inputs, gaussian, self.weighting)
        values, directions = gradients.leading(size)
        # Columns L^-T v.
        basis = torch.linalg.solve_triangular(
            gaussian.precision_tril.mT, directions, upper=True
        )
        kept = (values.cumsum(0) / gradients.total).clamp(max=1.0)
        return SubspacePosterior(basis, kept, model, latents)


def full_gaussian(model: Model, latents: Latents, data: Data) -> PrecisionGaussian:
    """The Laplace posterior over all weights, in float64.

    Args:
        model: The user's model.
        latents: Its latent sites at the MAP.
        data: The training data.

    Returns:
        The Gaussian; the strict upper triangle of its factor is zero.

    Raises:
        PrecisionError: If the precision is not positive definite.
    """
    precision = dense_precision(model, latents, whole_subnet(latents), data)
    return gaussian_of_(precision, latents.loc)


def gaussian_of_(
    precision: Float[Tensor, "params params"], loc: Float[Tensor, " params"]
) -> PrecisionGaussian:
    """The Gaussian of a dense precision, factored in place.

    Args:
        precision: P, symmetric, shape (D, D), float64; overwritten.
        loc: Mean, shape (D,).

    Returns:
        The Gaussian; the strict upper triangle of its factor is zero.

    Raises:
        PrecisionError: If the precision is not positive definite.
    """
    diagonal = precision.diagonal().clone()

    def restore() -> None:
        mirror_(precision.mT)
        precision.diagonal().copy_(diagonal)

    remedy = "Train closer to the MAP, or run the model in float64."
    factor_precision_(precision, remedy, restore)
    return PrecisionGaussian(loc.to(torch.float64), precision.tril_())


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
        guide: GuideAtMAP,
        inputs: Data,
        gaussian: PrecisionGaussian,
        weighting: Weighting,
    ) -> WhitenedGradients:
        r"""Reads :math:`X = J L^{-\top}` at reference inputs.

        Args:
            guide: A guide at its MAP.
            inputs: The reference inputs.
            gaussian: The posterior over all weights.
            weighting: As for :class:`PredictiveVariance`.

        Returns:
            X, or its Gram matrix.

        Raises:
            SelectionError: If no weight moves an output at the inputs.
        """
        model, latents = guide.user_model, guide.latents
        found = cls(output_rows(model, latents, inputs, weighting), None)
        if found.rows is None:
            everything = whole_subnet(latents)
            found = cls(
                None, output_gram(model, latents, everything, inputs, weighting)
            )
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
        """The variance of the outputs, summed."""
        if self.rows is not None:
            return float(self.rows.square().sum())
        return float(self._dense().trace())

    def kept(self, basis: Float[Tensor, "params subspace"]) -> float:
        """Share of it on a subspace.

        Args:
            basis: Orthonormal, whitened, shape (D, S).

        Returns:
            From 0 to 1.
        """
        if self.rows is not None:
            return float((self.rows @ basis).square().sum()) / self.total
        return float((basis * (self._dense() @ basis)).sum()) / self.total

    def leading(
        self, size: int
    ) -> tuple[Float[Tensor, " subspace"], Float[Tensor, "params subspace"]]:
        """Variances along the best directions, and the directions.

        By the eigenvectors of the predictive covariance, mapped back to the weights,
        where that is the smaller matrix and has enough of them.

        Args:
            size: S.

        Returns:
            Shapes (S,), descending and not negative, and (D, S), orthonormal.
        """
        if self.rows is None or len(self.rows) < size:
            values, vectors = torch.linalg.eigh(self._dense())
            return values[-size:].flip(0).clamp(min=0.0), vectors[:, -size:].flip(1)
        values, vectors = torch.linalg.eigh(self.rows @ self.rows.mT)
        # Descending, so that round-off in a later column lies in those before it.
        mapped = self.rows.mT @ vectors[:, -size:].flip(1)
        basis, _ = torch.linalg.qr(mapped)
        return values[-size:].flip(0).clamp(min=0.0), basis

    def _dense(self) -> Tensor:
        if self.rows is not None:
            return self.rows.mT @ self.rows
        return torch.as_tensor(self.gram)
