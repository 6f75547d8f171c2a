"""Fits, tunes and judges every method on one split."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from benchmarks.selectors import methods
from benchmarks.selectors.data import Pairs, Split
from benchmarks.selectors.methods import METHODS
from benchmarks.selectors.network import NUM_CLASSES, Noise, Trained, sgd_moments, train
from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.exceptions import NoOutputVarianceWarning, SubnetError
from pyro_subnet.nn import init_to_module

Row = dict[str, Any]
Cell = tuple[str, float | None]
KEY = ("data", "kind", "noise", "split", "method", "share")


@dataclass(frozen=True)
class Plan:
    """How much is done.

    Attributes:
        sizes: Shares of the weights.
        names: Methods, in this order.
        noise: Of regression: see :func:`~benchmarks.selectors.network.train`.
        num_hidden: Units of each hidden layer.
        num_steps: Of training.
        swag_steps: Of SGD, for its moments.
    """

    sizes: Sequence[float] = (0.05,)
    names: Sequence[str] = tuple(METHODS)
    noise: Noise = "fitted"
    num_hidden: int = 50
    num_steps: int = 2000
    swag_steps: int = 1000

    def cells(self) -> Iterator[Cell]:
        """Method and size of each row but the MAP's."""
        for name in self.names:
            method = METHODS[name]
            if method.sized:
                yield from ((name, size) for size in self.sizes if size <= method.most)
            else:
                yield name, None


def key(row: Row) -> tuple[Any, ...]:
    """What a row is of."""
    return tuple(row[part] for part in KEY)


def read(path: Path) -> list[Row]:
    """Rows of a file, one JSON object a line; none if it is not there."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(split: Split, plan: Plan, done: set[tuple[Any, ...]]) -> Iterator[Row]:
    """The rows of a split that are not done yet."""
    regression = split.target_scale is not None
    head = {
        "data": split.name,
        "kind": split.kind,
        "noise": plan.noise if regression else None,
        "split": split.index,
    }
    cells: list[Cell] = [(methods.MAP, None), *plan.cells()]
    todo = [cell for cell in cells if (*head.values(), cell[0], cell[1]) not in done]
    if not todo:
        return
    start = time.process_time()
    trained = train(split, plan.num_hidden, plan.num_steps, plan.noise)
    seconds = time.process_time() - start
    full, _ = fit(trained, split, None)
    wanted = {name: variance(full, x) for name, (x, _) in split.tests.items()}
    for name, share in todo:
        row = {**head, "method": name, "share": share, "D": full.subnet.num_params}
        if name == methods.MAP:
            row |= {"noise_scale": trained.noise_scale, "seconds": {"train": seconds}}
            yield row | judge(split, lambda x: at_map(trained.model, full, x))
            continue
        try:
            yield row | measure(trained, split, plan.swag_steps, (name, share), wanted)
        except SubnetError as error:
            yield row | {"failed": f"{type(error).__name__}: {error}"}


def fit(
    trained: Trained, split: Split, subnet: Any, covariance: str = "full"
) -> tuple[AutoSubnetMultivariateNormal, bool]:
    """The posterior, and whether it was warned that the subnet moves no output."""
    # Where rows of the Jacobian are few, the same posterior is tuned faster so.
    few = (
        subnet is None and covariance == "full" and _rows(split) < _num_params(trained)
    )
    guide = AutoSubnetLaplace(
        trained.model,
        subnet,
        init_loc_fn=init_to_module(trained.net),
        covariance=covariance,
        form="dual" if few else "auto",
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        posterior = guide.laplace_approximation(*split.train)
    return posterior, any(w.category is NoOutputVarianceWarning for w in caught)


def _rows(split: Split) -> int:
    return len(split.train[0]) * (1 if split.target_scale is not None else NUM_CLASSES)


def _num_params(trained: Trained) -> int:
    return sum(part.numel() for part in trained.net.parameters())


def measure(
    trained: Trained, split: Split, steps: int, cell: Cell, wanted: dict[str, float]
) -> Row:
    """One method at one size; seconds are those of the processor, on one thread.

    Args:
        trained: The MAP.
        split: The data.
        steps: Of SGD, where its moments are needed.
        cell: Method and size.
        wanted: The full posterior's variance on each of the tests' inputs.
    """
    name, share = cell
    method = METHODS[name]
    start = time.process_time()
    subnet = None
    if method.choose is not None:
        subnet = method.choose(
            share or 0.0, split.index, lambda: sgd_moments(trained, split, steps)
        )
    posterior, dead = fit(trained, split, subnet, method.covariance)
    fitted = time.process_time()
    tuned = posterior.tune_prior_precision("nll", val=split.held_out, standard_errors=0)
    seconds = {
        "fit": fitted - start,
        "tune": time.process_time() - fitted,
    }
    tuning = tuned.tuning
    finite = tuning.objective[tuning.objective.isfinite()]
    row = judge(split, tuned.predictive_distribution)
    return row | {
        "S": posterior.subnet.size,
        "seconds": seconds,
        "scale": tuning.best,
        "at_bound": tuning.at_bound,
        # What the best scale gains on the model's own prior, and on any other.
        "spread": float(finite.max() - finite.min()),
        "unusable_scales": len(tuning.objective) - len(finite),
        "moves_nothing": dead,
        "untuned": judge(split, posterior.predictive_distribution),
        "kept": {
            inputs: variance(posterior, x) / wanted[inputs]
            for inputs, (x, _) in split.tests.items()
        },
    }


@torch.no_grad()
def variance(posterior: AutoSubnetMultivariateNormal, x: Tensor) -> float:
    """Linearized predictive variance, summed over inputs and outputs."""
    return float(posterior.output_distribution(x).variance.to(torch.float64).sum())


def at_map(model: Any, posterior: AutoSubnetMultivariateNormal, x: Tensor) -> Any:
    """The model's distribution of y at the MAP."""
    fixed = poutine.condition(model, data=posterior.median())
    return poutine.trace(fixed).get_trace(x).nodes["y"]["fn"]


@torch.no_grad()
def judge(split: Split, predict: Callable[[Tensor], Any]) -> Row:
    """Mean negative log density, and RMSE or the share of wrong classes; target units.

    Both are in the target's own unit.
    """
    nll, error = {}, {}
    for name, (x, y) in split.tests.items():
        found = predict(x)
        nll[name] = -float(found.log_prob(y).mean())
        error[name] = _error(split, found, (x, y))
        if split.target_scale is not None:
            nll[name] += math.log(split.target_scale)
    return {"nll": nll, "error": error}


def _error(split: Split, predictive: Any, pairs: Pairs) -> float:
    _, y = pairs
    if split.target_scale is None:
        return float((predictive.probs.argmax(-1) != y).double().mean())
    return float((predictive.mean - y).square().mean().sqrt()) * split.target_scale
