"""Colours, strokes and frames that all pictures share.

Matplotlib is imported here alone, when a picture is drawn. Its settings are not
changed: a user's style sheet decides on fonts and sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from pyro_subnet.exceptions import OptionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes  # noqa: PLC0414 - passed on
    from matplotlib.figure import Figure as Figure  # noqa: PLC0414
else:  # a type that is not imported cannot be checked at run time
    Axes = Figure = Any

# Okabe and Ito (2008), "Color universal design", without the yellow, which is faint on
# white paper. Data are black, references grey.
BLUE, VERMILLION, GREEN = "#0072B2", "#D55E00", "#009E73"
PURPLE, ORANGE, SKY = "#CC79A7", "#E69F00", "#56B4E9"
INK, REFERENCE, GRID = "black", "0.45", "0.92"
# Colour maps: shares from 0 to 1 in one hue; -1 to 1 by white in two hues that people
# with colour blindness tell apart.
SHARES, SIGNED = "Blues", "RdBu_r"


@final
class Stroke(NamedTuple):
    """How one method is drawn; strokes differ without colour too."""

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


# What a method looks like in every picture that has it, whatever else is there.
_OWN_STROKES = {
    "subnet": _STROKES[0],
    "MAP": _STROKES[1],
    "all weights": _STROKES[2],
    "full": _STROKES[2],
    "last layer": _STROKES[3],
    "LastLayer": _STROKES[3],
}


def strokes() -> Iterator[Stroke]:
    """Yields strokes in a fixed order, endlessly."""
    return cycle(_STROKES)


def strokes_of(methods: Iterable[str]) -> dict[str, Stroke]:
    """A stroke for each method: its own, or for others one that is left, in order."""
    # Those of the MAP and of the last layer are taken last: other methods then look the
    # same in a picture with these two and in one without.
    names = list(dict.fromkeys(methods))
    own = {name: _OWN_STROKES[name] for name in names if name in _OWN_STROKES}
    rivals = (_OWN_STROKES["MAP"], _OWN_STROKES["last layer"])
    free = [look for look in _STROKES if look not in own.values()] or list(_STROKES)
    left = cycle(sorted(free, key=rivals.__contains__))
    return {name: own[name] if name in own else next(left) for name in names}


def new_axes(ax: Axes | None, size: tuple[float, float] = (5.0, 3.6)) -> Axes:
    """The user's axes, or those of a new figure of a size in inches."""
    if ax is not None:
        return ax
    (new,) = new_figure(size).subplots(1, 1, squeeze=False).flat
    return new


def new_figure(size: tuple[float, float]) -> Figure:
    """A figure of pyplot's, which a notebook shows, of a size in inches."""
    import matplotlib.pyplot as plt

    return plt.figure(figsize=size, layout="constrained")


def new_row(
    axes: Iterable[Axes] | None, count: int, name: str, size: tuple[float, float]
) -> list[Axes]:
    """The user's axes, one a panel, or new ones; ``size`` is a panel's, in inches."""
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
    """Axis labels, a light grid, and no box."""
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.spines[["top", "right"]].set_visible(False)
    if grid:
        ax.grid(color=GRID)
        ax.set_axisbelow(True)


def array(values: Tensor | Sequence[float] | np.ndarray) -> np.ndarray:
    """Numbers as matplotlib takes them: float64, from any device."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().to(torch.float64).numpy()
    return np.asarray(values, dtype=np.float64)


def named(curves: Any, kind: type) -> dict[str, Any]:
    """``{name: curve}`` of one curve (with the empty name) or a mapping of some."""
    if isinstance(curves, kind):
        return {"": curves}
    found = dict(curves)
    if not found:
        raise OptionError(
            f"There must be at least one {kind.__name__} to draw; got none. Pass "
            "`{name: value}`."
        )
    return found
