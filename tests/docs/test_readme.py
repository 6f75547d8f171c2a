"""The README's examples run as they stand, and its pictures and files exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from tests.tolerances import tolerance

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROSE = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
SWAP, MODEL, PRETRAINED = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def run(code: str, **names: Any) -> dict[str, Any]:
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_the_swap_takes_ten_lines() -> None:
    lines = [line for line in SWAP.splitlines() if line and "import" not in line]
    assert len(lines) <= 10


def test_the_swap_predicts() -> None:
    names = run("import pyro\n" + MODEL)
    names = run(SWAP, **names)
    posterior, draws, x_test = names["posterior"], names["draws"], names["x_test"]
    assert posterior.subnet.num_params == 152
    assert posterior.subnet.size == 8
    assert draws["y"].shape == (500, len(x_test))
    # The network has learned the sine where there are data, and the mean of the draws
    # is the MAP's output.
    inside = x_test.squeeze(-1).abs() < 1.8
    sine = torch.sin(2 * x_test).squeeze(-1)
    assert (draws["y"].mean(0) - sine)[inside].abs().max() < 0.2


def test_a_pretrained_network_needs_no_training() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )
    images, labels = torch.randn(20, 1, 6, 6), torch.randint(3, (20,))
    net(images)
    loader = DataLoader(TensorDataset(images, labels), batch_size=8)
    names: dict[str, Any] = {"net": net, "loader": loader, "images": images}
    names = run(
        MODEL.split("class Network")[0] + "import pyro\n" + SWAP_IMPORTS, **names
    )
    names = run(PRETRAINED, **names)
    logits = names["logits"]
    assert logits.batch_shape == (20,)
    assert logits.event_shape == (3,)
    expected = net(images).log_softmax(-1).detach()
    assert_close(logits.loc, expected, **tolerance(torch.float32, "autograd"))


SWAP_IMPORTS = "".join(
    line + "\n" for line in SWAP.splitlines() if line.startswith(("import", "from"))
)


@pytest.mark.parametrize(
    "target",
    [t for t in re.findall(r"\]\(([^)]+)\)", PROSE) if "://" not in t],
)
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).is_file()


@pytest.mark.parametrize("target", re.findall(r"`?make ([a-z-]+)", README))
def test_commands_are_targets(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
