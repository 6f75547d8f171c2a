"""Tables and pictures of the toy experiment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness.looks import look
from benchmarks.harness.reporting import (
    Cell,
    Found,
    collected,
    estimate,
    legend_below,
    saved,
    shown,
    table,
)
from benchmarks.harness.task import Row
from benchmarks.paper.toy import (
    COMPARED,
    DRAWN,
    FULL,
    GRID,
    NETWORKS,
    OTHERS,
    SCALED,
    SCALED_PRIOR,
    SELECTORS,
    SHARES,
    function,
    toy_split,
)
from pyro_subnet.plotting.style import INK, frame, new_row

_DATASET = "clusters"
# Those left out lie between.
_LINES = (
    "LargestVariance",
    "LargestVariance (SWAG)",
    "PredictiveVariance",
    "PredictiveVariance, greedy",
    "GreedyVariance, gap",
    "RandomSubnet",
)
_TABLE_SHARES = (0.005, 0.01, 0.05, 0.2, 0.5)


def report(rows: Sequence[Row], folder: Path) -> str:
    """Variance kept in the gap by size, scores by method, and both as pictures."""
    found = collected(rows)
    parts = []
    for variant in NETWORKS:
        parts += [_kept_table(found, variant), _scores(found, variant)]
    parts.append(_shared_table(found))
    parts.append(_kept_picture(found, folder / "toy-gap.png"))
    for variant in NETWORKS:
        name = f"toy-{variant.split()[-1]}.png"
        parts.append(_functions(found, variant, folder / name))
    return "\n\n".join(parts)


def at(variant: str, method: str, shift: str, metric: str) -> Cell:
    return Cell(_DATASET, variant, method, shift, metric)


def kept(found: Found, variant: str, method: str) -> list[float]:
    """Standard deviation in the gap over that of the full posterior, by seed."""
    own, full = (
        found.get(at(variant, name, "gap", "function_std"), {})
        for name in (method, FULL)
    )
    return [own[seed] / full[seed] for seed in sorted(own) if seed in full]


class Sized(NamedTuple):
    """A selector, and whether the prior is scaled by S / D."""

    selector: str
    scaled: bool = False

    def method(self, share: float) -> str:
        suffix = SCALED_PRIOR if self.scaled else ""
        return f"subnet {self.selector} {share:.1%}{suffix}"

    @property
    def label(self) -> str:
        return f"{self.selector}{SCALED_PRIOR if self.scaled else ''}"


def _kept_table(found: Found, variant: str) -> str:
    ways = [Sized(name) for name in SELECTORS] + [Sized(name, True) for name in SCALED]
    lines = [
        [
            way.label,
            *(
                shown(estimate(kept(found, variant, way.method(share))), 2)
                for share in _TABLE_SHARES
            ),
        ]
        for way in ways
    ]
    title = f"{variant}: standard deviation in the gap, as a share of full Laplace's"
    return table(title, ["subnet", *(f"{share:.1%}" for share in _TABLE_SHARES)], lines)


def _shared_table(found: Found) -> str:
    lines = [
        [
            variant,
            name,
            *(
                shown(
                    estimate(list(found.get(cell, {}).values())),
                    2,
                )
                for cell in (
                    at(variant, Sized(name).method(share), "", "shared")
                    for share in _TABLE_SHARES
                )
            ),
        ]
        for variant in NETWORKS
        for name in COMPARED
    ]
    heads = ["network", "subnet", *(f"{share:.1%}" for share in _TABLE_SHARES)]
    return table("Share of the weights that PredictiveVariance takes too", heads, lines)


def _scores(found: Found, variant: str) -> str:
    there = {cell.method for cell in found}
    rows = (*OTHERS, *(f"subnet {name} 5.0%" for name in SELECTORS))
    methods = [name for name in rows if name in there]
    lines = []
    for method in methods:
        cells = [
            found.get(at(variant, method, shift, metric), {})
            for shift in ("", "gap")
            for metric in ("nll", "function_std")
        ]
        scores = [shown(estimate(list(cell.values()))) for cell in cells]
        share = shown(estimate(kept(found, variant, method)), 2)
        lines.append([method, *scores, share])
    heads = ["method", "NLL like training", "std there", "NLL in the gap", "std there"]
    heads.append("std, of full Laplace's")
    return table(f"{variant}: scores", heads, lines)


def _kept_picture(found: Found, path: Path) -> str:
    panels = new_row(None, len(NETWORKS), "network", (4.6, 3.6))
    for ax, variant in zip(panels, NETWORKS, strict=True):
        for name in _LINES:
            points = [
                (100 * share, estimate(kept(found, variant, Sized(name).method(share))))
                for share in SHARES
            ]
            there = [(share, value) for share, value in points if value is not None]
            ax.errorbar(
                [share for share, _ in there],
                [value.mean for _, value in there],
                [value.error for _, value in there],
                label=name,
                **look(name),
            )
        ax.set_xscale("log")
        ax.set_title(variant)
        frame(ax, "weights in the subnet, %", "std in the gap / full Laplace's")
    legend_below(panels, ncols=3)
    text = (
        "Share of the full posterior's standard deviation in the gap, by subnet's size"
    )
    return saved(panels, path, text)


def _functions(found: Found, variant: str, path: Path) -> str:
    """Mean and two standard deviations of the function, at the first seed."""
    panels = new_row(None, len(DRAWN), "method", (3.2, 2.3))
    seed = min(seed for by_seed in found.values() for seed in by_seed)
    x, y = toy_split(seed).train
    for ax, method in zip(panels, DRAWN, strict=True):
        shifts = [f"x={point:.2f}" for point in GRID.tolist()]
        mean, std = (
            [
                found.get(at(variant, method, shift, part), {}).get(seed)
                for shift in shifts
            ]
            for part in ("mean", "std")
        )
        color = look(method.removesuffix(" 5.0%"))["color"]
        ax.set_title(method.removeprefix("subnet "), fontsize=9)
        if None not in (*mean, *std):
            low, high = (
                [m + sign * s for m, s in zip(mean, std, strict=True)]
                for sign in (-2, 2)
            )
            ax.fill_between(GRID, low, high, color=color, alpha=0.3, linewidth=0)
            ax.plot(GRID, mean, color=color)
        ax.plot(GRID, function(GRID), color=INK, linestyle=":", linewidth=1)
        ax.plot(x.squeeze(-1), y, ".", color=INK, markersize=2)
        ax.set_ylim(-3, 3)
        frame(ax, "x", "y")
    return saved(panels, path, f"Functions and bands of each method, {variant}")
