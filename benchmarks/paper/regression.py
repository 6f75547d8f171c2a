"""Every method on one regression network and split, each with its one number tuned."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.reporting import FLAT
from benchmarks.paper.members import Members, Schedule, Shape, train
from benchmarks.paper.swag import Swag, swag
from benchmarks.selectors.data import Split
from benchmarks.selectors.network import pyro_model
from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.exceptions import PrecisionError
from pyro_subnet.nn import init_to_module
from pyro_subnet.selection import (
    LargestMagnitude,
    LargestVariance,
    LastLayer,
    PredictiveVariance,
    RandomSubnet,
)

Selector = Callable[[int], Any]  # of a size
# What prior precisions are multiplied by: as many as SWAG has scales of its covariance.
SCALES = tuple(10.0**power for power in range(-6, 7))
_CHUNK = 4096  # inputs that draws of a network see at once
RIVALS = ("ELLA", "VaLLA")
# Of training by the evidence: data of a step, and looks at the evidence.
_BATCH, _LOOKS = 1000, 25


class Mixture(NamedTuple):
    """Predictions: K normal distributions of equal weight at each input.

    Attributes:
        loc: Means, shape (K, N).
        scale: Standard deviations, noise included, shape (K, N) or (K, 1).
    """

    loc: Tensor
    scale: Tensor

    def log_prob(self, y: Tensor) -> Tensor:
        """Log density of each observation, shape (N,)."""
        parts = torch.distributions.Normal(self.loc, self.scale).log_prob(y)
        return parts.logsumexp(0) - math.log(len(self.loc))

    def nll(self, y: Tensor) -> float:
        """Mean negative log density, nats."""
        return -float(self.log_prob(y).mean())

    def rmse(self, y: Tensor) -> float:
        """Of the mixture's mean."""
        return float((self.loc.mean(0) - y).square().mean().sqrt())


@dataclass(frozen=True, eq=False)
class Fitted:
    """A method after its fit.

    Attributes:
        predict: Distributions of y.
        spread: Standard deviation of the function, without noise, shape (N,).
        notes: What was chosen, and how large it is.
    """

    predict: Callable[[Tensor], Mixture]
    spread: Callable[[Tensor], Tensor]
    notes: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """How much is done for one network.

    Attributes:
        schedule: Of training.
        num_members: Of ensembles.
        rates: Of dropout, from which held-out data choose.
        swag_steps: Of SGD after the MAP.
        num_draws: Of networks, by MC dropout and SWAG.
        share: Of the weights, in subnets.
        tuned: Whether prior precisions are, unless a method says; else the model's own
            N(0, 1) stays.
    """

    schedule: Schedule
    num_members: int = 5
    rates: tuple[float, ...] = (0.01, 0.05, 0.2)
    swag_steps: int = 300
    num_draws: int = 30
    share: float = 0.05
    tuned: bool = True


@dataclass(frozen=True, eq=False)
class Network:
    """One network on one split: what its methods share, made when first asked for.

    Attributes:
        split: The data, float64.
        shape: Of the network.
        plan: How much is done.
    """

    split: Split
    shape: Shape
    plan: Plan

    @property
    def num_params(self) -> int:
        """D."""
        return self.shape.num_params(self.split.train[0].shape[1])

    def _generator(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * self.split.index + stream)

    def _train(self, count: int, rates: Tensor | None, stream: int) -> Members:
        generator = self._generator(stream)
        num_inputs = self.split.train[0].shape[1]
        start = Members.random(self.shape, num_inputs, count, generator)
        return train(
            start,
            self.split.train,
            self.split.held_out,
            self.plan.schedule,
            rates=rates,
            generator=generator,
        )

    @cached_property
    def members(self) -> Members:
        """The ensemble; its first is the MAP that all other methods share."""
        return self._train(self.plan.num_members, None, 0)

    @cached_property
    def swag(self) -> Swag:
        """SGD from the MAP on, at the step size that held-out data choose."""
        return swag(
            self.members[:1],
            self.split.train,
            self.split.held_out,
            self.plan.swag_steps,
            num_draws=self.plan.num_draws,
            generator=self._generator(2),
        )

    def at_map(self) -> Fitted:
        return _drawn(lambda x: (_outputs(self.members[:1], x), self.members[:1]))

    def at_map_with_held_out_noise(self) -> Fitted:
        """The MAP with the noise of highest held-out density: the root mean square."""
        member = self.members[:1]
        x, y = self.split.held_out
        errors = _outputs(member, x) - y
        log_scale = errors.square().mean(1).sqrt().log().to(member.log_scale)
        noisy = replace(member, log_scale=log_scale)
        return _drawn(
            lambda at: (_outputs(noisy, at), noisy), {"noise": float(log_scale.exp())}
        )

    def by_evidence(self, share: float) -> Fitted:
        """A subnet of a network trained by the evidence, its noise on held-out data."""
        start = Members.random(
            self.shape, self.split.train[0].shape[1], 1, self._generator(4)
        )
        net = start.module(0)
        guide = AutoSubnetLaplace(
            pyro_model(net, 1.0), share, init_loc_fn=init_to_module(net)
        )
        x, y = self.split.train
        batches = [*zip(x.split(_BATCH), y.split(_BATCH), strict=True)]
        epochs = -(-self.plan.schedule.num_steps // len(batches))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            guide.train_by_evidence(
                batches,
                num_epochs=epochs,
                burn_in=epochs // 6,
                every=max(1, epochs // _LOOKS),
                val=self.split.held_out,
            )
            posterior = guide.laplace_approximation(x, y)
        (factor,) = set(guide.factors.prior.values())
        size = float(posterior.subnet.size)
        notes = {"S": size, "scale": factor, "noise": guide.noise_factor}
        return of_posterior(posterior, notes)

    def ensemble(self) -> Fitted:
        return _drawn(lambda x: (_outputs(self.members, x), self.members))

    def mc_dropout(self) -> Fitted:
        """The rate of highest held-out density, each trained with it."""
        rates = torch.tensor(self.plan.rates)
        trained = self._train(len(rates), rates, 1)

        def at(place: int) -> Fitted:
            draws = trained[torch.full((self.plan.num_draws,), place)]
            rate = rates[place].expand(self.plan.num_draws)

            def predict(x: Tensor) -> tuple[Tensor, Members]:
                # The same units at every call, so that a function is drawn.
                return _outputs(draws, x, rate, self._generator(3)), draws

            return _drawn(predict, {"rate": float(rates[place])})

        return self._best([at(place) for place in range(len(rates))])

    def swag_draws(self) -> Fitted:
        """The scale of the covariance that held-out data choose."""
        found = self.swag
        notes = {"scale": found.scale, "step": found.step}
        return _drawn(lambda x: (_outputs(found.draws, x), found.draws), notes)

    def _best(self, candidates: Sequence[Fitted]) -> Fitted:
        x, y = self.split.held_out
        return min(candidates, key=lambda fitted: fitted.predict(x).nll(y))

    def posterior(
        self, subnet: Any, member: int = 0, **options: Any
    ) -> AutoSubnetMultivariateNormal:
        """The library's, around one of the members."""
        net = self.members.module(member)
        noise = float(self.members.log_scale[member].exp())
        guide = AutoSubnetLaplace(
            pyro_model(net, noise),
            subnet,
            init_loc_fn=init_to_module(net),
            **options,
        )
        with warnings.catch_warnings():
            # Whether the subnet moves an output is in the results: it is no news here.
            warnings.simplefilter("ignore")
            return guide.laplace_approximation(*self.split.train)

    def subnet(
        self,
        subnet: Any,
        member: int = 0,
        *,
        tuned: bool | None = None,
        **options: Any,
    ) -> Fitted:
        """A Laplace posterior, its prior precision chosen on held-out data.

        Args:
            subnet: The guide's option, as those that follow.
            member: Whose weights are its mean.
            tuned: Whether the precision is chosen; None: as the plan says.
            options: Of the guide.
        """
        posterior = self.posterior(subnet, member, **options)
        size = {"S": float(posterior.subnet.size)}
        own = of_posterior(posterior, size)
        if not (self.plan.tuned if tuned is None else tuned):
            return own
        scaled = []
        for scale in SCALES:
            # As the library's own tuning does, where so wide a prior has no posterior.
            with suppress(PrecisionError):
                at = posterior.with_prior_precision(scale)
                scaled.append(of_posterior(at, size | {"scale": scale}))
        x, y = self.split.held_out
        losses = [fitted.predict(x).nll(y) for fitted in scaled]
        # Where held-out data do not choose, nor does the noise in them.
        flat = max(losses) - min(losses) < FLAT
        best = scaled[losses.index(min(losses))]
        if flat:
            best = replace(own, notes=size | {"scale": 1.0})
        return replace(best, notes=best.notes | {"flat": float(flat)})

    def selector(self, name: str, size: int) -> Any:
        """A selector by its name in the tables."""
        table: dict[str, Selector] = {
            "LargestVariance": LargestVariance,
            "LargestVariance (SWAG)": lambda count: LargestVariance(
                count, "swag", moments=self.swag.moments
            ),
            "RandomSubnet": lambda count: RandomSubnet(count, self.split.index),
            "LargestMagnitude": LargestMagnitude,
            "LastLayer": lambda count: LastLayer(),
            "PredictiveVariance": lambda count: PredictiveVariance(
                count, method="diagonal"
            ),
            "PredictiveVariance, greedy": lambda count: PredictiveVariance(
                count, method="greedy"
            ),
        }
        return table[name](size)

    def ensemble_of_subnets(self, name: str, size: int) -> Fitted:
        """The members' subnets, each tuned by itself, mixed."""
        each = [
            self.subnet(self.selector(name, size), member)
            for member in range(self.plan.num_members)
        ]

        def predict(x: Tensor) -> Mixture:
            parts = [fitted.predict(x) for fitted in each]
            return Mixture(*(torch.cat(part) for part in zip(*parts, strict=True)))

        def spread(x: Tensor) -> Tensor:
            within = torch.stack([fitted.spread(x).square() for fitted in each])
            means = predict(x).loc
            return (within.mean(0) + means.var(0, correction=0)).sqrt()

        return Fitted(predict, spread, {"S": float(size)})

    def size_of(self, share: float) -> int:
        """S of a share."""
        return max(1, round(share * self.num_params))


def fit_rival(name: str, network: Network) -> Fitted:
    """Of laplace-torch, imported when it is run: other methods do without."""
    rivals = import_module("benchmarks.paper.rivals")
    found: Fitted = getattr(rivals, name.lower())(network)
    return found


def of_posterior(
    posterior: AutoSubnetMultivariateNormal, notes: dict[str, float] | None = None
) -> Fitted:
    """Predictions in closed form."""

    @torch.no_grad()
    def predict(x: Tensor) -> Mixture:
        found = posterior.predictive_distribution(x)
        return Mixture(found.mean.unsqueeze(0), found.stddev.unsqueeze(0))

    @torch.no_grad()
    def spread(x: Tensor) -> Tensor:
        return posterior.output_distribution(x).variance.squeeze(-1).sqrt()

    return Fitted(predict, spread, notes or {})


def _drawn(
    outputs: Callable[[Tensor], tuple[Tensor, Members]],
    notes: dict[str, float] | None = None,
) -> Fitted:
    """Predictions of several networks, each with its own noise."""

    def predict(x: Tensor) -> Mixture:
        loc, members = outputs(x)
        return Mixture(loc, members.log_scale.double().exp().unsqueeze(-1))

    def spread(x: Tensor) -> Tensor:
        return outputs(x)[0].std(0, correction=0)

    return Fitted(predict, spread, notes or {})


@torch.no_grad()
def _outputs(
    members: Members,
    x: Tensor,
    rates: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Outputs (M, N) in float64."""
    parts = [members(part, rates, generator) for part in x.float().split(_CHUNK)]
    return torch.cat(parts, 1).double()
