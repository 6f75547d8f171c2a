"""MNIST under corruptions, at the severities at which MNIST-C was released."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.harness.task import Row, Settings, Task
from benchmarks.paper.images.corruptions import (
    CORRUPTIONS,
    RELEASED,
    SEVERITIES,
    corrupt,
)
from benchmarks.paper.images.evaluation import (
    PLAIN,
    Tests,
    image_tasks,
    in_distribution,
    near_own_prior,
    on_shift,
)
from benchmarks.paper.images.methods import ENSEMBLES
from benchmarks.paper.images.readers import ImageSet, Part
from benchmarks.paper.images.reporting import Column, has_curve, table
from benchmarks.paper.images.setups import Setup

NAME = "corrupted"


def tasks(settings: Settings) -> list[Task]:
    """MNIST at every seed."""
    methods = (*PLAIN, *near_own_prior(PLAIN), *on_shift((*PLAIN, *ENSEMBLES)))
    return image_tasks(NAME, settings, ("mnist",), methods, released_tests)


def released_tests(data: ImageSet, setup: Setup, data_dir: Path) -> Tests:
    """Each corruption at the severity of MNIST-C."""
    severities = {name: (severity,) for name, severity in RELEASED.items()}
    return Tests(corrupted(data, setup, severities), {})


def all_tests(data: ImageSet, setup: Setup, data_dir: Path) -> Tests:
    """Each corruption at every severity."""
    return Tests(corrupted(data, setup, dict.fromkeys(CORRUPTIONS, SEVERITIES)), {})


def corrupted(
    data: ImageSet, setup: Setup, severities: Mapping[str, Sequence[int]]
) -> Iterator[tuple[str, Part]]:
    """Some test images under each corruption, at its severities."""
    yield in_distribution(data, setup)
    part = data.test.some(setup.shifted)
    for name, wanted in severities.items():
        for severity in wanted:
            images = corrupt(part.images, name, severity)
            yield f"{name}={severity}", Part(images, part.labels)


def report(rows: Sequence[Row], folder: Path) -> str:
    """One table for each way of tuning."""
    return corruption_table(rows, "MNIST under corruptions")


def corruption_table(rows: Sequence[Row], title: str) -> str:
    """In distribution, each corruption, and all of them."""
    columns = [
        *(Column("", metric) for metric in ("nll", "error", "ece")),
        *(Column(f"{name}=*", "nll") for name in CORRUPTIONS),
        *(Column("*=*", metric) for metric in ("nll", "error", "ece")),
        Column("*=*", "nll", to_map=True),
        *([Column("*=*", "nll", to_temperature=True)] * has_curve(rows)),
    ]
    return table(title, columns, rows)
