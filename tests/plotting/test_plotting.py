"""Pictures: what is drawn equals the data, on axes that are given or new."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import psutil
import pyro.distributions as dist
import pytest
import torch
from matplotlib.axes import Axes
from torch import Tensor
from torch.testing import assert_close

from pyro_subnet import Subnet, diagnostics, plotting
from pyro_subnet.comparison.compare import SubnetComparison, SubnetComparisonRow
from pyro_subnet.exceptions import (
    DataError,
    MemoryLimitError,
    OptionError,
    SelectionError,
)
from pyro_subnet.plotting.style import strokes_of
from pyro_subnet.plotting.subnet import site_map
from pyro_subnet.subnet import Layout
from tests.cases import DOUBLE, classification_mlp, double, draw, regression_mlp
from tests.tolerances import tolerance

CLOSED = tolerance(torch.float64, "closed_form")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def quiet_matplotlib(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No screen, nothing shown, no setting changed, no figure left."""
    before = dict(mpl.rcParams)
    monkeypatch.setattr(plt, "show", lambda: pytest.fail("a picture was shown"))
    with mpl.rc_context({"backend": "agg"}):
        inside = dict(mpl.rcParams)
        yield
        assert dict(mpl.rcParams) == inside
    plt.close("all")
    assert set(before) == set(mpl.rcParams)


def line(ax: Axes, label: str) -> Any:
    (found,) = [part for part in ax.lines if part.get_label() == label]
    return found


def same(drawn: Any, expected: Any) -> None:
    found, wanted = (
        torch.from_numpy(np.asarray(part, dtype=float)) for part in (drawn, expected)
    )
    assert_close(found, wanted, **CLOSED)


def legend(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def band(ax: Axes, index: int) -> tuple[Tensor, Tensor]:
    """Lowest and highest y of a filled band, as drawn."""
    (path,) = ax.collections[index].get_paths()
    y = path.vertices[:, 1]
    return double(y.min()), double(y.max())


X, MEAN = double([[0.5], [-1.0], [2.0], [1.0], [-0.2]]), draw(1, 5)
ORDER = [1, 4, 0, 3, 2]


def regression(ax: Axes | None = None, **options: Any) -> Axes:
    f = dist.MultivariateNormal(
        MEAN.unsqueeze(-1), scale_tril=0.5 * torch.ones(5, 1, 1).double()
    )
    y = dist.Normal(MEAN, 1.5)
    return plotting.plot_regression(X, f, y, ax=ax, **options)


def test_regression() -> None:
    seen = (draw(2, 7, 1), draw(3, 7).requires_grad_())
    ax = regression(data=seen, num_stddev=3.0)
    same(line(ax, "mean").get_xdata(), X.squeeze(-1)[ORDER])
    same(line(ax, "mean").get_ydata(), MEAN[ORDER])
    same(line(ax, "data").get_xdata(), seen[0].squeeze(-1))
    same(line(ax, "data").get_ydata(), seen[1].detach())
    assert len(ax.collections) == 2
    for index, half in ((0, 4.5), (1, 1.5)):
        low, high = band(ax, index)
        same(low, (MEAN - half).min())
        same(high, (MEAN + half).max())
    assert legend(ax) == ["total, ±3 sd", "epistemic, ±3 sd", "mean", "data"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x", "y")


def test_regression_without_noise() -> None:
    ax = plotting.plot_regression(X, dist.Normal(MEAN, 0.5))
    assert legend(ax) == ["epistemic, ±2 sd", "mean"]
    assert len(ax.collections) == len(ax.lines) == 1


def test_regression_of_a_posterior() -> None:
    case = regression_mlp(DOUBLE)
    posterior = case.guide([0, 3]).laplace_approximation(*case.args)
    x = case.args[0]
    f, y = posterior.output_distribution(x), posterior.predictive_distribution(x)
    ax = plotting.plot_regression(x[:, 0], f, y)
    order = x[:, 0].argsort()
    same(line(ax, "mean").get_ydata(), f.mean.squeeze(-1)[order])


def reliable(seed: int = 0) -> diagnostics.Reliability:
    probs = draw(seed, 40, 3).softmax(-1)
    return diagnostics.reliability(probs, draw(9, 40, 3).argmax(-1), num_bins=7)


@pytest.mark.parametrize("several", [False, True])
def test_reliability(several: bool) -> None:
    curves = {"MAP": reliable(), "subnet": reliable(1)} if several else {"": reliable()}
    ax = plotting.plot_reliability(curves if several else reliable())
    assert len(ax.lines) == len(curves) + 1
    assert len(ax.collections) == len(curves)
    for (name, bins), drawn, points in zip(
        curves.items(), ax.lines[1:], ax.collections, strict=True
    ):
        full = bins.counts > 0
        assert not bool(full.all())
        same(drawn.get_xdata(), bins.confidence[full])
        same(drawn.get_ydata(), bins.accuracy[full])
        same(points.get_offsets()[:, 1], bins.accuracy[full])
        # Areas are linear in counts.
        areas = torch.from_numpy(points.get_sizes())
        counts = bins.counts[full].double()
        slope = (areas - areas[0])[1:] / (counts - counts[0])[1:]
        slope = slope[counts[1:] != counts[0]]
        assert float(slope.min()) > 0
        assert_close(slope, slope[:1].expand_as(slope))
        prefix = f"{name}, " if name else ""
        assert drawn.get_label() == f"{prefix}ECE {bins.ece:.3f}"
    same(ax.lines[0].get_xydata(), [[0.0, 0.0], [1.0, 1.0]])
    assert len(legend(ax)) == len(curves)


def risk(seed: int = 0) -> diagnostics.RiskCoverage:
    return diagnostics.risk_coverage(draw(seed, 30), (draw(5, 30) > 0).double())


def test_risk_and_coverage() -> None:
    curves = {"entropy": risk(), "random": risk(1)}
    ax = plotting.plot_risk_coverage(curves, loss="NLL (nats)")
    assert len(ax.lines) == 2
    for drawn, (name, curve) in zip(ax.lines, curves.items(), strict=True):
        same(drawn.get_xdata(), curve.coverage)
        same(drawn.get_ydata(), curve.risk)
        assert drawn.get_label() == f"{name}, area {curve.aurc:.3f}"
    assert ax.get_ylabel() == "risk: NLL (nats)"
    (alone,) = plotting.plot_risk_coverage(risk()).lines
    assert alone.get_label() == f"area {risk().aurc:.3f}"


DEGREES = [0.0, 45.0, 90.0]
SCORES = {
    "NLL (nats)": {"MAP": [0.1, 2.0, 5.0], "subnet": draw(1, 4, 3)},
    "ECE": {"last layer": torch.tensor([0.0, 0.1, 0.2]), "MAP": [0.3, 0.2, 0.1]},
}


def test_shift_curves() -> None:
    axes = plotting.plot_shift_curves(
        DEGREES, SCORES, references={"NLL (nats)": 2.3}, reference_label="guess"
    )
    assert axes.shape == (2,)
    first, second = axes
    same(line(first, "MAP").get_xdata(), DEGREES)
    same(line(first, "MAP").get_ydata(), [0.1, 2.0, 5.0])
    runs = SCORES["NLL (nats)"]["subnet"]
    same(line(first, "subnet").get_ydata(), runs.mean(0))
    same(line(first, "guess").get_ydata(), [2.3, 2.3])
    error = runs.std(0) / 2
    low, high = band(first, 0)
    same(low, (runs.mean(0) - error).min())
    same(high, (runs.mean(0) + error).max())
    assert not second.collections
    assert len(second.lines) == 2
    # One legend for all, and one look for each method.
    assert legend(first) == ["guess", "MAP", "subnet", "last layer"]
    assert second.get_legend() is None
    for part in ("color", "linestyle", "marker"):
        looks = [getattr(line(ax, "MAP"), f"get_{part}")() for ax in axes]
        assert looks[0] == looks[1]
    assert [ax.get_ylabel() for ax in axes] == list(SCORES)
    assert {ax.get_xlabel() for ax in axes} == {"rotation (degrees)"}


@pytest.mark.parametrize("methods", [["MAP", "subnet"], ["subnet", "other", "MAP"]])
def test_a_method_looks_the_same_in_every_picture(methods: list[str]) -> None:
    (ax,) = plotting.plot_shift_curves(
        [0.0, 1.0], {"ECE": {method: [0.0, 1.0] for method in methods}}
    )
    colours = {method: line(ax, method).get_color() for method in methods}
    assert colours["subnet"] == "#0072B2"
    assert colours["MAP"] == "#D55E00"
    assert len(set(colours.values())) == len(methods)


def test_others_look_the_same_beside_the_map_and_without() -> None:
    others = ["LargestVariance", "LargestGradient", "PredictiveVariance", "random"]
    alone = strokes_of(others)
    beside = strokes_of([*others, "LastLayer", "MAP"])
    assert alone == {name: beside[name] for name in others}
    assert beside["MAP"] not in alone.values()


def test_six_methods_look_different() -> None:
    scores = {"ECE": {str(k): [0.0, float(k)] for k in range(6)}}
    (ax,) = plotting.plot_shift_curves([0.0, 1.0], scores)
    for part in ("color", "marker"):
        assert len({getattr(drawn, f"get_{part}")() for drawn in ax.lines}) == 6
    patterns = {str(drawn._unscaled_dash_pattern) for drawn in ax.lines}
    assert len(patterns) == 6


LAYOUT = Layout(
    ("a.weight", "a.bias", "scale", "b.weight"),
    tuple(map(torch.Size, [(3, 4), (3,), (), (2, 2, 5)])),
)
CHOSEN = Subnet.from_positions(LAYOUT, torch.tensor([0, 7, 12, 13, 15, 16, 35]))


def test_counts_of_a_subnet() -> None:
    ax = plotting.plot_subnet_counts(CHOSEN)
    widths = [bar.get_width() for bar in ax.patches]
    same(widths, [100 * 2 / 12, 100 * 2 / 3, 100.0, 100 * 2 / 20])
    assert [tick.get_text() for tick in ax.get_yticklabels()] == list(LAYOUT.names)
    words = [text.get_text() for text in ax.texts]
    assert words == ["2 of 12", "2 of 3", "1 of 1", "2 of 20"]
    assert ax.get_title() == "7 of 36 weights (19.44%)"
    assert max(ax.get_xticks()) == 100
    assert ax.yaxis_inverted()


def test_maps_of_a_subnet() -> None:
    axes = plotting.plot_subnet_maps(CHOSEN)
    assert [ax.get_title() for ax in axes] == list(LAYOUT.names)
    for ax, site in zip(axes, LAYOUT.names, strict=True):
        (image,) = ax.images
        mask = CHOSEN.mask(site)
        expected = mask.reshape(1, -1) if mask.ndim < 2 else mask.flatten(1)
        same(image.get_array(), expected)
        assert image.get_clim() == (0.0, 1.0)
    (ax,) = plotting.plot_subnet_maps(CHOSEN, sites=["b.weight"])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("column (of 10)", "row (of 2)")
    fewer = plotting.plot_subnet_maps(CHOSEN, max_maps=2)
    assert [ax.get_title() for ax in fewer] == ["a.weight", "a.bias"]


@pytest.mark.parametrize("shape", [(300, 129), (128, 128), (1, 1000), (257, 2, 3)])
def test_large_maps_are_drawn_in_blocks(shape: tuple[int, ...]) -> None:
    layout = Layout(("w",), (torch.Size(shape),))
    chosen = (draw(1, layout.num_params) > 1).nonzero().squeeze(-1)
    subnet = Subnet.from_positions(layout, chosen)
    full = subnet.mask("w").flatten(1).double().numpy()
    height, width = full.shape
    rows, columns = min(128, height), min(128, width)
    row = np.array([i * rows // height for i in range(height)])
    column = np.array([j * columns // width for j in range(width)])
    expected = [
        [full[np.ix_(row == i, column == j)].mean() for j in range(columns)]
        for i in range(rows)
    ]
    same(site_map(subnet, "w"), expected)
    (ax,) = plotting.plot_subnet_maps(subnet)
    in_blocks = max(height, width) > 128
    assert ("% chosen" in ax.get_title()) == in_blocks
    assert ax.images[0].get_clim()[1] == pytest.approx(np.max(expected))
    same(ax.images[0].get_extent(), [-0.5, width - 0.5, height - 0.5, -0.5])


def test_the_whole_picture_of_a_subnet() -> None:
    figure = plotting.plot_subnet(CHOSEN)
    assert len(figure.axes) == 1 + len(LAYOUT.names)
    assert len(figure.axes[0].patches) == 4
    only = plotting.plot_subnet(CHOSEN, sites=["scale"])
    assert [ax.get_title() for ax in only.axes[1:]] == ["scale"]
    figure.canvas.draw()
    only.canvas.draw()


@pytest.mark.parametrize("size", [1, 5, 30])
def test_correlation(size: int) -> None:
    case = classification_mlp(DOUBLE)
    chosen = list(range(28))[-size:] if size < 28 else list(range(case.num_params))
    posterior = case.guide(chosen).laplace_approximation(*case.args)
    ax = plotting.plot_correlation(posterior)
    covariance = posterior.get_posterior().covariance_matrix
    scale = covariance.diagonal().sqrt()
    expected = [
        [float(covariance[i, j] / (scale[i] * scale[j])) for j in range(len(scale))]
        for i in range(len(scale))
    ]
    (image,) = ax.images
    same(image.get_array(), expected)
    assert image.get_clim() == (-1.0, 1.0)
    counts = [count for count in posterior.subnet.counts.values() if count]
    borders = [drawn.get_ydata()[0] for drawn in ax.lines[::2]]
    same(borders, np.cumsum(counts)[:-1] - 0.5)
    names = [tick.get_text() for tick in ax.get_yticklabels()]
    few = len(scale) <= 24
    sites = [site for site, count in posterior.subnet.counts.items() if count]
    assert names == (posterior.subnet.names if few else sites)


def test_correlation_needs_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    case = regression_mlp(DOUBLE)
    posterior = case.guide([0, 3]).laplace_approximation(*case.args)
    free = SimpleNamespace(available=10)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    with pytest.raises(MemoryLimitError, match="got S=2"):
        plotting.plot_correlation(posterior)


def row(selector: str, size: int, kept: float, inputs: str) -> SubnetComparisonRow:
    return SubnetComparisonRow(selector, size, inputs, kept, 0.0, None)


COMPARED = SubnetComparison(
    (
        row("random", 20, 0.7, "far"),
        row("random", 1, 0.1, "far"),
        row("random", 1, 0.2, "near"),
        row("last layer", 4, 0.4, "far"),
        row("Subspace", 1, 0.8, "far"),
        row("Subspace", 20, 1.0, "far"),
    ),
    37,
)


def test_variance_kept() -> None:
    ax = plotting.plot_variance_kept(COMPARED, inputs="far")
    assert legend(ax) == ["best subspace", "random", "last layer"]
    same(line(ax, "random").get_xydata(), [[1, 0.1], [20, 0.7]])
    same(line(ax, "last layer").get_xydata(), [[4, 0.4]])
    same(line(ax, "best subspace").get_xydata(), [[1, 0.8], [20, 1.0]])
    assert ax.get_xscale() == "log"
    same(ax.get_xticks(), [1, 20])  # not that of the last layer
    assert ax.get_xlabel() == "S, weights in the subnet (of 37)"
    assert ax.get_title() == "inputs: far"
    alone = SubnetComparison(COMPARED.rows[2:3], 37)
    ax = plotting.plot_variance_kept(alone)
    assert legend(ax) == ["random"]
    assert ax.get_xscale() == "linear"


def correlation(ax: Axes | None = None) -> Axes:
    case = regression_mlp(DOUBLE)
    posterior = case.guide([0, 3]).laplace_approximation(*case.args)
    return plotting.plot_correlation(posterior, ax=ax)


ONE: dict[str, Callable[..., Axes]] = {
    "regression": regression,
    "reliability": lambda ax=None: plotting.plot_reliability(reliable(), ax=ax),
    "risk": lambda ax=None: plotting.plot_risk_coverage(risk(), ax=ax),
    "counts": lambda ax=None: plotting.plot_subnet_counts(CHOSEN, ax=ax),
    "correlation": correlation,
    "kept": lambda ax=None: plotting.plot_variance_kept(COMPARED, inputs="far", ax=ax),
}
SEVERAL: dict[str, Callable[..., np.ndarray]] = {
    "shift": lambda axes=None: plotting.plot_shift_curves(DEGREES, SCORES, axes=axes),
    "maps": lambda axes=None: plotting.plot_subnet_maps(CHOSEN, max_maps=2, axes=axes),
}


@pytest.mark.parametrize("name", ONE)
def test_axes_in_axes_out(name: str) -> None:
    figure, (left, right) = plt.subplots(1, 2)
    assert ONE[name](ax=right) is right
    assert right.has_data()
    assert not left.has_data()
    assert plt.get_fignums() == [figure.number]
    new = ONE[name]()
    assert new.figure is not figure
    assert len(plt.get_fignums()) == 2
    new.figure.canvas.draw()


@pytest.mark.parametrize("name", SEVERAL)
def test_several_axes_in_axes_out(name: str) -> None:
    figure, given = plt.subplots(2, 1)
    out = SEVERAL[name](axes=given)
    assert list(out) == list(given)
    assert all(ax.has_data() for ax in given)
    assert plt.get_fignums() == [figure.number]
    new = SEVERAL[name]()
    new[0].figure.canvas.draw()
    with pytest.raises(OptionError, match=r"`axes` must be one for each .*, 2; got 1"):
        SEVERAL[name](axes=given[:1])


def test_what_cannot_be_drawn() -> None:
    two = dist.Normal(draw(1, 5, 2), 1.0)
    with pytest.raises(
        DataError, match=r"`outputs` must .* 5 inputs.* got shape \(5, 2"
    ):
        plotting.plot_regression(X, two)
    with pytest.raises(DataError, match=r"`x` must .* got shape \(5, 2\)"):
        plotting.plot_regression(X.expand(5, 2), dist.Normal(MEAN, 1.0))
    with pytest.raises(OptionError, match="`num_stddev` must be positive; got 0"):
        regression(num_stddev=0.0)
    with pytest.raises(OptionError, match="at least one Reliability to draw; got none"):
        plotting.plot_reliability({})
    with pytest.raises(DataError, match=r"'ECE' for 'MAP' must have shape \(3,\)"):
        plotting.plot_shift_curves(DEGREES, {"ECE": {"MAP": [0.1, 0.2]}})
    with pytest.raises(OptionError, match=r"got \['ECE'\] and \['NLL'\]"):
        plotting.plot_shift_curves(
            DEGREES, {"ECE": {"MAP": DEGREES}}, references={"NLL": 1.0}
        )
    with pytest.raises(OptionError, match=r"one of \['far', 'near'\]; got None"):
        plotting.plot_variance_kept(COMPARED)
    with pytest.raises(SelectionError, match=r"got 'c\.weight'"):
        plotting.plot_subnet(CHOSEN, sites=["c.weight"])


def test_the_package_alone_does_without_matplotlib() -> None:
    code = (
        "import sys; import pyro_subnet.plotting; sys.exit('matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT)
    assert done.returncode == 0
