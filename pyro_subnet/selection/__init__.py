"""Strategies that choose a subnet.

Each is called with a guide at its MAP and the training data, and returns a
:class:`~pyro_subnet.subnet.Subnet`. Any other callable of that form may be used.
"""

from pyro_subnet.selection.base import Selector
from pyro_subnet.selection.greedy_variance import GreedyVariance
from pyro_subnet.selection.largest_gradient import LargestGradient
from pyro_subnet.selection.largest_magnitude import LargestMagnitude
from pyro_subnet.selection.largest_variance import LargestVariance
from pyro_subnet.selection.last_layer import LastLayer
from pyro_subnet.selection.mask import Mask
from pyro_subnet.selection.predictive_variance import PredictiveVariance
from pyro_subnet.selection.random_subnet import RandomSubnet
from pyro_subnet.selection.sites import Modules, Sites
from pyro_subnet.selection.subspace import Subspace, SubspacePosterior
from pyro_subnet.selection.swag import SwagMoments

__all__ = [
    "GreedyVariance",
    "LargestGradient",
    "LargestMagnitude",
    "LargestVariance",
    "LastLayer",
    "Mask",
    "Modules",
    "PredictiveVariance",
    "RandomSubnet",
    "Selector",
    "Sites",
    "Subspace",
    "SubspacePosterior",
    "SwagMoments",
]
