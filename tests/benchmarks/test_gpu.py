"""The command for a machine with a GPU, small and on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from benchmarks.gpu import images
from benchmarks.paper.images.readers import ImageSet, Part

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
        timeout=600,
        env={**os.environ, "DEVICE": "cpu", "PYTHON": sys.executable, "WORKERS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "passed" in (out / "tests.txt").read_text()
    assert "the fit takes" in (out / "toy.txt").read_text()
    log = (out / "log.txt").read_text()
    assert "tests: exit status 0" in log
    assert "== done" in log


def part(count: int) -> Part:
    pixels = torch.randint(256, (count, 1, 28, 28), dtype=torch.uint8)
    return Part(pixels, torch.arange(count) % 10)


@pytest.mark.filterwarnings("ignore::pyro_subnet.exceptions.UntrainedWarning")
@pytest.mark.filterwarnings("ignore::pyro_subnet.exceptions.NoOutputVarianceWarning")
def test_the_network_is_trained_fitted_and_resumed(tmp_path: Path) -> None:
    """One epoch of ten images; a second call trains for no epoch more."""
    few = ImageSet("fashion", part(10), part(2), part(4))
    settings = images.Settings(tmp_path, 60.0, torch.device("cpu"), 8, 2, 1)
    said = images.run(few, settings)
    assert said[1].startswith("trained for 1 epochs")
    assert [line.split(":")[0] for line in said[4:]] == [
        "test",
        "test",
        "turned by 30 degrees",
        "turned by 30 degrees",
    ]
    again = images.run(few, settings)
    assert (tmp_path / "images.txt").read_text().splitlines() == said + again
    assert said[4] == again[4]  # the MAP of the file's network


def test_crops_are_parts_of_the_images() -> None:
    """Moved by whole pixels, and mirrored or not; what comes in is the border."""
    x = torch.zeros(50, 3, 32, 32)
    x[:, :, 10:20, 12:22] = 1.0
    crops = images.cropped(x)
    assert crops.shape == x.shape
    assert_close(crops.amax((1, 2, 3)), torch.ones(50))
    assert_close((crops == 1.0).sum((1, 2, 3)), torch.full((50,), 300))


def test_a_turn_moves_the_corners() -> None:
    x = torch.zeros(1, 3, 32, 32)
    x[:, :, 16, 28] = 1.0  # right of the centre, by twelve pixels
    turned = images.tilted(x)[0, 0]
    row, column = divmod(int(turned.argmax()), 32)
    distance = ((row - 15.5) ** 2 + (column - 15.5) ** 2) ** 0.5
    assert abs(distance - 12.5) < 1.5
    assert abs(row - 15.5) > 4
