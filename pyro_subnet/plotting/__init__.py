"""Pictures of predictions, posteriors and subnets.

Each function draws on the axes that it is given, or on new ones, and returns them. None
shows a figure or changes matplotlib's settings. Needs matplotlib, which is imported
when the first picture is drawn.
"""

from pyro_subnet.plotting.classification import plot_reliability, plot_risk_coverage
from pyro_subnet.plotting.comparison import plot_variance_kept
from pyro_subnet.plotting.posterior import plot_correlation
from pyro_subnet.plotting.regression import plot_regression
from pyro_subnet.plotting.shift import plot_shift_curves
from pyro_subnet.plotting.subnet import (
    plot_subnet,
    plot_subnet_counts,
    plot_subnet_maps,
)

__all__ = [
    "plot_correlation",
    "plot_regression",
    "plot_reliability",
    "plot_risk_coverage",
    "plot_shift_curves",
    "plot_subnet",
    "plot_subnet_counts",
    "plot_subnet_maps",
    "plot_variance_kept",
]
