"""The command for a machine with a GPU, small and on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_command_runs_where_there_is_no_card(tmp_path: Path) -> None:
    """Each stage leaves its table; nothing is installed where nothing is missing."""
    wheels, out = tmp_path / "wheels", tmp_path / "out"
    wheels.mkdir()
    # A package that is there: it is not installed a second time.
    (wheels / "pyro_ppl-1.9.2-py3-none-any.whl").touch()
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu" / "run.sh", wheels, out],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "DEVICE": "cpu", "PYTHON": sys.executable, "WORKERS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "passed" in (out / "tests.txt").read_text()
    assert "the fit takes" in (out / "toy.txt").read_text()
    assert "== done" in (out / "log.txt").read_text()
