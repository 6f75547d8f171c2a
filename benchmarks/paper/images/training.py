"""Networks trained to the MAP, and kept in files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.paper.images.networks import Architecture, make_network
from benchmarks.paper.images.readers import ImageSet, Part, to_unit

_MOMENTUM = 0.9
_MOST_SHIFT = 2  # pixels; 4 of a padded CIFAR image, as is usual
_CUT = 8  # pixels, the side of a square
_WARM_UP = 0.25  # share of the steps in which the learning rate rises
_PER_EPOCH = 1_000_000  # between the seeds of an epoch and of the next
# Convolutions are faster in this layout, most of all in bfloat16.
_LAYOUT = torch.channels_last


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        architecture: See :func:`~benchmarks.paper.images.networks.make_network`.
        epochs: Passes over the training part.
        learning_rate: The highest of one cycle.
        weight_decay: Prior precision over the number of training data, so that what is
            reached is the MAP under N(0, 1 / (weight_decay N)).
        batch_size: Images a step.
        augment: ``"none"``, ``"shift"``, ``"mirror"``, ``"flip"``: both, or ``"cut"``:
            both, and a square of the mean colour.
        bfloat16: Whether forward and backward passes are in mixed precision.
        most: Training images at most; None for all.
    """

    architecture: Architecture
    epochs: int
    learning_rate: float = 0.05
    weight_decay: float = 5e-4
    batch_size: int = 128
    augment: Literal["none", "shift", "mirror", "flip", "cut"] = "none"
    bfloat16: bool = False
    most: int | None = None

    def training_part(self, data: ImageSet) -> Part:
        return data.train[: self.most] if self.most else data.train

    def prior_precision(self, data: ImageSet) -> float:
        """Of each weight, at the MAP that the recipe trains to."""
        return self.weight_decay * len(self.training_part(data))


@dataclass(frozen=True)
class Networks:
    """Trained networks, in a folder: trained when they are first asked for.

    Attributes:
        folder: Where the files are.
        device: What they are trained and used on.
    """

    folder: Path
    device: str = "cpu"

    def get(
        self,
        data: ImageSet,
        recipe: Recipe,
        seed: int,
        *,
        member: int = 0,
        dropout: float = 0.0,
    ) -> nn.Sequential:
        """A network at its MAP, in eval mode.

        Args:
            data: What it is trained on.
            recipe: How.
            seed: Of the run.
            member: Of the ensemble: 0 is the network that all methods but ensembles
                start from.
            dropout: Rate.

        Returns:
            The network.
        """
        net = make_network(
            recipe.architecture,
            1000 * seed + member,
            channels=data.train.images.shape[1],
            dropout=dropout,
        ).to(self.device)
        path = self.folder / f"{_name(data, recipe, seed, member, dropout)}.safetensors"
        if not path.exists():
            part = recipe.training_part(data)
            fit(net, part, recipe, 1000 * seed + member, path.with_suffix(".epoch"))
            write_whole(net.state_dict(), path)
        net.load_state_dict(load_file(path, device=self.device))
        return net.eval()


def write_whole(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes a file that is either complete or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.part")
    save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)
    temporary.replace(path)


def fit(
    net: nn.Module, part: Part, recipe: Recipe, seed: int, path: Path | None = None
) -> None:
    """SGD with momentum and one cycle of the learning rate, on the log joint density.

    Source: Smith and Topin (2017), arXiv 1708.07120, for the cycle.

    Args:
        net: Trained in place, and left in eval mode.
        part: What it is trained on.
        recipe: How.
        seed: Of order, augmentation and dropout.
        path: Of a file that is written after each epoch, from which a run that was
            killed goes on; deleted at the end.
    """
    device = next(net.parameters()).device
    optimizer = torch.optim.SGD(
        net.parameters(),
        lr=recipe.learning_rate,
        momentum=_MOMENTUM,
        nesterov=True,
        weight_decay=recipe.weight_decay,
    )
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        recipe.learning_rate,
        total_steps=recipe.epochs * max(1, len(part) // recipe.batch_size) + 1,
        pct_start=_WARM_UP,
        cycle_momentum=False,
    )
    net.train().to(memory_format=_LAYOUT)
    state, done = {"net": net, "optimizer": optimizer, "cycle": cycle}, 0
    if path is not None and path.exists():
        saved = torch.load(path)
        done = saved["epochs"]
        for name, each in state.items():
            each.load_state_dict(saved[name])
    for epoch in range(done, recipe.epochs):
        with torch.random.fork_rng():
            torch.manual_seed(seed + _PER_EPOCH * epoch)  # dropout
            for x, y in epoch_batches(part, recipe, seed + _PER_EPOCH * epoch):
                optimizer.zero_grad()
                add_gradient(net, x.to(device), y.to(device), recipe)
                optimizer.step()
                cycle.step()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".part")
            saved = {name: each.state_dict() for name, each in state.items()}
            torch.save({"epochs": epoch + 1, **saved}, temporary)
            temporary.replace(path)
    if path is not None:
        path.unlink(missing_ok=True)
    net.eval()


def add_gradient(net: nn.Module, x: Tensor, y: Tensor, recipe: Recipe) -> None:
    """Adds the gradient of a batch's mean loss to that of the parameters."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=recipe.bfloat16):
        logits = net(x.to(memory_format=_LAYOUT))
    F.cross_entropy(logits.float(), y).backward()


def batches(
    part: Part, recipe: Recipe, seed: int, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled minibatches, augmented, in passes over the data."""
    epochs = (epoch_batches(part, recipe, seed + _PER_EPOCH * at) for at in count())
    return islice(chain.from_iterable(epochs), steps)


def epoch_batches(
    part: Part, recipe: Recipe, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over the data, shuffled and augmented; a part of a batch is left out."""
    generator = torch.Generator().manual_seed(seed)
    size = min(recipe.batch_size, len(part))
    order = torch.randperm(len(part), generator=generator)
    for rows in order[: len(part) // size * size].split(size):
        batch = part[rows]
        x = to_unit(batch.images)
        if recipe.augment in ("shift", "flip", "cut"):
            x = _shifted(x, generator)
        if recipe.augment in ("mirror", "flip", "cut"):
            mirrored = torch.rand(len(x), generator=generator) < 0.5
            x[mirrored] = x[mirrored].flip(-1)
        if recipe.augment == "cut":
            x = _cut(x, generator)
        yield x, batch.labels


def _shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by a few pixels either way.

    What comes in is blank, in colour a reflection.
    """
    is_colour = x.shape[1] == 3
    most = _MOST_SHIFT * (2 if is_colour else 1)
    height, width = x.shape[-2:]
    down, right = torch.randint(0, 2 * most + 1, (2, len(x), 1), generator=generator)
    mode = "reflect" if is_colour else "constant"
    padded = F.pad(x, (most, most, most, most), mode)
    rows = (torch.arange(height) + down)[:, None, :, None]
    columns = (torch.arange(width) + right)[:, None, None, :]
    at = torch.arange(len(x))[:, None, None, None]
    channels = torch.arange(x.shape[1])[None, :, None, None]
    return padded[at, channels, rows, columns]


def _cut(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image with a square of the mean colour somewhere.

    Source: DeVries and Taylor (2017), arXiv 1708.04552.
    """
    height, width = x.shape[-2:]
    top = torch.randint(0, height - _CUT + 1, (len(x), 1), generator=generator)
    left = torch.randint(0, width - _CUT + 1, (len(x), 1), generator=generator)
    down, right = torch.arange(height) - top, torch.arange(width) - left
    rows = (down >= 0) & (down < _CUT)
    columns = (right >= 0) & (right < _CUT)
    square = rows[:, None, :, None] & columns[:, None, None, :]
    return torch.where(square, x.mean((0, 2, 3), keepdim=True), x)


def _name(
    data: ImageSet, recipe: Recipe, seed: int, member: int, dropout: float
) -> str:
    parts = [data.name, recipe.architecture, f"seed{seed}", f"member{member}"]
    parts += [f"epochs{recipe.epochs}", f"augment-{recipe.augment}"]
    if dropout:
        parts.append(f"dropout{dropout:g}")
    if recipe.most:
        parts.append(f"most{recipe.most}")
    return "-".join(parts)
