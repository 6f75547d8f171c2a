"""CIFAR-10 under the four corruptions of the published figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.task import Row, Settings, Task
from benchmarks.paper.images.corrupted import all_tests, corruption_table
from benchmarks.paper.images.corruptions import SEVERITIES
from benchmarks.paper.images.evaluation import image_tasks, near_own_prior, on_shift
from benchmarks.paper.images.methods import DEFAULT
from benchmarks.paper.images.reporting import lines, picture

NAME = "cifar10"
METHODS = (
    "MAP",
    "MAP with temperature",
    "SWAG",
    DEFAULT,
    "subnet LargestVariance",
    "subnet LargestVariance (SWAG)",
    "subnet RandomSubnet",
    "subnet LastLayer",
    "ELLA",
    "last layer, Kronecker (laplace-torch)",
)


def tasks(settings: Settings) -> list[Task]:
    """One network a seed."""
    methods = (*METHODS, *near_own_prior(METHODS), *on_shift(METHODS))
    return image_tasks(NAME, settings, ("cifar10",), methods, all_tests)


def report(rows: Sequence[Row], folder: Path) -> str:
    """Tables of means over severities, and a picture."""
    at = [(float(severity), f"*={severity}") for severity in SEVERITIES]
    path, label = folder / "corrupted-cifar10.png", "severity; mean over corruptions"
    drawn = picture(lines(rows, at), path, label)
    title = "CIFAR-10, mean over severities"
    return "\n\n".join([corruption_table(rows, title), drawn])
