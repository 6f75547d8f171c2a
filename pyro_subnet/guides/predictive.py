"""The predictions of the posterior guide: models to sample, and closed forms."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_subnet.guides.curvature import CurvatureGuide
from pyro_subnet.models.hybrid import HybridModel
from pyro_subnet.models.linearized import LinearizedModel
from pyro_subnet.predictions.distribution import predictive_distribution
from pyro_subnet.predictions.functions import sample_functions
from pyro_subnet.predictions.links.options import Predictive, PredictiveOptions
from pyro_subnet.predictions.outputs import output_distribution
from pyro_subnet.tensors.modes import full_precision


class PredictiveGuide(CurvatureGuide):
    """A guide over the subnet that predicts."""

    @property
    def linearized_model(self) -> LinearizedModel:
        r"""The model with its outputs expanded to first order about the MAP.

        A Pyro model with the user's signature and sites: observed sites have
        distribution parameters :math:`\eta(\hat\theta) + J (\theta - \hat\theta)`;
        deterministic sites and tensors that the model returns are expanded likewise.
        Works in ``Predictive``, also with ``parallel=True``. Normal noise is multiplied
        by ``noise_scale``.

        Source: Daxberger et al. (2021), eq. 5, arXiv 2010.14689.
        """
        return LinearizedModel(
            self.user_model, self.latents, noise_scale=self.noise_scale
        )

    def hybrid_model(self, linearized: bool = False) -> HybridModel:
        """The hybrid model: the subnet one latent site, other weights parameters.

        For MCMC, importance sampling, or any inference of Pyro's over the subnet alone;
        its ``guide`` draws from this posterior. ``Predictive`` on it holds K draws of S
        elements, not of D. The log density is that of the model as it is written:
        ``prior_scale`` and ``noise_scale`` do not enter.

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

    def predictive_distribution(
        self,
        *args: Any,
        link: str | None = None,
        joint: bool = False,
        site: str | None = None,
        num_samples: int = 1000,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Any:
        r"""Distribution of y at each input, the linearized outputs integrated out.

        .. math:: p(y \mid x) = \int p(y \mid \eta)\,
            N\big(\eta;\, \eta(x; \hat\theta),\, J(x) P^{-1} J(x)^\top\big)\, d\eta

        Gaussian noise is exact: :math:`N(f, J P^{-1} J^\top + \sigma^2)`, with the
        posterior's ``noise_scale``. A log scale that the subnet moves is integrated by
        itself, locs exactly. Classes: ``"probit"`` (default), softmax of
        :math:`f_c / \sqrt{1 + \tfrac\pi8 \operatorname{Var} f_c}`; ``"bridge"`` and
        ``"bridge-norm"``, the Laplace bridge and its normalized variant; from logits as
        the model gave them, since none of the three is blind to a constant per row.
        Families of one scalar output: ``"quadrature"``. All: ``"mc"``. Probit, bridge
        and quadrature take the elements of one datum as independent; ``"mc"`` keeps
        their correlation. Masks of the site do not enter.

        Differentiable, once, in tensor arguments that require gradients.

        Args:
            args: Positional arguments of the model; data of the observed site may be
                left out where the model allows it.
            link: How outputs become y; by default the family's best.
            joint: One distribution over all inputs: for exact Gaussian noise a
                multivariate normal over N * E elements, datum by datum, else events of
                shape ``(N, *datum)``.
            site: The observed site; needed where there are several.
            num_samples: Draws of the outputs for ``"mc"``.
            generator: Source of the random numbers; torch's own by default.
            kwargs: Keyword arguments of the model.

        Returns:
            Batch shape (N,) and events of a datum's shape.

        Raises:
            OptionError: If the link means nothing for the family; names those possible.
            ModelError: If the site is not clear, or the subnet does not move it.
            NonFiniteError: If a parameter overflows where it is integrated.

        Source: Daxberger et al. (2021), eqs. 5 and 6, arXiv 2010.14689; MacKay (1992),
        doi 10.1162/neco.1992.4.5.720 (probit); Hobbhahn et al. (2022), arXiv 2003.01227
        (bridge).
        """
        options = PredictiveOptions(
            link, joint, site, num_samples, self.noise_scale, generator
        )
        return self._predictive(args, kwargs, options).distribution

    def predictive_error(
        self,
        y: Tensor,
        *args: Any,
        link: str | None = None,
        num_samples: int = 1000,
        site: str | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """How far the log density of :meth:`predictive_distribution` may be off.

        Of the sum that stands for an integral alone: for ``"mc"`` the standard error,
        for ``"quadrature"`` the difference that half the nodes make, 0 for the others.
        What a link itself approximates does not count.

        Args:
            y: Observations, as the predictive distribution takes them.
            args: As for :meth:`predictive_distribution`.
            link: As there.
            num_samples: As there.
            site: As there.
            generator: As there.
            kwargs: As there.

        Returns:
            Nats, shape (N,).
        """
        options = PredictiveOptions(
            link, False, site, num_samples, self.noise_scale, generator
        )
        found = self._predictive(args, kwargs, options)
        if found.log_prob_error is None:
            return torch.zeros_like(found.distribution.log_prob(y))
        return found.log_prob_error(y)

    @full_precision()
    def _predictive(
        self, args: Any, kwargs: Any, options: PredictiveOptions
    ) -> Predictive:
        return predictive_distribution(
            self.user_model,
            self.latents,
            self.subnet,
            self.gaussian,
            (args, kwargs),
            options=options,
        )

    @full_precision()
    def sample_functions(
        self,
        num_samples: int,
        *args: Any,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Tensor:
        r"""Draws of whole linearized functions: one weight draw serves all inputs.

        .. math:: \eta_k(x) = \eta(x; \hat\theta) + J(x) (\theta_k - \hat\theta),
            \qquad \theta_k \sim N(\hat\theta, P^{-1})

        Args:
            num_samples: K, how many draws.
            args: Positional arguments of the model.
            generator: Source of the random numbers; torch's own by default.
            kwargs: Keyword arguments of the model.

        Returns:
            Shape (K, N, C), outputs as in :meth:`output_distribution`; differentiable
            in the inputs. Costs K S^2 operations, and K S for each row of J.

        Raises:
            OptionError: If ``num_samples`` is less than 1.
            ModelError: If the subnet moves no output parameter.

        Source: Daxberger et al. (2021), eqs. 5 and 6, arXiv 2010.14689.
        """
        return sample_functions(
            self.user_model,
            self.latents,
            self.subnet,
            self.gaussian,
            (args, kwargs),
            num_samples=num_samples,
            generator=generator,
        )
