"""Fits every method on one split, under three priors, and judges it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.harness.task import Score, Settings, Task
from benchmarks.selectors.data import Split
from benchmarks.selectors.methods import (
    FULL,
    MAP,
    REST,
    TEMPERATURE,
    is_candidate,
    method_of,
    names,
)
from benchmarks.selectors.network import Trained, sgd_moments, train
from benchmarks.selectors.problems import Problem, problems
from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.nn import init_to_module
from pyro_subnet.predictions.links.probit import probit

NAME = "selectors"
# The model's own prior; the one of highest evidence; the one nearest the model's own
# whose held-out NLL is within two standard errors of the best; and, of regression, the
# noise of least held-out NLL, the prior of highest evidence, and the noise again.
Prior = Literal["own", "evidence", "held-out", "tuned"]
PRIORS: tuple[Prior, ...] = ("own", "evidence", "held-out", "tuned")
PAIRS = ", in pairs"  # in the name of what is judged by the link "pairwise"
# What logits are divided by, or the noise multiplied by; the best of these by held-out
# NLL is a rival, and all of them make its curve.
TEMPERATURES = tuple(2 ** (step / 4) for step in range(-4, 25))
# Beyond so many rows of the Jacobian and weights each, all weights' posterior is not
# tuned: each prior would take a factorization of minutes.
_LARGE = 5000
_ERRORS = 2.0
_DEFAULT_SHARE = 0.05
_QUANTILE = 1.959964  # of the central 95% of a normal


@dataclass(frozen=True)
class Plan:
    """How much is done.

    Attributes:
        num_steps: Of training.
        swag_steps: Of SGD, for its moments.
    """

    num_steps: int = 1000
    swag_steps: int = 500


def plan_of(settings: Settings) -> Plan:
    return Plan(20, 10) if settings.scale == "smoke" else Plan()


def tasks(settings: Settings) -> list[Task]:
    plan = plan_of(settings)
    return [
        Task(NAME, problem.name, seed, "", names(), partial(_run, problem, seed, plan))
        for problem in problems(settings.data_dir)
        for seed in settings.numbers
    ]


def _run(
    problem: Problem, seed: int, plan: Plan, methods: Sequence[str]
) -> Iterator[tuple[str, list[Score]]]:
    split = problem.split(seed)
    trained = train(split, problem.network, plan.num_steps)
    for name in methods:
        yield name, scores(trained, split, plan, name)


def scores(trained: Trained, split: Split, plan: Plan, name: str) -> list[Score]:
    """All that is judged of one method."""
    if name == MAP:
        return judged(split, at_temperature(trained, 1.0), "own")
    if name == TEMPERATURE:
        return _tempered(trained, split)
    if name == REST:
        return judged(split, with_rest(trained, split), "own")
    method, share = method_of(name)
    subnet = None
    if method.choose is not None:
        moments = partial(sgd_moments, trained, split, plan.swag_steps)
        subnet = method.choose(share, split.index, moments)
    posterior = fit(trained, split, subnet, method.covariance)
    found = [Score("", "S", posterior.subnet.size)]
    found += _by_links(split, posterior, "own")
    for prior in _tunings(trained, split, name):
        tuned = with_prior(posterior, split, prior)
        state = tuned.state
        found.append(Score("", f"scale, {prior}", float(state.prior_factor)))
        found.append(Score("", f"noise, {prior}", state.noise_factor))
        found += _by_links(split, tuned, prior)
    return found


def _tunings(trained: Trained, split: Split, name: str) -> tuple[Prior, ...]:
    """Priors beside the model's own: of candidates, that of highest evidence."""
    if name == FULL and min(_rows(trained, split), trained.num_params) > _LARGE:
        return ()
    if is_candidate(name):
        return ("evidence",)
    return PRIORS[1:-1] if split.target_scale is None else PRIORS[1:]


def _by_links(
    split: Split, posterior: AutoSubnetMultivariateNormal, prior: Prior
) -> list[Score]:
    """By the default link; of classes, by pairs of them too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = judged(split, posterior.predictive_distribution, prior)
        if split.target_scale is None:
            in_pairs = partial(posterior.predictive_distribution, link="pairwise")
            found += judged(split, in_pairs, f"{prior}{PAIRS}")
    return found


def fit(
    trained: Trained, split: Split, subnet: Any, covariance: Any = "full"
) -> AutoSubnetMultivariateNormal:
    few = covariance == "full" and _rows(trained, split) < trained.num_params
    guide = AutoSubnetLaplace(
        trained.model,
        subnet,
        init_loc_fn=init_to_module(trained.net),
        covariance=covariance,
        # Where rows are few, all weights' posterior is tuned faster so.
        form="dual" if subnet is None and few else "auto",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say is what is measured here
        return guide.laplace_approximation(*split.train)


def with_rest(trained: Trained, split: Split) -> Callable[[Tensor], Any]:
    """The default's predictive, with a diagonal posterior over all other weights."""
    chosen = fit(trained, split, _DEFAULT_SHARE)
    subnet = chosen.subnet
    others = {site: ~subnet.mask(site) for site in subnet.layout.names}
    parts = chosen, fit(trained, split, others, "diag")

    def predict(x: Tensor) -> Any:
        # The two are independent, and the linearized outputs are sums over weights.
        found = [part.output_distribution(x) for part in parts]
        variance = sum(each.variance for each in found)
        if trained.noise_scale is None:
            return dist.Categorical(logits=probit(found[0].mean, variance))
        total = variance.squeeze(-1) + trained.noise_scale**2
        return dist.Normal(found[0].mean.squeeze(-1), total.sqrt())

    return predict


def with_prior(
    posterior: AutoSubnetMultivariateNormal, split: Split, prior: Prior
) -> AutoSubnetMultivariateNormal:
    """The posterior under a prior of tuned precision."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if prior == "evidence":
            return posterior.tune_prior_precision()
        if prior == "tuned":
            noise = posterior.tune_noise_scale("nll", val=split.held_out)
            both = noise.tune_prior_precision()
            return both.tune_noise_scale("nll", val=split.held_out)
        return posterior.tune_prior_precision(
            "nll", val=split.held_out, standard_errors=_ERRORS
        )


def _rows(trained: Trained, split: Split) -> int:
    return len(split.train[0]) * trained.net[-1].out_features


def at_temperature(trained: Trained, temperature: float) -> Callable[[Tensor], Any]:
    """The MAP's prediction, its noise or its classes' probabilities widened."""

    @torch.no_grad()
    def predict(x: Tensor) -> Any:
        outputs = trained.net(x)
        if trained.noise_scale is None:
            return dist.Categorical(logits=outputs / temperature)
        return dist.Normal(outputs.squeeze(-1), trained.noise_scale * temperature)

    return predict


def best_temperature(trained: Trained, split: Split) -> float:
    """That under which the MAP predicts the held-out data best."""
    x, y = split.held_out

    def log_density(temperature: float) -> float:
        return float(at_temperature(trained, temperature)(x).log_prob(y).mean())

    return max(TEMPERATURES, key=log_density)


def _tempered(trained: Trained, split: Split) -> list[Score]:
    best = best_temperature(trained, split)
    predict = {value: at_temperature(trained, value) for value in TEMPERATURES}
    found = [Score("", "temperature", best), *judged(split, predict[best], "own")]
    for step, value in enumerate(TEMPERATURES):
        along = judged(split, predict[value], f"step {step}")
        found += [score for score in along if score.metric.startswith("nll")]
    return found


@torch.no_grad()
def judged(split: Split, predict: Callable[[Tensor], Any], prior: str) -> list[Score]:
    """Mean negative log density, and coverage of 95% bands or the share of errors.

    Targets are standardized.
    """
    found = []
    for shift, (x, y) in split.tests.items():
        made = predict(x)
        found.append(Score(shift, f"nll, {prior}", -float(made.log_prob(y).mean())))
        if split.target_scale is None:
            wrong = (made.probs.argmax(-1) != y).double().mean()
            found.append(Score(shift, f"error, {prior}", float(wrong)))
        else:
            inside = (y - made.mean).abs() <= _QUANTILE * made.variance.sqrt()
            share = float(inside.double().mean())
            found.append(Score(shift, f"coverage, {prior}", share))
    return [score for score in found if math.isfinite(score.value)]
