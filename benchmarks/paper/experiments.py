"""The experiments by name."""

from __future__ import annotations

from benchmarks.harness.task import Experiment
from benchmarks.paper import toy, toy_report, uci, uci_report
from benchmarks.paper.images import cifar10, corrupted, fashion, resnet18, rotated

EXPERIMENTS: dict[str, Experiment] = {
    "toy": Experiment(toy.tasks, toy_report.report),
    "uci": Experiment(uci.tasks, uci_report.report),
    "rotated": Experiment(rotated.tasks, rotated.report),
    "corrupted": Experiment(corrupted.tasks, corrupted.report),
    "fashion": Experiment(fashion.tasks, fashion.report),
    "cifar10": Experiment(cifar10.tasks, cifar10.report),
    "resnet18": Experiment(resnet18.tasks, resnet18.report),
}
