"""The posterior guide: a Gaussian over the subnet, point estimates elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor

from pyro_subnet.curvature.prior import PriorPrecision
from pyro_subnet.distribution import PrecisionNormal
from pyro_subnet.evidence import factor_scaled_, log_det_precision, restore_ggn_
from pyro_subnet.exceptions import (
    ModelError,
    NoObservedSiteWarning,
    NoOutputVarianceWarning,
    OptionError,
    warn,
)
from pyro_subnet.full_precision import full_precision
from pyro_subnet.gaussian import PrecisionGaussian
from pyro_subnet.hybrid import HybridModel
from pyro_subnet.laplace import SubnetCurvature
from pyro_subnet.linearized import LinearizedModel
from pyro_subnet.predictive import output_distribution
from pyro_subnet.state import copied, portable_state, sharing
from pyro_subnet.subnet import Subnet, place_elements
from pyro_subnet.trace import Latents, Model
from pyro_subnet.triangular import mirror_

# What the guide's own set-up found out about the model's sites.
_PROTOTYPE = (
    "prototype_trace",
    "_prototype_frames",
    "_unconstrained_shapes",
    "_cond_indep_stacks",
    "latent_dim",
)


class AutoSubnetMultivariateNormal(AutoContinuous):
    r"""Laplace posterior of a subnet, as a guide over the user's own sites.

    Made by :meth:`AutoSubnetLaplace.laplace_approximation
    <pyro_subnet.AutoSubnetLaplace.laplace_approximation>`. The auxiliary site, and
    every latent vector here, has shape (S,): the subnet in packing order,
    unconstrained. Elements outside the subnet sit at the MAP.

    One S x S buffer holds everything: the factor L of the precision in its lower
    triangle, and the GGN in the strict upper one, which no triangular solve reads. So
    another prior precision needs neither the data nor a second matrix.

    Attributes:
        loc: The MAP, packed, shape (D,), unconstrained.
        prior_scale: What the model's prior precision is multiplied by.
    """

    def __init__(self, model: Model, prototype: AutoContinuous):
        super().__init__(model)
        self._user_model = (model,)
        for name in _PROTOTYPE:
            setattr(self, name, getattr(prototype, name))
        self.prior_scale = 1.0
        self.explained_variance: float | None = None

    @classmethod
    def from_curvature(
        cls,
        prototype: AutoContinuous,
        model: Model,
        loc: Tensor,
        subnet: Subnet,
        curvature: SubnetCurvature,
    ) -> AutoSubnetMultivariateNormal:
        """Factors a precision and makes the guide.

        Args:
            prototype: The guide whose set-up is shared.
            model: The user's model.
            loc: The MAP, packed, shape (D,).
            subnet: The chosen elements.
            curvature: GGN in the lower triangle of a matrix that becomes the guide's
                buffer, and prior precision.

        Returns:
            The posterior guide.

        Raises:
            PrecisionError: If the precision is not positive definite.
            NonFiniteError: If it is not finite.
        """
        diagonal = curvature.ggn.diagonal().clone()
        _warn_about_curvature(diagonal, curvature.has_outputs)
        mirror_(curvature.ggn)
        factor_scaled_(curvature.ggn, diagonal, curvature.prior, 1.0)
        new = cls(model, prototype)
        new.explained_variance = subnet.explained_variance
        new._register(
            loc=loc,
            subnet_positions=subnet.flat,
            factor_and_ggn=curvature.ggn,
            ggn_diagonal=diagonal,
            prior_diagonal=curvature.prior.diagonal,
            prior_coupled=curvature.prior.coupled,
            prior_columns=curvature.prior.columns,
        )
        return new

    def _register(self, **buffers: Tensor) -> None:
        for name, value in buffers.items():
            self.register_buffer(name, value)

    @property
    def user_model(self) -> Model:
        """The model, as the user wrote it.

        Raises:
            ModelError: If the guide was unpickled, which leaves the model behind.
        """
        if self._user_model is None:
            raise ModelError(
                "A posterior must know its model for this; got one that was unpickled, "
                "and a pickle leaves the model behind. Give it back with "
                "`posterior.with_model(model)`."
            )
        return self._user_model[0]

    def with_model(self, model: Model) -> AutoSubnetMultivariateNormal:
        """The same posterior with a model, which a pickle leaves behind.

        Args:
            model: The model that the posterior was fitted to.

        Returns:
            A new guide that shares this one's tensors.
        """
        new = sharing(self)
        new.__dict__.update(_model=(model,), _user_model=(model,))
        return new

    @property
    def latents(self) -> Latents:
        """The latent sites at the MAP."""
        return Latents.from_guide(self, self.loc)

    @property
    def subnet(self) -> Subnet:
        """The chosen elements."""
        layout = self.latents.layout
        return Subnet(layout, self.subnet_positions, self.explained_variance)

    @property
    def prior_precision(self) -> PriorPrecision:
        """Negative Hessian of the model's log prior over the subnet, unscaled."""
        return PriorPrecision(
            self.prior_diagonal, self.prior_coupled, self.prior_columns
        )

    @property
    def gaussian(self) -> PrecisionGaussian:
        """The Gaussian over the subnet, without Pyro's interface."""
        return PrecisionGaussian(
            self.loc.index_select(0, self.subnet_positions).to(self.factor_and_ggn),
            self.factor_and_ggn,
        )

    def ggn(self) -> Tensor:
        """The generalized Gauss-Newton matrix, shape (S, S), summed over the data."""
        ggn = self.factor_and_ggn.clone()
        restore_ggn_(ggn, self.ggn_diagonal)
        return ggn

    def get_posterior(self, *args: Any, **kwargs: Any) -> PrecisionNormal:
        """The posterior over the subnet, unconstrained.

        Args:
            args: Not used; as in every Pyro guide.
            kwargs: Not used.

        Returns:
            A normal distribution over (S,).
        """
        gaussian = self.gaussian
        return PrecisionNormal(gaussian.loc, gaussian.precision_tril)

    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.gaussian.loc, self.gaussian.variance().sqrt()

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The MAP of every latent site, constrained, in tensors of their own.

        Args:
            args: Not used; as in every Pyro guide.
            kwargs: Not used.

        Returns:
            ``{site: value of the site's shape}``.
        """
        return {name: v.clone() for name, v in super().median(*args, **kwargs).items()}

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """Sites with their unconstrained values, from values of the subnet.

        A site without chosen elements keeps its own shape: plates broadcast it without
        copying it for every draw.

        Yields:
            Prototype nodes and unconstrained values.
        """
        chosen = self.subnet.indices
        counts = [within.numel() for within in chosen.values()]
        pieces = dict(zip(chosen, latent.split(counts, dim=-1), strict=True))
        base = self.latents.values
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            value = base[name]
            if name in chosen:
                event_dim = site["fn"].event_dim + value.ndim - site["value"].ndim
                piece = pieces[name]
                value = place_elements(value, chosen[name], piece, event_dim)
            yield site, value

    @full_precision()
    def with_prior_precision(self, scale: int | float) -> AutoSubnetMultivariateNormal:
        """The posterior under a prior of other precision, at the same MAP.

        Takes no pass over the data: one copy of the S x S matrix, which is factored in
        place.

        Args:
            scale: What the model's own prior precision is multiplied by, positive;
                factors do not accumulate over repeated calls.

        Returns:
            A new posterior guide.

        Raises:
            OptionError: If the scale is not a positive finite number.
            PrecisionError: If the precision is not positive definite.
        """
        scale = float(scale)
        if not (math.isfinite(scale) and scale > 0):
            raise OptionError(
                f"`scale` must be positive and finite; got {scale}. Pass 1.0 for the "
                "model's own prior precision."
            )
        ggn = self.ggn()
        factor_scaled_(ggn, self.ggn_diagonal, self.prior_precision, scale)
        new = sharing(self)
        new.prior_scale = scale
        new.factor_and_ggn = ggn
        return new

    @full_precision()
    def log_det_precision(self, prior_scales: Tensor) -> Tensor:
        r"""Log determinant of the precision at each of many prior precisions.

        .. math:: \log\det (G + s P_0)

        with the GGN G and the model's own prior precision P0: what tuning the prior by
        the evidence needs, without a pass over the data. From about ten scales on, one
        eigenvalue decomposition in float64 serves all of them. For fewer, for a prior
        that couples weights, and where memory is short, each takes a factorization in
        the posterior's dtype, as in :meth:`with_prior_precision`.

        Args:
            prior_scales: Each s that the model's own prior precision is multiplied by,
                positive: a floating point tensor of any shape. ``prior_scale`` of this
                posterior does not enter.

        Returns:
            Shape of ``prior_scales``, float64, in nats. Not differentiable. Where the
            posterior is float32, so is its GGN: eigenvalues below about 1e-7 of its
            largest are noise, and so is what a smaller s adds to them.

        Raises:
            OptionError: If a scale is not a positive finite number.
            PrecisionError: If the precision at a scale is not positive definite.

        Source: MacKay (1992), "Bayesian interpolation", doi 10.1162/neco.1992.4.3.415,
        for the eigenvalues.
        """
        return log_det_precision(
            self.factor_and_ggn, self.ggn_diagonal, self.prior_precision, prior_scales
        )

    @property
    def linearized_model(self) -> LinearizedModel:
        r"""The model with its outputs expanded to first order about the MAP.

        A Pyro model with the user's signature and sites: observed sites have
        distribution parameters :math:`\eta(\hat\theta) + J (\theta - \hat\theta)`;
        deterministic sites and tensors that the model returns are expanded likewise.
        Works in ``Predictive``, also with ``parallel=True``.

        Source: Daxberger et al. (2021), eq. 5, arXiv 2010.14689.
        """
        return LinearizedModel(self.user_model, self.latents)

    def hybrid_model(self, linearized: bool = False) -> HybridModel:
        """The hybrid model: the subnet one latent site, other weights parameters.

        For MCMC, importance sampling, or any inference of Pyro's over the subnet alone;
        its ``guide`` draws from this posterior. ``Predictive`` on it holds K draws of S
        elements, not of D. The log density is that of the model as it is written:
        ``prior_scale`` does not enter.

        Args:
            linearized: Whether outputs are expanded to first order about the MAP. For
                Gaussian noise and priors this posterior is then exact.

        Returns:
            A Pyro model with the user's signature and observed sites.
        """
        return HybridModel(
            self.user_model,
            self.latents,
            self.subnet,
            self.gaussian,
            linearized=linearized,
        )

    @torch.inference_mode(False)
    @full_precision()
    def output_distribution(
        self, *args: Any, joint: bool = False, **kwargs: Any
    ) -> dist.MultivariateNormal:
        r"""Gaussian over the linearized outputs, in closed form, before any noise.

        .. math:: \eta(x) \sim N\big(\eta(x; \hat\theta),\; J(x) P^{-1} J(x)^\top\big)

        Outputs are the unconstrained parameters of the observed distributions: logits,
        log rate, loc, log scale. Parameters that no subnet weight moves are left out.
        For each site, in trace order, and each parameter of its family, the elements
        of one datum follow in row-major order. Categorical logits are log-probabilities
        at the MAP: softmax is blind to a constant per row.

        The covariance may be singular (logits that sum to one, inputs that the subnet
        does not move); draws and ``covariance_matrix`` are exact then as well.

        Args:
            args: Positional arguments of the model; data of observed sites may be left
                out where the model allows it.
            joint: Gives the covariance across inputs: event shape (N * C,), datum by
                datum, in place of batch shape (N,) and event shape (C,).
            kwargs: Keyword arguments of the model.

        Returns:
            A multivariate normal distribution.

        Raises:
            ModelError: If the subnet moves no output parameter, or the observed sites
                have data axes of different lengths.

        Source: Daxberger et al. (2021), eqs. 5 and 6, arXiv 2010.14689.
        """
        return output_distribution(
            self.user_model,
            self.latents,
            self.subnet,
            self.gaussian,
            (args, kwargs),
            joint=joint,
        )

    def __getstate__(self) -> dict[str, Any]:
        """State for pickling: without the model, and without touching this guide."""
        return portable_state(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoSubnetMultivariateNormal:
        """A copy that shares the model."""
        return copied(self, memo)


def _warn_about_curvature(ggn_diagonal: Tensor, has_outputs: bool) -> None:
    if not has_outputs:
        warn(
            "The model has no observed site, so the posterior is the prior's curvature "
            "alone. If a likelihood is hidden by `poutine.block`, pass the full model.",
            NoObservedSiteWarning,
        )
    elif not bool((ggn_diagonal != 0).any()):
        warn(
            "The subnet moves no output at any training input: there the predictive "
            "is the MAP's. Its weights may still matter on other inputs; choose more "
            "weights, or another selector, to have variance on these.",
            NoOutputVarianceWarning,
        )
