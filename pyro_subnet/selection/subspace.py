"""The subspace that keeps most predictive variance: what no subset can beat."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.data import Data
from pyro_subnet.exceptions import SelectionError
from pyro_subnet.full_precision import full_precision
from pyro_subnet.gaussian import PrecisionGaussian, factor_precision_
from pyro_subnet.laplace import whole_subnet
from pyro_subnet.memory import check_factor_fits
from pyro_subnet.output_variance import (
    LinearizedOutputs,
    Weighting,
    check_inputs,
    check_weighting,
    dense_precision,
    output_gram,
    reference_data,
)
from pyro_subnet.selection.base import GuideAtMAP, check_size, resolve_size
from pyro_subnet.trace import Latents, Model
from pyro_subnet.triangular import mirror_

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
        outputs = LinearizedOutputs.read(self.model, self.latents, (args, kwargs))
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

    A diagnostic, no selector: it mixes all weights, costs about 12 D^3 operations, and
    holds six D x D matrices in float64. ::

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
        gram = whitened_gram(model, latents, inputs, gaussian, self.weighting)
        values, directions = leading_directions(gram, size)
        # Columns L^-T v.
        basis = torch.linalg.solve_triangular(
            gaussian.precision_tril.mT, directions, upper=True
        )
        kept = (values.cumsum(0) / gram.trace()).clamp(max=1.0)
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
    diagonal = precision.diagonal().clone()

    def restore() -> None:
        mirror_(precision.mT)
        precision.diagonal().copy_(diagonal)

    remedy = "Train closer to the MAP, or run the model in float64."
    factor_precision_(precision, remedy, restore)
    return PrecisionGaussian(latents.loc.to(torch.float64), precision.tril_())


def whitened_gram(
    model: Model,
    latents: Latents,
    inputs: Data,
    gaussian: PrecisionGaussian,
    weighting: Weighting,
) -> Float[Tensor, "params params"]:
    r"""Gram matrix of whitened output gradients, :math:`X^\top X = L^{-1} A L^{-\top}`.

    Args:
        model: The user's model.
        latents: Its latent sites at the MAP.
        inputs: The reference inputs.
        gaussian: The posterior over all weights.
        weighting: As for :class:`PredictiveVariance`.

    Returns:
        Shape (D, D); its trace is the full posterior's predictive variance.

    Raises:
        SelectionError: If no weight moves an output at the inputs.
    """
    gram = output_gram(model, latents, whole_subnet(latents), inputs, weighting)
    if not bool((gram.diagonal() > 0).any()):
        raise SelectionError(
            "`inputs` must be such that some weight moves an output; got gradients "
            "that are all zero. Pass inputs like those to predict at."
        )
    # A is symmetric, so its rows are its columns.
    return gaussian.whiten(gaussian.whiten(gram).mT)


def leading_directions(
    gram: Float[Tensor, "params params"], size: int
) -> tuple[Float[Tensor, " subspace"], Float[Tensor, "params subspace"]]:
    """Largest eigenvalues of a Gram matrix and their eigenvectors.

    Args:
        gram: Shape (D, D).
        size: S.

    Returns:
        Shapes (S,), descending and not negative, and (D, S).
    """
    values, vectors = torch.linalg.eigh(gram)
    best = vectors[:, -size:].flip(1)
    return values[-size:].flip(0).clamp(min=0.0), best
