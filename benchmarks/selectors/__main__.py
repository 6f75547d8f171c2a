"""Measures the selectors, or makes the tables and the picture of what was measured."""

from __future__ import annotations

import sys

from benchmarks.harness.command import main
from benchmarks.harness.task import Experiment
from benchmarks.selectors import noise
from benchmarks.selectors.measure import NAME, tasks
from benchmarks.selectors.report import report

EXPERIMENTS = {
    NAME: Experiment(tasks, report),
    noise.NAME: Experiment(noise.tasks, noise.report),
}

if __name__ == "__main__":
    sys.exit(main("benchmarks.selectors", EXPERIMENTS))
