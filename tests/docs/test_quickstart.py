"""The quickstart's pieces, and that it fails aloud when the subnet does not help.

The whole of it, with its own criterion, is `make quickstart`, which CI runs.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pyro
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss
from torch.testing import assert_close

from tests.tolerances import tolerance

PATH = Path(__file__).resolve().parents[2] / "tutorials" / "quickstart.py"
# Of a network that was hardly trained, the most uncertain weights move no output.
quiet = pytest.mark.filterwarnings(
    "ignore::pyro_subnet.exceptions.NoOutputVarianceWarning"
)
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
    parts = quickstart.split_digits(seed=3)
    assert [len(part.labels) for part in parts] == [1077, 360, 360]
    rows = np.concatenate([part.images.reshape(len(part.images), -1) for part in parts])
    assert len(np.unique(rows, axis=0)) == len(rows)
    for part in parts:  # in proportion: 10% each, to within two digits
        counts = part.labels.bincount()
        assert (counts - len(part.labels) / 10).abs().max() <= 0.03 * len(part.labels)


def test_a_quarter_turn_moves_every_pixel_once(quickstart: ModuleType) -> None:
    train, _, _ = quickstart.split_digits(seed=0)
    turned = train.rotated(90).reshape(-1, 8, 8)
    expected = torch.from_numpy(np.rot90(train.images, axes=(1, 2)).copy())
    assert_close(turned, expected, rtol=0.0, atol=1e-5)
    upright = train.rotated(0).reshape(-1, 8, 8)
    assert_close(upright, torch.from_numpy(train.images), **CLOSE)


def test_scores_against_scikit_learn(quickstart: ModuleType) -> None:
    log_probs = (3 * torch.randn(70, 10)).log_softmax(-1)
    labels = torch.randint(10, (70,))
    found = quickstart.score(log_probs, labels)
    probs = log_probs.exp().numpy().astype(np.float64)
    assert found["accuracy"] == pytest.approx(
        accuracy_score(labels, probs.argmax(-1)), rel=1e-6
    )
    expected = log_loss(
        labels, probs / probs.sum(-1, keepdims=True), labels=list(range(10))
    )
    assert found["nll"] == pytest.approx(expected, rel=1e-5)
    assert found["entropy"] == pytest.approx(
        -(probs * np.log(probs)).sum(-1).mean(), rel=1e-5
    )


@quiet
def test_an_averaged_prediction_is_the_mean_of_softmaxes(
    quickstart: ModuleType,
) -> None:
    x = torch.randn(5, 64)
    y = torch.randint(10, (5,))
    model, net = quickstart.make_model(num_hidden=4)
    guide = quickstart.train_to_map(model, net, x, y, num_steps=1)
    posterior = guide.laplace_approximation(x, y)
    found = quickstart.predict(posterior.linearized_model, posterior, x, num_samples=6)
    pyro.set_rng_seed(0)
    draws = pyro.infer.Predictive(
        posterior.linearized_model, guide=posterior, num_samples=6, parallel=True
    )(x)["logits"]
    assert_close(found.exp(), draws.softmax(-1).mean(0), **CLOSE)
    at_map = quickstart.predict(model, guide, x, num_samples=1)
    values = guide.median()
    hidden = (x @ values["0.weight"].T + values["0.bias"]).relu()
    hidden = (hidden @ values["2.weight"].T + values["2.bias"]).relu()
    logits = hidden @ values["4.weight"].T + values["4.bias"]
    assert_close(at_map, logits.log_softmax(-1), **CLOSE)


def test_the_mean_over_shifts(quickstart: ModuleType) -> None:
    rows = [{"nll": float(degrees)} for degrees in quickstart.ROTATIONS]
    assert quickstart.shifted_nll(rows) == pytest.approx(75.0)


@quiet
def test_a_subnet_that_does_not_help_is_a_failure(
    quickstart: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A prior so sharp that the subnet is the MAP: the ratio is 1."""
    train = quickstart.train_to_map
    monkeypatch.setattr(
        quickstart, "train_to_map", lambda *args: train(*args, num_steps=50)
    )
    monkeypatch.setattr(quickstart, "choose_prior_scale", lambda *args: 1e8)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    picture = tmp_path / "new" / "picture.png"
    with pytest.raises(SystemExit, match="must be no worse than the MAP's"):
        quickstart.main(["--out", str(picture)])
    printed = capsys.readouterr().out
    assert "ratio 1.00 (seed 0)" in printed
    rows = [line for line in printed.splitlines() if line[:8].strip().isdigit()]
    assert [int(row.split()[0]) for row in rows] == list(quickstart.ROTATIONS)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_prior_scale_of_least_loss_is_chosen(
    quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Posterior:
        linearized_model = None

        def __init__(self, scale: float = 1.0):
            self.scale = scale

        def with_prior_precision(self, scale: float) -> Posterior:
            return Posterior(scale)

    def predict(model: None, posterior: Posterior, x: torch.Tensor) -> torch.Tensor:
        confidence = -abs(math.log(posterior.scale / 0.1))  # best at 0.1
        logits = torch.zeros(len(x), 10)
        logits[torch.arange(len(x)), labels] = confidence
        return logits.log_softmax(-1)

    held_out = quickstart.split_digits(seed=0)[1]
    labels = held_out.labels.repeat(len(quickstart.TILTS))
    monkeypatch.setattr(quickstart, "predict", predict)
    assert quickstart.choose_prior_scale(Posterior(), held_out) == 0.1
