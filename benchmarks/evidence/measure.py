"""Trains a network in every way on one split, and judges what each predicts."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from laplace import marglik_training
from laplace.curvature import CurvlinopsGGN
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.harness.task import Score, Settings, Task
from benchmarks.selectors.data import Split
from benchmarks.selectors.measure import at_temperature, best_temperature, judged
from benchmarks.selectors.measure import fit as fitted
from benchmarks.selectors.network import Trained, pyro_model, train
from benchmarks.selectors.problems import (
    Problem,
    image_problems,
    problems,
    uci_problems,
)
from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.nn import init_to_module

NAME = "evidence"
MAP, SUBNET, TUNED = "MAP", "subnet", "subnet, tuned"
TEMPERATURE = "MAP, one temperature"
BY_EVIDENCE, ALONE = "subnet, by evidence", "subnet, by evidence alone"
MAP_BY_EVIDENCE = "MAP, by evidence"
REFERENCES = {
    "all weights, by evidence": "full",
    "diagonal, by evidence": "diag",
    "Kronecker, by evidence": "kron",
}
PEER, ENSEMBLE = "marglik_training", "deep ensemble"
METHODS = (
    MAP,
    TEMPERATURE,
    SUBNET,
    TUNED,
    MAP_BY_EVIDENCE,
    BY_EVIDENCE,
    ALONE,
    *REFERENCES,
)
METHODS += (PEER, ENSEMBLE)

SHARE = 0.05
UCI_SETS = ("bostonHousing", "concrete", "energy", "wine-quality-red", "yacht")
_MEMBERS, _LOOKS, _MOST = 5, 25, 2000
_STEPS, _STEPS_OF_IMAGES = 3000, 1000
_TABLE, _PEERS_IMAGES = 2, 100  # axes of a table; images of a batch


@dataclass(frozen=True)
class Plan:
    """Steps of a training; the held-out recipe has a third of them, three times."""

    num_steps: int

    @property
    def burn_in(self) -> int:
        return self.num_steps // 6

    @property
    def every(self) -> int:
        return max(1, (self.num_steps - self.burn_in) // _LOOKS)


def tasks(settings: Settings) -> list[Task]:
    def run(problem: Problem, seed: int) -> Task:
        num_steps = _STEPS_OF_IMAGES if problem.name.startswith("CNN") else _STEPS
        plan = Plan(30 if settings.scale == "smoke" else num_steps)
        runs = partial(_run, problem, seed, plan)
        return Task(NAME, problem.name, seed, "", METHODS, runs)

    return [
        run(problem, seed)
        for problem in all_problems(settings.data_dir)
        for seed in settings.numbers
    ]


def all_problems(folder: Path | None) -> Iterator[Problem]:
    """Toys and classes as where selectors are measured; UCI sets whole."""
    if folder is not None:
        yield from uci_problems(folder, UCI_SETS, _MOST)
    yield from problems(None)
    if folder is not None:
        yield from image_problems(folder)


def _run(
    problem: Problem, seed: int, plan: Plan, methods: Sequence[str]
) -> Iterator[tuple[str, list[Score]]]:
    runs = Runs(problem, problem.split(seed), plan)
    for name in methods:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say is what is measured here
            yield name, runs.scores(name)


@dataclass(frozen=True, eq=False)
class Runs:
    """The trainings of one split, each made once."""

    problem: Problem
    split: Split
    plan: Plan

    def scores(self, name: str) -> list[Score]:
        """NLL, coverage or errors; seconds of training; factors, of the evidence."""
        if name in (PEER, ENSEMBLE):
            start = time.perf_counter()
            predict = self._peer() if name == PEER else self.ensemble()
            seconds = time.perf_counter() - start
            return [*judged(self.split, predict, "own"), Score("", "seconds", seconds)]
        if name in (MAP, TEMPERATURE, SUBNET, TUNED):
            trained, seconds = self._held_out
            if name in (MAP, TEMPERATURE):
                own = name == MAP
                value = 1.0 if own else best_temperature(trained, self.split)
                predict = at_temperature(trained, value)
            else:
                posterior = fitted(trained, self.split, SHARE)
                predict = self._tuned(posterior, name).predictive_distribution
            return [*judged(self.split, predict, "own"), Score("", "seconds", seconds)]
        guide, seconds, looking = self._alone if name == ALONE else self.scored_guide
        found = [Score("", "seconds", seconds), Score("", "looking", looking)]
        (factor,) = set(guide.factors.prior.values())
        found += [Score("", "prior factor", factor)]
        found += [Score("", "noise factor", guide.noise_factor)]
        if name == MAP_BY_EVIDENCE:
            posterior = guide.laplace_approximation(*self.split.train)
            exact = posterior.with_prior_precision(1e12).predictive_distribution
            return found + judged(self.split, exact, "own")
        covariance = REFERENCES.get(name)
        if covariance is None:
            posterior = guide.laplace_approximation(*self.split.train)
        else:
            posterior = self._of_all(guide, covariance)
        return found + judged(self.split, posterior.predictive_distribution, "own")

    def _tuned(
        self, posterior: AutoSubnetMultivariateNormal, name: str
    ) -> AutoSubnetMultivariateNormal:
        """What a trained network's owner does: noise, prior, noise again."""
        if name == SUBNET:
            return posterior
        if not self.problem.has_noise:
            return posterior.tune_prior_precision()
        val = self.split.held_out
        tuned = posterior.tune_noise_scale("nll", val=val).tune_prior_precision()
        return tuned.tune_noise_scale("nll", val=val)

    @cached_property
    def _held_out(self) -> tuple[Trained, float]:
        """The MAP under N(0, 1) priors and the noise that held-out data show."""
        start = time.perf_counter()
        num_steps = self.plan.num_steps
        if self.problem.has_noise:
            num_steps //= 3  # it trains three times
        trained = train(self.split, self.problem.network, num_steps)
        return trained, time.perf_counter() - start

    @cached_property
    def scored_guide(self) -> tuple[AutoSubnetLaplace, float, float]:
        return self._by_evidence(self.split.train, self.split.held_out)

    @cached_property
    def _alone(self) -> tuple[AutoSubnetLaplace, float, float]:
        """All of the data to train on, and noise by the evidence."""
        return self._by_evidence(self.all_data, None)

    @property
    def all_data(self) -> tuple[Tensor, Tensor]:
        (x, y), (x_val, y_val) = self.split.train, self.split.held_out
        return torch.cat([x, x_val]), torch.cat([y, y_val])

    def _network(self, member: int = 0) -> torch.nn.Sequential:
        with torch.random.fork_rng():
            torch.manual_seed(self.split.index + 1000 * member)
            return self.problem.network(self.split)

    def _by_evidence(
        self, data: tuple[Tensor, Tensor], val: Any
    ) -> tuple[AutoSubnetLaplace, float, float]:
        """The guide, and seconds: of all, and of looks at the evidence."""
        pyro.clear_param_store()
        net = self._network()
        model = pyro_model(net, 1.0 if self.problem.has_noise else None)
        start = init_to_module(net)
        guide = AutoSubnetLaplace(model, SHARE, init_loc_fn=start)
        plan, began = self.plan, time.perf_counter()
        guide.train_by_evidence(
            [data],
            num_epochs=plan.num_steps,
            burn_in=plan.burn_in,
            every=plan.every,
            val=val if self.problem.has_noise else None,
        )
        seconds = time.perf_counter() - began
        return guide, seconds, sum(step.seconds for step in guide.evidence_history)

    def _of_all(self, guide: AutoSubnetLaplace, covariance: Any) -> Any:
        everything = AutoSubnetLaplace(
            guide.user_model,
            init_loc_fn=pyro.infer.autoguide.init_to_value(values=guide.median()),
            covariance=covariance,
        )
        (factor,) = set(guide.factors.prior.values())
        posterior = everything.laplace_approximation(*self.split.train)
        scaled = posterior.with_prior_precision(factor)
        if not self.problem.has_noise:
            return scaled
        noisy = scaled.with_noise_scale(guide.noise_factor)
        return noisy.tune_noise_scale("nll", val=self.split.held_out)

    def _peer(self) -> Callable[[Tensor], Any]:
        """laplace-torch's training by the evidence, and its Kronecker predictive."""
        x, y = self.all_data
        noisy, plan = self.problem.has_noise, self.plan
        x = x.float()
        y = y.float().unsqueeze(-1) if noisy else y
        # All images at once take its factors 46 GB; as many steps, in fewer epochs.
        batch = _PEERS_IMAGES if x.ndim > _TABLE else len(x)
        per_epoch = math.ceil(len(x) / batch)
        with torch.random.fork_rng():
            torch.manual_seed(self.split.index)
            laplace, *_ = marglik_training(
                self._network().float(),
                DataLoader(TensorDataset(x, y), batch_size=batch),
                "regression" if noisy else "classification",
                backend=CurvlinopsGGN,
                optimizer_kwargs={"lr": 0.01},
                scheduler_cls=torch.optim.lr_scheduler.ExponentialLR,
                scheduler_kwargs={"gamma": 0.01 ** (1 / plan.num_steps)},
                n_epochs=math.ceil(plan.num_steps / per_epoch),
                n_epochs_burnin=plan.burn_in // per_epoch,
                marglik_frequency=max(1, plan.every // per_epoch),
            )

        @torch.no_grad()
        def predict(inputs: Tensor) -> Any:
            found = laplace(inputs.float(), link_approx="probit")
            if not noisy:
                return dist.Categorical(probs=found)
            mean, variance = (part.flatten().double() for part in found)
            noise = float(laplace.sigma_noise)
            return dist.Normal(mean, (variance + noise**2).sqrt())

        return predict

    @cached_property
    def members(self) -> list[Trained]:
        """Networks of other seeds."""
        found = [self._held_out[0]]
        num_steps = self.plan.num_steps // (3 if self.problem.has_noise else 1)
        for member in range(1, _MEMBERS):
            split = replace(self.split, index=self.split.index + 1000 * member)
            found.append(train(split, self.problem.network, num_steps))
        return found

    def ensemble(self) -> Callable[[Tensor], Any]:
        """Their mixture's mean and variance, or mean probabilities."""
        members = self.members

        @torch.no_grad()
        def predict(inputs: Tensor) -> Any:
            outputs = torch.stack([member.net(inputs) for member in members])
            if not self.problem.has_noise:
                return dist.Categorical(probs=outputs.softmax(-1).mean(0))
            means = outputs.squeeze(-1)
            noise = torch.tensor([float(m.noise_scale or 0) for m in members])
            second = means.square().mean(0) + noise.square().mean()
            mean = means.mean(0)
            return dist.Normal(mean, (second - mean.square()).sqrt())

        return predict
