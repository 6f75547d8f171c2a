"""One data set at one seed, and what a method fitted to it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.harness.task import Score
from benchmarks.paper.images.readers import ImageSet, Part
from benchmarks.paper.images.setups import Setup
from benchmarks.paper.images.training import Networks

# From images in [0, 1], (N, C, H, W), to log-probabilities (N, classes).
Predict = Callable[[Tensor], Tensor]
# Tuned on images that show some of the shift, in place of images like those trained on.
ON_SHIFT = ", tuned on shift"
# Not tuned at all: the prior that the MAP was trained with.
OWN_PRIOR = ", own prior"
# Tuned on images like those trained on, and kept at that prior where its NLL there is
# within two standard errors of the best.
WITHIN_ERRORS = ", within two errors"
# The prior of highest marginal likelihood; no held-out image is asked.
BY_EVIDENCE = ", by evidence"
NUM_ERRORS = 2.0
# Temperatures of the MAP whose gain and price are drawn as a curve.
CURVE = tuple(2 ** (step / 8) for step in range(25))


def at_temperature(temperature: float) -> str:
    """The metric's name: NLL at a temperature."""
    return f"nll at {temperature:.3f}"


class Fitted(NamedTuple):
    """A method on one data set.

    Attributes:
        predict: Its predictions.
        scores: What is known of the fit: its scale, its size, seconds.
    """

    predict: Predict
    scores: list[Score]


@dataclass(frozen=True, eq=False)
class Case:
    """One data set, one seed.

    Attributes:
        data: The set.
        setup: How much is done.
        networks: Trained ones.
        seed: Of the networks and of all that is random in the methods.
        tune: Images and labels that scales and rates are chosen on, by what they show:
            ``""``, or :data:`ON_SHIFT`.
    """

    data: ImageSet
    setup: Setup
    networks: Networks
    seed: int
    tune: dict[str, tuple[Tensor, Tensor]]

    def net(self, member: int = 0, dropout: float = 0.0) -> nn.Module:
        return self.networks.get(
            self.data, self.setup.recipe, self.seed, member=member, dropout=dropout
        )

    def fitted_part(self) -> Part:
        """The training images that curvatures are summed over, a random choice."""
        everything = self.setup.recipe.training_part(self.data)
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(everything), generator=generator)
        return everything[order[: self.setup.fitted]]

    def file(self, folder: str, name: str) -> Path:
        """Of something fitted to this case, named by all that it depends on."""
        setup, recipe = self.setup, self.setup.recipe
        parts = [self.data.name, recipe.architecture, f"seed{self.seed}", name]
        parts += [f"epochs{recipe.epochs}", recipe.augment, f"size{setup.num_subnet}"]
        parts += [f"fitted{setup.fitted}", f"tuned{setup.tuned}"]
        parts += [f"most{recipe.most}"] if recipe.most else []
        place = self.networks.folder.parent / folder
        place.mkdir(parents=True, exist_ok=True)
        words = "-".join(parts).replace(",", "").replace(" / ", "-over-")
        words = words.replace(" ", "-")
        return place / f"{words}.safetensors"


def nll(predict: Predict, pairs: tuple[Tensor, Tensor]) -> float:
    """Mean negative log-probability of the labels."""
    x, y = pairs
    return -float(predict(x).gather(1, y.unsqueeze(-1)).mean())


def mixture(parts: Iterator[Tensor] | list[Tensor]) -> Tensor:
    """Log of the mean of probabilities."""
    found = torch.stack(list(parts))
    return found.logsumexp(0) - math.log(len(found))


@torch.no_grad()
def logits(net: nn.Module, x: Tensor, batch_size: int = 500) -> Tensor:
    device = next(net.parameters()).device
    parts = [net(part.to(device)) for part in x.split(batch_size)]
    return torch.cat(parts).double().cpu()
