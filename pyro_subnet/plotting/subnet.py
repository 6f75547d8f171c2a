"""Which weights of which layers a subnet holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from pyro_subnet.plotting.style import (
    BLUE,
    SHARES,
    Axes,
    Figure,
    frame,
    new_axes,
    new_figure,
    new_row,
)
from pyro_subnet.subnet import Subnet

# More rows or columns than a screen can show one by one are drawn in blocks.
_MAX_SIDE = 128
_PANEL = (2.7, 2.3)


def plot_subnet(
    subnet: Subnet, *, sites: Sequence[str] | None = None, max_maps: int = 12
) -> Figure:
    """How many weights of each site were chosen, and where they lie.

    Args:
        subnet: The chosen elements, ``posterior.subnet``.
        sites: Sites to draw a map of; None for those with most chosen weights, in
            packing order.
        max_maps: Number of maps, if sites are not named.

    Returns:
        A new figure, with a bar for each site on the left and maps on the right. To
        draw on given axes: :func:`plot_subnet_counts` and :func:`plot_subnet_maps`.

    Raises:
        SelectionError: If a site is not a latent site of the model.
    """
    shown = _shown(subnet, sites, max_maps)
    columns = max(1, min(3, math.ceil(len(shown) / 2)))
    rows = math.ceil(len(shown) / columns)
    height = max(_PANEL[1] * rows, 0.9 + 0.28 * len(subnet.layout.names))
    figure = new_figure((4.4 + _PANEL[0] * columns, height))
    widths = (4.4, _PANEL[0] * columns)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=widths).flat
    plot_subnet_counts(subnet, ax=left.subplots())
    panels = list(right.subplots(rows, columns, squeeze=False).flat)
    for spare in panels[len(shown) :]:
        spare.remove()
    plot_subnet_maps(subnet, sites=shown, axes=panels[: len(shown)])
    return figure


def plot_subnet_counts(subnet: Subnet, *, ax: Axes | None = None) -> Axes:
    """Share of each site's weights that was chosen, as bars.

    Args:
        subnet: The chosen elements.
        ax: Axes to draw on; None for new ones.

    Returns:
        The axes.
    """
    counts, layout = subnet.counts, subnet.layout
    sizes = dict(zip(layout.names, layout.sizes, strict=True))
    ax = new_axes(ax, (4.4, 0.9 + 0.28 * len(counts)))
    shares = [100 * count / max(1, sizes[site]) for site, count in counts.items()]
    bars = ax.barh(list(counts), shares, color=BLUE, height=0.7)
    labels = [f"{count:,} of {sizes[site]:,}" for site, count in counts.items()]
    ax.bar_label(bars, labels, padding=3, fontsize="small")
    frame(ax, "chosen weights (% of the site)", "", grid=False)
    title = f"{subnet.size:,} of {subnet.num_params:,} weights ({subnet.fraction:.2%})"
    ax.set(xlim=(0, 1.45 * max(shares)), title=title)  # room for the labels
    ax.set_xticks([tick for tick in ax.get_xticks() if tick <= 100])  # noqa: PLR2004
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    return ax


def plot_subnet_maps(
    subnet: Subnet,
    *,
    sites: Sequence[str] | None = None,
    max_maps: int = 12,
    axes: Iterable[Axes] | None = None,
) -> np.ndarray:
    """Where in each site the chosen weights lie, as a picture of the layer.

    A site of shape (out, in, ...) is a map of out rows, with all further axes in its
    columns; a vector is one row. Chosen weights are dark. Sides over 128 are drawn in
    blocks, as dark as the share of chosen weights, with the largest share in the title.

    Args:
        subnet: The chosen elements.
        sites: Sites to draw; None for those with most chosen weights, in packing order.
        max_maps: Number of maps, if sites are not named.
        axes: Axes to draw on, one a site; None for new ones.

    Returns:
        The axes, shape (sites,).

    Raises:
        SelectionError: If a site is not a latent site of the model.
        OptionError: If the number of axes differs from that of sites.
    """
    shown = _shown(subnet, sites, max_maps)
    panels = new_row(axes, len(shown), "site", _PANEL)
    for ax, site in zip(panels, shown, strict=True):
        _draw_map(subnet, site, ax)
    return np.array(panels, dtype=object)


def site_map(subnet: Subnet, site: str) -> np.ndarray:
    """Share of chosen weights in each block of a site's map, at most 128 x 128."""
    height, width = _sides(subnet, site)
    rows, columns = min(height, _MAX_SIDE), min(width, _MAX_SIDE)
    within = subnet.indices.get(site)
    at = np.zeros(0, dtype=np.int64) if within is None else within.cpu().numpy()
    block = (at // width * rows // height) * columns + at % width * columns // width
    chosen = np.bincount(block, minlength=rows * columns).reshape(rows, columns)
    heights = np.bincount(np.arange(height) * rows // height, minlength=rows)
    widths = np.bincount(np.arange(width) * columns // width, minlength=columns)
    shares: np.ndarray = chosen / np.outer(heights, widths)
    return shares


def _draw_map(subnet: Subnet, site: str, ax: Axes) -> None:
    height, width = _sides(subnet, site)
    shares = site_map(subnet, site)
    in_blocks = shares.size < height * width
    darkest = float(shares.max()) if in_blocks else 1.0
    ax.imshow(
        shares,
        cmap=SHARES,
        vmin=0,
        vmax=darkest or 1.0,
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
    )
    note = f"\ndarkest block {100 * darkest:.3g}% chosen" if in_blocks else ""
    ax.set_title(f"{site}{note}", fontsize="medium")
    ax.set(xlabel=f"column (of {width:,})")
    ax.locator_params(nbins=4, integer=True)
    if height > 1:
        ax.set(ylabel=f"row (of {height:,})")
    else:
        ax.set(yticks=[])


def _sides(subnet: Subnet, site: str) -> tuple[int, int]:
    """Rows and columns of a site's map."""
    shape = subnet.layout.shape(site)
    if len(shape) < 2:  # noqa: PLR2004
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def _shown(subnet: Subnet, sites: Sequence[str] | None, max_maps: int) -> list[str]:
    if sites is not None:
        for site in sites:
            subnet.layout.shape(site)  # checks the name
        return list(sites)
    counts = subnet.counts
    # The sort is stable: sites of equal counts stay in packing order.
    leading = sorted(counts, key=lambda site: -counts[site])[: max(1, max_maps)]
    return [site for site in counts if site in leading and counts[site]]
