"""A ResNet-18 with subnets of 42,438 of its weights, as the paper has, on CIFAR-10."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.task import Row, Settings, Task
from benchmarks.paper.images.corrupted import all_tests, corruption_table
from benchmarks.paper.images.evaluation import image_tasks, near_own_prior, on_shift
from benchmarks.paper.images.methods import DEFAULT

NAME = "resnet18"
METHODS = (
    "MAP",
    "MAP with temperature",
    DEFAULT,
    "subnet LargestVariance (SWAG)",
    "subnet LastLayer",
    "subnet PredictiveVariance",
)


def tasks(settings: Settings) -> list[Task]:
    """One network a seed."""
    methods = (*METHODS, *near_own_prior(METHODS), *on_shift(METHODS))
    return image_tasks(NAME, settings, (NAME,), methods, all_tests)


def report(rows: Sequence[Row], folder: Path) -> str:
    """Tables of means over severities."""
    return corruption_table(rows, "CIFAR-10 with a ResNet-18, mean over severities")
