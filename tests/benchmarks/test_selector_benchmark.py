"""The measured table of selectors: its readers, and both experiments at a tiny size."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.harness import digest
from benchmarks.harness.command import main, report
from benchmarks.harness.journal import read
from benchmarks.harness.task import Row
from benchmarks.selectors import noise
from benchmarks.selectors.__main__ import EXPERIMENTS
from benchmarks.selectors.candidates import eliminate_, gain
from benchmarks.selectors.data import Split, digits_split, gap_features, uci_split
from benchmarks.selectors.measure import (
    NAME,
    TEMPERATURES,
    Plan,
    at_temperature,
    fit,
    scores,
    with_rest,
)
from benchmarks.selectors.methods import (
    CANDIDATES,
    MAP,
    REST,
    SELECTORS,
    SIZES,
    TEMPERATURE,
    names,
    sized,
)
from benchmarks.selectors.network import Trained, sgd_moments, train
from benchmarks.selectors.problems import Problem, mlp, moons_split, problems

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "selectors" / "results"
PLAN = Plan(20, 10)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A set in the published layout: two features, one of them all ties, and y."""
    own = tmp_path / "uci" / "set"
    own.mkdir(parents=True)
    rng = np.random.default_rng(0)
    x = rng.permutation(40).astype(float)
    table = np.stack([x, np.ones(40), 5 + 3 * np.sin(x / 6)], 1)
    np.savetxt(own / "data.txt", table)
    np.savetxt(own / "index_features.txt", [0, 1], fmt="%d")
    np.savetxt(own / "index_target.txt", [2], fmt="%d")
    order = rng.permutation(40)
    np.savetxt(own / "index_train_0.txt", order[:33], fmt="%d")
    np.savetxt(own / "index_test_0.txt", order[33:], fmt="%d")
    return tmp_path


def test_a_gap_split_holds_out_the_middle_third(folder: Path) -> None:
    split = uci_split(folder, "set", "gap", 0, most=100)
    train_x = torch.cat([split.train[0], split.held_out[0]])[:, 0]
    test_x = split.tests["test"][0][:, 0]
    assert (len(train_x), len(test_x)) == (26, 14)
    low = train_x[train_x < test_x.min()]
    assert (len(low), int((train_x > test_x.max()).sum())) == (13, 13)
    assert list(gap_features(folder, "set")) == [0]  # the other is all ties


def test_published_gap_indices_are_read(folder: Path) -> None:
    own = folder / "uci_gap" / "set"
    own.mkdir(parents=True)
    np.savetxt(own / "index_train_0.txt", range(30), fmt="%d")
    np.savetxt(own / "index_test_0.txt", range(30, 40), fmt="%d")
    split = uci_split(folder, "set", "gap", 0)
    assert len(split.tests["test"][0]) == 10


def test_data_are_standardized_by_the_training_part(folder: Path) -> None:
    split = uci_split(folder, "set", "standard", 0, most=100)
    x, y = (torch.cat(part) for part in zip(split.train, split.held_out, strict=True))
    zero, one = torch.zeros(2, dtype=x.dtype), torch.ones((), dtype=x.dtype)
    torch.testing.assert_close(x.mean(0), zero)
    torch.testing.assert_close(x[:, 0].std(correction=0), one)
    torch.testing.assert_close(x[:, 1], torch.zeros_like(y))  # varies not at all
    torch.testing.assert_close(y.std(correction=0), one)


def test_digits_are_turned_by_quarter_turns_exactly() -> None:
    tests = digits_split(0, (0, 90), most=5).tests
    upright, turned = (
        tests[name][0].unflatten(1, (8, 8)) for name in ("", "90 degrees")
    )
    torch.testing.assert_close(turned, upright.rot90(1, (1, 2)))


def small(folder: Path) -> tuple[Split, Trained]:
    split = uci_split(folder, "set", "standard", 0)
    return split, train(split, partial(mlp, num_hidden=4), PLAN.num_steps)


def test_moons_are_turned_by_a_quarter() -> None:
    tests = moons_split(0).tests
    (x, y), (turned, same) = tests[""], tests["90 degrees"]
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    torch.testing.assert_close(turned, x @ turn.T)
    assert torch.equal(y, same)


def test_each_problem_has_a_network_for_its_data() -> None:
    for problem in problems(None):
        split = problem.split(0)
        net = problem.network(split)
        x, y = split.train
        width = 1 if split.target_scale is not None else int(y.max()) + 1
        assert net(x).shape == (len(x), width)
        assert problem.has_noise == (split.target_scale is not None)


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_every_method_is_judged_under_every_prior(folder: Path, step: int) -> None:
    split, trained = small(folder)
    unsized = [name for name in names() if not name.endswith("%")]
    of_a_size = [f"{selector} 20%" for selector in SELECTORS]
    for name in [*unsized, *of_a_size][::step]:
        found = scores(trained, split, PLAN, name)
        assert all(math.isfinite(score.value) for score in found)
        metrics = {score.metric for score in found}
        priors = (
            {"own"}
            if name in (MAP, REST, TEMPERATURE)
            else {"own", "evidence", "held-out"}
        )
        assert {
            f"{kind}, {prior}" for prior in priors for kind in ("nll", "coverage")
        } <= (metrics)


def test_candidates_have_the_size_that_is_asked_for(folder: Path) -> None:
    """Also where both halves choose a weight, and where units do not fill it."""
    split, trained = small(folder)
    for name in CANDIDATES:
        found = scores(trained, split, PLAN, sized(name, 0.2))
        (size,) = (score.value for score in found if score.metric == "S")
        assert size == round(0.2 * trained.num_params)


def test_units_are_chosen_whole_and_by_what_they_add() -> None:
    """Against the trace of the chosen block of a dense posterior, unit by unit."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(30, 12, generator=generator, dtype=torch.float64)
    outputs = torch.randn(9, 12, generator=generator, dtype=torch.float64)
    precision = rows.T @ rows + torch.eye(12, dtype=torch.float64)
    gram = outputs.T @ outputs
    first, then = torch.tensor([1, 4, 7]), torch.tensor([0, 9])

    def kept(chosen: torch.Tensor) -> float:
        block = precision[chosen][:, chosen]
        return float(torch.linalg.solve(block, gram[chosen][:, chosen]).trace())

    expected = kept(torch.cat([first, then])) - kept(first)
    left = precision.clone(), gram.clone()
    eliminate_(*left, first)
    assert gain(*left, then) == pytest.approx(expected)


def test_the_rest_adds_the_variance_of_a_diagonal(folder: Path) -> None:
    """Against dense algebra: J_S P_SS^-1 J_S^T, and J_j^2 / P_jj of every other j."""
    split, trained = small(folder)
    parameters = dict(trained.net.named_parameters())

    def rows(x: torch.Tensor) -> torch.Tensor:
        def output(values: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.func.functional_call(trained.net, values, (x,)).squeeze(-1)

        slopes = torch.func.jacrev(output)(parameters)
        return torch.cat([part.flatten(1) for part in slopes.values()], 1).detach()

    scaled = rows(split.train[0]) / trained.noise_scale
    precision = scaled.T @ scaled + torch.eye(trained.num_params, dtype=scaled.dtype)
    chosen = fit(trained, split, 0.05).subnet.flat
    others = torch.ones(trained.num_params, dtype=torch.bool)
    others[chosen] = False
    x, _ = split.tests["test"]
    own, rest = rows(x)[:, chosen], rows(x)[:, others]
    block = precision[chosen][:, chosen]
    expected = (own @ torch.linalg.inv(block) * own).sum(1)
    expected += (rest.square() / precision.diagonal()[others]).sum(1)
    found = with_rest(trained, split)(x).variance - trained.noise_scale**2
    torch.testing.assert_close(found, expected)


def test_noise_is_reported_as_it_was_learned(folder: Path) -> None:
    split, _ = small(folder)
    problem = Problem("set", lambda seed: split, partial(mlp, num_hidden=4))
    task = noise.task(problem, 0, PLAN.num_steps)
    ((_, found),) = task.run(task.methods)
    values = {score.metric: score.value for score in found}
    trained = train(split, problem.network, PLAN.num_steps, rounds=0)
    x, y = split.held_out
    rmse = float((trained.net(x).squeeze(-1) - y).square().mean().sqrt().detach())
    assert values["learned"] == pytest.approx(trained.noise_scale)
    assert values["held out"] == pytest.approx(rmse)
    assert values["ratio"] == pytest.approx(rmse / trained.noise_scale)
    assert values["factor"] >= 1


def test_the_map_has_the_nll_and_the_coverage_of_its_network(folder: Path) -> None:
    split, trained = small(folder)
    found = {score.metric: score.value for score in scores(trained, split, PLAN, MAP)}
    x, y = split.tests["test"]
    errors, noise = (trained.net(x).squeeze(-1) - y).detach(), trained.noise_scale
    nll = errors.square().mean() / (2 * noise**2) + math.log(noise)
    assert found["nll, own"] == pytest.approx(float(nll + math.log(2 * math.pi) / 2))
    inside = (errors.abs() <= 1.959964 * noise).double().mean()
    assert found["coverage, own"] == pytest.approx(float(inside))


def test_the_temperature_is_the_best_on_held_out_data(folder: Path) -> None:
    split, trained = small(folder)
    x, y = split.held_out
    losses = [
        -float(at_temperature(trained, value)(x).log_prob(y).mean())
        for value in TEMPERATURES
    ]
    found = scores(trained, split, PLAN, TEMPERATURE)
    (chosen,) = (score.value for score in found if score.metric == "temperature")
    assert chosen == TEMPERATURES[losses.index(min(losses))]
    at_one = TEMPERATURES.index(1.0)
    (own,) = (s.value for s in scores(trained, split, PLAN, MAP) if "nll" in s.metric)
    (step,) = (s.value for s in found if s.metric == f"nll, step {at_one}")
    assert step == pytest.approx(own)


def test_sgd_leaves_the_map_where_it_is(folder: Path) -> None:
    split, trained = small(folder)
    before = [part.clone() for part in trained.net.parameters()]
    moments = sgd_moments(trained, split, 30)
    assert moments.count == 30
    assert bool((moments.variance > 0).any())
    for old, new in zip(before, trained.net.parameters(), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)


@pytest.mark.slow
def test_a_run_and_its_tables(tmp_path: Path) -> None:
    few = ["--methods", MAP, TEMPERATURE, "PredictiveVariance greedy 5%"]
    arguments = [NAME, "--out", str(tmp_path), "--scale", "smoke", "--seeds", "1"]
    assert main("benchmarks.selectors", EXPERIMENTS, [*arguments, *few]) == 0
    rows = read(tmp_path / f"{NAME}.jsonl")
    assert {row["dataset"] for row in rows} == {p.name for p in problems(None)}
    text = report(EXPERIMENTS, tmp_path)
    assert (tmp_path / "price-and-gain.png").stat().st_size > 1000
    for title in ("By use", "The default", "Selectors, 5% of the weights, prior: own"):
        assert f"**{title}**" in text


def made(method: str, shift: str, metric: str, values: list[float]) -> list[Row]:
    head = {"experiment": NAME, "scale": "small", "versions": "", "dataset": "set"}
    own = {**head, "variant": "", "method": method, "shift": shift, "metric": metric}
    return [{**own, "seed": seed, "value": value} for seed, value in enumerate(values)]


def test_the_default_is_counted_level_within_a_standard_error(tmp_path: Path) -> None:
    """Behind by 0.1 in each of two seeds, which differ among themselves by 1."""
    rows = made(MAP, "", "nll, own", [1.0, 2.0]) + made(
        MAP, "gap", "nll, own", [5.0, 6.0]
    )
    rows += made(MAP, "", "coverage, own", [0.9, 0.9])
    for share in SIZES:
        name = f"PredictiveVariance greedy {share:.0%}"
        rows += made(name, "", "nll, own", [1.1, 2.1])
        rows += made(name, "gap", "nll, own", [9.0, 9.0])
        other = f"LargestGradient {share:.0%}"
        rows += made(other, "", "nll, own", [1.0, 2.0])
        rows += made(other, "gap", "nll, own", [8.0, 8.0])
    text = EXPERIMENTS[NAME].report(rows, tmp_path)
    (line,) = (row for row in text.splitlines() if row.startswith("| 5%, own |"))
    assert line == "| 5%, own | 1 of 2 | +0.100 | +0.000 |"


def test_temperatures_are_compared_at_an_equal_price(tmp_path: Path) -> None:
    """The default pays 0.2; of steps that pay 0, 0.1, ..., the third pays as much."""
    rows = made(MAP, "", "nll, own", [1.0]) + made(MAP, "gap", "nll, own", [5.0])
    default = "PredictiveVariance greedy 5%"
    rows += made(default, "", "nll, own", [1.2]) + made(
        default, "gap", "nll, own", [2.0]
    )
    first = TEMPERATURES.index(1.0)
    for step in range(len(TEMPERATURES)):
        price = 0.1 * (step - first) + 1e-9 * (step < first)
        rows += made(TEMPERATURE, "", f"nll, step {step}", [1.0 + price - 1e-6])
        rows += made(TEMPERATURE, "gap", f"nll, step {step}", [100.0 + step])
    rows += made(TEMPERATURE, "", "nll, own", [1.0])
    text = EXPERIMENTS[NAME].report(rows, tmp_path)
    start = "| set: in the gap | 5 | 2 |"
    line = next(row for row in text.splitlines() if row.startswith(start))
    assert f"{100 + first + 2}" in line.split("|")[7]


def test_the_page_shows_what_was_measured(tmp_path: Path) -> None:
    measured = {
        line
        for name, experiment in EXPERIMENTS.items()
        for line in experiment.report(digest.read(RESULTS, name), tmp_path).splitlines()
    }
    pages = {RESULTS.parent / "README.md": 50, RESULTS / "tables.md": 300}
    for path, least in pages.items():
        lines = path.read_text(encoding="utf-8").splitlines()
        shown = [line for line in lines if " ± " in line and line[0] == "|"]
        assert len(shown) > least
        assert not [line for line in shown if line not in measured]
