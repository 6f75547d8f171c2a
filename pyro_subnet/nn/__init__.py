"""Torch networks as Pyro modules.

:func:`bayesianize` gives a network's weights priors; :func:`init_to_module` starts a
guide at them.
"""

# May import tensors.

from pyro_subnet.nn.bayesian import BayesianModule, bayesianize
from pyro_subnet.nn.start import init_to_module

__all__ = ["BayesianModule", "bayesianize", "init_to_module"]
