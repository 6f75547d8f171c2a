r"""What every form of the posterior's curvature can do.

A form holds the likelihood's curvature G, the prior's precision P0, and what makes the
Gaussian of precision :math:`G + s P_0` cheap at one prior scale s.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.curvature.prior import PriorPrecision
from pyro_subnet.gaussians.factored import Gaussian
from pyro_subnet.subnet import Layout

# One number for all weights, or one for each.
PriorScale = float | Float[Tensor, " subnet"]


class CurvatureForm(ABC):
    """The likelihood's curvature and the prior's, at one prior scale.

    Attributes:
        prior: P0, the model's own prior precision, unscaled.
    """

    prior: PriorPrecision

    @abstractmethod
    def gaussian(self, loc: Float[Tensor, " subnet"]) -> Gaussian:
        """The Gaussian with this precision.

        Args:
            loc: Mean, shape (S,).

        Returns:
            The Gaussian.
        """

    @abstractmethod
    def rescaled(
        self, prior_scale: PriorScale, likelihood_scale: float = 1.0
    ) -> CurvatureForm:
        """The form at another prior scale.

        Args:
            prior_scale: s, one number or shape (S,); of the model's own prior, not of
                the present one.
            likelihood_scale: What G is multiplied by.

        Returns:
            A new form; this one is left alone.

        Raises:
            PrecisionError: If the precision is not positive definite there.
        """

    @abstractmethod
    def updated(
        self, more: Any, forgetting: float, prior_scale: PriorScale
    ) -> CurvatureForm:
        r"""The form after more data, :math:`\gamma G + G'`.

        Args:
            more: G', in what the form is made of.
            forgetting: γ.
            prior_scale: s, as for :meth:`rescaled`.

        Returns:
            A new form.

        Raises:
            PrecisionError: If the precision is not positive definite.
        """

    @abstractmethod
    def log_det_function(self, num_scales: int) -> Callable[[Tensor], Tensor]:
        """The map from prior scales to log determinants of the precision.

        Args:
            num_scales: How many will be asked for in all, which decides between one
                eigenvalue decomposition and a factorization for each.

        Returns:
            A function of prior scales, float64, positive and finite, of any shape, to
            log determinants, nats, of the same shape. Not differentiable. It raises a
            ``PrecisionError`` where the precision is not positive definite.
        """

    @abstractmethod
    def ggn(self) -> Float[Tensor, "subnet subnet"]:
        """G, shape (S, S), made when asked for."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything that the form holds, for buffers and files.

        Returns:
            ``{name: tensor}``; a maker of ``forms.registry`` undoes it.
        """


# Makes a form of what its ``tensors`` gave.
Maker = Callable[[Mapping[str, Tensor], Layout], CurvatureForm]


def prior_tensors(prior: PriorPrecision) -> dict[str, Tensor]:
    """P0 in tensors.

    Args:
        prior: P0.

    Returns:
        ``{name: tensor}``.
    """
    return {
        "prior_diagonal": prior.diagonal,
        "prior_coupled": prior.coupled,
        "prior_columns": prior.columns,
    }


def prior_of(tensors: Mapping[str, Tensor]) -> PriorPrecision:
    """Undoes :func:`prior_tensors`.

    Args:
        tensors: What it gave; others are not read.

    Returns:
        P0.
    """
    return PriorPrecision(
        tensors["prior_diagonal"], tensors["prior_coupled"], tensors["prior_columns"]
    )


def diagonal_alone(prior: PriorPrecision) -> PriorPrecision:
    """A prior precision without what couples weights.

    Args:
        prior: P0.

    Returns:
        Its diagonal.
    """
    nothing = prior.coupled.new_empty(0)
    return PriorPrecision(
        prior.diagonal, nothing, prior.columns.new_empty(len(prior.diagonal), 0)
    )


def scaled_diagonal(prior: PriorPrecision, prior_scale: PriorScale) -> Tensor:
    """Diagonal of a prior that couples nothing, scaled.

    Args:
        prior: P0.
        prior_scale: s.

    Returns:
        Shape (S,), in the dtype of P0.
    """
    # In float64: a plain number would become one of float32.
    scale = torch.as_tensor(
        prior_scale, dtype=torch.float64, device=prior.diagonal.device
    )
    return (prior.diagonal * scale).to(prior.diagonal.dtype)
