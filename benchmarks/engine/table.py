"""The table: one block for each case, one line for each backend."""

from __future__ import annotations

import math
from collections.abc import Iterator

from benchmarks.engine.cases import LAPLACE_TORCH, Case, Target
from benchmarks.engine.compare import PARTS, Failure, Ratio, Result, Row, best
from benchmarks.engine.runner import CaseReport

_NAME, _CELLS = 22, 25
_INDENT = "  "

HEADER = (
    f"{'case, backend':{_NAME}}{'N':>11}{'batch':>10}"
    f"{'fit: ours  theirs ratio':>{_CELLS}}"
    f"{'predict: ours  theirs ratio':>{_CELLS + 3}}"
    f"{'GB: ours theirs':>17}{'apart':>9}{'pairs':>7}"
)


def block(report: CaseReport) -> str:
    """All lines of a case."""
    case = report.case
    size = f"S {case.subnet_size:,}, C {case.num_outputs}"
    lines = [f"{case.name} ({size})", *(_INDENT + line(row) for row in report.rows)]
    if any(isinstance(row, Row) for row in report.rows):
        lines.append(_INDENT + verdict(case, report))
    if report.alone is not None:
        lines += [_INDENT + text for text in alone(case, report.alone)]
    return "\n".join(lines)


def line(row: Row | Failure) -> str:
    """One backend."""
    name = f"{row.backend:{_NAME - len(_INDENT)}}"
    if isinstance(row, Failure):
        return f"{name} fails: {row.reason}"
    cells = [_part(row.parts.get("fit"), 0), _part(row.parts.get("predict"), 3)]
    memory = f"{row.memory.ours:10.2f}{row.memory.theirs:7.2f}"
    note = "" if row.right else "  wrong, not counted"
    counts = "/".join(map(str, dict.fromkeys(row.num_data)))
    batches = "/".join(map(str, dict.fromkeys(row.batches)))
    return (
        f"{name}{counts:>11}{batches:>10}{''.join(cells)}"
        f"{memory}{row.apart:9.0e}{row.num_pairs:7}{note}"
    )


def _part(ratio: Ratio | None, more: int) -> str:
    if ratio is None:
        return f"{'-':>{_CELLS + more}}"
    times = f"{_seconds(ratio.ours):>9}{_seconds(ratio.theirs):>8}"
    return f"{times}{ratio.ratio:6.1f}x".rjust(_CELLS + more)


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def verdict(case: Case, report: CaseReport) -> str:
    """What was reached against the best right backend, beside what should be."""
    found = []
    for part in PARTS:
        row = best(report.rows, part)
        if row is None:
            continue
        target = getattr(case.target, part)
        wanted = "" if target is None else f" of {target:g}x"
        found.append(f"{part} {row.parts[part].ratio:.1f}x{wanted} ({row.backend})")
    for row in report.rows:
        is_default = row.backend == LAPLACE_TORCH[0] and isinstance(row, Row)
        if is_default and case.target.default_fit is not None:
            wanted = f" of {case.target.default_fit:g}x"
            found.append(f"its default {row.parts['fit'].ratio:.1f}x{wanted}")
    if not found:
        return "no right backend"
    return "best right backend: " + ", ".join([*found, *_memory(case.target, report)])


def _memory(target: Target, report: CaseReport) -> Iterator[str]:
    if target.memory is not None and report.alone is not None:
        yield f"memory {report.alone['memory']:.2f} of {target.memory:g} GB"


def alone(case: Case, ours: Result) -> Iterator[str]:
    """Our own times on all data, and how far they are above the floor."""
    times = ", ".join(f"{part} {_seconds(s)} s" for part, s in ours["seconds"].items())
    memory = f"{ours['memory']:.2f} GB, {ours['whole_memory']:.2f} GB with the imports"
    counts = "/".join(map(str, dict.fromkeys((case.num_data, case.num_predict))))
    yield f"ours, N {counts}: {times}, {memory}"
    figures = ours["figures"]
    if "rate" not in figures:
        return
    fit, rate = ours["seconds"]["fit"], figures["rate"]
    # The symmetric half of the 2 N C S^2 operations of a product; a factor's S^3 / 3.
    products = case.num_data * case.num_outputs * case.subnet_size**2
    factor = case.subnet_size**3 / 3
    floor = figures["passes"] + products / rate
    shares = f"GGN {products / rate / fit:.0%}, "
    shares += f"GGN and factor {(products + factor) / rate / fit:.0%}"
    yield f"of the product rate ({rate / 1e9:.0f} GFLOP/s) in the fit: {shares}"
    if fit > figures.get("fixed", math.inf):
        share = products / rate / (fit - figures["fixed"])
        yield (
            f"without what a fit of 2 data costs ({_seconds(figures['fixed'])} s): "
            f"GGN {share:.0%}"
        )
    times = (
        f"{of} {ours['seconds'][part] / floor:.1f}"
        for part, of in zip(PARTS, ("the fit takes", "the predictions"), strict=True)
    )
    yield (
        f"forward pass {_seconds(figures['forward'])} s; "
        f"floor: passes {_seconds(figures['passes'])} s + products "
        f"{_seconds(products / rate)} s; {', '.join(times)} times that"
    )
