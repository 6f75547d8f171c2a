"""The MAP guide that a user trains, and the posterior that it becomes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from numbers import Real
from typing import Any, final

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pyro_subnet.exceptions import DataError, ModelError, OptionError
from pyro_subnet.files.resume import FitCheckpoint
from pyro_subnet.guides.approximation import fitted_state
from pyro_subnet.guides.base import AutoAtMAP
from pyro_subnet.guides.choices import (
    MAPDraws,
    SubnetChoice,
    check_in_support,
    check_model,
    check_start,
    checked_selector,
    checked_subnet,
    discrete_site,
    is_one,
    not_here,
    short_name,
    warn_of_one_weight,
)
from pyro_subnet.guides.over_ranks import agreed, check_same_fit
from pyro_subnet.guides.posterior import AutoSubnetMultivariateNormal
from pyro_subnet.guides.store import follow_entry, register, take_key, take_new_key
from pyro_subnet.nn.start import start_of_guide
from pyro_subnet.options import (
    Covariance,
    Curvature,
    FitOptions,
    FullForm,
    ModelFactors,
    check_num_data,
    check_shares,
)
from pyro_subnet.predictions.held_out import held_out_noise
from pyro_subnet.selection.mask import Mask
from pyro_subnet.selection.predictive_variance import PredictiveVariance
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.modes import full_precision, outside_inference_mode
from pyro_subnet.tensors.ranks import Ranks
from pyro_subnet.tracing.data import Data
from pyro_subnet.tracing.scaled_model import charge
from pyro_subnet.tracing.set_up import set_up
from pyro_subnet.tracing.trace import Latents, Model, ModelAtMAP
from pyro_subnet.training.evidence import Evidence, EvidenceStep, Structure
from pyro_subnet.training.train import Schedule, Trainer


@final
class AutoSubnetLaplace(AutoAtMAP):
    r"""A MAP guide whose Laplace approximation covers a subnet of the weights.

    Swapped in for :class:`pyro.infer.autoguide.AutoLaplaceApproximation`::

        guide = AutoSubnetLaplace(model, subnet=0.05)
        svi = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO())
        for _ in range(2000):
            svi.step(x, y)
        posterior = guide.laplace_approximation(x, y)

    Until :meth:`laplace_approximation` every latent site is a point estimate: ``loc``,
    shape (D,), in unconstrained space, is the one parameter. The approximation then
    gives the subnet S a Gaussian of full covariance, with precision GGN + prior, and
    leaves all other elements at the MAP.

    Two live guides never share an entry of the param store: the second one's name, and
    so its key, gets a number. An entry that is loaded or set takes effect in the guide
    that lives, and a guide made later starts at it. What a guide that is gone has left
    there, a guide without an ``init_loc_fn`` of its own goes on from, as in Pyro.

    Args:
        model: A Pyro model whose latent sites are continuous.
        subnet: Which elements are random. None: all; an int or a float in (0, 1]: that
            many, or that share, by
            :class:`~pyro_subnet.selection.PredictiveVariance`: those that keep most of
            the variance of the outputs at the training inputs; a selector; or a mapping
            from sites to bool masks or flat positions.
        init_loc_fn: Where the MAP search starts, as everywhere in Pyro; with the
            values of a MAP found elsewhere no training is needed. By default weights
            of a :func:`~pyro_subnet.nn.bayesianize`\ d network start at the network's
            own, wherever in the model it stands, and all other sites at their median.
        curvature: Of the likelihood. ``"ggn"``, the generalized Gauss-Newton matrix,
            is positive semidefinite and exact for the linearized model. ``"ggn-mc"``
            estimates it without bias from labels drawn from the model, one backward
            pass in place of one a class. ``"ef"``, the empirical Fisher, takes the
            data's own labels: as cheap, but no estimate of the GGN where the model
            does not fit them. ``"hessian"`` is exact, costs S passes and may not be
            positive definite; with ``subnet=None`` it gives what
            ``AutoLaplaceApproximation`` does.
        covariance: ``"full"``; or, as references to compare with, that of a diagonal
            (``"diag"``) or Kronecker-factored (``"kron"``) precision, which cost no
            S x S matrix and so serve for all weights.
        form: How a full covariance is held. ``"primal"``: as one S x S factor.
            ``"dual"``: by an R x R kernel of the R = N C rows of the weighted
            Jacobian, R S numbers, for small data and large subnets. ``"auto"``: dual
            where that costs less in memory, fit and prediction: at R below about S / 5,
            and S / 9 in float32.
            Both give the same posterior.

    Raises:
        SelectionError: If ``subnet`` is a number that is no size.
        OptionError: If an option is nothing known, or an argument of a kind that cannot
            be meant.

    Source: Daxberger et al. (2021), arXiv 2010.14689; Ritter, Botev and Barber (2018),
    "A scalable Laplace approximation for neural networks", for ``"kron"``.
    """

    _way_back = (
        "Save the posterior, or make the guide anew with "
        "`init_loc_fn=init_to_value(values=loaded.median())`."
    )

    def __init__(
        self,
        model: Model,
        subnet: SubnetChoice = None,
        *,
        init_loc_fn: Callable[..., Any] | None = None,
        curvature: Curvature = "ggn",
        covariance: Covariance = "full",
        form: FullForm = "auto",
    ):
        self.options = FitOptions(curvature, covariance, form)
        check_model(model)
        check_start(init_loc_fn)
        self._selector = _selector(subnet)
        self._is_one = is_one(subnet)
        self._draws = MAPDraws()
        if covariance == "kron" and self._selector is not None:
            raise OptionError(
                "`covariance='kron'` must cover every weight; got a `subnet` as well. "
                "Leave `subnet` out, or pass covariance='diag' or 'full'."
            )
        self._user_model = (model,)
        self._starts_where_told = init_loc_fn is not None
        self.is_loaded = False
        self.factors = ModelFactors()
        self.evidence_history = list[EvidenceStep]()
        super().__init__(model, start_of_guide(init_loc_fn))

    @property
    def prior_factor(self) -> float | dict[str, float]:
        """What the model's prior precision is multiplied by, learned by the evidence.

        A number, or one for each site where they differ.
        """
        return self.factors.over(self.layout.names)

    @property
    def noise_factor(self) -> float:
        """What the standard deviation of its normal noise is multiplied by."""
        return self.factors.noise

    @property
    def at_map(self) -> ModelAtMAP:
        """The user's model under the guide's factors, at the present ``loc``."""
        return replace(super().at_map, factors=self.factors)

    def __repr__(self) -> str:
        options, selector = self.options, self._selector
        size = "not called yet"
        if self.prototype_trace is not None:
            layout = self.layout
            size = f"MAP of {layout.num_params} weights at {len(layout.names)} sites"
        subnet = "all weights" if selector is None else repr(selector)
        return (
            f"{type(self).__name__}: {size}\n  subnet: {subnet}\n"
            f"  curvature {options.curvature!r}, covariance {options.covariance!r}, "
            f"form {options.form!r}"
        )

    # A parameter that is made in inference mode would not be trained outside of it.
    @outside_inference_mode()
    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        try:
            prepare = super()._setup_prototype
            set_up(self, prepare, self.user_model, (args, kwargs))
        except (ValueError, RuntimeError) as error:
            site = discrete_site(self.prototype_trace)
            self.prototype_trace: Any = None
            if site is None:
                raise
            raise ModelError(
                f"Every latent site must be continuous; got discrete site {site!r}. "
                "Sum it out, as `dist.MixtureSameFamily` does, and pass "
                "`curvature='hessian'`; or give it data. Enumeration, "
                "https://pyro.ai/examples/enumeration.html, serves the ELBO alone."
            ) from error
        check_in_support(self.prototype_trace.iter_stochastic_nodes())
        start = self._init_loc()
        # From here on the values' shapes and types are read alone.
        for _, node in self.prototype_trace.iter_stochastic_nodes():
            node["value"] = node["value"].new_zeros(()).expand(node["value"].shape)
        if self.master is not None:
            self.loc = nn.Parameter(start)
            return
        start = take_key(self, start, told=self._starts_where_told)
        self.loc = nn.Parameter(start)
        register(self)

    def __getattr__(self, name: str) -> Any:
        """Reads ``loc`` as the param store has it, where that was loaded or set."""
        own = self.__dict__["_parameters"].get(name) if name == "loc" else None
        if own is not None:
            follow_entry(self)
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            message = not_here(
                name,
                type(self),
                AutoSubnetMultivariateNormal,
                self.__dict__.get("prototype_trace") is not None,
            )
            if message is None:
                raise
            raise AttributeError(message) from error

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has a parameter, and so a key, of its own."""
        super().__setstate__(state)
        if self._parameters.get("loc") is None or "." in self._pyro_name:
            return  # not called yet, or a member of a list, which gives it its name
        take_new_key(self)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Every latent site at the MAP, as ``pyro.sample`` statements.

        Args:
            args: Positional arguments of the model.
            kwargs: Its keyword arguments.

        Returns:
            ``{site: value}``.
        """
        self._draws.see()
        values: dict[str, Tensor] = super().forward(*args, **kwargs)
        # `Predictive` wants no densities.
        if not self.factors.are_own and poutine.get_mask() is not False:
            charge(self.user_model, self.factors, values, args, kwargs)
        return values

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.Delta:
        """The point estimate, as a distribution over the packed vector.

        Args:
            args: Any; not read.
            kwargs: Any; not read.

        Returns:
            A Delta at ``loc``, event shape (D,).
        """
        return dist.Delta(self.loc, event_dim=1)

    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.loc, torch.zeros_like(self.loc)

    def quantiles(
        self, quantiles: Iterable[float], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Quantiles of every latent site: of a point estimate, all are the MAP.

        Args:
            quantiles: Numbers in [0, 1].
            args: Any; not read.
            kwargs: Any; not read.

        Returns:
            ``{site: shape (number of quantiles, *site shape)}``.
        """
        given = list(quantiles) if isinstance(quantiles, Iterable) else quantiles
        check_shares(given, "quantiles")
        return {
            site: value.expand(len(given), *value.shape).clone()
            for site, value in self.median().items()
        }

    def laplace_approximation(
        self, *args: Any, **kwargs: Any
    ) -> AutoSubnetMultivariateNormal:
        r"""Fits the subnet's Gaussian with one call of the model on all data.

        .. math:: P = \sum_n w_n J_n^\top \Lambda_n J_n + P_0,\qquad
            q(\theta_S) = N(\hat\theta_S, P^{-1})

        with :math:`J_n` the Jacobian of observation n's distribution parameters,
        :math:`\Lambda_n` their Fisher information, :math:`w_n` the site's scale times
        mask, and :math:`P_0` the negative Hessian of the log prior. Other choices of
        ``curvature`` replace the sum. The guide itself stays as it was.

        Args:
            args: Positional arguments of the model, with the training data. NumPy
                arrays and pandas objects are taken as tensors; of a ``DataLoader``,
                the batches, as by :meth:`laplace_approximation_from`.
            kwargs: Its keyword arguments.

        Returns:
            The posterior guide.

        Raises:
            SubnetError: One of its kinds: see :mod:`pyro_subnet.exceptions`.

        Source: Daxberger et al. (2021), eqs. 4 and 6, arXiv 2010.14689.
        """
        if not kwargs and len(args) == 1 and isinstance(args[0], DataLoader):
            return self.laplace_approximation_from(args[0])
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        return self._approximate(Data.single(args, kwargs))

    def laplace_approximation_from(
        self,
        batches: Iterable[Any],
        *,
        num_data: int | None = None,
        progress: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 100,
        process_group: Any = None,
    ) -> AutoSubnetMultivariateNormal:
        """Fits the subnet's Gaussian from minibatches that show each observation once.

        Equal to :meth:`laplace_approximation` on all data, whatever the batches' sizes
        and order; the N/B of a subsampling plate is left out of the sum.

        With ``checkpoint=`` a fit that ended early, whatever ended it, goes on where
        its file was written last when the same call is made again, and gives the same
        posterior to the bit. The batches summed by then are loaded, and skipped: they
        must come again in the same order, so ``shuffle=True`` cannot be resumed. What
        is found to differ (the batches, the MAP, the model's sites, shapes or
        likelihood, the subnet, an option) is an error, never a mixture. The prior may
        differ, unless the subnet was chosen under it: the present one is taken.

        Args:
            batches: A ``DataLoader``, list or other iterable. An item is
                ``(args, kwargs)``, a tuple of positional arguments, a mapping of
                keyword arguments, or one tensor. Selectors that look at the data pass
                over it once more, so it must then be re-iterable.
            num_data: If the batches hold only a random part of the data, how many
                there are in all: the sum is scaled up to them.
            progress: Whether to show a progress bar.
            checkpoint: File that holds the subnet and the sums (S x S numbers, or the
                rows) while the fit runs; deleted when it ends well. The selection is
                not repeated either. With ``"ggn-mc"`` the global random state is set
                to what it was at the same batch, so that the labels are the same.
            checkpoint_every: After how many batches it is written.
            process_group: True, or a group of ``torch.distributed``, where each rank
                makes the call with batches of its own: the sums are added up over
                ranks, and all get the same posterior. Every observation must be in one
                rank's batches. With ``checkpoint``, each has its own file.

        Returns:
            The posterior guide.

        Raises:
            OptionError: If ``num_data`` or ``checkpoint_every`` is not a positive
                count, or there is no process group.
            RankError: If another rank fails, or ends.
            CheckpointError: If the file is damaged, or of another fit.
            SubnetError: One of its kinds: see :mod:`pyro_subnet.exceptions`.
        """
        check_num_data(num_data)
        ranks = Ranks.of(process_group)
        data = Data(
            batches, whole=False, num_data=num_data, progress=progress, ranks=ranks
        )
        if getattr(self._selector, "passes_over_data", False):
            data.require_repeatable(type(self._selector).__name__)
        self._set_up_by(data)
        file = None
        if checkpoint is not None:
            fit = (data, self._selector)
            every = checkpoint_every
            with data.together():
                file = FitCheckpoint.open(checkpoint, every, self, self.options, fit)
        return self._approximate(data, file)

    def train_by_evidence(
        self,
        batches: Iterable[Any],
        *,
        num_epochs: int,
        lr: float = 0.01,
        burn_in: int | None = None,
        every: int | None = None,
        per_site: bool = False,
        covariance: Structure = "auto",
        val: Any = None,
        progress: bool = False,
    ) -> AutoSubnetLaplace:
        r"""Trains the MAP, and by the evidence the prior's precision and the noise.

        Adam descends on the log joint, under s times the precision of the model's own
        normal priors and r times its normal noise. In the burn-in the noise follows the
        residuals, so that the network fits the data before anything holds it back. Then
        looks at Laplace's evidence of *all* weights move both to where it is highest,

        .. math:: \log p(D \mid s, r) \approx \log p(D, \hat\theta \mid s, r)
            + \tfrac D2 \log 2\pi - \tfrac12 \log\det P(s, r)

        by at most a factor e at a time. With ``val``, held-out residuals set the noise
        at every look, and at the end the posterior's predictions of them do: a network
        absorbs the noise of its training data, and learns one too small.

        What was learned stands in ``factors`` and ``evidence_history``. The guide is
        under them from then on: its loss in SVI, and all that its posteriors are. It
        ends where the evidence was highest in the second half of the epochs; when it is
        interrupted, where it was highest so far. Of the model's ``pyro.param``\ s none
        is trained.

        Args:
            batches: As for :meth:`laplace_approximation_from`; passed over in every
                epoch.
            num_epochs: Passes over them. The learning rate falls to a hundredth.
            lr: Of Adam, at the start.
            burn_in: Epochs before the first look; by default a sixth.
            every: Epochs between looks; by default what makes 25 of them, but with
                several batches at least 6. A look costs a pass over the data, and
                :math:`R^2 D` operations of R = N C rows.
            per_site: Whether each site's prior has a factor of its own.
            covariance: Of the Laplace approximation that the evidence is of.
                ``"full"`` takes an R x R kernel where R is below D; ``"kron"``,
                ``"diag"``; ``"auto"`` is full where R or D is at most 2,000, and
                Kronecker-factored above.
            val: Held-out data, one set of arguments or a loader, for normal noise. It
                ends where they are predicted best, not below the residuals on the
                training data.
            progress: Whether to show a progress bar.

        Returns:
            The guide itself.

        Raises:
            ModelError: If there is no normal prior of fixed scale, and no normal noise.
            OptionError: If an option is none of those allowed.
            NonFiniteError: If the log joint is not finite.

        Source: MacKay (1992), doi 10.1162/neco.1992.4.3.448; Immer et al. (2021),
        arXiv 2104.04975.
        """
        schedule = Schedule(num_epochs, lr, burn_in, every)
        trainer = self._trainer(
            batches, structure=covariance, per_site=per_site, val=val
        )
        trainer.train(schedule, progress=progress)
        if val is not None:
            found = self.laplace_approximation_from(batches)
            least = trainer.residual_noise()
            noise = held_out_noise(found.at_map, found.state, val, least)
            self.factors = replace(self.factors, noise=noise)
        return self

    def evidence_step(
        self,
        batches: Iterable[Any],
        *,
        per_site: bool = False,
        covariance: Structure = "auto",
        val: Any = None,
    ) -> EvidenceStep:
        """Moves prior and noise once to where the evidence is highest, at this ``loc``.

        For a loop of the user's own, between steps of SVI, whose loss is under the new
        factors from then on: the guide adds what they change, by a run of the model.
        :meth:`train_by_evidence` says what is learned.

        Args:
            batches: All training data, as for :meth:`laplace_approximation_from`.
            per_site: Whether each site's prior has a factor of its own.
            covariance: Of the Laplace approximation that the evidence is of.
            val: Held-out data, which set the noise.

        Returns:
            The log evidence and the factors, also added to ``evidence_history``.

        Raises:
            ModelError: If there is nothing to learn.
            OptionError: If an option is none of those allowed.
        """
        options = {"structure": covariance, "per_site": per_site, "val": val}
        return self._trainer(batches, **options).look()

    def _trainer(self, batches: Iterable[Any], **options: Any) -> Trainer:
        data = Data(batches, whole=False)
        data.require_repeatable("training")
        self._set_up_by(data)
        evidence = Evidence.of(self.at_map, data, **options)
        return Trainer(self, data, evidence, self.evidence_history)

    def _set_up_by(self, data: Data) -> None:
        with data.together():
            if self.prototype_trace is not None:
                return
            data.require_repeatable("setting up the guide")
            call = next(data.calls("Set-up"), None)
            if call is None:
                raise DataError(
                    "A rank without data needs a guide that is set up; got one that "
                    "was never called. Call `guide(x, y)` on every rank."
                )
            self._setup_prototype(*call[0], **call[1])

    @torch.inference_mode(False)
    @full_precision()
    def _approximate(
        self, data: Data, file: FitCheckpoint | None = None
    ) -> AutoSubnetMultivariateNormal:
        # The guide may be trained on: the posterior keeps a copy of its MAP.
        latents = Latents.from_guide(self, self.loc.detach().clone())
        at_map = ModelAtMAP(self.user_model, latents, self.factors)
        check_same_fit(data, latents.loc, self.options)
        kept = agreed(data, file and file.chosen, latents)
        subnet = kept or self._choose(latents, data)
        resumed = None if file is None else partial(file.batches_left, subnet, data)
        state = fitted_state(
            at_map,
            subnet,
            data,
            self.options,
            chosen_by=short_name(self._selector),
            resumed=resumed,
            holds_sums=file is not None and file.done > 0,
        )
        if file is not None:
            file.remove()
        self._draws.matter = True
        state = state.of_own_model(self.factors)
        return AutoSubnetMultivariateNormal(self.user_model, self, state)

    def _choose(self, latents: Latents, data: Data) -> Subnet:
        if self._selector is None:
            return latents.everything
        if self._is_one:
            self._is_one = False
            warn_of_one_weight(latents.layout.num_params)
        subnet = checked_subnet(self._selector(self, data))
        # A random one is another on every rank.
        return agreed(data, subnet, latents) or subnet


def _selector(subnet: Any) -> Callable[..., Subnet] | None:
    """The selector that a ``subnet=`` argument stands for; None for every weight."""
    if subnet is None:
        return None
    if isinstance(subnet, Real) and not isinstance(subnet, bool):
        return PredictiveVariance(subnet)  # type: ignore[arg-type] # NumPy's, too
    return Mask(subnet) if isinstance(subnet, Mapping) else checked_selector(subnet)
