"""Scaling curves of our fit: time against N, C, S and D, with the floor's passes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.engine import networks, ours
from benchmarks.engine.cases import Case
from benchmarks.engine.machine import passes_seconds
from benchmarks.engine.prepare import prepare
from benchmarks.engine.process import Task

_REPEATS = 3

BASE = Case(
    name="scaling",
    network=networks.cnn,
    input_shape=(1, 28, 28),
    num_outputs=10,
    subnet_size=1000,
    num_data=256,
    num_predict=1,
    backends=(),
)


@dataclass(frozen=True)
class Curve:
    """One panel.

    Attributes:
        symbol: What grows.
        power: The power of it that the time should grow by, at most.
        cases: Its values and their cases, ascending.
    """

    symbol: str
    power: int
    cases: Sequence[tuple[int, Case]]


def _with_outputs(count: int) -> Case:
    return replace(BASE, num_outputs=count, network=partial(networks.cnn, count))


def _with_width(width: int) -> tuple[int, Case]:
    build = partial(networks.mlp_classes, width)
    num_params = sum(p.numel() for p in build().parameters())
    return num_params, replace(BASE, network=build)


CURVES = (
    Curve("N", 1, [(n, replace(BASE, num_data=n)) for n in (64, 128, 256, 512, 1024)]),
    Curve("C", 1, [(c, _with_outputs(c)) for c in (2, 5, 10, 20, 50)]),
    Curve(
        "S",
        2,
        [(s, replace(BASE, subnet_size=s)) for s in (250, 500, 1000, 2000, 4000)],
    ),
    Curve("D", 1, [_with_width(w) for w in (64, 256, 1024, 2048, 4096)]),
)


def timed(function: Callable[[], object]) -> float:
    """Median seconds of a few runs."""
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure(case: Case) -> tuple[float, float]:
    """Seconds of a fit, and of the passes that no fit can do without."""
    task = Task(case, "ours", prepare(case), 1, 1)
    model, net, data = ours.make_model(task), task.prepared.net, task.prepared.train
    ours.warm_up(task, model)
    subnet = ours.chosen(net, ours.subnet_positions(task))
    guide = ours.make_guide(task, model, subnet, data)
    fit = timed(lambda: guide.laplace_approximation(*data))
    return fit, passes_seconds(net, data[0])


def draw_scaling(path: Path, curves: Sequence[Curve] = CURVES) -> None:
    """Measures the curves and draws one panel for each."""
    figure = Figure(figsize=(3 * len(curves), 3), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for panel, curve in zip(panels, curves, strict=True):
        sizes = [size for size, _ in curve.cases]
        found = [measure(case) for _, case in curve.cases]
        for size, (fit, passes) in zip(sizes, found, strict=True):
            print(f"{curve.symbol} {size:>10,}: fit {fit:.3f} s, passes {passes:.3f} s")
        _draw(panel, curve, found)
    panels[0].set_ylabel("seconds")
    panels[-1].legend(frameon=False, fontsize="small")
    fixed = f"N {BASE.num_data}, C {BASE.num_outputs}, S {BASE.subnet_size:,}"
    figure.suptitle(f"Time of a fit where one of them grows: CNN (D: MLP), {fixed}")
    figure.savefig(path, dpi=120)


def _draw(panel: Axes, curve: Curve, found: Sequence[tuple[float, float]]) -> None:
    sizes = [size for size, _ in curve.cases]
    fits, passes = zip(*found, strict=True)
    line = [fits[-1] * (size / sizes[-1]) ** curve.power for size in sizes]
    power = curve.symbol if curve.power == 1 else f"{curve.symbol}^{curve.power}"
    panel.loglog(sizes, fits, "o-", color="C0", label="fit")
    panel.loglog(sizes, passes, "s--", color="C1", label="passes alone")
    panel.loglog(sizes, line, ":", color="0.6", label="in proportion")
    panel.set_xticks(sizes, [_short(size) for size in sizes])
    panel.minorticks_off()
    panel.set_xlabel(f"{curve.symbol} (dotted: as ${power}$)")
    panel.set_ylim(bottom=min(*fits, *passes) / 2)


def _short(size: int) -> str:
    """A size for an axis: 250, 2k, 1.9M."""
    for unit, suffix in ((10**6, "M"), (10**3, "k")):
        if size >= unit:
            digits = 0 if size >= 10 * unit or size % unit == 0 else 1
            return f"{size / unit:.{digits}f}{suffix}"
    return str(size)
