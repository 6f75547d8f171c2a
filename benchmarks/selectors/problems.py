"""The problems: data of a seed, the network, and which tests are shifted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from sklearn.datasets import make_moons
from torch import Tensor, nn

from benchmarks.paper.images.evaluation import rotated
from benchmarks.paper.images.readers import Part, read_images, to_unit
from benchmarks.paper.toy import toy_split
from benchmarks.selectors.data import (
    ROTATIONS,
    UCI_SETS,
    Kind,
    Pairs,
    Split,
    digits_split,
    gap_features,
    turned_by,
    uci_split,
)

NUM_CLASSES = 10
# Data for training, held out and for tests: of the moons, and of images.
_MOONS, _MOONS_NOISE = (200, 40, 500), 0.2
_IMAGES = (1000, 300, 1000)
_MOST = 500  # of a UCI set, to train on and to test on
_GAPS = ", gaps"


@dataclass(frozen=True, eq=False)
class Problem:
    """One data set and network.

    Attributes:
        name: In the tables.
        split: The data of a seed.
        network: An untrained network, from the split; seeded by the caller.
        has_noise: Whether its targets are numbers; else they are classes.
    """

    name: str
    split: Callable[[int], Split]
    network: Callable[[Split], nn.Sequential]
    has_noise: bool = True


def problems(folder: Path | None) -> Iterator[Problem]:
    """All problems; those on data sets where their folder is named.

    Args:
        folder: Holds ``uci/``, ``uci_gap/``, ``mnist/`` and ``fashion-mnist/``.
    """
    for name, activation in (("gap, tanh", nn.Tanh), ("gap, ReLU", nn.ReLU)):
        yield Problem(name, toy_split, partial(mlp, activation=activation))
    yield Problem("moons", moons_split, mlp, has_noise=False)
    yield Problem("digits", digits_split, mlp, has_noise=False)
    if folder is None:
        return
    yield from uci_problems(folder, UCI_SETS, _MOST)
    yield from image_problems(folder)


def image_problems(folder: Path) -> Iterator[Problem]:
    """Small convolutional networks on images of MNIST and FashionMNIST."""
    for name in ("mnist", "fashion"):
        split = partial(images_split, folder, name)
        yield Problem(f"CNN, {name}", split, cnn, has_noise=False)


def uci_problems(folder: Path, names: Sequence[str], most: int) -> Iterator[Problem]:
    """UCI sets, by standard splits and by those that leave a gap.

    Args:
        folder: Holds ``uci/`` and ``uci_gap/``.
        names: The sets.
        most: Data of each to train on, and to test on.
    """
    for name in names:
        yield Problem(name, partial(_uci, folder, name, "standard", most=most), mlp)
        found = list(gap_features(folder, name))
        yield Problem(
            f"{name}{_GAPS}",
            partial(_uci, folder, name, "gap", most=most),
            mlp,
            lambda count, found=found: found[:count],
        )


def mlp(
    split: Split, num_hidden: int = 50, activation: type[nn.Module] = nn.ReLU
) -> nn.Sequential:
    """Two hidden layers of 50 units."""
    x, y = split.train
    num_outputs = 1 if split.target_scale is not None else int(y.max()) + 1
    net = nn.Sequential(
        nn.Linear(x.shape[1], num_hidden),
        activation(),
        nn.Linear(num_hidden, num_hidden),
        activation(),
        nn.Linear(num_hidden, num_outputs),
    )
    return net.to(x.dtype)


def cnn(split: Split) -> nn.Sequential:
    """That of images, whatever the split."""
    return small_cnn()


def small_cnn() -> nn.Sequential:
    """Two convolutions of 5 x 5 at a stride of 2, of 8 and 16 channels; D = 5,994."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 5, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, NUM_CLASSES),
    )


def moons_split(seed: int) -> Split:
    """Two half moons in the plane; the test points are turned by 90 degrees as well."""
    parts = []
    for part, count in enumerate(_MOONS):
        x, y = make_moons(
            count, noise=_MOONS_NOISE, random_state=len(_MOONS) * seed + part
        )
        centred = torch.from_numpy(x).float() - torch.tensor([0.5, 0.25])
        parts.append((centred, torch.from_numpy(y)))
    train, held_out, (x, y) = parts
    tests = {"": (x, y), turned_by(90): (torch.stack([-x[:, 1], x[:, 0]], -1), y)}
    return Split("moons", "rotated", seed, train, held_out, tests)


def images_split(folder: Path, name: str, seed: int) -> Split:
    """Random images of MNIST or FashionMNIST, the test images turned as well."""
    found = read_images(name, folder)
    generator = torch.Generator().manual_seed(seed)

    def some(part: Part, count: int) -> Part:
        return part[torch.randperm(len(part), generator=generator)[:count]]

    def pairs(part: Part, degrees: int = 0) -> Pairs:
        images: Tensor = rotated(part.images, degrees)
        return to_unit(images), part.labels

    parts = (found.train, found.held_out, found.test)
    train, held_out, test = map(some, parts, _IMAGES)
    tests = {turned_by(degrees): pairs(test, degrees) for degrees in ROTATIONS}
    return Split(name, "rotated", seed, pairs(train), pairs(held_out), tests)


def _uci(folder: Path, name: str, kind: Kind, index: int, *, most: int) -> Split:
    split = uci_split(folder, name, kind, index, most=most)
    shift = "gap" if kind == "gap" else ""
    return replace(split, tests={shift: split.tests["test"]})
