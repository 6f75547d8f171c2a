"""One-dimensional regression with a gap: how much variance a subnet keeps in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness.task import Score, Settings, Task
from benchmarks.paper.members import Schedule, Shape
from benchmarks.paper.regression import (
    RIVALS,
    Fitted,
    Network,
    Plan,
    fit_rival,
    of_posterior,
)
from benchmarks.selectors.data import Split
from pyro_subnet.selection import GreedyVariance, LargestVariance, PredictiveVariance

NETWORKS = {"2x50 relu": Shape((50, 50)), "2x50 tanh": Shape((50, 50), "tanh")}
SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SELECTORS = (
    "LargestVariance",
    "LargestVariance (SWAG)",
    "LargestVariance, alive",
    "PredictiveVariance",
    "PredictiveVariance, greedy",
    "PredictiveVariance, greedy, gap",
    "GreedyVariance, gap",
    "RandomSubnet",
    "LargestMagnitude",
)
# Two estimates of one thing: how many weights each shares with PredictiveVariance.
COMPARED = ("LargestVariance", "LargestVariance (SWAG)")
# The paper's scaling: the prior precision times S / D.
SCALED = ("LargestVariance", "RandomSubnet", "PredictiveVariance")
SCALED_PRIOR = ", S/D prior"
# As rivals are, on held-out data; and a network trained by the evidence.
TUNED, EVIDENCE = ", tuned", "subnet, by evidence"
OTHERS = (
    "MAP",
    "full Laplace",
    "diagonal Laplace",
    "Kronecker Laplace",
    "subnet LastLayer",
    "MC dropout",
    "SWAG",
    "deep ensemble",
    EVIDENCE,
    *(f"subnet PredictiveVariance, greedy 5.0%{TUNED}", f"subnet LastLayer{TUNED}"),
    *(f"full Laplace{TUNED}", f"diagonal Laplace{TUNED}"),
    *RIVALS,
)
# More weights than move a training output.
_LEFT_OUT = {f"subnet LargestVariance, alive {share}" for share in ("50.0%", "100.0%")}
FULL = "full Laplace"
# Whose functions a picture shows.
DRAWN = (
    "MAP",
    FULL,
    "subnet LargestVariance 5.0%",
    "subnet LargestVariance (SWAG) 5.0%",
    "subnet PredictiveVariance, greedy 5.0%",
    "subnet RandomSubnet 5.0%",
    "diagonal Laplace",
    "subnet LastLayer",
    "deep ensemble",
)
CLUSTERS = ((-1.0, -0.7), (0.5, 1.0))
GAP = (-0.55, 0.35)
NOISE = 0.1
_COUNT, _HELD_OUT, _TEST = 100, 40, 200
# Inputs of the picture.
GRID = torch.linspace(-1.6, 1.6, 65, dtype=torch.float64)
_BETWEEN = (GRID > CLUSTERS[0][1]) & (GRID < CLUSTERS[1][0])


def function(x: Tensor) -> Tensor:
    """The mean of y at x, after Foong et al. (2019), arXiv 1906.11537."""
    return torch.cos(4 * x + 0.8)


def toy_split(seed: int) -> Split:
    """Two clusters; of tests, one is like them, and one lies in the gap."""
    generator = torch.Generator().manual_seed(seed)

    def unit(count: int) -> Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64)

    def labelled(x: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.randn(len(x), generator=generator, dtype=torch.float64)
        return x.unsqueeze(-1), function(x) + NOISE * noise

    def clusters(count: int) -> tuple[Tensor, Tensor]:
        left, right = ((low, high - low) for low, high in CLUSTERS)
        first = left[0] + left[1] * unit(count // 2)
        last = right[0] + right[1] * unit(count - count // 2)
        return labelled(torch.cat([first, last]))

    train, held_out, test = (clusters(count) for count in (_COUNT, _HELD_OUT, _TEST))
    gap = labelled(GAP[0] + (GAP[1] - GAP[0]) * unit(_TEST))
    tests = {"": test, "gap": gap}
    return Split("toy", "clusters", seed, train, held_out, tests, 1.0)


def names() -> tuple[str, ...]:
    """Methods: those without a size, then each selector at each share."""
    sized = [f"subnet {name} {share:.1%}" for name in SELECTORS for share in SHARES]
    scaled = [
        f"subnet {name} {share:.1%}{SCALED_PRIOR}"
        for name in SCALED
        for share in SHARES
    ]
    return (*OTHERS, *(name for name in sized if name not in _LEFT_OUT), *scaled)


def tasks(settings: Settings) -> list[Task]:
    smoke = settings.scale == "smoke"
    schedule = Schedule(
        50 if smoke else 2000,
        batch=_COUNT,
        every=None,
        noise_scale=NOISE,
    )
    plan = Plan(schedule, swag_steps=40 if smoke else 500, tuned=False)
    methods = names()
    if smoke:
        methods = tuple(name for name in methods if "%" not in name or " 5.0%" in name)
    return [
        Task(
            "toy", "clusters", seed, variant, methods, partial(_run, seed, shape, plan)
        )
        for seed in settings.numbers
        for variant, shape in NETWORKS.items()
    ]


def _run(
    seed: int, shape: Shape, plan: Plan, methods: Sequence[str]
) -> Iterator[tuple[str, list[Score]]]:
    network = Network(toy_split(seed), shape, plan)
    for method in methods:
        yield method, judge(network.split, fit(network, method), method in DRAWN)


def fit(network: Network, method: str) -> Fitted:
    """Under the model's own N(0, 1) priors, so that subnets alone differ, or tuned."""
    tuned = method.endswith(TUNED)
    method = method.removesuffix(TUNED)
    simple: dict[str, Callable[[], Fitted]] = {
        "MAP": network.at_map,
        "deep ensemble": network.ensemble,
        "MC dropout": network.mc_dropout,
        "SWAG": network.swag_draws,
        **{name: partial(fit_rival, name, network) for name in RIVALS},
        EVIDENCE: partial(network.by_evidence, network.plan.share),
        "full Laplace": partial(network.subnet, None, tuned=tuned),
        "diagonal Laplace": partial(
            network.subnet, None, tuned=tuned, covariance="diag"
        ),
        "Kronecker Laplace": partial(network.subnet, None, covariance="kron"),
        "subnet LastLayer": lambda: network.subnet(
            network.selector("LastLayer", 1), tuned=tuned
        ),
    }
    if method in simple:
        return simple[method]()
    scaled = method.endswith(SCALED_PRIOR)
    name, share = (
        method.removesuffix(SCALED_PRIOR).removeprefix("subnet ").rsplit(" ", 1)
    )
    size = network.size_of(float(share.rstrip("%")) / 100)
    between = GRID[_BETWEEN].unsqueeze(-1)
    own = {
        "LargestVariance, alive": lambda: LargestVariance(size, keep_dead=False),
        "PredictiveVariance, greedy, gap": lambda: PredictiveVariance(
            size, between, method="greedy"
        ),
        "GreedyVariance, gap": lambda: GreedyVariance(size, between),
    }
    chosen = own[name]() if name in own else network.selector(name, size)
    if tuned:
        return network.subnet(chosen, tuned=True)
    posterior = network.posterior(chosen)
    if scaled:
        posterior = posterior.with_prior_precision("fraction")
    notes = {"S": float(posterior.subnet.size)}
    if name in COMPARED:
        other = network.posterior(network.selector("PredictiveVariance", size)).subnet
        both = torch.isin(posterior.subnet.flat, other.flat)
        notes["shared"] = float(both.double().mean())
    return of_posterior(posterior, notes)


def judge(split: Split, fitted: Fitted, along: bool) -> list[Score]:
    """NLL and standard deviation of the function, by where, and along a grid."""
    found = [Score("", metric, value) for metric, value in fitted.notes.items()]
    for shift, (x, y) in split.tests.items():
        found += [
            Score(shift, "nll", fitted.predict(x).nll(y)),
            Score(shift, "rmse", fitted.predict(x).rmse(y)),
            Score(shift, "function_std", float(fitted.spread(x).mean())),
        ]
    if not along:
        return found
    inputs = GRID.unsqueeze(-1)
    means, stds = fitted.predict(inputs).loc.mean(0), fitted.spread(inputs)
    for at, mean, std in zip(GRID.tolist(), means.tolist(), stds.tolist(), strict=True):
        found += [Score(f"x={at:.2f}", "mean", mean), Score(f"x={at:.2f}", "std", std)]
    return found
