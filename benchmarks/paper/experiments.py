"""The experiments by name."""

from __future__ import annotations

from benchmarks.paper.task import Experiment

EXPERIMENTS: dict[str, Experiment] = {}
