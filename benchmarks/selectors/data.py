"""The data: UCI regression in its published folders, and rotated digits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from scipy.ndimage import rotate
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

Kind = Literal["standard", "gap"]
Pairs = tuple[Tensor, Tensor]

ROTATIONS = (0, 30, 60, 90)  # degrees
UCI_SETS = (
    "bostonHousing",
    "concrete",
    "power-plant",
    "protein-tertiary-structure",
    "wine-quality-red",
    "yacht",
)
# Share of the training part that chooses the prior, and of the digits that are tested.
_HELD_OUT, _TEST = 0.15, 0.2
# More training data than these within the range that a gap split holds out, and there
# is no gap: the feature has ties.
_MOST_IN_GAP = 0.1


@dataclass(frozen=True, eq=False)
class Split:
    """One task: data to train on, to tune the prior on, and to judge by.

    Attributes:
        name: The data set.
        kind: How it was split.
        index: Which split, or the seed of a random one; seeds all that is random.
        train: Inputs and targets.
        held_out: A random part of the training part, to tune the prior on.
        tests: ``{name of the inputs: inputs and targets}``.
        target_scale: What a standardized target is multiplied by to have its unit; None
            for classes.
    """

    name: str
    kind: str
    index: int
    train: Pairs
    held_out: Pairs
    tests: Mapping[str, Pairs]
    target_scale: float | None = None


def uci_split(
    folder: Path, name: str, kind: Kind, index: int, *, most: int = 500
) -> Split:
    """A split of a UCI set, standardized with the mean and scale of its training part.

    ``folder`` holds ``uci/<set>/`` with ``data.txt``, ``index_features.txt``,
    ``index_target.txt`` and ``index_{train,test}_<i>.txt``, and ``uci_gap/<set>/`` with
    index files. A gap split that is not there is made by the rule of those that are.

    Args:
        folder: Where the sets are.
        name: The set's folder.
        kind: A random split, or one that holds out the middle third of feature
            ``index``.
        index: Which.
        most: Data of the training and of the test part; of more, a random choice.
    """
    own = folder / "uci" / name
    table = np.loadtxt(own / "data.txt")
    features = np.atleast_1d(np.loadtxt(own / "index_features.txt")).astype(int)
    target = int(np.loadtxt(own / "index_target.txt"))
    train, test = _parts(folder, name, kind, index, table[:, features])
    generator = np.random.default_rng(index)
    train = generator.permutation(train)[:most]
    test = generator.permutation(test)[:most]
    inputs, targets = table[:, features], table[:, target]
    loc, scale = inputs[train].mean(0), _scale(inputs[train])
    inputs = torch.from_numpy((inputs - loc) / scale)
    loc, scale = targets[train].mean(0), _scale(targets[train])
    targets = torch.from_numpy((targets - loc) / scale)
    count = round(_HELD_OUT * len(train))

    def pairs(part: np.ndarray) -> Pairs:
        return inputs[part], targets[part]

    held_out, rest = pairs(train[:count]), pairs(train[count:])
    return Split(name, kind, index, rest, held_out, {"test": pairs(test)}, float(scale))


def gap_features(folder: Path, name: str) -> Iterator[int]:
    """Features whose gap split leaves a gap: few training data lie in it."""
    own = folder / "uci" / name
    features = np.atleast_1d(np.loadtxt(own / "index_features.txt")).astype(int)
    inputs = np.loadtxt(own / "data.txt")[:, features]
    for index in range(len(features)):
        train, test = (
            inputs[part, index] for part in _parts(folder, name, "gap", index, inputs)
        )
        if np.mean((train >= test.min()) & (train <= test.max())) <= _MOST_IN_GAP:
            yield index


def _parts(
    folder: Path, name: str, kind: Kind, index: int, inputs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the training and the test part."""
    where = folder / {"standard": "uci", "gap": "uci_gap"}[kind] / name
    if kind == "gap" and not where.is_dir():
        order = np.argsort(inputs[:, index], kind="stable")
        first, last = round(len(order) / 3), round(2 * len(order) / 3)
        return np.r_[order[:first], order[last:]], order[first:last]
    train, test = (
        np.loadtxt(where / f"index_{part}_{index}.txt").astype(int)
        for part in ("train", "test")
    )
    return train, test


def _scale(values: np.ndarray) -> np.ndarray:
    """Standard deviations; 1 where nothing varies."""
    scale = values.std(0)
    return np.where(scale < 1e-10, 1.0, scale)


def digits_split(
    seed: int, rotations: Sequence[int] = ROTATIONS, *, most: int | None = None
) -> Split:
    """scikit-learn's digits, 8 x 8 pixels in [0, 1], the test images turned as well.

    Args:
        seed: Of the split.
        rotations: Of the test images, degrees.
        most: Data of each part.
    """
    bunch = load_digits()
    images, labels = (bunch.images / 16).astype(np.float32), bunch.target

    def parts(rest: np.ndarray, share: float) -> list[np.ndarray]:
        return train_test_split(
            rest, test_size=share, stratify=labels[rest], random_state=seed
        )

    def pairs(part: np.ndarray, degrees: int = 0) -> Pairs:
        turned = rotate(
            images[part],
            degrees,
            axes=(2, 1),
            reshape=False,
            order=1,
            mode="grid-constant",
        )
        return torch.from_numpy(turned).flatten(1), torch.from_numpy(labels[part])

    rest, test = parts(np.arange(len(labels)), _TEST)
    train, held_out = parts(rest, _HELD_OUT)
    train, held_out, test = train[:most], held_out[:most], test[:most]
    tests = {turned_by(degrees): pairs(test, degrees) for degrees in rotations}
    return Split("digits", "rotated", seed, pairs(train), pairs(held_out), tests)


def turned_by(degrees: int) -> str:
    """What images that are turned are called."""
    return f"{degrees} degrees" if degrees else ""
