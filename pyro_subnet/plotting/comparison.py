"""The share of predictive variance that selectors keep, by size of the subnet."""

from __future__ import annotations

from typing import Any

from pyro_subnet.comparison.table import SubnetComparison
from pyro_subnet.exceptions import OptionError
from pyro_subnet.plotting.style import INK, Axes, frame, new_axes, strokes_of

# Name of the bound in the rows of `compare_subnets`.
_BOUND = "Subspace"
# Sizes further apart than this are drawn on a logarithmic axis.
_RATIO = 10
_MAX_TICKS = 8


def plot_variance_kept(
    comparison: SubnetComparison, *, inputs: str | None = None, ax: Axes | None = None
) -> Axes:
    """Share of the full posterior's predictive variance that is kept, against S.

    Args:
        comparison: Result of ``compare_subnets``; lines need two sizes or more.
        inputs: Which set of inputs; may be left out where there is one.
        ax: Axes to draw on; None for new ones.

    Returns:
        The axes: a curve for each selector, and in black the best subspace of each
        size, which no subnet can beat.

    Raises:
        OptionError: If the comparison has no such inputs, or several and none is named.
    """
    known = list(dict.fromkeys(row.inputs for row in comparison.rows))
    if inputs is None and len(known) == 1:
        inputs = known[0]
    if inputs not in known:
        raise OptionError(
            f"`inputs` must be one of {known}; got {inputs!r}. Draw one set of inputs "
            "on each axes."
        )
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in comparison.rows:
        if row.inputs == inputs:
            curves.setdefault(row.selector, []).append((row.size, row.kept_variance))
    ax = new_axes(ax)
    bound = curves.pop(_BOUND, None)
    if bound is not None:
        _draw(ax, bound, label="best subspace", color=INK, ls=":", lw=1.5, marker=".")
    for name, stroke in strokes_of(curves).items():
        _draw(ax, curves[name], label=name, **stroke.options())
    sizes = [row.size for row in comparison.rows if row.inputs == inputs]
    if max(sizes) > _RATIO * min(sizes):
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:,g}")
    # A tick at each size of a line, if they are few enough to be read.
    several = [points for points in curves.values() if len(points) > 1]
    asked = sorted({size for points in several for size, _ in points})
    if 1 < len(asked) <= _MAX_TICKS:
        ax.set_xticks(asked)
        ax.set_xticks([], minor=True)
    frame(ax, f"S, weights in the subnet (of {comparison.num_params:,})", "")
    ax.set(ylabel="share of predictive variance kept", title=f"inputs: {inputs}")
    ax.set(ylim=(0, 1.03))
    ax.legend(frameon=False)
    return ax


def _draw(ax: Axes, points: list[tuple[int, float]], **options: Any) -> None:
    sizes, shares = zip(*sorted(points), strict=True)
    ax.plot(sizes, shares, **options)
