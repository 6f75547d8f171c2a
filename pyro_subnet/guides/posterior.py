"""The posterior guide: a Gaussian over the subnet, point estimates elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, final

import torch
from jaxtyping import Float
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor
from torch.utils.data import DataLoader

from pyro_subnet.curvature.prior import PriorPrecision
from pyro_subnet.exceptions import OptionError
from pyro_subnet.files.checkpoint import load_posterior, save_posterior
from pyro_subnet.fit.sums import subnet_curvature
from pyro_subnet.gaussians.base import CurvatureForm, Gaussian
from pyro_subnet.gaussians.registry import FORMS
from pyro_subnet.guides.over_ranks import check_same_fit
from pyro_subnet.guides.predictive import LinearizedPredictions
from pyro_subnet.laplace.search import Tuning
from pyro_subnet.laplace.state import PosteriorState, SiteFactors
from pyro_subnet.laplace.summary import FitSummary
from pyro_subnet.laplace.tuning import check_noise_scales
from pyro_subnet.models.hybrid import HybridModel
from pyro_subnet.models.linearized import LinearizedModel
from pyro_subnet.models.subnet_normal import SubnetNormal
from pyro_subnet.options import (
    FitOptions,
    check_forgetting,
    check_num_data,
)
from pyro_subnet.predictions.held_out import HowToTune, tuned_noise, tuned_prior
from pyro_subnet.subnet import Subnet, place_elements
from pyro_subnet.tensors.modes import full_precision
from pyro_subnet.tensors.ranks import Ranks
from pyro_subnet.tracing.data import Data
from pyro_subnet.tracing.trace import Model, ModelAtMAP

# What a guide's own set-up found out about the model's sites.
_PROTOTYPE = (
    "prototype_trace",
    "_prototype_frames",
    "_unconstrained_shapes",
    "_cond_indep_stacks",
    "latent_dim",
)


@final
class AutoSubnetMultivariateNormal(LinearizedPredictions):
    r"""Laplace posterior of a subnet, as a guide over the user's own sites.

    Made by :meth:`AutoSubnetLaplace.laplace_approximation
    <pyro_subnet.AutoSubnetLaplace.laplace_approximation>`. The auxiliary site, and
    every latent vector here, has shape (S,): the subnet in packing order,
    unconstrained. Elements outside the subnet sit at the MAP.

    Nothing here changes a posterior: tuning and updates give a new one.

    Args:
        model: The user's model.
        prototype: A guide that was set up on it.
        state: The posterior in numbers; its tensors become the guide's buffers.

    Attributes:
        loc: The MAP, packed, shape (D,), unconstrained.
        subnet_positions: The chosen elements' positions in it, shape (S,).
    """

    subnet_positions: Tensor
    _way_back = "Give it back with `posterior.with_model(model)`."

    def __init__(self, model: Model, prototype: AutoContinuous, state: PosteriorState):
        super().__init__(model)
        self._user_model = (model,)
        for name in _PROTOTYPE:
            setattr(self, name, getattr(prototype, name))
        self._hold(state)

    def __repr__(self) -> str:
        return f"{type(self).__name__} of a {self.state}"

    def _hold(self, state: PosteriorState) -> None:
        """Takes a state in place of the one there is."""
        for name in list(self._buffers):
            delattr(self, name)
        for name, tensor in state.tensors().items():
            self.register_buffer(name, tensor)
        self._facts = state.facts

    def _with(self, state: PosteriorState) -> AutoSubnetMultivariateNormal:
        new = self._sharing()
        new._hold(state)
        return new

    # What it is

    @property
    def state(self) -> PosteriorState:
        """The posterior in numbers, without Pyro; shares the guide's tensors."""
        tensors = dict(self._buffers)
        return PosteriorState.from_tensors(tensors, self._facts, self.layout)

    @property
    def subnet(self) -> Subnet:
        """The chosen elements."""
        explained = self._facts.explained_variance
        return Subnet(self.layout, self.subnet_positions, explained)

    @property
    def explained_variance(self) -> float | None:
        """See :class:`Subnet <pyro_subnet.Subnet>`."""
        return self._facts.explained_variance

    @property
    def options(self) -> FitOptions:
        """How the curvature was asked for."""
        return self._facts.options

    @property
    def prior_factor(self) -> float | dict[str, float]:
        """What the model's own prior precision is multiplied by, over the subnet.

        A number, or one for each site named.
        """
        return self._facts.prior_factor

    @property
    def noise_factor(self) -> float:
        """What the standard deviation of the model's normal noise is multiplied by."""
        return self._facts.noise_factor

    @property
    def scaled_at_map(self) -> ModelAtMAP:
        """The user's model under the present factors, at the MAP."""
        return replace(self.at_map, factors=self.state.factors)

    @property
    def tuning(self) -> Tuning | None:
        """How the factor was chosen that was tuned last."""
        return self.state.tuning

    @property
    def tunings(self) -> dict[str, Tuning]:
        """How factors were chosen, if by tuning: of ``"prior"`` and ``"noise"``."""
        return dict(self._facts.tunings)

    @property
    def form_name(self) -> str:
        """How the curvature is held: primal, dual, diagonal or kronecker."""
        return self._facts.form

    @property
    def form(self) -> CurvatureForm:
        """Curvature of likelihood and prior, at the present factors."""
        return FORMS[self._facts.form].from_tensors(dict(self._buffers), self.layout)

    @property
    def summary(self) -> FitSummary:
        """The log joint density of the training data at the MAP."""
        return FitSummary.from_tensors(dict(self._buffers))

    @property
    def gaussian(self) -> Gaussian:
        """The Gaussian over the subnet, without Pyro's interface."""
        return self.form.gaussian(self.loc.index_select(0, self.subnet_positions))

    @property
    def prior_precision(self) -> PriorPrecision:
        """Negative Hessian of the model's log prior over the subnet, unscaled."""
        return self.form.prior

    def ggn(self) -> Float[Tensor, "subnet subnet"]:
        """The generalized Gauss-Newton matrix, shape (S, S), summed over the data."""
        return self.form.ggn()

    def get_posterior(self, *args: Any, **kwargs: Any) -> SubnetNormal:
        """The posterior over the subnet, unconstrained.

        Args:
            args: Any; not read.
            kwargs: Any; not read.

        Returns:
            A normal distribution over (S,).
        """
        return SubnetNormal(self.gaussian)

    def with_model(self, model: Model) -> AutoSubnetMultivariateNormal:
        """The same posterior with a model, which a pickle leaves behind.

        Args:
            model: The model that the posterior was fitted to.

        Returns:
            A new guide that shares this one's tensors.
        """
        new = self._sharing()
        new.__dict__.update(_model=(model,), _user_model=(model,))
        return new

    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        gaussian = self.gaussian
        return gaussian.loc, gaussian.variance().sqrt()

    def _unpack_elements(self, latent: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """Prototype nodes and unconstrained values of sites, from the subnet's."""
        # A site without chosen elements keeps its own shape: plates broadcast it
        # without copying it for every draw.
        subnet, base = self.subnet, self.latents.values
        chosen, pieces = subnet.indices, subnet.split(latent)
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            value = base[name]
            if name in chosen:
                event_dim = site["fn"].event_dim + value.ndim - site["value"].ndim
                piece = pieces[name]
                value = place_elements(value, chosen[name], piece, event_dim)
            yield site, value

    # Predictions

    @property
    def linearized_model(self) -> LinearizedModel:
        r"""The model with its outputs expanded to first order about the MAP.

        A Pyro model with the user's signature and sites: observed sites have
        distribution parameters :math:`\eta(\hat\theta) + J (\theta - \hat\theta)`;
        deterministic sites and tensors that the model returns are expanded likewise.
        Works in ``Predictive``, also with ``parallel=True``. Normal priors and normal
        noise are under ``prior_factor`` and ``noise_factor``.

        Source: Daxberger et al. (2021), eq. 5, arXiv 2010.14689.
        """
        return LinearizedModel(self.scaled_at_map)

    def hybrid_model(self, linearized: bool = False) -> HybridModel:
        """The hybrid model: the subnet one latent site, other weights parameters.

        For MCMC, importance sampling, or any inference of Pyro's over the subnet alone;
        its ``guide`` draws from this posterior. ``Predictive`` on it holds K draws of S
        elements, not of D. The log density is that of the model under ``prior_factor``
        and ``noise_factor``; a prior that is not normal keeps its own precision.

        Args:
            linearized: Whether outputs are expanded to first order about the MAP. For
                Gaussian noise and priors this posterior is then exact.

        Returns:
            A Pyro model with the user's signature and observed sites.
        """
        return HybridModel(
            self.scaled_at_map, self.subnet, self.gaussian, linearized=linearized
        )

    # Priors and noise

    @full_precision()
    def log_marginal_likelihood(
        self,
        prior_factor: SiteFactors | None = None,
        noise_factor: float | Tensor | None = None,
    ) -> Float[Tensor, ""]:
        r"""Laplace's approximation of the log evidence, without a pass over the data.

        .. math:: \log p(D \mid \hat\theta) + \log p(\hat\theta)
            + \tfrac S2 \log 2\pi - \tfrac12 \log\det P

        Of a strict subset it is the evidence of a model whose other weights are held at
        the MAP: their log prior is a constant of it. It compares priors and noise for
        one subnet; it is not the evidence of the whole network, and does not compare
        subnets. The MAP is held too. Exact where outputs are linear, noise and priors
        normal, and the MAP is that of the factors asked for.

        Args:
            prior_factor: What the model's own prior precision is multiplied by: a
                number, or one a site; by default this posterior's. Priors that are not
                normal are taken as the normal that touches them at the MAP.
            noise_factor: What the model's normal noise is multiplied by; by default
                this posterior's.

        Returns:
            A scalar, nats, float64, differentiable once in tensors given as factors.

        Raises:
            OptionError: If a factor is not positive and finite, or the noise is not
                normal and fixed.
            PrecisionError: If a precision is not positive definite.

        Source: MacKay (1992), doi 10.1162/neco.1992.4.3.448; Immer et al. (2021), arXiv
        2104.04975, for networks.
        """
        return self.state.log_marginal_likelihood(prior_factor, noise_factor)

    @full_precision()
    def with_prior_precision(
        self, scale: float | Mapping[str, float] | str
    ) -> AutoSubnetMultivariateNormal:
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
        return self._with(self.state.with_prior_factor(scale))

    @full_precision()
    def with_noise_scale(self, scale: float) -> AutoSubnetMultivariateNormal:
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
        return self._with(self.state.with_noise_factor(scale))

    @full_precision()
    def tune(self, val: Any = None) -> AutoSubnetMultivariateNormal:
        """The posterior under a noise and a prior that suit the data, at the same MAP.

        First the normal noise is set on held-out data, as by ``tune_noise_scale("nll",
        val=val)``, then the prior precision by evidence under that noise, as by
        ``tune_prior_precision()``. A noise that was learned beside the weights is often
        far too small: a network absorbs it, and every posterior is as sure as it. Only
        held-out data tell.

        Args:
            val: Held-out data: what one call of the model takes, or a ``DataLoader`` or
                list of such. Without it the prior alone is tuned.

        Returns:
            A new posterior guide; ``print`` shows both factors, ``tunings`` how they
            were chosen.

        Raises:
            OptionError: If ``val`` is given for a model whose noise cannot be scaled.
            PrecisionError: If no scale gives a posterior.
        """
        if val is None:
            return self.tune_prior_precision()
        check_noise_scales(self.summary)
        return self.tune_noise_scale("nll", val=val).tune_prior_precision()

    @full_precision()
    def tune_prior_precision(
        self,
        method: str = "evidence",
        *,
        val: Any = None,
        per_site: bool = False,
        bounds: tuple[float, float] = (1e-6, 1e6),
        standard_errors: int | float | None = None,
    ) -> AutoSubnetMultivariateNormal:
        """The posterior under the prior precision that serves best, at the same MAP.

        Args:
            method: ``"evidence"``: the highest :meth:`log_marginal_likelihood`;
                ``"nll"``: the lowest negative log predictive density of held-out data,
                by :meth:`predictive_distribution`.
            val: Held-out data for ``"nll"``: what one call of the model takes, or a
                ``DataLoader`` or list of such. Data of several observed sites count
                alike, each by its own density.
            per_site: One scale for each site in place of one for all, by the evidence.
            bounds: Least and largest scale.
            standard_errors: For ``"nll"``, by default 2. Of the scales that were tried,
                the one nearest the model's own is taken whose held-out NLL is worse
                than the best by at most this many standard errors of the difference: it
                leaves the model's prior alone unless the held-out data argue against
                it. 0 takes the best, which on held-out data like the training data is
                often a plateau's end, a prior so narrow that nothing is left of the
                posterior. By default a prior that leaves nothing is not taken: the
                model's own stays, and a :class:`TuningWarning` says so.

        Returns:
            A new posterior guide, whose ``tuning`` holds all that was tried.

        Raises:
            OptionError: If an option is not known, or ``val`` does not fit the method.
            PrecisionError: If no scale gives a posterior.

        Source: MacKay (1992), doi 10.1162/neco.1992.4.3.415, for the evidence; Breiman
        et al. (1984), section 3.4.3, for standard errors, there one, of the NLL itself.
        """
        how = HowToTune(method, val, bounds, per_site, standard_errors)
        return self._tuned(tuned_prior(self.at_map, self.state, how))

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
        how = HowToTune(method, val, bounds)
        return self._tuned(tuned_noise(self.at_map, self.state, how))

    def _tuned(self, state: PosteriorState) -> AutoSubnetMultivariateNormal:
        state.warn_of_tuning()
        return self._with(state)

    # More data

    def update(
        self, *args: Any, forgetting: float = 1.0, **kwargs: Any
    ) -> AutoSubnetMultivariateNormal:
        r"""The posterior after more data, seen in one call of the model.

        .. math:: P = \gamma G + \sum_{n\ \text{new}} w_n J_n^\top \Lambda_n J_n + s P_0

        With :math:`\gamma = 1` it equals the fit to all data at once at the same MAP,
        which stays where it is. Each new observation counts once: the N/B of a
        subsampling plate is left out of the sum, as in :meth:`update_from`.

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
        if not kwargs and len(args) == 1 and isinstance(args[0], DataLoader):
            return self.update_from(args[0], forgetting=forgetting)
        return self._updated(Data.single(args, kwargs, whole=False), forgetting)

    def update_from(
        self,
        batches: Iterable[Any],
        *,
        num_data: int | None = None,
        forgetting: float = 1.0,
        progress: bool = False,
        process_group: Any = None,
    ) -> AutoSubnetMultivariateNormal:
        """The posterior after more data, from minibatches that show each once.

        Args:
            batches: As for :meth:`AutoSubnetLaplace.laplace_approximation_from`.
            num_data: As there.
            forgetting: As for :meth:`update`.
            progress: Whether to show a progress bar.
            process_group: As there.

        Returns:
            A new posterior guide.
        """
        check_num_data(num_data)
        data = Data(
            batches,
            whole=False,
            num_data=num_data,
            progress=progress,
            added=True,
            ranks=Ranks.of(process_group),
        )
        return self._updated(data, forgetting)

    @torch.inference_mode(False)
    @full_precision()
    def _updated(self, data: Data, forgetting: float) -> AutoSubnetMultivariateNormal:
        check_forgetting(forgetting)
        state = self.state
        check_same_fit(data, state.loc, state.options_to_add)
        more = subnet_curvature(self.at_map, state.subnet, data, state.options_to_add)
        more.warn_of_doubts()
        return self._with(
            state.with_data(more.likelihood, more.summary, forgetting, more.num_seen)
        )

    # Files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all that this posterior is to a file, whole or not at all.

        A safetensors file: numbers, no code. The model is not in it.

        Args:
            path: Where to. What is there is kept until the new file is complete.

        Raises:
            CheckpointError: If it cannot be written.
        """
        save_posterior(self.state, self, path)

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
        prototype, state = load_posterior(path, model, args, kwargs)
        return cls(model, prototype, state)
