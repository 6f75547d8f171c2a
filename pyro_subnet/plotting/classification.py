"""Reliability diagrams of class probabilities, and risk-coverage curves."""

from __future__ import annotations

from collections.abc import Mapping

from pyro_subnet.diagnostics.calibration import Reliability
from pyro_subnet.diagnostics.risk_coverage import RiskCoverage
from pyro_subnet.plotting.style import (
    REFERENCE,
    Axes,
    array,
    frame,
    named,
    new_axes,
    strokes_of,
)

# Areas of a bin's point, in points squared: what is added for all data, and the least.
_LARGEST, _SMALLEST = 300.0, 20.0


def plot_reliability(
    bins: Reliability | Mapping[str, Reliability], *, ax: Axes | None = None
) -> Axes:
    """Accuracy against confidence, bin by bin.

    Below the diagonal a model is overconfident, above it underconfident. A point's area
    shows how many of the data are in its bin, and so how far to trust it.

    Args:
        bins: Result of ``diagnostics.reliability``, or several by name.
        ax: Axes to draw on; None for new ones.

    Returns:
        The axes.

    Raises:
        OptionError: If there is nothing to draw.

    Source: Guo et al. (2017), figure 1, arXiv 1706.04599, with points in place of bars,
    so that several models fit.
    """
    curves = named(bins, Reliability)
    ax = new_axes(ax, (4.4, 4.2))
    ax.plot([0, 1], [0, 1], color=REFERENCE, ls=":", lw=1.2)
    ax.annotate(
        "calibrated",
        (0.03, 0.03),
        xytext=(0, 4),
        textcoords="offset points",
        color=REFERENCE,
        rotation=45,
        rotation_mode="anchor",
        transform_rotates_text=True,
        va="bottom",
    )
    for name, stroke in strokes_of(curves).items():
        found = curves[name]
        full = array(found.counts) > 0
        at = array(found.confidence)[full], array(found.accuracy)[full]
        share = array(found.counts)[full] / array(found.counts).sum()
        label = f"{name}, ECE {found.ece:.3f}" if name else f"ECE {found.ece:.3f}"
        color, dashes, marker = stroke
        ax.plot(*at, color=color, ls=dashes, lw=1.8, label=label)
        area = _SMALLEST + _LARGEST * share
        ax.scatter(*at, s=area, color=color, marker=marker, alpha=0.75, linewidths=0)
    frame(ax, "confidence", "accuracy")
    ax.set(xlim=(0, 1.02), ylim=(0, 1.02), aspect="equal")
    ax.legend(frameon=False, loc="upper left")
    return ax


def plot_risk_coverage(
    curves: RiskCoverage | Mapping[str, RiskCoverage],
    *,
    loss: str = "error rate",
    ax: Axes | None = None,
) -> Axes:
    """Mean loss of the data that are answered, against their share.

    Args:
        curves: Result of ``diagnostics.risk_coverage``, or several by name.
        loss: Name of the loss that the risk is a mean of, with its unit.
        ax: Axes to draw on; None for new ones.

    Returns:
        The axes.

    Raises:
        OptionError: If there is nothing to draw.

    Source: Geifman and El-Yaniv (2017), arXiv 1705.08500.
    """
    found = named(curves, RiskCoverage)
    ax = new_axes(ax)
    for name, stroke in strokes_of(found).items():
        curve = found[name]
        label = f"{name}, area {curve.aurc:.3f}" if name else f"area {curve.aurc:.3f}"
        ax.plot(
            array(curve.coverage),
            array(curve.risk),
            color=stroke.color,
            ls=stroke.linestyle,
            lw=1.8,
            drawstyle="steps-post",
            label=label,
        )
    frame(ax, "coverage: share answered, most certain first", f"risk: {loss}")
    ax.set(xlim=(0, 1), ylim=(0, None))
    ax.legend(frameon=False)
    return ax
