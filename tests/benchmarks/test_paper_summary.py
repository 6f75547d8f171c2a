"""The one table and picture of the paper's experiments, from rows made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.image import imread

from benchmarks.harness.digest import SECONDS
from benchmarks.harness.task import Row
from benchmarks.paper import of_today, summary, toy, uci
from benchmarks.paper.images.case import (
    BY_EVIDENCE,
    CURVE,
    ON_SHIFT,
    OWN_PRIOR,
    at_temperature,
)
from benchmarks.paper.images.methods import DEFAULT


def row(dataset: str, method: str, shift: str, value: float, **more: object) -> Row:
    common = {"variant": "cnn", "metric": "nll", "seed": 0}
    own = {"dataset": dataset, "method": method, "shift": shift, "value": value}
    return {**common, **own, **more}


def images(dataset: str) -> list[Row]:
    """Temperature t costs (t - 1) / 10 upright, and gains t - 1 of 5 turned."""
    found = []
    for seed in range(2):
        values = {
            "MAP": (0.1, 5.0),
            f"{DEFAULT}{OWN_PRIOR}": (0.2, 3.0 + seed),
            f"{DEFAULT}{BY_EVIDENCE}": (0.1, 4.0),
            f"{DEFAULT}{ON_SHIFT}": (0.15, 2.0),
        }
        for method, (inside, turned) in values.items():
            found += [
                row(dataset, method, "", inside, seed=seed),
                row(dataset, method, "rotation=0", turned, seed=seed),
                row(dataset, method, "rotation=90", turned, seed=seed),
            ]
        for t in CURVE:
            metric = at_temperature(t)
            inside, turned = 0.1 + (t - 1) / 10, 5.0 - (t - 1)
            found += [
                row(dataset, "MAP", "", inside, metric=metric, seed=seed),
                row(dataset, "MAP", "rotation=90", turned, metric=metric, seed=seed),
            ]
    return found


def cells(rows: summary.Rows, folder: Path) -> dict[str, list[str]]:
    """The table's cells after the first, by it."""
    text = summary.report(rows, folder)
    lines = [
        line.strip("| ").split(" | ") for line in text.splitlines() if "| " in line
    ]
    return {line[0]: line[1:] for line in lines}


def test_images_are_held_against_the_temperature_of_the_defaults_price(
    tmp_path: Path,
) -> None:
    found = cells({"rotated": images("mnist") + images("fashion")}, tmp_path)
    turned = found["FashionMNIST, turned by 0 to 180 degrees"]
    assert turned[0] == "5.000 ± 0.000"
    # Of 3 and 4, on two seeds: gains of 2 and 1.
    assert turned[1] == "+1.500 ± 0.500"
    assert turned[2:4] == ["+1.000 ± 0.000", "-"]
    # A price of 0.1 is that of the temperature 2, which gains 1.
    gain, error = map(float, turned[4].split(" ± "))
    assert gain == pytest.approx(1.0, abs=1e-3)
    assert error == pytest.approx(0.0, abs=1e-3)
    assert found["MNIST, upright"][1] == "-0.100 ± 0.000"
    picture = tmp_path / "gain-and-price.png"
    assert imread(picture).std() > 0


def test_regression_counts_sets_as_units(tmp_path: Path) -> None:
    network = uci.ENDS[1]
    likelihoods = {
        "MAP": (-2.0, -1.0),
        f"{uci.DEFAULT}{uci.OWN_PRIOR}": (-1.5, -1.0),
        uci.MAP_NOISE: (-1.75, -1.25),
    }
    rows = [
        row(
            name,
            method,
            "",
            value,
            metric="log_likelihood",
            variant=network,
            seed=seed,
        )
        for method, values in likelihoods.items()
        for name, value in zip(("yacht", "energy"), values, strict=True)
        for seed in range(3)
    ]
    found = cells({"uci": rows}, tmp_path)["2 UCI sets, standard splits"]
    assert found[:2] == ["-", "+0.250 ± 0.250"]
    assert found[4] == "+0.000 ± 0.250"


def test_the_toy_is_scored_in_the_gap_and_at_the_data(tmp_path: Path) -> None:
    rows = [
        row("clusters", method, shift, value, variant="2x50 tanh", seed=seed)
        for method, values in {"MAP": (30.0, -0.8), toy.EVIDENCE: (2.0, -0.9)}.items()
        for shift, value in zip(("gap", ""), values, strict=True)
        for seed in range(2)
    ]
    found = cells({"toy": rows}, tmp_path)
    assert found["one-dimensional toy, in the gap"][2] == "+28.000 ± 0.000"
    assert found["one-dimensional toy, at the data"][2] == "+0.100 ± 0.000"


def test_rivals_stand_beside_the_default_under_shift_with_their_seconds() -> None:
    network, default = uci.ENDS[1], f"{uci.DEFAULT}{uci.OWN_PRIOR}"
    rows = [
        row("yacht/gap", method, "gap", value, metric="log_likelihood", seed=seed)
        for method, values in {
            "MAP": (-4.0, -4.0),
            default: (-1.0, -2.0),
            "ELLA": (-1.5, -3.5),
        }.items()
        for seed, value in enumerate(values)
    ]
    rows += [
        row("yacht/gap", method, "", value, metric=SECONDS, seed=seed)
        for method, value in {default: 2.0, "ELLA": 9.0}.items()
        for seed in range(2)
    ]
    rows = [{**each, "variant": network} for each in rows]
    turned = {f"{DEFAULT}{OWN_PRIOR}": (1.0, 3.0), "VaLLA": (2.0, 6.0)}
    for method, values in turned.items():
        for angle, value in zip((0, 90), values, strict=True):
            rows.append(row("mnist", method, f"rotation={angle}", value))
    rows.append(row("mnist", "VaLLA", "", 9.0))
    rows.append(row("mnist", "VaLLA", "", 70.0, metric="seconds_fit"))
    by_name = {"uci": rows, "rotated": rows}
    lines = of_today.report(by_name).splitlines()[4:]
    assert lines == [
        "| yacht, gap splits | +1.000 ± 0.500 | - | 2 | 9 | - |",
        "| MNIST, turned by 0 to 180 degrees | - | +2.000 | - | - | 70 |",
    ]
    assert (
        of_today.report({"uci": [each for each in rows if each["method"] == "MAP"]})
        == ""
    )
