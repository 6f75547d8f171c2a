"""Subnetwork Laplace inference for Pyro models.

Train to the MAP, give a well-chosen few percent of the weights a Gaussian of full
covariance, and predict with the network linearized there (Daxberger et al., 2021,
arXiv 2010.14689).
"""

from pyro_subnet import diagnostics, exceptions, nn, plotting, selection
from pyro_subnet._version import __version__
from pyro_subnet.curvature.jacobian.route import compare_routes
from pyro_subnet.guide import AutoSubnetLaplace
from pyro_subnet.posterior import AutoSubnetMultivariateNormal
from pyro_subnet.subnet import Subnet
from pyro_subnet.subnet_comparison import compare_subnets

__all__ = [
    "AutoSubnetLaplace",
    "AutoSubnetMultivariateNormal",
    "Subnet",
    "__version__",
    "compare_routes",
    "compare_subnets",
    "diagnostics",
    "exceptions",
    "nn",
    "plotting",
    "selection",
]
