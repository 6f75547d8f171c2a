"""The tables: negative log likelihoods, differences, seconds, and what was learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.evidence.measure import (
    ALONE,
    BY_EVIDENCE,
    ENSEMBLE,
    MAP,
    METHODS,
    PEER,
    SUBNET,
    TEMPERATURE,
    TUNED,
)
from benchmarks.harness.reporting import (
    TIE,
    Cell,
    Estimate,
    Found,
    collected,
    differences,
    estimate,
    mean_and_error,
    table,
)
from benchmarks.harness.task import Row
from benchmarks.selectors.report import Place

_ERRORS = 2.0  # standard errors that a difference must have to count
_BASES = (SUBNET, TUNED, TEMPERATURE, PEER, ENSEMBLE)


def report(rows: Sequence[Row], folder: Path) -> str:
    """All tables that the rows give."""
    found = collected(rows)
    places = list(_places(found))
    parts = [_scores(found, places, "nll", "NLL"), _differences(found, places)]
    parts += [_scores(found, places, "coverage", "Coverage of 95% bands")]
    parts += [_scores(found, places, "error", "Share of errors")]
    return "\n\n".join([*filter(None, parts), _seconds(found), _learned(found)])


def _places(found: Found) -> Iterator[Place]:
    """In the order of the rows; of several angles, the last."""
    for cell in found:
        turned = "degrees" in cell.shift
        if cell.metric == "nll, own" and cell.method == BY_EVIDENCE:
            if not turned or cell.shift == "90 degrees":
                yield Place(cell.dataset, cell.shift)


def _scores(found: Found, places: Sequence[Place], metric: str, title: str) -> str:
    lines = []
    for place in places:
        cells = [found.get(place.cell(name, f"{metric}, own"), {}) for name in METHODS]
        if any(cells):
            lines.append([str(place), *(mean_and_error(c.values()) for c in cells)])
    return table(title, [title, *METHODS], lines) if lines else ""


def _differences(found: Found, places: Sequence[Place]) -> str:
    """NLL of the subnet by evidence less that of others, seed by seed."""
    lines, clear = [], {base: [0, 0, 0] for base in _BASES}
    for place in places:
        own, texts = place.cell(BY_EVIDENCE, "nll, own"), []
        for base in _BASES:
            pairs = differences(found, own, place.cell(base, "nll, own"))
            each = estimate(pairs)
            texts.append("-" if each is None else each.text(sign=True))
            if each is not None:
                clear[base][_outcome(each)] += 1
        lines.append([str(place), *texts])
    counted = [" / ".join(map(str, clear[base])) for base in _BASES]
    lines.append(["better / level / worse by two standard errors", *counted])
    heads = [f"NLL of {BY_EVIDENCE!r} less that of", *_BASES]
    return table("Differences", heads, lines)


def _outcome(each: Estimate) -> int:
    if abs(each.mean) <= max(TIE, _ERRORS * each.error):
        return 1
    return 0 if each.mean < 0 else 2


def _seconds(found: Found) -> str:
    """Of training; of the evidence, the share that its looks take."""
    lines = []
    for name in dict.fromkeys(cell.dataset for cell in found):
        values = {
            method: found.get(Cell(name, "", method, "", "seconds"), {})
            for method in (MAP, BY_EVIDENCE, PEER, ENSEMBLE)
        }
        looking = found.get(Cell(name, "", BY_EVIDENCE, "", "looking"), {})
        shares = [
            looking[seed] / (values[BY_EVIDENCE][seed] - looking[seed])
            for seed in looking
        ]
        peer = [
            values[BY_EVIDENCE][seed] / values[PEER][seed]
            for seed in values[PEER]
            if seed in values[BY_EVIDENCE]
        ]
        texts = [mean_and_error(each.values()) for each in values.values()]
        lines.append([name, *texts, mean_and_error(shares), mean_and_error(peer)])
    heads = ["seconds of training", MAP, BY_EVIDENCE, PEER, ENSEMBLE]
    heads += ["looks over the rest of ours", f"ours over {PEER}"]
    return table("Seconds", heads, lines)


def _learned(found: Found) -> str:
    lines = []
    for name in dict.fromkeys(cell.dataset for cell in found):
        cells = [
            found.get(Cell(name, "", method, "", metric), {})
            for metric in ("prior factor", "noise factor")
            for method in (BY_EVIDENCE, ALONE)
        ]
        lines.append([name, *(mean_and_error(cell.values()) for cell in cells)])
    heads = ["of N(0, 1) priors and a noise of 1", "prior factor", "alone"]
    heads += ["noise factor", "noise factor, alone"]
    return table("What was learned", heads, lines)
