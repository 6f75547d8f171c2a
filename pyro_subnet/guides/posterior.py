"""The posterior guide: a Gaussian over the subnet, point estimates elsewhere."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

import torch
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor

from pyro_subnet.exceptions import (
    NoObservedSiteWarning,
    NoOutputVarianceWarning,
    OptionError,
    warn,
)
from pyro_subnet.files.checkpoint import load_posterior, save_posterior
from pyro_subnet.fit.dispatch import (
    FitCurvature,
    curvature_of,
    form_of,
    updated_form,
)
from pyro_subnet.guides.copies import sharing
from pyro_subnet.guides.predictive import PredictiveGuide
from pyro_subnet.laplace.evidence import site_scales
from pyro_subnet.laplace.tuning import tune_noise, tune_prior, tune_site_priors
from pyro_subnet.options import FitOptions
from pyro_subnet.predictions.held_out import tune_by_nll
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.modes import full_precision
from pyro_subnet.tracing.data import Data
from pyro_subnet.tracing.trace import Model


class AutoSubnetMultivariateNormal(PredictiveGuide):
    r"""Laplace posterior of a subnet, as a guide over the user's own sites.

    Made by :meth:`AutoSubnetLaplace.laplace_approximation
    <pyro_subnet.AutoSubnetLaplace.laplace_approximation>`. The auxiliary site, and
    every latent vector here, has shape (S,): the subnet in packing order,
    unconstrained. Elements outside the subnet sit at the MAP.

    Nothing here changes a posterior: tuning and updates give a new one.

    Attributes:
        loc: The MAP, packed, shape (D,), unconstrained.
        prior_scale: What the model's prior precision is multiplied by, over the
            subnet: a number, or one for each site named.
        noise_scale: What the model's normal noise is multiplied by.
        options: How the curvature was asked for.
        tuning: How a scale was chosen, in a posterior that tuning has given.
    """

    @classmethod
    def from_curvature(
        cls,
        prototype: AutoContinuous,
        model: Model,
        loc: Tensor,
        subnet: Subnet,
        curvature: FitCurvature,
        *,
        options: FitOptions,
    ) -> AutoSubnetMultivariateNormal:
        """Factors a precision and makes the guide.

        Args:
            prototype: The guide whose set-up is shared.
            model: The user's model.
            loc: The MAP, packed, shape (D,).
            subnet: The chosen elements.
            curvature: Of likelihood and prior; its tensors become the guide's.
            options: How it was asked for.

        Returns:
            The posterior guide.

        Raises:
            PrecisionError: If the precision is not positive definite.
            NonFiniteError: If it is not finite.
        """
        _warn_about_curvature(curvature)
        new = cls(model, prototype)
        new.explained_variance = subnet.explained_variance
        new._register(loc=loc, subnet_positions=subnet.flat)
        new._hold(form_of(curvature, new.latents), curvature.summary)
        new.options = options
        return new

    @full_precision()
    def tune_prior_precision(
        self,
        method: str = "evidence",
        *,
        val: Any = None,
        per_site: bool = False,
        bounds: tuple[float, float] = (1e-6, 1e6),
        standard_errors: int | float = 0.0,
    ) -> AutoSubnetMultivariateNormal:
        """The posterior under the prior precision that serves best, at the same MAP.

        Args:
            method: ``"evidence"``: the highest :meth:`log_marginal_likelihood`;
                ``"nll"``: the lowest negative log predictive density of held-out data,
                by :meth:`predictive_distribution`.
            val: Held-out data for ``"nll"``: what one call of the model takes.
            per_site: One scale for each site in place of one for all, by the evidence.
            bounds: Least and largest scale.
            standard_errors: For ``"nll"``. Of the scales that were tried, the one
                nearest the model's own is taken whose held-out NLL is worse than the
                best by at most this many standard errors of the difference. 0 takes the
                best, also where it is a plateau's end. 2 leaves the model's prior
                alone unless the held-out data argue against it: for them to choose
                what is predicted far from them is to follow noise.

        Returns:
            A new posterior guide, whose ``tuning`` holds all that was tried.

        Raises:
            OptionError: If an option is not known, or ``val`` does not fit the method.
            PrecisionError: If no scale gives a posterior.

        Source: MacKay (1992), doi 10.1162/neco.1992.4.3.415, for the evidence; Breiman
        et al. (1984), section 3.4.3, for standard errors, there one, of the NLL itself.
        """
        _check_method(method, val, per_site)
        _check_standard_errors(method, standard_errors)
        if method == "nll":
            tuning = tune_by_nll(
                self, val, bounds, self.with_prior_precision, standard_errors
            )
        elif per_site:
            tuning = tune_site_priors(
                self.form, self.summary, self.subnet, self.noise_scale, bounds
            )
        else:
            tuning = tune_prior(self.form, self.summary, self.noise_scale, bounds)
        new = self.with_prior_precision(tuning.by_site or tuning.best)
        new.tuning = tuning
        return new

    @full_precision()
    def tune_noise_scale(
        self,
        method: str = "evidence",
        *,
        val: Any = None,
        bounds: tuple[float, float] = (1e-3, 1e3),
    ) -> AutoSubnetMultivariateNormal:
        """The posterior under the normal noise that serves best, at the same MAP.

        Args:
            method: As for :meth:`tune_prior_precision`.
            val: As there.
            bounds: Least and largest factor of the model's noise.

        Returns:
            A new posterior guide, whose ``tuning`` holds all that was tried.

        Raises:
            OptionError: As for :meth:`with_noise_scale`, and of unknown options.
            PrecisionError: If no scale gives a posterior.
        """
        _check_method(method, val)
        if method == "nll":
            tuning = tune_by_nll(self, val, bounds, self.with_noise_scale)
        else:
            scales = site_scales(self.prior_scale, self.subnet)
            power = self.options.noise_power
            tuning = tune_noise(
                self.form,
                self.summary,
                scales,
                lambda scale: (self.noise_scale / scale) ** power,
                bounds,
            )
        new = self.with_noise_scale(tuning.best)
        new.tuning = tuning
        return new

    def update(
        self, *args: Any, forgetting: float = 1.0, **kwargs: Any
    ) -> AutoSubnetMultivariateNormal:
        r"""The posterior after more data, seen in one call of the model.

        .. math:: P = \gamma G + \sum_{n\ \text{new}} w_n J_n^\top \Lambda_n J_n + s P_0

        With :math:`\gamma = 1` it equals the fit to all data at once at the same MAP,
        which stays where it is.

        Args:
            args: Positional arguments of the model, with the new data alone.
            forgetting: γ in (0, 1]: what the old data's log likelihood is multiplied
                by.
            kwargs: Keyword arguments of the model.

        Returns:
            A new posterior guide.

        Raises:
            OptionError: If ``forgetting`` is outside (0, 1].
            SubnetError: As for :meth:`AutoSubnetLaplace.laplace_approximation`.

        Source: Ritter, Botev and Barber (2018), arXiv 1805.07810, for adding curvature
        as tasks come; they move the MAP as well.
        """
        return self._updated(Data.single(args, kwargs), forgetting)

    def update_from(
        self,
        batches: Iterable[Any],
        *,
        num_data: int | None = None,
        forgetting: float = 1.0,
        progress: bool = False,
    ) -> AutoSubnetMultivariateNormal:
        """The posterior after more data, from minibatches that show each datum once.

        Args:
            batches: As for :meth:`AutoSubnetLaplace.laplace_approximation_from`.
            num_data: As there.
            forgetting: As for :meth:`update`.
            progress: Whether to show a progress bar.

        Returns:
            A new posterior guide.
        """
        data = Data(batches, whole=False, num_data=num_data, progress=progress)
        return self._updated(data, forgetting)

    @torch.inference_mode(False)
    @full_precision()
    def _updated(self, data: Data, forgetting: float) -> AutoSubnetMultivariateNormal:
        if not 0.0 < forgetting <= 1.0:
            raise OptionError(
                f"`forgetting` must be in (0, 1]; got {forgetting}. Pass 1.0 to keep "
                "all that was known."
            )
        more = curvature_of(
            self.user_model,
            self.latents,
            self.subnet,
            data,
            self._options_to_add(),
        )
        new = sharing(self)
        new.tuning = None
        form = updated_form(
            self.form,
            more,
            forgetting,
            self._scales(),
            self.noise_scale**-self.options.noise_power,
            may_change=self.options.form == "auto",
        )
        new._hold(form, self.summary.plus(more.summary, forgetting))
        return new

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all that this posterior is to a file, whole or not at all.

        A safetensors file: numbers, no code. The model is not in it.

        Args:
            path: Where to. What is there is kept until the new file is complete.

        Raises:
            CheckpointError: If it cannot be written.
        """
        save_posterior(self, path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: Model,
        /,
        *args: Any,
        **kwargs: Any,
    ) -> AutoSubnetMultivariateNormal:
        """The posterior of a file, equal to the bit to the one that was saved.

        No code of the file's is run. Its tensors go where the model's latent sites are;
        from there :meth:`torch.nn.Module.to` moves them.

        Args:
            path: Where from.
            model: The model that was fitted; it is run once, and not changed.
            args: Its positional arguments: any on which its latent sites are those of
                the fit, with data for its observed sites.
            kwargs: Its keyword arguments.

        Returns:
            The posterior guide.

        Raises:
            CheckpointError: If the file is damaged, newer, or of another model.
            FileNotFoundError: If there is none.
        """
        return load_posterior(cls, path, model, args, kwargs)


def _warn_about_curvature(curvature: FitCurvature) -> None:
    if not curvature.has_outputs:
        warn(
            "The model has no observed site, so the posterior is the prior's curvature "
            "alone. If a likelihood is hidden by `poutine.block`, pass the full model.",
            NoObservedSiteWarning,
        )
    elif not curvature.moves_outputs:
        warn(
            "The subnet moves no output at any training input: there the predictive "
            "is the MAP's. Its weights may still matter on other inputs; choose more "
            "weights, or another selector such as `LargestGradient`, to have variance "
            "on these.",
            NoOutputVarianceWarning,
        )


def _check_method(method: str, val: Any, per_site: bool = False) -> None:
    if method not in ("evidence", "nll"):
        raise OptionError(
            f"`method` must be 'evidence' or 'nll'; got {method!r}. Leave it out for "
            "the evidence."
        )
    if (method == "nll") != (val is not None):
        raise OptionError(
            "`val` must be given for method='nll', and only there; got "
            f"method={method!r} and {'no' if val is None else 'some'} `val`. Pass "
            "held-out data, such as `val=(x, y)`, with method='nll'."
        )
    if per_site and method == "nll":
        raise OptionError(
            "`per_site` must go with method='evidence'; got method='nll', for which a "
            "search over many scales would fit the held-out data. Leave it out."
        )


def _check_standard_errors(method: str, standard_errors: int | float) -> None:
    if not 0 <= standard_errors < math.inf:
        raise OptionError(
            f"`standard_errors` must be finite and at least 0; got {standard_errors}. "
            "Pass 2 to keep the model's prior where held-out data do not speak."
        )
    if standard_errors and method != "nll":
        raise OptionError(
            "`standard_errors` must go with method='nll', whose errors held-out data "
            f"tell; got method={method!r}. Leave it out."
        )
