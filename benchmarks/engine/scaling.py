"""How our fits and predictions grow: time and memory against N, C, S and D.

Draws a picture, in some four minutes::

    .venv/bin/python -m benchmarks.engine.scaling
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.engine import networks, ours
from benchmarks.engine.cases import Case
from benchmarks.engine.machine import passes_seconds
from benchmarks.engine.prepare import prepare
from benchmarks.engine.process import GB, Meter, Task

_REPEATS = 3
# Points that a slope is fitted to, the largest: what is done once hides it below them.
_OF_SLOPE = 3
_COLORS = {"fit": "C0", "predict": "C2", "passes alone": "C1", "weights alone": "C1"}

BASE = Case(
    name="scaling",
    network=networks.cnn,
    input_shape=(1, 28, 28),
    num_outputs=10,
    subnet_size=1000,
    num_data=256,
    num_predict=256,
    backends=(),
)


@dataclass(frozen=True)
class Curve:
    """One column of panels.

    Attributes:
        symbol: What grows.
        cases: Its values and their cases, ascending.
    """

    symbol: str
    cases: Sequence[tuple[int, Case]]


@dataclass(frozen=True)
class Point:
    """What one size takes, in a process of its own.

    Attributes:
        seconds: Of a fit, of predictions at as many inputs, and of the passes that
            neither can do without.
        memory: GB beyond the imports: at most during either, and of the weights.
    """

    seconds: dict[str, float]
    memory: dict[str, float]


def _with_data(count: int) -> tuple[int, Case]:
    return count, replace(BASE, num_data=count, num_predict=count)


def _with_outputs(count: int) -> tuple[int, Case]:
    build = partial(networks.cnn, count)
    return count, replace(BASE, num_outputs=count, network=build)


def _with_width(width: int) -> tuple[int, Case]:
    build = partial(networks.mlp_classes, width)
    num_params = sum(p.numel() for p in build().parameters())
    return num_params, replace(BASE, network=build)


def curves() -> tuple[Curve, ...]:
    """The columns of the picture; D goes from 10^4 to 10^8."""
    sizes = (250, 500, 1000, 2000, 4000)
    return (
        Curve("N", [_with_data(n) for n in (64, 128, 256, 512, 1024)]),
        Curve("C", [_with_outputs(c) for c in (2, 5, 10, 20, 50)]),
        Curve("S", [(s, replace(BASE, subnet_size=s)) for s in sizes]),
        Curve("D", [_with_width(w) for w in (12, 90, 690, 2_800, 9_600)]),
    )


def timed(function: Callable[[], object]) -> float:
    """Median seconds of a few runs."""
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure(case: Case) -> Point:
    """One size, in this process."""
    meter = Meter()
    task = Task(case, "ours", prepare(case), 1, 1)
    model, net, data = ours.make_model(task), task.prepared.net, task.prepared.train
    ours.warm_up(task, model)
    guide = ours.make_guide(
        task, model, ours.chosen(net, ours.subnet_positions(task)), data
    )
    memory = {"weights alone": 4 * sum(p.numel() for p in net.parameters()) / GB}
    posterior = meter.time("fit", lambda: guide.laplace_approximation(*data))
    memory["fit"] = (meter.peak - meter.baseline) / GB
    fit = timed(lambda: guide.laplace_approximation(*data))
    x, meter.peak = task.prepared.test, 0
    meter.time("predict", lambda: posterior.output_distribution(x))
    memory["predict"] = (meter.peak - meter.baseline) / GB
    predict = timed(lambda: posterior.output_distribution(x))
    passes = passes_seconds(net, data[0])
    return Point({"fit": fit, "predict": predict, "passes alone": passes}, memory)


def measured(cases: Sequence[Case]) -> list[Point]:
    """Each size in a process of its own, whose memory is no other's."""
    spawned = multiprocessing.get_context("spawn")
    found = list[Point]()
    for case in cases:
        with ProcessPoolExecutor(1, spawned) as process:
            found.append(process.submit(measure, case).result())
    return found


def slope(sizes: Sequence[int], values: Sequence[float]) -> float:
    """The power of the size that the values grow by, over the largest sizes."""
    last = slice(-_OF_SLOPE, None)
    fitted = np.polyfit(np.log(sizes[last]), np.log(values[last]), 1)
    return round(float(fitted[0]), 2) + 0.0  # never -0.0


def draw_scaling(path: Path, columns: Sequence[Curve]) -> None:
    """Measures the curves, prints them, and draws two panels for each."""
    figure = Figure(figsize=(3 * len(columns), 5.5), layout="constrained")
    panels = figure.subplots(2, len(columns), sharex="col", sharey="row", squeeze=False)
    for curve, (above, below) in zip(columns, panels.T, strict=True):
        sizes = [size for size, _ in curve.cases]
        found = measured([case for _, case in curve.cases])
        for size, point in zip(sizes, found, strict=True):
            seconds, memory = point.seconds, point.memory
            print(
                f"{curve.symbol} {size:>11,}: fit {seconds['fit']:7.3f} s, predict "
                f"{seconds['predict']:7.3f} s, passes {seconds['passes alone']:7.3f} "
                f"s; {memory['fit']:.3f} and {memory['predict']:.3f} GB, of weights "
                f"{memory['weights alone']:.3f} GB",
                flush=True,
            )
        _draw(above, sizes, [point.seconds for point in found])
        _draw(below, sizes, [point.memory for point in found])
        below.set_xlabel(curve.symbol)
        below.set_xticks(sizes, [_short(size) for size in sizes])
        for panel in (above, below):
            panel.minorticks_off()
    panels[0, 0].set_ylabel("seconds")
    panels[1, 0].set_ylabel("GB beyond the imports")
    fixed = f"N {BASE.num_data}, C {BASE.num_outputs}, S {BASE.subnet_size:,}"
    figure.suptitle(
        f"A fit and as many predictions where one of them grows: CNN (D: MLP), {fixed}"
    )
    figure.savefig(path, dpi=120)


def _draw(
    panel: Axes, sizes: Sequence[int], points: Sequence[dict[str, float]]
) -> None:
    """One line a quantity, with its slope."""
    for name in points[0]:
        values = [point[name] for point in points]
        alone = name.endswith("alone")
        label = name
        if name != "weights alone":
            power = slope(sizes, values)
            label = f"{name}: {power:.2f}"
            print(f"    {name}: slope {power:.2f}")
        style = "s--" if alone else "o-"
        panel.loglog(sizes, values, style, color=_COLORS[name], label=label)
    panel.legend(frameon=False, fontsize="small", title="slope", title_fontsize="small")


def _short(size: int) -> str:
    """A size for an axis: 250, 2k, 1.9M."""
    for unit, suffix in ((10**6, "M"), (10**3, "k")):
        if size >= unit:
            digits = 0 if size >= 10 * unit or size % unit == 0 else 1
            return f"{size / unit:.{digits}f}{suffix}"
    return str(size)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine.scaling")
    parser.add_argument("--out", type=Path, default=Path("docs/engine-scaling.png"))
    draw_scaling(parser.parse_args(arguments).out, curves())


if __name__ == "__main__":
    main()
