"""Image sets in their published formats: idx ``.gz``, and CIFAR-10's binary version."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Folders that a set may stand in, below the folder of the data.
_FOLDERS = {
    "mnist": ("mnist", "MNIST/raw", "MNIST"),
    "fashion": ("fashion-mnist", "FashionMNIST/raw", "FashionMNIST"),
    "cifar10": ("cifar-10-batches-bin", "cifar10", "cifar-10"),
}
_IDX_BYTES = 0x08  # the type code of unsigned bytes
_HELD_OUT = 0.1
_SPLIT_SEED = 0


@dataclass(frozen=True, eq=False)
class Part:
    """Images and their classes.

    Attributes:
        images: Bytes, shape (N, C, H, W).
        labels: Shape (N,), int64.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def some(self, count: int) -> Part:
        """As many of them, chosen at random, the same in every run."""
        generator = torch.Generator().manual_seed(_SPLIT_SEED)
        return self[torch.randperm(len(self), generator=generator)[:count]]

    def __getitem__(self, rows: Tensor | slice) -> Part:
        return Part(self.images[rows], self.labels[rows])


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A data set; a tenth of its training part is held out, the same for every seed.

    Attributes:
        name: ``"mnist"``, ``"fashion"`` or ``"cifar10"``.
        train: What networks are trained on, and posteriors fitted to.
        held_out: What priors, rates and scales are chosen on.
        test: The published test part.
    """

    name: str
    train: Part
    held_out: Part
    test: Part


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes in the idx format, gzipped.

    Source: LeCun, Cortes and Burges, "The MNIST database", file formats.
    """
    with gzip.open(path, "rb") as stream:
        raw = stream.read()
    if raw[:3] != bytes([0, 0, _IDX_BYTES]):
        raise ValueError(f"{path} must be an idx file of bytes; it starts {raw[:4]!r}.")
    start = 4 + 4 * raw[3]
    shape = np.frombuffer(raw, ">i4", raw[3], 4)
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy()


def read_cifar_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 3, 32, 32) and labels of one file of CIFAR-10's binary version.

    Source: Krizhevsky (2009), the data set's page, "binary version".
    """
    rows = np.fromfile(path, np.uint8).reshape(-1, 1 + 3 * 32 * 32)
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]


def read_images(name: str, data_dir: Path) -> ImageSet:
    """A data set by name.

    Args:
        name: As in :class:`ImageSet`.
        data_dir: The folder that holds the set's own, under one of its usual names.

    Returns:
        The set.

    Raises:
        FileNotFoundError: If no folder of the set is there.
    """
    folder = _folder(name, data_dir)
    if name == "cifar10":
        train = [read_cifar_batch(path) for path in sorted(folder.glob("data_batch_*"))]
        images = np.concatenate([pair[0] for pair in train])
        labels = np.concatenate([pair[1] for pair in train])
        parts = ((images, labels), read_cifar_batch(folder / "test_batch.bin"))
    else:
        parts = tuple(
            (
                read_idx(folder / f"{part}-images-idx3-ubyte.gz")[:, None],
                read_idx(folder / f"{part}-labels-idx1-ubyte.gz"),
            )
            for part in ("train", "t10k")
        )
    everything, test = (
        Part(torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64)))
        for images, labels in parts
    )
    order = torch.randperm(
        len(everything), generator=torch.Generator().manual_seed(_SPLIT_SEED)
    )
    count = max(1, round(_HELD_OUT * len(everything)))
    return ImageSet(name, everything[order[count:]], everything[order[:count]], test)


def to_unit(images: Tensor) -> Tensor:
    """Bytes as float32 in [0, 1]."""
    return images.to(torch.float32) / 255


def _folder(name: str, data_dir: Path) -> Path:
    for folder in _FOLDERS[name]:
        if (data_dir / folder).is_dir():
            return data_dir / folder
    tried = ", ".join(_FOLDERS[name])
    raise FileNotFoundError(f"{data_dir} must hold {name} in one of {tried}.")
