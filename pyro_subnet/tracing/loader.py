"""What a DataLoader leaves out of its dataset, or shows more than once."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from pyro_subnet.exceptions import DataError
from pyro_subnet.tracing.trace import preserved_rng

# Samplers that show each of their data once.
_ONCE = (SequentialSampler, SubsetRandomSampler)


def loader_doubts(
    batches: Any, num_data: int | None, over_ranks: bool = False
) -> list[str]:
    """Why the batches of a loader may not show each observation of its dataset once."""
    # Over ranks each loader shows a part, and `check_seen_once` counts them.
    if not isinstance(batches, DataLoader) or isinstance(
        batches.dataset, IterableDataset
    ):
        return []
    sampler: Any = batches.sampler
    dataset: Any = batches.dataset
    total = len(dataset)
    kind, found = type(sampler).__name__, list[str]()
    own = batches.batch_size is None  # it has a batch sampler, or no batches
    once = type(sampler) in _ONCE
    once |= type(sampler) is RandomSampler and not sampler.replacement
    if isinstance(sampler, WeightedRandomSampler | RandomSampler) and (
        sampler.replacement
    ):
        found.append(
            f"`batches` draw from the {total} data with replacement, by {kind}: some "
            "count several times, others never. Pass a loader of the same dataset "
            "without that sampler."
        )
    elif over_ranks:
        return []
    elif isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
        found.append(
            f"`batches` show one of {sampler.num_replicas} parts of the {total} data, "
            "by DistributedSampler. Pass a loader of the whole dataset."
        )
    elif not (once and not own) or _length(sampler) > total:
        found += _of_indices(batches, total, num_data)
    lost = _length(sampler) % (batches.batch_size or 1)
    if batches.drop_last and not own and lost and num_data is None:
        found.append(
            f"`batches` leave out the last {lost} of {_length(sampler)} data, by "
            "drop_last=True. Pass a loader with drop_last=False, or "
            f"num_data={total} to scale the sum up to all data."
        )
    return found


@final
@dataclass(frozen=True)
class Part:
    """What a loader says of the dataset that it shows a part of.

    Attributes:
        length: Of the dataset.
        sampler: Who picks the part, by name.
        splits: Whether it is one of several parts, as the sampler says.
    """

    length: int
    sampler: str
    splits: bool

    @classmethod
    def of(cls, batches: Any) -> Part | None:
        """A loader's part; None for what is no loader, or has no length."""
        if not isinstance(batches, DataLoader) or isinstance(
            batches.dataset, IterableDataset
        ):
            return None
        dataset: Any = batches.dataset
        picks: Any = batches.sampler
        if batches.batch_size is None and batches.batch_sampler is not None:
            picks = batches.batch_sampler
        splits = isinstance(picks, DistributedSampler) and picks.num_replicas > 1
        return cls(len(dataset), type(picks).__name__, splits)


# Of each tensor of a batch its shape, and a number that tells it from others.
Marks = tuple[tuple[tuple[int, ...], float], ...]


def marks(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Marks:
    """What a batch is known by on other ranks."""
    leaves = tree_leaves((args, dict(kwargs)))
    # Real numbers in memory: of others the shape does.
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return tuple((tuple(tensor.shape), _mark(tensor)) for tensor in tensors)


def _mark(tensor: Tensor) -> float:
    if tensor.layout != torch.strided or tensor.is_complex():
        return 0.0
    flat = tensor.detach().flatten().double()
    places = torch.arange(len(flat), device=flat.device).add(1.0).sqrt()
    return float((flat * places).sum())


def check_apart(first: Sequence[Marks | None]) -> None:
    """Refuses ranks whose batches begin alike: they have the same data.

    Args:
        first: What each rank's first batch is known by; None without one.

    Raises:
        DataError: If two are the same.
    """
    for rank, own in enumerate(first):
        others = [other for other in first[:rank] if other and other == own]
        if others:
            raise DataError(
                "Each rank must have a part of the data of its own; got the same first "
                f"batch on rank {rank} as on rank {first.index(own)}. Load "
                "`Subset(dataset, range(rank, len(dataset), world_size))` on each."
            )


def check_seen_once(
    parts: Sequence[Part | None], seen: Sequence[int | None], num_data: int | None
) -> None:
    """Refuses parts over ranks that together are not all data, each once.

    Args:
        parts: What each rank's loader says.
        seen: Data that each rank has seen; None where plates do not tell.
        num_data: How many there are, if the user says.

    Raises:
        DataError: If they are more, or less.
    """
    known = [count for count in seen if count is not None]
    if len(known) < len(seen):
        return
    # A loader that shows its whole dataset has a dataset of its own.
    pairs = zip(parts, known, strict=True)
    split = [p for p, n in pairs if p is not None and (p.splits or n != p.length)]
    lengths = {part.length for part in split}
    expected = num_data
    if expected is None:
        expected = lengths.pop() if len(lengths) == 1 else sum(known)
    if sum(known) == expected:
        return
    by = f", by {split[0].sampler}" if split else ""
    raise DataError(
        f"All ranks together must see each of the {expected} data once; got "
        f"{sum(known)}, {', '.join(map(str, known))} on the ranks{by}. A sampler that "
        "evens out the ranks shows some data twice: load "
        "`Subset(dataset, range(rank, len(dataset), world_size))` on each instead."
    )


def _length(sampler: Any) -> int:
    try:
        return len(sampler)
    except TypeError:
        return 0


def _of_indices(loader: Any, total: int, num_data: int | None) -> list[str]:
    """Counts the indices that a sampler of the user's own gives, without loading."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - restored
    source = loader.batch_sampler if loader.batch_size is None else loader.sampler
    if source is None:
        source = loader.sampler
    with preserved_rng():
        items = islice(iter(source), 2 * total + 1)
        lists = (item if isinstance(item, list | tuple) else [item] for item in items)
        found = Counter[Any](chain.from_iterable(lists))
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
    doubts, kind = [], type(source).__name__
    repeated = sum(count > 1 for count in found.values())
    if repeated:
        doubts.append(
            f"`batches` show {repeated} of the {total} data more than once, by {kind}. "
            "Pass a loader of the same dataset without that sampler."
        )
    elif len(found) < total and num_data is None:
        doubts.append(
            f"`batches` leave out {total - len(found)} of {total} data, by {kind}. "
            f"Pass a loader of all data, or num_data={total} to scale the sum up to "
            "them."
        )
    return doubts
