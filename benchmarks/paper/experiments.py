"""The experiments by name."""

from __future__ import annotations

from benchmarks.paper import toy, toy_report, uci, uci_report
from benchmarks.paper.task import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    "toy": Experiment(toy.tasks, toy_report.report),
    "uci": Experiment(uci.tasks, uci_report.report),
}
