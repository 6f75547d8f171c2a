"""The MAP guide that a user trains, and the posterior that it becomes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, final
from weakref import WeakValueDictionary

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pyro_subnet.exceptions import (
    ModelError,
    NoObservedSiteWarning,
    NoOutputVarianceWarning,
    OptionError,
    SelectionError,
    warn,
)
from pyro_subnet.files.resume import FitCheckpoint
from pyro_subnet.fit.sums import FitSums, SubnetCurvature
from pyro_subnet.gaussians.registry import form_of
from pyro_subnet.guides.base import AutoAtMAP
from pyro_subnet.guides.posterior import AutoSubnetMultivariateNormal
from pyro_subnet.laplace.state import PosteriorState
from pyro_subnet.options import (
    Covariance,
    Curvature,
    FitOptions,
    FullForm,
    check_num_data,
)
from pyro_subnet.selection.largest_variance import LargestVariance
from pyro_subnet.selection.mask import Mask
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.memory import check_factor_fits
from pyro_subnet.tensors.modes import at_least_float32, full_precision
from pyro_subnet.tracing.arguments import run_on
from pyro_subnet.tracing.data import Data
from pyro_subnet.tracing.trace import Latents, Model, ModelAtMAP

SubnetChoice = None | int | float | Mapping[str, Tensor] | Callable[..., Subnet]

# Live guides by the param-store key of their `loc`.
_OWNERS: WeakValueDictionary[str, AutoSubnetLaplace] = WeakValueDictionary()


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
    so its key, gets a number.

    Args:
        model: A Pyro model whose latent sites are continuous.
        subnet: Which elements are random. None: all; an int or a float in (0, 1]: that
            many, or that share, by
            :class:`~pyro_subnet.selection.LargestVariance`; a selector; or a mapping
            from sites to bool masks or flat positions.
        init_loc_fn: Where the MAP search starts, as everywhere in Pyro; with the
            values of a MAP found elsewhere no training is needed.
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
        OptionError: If an option is nothing known.

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
        init_loc_fn: Callable[..., Any] = init_to_median,
        curvature: Curvature = "ggn",
        covariance: Covariance = "full",
        form: FullForm = "auto",
    ):
        self.options = FitOptions(curvature, covariance, form)
        self._selector = _selector(subnet)
        if covariance == "kron" and self._selector is not None:
            raise OptionError(
                "`covariance='kron'` must cover every weight; got a `subnet` as well. "
                "Leave `subnet` out, or pass covariance='diag' or 'full'."
            )
        self._user_model = (model,)
        super().__init__(model, init_loc_fn)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        try:
            run_on(super()._setup_prototype, self.user_model, args, kwargs)
        except (ValueError, RuntimeError) as error:
            site = _discrete_site(self.prototype_trace)
            empty = "found no latent variables" in str(error)
            self.prototype_trace: Any = None
            if empty:
                raise ModelError(
                    "The model must have a latent site, drawn by `pyro.sample` without "
                    "data; got none. Make a torch network Bayesian with "
                    "`pyro_subnet.nn.bayesianize(net)`."
                ) from error
            if site is None:
                raise
            raise ModelError(
                f"Every latent site must be continuous; got discrete site {site!r}. "
                "Sum it out, as `dist.MixtureSameFamily` does, and pass "
                "`curvature='hessian'`; or give it data. Enumeration, "
                "https://pyro.ai/examples/enumeration.html, serves the ELBO alone."
            ) from error
        if self.master is None:
            self._take_key()
        self.loc = nn.Parameter(self._init_loc())

    def _take_key(self) -> None:
        """Takes a param-store key that holds no other guide's parameter."""
        store, count = pyro.get_param_store(), 0
        dtype = self._init_loc().dtype
        name: str = self._pyro_name
        while True:
            key = f"{self._pyro_name}.loc"
            owner = _OWNERS.get(key)
            live = owner is not None and owner is not self
            # What a dead guide or a loaded store left there is taken over, if it fits.
            if key not in store or (
                not live
                and store[key].shape == (self.latent_dim,)
                and store[key].dtype == dtype
            ):
                break
            count += 1
            self._pyro_name: str = f"{name}_{count}"
        _OWNERS[key] = self

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
        count = len(list(quantiles))
        return {
            site: value.expand(count, *value.shape).clone()
            for site, value in self.median().items()
        }

    def laplace_approximation(
        self, *args: Any, **kwargs: Any
    ) -> AutoSubnetMultivariateNormal:
        r"""Fits the subnet's Gaussian with one call of the model on all data.

        .. math:: P = \sum_n w_n J_n^\top \Lambda_n J_n + P_0,\qquad
            q(\theta_S) = N(\hat\theta_S, P^{-1})

        with :math:`J_n` the Jacobian of datum n's distribution parameters,
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
    ) -> AutoSubnetMultivariateNormal:
        """Fits the subnet's Gaussian from minibatches that show each datum once.

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

        Returns:
            The posterior guide.

        Raises:
            OptionError: If ``num_data`` or ``checkpoint_every`` is not a positive
                count.
            CheckpointError: If the file is damaged, or of another fit.
            SubnetError: One of its kinds: see :mod:`pyro_subnet.exceptions`.
        """
        check_num_data(num_data)
        data = Data(batches, whole=False, num_data=num_data, progress=progress)
        if getattr(self._selector, "passes_over_data", False):
            data.require_repeatable(type(self._selector).__name__)
        if self.prototype_trace is None:
            data.require_repeatable("setting up the guide")
            args, kwargs = next(data.calls("Set-up"))
            self._setup_prototype(*args, **kwargs)
        file = None
        if checkpoint is not None:
            fit = (data, self._selector)
            every = checkpoint_every
            file = FitCheckpoint.open(checkpoint, every, self, self.options, fit)
        return self._approximate(data, file)

    @torch.inference_mode(False)
    @full_precision()
    def _approximate(
        self, data: Data, file: FitCheckpoint | None = None
    ) -> AutoSubnetMultivariateNormal:
        # The guide may be trained on: the posterior keeps a copy of its MAP.
        latents = Latents.from_guide(self, self.loc.detach().clone())
        at_map = ModelAtMAP(self.user_model, latents)
        subnet = (file and file.chosen) or self._choose(latents, data)
        resumed = file is not None and file.done > 0  # the matrix is there already
        if _needs_matrix(self.options, data) and not resumed:
            dtype = at_least_float32(latents.loc.dtype)
            check_factor_fits(subnet.size, dtype, latents.loc.device)
        if file is not None:
            file.keep_subnet(subnet)
        sums = FitSums(at_map, subnet, data, self.options)
        label = "Curvature"
        batches = data.calls(label) if file is None else file.calls(data, label, sums)
        curvature = sums.over(batches)
        _warn_about(curvature)
        form = form_of(curvature.likelihood, curvature.prior, latents.layout)
        posterior = AutoSubnetMultivariateNormal(
            at_map.model,
            self,
            PosteriorState(latents.loc, subnet, form, curvature.summary, self.options),
        )
        if file is not None:
            file.remove()
        return posterior

    def _choose(self, latents: Latents, data: Data) -> Subnet:
        if self._selector is None:
            return latents.everything
        subnet = self._selector(self, data)
        if not isinstance(subnet, Subnet):
            raise SelectionError(
                "A selector must return a Subnet; got "
                f"{type(subnet).__name__}. Build one with "
                "`Subnet.from_positions(guide.latents.layout, positions)`."
            )
        return subnet


def _needs_matrix(options: FitOptions, data: Data) -> bool:
    """Whether an S x S matrix is sure to be needed, or may be."""
    # Of a single call it is soon known how many rows there are: what "auto" then
    # chooses checks the memory itself.
    return options.held_as == "primal" or (options.held_as == "auto" and not data.whole)


def _warn_about(curvature: SubnetCurvature) -> None:
    if not curvature.has_outputs:
        warn(
            "The model has no observed site, so the posterior is the prior's curvature "
            "alone. If a likelihood is hidden by `poutine.block`, pass the full model.",
            NoObservedSiteWarning,
        )
    elif curvature.likelihood.is_zero:
        warn(
            "The subnet moves no output at any training input: there the predictive "
            "is the MAP's. Its weights may still matter on other inputs; choose more "
            "weights, or another selector such as `LargestGradient`, to have variance "
            "on these.",
            NoOutputVarianceWarning,
        )


def _selector(subnet: SubnetChoice) -> Callable[..., Subnet] | None:
    """The selector that a ``subnet=`` argument stands for; None for every weight."""
    if subnet is None:
        return None
    if isinstance(subnet, int | float) and not isinstance(subnet, bool):
        return LargestVariance(subnet)
    if isinstance(subnet, Mapping):
        return Mask(subnet)
    if callable(subnet):
        return subnet
    raise OptionError(
        "`subnet` must be None, an int, a float in (0, 1], a selector, or a mapping "
        f"from sites to masks or positions; got {subnet!r}. Pass 0.05 for 5% of the "
        "weights."
    )


def _discrete_site(trace: Any) -> str | None:
    """The first latent site of a prototype trace with discrete support."""
    if trace is None:
        return None
    for name, node in trace.iter_stochastic_nodes():
        if node["fn"].support.is_discrete:
            return name
    return None
