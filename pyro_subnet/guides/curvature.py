"""The curvature behind the posterior guide, under any prior and noise scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor

from pyro_subnet.curvature.prior import PriorPrecision
from pyro_subnet.exceptions import OptionError
from pyro_subnet.fit.dispatch import FORM_MAKERS, form_name
from pyro_subnet.fit.summary import FitSummary
from pyro_subnet.gaussians.base import CurvatureForm, PriorScale
from pyro_subnet.gaussians.factored import Gaussian
from pyro_subnet.gaussians.scaled_precision import checked_scales
from pyro_subnet.guides.base import SubnetGuide
from pyro_subnet.guides.copies import sharing
from pyro_subnet.laplace.evidence import (
    SiteScales,
    log_evidence,
    scaled_log_likelihood,
    site_scales,
)
from pyro_subnet.laplace.search import Tuning
from pyro_subnet.options import FitOptions
from pyro_subnet.tensors.modes import full_precision
from pyro_subnet.tracing.trace import Model

Guide = TypeVar("Guide", bound="CurvatureGuide")


class CurvatureGuide(SubnetGuide):
    """A guide over the subnet that holds its curvature, and can change its scales.

    Attributes:
        prior_scale: What the model's prior precision is multiplied by, over the
            subnet: a number, or one for each site named.
        noise_scale: What the model's normal noise is multiplied by.
        options: How the curvature was asked for.
        tuning: How a scale was chosen, in a posterior that tuning has given.
    """

    def __init__(self, model: Model, prototype: AutoContinuous):
        super().__init__(model, prototype)
        self.prior_scale: float | dict[str, float] = 1.0
        self.noise_scale = 1.0
        self.options = FitOptions()
        self.tuning: Tuning | None = None
        self.explained_variance: float | None = None
        self.form_name = ""

    def _register(self, **buffers: Tensor) -> None:
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def _hold(self, form: CurvatureForm, summary: FitSummary) -> None:
        """Takes a curvature and a summary in place of those there are."""
        if self.form_name:
            for name in self.form.tensors():
                delattr(self, name)
        self.form_name = form_name(form)
        self._register(**form.tensors(), **summary.tensors())

    @property
    def form(self) -> CurvatureForm:
        """Curvature of likelihood and prior, at the present scales."""
        return FORM_MAKERS[self.form_name](dict(self._buffers), self.layout)

    @property
    def summary(self) -> FitSummary:
        """The log joint density of the training data at the MAP."""
        return FitSummary.from_tensors(dict(self._buffers))

    @property
    def prior_precision(self) -> PriorPrecision:
        """Negative Hessian of the model's log prior over the subnet, unscaled."""
        return self.form.prior

    @property
    def gaussian(self) -> Gaussian:
        """The Gaussian over the subnet, without Pyro's interface."""
        return self.form.gaussian(self.loc.index_select(0, self.subnet_positions))

    def ggn(self) -> Tensor:
        """The generalized Gauss-Newton matrix, shape (S, S), summed over the data."""
        return self.form.ggn()

    def _options_to_add(self) -> FitOptions:
        """How more data's curvature must be summed to be added to this one."""
        if self.options.covariance != "full":
            return self.options
        held: Any = self.form_name
        return replace(self.options, form=held)

    def _scales(self) -> PriorScale:
        """What each weight's prior precision is multiplied by, without gradients."""
        scale = site_scales(self.prior_scale, self.subnet)
        return scale.to(self.loc.device) if scale.ndim else float(scale)

    @full_precision()
    def with_prior_precision(
        self: Guide, scale: float | Mapping[str, float] | str
    ) -> Guide:
        """The posterior under a prior of other precision, at the same MAP.

        Takes no pass over the data: for a full covariance one copy of the S x S matrix,
        which is factored in place. Weights outside the subnet stay where they are.

        Args:
            scale: What the model's own prior precision is multiplied by, positive: one
                number, or ``{site: number}``, where sites left out keep 1. Factors do
                not accumulate over repeated calls. ``"fraction"``: S / D, by which the
                paper's appendix makes the prior variance of a subnet that of the whole
                network.

        Returns:
            A new posterior guide.

        Raises:
            OptionError: If a scale is not a positive finite number.
            PrecisionError: If the precision is not positive definite.

        Source: Daxberger et al. (2021), appendix, arXiv 2010.14689, for S / D.
        """
        if scale == "fraction":
            scale = self.subnet.fraction
        if isinstance(scale, str):
            raise OptionError(
                f"`scale` must be a number, a mapping, or 'fraction'; got {scale!r}. "
                "Pass 1.0 for the model's own prior precision."
            )
        site_scales(scale, self.subnet, "scale")  # checks it
        given = dict(scale) if isinstance(scale, Mapping) else float(scale)
        new = sharing(self)
        new.prior_scale, new.tuning = given, None
        new._hold(self.form.rescaled(new._scales()), self.summary)
        return new

    @full_precision()
    def with_noise_scale(self: Guide, scale: float) -> Guide:
        """The posterior under normal noise of another scale, at the same MAP.

        ``linearized_model`` and the closed-form predictions take that noise too;
        ``Predictive`` on the model itself runs it as it is written.

        Args:
            scale: What the standard deviation of the model's noise is multiplied by,
                positive; factors do not accumulate.

        Returns:
            A new posterior guide.

        Raises:
            OptionError: If the scale is not a positive finite number, or observed
                sites are not normal with a scale that no chosen weight moves.
            PrecisionError: If the precision is not positive definite.
        """
        checked = checked_scales(torch.tensor(float(scale), dtype=torch.float64))
        scaled_log_likelihood(self.summary, checked)
        new = sharing(self)
        ratio = (self.noise_scale / float(scale)) ** self.options.noise_power
        new.noise_scale, new.tuning = float(scale), None
        new._hold(self.form.rescaled(self._scales(), ratio), self.summary)
        return new

    @full_precision()
    def log_marginal_likelihood(
        self,
        prior_scale: SiteScales | None = None,
        noise_scale: float | Tensor | None = None,
    ) -> Tensor:
        r"""Laplace's approximation of the log evidence, without a pass over the data.

        .. math:: \log p(D \mid \hat\theta) + \log p(\hat\theta)
            + \tfrac S2 \log 2\pi - \tfrac12 \log\det P

        Of a strict subset it is the evidence of a model whose other weights are held at
        the MAP: their log prior is a constant of it. It compares priors and noise for
        one subnet; it is not the evidence of the whole network, and does not compare
        subnets. The MAP is held too. Exact where outputs are linear, noise and priors
        normal, and the MAP is that of the scales asked for.

        Args:
            prior_scale: What the model's own prior precision is multiplied by: a
                number, or one a site; by default this posterior's. Priors that are not
                normal are taken as the normal that touches them at the MAP.
            noise_scale: What the model's normal noise is multiplied by; by default
                this posterior's.

        Returns:
            A scalar, nats, float64, differentiable once in tensors given as scales.

        Raises:
            OptionError: If a scale is not positive and finite, or the noise is not
                normal and fixed.
            PrecisionError: If a precision is not positive definite.

        Source: MacKay (1992), doi 10.1162/neco.1992.4.3.448; Immer et al. (2021), arXiv
        2104.04975, for networks.
        """
        prior = self.prior_scale if prior_scale is None else prior_scale
        noise = self.noise_scale if noise_scale is None else noise_scale
        noise = torch.as_tensor(noise, dtype=torch.float64)
        checked_scales(noise)
        scales = site_scales(prior, self.subnet)
        ratio = (self.noise_scale / noise) ** self.options.noise_power
        return log_evidence(self.form, self.summary, scales, noise, ratio)

    @full_precision()
    def log_det_precision(self, prior_scales: Tensor) -> Tensor:
        r"""Log determinant of the precision at each of many prior precisions.

        .. math:: \log\det (G + s P_0)

        with the GGN G and the model's own prior precision P0: what tuning the prior by
        the evidence needs, without a pass over the data. From about ten scales on, one
        eigenvalue decomposition in float64 serves all of them. For fewer, for a prior
        that couples weights, and where memory is short, each takes a factorization.

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
        scales = checked_scales(prior_scales)
        find = self.form.log_det_function(scales.numel())
        return find(scales.to(self.loc.device))
