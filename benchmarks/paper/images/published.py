"""The figures that others publish for images, each beside ours.

They come from a table of third parties, which names neither a network nor the severity
of a corruption: ours stand beside them with both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from benchmarks.harness.reporting import table
from benchmarks.harness.task import Row
from benchmarks.paper.images.case import BY_EVIDENCE, OWN_PRIOR
from benchmarks.paper.images.corruptions import SEVERITIES
from benchmarks.paper.images.methods import DEFAULT
from benchmarks.paper.images.reporting import Column, cell

# The MAP, ours, the paper's rule, and the usual baseline: under the prior of the MAP
# where it was run, since that is what nothing was tuned for.
_METHODS = {
    "MAP": ("MAP",),
    "default": (f"{DEFAULT}{OWN_PRIOR}",),
    "by evidence": (f"{DEFAULT}{BY_EVIDENCE}",),
    "LargestVariance": (f"subnet LargestVariance{OWN_PRIOR}", "subnet LargestVariance"),
    "LastLayer": (f"subnet LastLayer{OWN_PRIOR}", "subnet LastLayer"),
}


class Figure(NamedTuple):
    """A published NLL, nats.

    Attributes:
        title: As the table has it.
        value: It.
        experiment: Of ours; None where there are no data.
        dataset: Of ours.
        shift: The corruption; ``""`` in distribution.
        severities: Those at which ours is shown.
    """

    title: str
    value: float
    experiment: str | None = None
    dataset: str = ""
    shift: str = ""
    severities: tuple[int, ...] = (0,)


# MNIST-C was released at one severity a corruption.
FIGURES = (
    Figure("FashionMNIST", 0.286, "fashion", "fashion"),
    Figure("ImageNet-10", 0.277),
    Figure("CIFAR-10", 0.289, "cifar10", "cifar10"),
    *(
        Figure(f"CIFAR-10-C, {title}", value, "cifar10", "cifar10", shift, SEVERITIES)
        for title, shift, value in (
            ("brightness", "brightness", 0.344),
            ("elastic", "elastic", 0.527),
            ("blur", "gaussian blur", 0.354),
            ("impulse noise", "impulse noise", 1.861),
        )
    ),
    Figure("MNIST-C, brightness", 0.1, "corrupted", "mnist", "brightness", (5,)),
)


def report(rows: Mapping[str, Sequence[Row]]) -> str:
    """One table of all of them.

    Args:
        rows: Of each experiment, by its name.

    Returns:
        The table, in Markdown.
    """
    heads = ["data", "published", "severity", "network", "seeds", *_METHODS]
    lines = [line for figure in FIGURES for line in _lines(figure, rows)]
    title = "Third-party figures, whose table names no network and no severity (NLL)"
    return table(title, heads, lines)


def _lines(figure: Figure, rows: Mapping[str, Sequence[Row]]) -> Iterator[list[str]]:
    head = [figure.title, f"{figure.value:.3f}"]
    own = [
        row
        for row in rows.get(figure.experiment or "", ())
        if row["dataset"] == figure.dataset
    ]
    if not own:
        words = "not run: no data" if figure.experiment is None else "not run"
        yield [*head, "-", words, *["-"] * (1 + len(_METHODS))]
    for severity in figure.severities if own else ():
        shift = f"{figure.shift}={severity}" if severity else ""
        there = {row["method"] for row in own}
        cells = []
        for names in _METHODS.values():
            name = next((name for name in names if name in there), "")
            cells.append(cell(own, name, Column(shift, "nll")))
        (network,) = {row["variant"] for row in own}
        seeds = len({row["seed"] for row in own})
        yield [*head, str(severity or "-"), network, str(seeds), *cells]
