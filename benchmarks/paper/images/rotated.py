"""Rotated MNIST and FashionMNIST, and each as the other's out-of-distribution data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.harness.task import Row, Settings, Task
from benchmarks.paper.images.evaluation import (
    PLAIN,
    Tests,
    image_tasks,
    in_distribution,
    near_own_prior,
    on_shift,
    rotated,
)
from benchmarks.paper.images.methods import ENSEMBLES, SIZES
from benchmarks.paper.images.readers import ImageSet, Part, read_images
from benchmarks.paper.images.reporting import (
    Block,
    Column,
    has_curve,
    lines,
    picture,
    side_by_side,
    table,
)
from benchmarks.paper.images.setups import Setup

NAME = "rotated"
DEGREES = tuple(range(0, 181, 15))
_OTHER = {"mnist": "fashion", "fashion": "mnist"}


def tasks(settings: Settings) -> list[Task]:
    """Both sets at every seed."""
    # Five times the paper's S has no room.
    sizes = () if settings.scale == "paper" else tuple(SIZES)
    shown = on_shift((*PLAIN, *ENSEMBLES, *sizes))
    methods = (*PLAIN, *near_own_prior(PLAIN), *shown)
    return image_tasks(NAME, settings, tuple(_OTHER), methods, make_tests)


def make_tests(data: ImageSet, setup: Setup, data_dir: Path) -> Tests:
    """Some test images at every angle, and some of the other set."""
    some = data.test.some(setup.shifted)

    def shifts() -> Iterator[tuple[str, Part]]:
        yield in_distribution(data, setup)
        for degrees in DEGREES:
            images = rotated(some.images, degrees)
            yield f"rotation={degrees}", Part(images, some.labels)

    other = _OTHER[data.name]
    outside = read_images(other, data_dir).test.some(setup.shifted).images
    return Tests(shifts(), {other: outside})


def report(rows: Sequence[Row], folder: Path) -> str:
    """Tables by set, and NLL by angle as pictures."""
    parts, sides = [], []
    for name, other in _OTHER.items():
        own = [row for row in rows if row["dataset"] == name]
        if not own:
            continue
        columns = [
            Column("rotation=*", "nll", to_map=True),
            Column("", "nll", to_map=True),
            *([Column("rotation=*", "nll", to_temperature=True)] * has_curve(own)),
            Column(f"ood={other}", "auroc"),
        ]
        sides.append(Block(f"{name}:", columns, own))
        metrics = ("nll", "error", "ece", "brier")
        columns = [Column(shift, m) for shift in ("", "rotation=*") for m in metrics]
        parts.append(table(f"{name}, upright and turned", columns, own))
        at = [(float(degrees), f"rotation={degrees}") for degrees in DEGREES]
        found = lines(own, at)
        parts.append(
            picture(found, folder / f"rotated-{name}.png", "rotation, degrees")
        )
    summary = side_by_side("Rotations, their price in distribution, AUROC", sides)
    return "\n\n".join([summary, *parts])
