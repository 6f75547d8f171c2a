"""Training by the evidence, measured: every way at a tiny size, and the tables."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.evidence import looks
from benchmarks.evidence.__main__ import EXPERIMENTS
from benchmarks.evidence.measure import (
    BY_EVIDENCE,
    ENSEMBLE,
    MAP,
    MAP_BY_EVIDENCE,
    METHODS,
    NAME,
    PEER,
    SUBNET,
    Plan,
    Runs,
    all_problems,
)
from benchmarks.harness import digest
from benchmarks.harness.task import Row
from benchmarks.selectors.problems import Problem, small_cnn

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "evidence" / "results"


def problem(name: str) -> Problem:
    return next(each for each in all_problems(None) if each.name == name)


# Of so few steps a fit says that they are too few, and the peer warns of itself.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["gap, tanh", "moons"])
def test_every_way_is_judged(name: str) -> None:
    found = problem(name)
    runs = Runs(found, found.split(0), Plan(12))
    for method in METHODS:
        scores = runs.scores(method)
        assert all(math.isfinite(score.value) for score in scores)
        kinds = {score.metric for score in scores}
        other = "coverage, own" if found.has_noise else "error, own"
        assert {"nll, own", other, "seconds"} <= kinds


@pytest.mark.filterwarnings("ignore::pyro_subnet.exceptions.UntrainedWarning")
def test_the_map_by_evidence_is_the_guides_network() -> None:
    """Its NLL is that of the outputs at the MAP, under the noise that was set."""
    found = problem("gap, tanh")
    runs = Runs(found, found.split(0), Plan(24))
    scores = runs.scores(MAP_BY_EVIDENCE)
    guide, *_ = runs.scored_guide
    x, y = runs.split.tests[""]
    posterior = guide.laplace_approximation(*runs.split.train)
    mean = posterior.output_distribution(x).mean.squeeze(-1)
    noise = guide.noise_factor
    nll = 0.5 * ((y - mean) / noise).square() + math.log(noise)
    expected = float(nll.mean()) + 0.5 * math.log(2 * math.pi)
    (own,) = (s.value for s in scores if (s.shift, s.metric) == ("", "nll, own"))
    assert own == pytest.approx(expected, rel=1e-6)


def test_an_ensemble_has_the_moments_of_its_members() -> None:
    found = problem("gap, tanh")
    runs = Runs(found, found.split(0), Plan(24))
    x, _ = runs.split.tests[""]
    made = runs.ensemble()(x)
    nets, noises = zip(*[(m.net, m.noise_scale) for m in runs.members], strict=True)
    outputs = np.stack([net(x).detach().numpy()[:, 0] for net in nets])
    np.testing.assert_allclose(made.mean, outputs.mean(0), rtol=1e-5)
    variance = outputs.var(0) + np.mean(np.square(noises))
    np.testing.assert_allclose(made.variance, variance, rtol=1e-4)


def made(method: str, metric: str, values: list[float]) -> list[Row]:
    head = {"experiment": NAME, "scale": "small", "versions": "", "dataset": "set"}
    own = {**head, "variant": "", "method": method, "shift": "", "metric": metric}
    return [{**own, "seed": seed, "value": value} for seed, value in enumerate(values)]


def test_differences_are_those_of_pairs(tmp_path: Path) -> None:
    """Better by 0.1 and 0.3 on two seeds that differ by 5 among themselves."""
    rows = made(BY_EVIDENCE, "nll, own", [1.0, 6.0])
    rows += made(SUBNET, "nll, own", [1.1, 6.3])
    for method, seconds in ((MAP, 1.0), (BY_EVIDENCE, 4.0), (PEER, 8.0), (ENSEMBLE, 5)):
        rows += made(method, "seconds", [seconds, seconds])
    rows += made(BY_EVIDENCE, "looking", [1.0, 1.0])
    lines = EXPERIMENTS[NAME].report(rows, tmp_path).splitlines()
    assert "| set | -0.200 ± 0.100 | - | - | - | - |" in lines
    (seconds,) = (line for line in lines if line.endswith("| 0.500 ± 0.000 |"))
    assert "| 0.333 ± 0.000 | 0.500 ± 0.000 |" in seconds


def test_the_page_shows_what_was_measured(tmp_path: Path) -> None:
    measured = {
        line
        for name, experiment in EXPERIMENTS.items()
        for line in experiment.report(digest.read(RESULTS, name), tmp_path).splitlines()
    }
    for path, least in (
        (RESULTS.parent / "README.md", 10),
        (RESULTS / "tables.md", 30),
    ):
        lines = path.read_text(encoding="utf-8").splitlines()
        shown = [line for line in lines if " ± " in line and line[0] == "|"]
        assert len(shown) > least
        assert not [line for line in shown if line not in measured]


def test_all_data_are_what_is_trained_on_and_held_out() -> None:
    found = problem("moons")
    runs = Runs(found, found.split(0), Plan(24))
    x, y = runs.all_data
    assert len(x) == len(y) == len(runs.split.train[0]) + len(runs.split.held_out[0])
    assert torch.equal(x[-1], runs.split.held_out[0][-1])


@pytest.mark.filterwarnings("ignore::pyro_subnet.exceptions.UntrainedWarning")
def test_looks_are_timed_apart_from_training() -> None:
    x, y = torch.randn(30, 1, 28, 28), torch.arange(30) % 10
    epoch, look, share = (
        score.value for score in looks.measured(small_cnn, (x, y), 10, 4)
    )
    # Two looks: after one epoch of four, and at the end.
    assert share == pytest.approx(2 * look / (4 * epoch), rel=1e-9)
    assert min(epoch, look) > 0
