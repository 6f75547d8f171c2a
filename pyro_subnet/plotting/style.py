"""The one visual language: colours, strokes and frames of every picture.

Matplotlib is imported when a picture is drawn, and here alone. Its settings stay as
they are: a user's style sheet decides on fonts and sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_subnet.exceptions import OptionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes  # noqa: PLC0414 - passed on
    from matplotlib.figure import Figure as Figure  # noqa: PLC0414
else:  # what is not imported cannot be checked at run time
    Axes = Figure = Any

# Okabe and Ito (2008), "Color universal design", without the yellow, which white paper
# swallows. Data are black, references grey.
BLUE, VERMILLION, GREEN = "#0072B2", "#D55E00", "#009E73"
PURPLE, ORANGE, SKY = "#CC79A7", "#E69F00", "#56B4E9"
INK, REFERENCE, GRID = "black", "0.45", "0.92"
# From nothing to all in one hue, and from -1 by white to 1 in two that all eyes tell.
SHARES, SIGNED = "Blues", "RdBu_r"


class Stroke(NamedTuple):
    """How one method is drawn, told apart without colour as well.

    Attributes:
        color: Of the palette.
        linestyle: Dashes.
        marker: Shape of the points.
    """

    color: str
    linestyle: Any
    marker: str

    def options(self) -> dict[str, Any]:
        """Arguments of ``Axes.plot``."""
        return {**self._asdict(), "linewidth": 1.8, "markersize": 5}


_STROKES = (
    Stroke(BLUE, "-", "o"),
    Stroke(VERMILLION, "--", "s"),
    Stroke(GREEN, "-.", "^"),
    Stroke(PURPLE, (0, (1, 1)), "D"),
    Stroke(ORANGE, (0, (5, 1, 1, 1, 1, 1)), "v"),
    Stroke(SKY, (0, (8, 2)), "P"),
)


def strokes() -> Iterator[Stroke]:
    """Strokes in a fixed order, the first again after the last.

    Returns:
        An endless iterator.
    """
    return cycle(_STROKES)


def new_axes(ax: Axes | None, size: tuple[float, float] = (5.0, 3.6)) -> Axes:
    """The axes to draw on.

    Args:
        ax: The user's, or None for those of a new figure.
        size: Of a new figure, inches.

    Returns:
        The axes.
    """
    if ax is not None:
        return ax
    (new,) = new_figure(size).subplots(1, 1, squeeze=False).flat
    return new


def new_figure(size: tuple[float, float]) -> Figure:
    """A figure of pyplot's, so that a notebook shows it.

    Args:
        size: Inches.

    Returns:
        The figure.
    """
    import matplotlib.pyplot as plt

    return plt.figure(figsize=size, layout="constrained")


def new_row(
    axes: Iterable[Axes] | None, count: int, name: str, size: tuple[float, float]
) -> list[Axes]:
    """As many axes as there are panels.

    Args:
        axes: The user's, in any array, or None for those of a new figure.
        count: How many panels.
        name: What a panel shows, for the message of an error.
        size: Of one panel of a new figure, inches.

    Returns:
        The axes.

    Raises:
        OptionError: If the user's are more or fewer.
    """
    if axes is None:
        columns = math.ceil(math.sqrt(count)) if count > 3 else count  # noqa: PLR2004
        rows = math.ceil(count / columns)
        figure = new_figure((size[0] * columns, size[1] * rows))
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for spare in panels[count:]:
            spare.remove()
        return panels[:count]
    given = [ax for ax in np.asarray(axes, dtype=object).flat if ax is not None]
    if len(given) != count:
        raise OptionError(
            f"`axes` must be one for each {name}, {count}; got {len(given)}. Leave it "
            "out for a new figure."
        )
    return given


def frame(ax: Axes, xlabel: str, ylabel: str, *, grid: bool = True) -> None:
    """Labels, a light grid, and no box.

    Args:
        ax: The axes.
        xlabel: With its unit.
        ylabel: With its unit.
        grid: Whether lines help to read values off.
    """
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.spines[["top", "right"]].set_visible(False)
    if grid:
        ax.grid(color=GRID)
        ax.set_axisbelow(True)


def array(values: Tensor | Sequence[float] | np.ndarray) -> np.ndarray:
    """Numbers as matplotlib takes them.

    Args:
        values: Numbers, on any device, with or without gradients.

    Returns:
        Float64.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu().to(torch.float64).numpy()
    return np.asarray(values, dtype=np.float64)


def named(curves: Any, kind: type) -> dict[str, Any]:
    """One thing or several as ``{name: thing}``.

    Args:
        curves: One of a kind, or a mapping from names to such.
        kind: The kind.

    Returns:
        The mapping; one thing alone has the empty name.

    Raises:
        OptionError: If there is none.
    """
    if isinstance(curves, kind):
        return {"": curves}
    found = dict(curves)
    if not found:
        raise OptionError(
            f"There must be at least one {kind.__name__} to draw; got none. Pass "
            "`{name: value}`."
        )
    return found
