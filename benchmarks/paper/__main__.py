"""Runs the paper's experiments, or makes the tables and pictures of what was run."""

from __future__ import annotations

import sys

from benchmarks.harness.command import main
from benchmarks.paper.experiments import EXPERIMENTS
from benchmarks.paper.summary import opening

if __name__ == "__main__":
    sys.exit(main("benchmarks.paper", EXPERIMENTS, opening=opening))
