"""FashionMNIST in distribution, with a larger network than the other experiments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.task import Row, Settings, Task
from benchmarks.paper.images.evaluation import (
    Tests,
    image_tasks,
    in_distribution,
    near_own_prior,
)
from benchmarks.paper.images.methods import DEFAULT
from benchmarks.paper.images.readers import ImageSet
from benchmarks.paper.images.reporting import Column, table
from benchmarks.paper.images.setups import Setup

NAME = "fashion"
METHODS = (
    "MAP",
    "MAP with temperature",
    DEFAULT,
    "subnet LargestVariance",
    "subnet LastLayer",
)


def tasks(settings: Settings) -> list[Task]:
    """One network a seed."""
    methods = (*METHODS, *near_own_prior(METHODS))
    return image_tasks(NAME, settings, ("fashion best",), methods, make_tests)


def make_tests(data: ImageSet, setup: Setup, data_dir: Path) -> Tests:
    """The test part alone."""
    return Tests(iter([in_distribution(data, setup)]), {})


def report(rows: Sequence[Row], folder: Path) -> str:
    """One table."""
    metrics = ("nll", "error", "ece", "brier", "scale")
    columns = [Column("", metric) for metric in metrics]
    columns.append(Column("", "nll", to_map=True))
    return table("FashionMNIST in distribution", columns, rows)
