"""The program that torchrun starts, whole: two ranks make one process's posterior."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PATH = Path(__file__).resolve().parents[2] / "tutorials" / "torchrun_fit.py"


def test_two_ranks_end_as_one_process() -> None:
    """It fails by itself where they do not."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            PATH,
        ],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "2 ranks saw 1797 of 1797 digits" in done.stdout
    assert "one process: the same weights" in done.stdout
