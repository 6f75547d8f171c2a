"""The quickstart's pieces, and that it fails aloud when the subnet does not help.

The whole of it, with its own criterion, is `make quickstart`, which CI runs.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss
from torch.testing import assert_close

from tests.tolerances import tolerance

PATH = Path(__file__).resolve().parents[2] / "tutorials" / "quickstart.py"
CLOSE = tolerance(torch.float32, "autograd")


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_parts_share_no_digit(quickstart: ModuleType) -> None:
    parts = quickstart.split(seed=3)
    assert [len(labels) for _, labels in parts] == [1077, 360, 360]
    rows = np.concatenate([images.reshape(len(images), -1) for images, _ in parts])
    assert len(np.unique(rows, axis=0)) == len(rows)
    for _, labels in parts:  # in proportion: 10% each, to within two digits
        counts = labels.bincount()
        assert (counts - len(labels) / 10).abs().max() <= 0.03 * len(labels)


def test_a_quarter_turn_moves_every_pixel_once(quickstart: ModuleType) -> None:
    images, _ = quickstart.split(seed=0)[0]
    found = quickstart.turned(images, 90).reshape(-1, 8, 8)
    expected = torch.from_numpy(np.rot90(images, axes=(1, 2)).copy())
    assert_close(found, expected, rtol=0.0, atol=1e-5)
    upright = quickstart.turned(images, 0).reshape(-1, 8, 8)
    assert_close(upright, torch.from_numpy(images), **CLOSE)


def test_scores_against_scikit_learn(quickstart: ModuleType) -> None:
    logits, labels = 3 * torch.randn(70, 10), torch.randint(10, (70,))
    found, nll = quickstart.scores(dist.Categorical(logits=logits), labels)
    probs = logits.double().softmax(-1).numpy()
    expected = {
        "accuracy": accuracy_score(labels, probs.argmax(-1)),
        "NLL (nats)": log_loss(labels, probs, labels=list(range(10))),
        "entropy (nats)": -(probs * np.log(probs)).sum(-1).mean(),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5)
    assert 0 <= found["calibration error"] <= 1
    assert_close(nll.mean().item(), found["NLL (nats)"], **CLOSE)


def test_the_shifted_rotations_are_from_30_to_120_degrees(
    quickstart: ModuleType,
) -> None:
    assert list(quickstart.ROTATIONS[quickstart.SHIFTED]) == list(range(30, 121, 15))


def test_the_network_is_at_the_posteriors_map(quickstart: ModuleType) -> None:
    x, y = torch.rand(20, 64), torch.randint(10, (20,))
    net, posterior = quickstart.train(x, y, num_steps=3)
    assert posterior.subnet.size == 316
    for name, value in net.state_dict().items():
        assert_close(value, posterior.median()[name], **CLOSE)
    outputs = posterior.output_distribution(x).loc
    assert_close(outputs, net(x).log_softmax(-1), check_stride=False, **CLOSE)


def test_a_run_says_what_it_found(quickstart: ModuleType) -> None:
    at_map = torch.tensor([0.1, 0.3])
    upright = {"MAP": at_map, "subnet": at_map + torch.tensor([0.0, 0.004])}
    found = quickstart.verdict(upright, {"MAP": 8.0, "subnet": 2.0})
    assert "is 0.200, and the subnet's is +0.0020 nats from it" in found
    assert "(standard error 0.0020)" in found
    assert "is 8.00, and the subnet's 2.00, 0.25 of it" in found
    assert "The claim holds" in found


@pytest.mark.parametrize(
    ("loss", "share", "said"),
    [
        (0.011, 0.25, r"\+0\.0110 nats(?s:.*)does not hold"),
        (0.0, 0.5, r"0\.50 of it(?s:.*)does not hold"),
    ],
)
def test_a_subnet_that_does_not_help_is_a_failure(
    quickstart: ModuleType, loss: float, share: float, said: str
) -> None:
    upright = {"MAP": torch.ones(3), "subnet": torch.ones(3) + loss}
    with pytest.raises(SystemExit, match=said):
        quickstart.verdict(upright, {"MAP": 8.0, "subnet": 8.0 * share})


def test_the_picture_is_drawn(quickstart: ModuleType, tmp_path: Path) -> None:
    values = np.linspace(0.0, 1.0, len(quickstart.ROTATIONS))
    names = [*quickstart.GUESS, "calibration error"]
    curves = {name: {"subnet": values, "MAP": 1 - values} for name in names}
    picture = tmp_path / "new" / "picture.png"
    quickstart.draw(curves, [np.ones((8, 8)), np.zeros((8, 8))], picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_ten_seeds_are_within_the_claim(quickstart: ModuleType) -> None:
    page = PATH.parents[1].joinpath("benchmarks", "digits.md")
    text = page.read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in text.splitlines()]
    rows = [row for row in rows if len(row) == 6 and row[0].strip().isdigit()]
    assert [int(row[0]) for row in rows] == list(range(10))
    for row in rows:
        loss, at_map, subnet, ratio = (float(cell.split()[0]) for cell in row[2:])
        assert loss <= quickstart.MAX_LOSS
        assert ratio < quickstart.MAX_SHARE
        assert subnet / at_map == pytest.approx(ratio, abs=0.006)
