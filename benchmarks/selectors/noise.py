"""Noise that was learned with the weights, beside what held-out data and a fit say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks.harness.reporting import by_dataset, collected, table
from benchmarks.harness.task import Row, Score, Settings, Task
from benchmarks.selectors.measure import fit, plan_of
from benchmarks.selectors.network import held_out_rmse, train
from benchmarks.selectors.problems import Problem, problems
from pyro_subnet.diagnostics import absorbed_noise

NAME = "noise"
_METHOD = "learned with the weights"
_WEIGHTS = 3  # of the posterior, through which the whole network is looked at
_METRICS = {
    "noise as learned": "learned",
    "RMSE on held-out data": "held out",
    "the latter over the former": "ratio",
    "sqrt(N / (N - γ))": "factor",
}


def tasks(settings: Settings) -> list[Task]:
    num_steps = plan_of(settings).num_steps
    return [
        task(problem, seed, num_steps)
        for problem in problems(settings.data_dir)
        if problem.has_noise
        for seed in settings.numbers
    ]


def task(problem: Problem, seed: int, num_steps: int) -> Task:
    run = partial(_run, problem, seed, num_steps)
    return Task(NAME, problem.name, seed, "", (_METHOD,), run)


def _run(
    problem: Problem, seed: int, num_steps: int, methods: Sequence[str]
) -> Iterator[tuple[str, list[Score]]]:
    split = problem.split(seed)
    trained = train(split, problem.network, num_steps, rounds=0)
    learned, held_out = trained.noise_scale, float(held_out_rmse(trained.net, split))
    factor = absorbed_noise(fit(trained, split, _WEIGHTS), *split.train).factor
    values = (learned, held_out, held_out / learned, factor)
    for name in methods:
        yield (
            name,
            [
                Score("", metric, value)
                for metric, value in zip(_METRICS.values(), values, strict=True)
            ],
        )


def report(rows: Sequence[Row], folder: Path) -> str:
    """The table, a line a problem."""
    lines = by_dataset(collected(rows), _METHOD, _METRICS.values())
    return table("Noise learned with the weights", ["targets' units", *_METRICS], lines)
