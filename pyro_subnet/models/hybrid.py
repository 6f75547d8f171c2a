"""The hybrid model: the subnet one latent site, every other weight a parameter.

With a posterior at hand, MCMC or importance sampling runs over the subnet alone::

    hybrid = posterior.hybrid_model()
    mcmc = MCMC(hybrid.nuts(), 500, initial_params=hybrid.initial_params())
    mcmc.run(x, y)
    Predictive(hybrid, mcmc.get_samples())(x_test)
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, final
from weakref import WeakValueDictionary, finalize

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import NUTS
from torch import Tensor

from pyro_subnet.exceptions import OptionError
from pyro_subnet.gaussians.base import Gaussian
from pyro_subnet.models.held_density import HeldDensity, hold
from pyro_subnet.models.laplace_nuts import LaplaceNUTS
from pyro_subnet.models.linearized import LinearizedModel
from pyro_subnet.models.subnet_normal import SubnetNormal
from pyro_subnet.models.subnet_prior import (
    SITE,
    GivenSites,
    SubnetPrior,
    SubnetSites,
)
from pyro_subnet.subnet import Subnet
from pyro_subnet.tracing.arguments import as_tensors
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.plates import PlatesAround, WidePlates
from pyro_subnet.tracing.trace import Model, ModelAtMAP, apart

# Live models by the prefix of their entries in the param store.
_OWNERS: WeakValueDictionary[str, HybridModel] = WeakValueDictionary()


@final
class HybridModel:
    r"""The user's model as a function of its subnet.

    It has one latent site, ``"subnet"``, of shape (S,): the chosen elements,
    unconstrained, in packing order. Every site with other elements has its MAP in a
    ``pyro.param``, constrained. Handlers do not see the user's latent sites. Observed
    and deterministic sites, factors, plates and the return value are the user's.

    Its log density is that of the user's model in unconstrained space,

    .. math:: \log p(y, \theta_S \mid \theta_{\setminus S}) =
        \log p(y, \theta) + \log |d\theta / du|,

    where the latent sites' part is the log density of ``"subnet"``.

    Made by :meth:`AutoSubnetMultivariateNormal.hybrid_model
    <pyro_subnet.AutoSubnetMultivariateNormal.hybrid_model>`. Two live hybrid models
    never share an entry of the param store, and one that is gone leaves none there.

    Args:
        at_map: The user's model and its latent sites.
        subnet: The chosen elements.
        gaussian: The posterior over them.
        linearized: Whether outputs are first-order expansions about the MAP.

    Attributes:
        subnet: The chosen elements, with their names.
        linearized: Whether outputs are linear in the subnet.
        guide: Draws ``"subnet"`` from the Laplace posterior.
        at_map: The user's model and its latent sites.

    Source: Daxberger et al. (2021), eq. 6, arXiv 2010.14689.
    """

    def __init__(
        self,
        at_map: ModelAtMAP,
        subnet: Subnet,
        gaussian: Gaussian,
        *,
        linearized: bool = False,
    ):
        self.subnet = subnet
        self.linearized = linearized
        self.guide = HybridGuide(gaussian)
        self.at_map = at_map
        self._program: Model = LinearizedModel(at_map) if linearized else at_map.program
        self._prefix = _take_prefix(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model, with the arguments and the return value of the user's."""
        args, kwargs, sites = self._read(args, kwargs)
        prior = SubnetPrior(self.at_map.program, sites, args, kwargs)
        with PlatesAround() as around:
            theta = pyro.sample(SITE, prior)
        # A linearized model widens its plates itself.
        wide = nullcontext() if self.linearized else WidePlates()
        with wide, GivenSites(sites, theta, around) as given:
            returned = self._program(*args, **kwargs)
        # One subnet's density follows from the sites that this run has met.
        if theta.ndim == 1:
            prior.remember(theta, given.log_prior)
        return returned

    def _read(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], SubnetSites]:
        """A call's arguments as tensors, and the latent sites at the parameters."""
        latents, estimates = self.at_map.latents, self._point_estimates()
        (args, kwargs), _ = as_tensors((args, kwargs), self.at_map.model, latents.loc)
        return args, kwargs, SubnetSites(latents, self.subnet, estimates)

    def initial_params(self, num_chains: int = 1) -> dict[str, Tensor]:
        """Where MCMC may start, for ``MCMC(initial_params=...)``: one chain at the MAP.

        Args:
            num_chains: How many chains; several start at draws of the posterior.

        Returns:
            ``{"subnet": shape (S,)}``, or (num_chains, S) for several chains.

        Raises:
            OptionError: If the number is not positive.
        """
        if num_chains < 1:
            raise OptionError(
                f"`num_chains` must be positive; got {num_chains}. Pass that of MCMC."
            )
        posterior = self.guide.get_posterior()
        if num_chains == 1:
            return {SITE: posterior.loc.clone()}
        return {SITE: posterior.sample(torch.Size([num_chains]))}

    def nuts(self, **options: Any) -> NUTS:
        """A NUTS kernel whose mass matrix is the precision of the Laplace posterior.

        As far as that posterior is right, all directions are then alike: a draw takes
        few steps, and warming up need not adapt the matrix. Of a linearized model J is
        formed once for each run, and a gradient is two products with it. A plain
        ``NUTS(hybrid_model)`` works too; it runs the network for each gradient.

        Args:
            options: Passed on to ``pyro.infer.NUTS``.

        Returns:
            The kernel, for ``MCMC``.
        """
        covariance = self.guide.get_posterior().covariance_matrix
        return LaplaceNUTS(self, self._hold, covariance, options)

    def at_parameters(self) -> ModelAtMAP:
        """The user's model with its latent sites at the present parameters.

        Returns:
            The model; a site whose parameter has only moved by round-off keeps its MAP.
        """
        with apart():
            estimates = self._point_estimates()
        latents = self.at_map.latents
        values = dict(latents.values)
        for name, estimate in estimates.items():
            u = latents.transforms[name].inv(estimate.detach())
            tolerance = torch.finfo(u.dtype).eps ** 0.5
            if not torch.allclose(u, values[name], tolerance, tolerance):
                values[name] = u
        loc = torch.cat([u.flatten() for u in values.values()])
        return replace(self.at_map, latents=replace(latents, loc=loc))

    def _hold(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> HeldDensity | None:
        """The density of a call whose data will not change; None if it is not held."""
        if not self.linearized:
            return None

        def own(theta: Tensor) -> Tensor:
            given = pyro.condition(self, {SITE: theta})
            return poutine.trace(given).get_trace(*args, **kwargs).log_prob_sum()

        read, by_name, sites = self._read(args, kwargs)
        call = ModelCall.read(self.at_map, read, by_name)
        return hold(call, sites, self.guide.gaussian, own)

    def _point_estimates(self) -> dict[str, Tensor]:
        """Constrained values of the sites that are not chosen whole."""
        counts, latents, found = self.subnet.counts, self.at_map.latents, {}
        for name, u in latents.values.items():
            if counts.get(name) == u.numel() > 0:
                continue
            transform = latents.transforms[name]
            found[name] = pyro.param(
                f"{self._prefix}.{name}",
                lambda transform=transform, u=u: transform(u).detach().clone(),
                constraint=transform.codomain,
                event_dim=len(transform.forward_shape(u.shape)),
            )
        return found

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has parameters of its own."""
        self.__dict__.update(state)
        self._prefix = _take_prefix(self)


@final
class HybridGuide:
    """Draws the one latent site of a hybrid model from the Laplace posterior.

    Args:
        gaussian: The posterior over the subnet.
    """

    def __init__(self, gaussian: Gaussian):
        self.gaussian = gaussian

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Samples ``"subnet"``; arguments are not read."""
        return {SITE: pyro.sample(SITE, self.get_posterior())}

    def get_posterior(self, *args: Any, **kwargs: Any) -> SubnetNormal:
        """The posterior over the subnet, unconstrained; arguments are not read.

        Returns:
            A normal distribution over (S,).
        """
        return SubnetNormal(self.gaussian)

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The MAP of the subnet, unconstrained; arguments are not read.

        Returns:
            ``{"subnet": shape (S,)}``.
        """
        return {SITE: self.gaussian.loc.clone()}

    def quantiles(
        self, quantiles: Iterable[float], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Marginal quantiles of the subnet, unconstrained.

        Args:
            quantiles: Numbers in (0, 1).
            args: Not read.
            kwargs: Not read.

        Returns:
            ``{"subnet": shape (number of quantiles, S)}``.
        """
        loc, scale = self.gaussian.loc, self.gaussian.variance().sqrt()
        levels = torch.tensor(list(quantiles), dtype=loc.dtype, device=loc.device)
        levels = levels.unsqueeze(-1)
        return {SITE: dist.Normal(loc, scale).icdf(levels)}


def _take_prefix(owner: HybridModel) -> str:
    """A prefix of param-store keys that no other live model and no entry has."""
    keys, count = list(pyro.get_param_store().keys()), 0
    while True:
        prefix = f"hybrid_{count}" if count else "hybrid"
        other = _OWNERS.get(prefix)
        is_free = other is None or other is owner
        if is_free and not any(key.startswith(f"{prefix}.") for key in keys):
            _OWNERS[prefix] = owner
            finalize(owner, _give_back, prefix).atexit = False
            return prefix
        count += 1


def _give_back(prefix: str) -> None:
    """Takes the parameters of a model that is gone out of the param store."""
    store = pyro.get_param_store()
    for key in [key for key in store.keys() if key.startswith(f"{prefix}.")]:
        del store[key]
