"""The measured table of selectors: its readers, and both experiments at a tiny size."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.harness.reporting import mean_and_error
from benchmarks.selectors import __main__ as command
from benchmarks.selectors.data import digits_split, gap_features, uci_split
from benchmarks.selectors.measure import Plan, fit, run, variance
from benchmarks.selectors.methods import FULL, MAP, METHODS
from benchmarks.selectors.network import sgd_moments, train
from benchmarks.selectors.report import ranks
from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.comparison.compare import compare_subnets
from pyro_subnet.nn import init_to_module
from pyro_subnet.selection import LargestGradient

TINY = ["--num-hidden", "4", "--num-steps", "20", "--seeds", "1", "--most", "30"]


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
    upright, turned = (tests[name][0].unflatten(1, (8, 8)) for name in ("0", "90"))
    torch.testing.assert_close(turned, upright.rot90(1, (1, 2)))


def test_tilted_digits_are_held_out_at_each_tilt() -> None:
    upright, tilted = (digits_split(0, (0,), tilted=flag) for flag in (False, True))
    count = len(upright.held_out[1])
    x, y = (part.unflatten(0, (5, count)) for part in tilted.held_out)
    torch.testing.assert_close(x[2], upright.held_out[0])
    torch.testing.assert_close(y, upright.held_out[1].expand(5, -1))
    torch.testing.assert_close(tilted.train[0], upright.train[0])


def test_both_experiments_run_and_resume(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    uci = ["uci", "--data-dir", str(folder), "--sets", "set", "--out", str(out), *TINY]
    digits = ["digits", "--out", str(out), *TINY]
    few = ["--methods", "LargestVariance ggn"]
    command.main([*uci, "--noise", "held-out", *few])
    command.main([*digits, *few])
    first = out.read_text()
    rows = [json.loads(line) for line in first.splitlines()]
    assert [row["kind"] for row in rows] == ["standard"] * 2 + ["gap"] * 2 + [
        "rotated"
    ] * 2
    assert not any("failed" in row for row in rows)
    command.main([*digits, *few])
    assert out.read_text() == first
    command.main(["report", str(out)])
    printed = capsys.readouterr().out
    assert "| LargestVariance ggn |" in printed
    assert "**Rotated digits, prior tuned on upright ones**" in printed


@pytest.mark.filterwarnings("ignore::pyro_subnet.exceptions.TuningWarning")
def test_every_method_runs(folder: Path) -> None:
    split = uci_split(folder, "set", "standard", 0)
    rows = list(run(split, Plan(num_hidden=4, num_steps=20, swag_steps=10), set()))
    assert [row["method"] for row in rows] == [MAP, *METHODS]
    assert not any("failed" in row for row in rows)
    assert all(math.isfinite(row["nll"]["test"]) for row in rows)


def test_the_share_kept_is_that_of_the_comparison(folder: Path) -> None:
    split = uci_split(folder, "set", "standard", 0)
    trained = train(split, 4, 20)
    full, _ = fit(trained, split, None)
    part, _ = fit(trained, split, LargestGradient(7))
    guide = AutoSubnetLaplace(trained.model, init_loc_fn=init_to_module(trained.net))
    x, _ = split.tests["test"]
    found = compare_subnets(
        guide, *split.train, selectors=[LargestGradient(7)], inputs={"test": x}
    )
    assert variance(part, x) / variance(full, x) == pytest.approx(
        found.rows[0].kept_variance, rel=1e-6
    )


def test_the_map_has_the_nll_of_its_network(folder: Path) -> None:
    split = uci_split(folder, "set", "standard", 0)
    plan = Plan(names=(FULL,), num_hidden=4, num_steps=20)
    at_map, full = run(split, plan, set())
    trained = train(split, 4, 20)
    x, y = split.tests["test"]
    errors = split.target_scale * (trained.net(x).squeeze(-1) - y).detach()
    noise = split.target_scale * trained.noise_scale
    nll = errors.square().mean() / (2 * noise**2) + math.log(noise)
    nll += math.log(2 * math.pi) / 2
    assert at_map["nll"]["test"] == pytest.approx(float(nll))
    rmse = float(errors.square().mean().sqrt())
    assert at_map["error"]["test"] == pytest.approx(rmse)
    assert full["error"]["test"] == pytest.approx(rmse)
    assert full["kept"]["test"] == pytest.approx(1.0)


def test_sgd_leaves_the_map_where_it_is(folder: Path) -> None:
    split = uci_split(folder, "set", "standard", 0)
    trained = train(split, 4, 20)
    before = [part.clone() for part in trained.net.parameters()]
    moments = sgd_moments(trained, split, 30)
    assert moments.count == 30
    assert bool((moments.variance > 0).any())
    for old, new in zip(before, trained.net.parameters(), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)


def test_ranks_and_errors() -> None:
    assert ranks({"a": 1.0, "b": 1.0, "c": 0.5}) == {"a": 2.5, "b": 2.5, "c": 1.0}
    assert mean_and_error([1.0, 3.0]) == "2.000 ± 1.000"
    assert mean_and_error([2.0]) == "2"


def test_a_folder_must_be_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(command.DATA, raising=False)
    with pytest.raises(SystemExit, match="2"):
        command.parse(["uci", "--out", "rows.jsonl"])
    assert command.DATA in capsys.readouterr().err
