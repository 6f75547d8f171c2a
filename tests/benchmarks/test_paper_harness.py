"""The harness of the paper's experiments: its journal, its runs, and its means."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks.harness import command, digest, looks, runner
from benchmarks.harness.journal import VERSIONS, Journal, key, read
from benchmarks.harness.reporting import (
    Cell,
    collected,
    counts,
    differences,
    estimate,
    pooled,
    shown,
    without_largest,
)
from benchmarks.harness.task import Experiment, Row, Score, Settings, Task
from benchmarks.paper.experiments import EXPERIMENTS
from benchmarks.paper.summary import opening
from pyro_subnet.plotting.style import strokes_of

ROOT = Path(__file__).resolve().parents[2]
SCORES = [Score("", "nll", 0.5), Score("gap", "nll", math.inf), Score("", "S", 3.0)]


def fails_after_the_first(methods: Sequence[str]) -> Iterator[tuple[str, list[Score]]]:
    yield methods[0], SCORES
    raise ValueError("no more")


def dummy(methods: Sequence[str]) -> Iterator[tuple[str, list[Score]]]:
    for method in methods:
        yield method, SCORES


# In a process of its own, as users run it: under pytest the package checks types at run
# time under pytest, which takes several times as long as these fits.
RUN = """
import sys, torch
from benchmarks.harness.command import main
from benchmarks.paper.experiments import EXPERIMENTS
from pyro_subnet.plotting.style import strokes_of

threads = torch.get_num_threads()
assert main("benchmarks.paper", EXPERIMENTS, sys.argv[1:]) == 0
assert torch.get_num_threads() == threads
"""


def run_apart(arguments: Sequence[str]) -> None:
    # What laplace-torch sets off when it is imported is not ours to mend.
    theirs = "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
    program = [sys.executable, "-W", "error", "-W", theirs, "-c", RUN]
    done = subprocess.run(
        [*program, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def task(run=dummy, seed: int = 0) -> Task:
    return Task("dummy", "set", seed, "", ("a", "b"), run)


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    tasks = [task(), task(seed=1)]
    made = Experiment(lambda settings: tasks, lambda rows, folder: f"{len(rows)} rows")
    monkeypatch.setitem(EXPERIMENTS, "dummy", made)
    return tasks


def uci_folder(folder: Path, num_data: int = 60) -> Path:
    """A set in the published layout, with two standard and two gap splits."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num_data, 2))
    table = np.column_stack(
        [x, 7 + 2 * np.sin(x[:, 0]) + 0.1 * rng.normal(size=len(x))]
    )
    own, gap = folder / "uci" / "yacht", folder / "uci_gap" / "yacht"
    own.mkdir(parents=True)
    gap.mkdir(parents=True)
    np.savetxt(own / "data.txt", table)
    np.savetxt(own / "index_features.txt", [0, 1], fmt="%d")
    np.savetxt(own / "index_target.txt", [2], fmt="%d")
    for index in range(2):
        order = rng.permutation(num_data)
        np.savetxt(own / f"index_train_{index}.txt", order[:-8], fmt="%d")
        np.savetxt(own / f"index_test_{index}.txt", order[-8:], fmt="%d")
        order = x[:, index].argsort()
        third = num_data // 3
        outer = np.r_[order[:third], order[2 * third :]]
        np.savetxt(gap / f"index_train_{index}.txt", outer, fmt="%d")
        np.savetxt(gap / f"index_test_{index}.txt", order[third : 2 * third], fmt="%d")
    return folder


def test_lines_say_all_that_tells_them_apart(tmp_path: Path) -> None:
    path = tmp_path / "new" / "dummy.jsonl"
    Journal(path, "small").write(task(), "a", SCORES, 1.23456)
    first, second, third = map(json.loads, path.read_text().splitlines())
    assert first == {
        "experiment": "dummy",
        "dataset": "set",
        "seed": 0,
        "variant": "",
        "method": "a",
        "scale": "small",
        "shift": "",
        "metric": "nll",
        "value": 0.5,
        "seconds": 1.235,
        "scores": 3,
        "versions": VERSIONS,
    }
    assert second["value"] == math.inf
    assert third["metric"] == "S"


def test_a_write_that_is_cut_anywhere_counts_as_none(tmp_path: Path) -> None:
    path = tmp_path / "dummy.jsonl"
    journal = Journal(path, "smoke")
    journal.write(task(), "a", SCORES, 0.0)
    whole = path.read_bytes()
    journal.write(task(), "b", SCORES, 0.0)
    both = path.read_bytes()
    for size in range(len(whole), len(both)):
        path.write_bytes(both[:size])
        assert {row["method"] for row in read(path)} == {"a"}
        again = Journal(path, "smoke")
        assert again.todo(task()) == ["b"]
        again.write(task(), "b", SCORES, 0.0)
        assert path.read_bytes() == both


def test_another_scale_is_another_run(tmp_path: Path) -> None:
    path = tmp_path / "dummy.jsonl"
    Journal(path, "smoke").write(task(), "a", SCORES, 0.0)
    assert Journal(path, "small").todo(task()) == ["a", "b"]
    assert Journal(path, "smoke").todo(task(seed=1)) == ["a", "b"]


def test_methods_that_no_task_has(tmp_path: Path, experiment: list[Task]) -> None:
    settings = Settings(None, tmp_path, "smoke", 2)
    with pytest.raises(ValueError, match=r"of dummy; got 'c'\. .* from: 'a', 'b'\."):
        runner.run({"dummy": EXPERIMENTS["dummy"]}, settings, runner.Only(["b", "c"]))
    with pytest.raises(ValueError, match=r"^Networks .* got '2x9'\. .* from: ''\."):
        runner.run(
            {"dummy": EXPERIMENTS["dummy"]}, settings, runner.Only(networks=["2x9"])
        )


def test_a_run_does_what_is_not_done(tmp_path: Path, experiment: list[Task]) -> None:
    settings = Settings(None, tmp_path, "smoke", 2)
    some = runner.Only(["b"], [""])
    assert runner.run({"dummy": EXPERIMENTS["dummy"]}, settings, some) == []
    assert runner.run({"dummy": EXPERIMENTS["dummy"]}, settings) == []
    rows = read(tmp_path / "dummy.jsonl")
    order = [key(row) for row in rows[:: len(SCORES)]]
    assert [(name[2], name[4]) for name in order] == [
        (0, "b"),
        (1, "b"),
        (0, "a"),
        (1, "a"),
    ]
    # And the seconds of each of the four.
    assert command.report(EXPERIMENTS, tmp_path) == f"{len(rows) + 4} rows"


def test_a_failure_is_told_and_costs_no_other_task(
    tmp_path: Path, experiment: list[Task], capsys: pytest.CaptureFixture[str]
) -> None:
    experiment[0] = task(fails_after_the_first)
    (failure,) = runner.run(
        {"dummy": EXPERIMENTS["dummy"]}, Settings(None, tmp_path, "smoke", 2)
    )
    assert "ValueError: no more" in failure
    done = {(row["seed"], row["method"]) for row in read(tmp_path / "dummy.jsonl")}
    assert done == {(0, "a"), (1, "a"), (1, "b")}


def test_data_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--data-dir"):
        EXPERIMENTS["uci"].tasks(Settings(None, tmp_path))
    with pytest.raises(FileNotFoundError, match="No set of UCI"):
        EXPERIMENTS["uci"].tasks(Settings(tmp_path, tmp_path))


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    data, out = uci_folder(tmp_path / "data"), tmp_path / "out"
    path = out / "uci.jsonl"
    arguments = ["uci", "--data-dir", str(data), "--out", str(out), "--seeds", "1"]
    arguments += ["--scale", "smoke", "--methods", "MAP", "subnet RandomSubnet"]
    arguments += ["--networks", "1x50"]
    program = [sys.executable, "-m", "benchmarks.paper", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        program, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
    )
    while not path.exists() or not path.stat().st_size:
        assert process.poll() is None, "it ended before it wrote"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = path.read_bytes()
    kept = len(read(path))
    run_apart(arguments)
    rows = read(path)
    assert path.read_bytes()[: len(before)].startswith(before[: before.rfind(b"\n")])
    found = {key(row) for row in rows}
    # A standard and a gap split; two methods each.
    assert len(found) == 4
    assert len({(*key(row), row["shift"], row["metric"]) for row in rows}) == len(rows)
    assert 0 < kept <= len(rows)


def test_tasks_have_names_of_their_own(tmp_path: Path) -> None:
    settings = Settings(uci_folder(tmp_path), tmp_path, "small", 2)
    for name in ("toy", "uci"):
        tasks = EXPERIMENTS[name].tasks(settings)
        assert len({each.name for each in tasks}) == len(tasks)
        for each in tasks:
            assert len(set(each.methods)) == len(each.methods)


def test_a_digest_holds_the_rows_to_six_digits(tmp_path: Path) -> None:
    path = tmp_path / "dummy.jsonl"
    for scale in ("smoke", "small"):
        journal = Journal(path, scale)
        for seed in range(2):
            journal.write(task(seed=seed), "a", [Score("", "nll", 1 / 3)], 2.5)
    journal.write(task(), "b", SCORES, 2.5)
    rows = read(path)
    digest.write(rows, tmp_path, "dummy")
    parts = ("dataset", "variant", "method", "shift", "metric", "seed", "scale")
    want = {tuple(each[part] for part in parts): each["value"] for each in rows}
    again = digest.read(tmp_path, "dummy")
    seconds = [each for each in again if each["metric"] == digest.SECONDS]
    assert [each["value"] for each in seconds] == [2.5] * 5
    assert len(again) == len(rows) + len(seconds)
    again = [each for each in again if each["metric"] != digest.SECONDS]
    for each in again:
        value = want[tuple(each[part] for part in parts)]
        assert each["value"] == pytest.approx(value, rel=1e-5)
    assert digest.read(tmp_path, "another") == []


def row(seed: int, method: str, value: float) -> Row:
    names = {"dataset": "set", "variant": "", "method": method}
    return {**names, "shift": "", "metric": "nll", "seed": seed, "value": value}


def test_estimates_are_means_and_standard_errors() -> None:
    values = [1.0, 2.0, 4.0]
    found = estimate(values)
    assert found is not None
    assert found.mean == pytest.approx(7 / 3)
    assert found.error == pytest.approx(statistics.stdev(values) / 3**0.5)
    assert shown(found, 2) == "2.33 ± 0.88"
    assert estimate([]) is None
    assert shown(estimate([])) == "-"


def test_pooled_sets_weigh_alike() -> None:
    groups = [[1.0, 3.0], [5.0, 5.0, 8.0], []]
    found = pooled(groups)
    assert found is not None
    assert found.mean == pytest.approx((2 + 6) / 2)
    assert found.error == pytest.approx(statistics.stdev([2.0, 6.0]) / 2**0.5)
    assert without_largest(groups) == estimate([2.0])
    assert without_largest([[-9.0], *groups]) == pooled(groups)


def test_differences_are_of_seeds_that_both_have() -> None:
    rows = [row(0, "a", 1.0), row(1, "a", 2.0), row(1, "b", 5.0), row(2, "b", 6.0)]
    a, b = (Cell("set", "", method, "", "nll") for method in "ab")
    assert differences(collected(rows), a, b) == [-3.0]
    assert counts([0.02, 0.005, -0.005, -0.02, -1.0]) == "1 / 2 / 2"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["toy", "uci"])
def test_all_methods_run_at_smoke_size(tmp_path: Path, name: str) -> None:
    data, out = uci_folder(tmp_path / "data"), tmp_path / "out"
    arguments = [name, "--out", str(out), "--data-dir", str(data), "--seeds", "1"]
    run_apart([*arguments, "--scale", "smoke"])
    rows = read(out / f"{name}.jsonl")
    tasks = EXPERIMENTS[name].tasks(Settings(data, out, "smoke", 1))
    assert len({key(each) for each in rows}) == sum(len(t.methods) for t in tasks)
    assert all(math.isfinite(each["value"]) for each in rows)
    text = command.report(EXPERIMENTS, out)
    assert text.count("**") >= 8
    pictures = [part.split(")")[0] for part in text.split("](")[1:]]
    assert pictures
    assert all((out / picture).stat().st_size > 1000 for picture in pictures)


def test_methods_look_like_those_of_the_package_and_like_no_other() -> None:
    same = {"subnet": "PredictiveVariance", "MAP": "MAP", "full": "full Laplace"}
    same["last layer"] = "subnet LastLayer"
    for name, stroke in strokes_of(same).items():
        assert looks.look(same[name]) == stroke.options()
    names = (*looks.FILLED, *looks.HOLLOW)
    points = [{**looks.look(name), "linestyle": ""} for name in names]
    assert all(points.count(found) == 1 for found in points)


PAPER = ROOT / "benchmarks" / "paper"


def test_the_tables_are_those_of_the_results_kept_here(tmp_path: Path) -> None:
    for path in (PAPER / "results").glob("*.digest.jsonl"):
        shutil.copy(path, tmp_path)
    found = command.report(EXPERIMENTS, tmp_path, opening)
    page = (PAPER / "results" / "tables.md").read_text()
    title, _, tables = page.partition("explain them.\n\n")
    assert title.startswith("# All tables")
    assert tables == f"{found}\n"


@pytest.mark.parametrize("page", ["README.md", "images.md"])
def test_the_findings_show_rows_that_were_measured(page: str) -> None:
    measured = set((PAPER / "results" / "tables.md").read_text().splitlines())
    shown_rows, in_results = [], False
    for line in (PAPER / page).read_text().splitlines():
        if line.startswith("**") and "**" in line[2:]:
            in_results = True  # the heading that the report gives a table
        elif line and not line.startswith("|"):
            in_results = False
        elif line and in_results:
            shown_rows.append(line)
    assert len(shown_rows) > 25
    assert [row for row in shown_rows if row not in measured] == []


@pytest.mark.parametrize(
    "page",
    [
        PAPER / "README.md",
        PAPER / "images.md",
        ROOT / "README.md",
        ROOT / "docs" / "benchmarks.md",
    ],
)
def test_numbers_with_errors_in_the_prose_are_those_of_the_tables(page: Path) -> None:
    """To the digit, but for the sign, which the words around may carry."""
    tables = (PAPER / "results" / "tables.md").read_text()
    lines = page.read_text().splitlines()
    prose = " ".join(line for line in lines if not line.startswith("|"))
    told = re.findall(r"\d+\.\d+ ± \d+\.\d+", " ".join(prose.split()))
    assert len(told) > 5
    assert [number for number in told if number not in tables] == []
