"""CIFAR-10 under the four corruptions of the published figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.task import Row, Settings, Task
from benchmarks.paper.images.corrupted import corruption_report, named_tests
from benchmarks.paper.images.evaluation import image_tasks, near_own_prior, on_shift

NAME = "cifar10"
METHODS = (
    "MAP",
    "MAP with temperature",
    "SWAG",
    "subnet LargestVariance",
    "subnet LargestVariance (SWAG)",
    "subnet LargestVariance (alive)",
    "subnet RandomSubnet",
    "subnet LastLayer",
    "subnet PredictiveVariance",
    "ELLA",
    "last layer, Kronecker (laplace-torch)",
)


def tasks(settings: Settings) -> list[Task]:
    """One network a seed."""
    methods = (*METHODS, *near_own_prior(METHODS), *on_shift(METHODS))
    return image_tasks(NAME, settings, ("cifar10",), methods, named_tests)


def report(rows: Sequence[Row], folder: Path) -> str:
    """Tables and a picture."""
    return corruption_report(rows, folder, "cifar10", "CIFAR-10")
