"""What an experiment is made of: tasks, each of which runs methods and scores them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

Scale = Literal["smoke", "small", "paper"]
Row = dict[str, Any]  # of the journal


class Score(NamedTuple):
    """One number.

    Attributes:
        shift: Of the data; ``""`` in distribution, ``"rotation=30"``, ``"gap"``, ...
        metric: ``"nll"`` (nats), ``"error"``, ``"rmse"`` (in the target's unit), ...
        value: It.
    """

    shift: str
    metric: str
    value: float


@dataclass(frozen=True, eq=False)
class Task:
    """One network on one data set at one seed.

    Attributes:
        experiment: Its name on the command line.
        dataset: The data, and how they were split.
        seed: Of all that is random, or the number of the split.
        variant: The network; ``""`` where there is one.
        methods: What is to be run, in this order.
        run: Given the methods that are still to do, yields each with its scores as
            soon as it is finished. Reads the data: a list of tasks costs nothing.
    """

    experiment: str
    dataset: str
    seed: int
    variant: str
    methods: tuple[str, ...]
    run: Callable[[Sequence[str]], Iterator[tuple[str, list[Score]]]]

    @property
    def name(self) -> tuple[str, str, int, str]:
        """What tells it from all others."""
        return self.experiment, self.dataset, self.seed, self.variant


@dataclass(frozen=True)
class Settings:
    """What the command line chose.

    Attributes:
        data_dir: The folder of the data sets; None where none was named.
        out: The folder of results and of trained networks.
        scale: How much is done.
        seeds: How many seeds, or splits.
        first: The first of them.
        device: To run on.
    """

    data_dir: Path | None
    out: Path
    scale: Scale = "small"
    seeds: int = 3
    first: int = 0
    device: str = "cpu"

    @property
    def numbers(self) -> range:
        """The seeds, or splits, that are run."""
        return range(self.first, self.first + self.seeds)


class Experiment(NamedTuple):
    """One of the paper's experiments.

    Attributes:
        tasks: All tasks of it, the same list in every process.
        report: From its rows, tables in Markdown; pictures go to the folder.
    """

    tasks: Callable[[Settings], list[Task]]
    report: Callable[[Sequence[Row], Path], str]
