"""SWAG: a Gaussian through the iterates of SGD around the MAP.

Source: Maddox et al. (2019), algorithm 1, arXiv 1902.02476.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from benchmarks.paper.images.readers import Part, to_unit
from benchmarks.paper.images.training import (
    Recipe,
    add_gradient,
    batches,
    write_whole,
)
from pyro_subnet.selection import SwagMoments

_RANK = 20
_ITERATES = 40
_SLOWER = 0.1  # of the highest learning rate in training, and constant
_NORM_IMAGES = 1000


@dataclass(frozen=True, eq=False)
class Swag:
    """A Gaussian over all weights.

    Attributes:
        mean: Of the iterates, shape (D,).
        variance: Of each weight, (D,).
        deviations: The last iterates less the mean at their time, shape (K, D).
    """

    mean: Tensor
    variance: Tensor
    deviations: Tensor

    def draw(self, scale: float, generator: torch.Generator) -> Tensor:
        """Weights, shape (D,): the mean at scale 0, Maddox et al.'s Gaussian at 1."""
        rank = len(self.deviations)
        each = torch.randn(len(self.mean), generator=generator)
        along = torch.randn(rank, generator=generator)
        noise = (self.variance / 2).sqrt() * each
        noise += self.deviations.T @ along / (2 * (rank - 1)) ** 0.5
        return self.mean + scale * noise

    def moments(self) -> SwagMoments:
        """The same, as a selector reads them."""
        iterate = SimpleNamespace(loc=self.mean)
        moments = SwagMoments(iterate)
        for sign in (1, -1):  # two points of this mean and variance
            iterate.loc = self.mean + sign * self.variance.sqrt()
            moments.update()
        return moments


def swag(
    net: nn.Module, part: Part, recipe: Recipe, *, epochs: int, seed: int, path: Path
) -> Swag:
    """The Gaussian, from a file if it was made before."""
    if not path.exists():
        found = _collect(copy.deepcopy(net).cpu(), part, recipe, epochs, seed)
        write_whole(vars(found), path)
    return Swag(**load_file(path))


def _collect(
    net: nn.Module, part: Part, recipe: Recipe, epochs: int, seed: int
) -> Swag:
    """Plain SGD at a constant learning rate from the MAP on."""
    net.train()
    optimizer = torch.optim.SGD(
        net.parameters(),
        lr=recipe.learning_rate * _SLOWER,
        momentum=0.9,
        weight_decay=recipe.weight_decay,
    )
    steps = epochs * max(_ITERATES, len(part) // recipe.batch_size)
    every = max(1, steps // _ITERATES)
    iterate = SimpleNamespace(loc=parameters_to_vector(net.parameters()))
    moments, deviations = SwagMoments(iterate), []
    for step, (x, y) in enumerate(batches(part, recipe, seed, steps), 1):
        optimizer.zero_grad()
        add_gradient(net, x, y, recipe)
        optimizer.step()
        if step % every == 0:
            iterate.loc = parameters_to_vector(net.parameters()).detach()
            moments.update()
            deviations.append(iterate.loc - moments.mean.float())
    return Swag(
        moments.mean.float(),
        moments.variance.float(),
        torch.stack(deviations[-_RANK:]),
    )


@torch.no_grad()
def with_weights(net: nn.Module, weights: Tensor, part: Part) -> nn.Module:
    """A copy of a network with other weights, and its norms' statistics for them."""
    other = copy.deepcopy(net)
    vector_to_parameters(weights.to(next(net.parameters())), other.parameters())
    norms = [each for each in other.modules() if isinstance(each, nn.BatchNorm2d)]
    if norms:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over the batches
            norm.train()
        for images in part.images[:_NORM_IMAGES].split(250):
            other(to_unit(images).to(weights))
    return other.eval()
