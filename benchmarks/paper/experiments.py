"""The experiments by name."""

from __future__ import annotations

from benchmarks.paper import toy, uci
from benchmarks.paper.task import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    "toy": Experiment(toy.tasks, lambda rows, out: ""),
    "uci": Experiment(uci.tasks, lambda rows, out: ""),
}
