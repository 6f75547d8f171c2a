"""Tables and pictures of the UCI experiment."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.harness.looks import look
from benchmarks.harness.reporting import (
    Cell,
    Estimate,
    Found,
    collected,
    counts,
    differences,
    estimate,
    legend_below,
    pooled,
    saved,
    shown,
    table,
    without_largest,
)
from benchmarks.harness.task import Row
from benchmarks.paper.regression import RIVALS
from benchmarks.paper.uci import (
    ENDS,
    ENSEMBLE,
    EQUAL,
    EVIDENCE,
    MAP_NOISE,
    NETWORKS,
    SETS,
    SHARES,
    SIZED,
    SMALL,
    methods_of,
)
from pyro_subnet.plotting.style import INK, frame, new_row, strokes

KINDS = {"standard": "", "gap": "gap"}
# Short heads for nine columns.
SHORT = {
    "bostonHousing": "boston",
    "naval-propulsion-plant": "naval",
    "power-plant": "power",
    "protein-tertiary-structure": "protein",
    "wine-quality-red": "wine",
}
DRAWN = (
    "subnet LargestVariance",
    "subnet PredictiveVariance",
    EVIDENCE,
    "subnet LastLayer",
    "diagonal Laplace",
    "ELLA",
    "SWAG",
    "deep ensemble",
)
OTHERS = (
    "MAP",
    MAP_NOISE,
    "diagonal Laplace",
    "subnet LastLayer",
    "subnet RandomSubnet",
    *RIVALS,
    "MC dropout",
    "SWAG",
    "deep ensemble",
)
CHALLENGERS = (
    "subnet LargestVariance",
    "subnet PredictiveVariance",
    EVIDENCE,
    f"{ENSEMBLE} (PredictiveVariance)",
)
_METRIC = "log_likelihood"


def report(rows: Sequence[Row], folder: Path) -> str:
    """All tables, a picture of each kind of split, and one by size."""
    found = collected(rows)
    parts = [_splits(found), _question(found), _claims(found)]
    for kind in KINDS:
        title = f"{ENDS[1]}, {kind} splits"
        parts += [
            _pooled(found, kind, title),
            _by_set(found, kind, title),
            _picture(found, kind, folder / f"uci-{kind}.png"),
        ]
    sizes = [_by_size(found), _size_picture(found, folder / "uci-size.png")]
    return "\n\n".join([*parts, _by_network(found), *sizes])


def cell(
    name: str, kind: str, variant: str, method: str, metric: str = _METRIC
) -> Cell:
    """Where a number of a set is."""
    dataset = name if kind == "standard" else f"{name}/{kind}"
    return Cell(dataset, variant, method, KINDS[kind], metric)


def sets_of(found: Found, kind: str) -> list[str]:
    return [name for name in SETS if cell(name, kind, ENDS[1], "MAP") in found]


def to_base(
    found: Found, kind: str, own: tuple[str, str], base: tuple[str, str]
) -> list[list[float]]:
    """Differences of log likelihood by set, of (network, method) and another."""
    return [
        differences(found, cell(name, kind, *own), cell(name, kind, *base))
        for name in sets_of(found, kind)
    ]


def pairs() -> list[tuple[str, str, str]]:
    """Large network, subnet, and the small network with as many weights in all."""
    largest, smallest = ENDS[1], ENDS[0]
    found = [
        (largest, f"subnet {name}", smallest)
        for name in (
            "LargestVariance",
            "LargestVariance (SWAG)",
            "PredictiveVariance",
            "RandomSubnet",
        )
    ]
    return found + [
        (large, f"subnet {name}, S of {small}", small)
        for large, small in SMALL.items()
        for name in EQUAL
    ]


def _question(found: Found) -> str:
    """A small share of a large network less all of a small one."""
    lines = []
    for kind in KINDS:
        for large, method, small in pairs():
            full = (small, "full Laplace")
            by_set = to_base(found, kind, (large, method), full)
            if not any(by_set):
                continue
            # Where the full posterior does not fit, its MAP does not count either.
            maps = [
                own if part else []
                for own, part in zip(
                    to_base(found, kind, (large, "MAP"), (small, "MAP")),
                    by_set,
                    strict=True,
                )
            ]
            lines.append(
                [
                    kind,
                    f"{method} in {large}",
                    f"full Laplace of {small}",
                    f"{sum(map(bool, by_set))}",
                    shown(pooled(by_set), sign=True),
                    shown(without_largest(by_set), sign=True),
                    counts([value for part in by_set for value in part]),
                    shown(pooled(maps), sign=True),
                ]
            )
    heads = ["splits", "a share", "less all of", "sets", "log likelihood"]
    heads += [
        "without the largest set",
        "splits better / same / worse",
        "of the MAPs alone",
    ]
    return table("The paper's question: equal posterior size", heads, lines)


def _claims(found: Found) -> str:
    """Subnets less what the paper says they beat, in the largest network."""
    lines = []
    for kind in KINDS:
        for method in OTHERS:
            if not _values(found, kind, method, _METRIC):
                continue
            line = [kind, method]
            for subnet in CHALLENGERS:
                by_set = to_base(found, kind, (ENDS[1], subnet), (ENDS[1], method))
                every = [value for part in by_set for value in part]
                rest = shown(without_largest(by_set), sign=True)
                line.append(f"{shown(pooled(by_set), sign=True)} ({rest})")
                line.append(counts(every))
            lines.append(line)
    heads = ["splits", "less"]
    for subnet in CHALLENGERS:
        heads += [subnet, "better / same / worse"]
    return table(
        f"{ENDS[1]}: log likelihood of subnets less others' (without the largest set)",
        heads,
        lines,
    )


def _pooled(found: Found, kind: str, title: str) -> str:
    """Each method less the MAP, over all sets."""
    lines = []
    for method in methods_of(ENDS[1]):
        by_set = to_base(found, kind, (ENDS[1], method), (ENDS[1], "MAP"))
        every = [value for part in by_set for value in part]
        if every:
            sets = sum(bool(part) for part in by_set)
            lines.append(
                [
                    method,
                    f"{sets}",
                    shown(pooled(by_set), sign=True),
                    counts(every),
                    _share(found, kind, method, "flat"),
                    _range(found, kind, method),
                ]
            )
    heads = ["method", "sets", "log likelihood, to MAP", "better / same / worse"]
    heads += ["held-out data do not choose", "chosen: median (least, most)"]
    return table(f"{title}: all sets", heads, lines)


def _values(
    found: Found, kind: str, method: str, metric: str, variant: str = ENDS[1]
) -> list[float]:
    return [
        value
        for name in sets_of(found, kind)
        for value in found.get(cell(name, kind, variant, method, metric), {}).values()
    ]


def _share(found: Found, kind: str, method: str, metric: str) -> str:
    values = _values(found, kind, method, metric)
    return f"{sum(values):.0f} of {len(values)}" if values else "-"


def _range(found: Found, kind: str, method: str) -> str:
    for metric in ("rate", "scale"):
        values = sorted(_values(found, kind, method, metric))
        if values:
            middle = values[len(values) // 2]
            return f"{metric} {middle:.3g} ({values[0]:.3g}, {values[-1]:.3g})"
    return "-"


def _by_set(found: Found, kind: str, title: str) -> str:
    """Log likelihood in the target's unit."""
    names = sets_of(found, kind)

    def line(method: str, read: Callable[[str], Estimate | None]) -> list[str]:
        return [method, *(shown(read(name)) for name in names)]

    lines = [
        line(method, lambda name, method=method: mean_of(found, name, kind, method))
        for method in methods_of(ENDS[1])
    ]
    lines = [each for each in lines if set(each[1:]) != {"-"}]
    heads = ["method", *(SHORT.get(name, name) for name in names)]
    return table(f"{title}: log likelihood by set", heads, lines)


def mean_of(found: Found, name: str, kind: str, method: str) -> Estimate | None:
    values = found.get(cell(name, kind, ENDS[1], method), {})
    return estimate(list(values.values()))


def _by_network(found: Found) -> str:
    """Each method less the MAP of the same network, over all sets."""
    lines = []
    for method in methods_of(ENDS[1]):
        cells = []
        for kind in KINDS:
            for variant in NETWORKS:
                by_set = to_base(found, kind, (variant, method), (variant, "MAP"))
                # Not where it fits some sets alone: their mean is of other data.
                whole = all(by_set)
                cells.append(shown(pooled(by_set) if whole else None, sign=True))
        if set(cells) != {"-"}:
            lines.append([method, *cells])
    heads = [f"{variant}, {kind}" for kind in KINDS for variant in NETWORKS]
    title = "Every network: log likelihood, to its MAP"
    return table(title, ["method", *heads], lines)


# Of rising size, with what heads each column.
_BY_SIZE = {
    **{f"{share:.0%}": name for share, name in zip(SHARES, SIZED, strict=True)},
    "about 5%": "subnet PredictiveVariance",
    "all": "full Laplace",
}


def _by_size(found: Found) -> str:
    """A subnet's gain on the MAP against its size, on each network."""
    lines = []
    for kind in KINDS:
        for variant in NETWORKS:
            cells = []
            for method in _BY_SIZE.values():
                by_set = to_base(found, kind, (variant, method), (variant, "MAP"))
                # Not where it fits some sets alone: their mean is of other data.
                cells.append(pooled(by_set) if all(by_set) else None)
            if any(cells):
                texts = [shown(each, sign=True) for each in cells]
                lines.append([kind, variant, *texts])
    title = "By size of the subnet, `PredictiveVariance`: log likelihood, to the MAP"
    heads = ["splits", "network", *(f"{share} of D" for share in _BY_SIZE)]
    return table(title, heads, lines)


def _size_picture(found: Found, path: Path) -> str:
    """The same against the mean S."""
    panels = new_row(None, len(KINDS), "kind", (4.6, 3.6))
    for ax, kind in zip(panels, KINDS, strict=True):
        for variant, stroke in zip(NETWORKS, strokes(), strict=False):
            points = []
            for method in _BY_SIZE.values():
                by_set = to_base(found, kind, (variant, method), (variant, "MAP"))
                gain = pooled(by_set) if all(by_set) else None
                sizes = _values(found, kind, method, "S", variant)
                if gain is not None and sizes:
                    points.append((statistics.fmean(sizes), gain))
            if not points:
                continue
            points.sort(key=lambda point: point[0])
            ax.errorbar(
                [size for size, _ in points],
                [gain.mean for _, gain in points],
                [gain.error for _, gain in points],
                label=variant,
                **stroke.options(),
            )
        ax.set_xscale("log")
        ax.set_title(f"{kind} splits")
        frame(ax, "weights in the subnet, S", "log likelihood less the MAP's, nats")
    legend_below(panels, ncols=len(NETWORKS))
    return saved(panels, path, "Log likelihood less the MAP's by size of the subnet")


def _splits(found: Found) -> str:
    """How many of each set were run."""
    lines = []
    for kind in KINDS:
        for variant in NETWORKS:
            each = [
                len(found.get(cell(name, kind, variant, "deep ensemble"), {}))
                for name in SETS
            ]
            if any(each):
                lines.append([kind, variant, *(f"{count or '-'}" for count in each)])
    names = [SHORT.get(name, name) for name in SETS]
    return table("Splits that were run", ["splits", "network", *names], lines)


def _picture(found: Found, kind: str, path: Path) -> str:
    """What methods gain on the MAP of the largest network, by set."""
    names = sets_of(found, kind)
    if not names:
        return ""
    (ax,) = new_row(None, 1, "kind", (8.5, 4.0))
    base = (ENDS[1], "MAP")
    for place, method in enumerate(DRAWN):
        by_set = to_base(found, kind, (ENDS[1], method), base)
        points = [
            (at + 0.1 * (place - (len(DRAWN) - 1) / 2), each)
            for at, each in enumerate(map(estimate, by_set))
            if each is not None
        ]
        ax.errorbar(
            [at for at, _ in points],
            [each.mean for _, each in points],
            [each.error for _, each in points],
            label=method,
            **{**look(method), "linestyle": "none"},
        )
    ax.axhline(0.0, color=INK, linewidth=0.8)
    frame(ax, f"{kind} splits", "log likelihood less the MAP's, nats")
    ax.set_xticks(range(len(names)), [SHORT.get(name, name) for name in names])
    legend_below([ax], ncols=4)
    text = f"Log likelihood less the MAP's of each method, by set, {kind} splits"
    return saved([ax], path, text)
