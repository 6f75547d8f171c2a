"""The network that an estimator makes where its user gives none but sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from itertools import pairwise
from numbers import Integral

from torch import nn

from pyro_subnet.exceptions import OptionError, shown

_ACTIVATIONS = {"tanh": nn.Tanh, "silu": nn.SiLU}


def network_of(
    network: nn.Module | Sequence[int],
    num_inputs: int,
    num_outputs: int,
    activation: str = "tanh",
) -> nn.Module:
    """A copy of a network, or a new one of hidden layers, in float64.

    Args:
        network: The network, or the sizes of the hidden layers.
        num_inputs: Of a new network.
        num_outputs: Of a new network.
        activation: After each hidden layer of a new network.

    Returns:
        The network, whose weights nobody else holds. New ones are drawn by torch's own
        generator.

    Raises:
        OptionError: If ``network`` is neither a module nor sizes, or there is no such
            activation.
    """
    if activation not in tuple(_ACTIVATIONS):
        raise OptionError(
            f"`activation` must be 'tanh' or 'silu'; got {shown(activation)}. Give a "
            "network of your own for another."
        )
    if isinstance(network, nn.Module):
        return deepcopy(network)
    sizes = [num_inputs, *(network if isinstance(network, Iterable) else "?")]
    if not all(isinstance(size, Integral) and size > 0 for size in sizes):
        raise OptionError(
            "`network` must be a module or sizes of hidden layers; got "
            f"{network!r}. Pass (50, 50), say."
        )
    layers: list[nn.Module] = []
    for size, following in pairwise(sizes):
        layers += [nn.Linear(size, following), _ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], num_outputs)).double()
