"""Markdown tables: means, and standard errors over splits or seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

from benchmarks.harness.reporting import FLAT, TIE, mean_and_error, table
from benchmarks.selectors.measure import Row
from benchmarks.selectors.methods import MAP, METHODS

DEFAULT = "LargestVariance ggn"
_ORDER = (MAP, *METHODS)
_COUNTS = "better / same / worse, median"
_TUNING = ("scale (range)", "at bound", "no matter", "fit, s", "tune, s")


def tables(rows: Sequence[Row], share: float) -> str:
    """All tables that the rows give, of subnets of one share and what has no size."""
    chosen = [
        row for row in rows if row["share"] in (None, share) and "failed" not in row
    ]
    parts = []
    for noise in ("fitted", "held-out"):
        own = [row for row in chosen if row["noise"] == noise]
        if own:
            for kind in ("standard", "gap"):
                part = [row for row in own if row["kind"] == kind]
                title = f"UCI, noise {noise}, {kind} splits"
                parts.append(_summary(f"{title}: all sets", part))
                parts.append(_by_set(f"{title}: NLL by set", part))
    for kind, seen in (("rotated", "upright"), ("tilted", "tilted")):
        own = [row for row in chosen if row["kind"] == kind]
        if own:
            parts.append(_digits(f"Rotated digits, prior tuned on {seen} ones", own))
    failed = [row for row in rows if "failed" in row]
    parts += [
        f"Failed: {row['data']} {row['method']}: {row['failed']}" for row in failed
    ]
    return "\n\n".join(parts)


def ranks(nll: dict[str, float]) -> dict[str, float]:
    """Rank of each method, 1 the best; those within ``TIE`` of each other share."""
    return {
        name: 1
        + sum(other < value - TIE for other in nll.values())
        + 0.5 * (sum(abs(other - value) <= TIE for other in nll.values()) - 1)
        for name, value in nll.items()
    }


def paired(
    rows: Sequence[Row], method: str, inputs: str, base: str = DEFAULT
) -> list[float]:
    """NLL less that of another method, on each split that has both."""
    own, other = (
        {_split(row): row["nll"][inputs] for row in rows if row["method"] == name}
        for name in (method, base)
    )
    return [own[at] - other[at] for at in own if at in other]


def _split(row: Row) -> tuple[Any, ...]:
    return row["data"], row["kind"], row["split"]


def _methods(rows: Sequence[Row]) -> list[str]:
    there = {row["method"] for row in rows}
    return [name for name in _ORDER if name in there]


def _wins(differences: Sequence[float]) -> str:
    """How often better, the same, worse; and the median difference, in nats."""
    better = sum(value < -TIE for value in differences)
    worse = sum(value > TIE for value in differences)
    if not differences:
        return "-"
    counts = f"{better} / {len(differences) - better - worse} / {worse}"
    return f"{counts}, {statistics.median(differences):+.3f}"


def _scales(rows: Sequence[Row]) -> list[str]:
    """Median and range; how often at a bound; how often no scale mattered."""
    tuned = [row for row in rows if "scale" in row]
    if not tuned:
        return ["-", "-", "-"]
    scales = [row["scale"] for row in tuned]
    return [
        f"{statistics.median(scales):.1g} ({min(scales):.1g}, {max(scales):.1g})",
        f"{sum(row['at_bound'] for row in tuned)} of {len(tuned)}",
        f"{sum(row['spread'] < FLAT for row in tuned)} of {len(tuned)}",
    ]


def _seconds(rows: Sequence[Row], part: str) -> str:
    found = [row["seconds"][part] for row in rows if part in row["seconds"]]
    return f"{statistics.median(found):.2f}" if found else "-"


def _kept(rows: Sequence[Row], inputs: str) -> str:
    return mean_and_error(row["kept"][inputs] for row in rows if "kept" in row)


def _summary(title: str, rows: Sequence[Row]) -> str:
    """All sets of one kind of split together."""
    placed = []
    for split in sorted({_split(row) for row in rows}):
        own = [row for row in rows if _split(row) == split]
        placed.append(ranks({row["method"]: row["nll"]["test"] for row in own}))
    lines = []
    for name in _methods(rows):
        own = [row for row in rows if row["method"] == name]
        lines.append(
            [
                name,
                mean_and_error(place[name] for place in placed if name in place),
                *(_wins(paired(rows, name, "test", base)) for base in (MAP, DEFAULT)),
                mean_and_error(paired(rows, name, "test", MAP)),
                _kept(own, "test"),
                *_scales(own),
                _seconds(own, "fit"),
                _seconds(own, "tune"),
            ]
        )
    heads = ["method", "rank", f"to MAP: {_COUNTS}", f"to default: {_COUNTS}"]
    heads += ["to MAP: mean", "kept", *_TUNING]
    return table(title, heads, lines)


def _by_set(title: str, rows: Sequence[Row]) -> str:
    part = sorted(rows, key=lambda row: row["data"])
    sets = [name for name, _ in groupby(part, key=lambda row: row["data"])]

    def cells(name: str, read: Callable[[Row], float]) -> Iterable[str]:
        for data in sets:
            own = [r for r in part if r["method"] == name and r["data"] == data]
            yield mean_and_error(read(row) for row in own)

    lines = [
        [name, *cells(name, lambda row: row["nll"]["test"])] for name in _methods(part)
    ]
    lines.append(["RMSE, every row", *cells(MAP, lambda row: row["error"]["test"])])
    return table(title, ["method", *sets], lines)


def _digits(title: str, rows: Sequence[Row]) -> str:
    angles = list(rows[0]["nll"])
    ends = (angles[0], angles[-1])
    scores, details = [], []
    for name in _methods(rows):
        own = [row for row in rows if row["method"] == name]
        tuned = [row for row in own if "untuned" in row]
        size = f"{own[0].get('S', '-')}"
        scores.append(
            [
                name,
                size,
                *(mean_and_error(row["nll"][angle] for row in own) for angle in angles),
                _wins(paired(rows, name, ends[0])),
                _wins(paired(rows, name, ends[1])),
                mean_and_error(1 - row["error"][angles[0]] for row in own),
            ]
        )
        details.append(
            [
                name,
                *(_kept(own, angle) for angle in ends),
                *(
                    mean_and_error(r["untuned"]["nll"][angle] for r in tuned)
                    for angle in ends
                ),
                *_scales(own),
                _seconds(own, "fit"),
                _seconds(own, "tune"),
            ]
        )
    heads = ["method", "S", *(f"NLL {angle}°" for angle in angles)]
    heads += [f"{angle}°, to default: {_COUNTS}" for angle in ends]
    first = table(title, [*heads, f"accuracy {angles[0]}°"], scores)
    heads = ["method", *(f"kept {angle}°" for angle in ends)]
    heads += [f"NLL {angle}° at scale 1" for angle in ends]
    second = table(f"{title}: the fits", [*heads, *_TUNING], details)
    return f"{first}\n\n{second}"
