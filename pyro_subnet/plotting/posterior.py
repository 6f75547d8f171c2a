"""Correlations between the weights of a posterior."""

from __future__ import annotations

import torch

from pyro_subnet.guides.posterior import AutoSubnetMultivariateNormal
from pyro_subnet.plotting.style import SIGNED, Axes, array, new_axes
from pyro_subnet.tensors.memory import check_factor_fits

_MAX_NAMES = 24  # single weights are named up to this S, sites beyond it
_MATRICES = 3.0  # S x S, held at once


def plot_correlation(
    posterior: AutoSubnetMultivariateNormal, *, ax: Axes | None = None
) -> Axes:
    """Correlation matrix of a posterior, in packing order, with the sites' borders.

    Args:
        posterior: The posterior, whose S x S covariance is computed.
        ax: Axes to draw on; None for new ones.

    Returns:
        The axes, with a colour bar beside them.

    Raises:
        MemoryLimitError: If the covariance does not fit.
    """
    gaussian, subnet = posterior.gaussian, posterior.subnet
    check_factor_fits(
        gaussian.size, torch.float64, gaussian.loc.device, matrices=_MATRICES
    )
    covariance = gaussian.covariance_matrix().double()
    scale = covariance.diagonal().sqrt()
    correlation = array(covariance / scale.outer(scale))
    ax = new_axes(ax, (5.2, 4.4))
    image = ax.imshow(
        correlation, cmap=SIGNED, vmin=-1, vmax=1, interpolation="nearest"
    )
    counts = {site: count for site, count in subnet.counts.items() if count}
    start, middles = 0, []
    for count in counts.values():
        middles.append(start + (count - 1) / 2)
        start += count
        if start < gaussian.size:
            ax.axhline(start - 0.5, color="0.3", lw=0.6)
            ax.axvline(start - 0.5, color="0.3", lw=0.6)
    names = list(counts)
    if gaussian.size <= _MAX_NAMES:
        middles, names = [float(k) for k in range(gaussian.size)], subnet.names
    ax.set_xticks(middles, names, rotation=90, fontsize="small")
    ax.set_yticks(middles, names, fontsize="small")
    ax.tick_params(length=0)
    ax.figure.colorbar(image, ax=ax, label="posterior correlation", shrink=0.85)
    return ax
