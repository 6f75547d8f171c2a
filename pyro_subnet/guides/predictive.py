"""Predictions of a posterior guide, in closed form and by draws."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from pyro_subnet.gaussians.base import Gaussian
from pyro_subnet.guides.base import AutoAtMAP
from pyro_subnet.options import check_num_samples
from pyro_subnet.predictions.distribution import of_site, predictive_distribution
from pyro_subnet.predictions.full_normal import FullNormal
from pyro_subnet.predictions.groups import joint_option
from pyro_subnet.predictions.links.integration import Integrated, PredictiveOptions
from pyro_subnet.predictions.observations import error_at
from pyro_subnet.predictions.outputs import OutputGaussian
from pyro_subnet.predictions.raw_logits import with_raw_logits
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.modes import full_precision, outside_inference_mode
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.data import Data
from pyro_subnet.tracing.drawn_data import check_data_are_given
from pyro_subnet.tracing.linearized_outputs import LinearizedOutputs


class LinearizedPredictions(AutoAtMAP):
    """A guide of a Gaussian over a subnet, which predicts with the linearized model."""

    @property
    @abstractmethod
    def subnet(self) -> Subnet:
        """The chosen elements."""

    @property
    @abstractmethod
    def gaussian(self) -> Gaussian:
        """The Gaussian over them."""

    @property
    @abstractmethod
    def noise_factor(self) -> float:
        """What the model's normal noise is multiplied by."""

    @full_precision()
    @outside_inference_mode()
    def output_distribution(
        self, *args: Any, joint: bool | int = False, **kwargs: Any
    ) -> FullNormal:
        r"""Gaussian over the linearized outputs, in closed form, before any noise.

        .. math:: \eta(x) \sim N\big(\eta(x; \hat\theta),\; J(x) P^{-1} J(x)^\top\big)

        Outputs are the unconstrained parameters of the observed distributions: logits,
        log rate, loc, log scale. Parameters that no subnet weight moves are left out:
        of a model with latent noise ``subnet=None`` has one column more than a subnet
        without it. ``names`` says which is which.
        For each site, in trace order, and each parameter of its family, the elements
        of one observation follow in row-major order. Categorical logits are
        log-probabilities at the MAP: softmax is blind to a constant per row. Where no
        chosen weight reaches any of the inputs, as of an expert that they never enter,
        the outputs are those of the MAP, with zero covariance.

        The covariance may be singular (logits that sum to one, inputs that the subnet
        does not move); draws and ``covariance_matrix`` are exact then as well.
        Differentiable in tensor arguments that require gradients.

        Args:
            args: Positional arguments of the model; data of observed sites may be left
                out where the model allows it.
            joint: Gives the covariance across inputs: event shape (N * C,), input by
                input, in place of batch shape (N,) and event shape (C,). A number q:
                across every q inputs that follow one another, batch shape (N / q,) and
                event shape (q * C,).
            kwargs: Keyword arguments of the model.

        Returns:
            A multivariate normal, whose ``names`` say what each element of an event is:
            ``"loc"``, ``"log_scale"``; with an index where there are several, as in
            ``"logits[2]"``; and with the site's name first where the model observes
            several sites, as in ``"y.loc"``.

        Raises:
            ModelError: If the observed sites have data axes of different lengths, or
                one depends on another's data, which are not given.
            OptionError: If ``joint`` is a number that does not divide N.
            NonFiniteError: If a derivative is NaN or infinite, as at infinite inputs.

        Source: Daxberger et al. (2021), eqs. 5 and 6, arXiv 2010.14689.
        """
        return self._outputs(args, kwargs).distribution(joint=joint_option(joint))

    @full_precision()
    @outside_inference_mode()
    def output_variance(
        self,
        *args: Any,
        num_samples: int | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Float[Tensor, "batch ..."]:
        r"""Variance of each linearized output, before any noise, without covariances.

        .. math:: \big(J(x) P^{-1} J(x)^\top\big)_{cc}, \quad \text{or} \quad
            \frac1K \sum_k \big(J(x) (\theta_k - \hat\theta)\big)_c^2,
            \quad \theta_k \sim N(\hat\theta, P^{-1})

        For many outputs: classes, tokens, pixels. Exact, it takes a backward pass for
        each output of an observation, in bounded memory; a few in all where the chosen
        weights are a last layer's and outputs are numbers. (Of classes, outputs are
        log-probabilities, to which all logits add.) From draws it takes three forward
        passes for each, however many outputs there are, and each variance has the
        relative standard error :math:`\sqrt{2 / K}`.

        Args:
            args: As for :meth:`output_distribution`.
            num_samples: K, for variances from draws; None for exact ones.
            generator: Source of the random numbers; torch's own by default.
            kwargs: As for :meth:`output_distribution`.

        Returns:
            Shape (N, C); with the axes of an observation, as (N, H, W), where it has
            several elements: of pixels' or tokens' classes these come last. Exact ones
            are differentiable in the inputs.

        Raises:
            OptionError: If ``num_samples`` is less than 1.
            ModelError: As for :meth:`output_distribution`.
            NonFiniteError: As there.
        """
        if num_samples is not None:
            check_num_samples(num_samples)
        return self._outputs(args, kwargs).variances(num_samples, generator)

    def predictive_distribution(
        self,
        *args: Any,
        link: str | None = None,
        joint: bool | int = False,
        site: str | None = None,
        num_samples: int = 1000,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Distribution:
        r"""Distribution of y at each input, the linearized outputs integrated out.

        .. math:: p(y \mid x) = \int p(y \mid \eta)\,
            N\big(\eta;\, \eta(x; \hat\theta),\, J(x) P^{-1} J(x)^\top\big)\, d\eta

        Gaussian noise is exact: :math:`N(f, J P^{-1} J^\top + \sigma^2)`, with the
        posterior's ``noise_factor``. A log scale that the subnet moves is integrated by
        itself, locs exactly. Classes: ``"probit"`` (default), softmax of
        :math:`f_c / \sqrt{1 + \tfrac\pi8 \operatorname{Var} f_c}`; ``"bridge"`` and
        ``"bridge-norm"``, the Laplace bridge and its normalized variant; from logits as
        the model gave them, since none of the three is blind to a constant per row.
        ``"pairwise"``, the probit approximation of every pair of classes, is, and takes
        covariances of the logits. Families of one scalar output: ``"quadrature"``. All:
        ``"mc"``, which alone keeps the correlation between elements of one observation.
        Masks of the site do not enter.

        Differentiable, once, in tensor arguments that require gradients.

        Args:
            args: Positional arguments of the model; data of the observed site may be
                left out where the model allows it.
            link: How outputs become y; by default the family's best.
            joint: One distribution over all inputs: for exact Gaussian noise a
                multivariate normal over N * E elements, observation by observation,
                else events of N times an observation's shape. A number q, for exact
                Gaussian noise alone: one over every q inputs that follow one another,
                batch shape (N / q,).
            site: The observed site; needed where there are several.
            num_samples: Draws of the outputs for ``"mc"``.
            generator: Source of the random numbers; torch's own by default.
            kwargs: Keyword arguments of the model.

        Returns:
            Batch shape (N,) and events of an observation's shape.

        Raises:
            OptionError: If the link means nothing for the family; names those possible.
            ModelError: If the site is not clear, or depends on another observed site's
                data, which are not given.
            NonFiniteError: If a parameter overflows where it is integrated, or a
                derivative is not finite.

        Source: Daxberger et al. (2021), eqs. 5 and 6, arXiv 2010.14689; MacKay (1992),
        doi 10.1162/neco.1992.4.5.720 (probit); Hobbhahn et al. (2022), arXiv 2003.01227
        (bridge); Lu et al. (2020), arXiv 2006.07584 (pairwise).
        """
        options = PredictiveOptions(
            link,
            joint_option(joint),
            site,
            num_samples,
            self.noise_factor,
            generator,
        )
        return self._predictive(args, kwargs, options).distribution

    def predictive_distributions_from(
        self,
        batches: Iterable[Any],
        *,
        link: str | None = None,
        site: str | None = None,
        num_samples: int = 1000,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Iterator[Distribution]:
        """:meth:`predictive_distribution` of one batch of inputs after another.

        For more inputs than the network can run on at once: one batch is predicted
        when it is asked for, and nothing is kept of those before.

        Args:
            batches: One set of the model's arguments each, as for
                ``laplace_approximation_from``.
            link: As for :meth:`predictive_distribution`.
            site: As there.
            num_samples: As there.
            generator: As there.
            progress: Whether to show a progress bar.

        Returns:
            An iterator over one distribution a batch.

        Raises:
            DataError: If ``batches`` are no batches, or there is none.
            OptionError: As for :meth:`predictive_distribution`.
        """
        check_num_samples(num_samples)
        data = Data(batches, whole=False, progress=progress)
        return (
            self.predictive_distribution(
                *args,
                link=link,
                site=site,
                num_samples=num_samples,
                generator=generator,
                **kwargs,
            )
            for args, kwargs in data.calls("Predictions")
        )

    def predictive_error(
        self,
        y: Tensor,
        *args: Any,
        link: str | None = None,
        num_samples: int = 1000,
        site: str | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Float[Tensor, " batch"]:
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

        Raises:
            DataError: If ``y`` is of other data than the inputs, or none of the values
                that the predictions allow.
            OptionError: As for :meth:`predictive_distribution`.
        """
        options = PredictiveOptions(
            link, False, site, num_samples, self.noise_factor, generator
        )
        return error_at(y, self._predictive(args, kwargs, options), self.loc)

    @full_precision()
    @outside_inference_mode()
    def sample_functions(
        self,
        num_samples: int,
        *args: Any,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Float[Tensor, "num_samples batch out"]:
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
            ModelError: As for :meth:`output_distribution`.
            NonFiniteError: As there.

        Source: Daxberger et al. (2021), eqs. 5 and 6, arXiv 2010.14689.
        """
        check_num_samples(num_samples)
        return self._outputs(args, kwargs).draw_functions(num_samples, generator)

    def _outputs(self, args: Any, kwargs: Any) -> OutputGaussian:
        call = ModelCall.read(self.at_map, args, kwargs)
        outputs = LinearizedOutputs.read(call, self.subnet)
        check_data_are_given(call)
        return OutputGaussian(outputs, self.gaussian)

    @full_precision()
    @outside_inference_mode()
    def _predictive(
        self, args: Any, kwargs: Any, options: PredictiveOptions
    ) -> Integrated:
        check_num_samples(options.num_samples)
        call = of_site(ModelCall.read(self.at_map, args, kwargs), options.site)
        outputs = with_raw_logits(LinearizedOutputs.read(call, self.subnet))
        check_data_are_given(call)
        problem = OutputGaussian(outputs, self.gaussian).problem(options)
        return predictive_distribution(problem)
