"""Torch networks as Pyro modules.

:func:`bayesianize` gives a network's weights priors; :func:`init_to_module` starts a
guide at them. :func:`classifier` and :func:`regressor` make whole models of a network.
"""

from pyro_subnet.nn.bayesian import BayesianModule, bayesianize
from pyro_subnet.nn.likelihoods import (
    NetworkClassifier,
    NetworkRegressor,
    classifier,
    regressor,
)
from pyro_subnet.nn.start import init_to_module

__all__ = [
    "BayesianModule",
    "NetworkClassifier",
    "NetworkRegressor",
    "bayesianize",
    "classifier",
    "init_to_module",
    "regressor",
]
