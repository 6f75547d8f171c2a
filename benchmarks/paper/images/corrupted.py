"""MNIST under corruptions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.harness.task import Row, Settings, Task
from benchmarks.paper.images.corruptions import CORRUPTIONS, SEVERITIES, corrupt
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
from benchmarks.paper.images.reporting import Column, lines, picture, table
from benchmarks.paper.images.setups import Setup

NAME = "corrupted"
# Those of the published figures come first, on more images.
NAMED = ("brightness", "elastic", "gaussian blur", "impulse noise")
_FEWER = 4


def tasks(settings: Settings) -> list[Task]:
    """MNIST at every seed."""
    methods = (*PLAIN, *near_own_prior(PLAIN), *on_shift((*PLAIN, *ENSEMBLES)))
    return image_tasks(NAME, settings, ("mnist",), methods, all_tests)


def all_tests(data: ImageSet, setup: Setup, data_dir: Path) -> Tests:
    """Every corruption."""
    return Tests(corrupted(data, setup, tuple(CORRUPTIONS)), {})


def named_tests(data: ImageSet, setup: Setup, data_dir: Path) -> Tests:
    """Those of the published figures."""
    return Tests(corrupted(data, setup, NAMED), {})


def corrupted(
    data: ImageSet, setup: Setup, names: Sequence[str]
) -> Iterator[tuple[str, Part]]:
    """Some test images under each corruption at each severity."""
    yield in_distribution(data, setup)
    for name in names:
        count = setup.shifted if name in NAMED else max(1, setup.shifted // _FEWER)
        part = data.test.some(count)
        for severity in SEVERITIES:
            images = corrupt(part.images, name, severity)
            yield f"{name}={severity}", Part(images, part.labels)


def report(rows: Sequence[Row], folder: Path) -> str:
    """Tables of severity 5 and of the mean over severities, and a picture."""
    return corruption_report(rows, folder, "mnist", "MNIST under corruptions")


def corruption_report(
    rows: Sequence[Row], folder: Path, dataset: str, title: str
) -> str:
    """Of one set."""
    own = [row for row in rows if row["dataset"] == dataset]
    shown = {row["shift"].partition("=")[0] for row in own}
    names = [name for name in CORRUPTIONS if name in shown]
    columns = [
        *(Column("", metric) for metric in ("nll", "error", "ece")),
        *(Column(f"{name}=*", "nll") for name in NAMED),
        *(Column("*=*", metric) for metric in ("nll", "error", "ece")),
        Column("*=*", "nll", to_map=True),
    ]
    parts = [table(f"{title}, mean over severities", columns, own)]
    columns = [Column(f"{name}=5", "nll") for name in NAMED]
    parts.append(table(f"{title}, severity 5", columns, own))
    if len(names) > len(NAMED):
        columns = [Column(f"{name}=*", "nll") for name in names]
        parts.append(table(f"{title}, each", columns, own))
    at = [(float(severity), f"*={severity}") for severity in SEVERITIES]
    path = folder / f"corrupted-{dataset}.png"
    label = "severity; mean over corruptions"
    parts.append(picture(lines(own, at), path, label))
    return "\n\n".join(parts)
