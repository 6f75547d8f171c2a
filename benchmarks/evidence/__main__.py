"""Measures ways to a prior and a noise, or makes the tables of what was measured."""

from __future__ import annotations

import sys

from benchmarks.evidence import looks
from benchmarks.evidence.measure import NAME, tasks
from benchmarks.evidence.report import report
from benchmarks.harness.command import main
from benchmarks.harness.task import Experiment

EXPERIMENTS = {
    NAME: Experiment(tasks, report),
    looks.NAME: Experiment(looks.tasks, looks.report),
}

if __name__ == "__main__":
    sys.exit(main("benchmarks.evidence", EXPERIMENTS))
