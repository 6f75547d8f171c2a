"""The README's examples run as they stand, and its pictures and files exist."""

from __future__ import annotations

import re

import pytest
import torch
from pyro.infer.autoguide import init_to_value
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from pyro_subnet import AutoSubnetLaplace
from tests.docs.pages import ROOT, blocks, run
from tests.tolerances import tolerance

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROSE = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
GAP, PRETRAINED, MODEL = blocks(README)


def test_the_first_example_shows_a_gap(capsys: pytest.CaptureFixture[str]) -> None:
    names = run(GAP)
    printed = capsys.readouterr().out
    assert printed.startswith(repr(names["posterior"]))
    # As the README prints them, up to the rounding of another machine: inputs that are
    # off by 1e-6 move them by 4%.
    shown = re.findall(r"^(.+): (-?[\d.]+) \+- ([\d.]+)$", README, flags=re.MULTILINE)
    found = re.findall(r"^(.+): (-?[\d.]+) \+- ([\d.]+)$", printed, flags=re.MULTILINE)
    assert [place for place, *_ in found] == [place for place, *_ in shown]
    for (_, _, sd), (_, _, shown_sd) in zip(found, shown, strict=True):
        assert float(sd) == pytest.approx(float(shown_sd), rel=0.1, abs=0.011)
    # The repr, too, is shown as printed, up to the digits of its factors.
    digits = re.compile(r"\d+\.\d+")
    own = README[README.index("\nAutoSubnetMulti") + 1 : README.index("\non the data:")]
    assert digits.sub("0", own) == digits.sub("0", repr(names["posterior"]))
    guide = names["guide"]
    # The data's noise, 0.1, of which the model knows nothing.
    assert guide.noise_factor == pytest.approx(0.1, rel=0.25)
    on_data, between, beyond = (float(sd) for *_, sd in found)
    assert on_data < 0.05
    assert min(between, beyond) > 10 * on_data
    start = init_to_value(values=guide.median())
    whole = AutoSubnetLaplace(guide.user_model, init_loc_fn=start)
    train = names["train"]
    every = whole.laplace_approximation(names["x"][train], names["y"][train])
    every = every.with_prior_precision(guide.prior_factor)
    every = every.with_noise_scale(guide.noise_factor)
    full = every.output_distribution(torch.tensor([[-0.1], [1.6]])).stddev.squeeze(-1)
    kept = torch.tensor([between, beyond]) / full
    assert kept[0] > 0.75
    assert kept[1] > 0.5
    assert kept.max() < 1.02  # a subnet never adds variance


def test_the_sites_first_page_has_the_same_example() -> None:
    assert GAP in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")


def test_a_pyro_module_is_a_model() -> None:
    names = run(MODEL)
    x, y, x_test = names["x"], names["y"], names["x_test"]
    guide = AutoSubnetLaplace(names["model"], subnet=0.05)
    posterior = guide.laplace_approximation(x[:40], y[:40])
    assert posterior.subnet.num_params == 152
    assert posterior.subnet.size == 8
    assert posterior.subnet.counts["noise"] == 0
    assert posterior.output_distribution(x_test).loc.shape == (50, 1)


def test_a_pretrained_network_needs_no_training() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )
    images, labels = torch.randn(20, 1, 6, 6), torch.randint(3, (20,))
    net(images)
    loader = DataLoader(TensorDataset(images, labels), batch_size=8)
    posterior = run(PRETRAINED, net=net, loader=loader)["posterior"]
    logits = posterior.output_distribution(images)
    assert logits.batch_shape == (20,)
    assert logits.event_shape == (3,)
    expected = net.eval()(images).log_softmax(-1).detach()
    assert_close(logits.loc, expected, **tolerance(torch.float32, "autograd"))


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
