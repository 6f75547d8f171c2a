"""How long the evidence takes beside the training of convolutional networks."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyro
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.engine.networks import resnet18_batchnorm
from benchmarks.harness.reporting import by_dataset, collected, table
from benchmarks.harness.task import Row, Score, Settings, Task
from benchmarks.paper.images.readers import read_images, to_unit
from benchmarks.selectors.network import pyro_model
from benchmarks.selectors.problems import small_cnn
from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.nn import init_to_module

NAME = "looks"
_METHOD = "train_by_evidence"
_EPOCHS = 14  # with three looks, by default, of which one is at the end
_METRICS = ("seconds of an epoch", "seconds of a look", "looks over the rest")


@dataclass(frozen=True)
class _Setup:
    """A network, and how many images of which set it is trained on."""

    name: str
    images: str
    count: int
    batch: int
    network: Callable[[], nn.Module]


_SETUPS = (
    _Setup("CNN, D = 5,994, 60,000 images of MNIST", "mnist", 60_000, 500, small_cnn),
    _Setup(
        "ResNet-18, D = 11.2M, 200 images of CIFAR-10",
        "cifar10",
        200,
        50,
        resnet18_batchnorm,
    ),
)


def tasks(settings: Settings) -> list[Task]:
    if settings.data_dir is None:
        return []
    tiny = settings.scale == "smoke"
    return [
        Task(
            NAME,
            setup.name,
            seed,
            "",
            (_METHOD,),
            partial(_run, setup, settings.data_dir, 2 if tiny else _EPOCHS, seed),
        )
        for setup in _SETUPS
        for seed in settings.numbers
    ]


def _run(
    setup: _Setup, folder: Path, num_epochs: int, seed: int, methods: Sequence[str]
) -> Iterator[tuple[str, list[Score]]]:
    for name in methods:
        images = read_images(setup.images, folder)
        parts = (images.train, images.held_out)
        x = to_unit(torch.cat([part.images for part in parts])[: setup.count])
        y = torch.cat([part.labels for part in parts])[: setup.count]
        yield name, measured(setup.network, (x, y), setup.batch, num_epochs, seed)


def measured(
    network: Callable[[], nn.Module],
    data: tuple[Tensor, Tensor],
    batch: int,
    num_epochs: int,
    seed: int = 0,
) -> list[Score]:
    """Seconds of an epoch and of a look at the evidence, and their ratio in all."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    net = network().eval()
    model = pyro_model(net, None)
    guide = AutoSubnetLaplace(model, 1000, init_loc_fn=init_to_module(net))
    loader = DataLoader(TensorDataset(*data), batch_size=batch)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that so few epochs do not train it
        guide.train_by_evidence(loader, num_epochs=num_epochs)
    seconds = time.perf_counter() - start
    looks = [look.seconds for look in guide.evidence_history]
    rest = seconds - sum(looks)
    values = (rest / num_epochs, sum(looks) / len(looks), sum(looks) / rest)
    return [
        Score("", metric, value) for metric, value in zip(_METRICS, values, strict=True)
    ]


def report(rows: Sequence[Row], folder: Path) -> str:
    """A line a network."""
    lines = by_dataset(collected(rows), _METHOD, _METRICS)
    return table("Looks", ["network", *_METRICS], lines)
