"""The harness that measures the engine: its verdicts, and both sides on a toy case."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import distributed, hybrid_gradient, small_calls
from benchmarks.engine import laplace_torch, networks, ours, prepare, scaling, table
from benchmarks.engine.__main__ import parse
from benchmarks.engine.cases import CASES, Case
from benchmarks.engine.compare import (
    Failure,
    Ratio,
    Row,
    best,
    problem,
    same_numbers,
    same_selection,
)
from benchmarks.engine.machine import passes_seconds, product_rate
from benchmarks.engine.process import Meter, Task, measure
from benchmarks.engine.runner import (
    Launcher,
    Plan,
    Request,
    failure,
    plan,
    run_again,
    run_case,
)

TOY = replace(CASES["toy"], backends=("good", "wrong", "broken"))


def result(fit: float = 1.0, predict: float = 1.0, **values: float) -> dict[str, Any]:
    return {
        "seconds": {"fit": fit, "predict": predict},
        "memory": 0.5,
        "whole_memory": 0.7,
        "values": {name: torch.tensor([value]) for name, value in values.items()},
        "figures": {"fixed": 0.1, "rate": 1e9, "forward": 0.002, "passes": 0.01},
    }


class Fake:
    """Stands for the processes; keeps what it was asked for."""

    def __init__(self, answers: dict[str, Any]):
        self.answers = answers
        self.requests: list[Request] = []

    def __call__(self, request: Request) -> Any:
        self.requests.append(request)
        answer = self.answers[request.side]
        return answer(request) if callable(answer) else answer


def fake(**answers: Any) -> Fake:
    usual = {
        "ours": result(precision=1.0),
        "good": result(fit=8.0, predict=6.0, precision=1.0),
        "wrong": result(fit=2.0, predict=2.0, precision=1.1),
        "broken": "out of memory",
    }
    return Fake(usual | answers)


def test_medians_are_of_times_and_of_the_pairs_ratios() -> None:
    found = Ratio.of([(1.0, 10.0), (2.0, 12.0), (4.0, 11.0)])
    assert found == Ratio(ours=2.0, theirs=11.0, ratio=6.0)


def test_a_wrong_backend_is_shown_but_not_counted() -> None:
    report = run_case(TOY, None, 2, fake())
    good, wrong, broken = report.rows
    assert isinstance(good, Row)
    assert isinstance(wrong, Row)
    assert (good.right, wrong.right) == (True, False)
    assert wrong.apart == pytest.approx(0.1 / 1.1)
    assert broken == Failure("broken", "out of memory")
    assert best(report.rows, "fit") is good
    assert problem(TOY, report.rows) is None
    text = table.block(report)
    assert "fit 8.0x (good), predict 6.0x (good)" in text
    assert "wrong, not counted" in text
    assert "fails: out of memory" in text


def test_first_fits_are_held_against_the_best_backends_as_they_were_run() -> None:
    report = run_case(replace(TOY, backends=("good", "wrong")), None, 1, fake())
    cold = fake(good=result(fit=3.0, predict=6.0, precision=1.0))
    again = run_again(report, 2, cold)
    assert [row.backend for row in again.rows] == ["good"]
    good = report.rows[0]
    assert isinstance(good, Row)
    paired = [each for each in cold.requests if each.side == "good"]
    sizes = {(each.case.num_data, each.case.num_predict) for each in paired}
    assert sizes == {(TOY.num_data, TOY.num_predict)}
    assert [each.batches for each in paired] == 2 * [good.batches]
    text = table.block(again)
    assert "fit 3.0x (good), predict 6.0x (good)" in text
    # passes 0.01 s, products 30 * 3 * 25^2 at 1e9 a second
    assert "the fit takes 99.4, the predictions 99.4 times that" in text


def test_disagreement_with_every_backend_is_a_problem() -> None:
    off = result(precision=1.0 + 3 * TOY.tolerance)
    report = run_case(TOY, None, 1, fake(good=off))
    assert problem(TOY, report.rows) == "toy: no backend agrees with ours"
    assert "no right backend" in table.block(report)


def test_our_own_failure_is_a_problem() -> None:
    report = run_case(TOY, ["good"], 1, fake(ours="RuntimeError: no"))
    assert problem(TOY, report.rows) == "toy: ours fails: RuntimeError: no"


def test_disagreement_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    main = sys.modules[parse.__module__]
    run = fake(CurvlinopsGGN=result(precision=2.0))
    monkeypatch.setattr(main, "run_case", lambda *a: run_case(*a[:3], run))
    monkeypatch.setattr(Launcher, "prepare", lambda self, case: None)
    with pytest.raises(SystemExit, match="toy: no backend agrees with ours"):
        main.main(["--cases", "toy", "--backends", "CurvlinopsGGN"])


def test_a_case_for_ours_alone_has_no_backend_to_agree_with() -> None:
    case = replace(TOY, backends=())
    report = run_case(case, None, 1, fake())
    assert report.alone is not None
    assert problem(case, report.rows) is None


def test_what_is_compared_with_nothing_is_no_problem() -> None:
    assert problem(TOY, []) is None


def test_the_best_backend_is_the_fastest_per_observation() -> None:
    few = Row("few", (10, 10), (8, 8), {"fit": Ratio(1, 2, 2)}, Ratio(1, 1, 1), 0, True)
    all_data = replace(few, num_data=(100, 100), parts={"fit": Ratio(1, 10, 10)})
    assert best([few, all_data, Failure("none", "")], "fit") is all_data
    assert best([few, all_data], "predict") is None


def test_the_target_of_prior_tuning_speaks_of_the_100_steps() -> None:
    """Both rows and their ratios are printed; the verdict is held against one."""
    case = replace(CASES["prior-tuning"], num_data=30)
    steps = {"seconds": {"fit": 80.0}, "values": {"a": torch.ones(1)}}
    sides = {
        "ours": {**steps, "seconds": {"fit": 4.0}, "figures": {}},
        "100 steps": steps,
        "100 values": {**steps, "seconds": {"fit": 20.0}},
    }
    run = Fake({side: {**result(), **found} for side, found in sides.items()})
    report = run_case(case, None, 1, run)
    row = best(report.rows, "fit")
    assert row is not None
    assert row.backend == "100 steps"
    text = table.block(report)
    assert "fit 20.0x of 10x (100 steps)" in text
    assert [found in text for found in ("20.0x ", "5.0x ")] == [True, True]
    failed = [Failure("100 steps", "out of memory"), report.rows[1]]
    assert best(failed, "fit") is None


@pytest.mark.parametrize("theirs", [torch.tensor([math.nan]), torch.ones(2)])
def test_what_cannot_be_compared_is_infinitely_far(theirs: torch.Tensor) -> None:
    assert same_numbers({"a": torch.ones(1)}, {"a": theirs}) == math.inf


def test_a_selection_is_judged_by_their_variances() -> None:
    variance = torch.tensor([1.0, 0.5, 0.5, 0.1])
    probe = {"probe": torch.tensor([3]), "precision": torch.tensor([10.0])}
    tied = {"chosen": torch.tensor([0, 2]), **probe}
    assert same_selection(tied, {"variance": variance}) == pytest.approx(0, abs=1e-6)
    worse = {"chosen": torch.tensor([0, 3]), **probe}
    assert same_selection(worse, {"variance": variance}) == pytest.approx(0.8)
    off = variance * torch.tensor([1.0, 1.0, 1.0, 2.0])  # the ranks stay
    assert same_selection(tied, {"variance": off}) == pytest.approx(1.0)


def test_batch_sizes_are_chosen_for_fit_and_predict_apart() -> None:
    seconds = {8: (3.0, 1.0), 32: (2.0, 2.0)}

    def backend(request: Request) -> Any:
        return result(*seconds[request.batches[0]])

    found = plan(TOY, "good", fake(good=backend))
    assert found == Plan(TOY, (32, 8))


def test_larger_batches_are_not_tried_where_memory_ran_out() -> None:
    case = replace(TOY, batch_sizes=(8, 16, 24))

    def backend(request: Request) -> Any:
        return result() if request.batches[0] == 8 else "out of memory"

    run = fake(good=backend)
    assert plan(case, "good", run) == Plan(case, (8, 8))
    assert [request.batches[0] for request in run.requests] == [8, 16]


def test_a_slow_backend_is_measured_on_the_trial_data() -> None:
    case = replace(TOY, num_data=1000, num_predict=1000, trial_size=10)
    found = plan(case, "good", fake(good=result(fit=2.0, predict=2.0)))
    assert isinstance(found, Plan)
    assert (found.case.num_data, found.case.num_predict) == (10, 10)


def script(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("pass", None),
        ("raise SystemExit('ValueError: no')", "ValueError: no"),
        ("raise MemoryError", "out of memory"),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL"),
        ("import time; time.sleep(60)", "no answer in 1 s"),
    ],
)
def test_a_process_that_fails_says_why(code: str, reason: str | None) -> None:
    assert failure(script(code), 1.0) == reason


@pytest.fixture(scope="module")
def toy() -> Case:
    return CASES["toy"].smaller(20)


def answer(module: Any, case: Case, side: str) -> dict[str, Any]:
    task = Task(case, side, prepare.prepare(case), 8, 4)
    return measure(module.WORKS, task, Meter())


@pytest.mark.parametrize("work", ["fit-predict", "predict"])
def test_both_sides_agree_on_the_toy(toy: Case, work: Any) -> None:
    case = replace(toy, work=work)
    mine = answer(ours, case, "ours")
    theirs = answer(laplace_torch, case, "CurvlinopsGGN")
    assert same_numbers(mine["values"], theirs["values"]) < case.tolerance
    assert mine["seconds"].keys() == theirs["seconds"].keys()
    assert mine["memory"] < mine["whole_memory"]


class Watching(Meter):
    """Writes down how often a network had run when each part began."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.runs, self.before = 0, dict[str, int]()
        net.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.runs += 1

    def time(self, part: str, function: Any) -> Any:
        self.before[part] = self.runs
        return super().time(part, function)

    def __deepcopy__(self, memo: object) -> Watching:
        return self  # a copied network's runs count, too


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("side", [(ours, "ours"), (laplace_torch, "CurvlinopsGGN")])
def test_nothing_runs_before_a_first_fit(toy: Case, side: Any, cold: bool) -> None:
    module, name = side
    prepared = prepare.prepare(toy)
    meter = Watching(prepared.net)
    measure(module.WORKS, Task(toy, name, prepared, 8, 4, cold=cold), meter)
    assert (meter.before["fit"] == 0) == cold


def test_both_sides_agree_on_tuning_the_prior(toy: Case) -> None:
    case = replace(toy, work="prior-tuning")
    mine = answer(ours, case, "ours")
    theirs = answer(laplace_torch, case, "100 values")
    assert mine["values"]["log_determinant"].shape == (100,)
    assert same_numbers(mine["values"], theirs["values"]) < case.tolerance
    assert mine["seconds"].keys() == theirs["seconds"].keys() == {"fit"}


def test_the_floor_is_measured_and_leaves_no_hook() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    assert passes_seconds(net, torch.rand(5, 3)) > 0
    assert not net[0]._forward_hooks
    assert product_rate() > 0


def test_inputs_at_a_kink_are_left_out() -> None:
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    with torch.no_grad():
        net[0].weight.fill_(1.0)
        net[0].bias.fill_(-0.5)
    x = torch.tensor([[0.25], [0.5], [0.75]])
    generator = torch.Generator().manual_seed(0)
    assert prepare.smooth(net, x, generator).tolist() == [True, False, True]


def test_every_case_is_on_the_command_line() -> None:
    assert set(parse([]).cases) == set(CASES) - {"toy", "paper-size", "large-factor"}
    assert parse(["--cases", "toy"]).cases == ["toy"]
    assert parse(["--cold"]).cold
    assert parse(["--backends"]).backends == []
    with pytest.raises(SystemExit, match="2"):
        parse(["--backends", "curvlinops"])


def test_adapters_alone_are_trained_and_heard() -> None:
    net = networks.vit_adapters().eval()
    weights = [weight for weight in net.parameters() if weight.requires_grad]
    assert sum(weight.numel() for weight in weights) == 6144
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        before = net(x)
        for weight in weights:
            weight.add_(1.0)
        assert not torch.allclose(net(x), before)


def test_gradients_of_linearized_models_are_of_one_density() -> None:
    ways = hybrid_gradient.potentials(hybrid_gradient.small())
    plain, at = ways["linearized hybrid, any kernel"]
    held, _ = ways["linearized hybrid, its nuts()"]
    torch.testing.assert_close(held(at), plain(at))


def test_a_prediction_is_timed_beside_what_gives_the_same_numbers() -> None:
    model, posterior, x = small_calls.fitted(1)
    (gradients,) = small_calls.gradients_of(model, posterior, x[:1])
    row = torch.cat([part.flatten() for part in gradients])[posterior.subnet.flat]
    covariance = posterior.get_posterior().covariance_matrix
    found = posterior.output_distribution(x[:1]).variance
    torch.testing.assert_close(found.squeeze(), row @ covariance @ row)


def test_ranks_of_a_fit_are_timed() -> None:
    """Two ranks of one thread, whose fit is a process's of its own."""
    assert 0.0 < distributed.measured(2, 1, "toy") < 60.0


def test_a_slope_is_that_of_the_largest_sizes() -> None:
    assert scaling.slope([1, 10, 100, 1000], [50.0, 1.0, 10.0, 100.0]) == 1.0


@pytest.mark.slow
def test_growth_is_measured_and_drawn_with_its_slopes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each size in a process of its own."""
    sizes = [(n, replace(CASES["toy"], num_data=n)) for n in (8, 16)]
    scaling.draw_scaling(tmp_path / "growth.png", [scaling.Curve("N", sizes)])
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].split() for line in said[:2]] == [
        ["N", "8"],
        ["N", "16"],
    ]
    assert [line.split(":")[0].strip() for line in said[2:]] == [
        "fit",
        "predict",
        "passes alone",
        "fit",
        "predict",
    ]
    assert (tmp_path / "growth.png").stat().st_size > 0
