"""Fits over the ranks of a process group, against one process that has all data."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, final

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributed as td
from pyro import poutine
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.exceptions import OptionError
from pyro_subnet.nn import bayesianize, init_to_module
from pyro_subnet.selection import (
    GreedyVariance,
    LargestGradient,
    LargestMagnitude,
    LargestVariance,
    LastLayer,
    PredictiveVariance,
    RandomSubnet,
)
from pyro_subnet.subnet import Subnet
from tests.ranks import Outcome, on_ranks
from tests.tolerances import tolerance

# Nothing is trained here, and some of so few weights move nothing.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pyro_subnet.exceptions.UntrainedWarning"),
    pytest.mark.filterwarnings(
        "ignore::pyro_subnet.exceptions.NoOutputVarianceWarning"
    ),
    pytest.mark.filterwarnings("ignore::pyro_subnet.exceptions.AbsorbedNoiseWarning"),
]

NUM_DATA = 7
# What one process and several may differ by in float64, relative and absolute.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
PAIR = 2

Options = dict[str, Any]
FITS: dict[str, Options] = {
    "default": {"subnet": 0.3},
    "all": {"subnet": None},
    "dual": {"subnet": None, "form": "dual"},
    "primal": {"subnet": None, "form": "primal"},
    "diagonal": {"subnet": None, "covariance": "diag"},
    "kronecker": {"subnet": None, "covariance": "kron"},
    "empirical": {"subnet": None, "curvature": "ef"},
    "hessian": {"subnet": LastLayer(), "curvature": "hessian"},
    "random": {"subnet": RandomSubnet(9)},
    "magnitude": {"subnet": LargestMagnitude(9)},
    "fisher": {"subnet": PredictiveVariance(9, weighting="fisher")},
    "diagonal scores": {"subnet": PredictiveVariance(9, method="diagonal")},
    "largest variance": {"subnet": LargestVariance(9)},
    "largest gradient": {"subnet": LargestGradient(9)},
    "greedy": {"subnet": GreedyVariance(9)},
    "last layer": {"subnet": LastLayer()},
}


# Those that are asked for of every number of ranks; all of them of three, of which the
# second has no data.
_FEW = ("default", "all", "kronecker", "last layer")
_MANY_RANKS = 3


def network(outputs: int, dtype: torch.dtype) -> Any:
    """The same on every rank."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, outputs))
    return bayesianize(net.to(dtype))


def classes(dtype: torch.dtype) -> Callable[..., Any]:
    bnn = network(3, dtype)

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        logits = bnn(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    return model


def subsampled(dtype: torch.dtype) -> Callable[..., Any]:
    """A plate that says how many data there are, and a mask; noise is a weight."""
    bnn = network(1, dtype)

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        mean = bnn(x).squeeze(-1)
        noise = pyro.sample("noise", dist.LogNormal(mean.new_zeros(()), 0.5))
        with pyro.plate("data", NUM_DATA, subsample_size=len(x)):
            with poutine.mask(mask=x[:, 0] < 1.0):
                return pyro.sample("y", dist.Normal(mean, noise), obs=y)

    return model


MODELS = {"classes": classes, "subsampled": subsampled}


def data(name: str, dtype: torch.dtype, count: int = NUM_DATA) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, 2, generator=generator).to(dtype)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return x, y if name == "classes" else y.to(dtype)


def guide_of(name: str, dtype: torch.dtype, options: Options) -> AutoSubnetLaplace:
    pyro.clear_param_store()
    guide = AutoSubnetLaplace(MODELS[name](dtype), **options)
    pyro.set_rng_seed(0)
    guide(*data(name, dtype))
    return guide


def numbers(posterior: AutoSubnetMultivariateNormal) -> dict[str, Tensor]:
    """What is compared of a posterior."""
    x = torch.linspace(-1, 1, 8, dtype=posterior.loc.dtype).view(4, 2)
    return {
        "subnet": posterior.subnet.flat,
        "variance": posterior.output_variance(x),
        "evidence": posterior.log_marginal_likelihood().detach(),
        "precision": posterior.get_posterior().precision_matrix,
        "seen": torch.tensor(posterior.state.num_seen),
    }


def chosen(flat: Tensor, guide: AutoSubnetLaplace, batches: Any) -> Subnet:
    """A selector of known positions."""
    return Subnet.from_positions(guide.latents.layout, flat)


def parts(count: int, size: int, split: str) -> tuple[Tensor, ...]:
    """Which data each rank has."""
    everything = torch.arange(count)
    none = everything[:0]
    if split == "uneven":
        return tuple(everything[rank::size] for rank in range(size))
    if split == "gap":
        shares = iter(everything[rank :: size - 1] for rank in range(size - 1))
        return tuple(none if rank == 1 else next(shares) for rank in range(size))
    return (*(none for _ in range(size - 1)), everything)  # the last has all


def fit_part(
    rank: int, size: int, name: str, dtype: torch.dtype, split: str
) -> dict[str, dict[str, Tensor]]:
    """Every fit of this rank's part, in batches of two."""
    x, y = data(name, dtype)
    mine = parts(NUM_DATA, size, split)[rank]
    batches = [(x[at], y[at]) for at in mine.split(2)] if len(mine) else []
    found = {}
    for fit in FITS if size == _MANY_RANKS else _FEW:
        if (name, fit) == ("subsampled", "kronecker"):
            continue  # a noise has no factors
        guide = guide_of(name, dtype, FITS[fit])
        posterior = guide.laplace_approximation_from(batches, process_group=True)
        found[fit] = numbers(posterior)
        if fit == "default":
            more = posterior.update_from(batches, process_group=True)
            found["updated"] = numbers(more)
    return found


@pytest.mark.parametrize(
    ("size", "name", "dtype", "split"),
    [
        (1, "classes", torch.float64, "uneven"),
        (2, "classes", torch.float32, "uneven"),
        (2, "subsampled", torch.float64, "empty"),
        (3, "classes", torch.float64, "gap"),
        (3, "subsampled", torch.float64, "gap"),
        (4, "subsampled", torch.float64, "uneven"),
    ],
)
def test_ranks_together_are_one_process(
    size: int, name: str, dtype: torch.dtype, split: str, tmp_path: Path
) -> None:
    """All forms, curvatures and selectors; ranks agree to the bit."""
    outcomes = on_ranks(size, tmp_path, fit_part, size, name, dtype, split)
    assert [outcome.said for outcome in outcomes] == [""] * size
    x, y = data(name, dtype)
    tight = EXACT if dtype == torch.float64 else tolerance(dtype, "reordered")
    for fit, found in outcomes[0].value.items():
        for outcome in outcomes[1:]:
            for part, value in outcome.value[fit].items():
                assert torch.equal(value, found[part]), (fit, part)
        options = dict(FITS["default" if fit == "updated" else fit])
        if fit == "random":  # the first rank's, which has a seed of its own
            options["subnet"] = partial(chosen, found["subnet"])
        guide = guide_of(name, dtype, options)
        batches = [(x[at], y[at]) for at in torch.arange(NUM_DATA).split(2)]
        alone = guide.laplace_approximation_from(batches)
        if fit == "updated":
            alone = alone.update_from(batches)
        for part, value in numbers(alone).items():
            assert_close(found[part], value, **tight)


def fit_drawn(rank: int) -> dict[str, Tensor]:
    """Labels that each rank draws for its own data."""
    x, y = data("classes", torch.float64)
    at = parts(NUM_DATA, PAIR, "uneven")[rank]
    options: Options = {"subnet": None, "curvature": "ggn-mc"}
    guide = guide_of("classes", torch.float64, options)
    pyro.set_rng_seed(rank)
    batches = [(x[at], y[at])]
    return numbers(guide.laplace_approximation_from(batches, process_group=True))


@pytest.mark.filterwarnings("ignore::pyro_subnet.exceptions.MonteCarloFisherWarning")
def test_labels_that_ranks_draw_are_those_they_draw_alone(tmp_path: Path) -> None:
    """The sum of both curvatures, each drawn by one process of that rank's seed."""
    outcomes = on_ranks(PAIR, tmp_path, fit_drawn)
    x, y = data("classes", torch.float64)
    options: Options = {"subnet": None, "curvature": "ggn-mc"}
    likelihood = 0.0
    for rank, at in enumerate(parts(NUM_DATA, PAIR, "uneven")):
        guide = guide_of("classes", torch.float64, options)
        pyro.set_rng_seed(rank)
        likelihood = likelihood + guide.laplace_approximation(x[at], y[at]).ggn()
    eye = torch.eye(len(likelihood)).to(likelihood)  # the prior is N(0, 1)
    for outcome in outcomes:
        assert_close(outcome.value["precision"], likelihood + eye, **EXACT)


def fit_group(rank: int) -> dict[str, Tensor]:
    """Ranks 0 and 2 alone, in a group of their own."""
    group = td.new_group([0, 2])
    x, y = data("classes", torch.float64)
    at = torch.arange(rank // 2, NUM_DATA, PAIR)
    guide = guide_of("classes", torch.float64, {"subnet": 0.3})
    batches = [(x[at], y[at])]
    return numbers(guide.laplace_approximation_from(batches, process_group=group))


def test_a_group_of_some_ranks(tmp_path: Path) -> None:
    """Those in it fit on; the one that is not is told so."""
    first, outside, last = on_ranks(3, tmp_path, fit_group)
    assert outside.error == "OptionError"
    assert "a group that this process is in" in outside.said
    guide = guide_of("classes", torch.float64, {"subnet": 0.3})
    alone = guide.laplace_approximation_from([data("classes", torch.float64)])
    for part, value in numbers(alone).items():
        assert_close(first.value[part], value, **EXACT)
        assert torch.equal(first.value[part], last.value[part]), part


def fit_many(rank: int, size: int, count: int) -> Any:
    dtype = torch.float64
    x, y = data("classes", dtype, count)
    mine = parts(count, size, "uneven")[rank]
    guide = guide_of("classes", dtype, {"subnet": None})
    batches = [(x[at], y[at]) for at in mine.split(64)]
    return numbers(guide.laplace_approximation_from(batches, process_group=True))


def test_many_data_are_a_matrix_that_is_summed(tmp_path: Path) -> None:
    """Of 1,001 data the rows have turned into a matrix on every rank."""
    count = 1001
    outcomes = on_ranks(3, tmp_path, fit_many, 3, count)
    assert [outcome.said for outcome in outcomes] == [""] * 3
    x, y = data("classes", torch.float64, count)
    guide = guide_of("classes", torch.float64, {"subnet": None})
    alone = numbers(guide.laplace_approximation_from([(x, y)]))
    for part, value in alone.items():
        for outcome in outcomes:
            assert_close(outcome.value[part], value, **EXACT)


def fit_loaded(rank: int, sampler: str, num_data: int | None) -> int:
    """A fit from a loader, split by a sampler that pads or by one that does not."""
    dataset = TensorDataset(*data("classes", torch.float64))
    if sampler == "pads":
        picks: Any = DistributedSampler(dataset, shuffle=False)
        loader = DataLoader(dataset, batch_size=2, sampler=picks)
    else:
        own = range(rank, len(dataset), PAIR)
        loader = DataLoader(Subset(dataset, own), batch_size=2)
    guide = guide_of("classes", torch.float64, {"subnet": RandomSubnet(5)})
    posterior = guide.laplace_approximation_from(
        loader, process_group=True, num_data=num_data
    )
    return int(posterior.state.num_seen or 0)


def test_a_sampler_that_pads_is_refused_on_every_rank(tmp_path: Path) -> None:
    """Eight data of seven: one would count twice."""
    outcomes = on_ranks(PAIR, tmp_path, fit_loaded, "pads", None)
    for outcome in outcomes:
        assert outcome.error == "DataError"
        assert "each of the 7 data once; got 8, 4, 4 on the ranks" in outcome.said
        assert "DistributedSampler" in outcome.said


def fit_all(rank: int) -> None:
    """The whole dataset on every rank."""
    guide = guide_of("classes", torch.float64, {"subnet": RandomSubnet(5)})
    batches = [data("classes", torch.float64)]
    guide.laplace_approximation_from(batches, process_group=True)


def test_the_same_data_on_every_rank_are_refused(tmp_path: Path) -> None:
    for outcome in on_ranks(PAIR, tmp_path, fit_all):
        assert outcome.error == "DataError"
        assert "same first batch on rank 1 as on rank 0" in outcome.said


def test_what_does_not_pad_is_taken_and_counted(tmp_path: Path) -> None:
    for num_data in (None, NUM_DATA):
        outcomes = on_ranks(PAIR, tmp_path, fit_loaded, "exact", num_data)
        assert outcomes == [Outcome(NUM_DATA)] * PAIR
    outcomes = on_ranks(PAIR, tmp_path, fit_loaded, "exact", NUM_DATA + 1)
    assert {outcome.error for outcome in outcomes} == {"DataError"}


def fit_failing(rank: int, how: str, folder: Path | None = None) -> Any:
    """A fit in which rank 1 fails at its third batch, the first time."""
    x, y = data("classes", torch.float64, 20)
    mark = None if folder is None else folder / "failed"

    def batches() -> Iterator[Any]:
        own = torch.arange(20)[rank::PAIR]
        for i, at in enumerate(own.split(2)):
            if rank == 1 and i == 2 and (mark is None or not mark.exists()):
                if mark is not None:
                    mark.touch()
                if how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ValueError("the disk is gone")
            yield x[at], y[at]

    options: Options = {}
    if folder is not None:
        options = {"checkpoint": folder / "fit", "checkpoint_every": 1}
    guide = guide_of("classes", torch.float64, {"subnet": None})
    posterior = guide.laplace_approximation_from(
        batches(), process_group=True, **options
    )
    return numbers(posterior)


def test_a_rank_that_raises_ends_the_others(tmp_path: Path) -> None:
    first, second = on_ranks(PAIR, tmp_path, fit_failing, "raises")
    assert (second.error, second.said) == ("ValueError", "the disk is gone")
    assert first.error == "RankError"
    assert "rank 1 of 2: ValueError: the disk is gone" in first.said


@final
class Batches:
    """Batches that a selector passes over first; rank 1 fails at its second."""

    def __init__(self, rank: int):
        self.rank = rank

    def __iter__(self) -> Iterator[Any]:
        x, y = data("classes", torch.float64)
        for i, at in enumerate(torch.arange(NUM_DATA)[self.rank :: PAIR].split(2)):
            if (self.rank, i) == (1, 1):
                raise ValueError("the disk is gone")
            yield x[at], y[at]


def fit_failing_selector(rank: int) -> None:
    guide = guide_of("classes", torch.float64, {"subnet": LargestGradient(5)})
    guide.laplace_approximation_from(Batches(rank), process_group=True)


def test_a_rank_that_raises_in_a_selector_ends_the_others(tmp_path: Path) -> None:
    first, second = on_ranks(PAIR, tmp_path, fit_failing_selector)
    assert (second.error, second.said) == ("ValueError", "the disk is gone")
    assert first.error == "RankError"
    assert "rank 1 of 2: ValueError: the disk is gone" in first.said


def test_a_rank_that_is_killed_ends_the_others(tmp_path: Path) -> None:
    first, second = on_ranks(PAIR, tmp_path, fit_failing, "killed")
    assert second.error == "killed"
    assert first.error == "RankError"
    assert "did not answer" in first.said


@pytest.mark.parametrize("how", ["raises", "killed"])
def test_the_same_call_resumes_each_rank_from_its_file(
    how: str, tmp_path: Path
) -> None:
    failed = on_ranks(PAIR, tmp_path, fit_failing, how, tmp_path)
    assert failed[0].error == "RankError"
    files = {path.name for path in tmp_path.glob("fit*")}
    assert files == {"fit.rank0", "fit.rank1"}
    resumed = on_ranks(PAIR, tmp_path, fit_failing, how, tmp_path)
    assert not list(tmp_path.glob("fit*"))
    whole = on_ranks(PAIR, tmp_path, fit_failing, how, tmp_path)
    for one, other in zip(resumed, whole, strict=True):
        assert one.error is None
        for part, value in other.value.items():
            assert torch.equal(one.value[part], value), part


def fit_anew(rank: int) -> None:
    """A guide that no rank has called, where rank 1 has no data."""
    pyro.clear_param_store()
    guide = AutoSubnetLaplace(classes(torch.float64), RandomSubnet(5))
    if rank == 0:
        guide(*data("classes", torch.float64))
    guide.laplace_approximation_from([], process_group=True)


def test_a_rank_without_data_needs_a_guide_that_is_set_up(tmp_path: Path) -> None:
    first, second = on_ranks(PAIR, tmp_path, fit_anew)
    assert second.error == "DataError"
    assert "never called" in second.said
    assert first.error == "RankError"


def fit_nothing(rank: int) -> None:
    """No rank has any data."""
    guide = guide_of("classes", torch.float64, {"subnet": RandomSubnet(5)})
    guide.laplace_approximation_from([], process_group=True)


def test_no_data_on_any_rank_are_an_error(tmp_path: Path) -> None:
    for outcome in on_ranks(PAIR, tmp_path, fit_nothing):
        assert outcome.error == "DataError"
        assert "at least one batch" in outcome.said


def fit_unlike(rank: int, what: str) -> None:
    """A fit whose ranks differ in something."""
    options: Options = {"subnet": RandomSubnet(5)}
    if what == "options" and rank == 1:
        options["curvature"] = "ef"
    guide = guide_of("classes", torch.float64, options)
    if what == "MAP" and rank == 1:
        with torch.no_grad():
            guide.loc += 1.0
    x, y = data("classes", torch.float64)
    guide.laplace_approximation_from([(x[rank:], y[rank:])], process_group=True)


@pytest.mark.parametrize("what", ["options", "MAP"])
def test_ranks_that_differ_are_refused_on_every_rank(what: str, tmp_path: Path) -> None:
    outcomes = on_ranks(PAIR, tmp_path, fit_unlike, what)
    assert {outcome.error for outcome in outcomes} == {"OptionError"}
    assert all(f"the same {what}" in outcome.said for outcome in outcomes)


def fit_trained(rank: int) -> Any:
    """A network that is trained in parallel, and never taken out of it."""
    torch.manual_seed(rank)  # rank 0's weights are broadcast
    net = nn.parallel.DistributedDataParallel(nn.Linear(2, 3).double())
    x, y = data("classes", torch.float64)
    at = torch.arange(rank, NUM_DATA, PAIR)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[at]), y[at]).backward()
        optimizer.step()
    bnn = bayesianize(net)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        logits = bnn(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    guide = AutoSubnetLaplace(model, init_loc_fn=init_to_module(net), subnet=None)
    batches = [(x[at], y[at])]
    posterior = guide.laplace_approximation_from(batches, process_group=True)
    return posterior.subnet.names[0], numbers(posterior)


def test_a_network_that_was_trained_in_parallel(tmp_path: Path) -> None:
    (name, first), (_, second) = [
        outcome.value for outcome in on_ranks(PAIR, tmp_path, fit_trained)
    ]
    assert name.startswith("weight")
    for part, value in first.items():
        assert torch.equal(value, second[part]), part


def test_a_group_must_be_initialized() -> None:
    guide = guide_of("classes", torch.float64, {"subnet": 5})
    batches = [data("classes", torch.float64)]
    with pytest.raises(OptionError, match="init_process_group"):
        guide.laplace_approximation_from(batches, process_group=True)
    posterior = guide.laplace_approximation_from(batches, process_group=False)
    with pytest.raises(OptionError, match="torchrun"):
        posterior.update_from(batches, process_group=True)
