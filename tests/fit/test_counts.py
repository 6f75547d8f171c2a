"""What loses, repeats or scales up data is said, and what does not is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.exceptions import DataCountWarning, DataError
from tests.tolerances import tolerance

N = 10
X = torch.randn(N, 2, generator=torch.Generator().manual_seed(1)).double()
Y = torch.randn(N, generator=torch.Generator().manual_seed(2)).double()
DATA = TensorDataset(X, Y)
CLOSE = tolerance(torch.float64, "closed_form")


def weights(x: Tensor) -> Tensor:
    return pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))


def plain(x: Tensor, y: Tensor) -> None:
    w = weights(x)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def subsampling(x: Tensor, y: Tensor) -> None:
    w = weights(x)
    with pyro.plate("data", N, subsample_size=len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def by_hand(x: Tensor, y: Tensor) -> None:
    w = weights(x)
    with poutine.scale(scale=N / len(x)), pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def tempered(x: Tensor, y: Tensor) -> None:
    w = weights(x)
    with poutine.scale(scale=0.5), pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def fit(model: Callable[..., None], batches: Any, **options: Any) -> Tensor:
    guide = AutoSubnetLaplace(model)
    found = guide.laplace_approximation_from(batches, **options)
    return found.get_posterior().precision_matrix


def right(x: Tensor = X, scale: float = 1.0) -> Tensor:
    return 4 * scale * x.T @ x + torch.eye(2).double()


class Repeating(Sampler[int]):
    """Shows the first observation in place of the last."""

    def __init__(self) -> None:
        pass

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Iterator[int]:
        yield from [*range(N - 1), 0]


class Halving(Repeating):
    """Shows every other observation."""

    def __iter__(self) -> Iterator[int]:
        yield from range(0, N, 2)


LOADERS: dict[str, tuple[dict[str, Any], str]] = {
    "drop_last": ({"drop_last": True}, r"leave out the last 2 of 10 data, by drop_las"),
    "weighted": (
        {"sampler": WeightedRandomSampler(torch.rand(N).tolist(), N)},
        "with replacement, by WeightedRandomSampler",
    ),
    "bootstrap": (
        {"sampler": RandomSampler(DATA, replacement=True)},
        "with replacement, by RandomSampler",
    ),
    "own": ({"sampler": Repeating()}, r"show 1 of the 10 data more than once, by Rep"),
    "part": ({"sampler": Halving()}, r"leave out 5 of 10 data, by Halving"),
    "one of two ranks": (
        {"sampler": DistributedSampler(DATA, num_replicas=2, rank=0)},
        "show one of 2 parts of the 10 data",
    ),
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_loader_that_loses_or_repeats_data(name: str) -> None:
    options, message = LOADERS[name]
    with pytest.warns(DataCountWarning, match=message):
        fit(plain, DataLoader(DATA, batch_size=4, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 4},
        {"batch_size": 4, "shuffle": True},
        {"batch_size": 5, "drop_last": True},
        {"batch_size": 3, "sampler": SubsetRandomSampler(range(N))},
        {"batch_sampler": BatchSampler(SequentialSampler(DATA), 4, drop_last=False)},
    ],
)
def test_a_loader_that_shows_each_observation_once(options: dict[str, Any]) -> None:
    loader = DataLoader(DATA, **options)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    for model in (plain, subsampling):
        torch.manual_seed(3)
        assert_close(fit(model, loader), right(), **CLOSE)
    torch.manual_seed(3)
    assert_close(torch.get_rng_state(), state, rtol=0, atol=0)


def test_a_part_is_told_by_num_data() -> None:
    loader = DataLoader(DATA, batch_size=4, drop_last=True)
    for model in (plain, subsampling):
        found = fit(model, loader, num_data=N)
        assert_close(found, right(X[:8], N / 8), **CLOSE)


def test_batches_that_show_less_than_the_plate_holds() -> None:
    with pytest.warns(DataCountWarning, match=r"show 6 of the 10 data .*num_data=10"):
        found = fit(subsampling, [(X[:3], Y[:3]), (X[3:6], Y[3:6])])
    assert_close(found, right(X[:6]), **CLOSE)


@pytest.mark.parametrize("sizes", [(6, 6), (12,)])
def test_batches_that_show_more_than_the_plate_holds(sizes: tuple[int, ...]) -> None:
    x, y = torch.cat([X, X[:2]]), torch.cat([Y, Y[:2]])
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    message = r"size of plate 'data' must be the number of all data; got 10, and 12"
    guide = AutoSubnetLaplace(subsampling)
    guide(X, Y)
    with pytest.raises(DataError, match=message):
        guide.laplace_approximation_from(batches)
    first = AutoSubnetLaplace(subsampling).laplace_approximation(X, Y)
    found = first.update_from(batches).get_posterior().precision_matrix
    assert_close(found, right(torch.cat([X, x])), **CLOSE)


@pytest.mark.parametrize("sizes", [(5, 5), (4, 4, 2)])
def test_a_scale_by_hand_in_minibatches(sizes: tuple[int, ...]) -> None:
    batches = list(zip(X.split(sizes), Y.split(sizes), strict=True))
    with pytest.warns(DataCountWarning, match=r"site 'y' seems to be N/B, by `poutine"):
        fit(by_hand, batches)
    # The same model on all data, and other scales, are right as they are.
    assert_close(fit(by_hand, [(X, Y)]), right(), **CLOSE)
    assert_close(fit(tempered, batches), right(scale=0.5), **CLOSE)


@pytest.mark.parametrize("batched", [False, True])
def test_a_model_that_subsamples_by_itself(batched: bool) -> None:
    def model(x: Tensor, y: Tensor) -> None:
        w = weights(x)
        with pyro.plate("data", N, subsample_size=4) as index:
            pyro.sample("y", dist.Normal(x[index] @ w, 0.5), obs=y[index])

    guide = AutoSubnetLaplace(model)
    call = guide.laplace_approximation
    if batched:
        call = lambda *batch: guide.laplace_approximation_from([batch])  # noqa: E731
    with pytest.warns(DataCountWarning, match=r"subsample of its own .*plate 'data'"):
        call(X, Y)


def test_nothing_is_said_of_what_is_right() -> None:
    batches = list(zip(X.split(4), Y.split(4), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior = AutoSubnetLaplace(subsampling).laplace_approximation_from(batches)
        posterior = posterior.update(X[:3], Y[:3]).update_from(batches[:1])
    found = posterior.get_posterior().precision_matrix
    assert_close(found, right(torch.cat([X, X[:3], X[:4]])), **CLOSE)
