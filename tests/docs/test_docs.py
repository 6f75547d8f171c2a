"""The pages of docs/ that are one program run as they stand."""

from __future__ import annotations

import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import pyro_subnet
import pyro_subnet.nn as nn_models
from pyro_subnet import (
    AutoSubnetLaplace,
    AutoSubnetMultivariateNormal,
    diagnostics,
    plotting,
    selection,
)
from pyro_subnet.exceptions import MonteCarloFisherWarning, UntrainedWarning, warn
from pyro_subnet.nn import bayesianize
from tests.docs.pages import ROOT, blocks, run, run_page

# What a user meets through other calls, or does not call.
NOT_BY_TASK = {
    *("at_map", "explained_variance", "form_name", "forward", "options"),
    *("scaled_at_map", "state", "summary", "tunings"),
    *("compare_routes", "init_to_module", "pareto_smoothed"),
}


def test_the_posteriors_toolkit(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    names = run_page("posterior.md")
    posterior, x_test = names["posterior"], names["x_test"]
    assert names["functions"].shape == (20, len(x_test), 1)
    assert bool(names["gradient"].isfinite().all())
    # Away from the data uncertainty grows.
    stddev = posterior.output_distribution(x_test).stddev.squeeze(-1)
    assert float(stddev[0]) > 2 * float(stddev[len(stddev) // 2])
    evidence = [p.log_marginal_likelihood() for p in (names["by_evidence"], posterior)]
    assert float(evidence[0]) >= float(evidence[1])
    by_site = names["by_site"].log_marginal_likelihood()
    assert float(by_site) >= float(evidence[0])
    val = (names["x_val"], names["y_val"])
    assert nll(names["by_nll"], *val) <= nll(posterior, *val)
    assert names["updated"].summary.noise_weight == 110
    assert names["streamed"].summary.noise_weight == 0.9 * 80 + 20
    kept = {row.selector: row.kept_variance for row in names["report"].rows}
    assert set(kept) >= set(names["choices"])
    assert names["dual"].form_name == "dual"
    assert names["tuned"].form_name == "kronecker"
    printed = capsys.readouterr().out
    assert "largest variance" in printed


def nll(posterior: Any, x: Any, y: Any) -> float:
    return -float(posterior.predictive_distribution(x).log_prob(y).mean())


def test_priors(capsys: pytest.CaptureFixture[str]) -> None:
    """The page's noise is 0.3, of 180 data; its model says 1.0."""
    names = run_page("priors.md")
    posterior = names["posterior"]
    assert 0.2 < posterior.noise_factor < 0.45
    for guide in (names["guide"], names["looped"]):
        assert len(guide.evidence_history) > 3
    assert 0.2 < names["looped"].noise_factor < 0.45
    assert names["of_labels"].noise_factor == 1.0
    assert "None" not in capsys.readouterr().out


def test_the_cheat_sheet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # where it keeps its checkpoint
    with matplotlib.rc_context({"backend": "agg"}):
        names = run_page("cheatsheet.md")
        plt.close("all")
    assert names["posterior"].subnet.size == 9
    assert names["predictive"].batch_shape == names["y_new"].shape
    assert names["functions"].shape == (20, 20, 1)
    loaded, guide = (names[name].median()["2.bias"] for name in ("same", "guide"))
    assert torch.equal(loaded, guide)
    assert "LastLayer" in capsys.readouterr().out


def test_the_cheat_sheet_has_a_line_for_every_call() -> None:
    text = (ROOT / "docs" / "cheatsheet.md").read_text(encoding="utf-8")
    modules = (pyro_subnet, nn_models, diagnostics, plotting, selection)
    calls = [
        name
        for module in modules
        for name in module.__all__
        if inspect.isroutine(getattr(module, name))
        or (module is selection and name not in {"Selector", "SubspacePosterior"})
    ]
    calls += [
        name
        for guide in (AutoSubnetLaplace, AutoSubnetMultivariateNormal)
        for name in vars(guide)
        if not name.startswith("_")
    ]
    missing = [name for name in calls if not re.search(rf"\b{name}\b", text)]
    assert set(missing) <= NOT_BY_TASK, f"docs/cheatsheet.md lacks {missing}"


def test_diagnostics() -> None:
    torch.manual_seed(0)
    with matplotlib.rc_context({"backend": "agg"}):
        names = run_page("diagnostics.md")
        assert len(plt.get_fignums()) == 6
        plt.close("all")
    assert 0 < names["determined"] < names["posterior"].subnet.size
    assert sum(names["by_site"].values()) == pytest.approx(names["determined"])
    assert 0 < names["kept"] < 1
    # Inputs of no class stand out, by the epistemic part above all.
    assert 0.7 < names["by_entropy"] < names["by_information"]
    entropies = names["entropies"]
    assert float(entropies[-1]) > 2 * float(entropies[0])
    assert float(names["curve"].risk[-1]) == pytest.approx(float(names["wrong"].mean()))
    # What the page says of calibrated predictions: five standard errors of 1,000 data.
    for level, share in zip((0.5, 0.9), names["coverage"], strict=True):
        assert abs(float(share) - level) < 5 * (level * (1 - level) / 1000) ** 0.5


# What ArviZ says of the page's 200 draws, and what pandas says of ArviZ 0.23.
@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto:UserWarning")
@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.sort_values")
def test_arviz(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)  # where the page writes its file
    torch.manual_seed(0)
    names = run_page("arviz.md")
    assert list(names["laplace"].posterior["v_elem"].values) == ["0", "1", "2"]
    assert names["laplace"].predictions["y"].shape == (2, 500, 5)
    assert set(names["table"].index) == {"laplace", "nuts"}
    assert "v[2]" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::pyro_subnet.exceptions.UntrainedWarning")
def test_scaling(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The page's program on one rank, as `torchrun` would start it."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    net = bayesianize(nn.Linear(2, 1))

    def model(x: Tensor, y: Tensor | None = None) -> None:
        mean = net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.1), obs=y)

    dataset = TensorDataset(torch.randn(300, 2), torch.randn(300))
    guide = AutoSubnetLaplace(model, subnet=None)
    try:
        names = run_page("scaling.md", dataset=dataset, guide=guide)
    finally:
        td.destroy_process_group()
    assert names["posterior"].state.num_seen == 300


def test_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # where the page writes its files
    torch.manual_seed(0)
    text = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    setting, save, load, resume = blocks(text)
    names = run(setting + save)
    first = names["posterior"]
    names = run(load, **names)
    same = dict(names["posterior"].named_buffers())
    for name, value in first.named_buffers():
        assert torch.equal(same.pop(name), value)
    assert not same
    assert names["draws"]["y"].shape == (50, 20)
    names = run(resume, **names)
    torch.testing.assert_close(names["posterior"].ggn(), first.ggn())
    # A posterior's file stays; the checkpoint goes when the fit has ended well.
    assert [path.name for path in tmp_path.iterdir()] == ["posterior.safetensors"]


def test_errors() -> None:
    """The page silences one warning by its class, and no other."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_page("errors.md")
        warn("not heard", MonteCarloFisherWarning)
        warn("heard", UntrainedWarning)
    assert [str(warning.message) for warning in caught] == ["heard"]


# The page's network was never trained, and says so.
@pytest.mark.filterwarnings("ignore::pyro_subnet.exceptions.UntrainedWarning")
def test_huggingface(capsys: pytest.CaptureFixture[str]) -> None:
    names = run_page("huggingface.md")
    posterior = names["posterior"]
    assert posterior.state.num_seen == 64
    expected = names["net"].eval()(**names["inputs"]).logits.log_softmax(-1)
    found = posterior.output_distribution(**names["inputs"]).loc
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)
    # A matrix of 3 x 32 and three biases.
    assert names["of_head"].subnet.size == 99
    assert "tensor" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::pyro_subnet.exceptions.UntrainedWarning")
def test_lightning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The page's program on a file with the layout of Lightning's."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    weights = {f"net.{name}": value for name, value in net.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": weights}, "last.ckpt")
    names = run_page("lightning.md")
    x = names["x"]
    found = names["posterior"].output_distribution(x).loc
    expected = net(x).log_softmax(-1).detach()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_sklearn(capsys: pytest.CaptureFixture[str]) -> None:
    names = run_page("sklearn.md")
    assert names["r2"] > 0.3
    assert 0.85 < names["inside"].mean() < 1.0
    assert -names["search"].score(names["x_test"], names["labels_test"]) < 0.15
    assert "R2" in capsys.readouterr().out


def test_botorch(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    names = run_page("botorch.md")
    assert names["draws"].shape == (100, 5, 3, 1)
    sets = names["sets"]
    clean, noisy = names["found"].variance, names["noisy"].variance
    assert bool((noisy > clean).all())
    assert bool((names["conditioned"].posterior(sets).variance < clean).all())
    assert names["own"].posterior(sets / names["bounds"][1]).mean.shape == (5, 3, 1)
    x, bounds = names["x"], names["bounds"]
    assert x.shape == (22, 2)
    assert bool(((x >= bounds[0]) & (x <= bounds[1])).all())
    assert "best 0." in capsys.readouterr().out
