"""UCI regression: a small share of a large network against all of a small one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.harness.task import Score, Settings, Task
from benchmarks.paper.members import Schedule, Shape, parse_hidden
from benchmarks.paper.regression import RIVALS, Fitted, Network, Plan, fit_rival
from benchmarks.selectors.data import Kind, Split, uci_split

SETS = (
    "bostonHousing",
    "concrete",
    "energy",
    "kin8nm",
    "naval-propulsion-plant",
    "power-plant",
    "protein-tertiary-structure",
    "wine-quality-red",
    "yacht",
)
NETWORKS = ("1x50", "1x100", "2x50", "2x100")
# The smallest and the largest, between which the paper's question is asked.
ENDS = ("1x50", "2x100")
SELECTORS = (
    "LargestVariance",
    "PredictiveVariance",
    "RandomSubnet",
    "LargestMagnitude",
    "LastLayer",
)
SUBNETS = tuple(f"subnet {name}" for name in SELECTORS)
# Of the largest network alone: a choice of thousands of weights takes seconds.
GREEDY = "subnet PredictiveVariance, greedy"
ENSEMBLE = "ensemble of subnets"
MAP_NOISE, EVIDENCE = "MAP, held-out noise", "subnet, by evidence"
# What `AutoSubnetLaplace(model, 0.05)` gives, and others as untuned.
DEFAULT, OWN_PRIOR = "subnet by default", ", own prior"
UNTUNED = tuple(
    f"{name}{OWN_PRIOR}" for name in (DEFAULT, "subnet LastLayer", "full Laplace")
)
# Of `PredictiveVariance`: a curve against S.
SHARES = (0.01, 0.02, 0.1, 0.2)
SIZED = tuple(f"subnet PredictiveVariance, {share:.0%}" for share in SHARES)
SWAG_SUBNET = "subnet LargestVariance (SWAG)"
# Whose D is the size of further subnets. In the largest network every subnet has the
# size of the smallest: 3% to 8% of its weights, in place of 5%.
SMALL = {"2x100": "1x100", "2x50": "1x50", "1x100": "1x50"}
EQUAL = ("LargestVariance", "PredictiveVariance")
# Held-out data beyond these train, too: more say little new about one number.
_HELD_OUT = 500
# A full posterior is fitted up to this D, or from as few data in its dual form: each of
# the scales that are tried takes matrices of that side.
_MOST_PARAMS, _MOST_DATA = 1900, 400


def methods_of(variant: str) -> tuple[str, ...]:
    """What is run on a network, what the question needs first."""
    sized = tuple(
        f"subnet {name}, S of {SMALL[variant]}" for name in EQUAL if variant in SMALL
    )
    greedy = (GREEDY,) if variant == ENDS[1] else ()
    laplace = (*SUBNETS, *greedy, *sized, "diagonal Laplace", "full Laplace")
    ensembles = ("deep ensemble", ENSEMBLE, f"{ENSEMBLE} (PredictiveVariance)")
    rivals = (SWAG_SUBNET, "SWAG", "MC dropout", *RIVALS)
    ours = (*UNTUNED, EVIDENCE, *laplace, *SIZED)
    return ("MAP", MAP_NOISE, *ours, *ensembles, *rivals)


def plan_of(settings: Settings) -> Plan:
    if settings.scale == "smoke":
        return Plan(Schedule(40, every=20), rates=(0.05, 0.1), swag_steps=30)
    return Plan(Schedule(1500 if settings.scale == "small" else 5000))


def tasks(settings: Settings) -> list[Task]:
    """Splits in turn, so that a run that is cut has as many of every set."""
    if settings.data_dir is None:
        raise ValueError(
            "`--data-dir` or $PYRO_SUBNET_DATA must name the folder of uci/; got none."
        )
    folder = settings.data_dir
    there = [name for name in SETS if (folder / "uci" / name).is_dir()]
    if not there:
        raise FileNotFoundError(f"No set of UCI in {folder / 'uci'}. Name its parent.")
    plan, found = plan_of(settings), []
    standard = {name: indices(folder / "uci" / name) for name in there}
    gaps = {name: indices(folder / "uci_gap" / name) for name in there}
    for split in settings.numbers:
        for name in there:
            if split in standard[name]:
                found += _tasks_of(folder, (name, "standard", split), plan)
            if split in gaps[name]:
                found += _tasks_of(folder, (name, "gap", split), plan)
    return found


def indices(folder: Path) -> list[int]:
    """Numbers of the splits that a folder holds."""
    names = (path.name for path in folder.glob("index_train_*.txt"))
    return sorted(int(re.sub(r"\D", "", name)) for name in names)


def _tasks_of(folder: Path, data: tuple[str, Kind, int], plan: Plan) -> list[Task]:
    """One of each network."""
    name, kind, index = data
    dataset = name if kind == "standard" else f"{name}/gap"
    return [
        Task(
            "uci",
            dataset,
            index,
            variant,
            methods_of(variant),
            partial(_run, folder, data, variant, plan),
        )
        for variant in NETWORKS
    ]


def read_split(folder: Path, data: tuple[str, Kind, int]) -> Split:
    """A split with at most as many held-out data as are of use; the rest train."""
    split = uci_split(folder, *data, most=10**9)
    held_out, more = (
        tuple(part[chosen] for part in split.held_out)
        for chosen in (slice(_HELD_OUT), slice(_HELD_OUT, None))
    )
    train = tuple(torch.cat(parts) for parts in zip(split.train, more, strict=True))
    return replace(split, train=train, held_out=held_out)


def _run(
    folder: Path,
    data: tuple[str, Kind, int],
    variant: str,
    plan: Plan,
    methods: Sequence[str],
) -> Iterator[tuple[str, list[Score]]]:
    split = read_split(folder, data)
    network = Network(split, Shape(parse_hidden(variant)), plan)
    shift = "gap" if data[1] == "gap" else ""
    for method in methods:
        fit = fit_of(network, method)
        if fit is None:
            yield method, [Score(shift, "too_large", float(network.num_params))]
        else:
            yield method, judge(network, fit(), shift)


def fit_of(network: Network, method: str) -> Callable[[], Fitted] | None:
    """How a method is fitted; None where it does not fit."""
    simple: dict[str, Callable[[], Fitted]] = {
        "MAP": network.at_map,
        MAP_NOISE: network.at_map_with_held_out_noise,
        **{name: partial(fit_rival, name, network) for name in RIVALS},
        EVIDENCE: partial(network.by_evidence, network.plan.share),
        f"{DEFAULT}{OWN_PRIOR}": partial(
            network.subnet, network.plan.share, tuned=False
        ),
        "deep ensemble": network.ensemble,
        "MC dropout": network.mc_dropout,
        "SWAG": network.swag_draws,
        "diagonal Laplace": partial(network.subnet, None, covariance="diag"),
    }
    if method in simple:
        return simple[method]
    if method.startswith(ENSEMBLE):
        members = "PredictiveVariance" if "(" in method else "LargestVariance"
        return partial(network.ensemble_of_subnets, members, size_of(network))
    tuned = not method.endswith(OWN_PRIOR)
    method = method.removesuffix(OWN_PRIOR)
    if method == "full Laplace":
        num_data = len(network.split.train[0])
        if network.num_params > _MOST_PARAMS and num_data > _MOST_DATA:
            return None
        dual = num_data < network.num_params
        form = "dual" if dual else "primal"
        return partial(network.subnet, None, form=form, tuned=tuned)
    method, size = chosen_size(network, method.removeprefix("subnet "))
    return lambda: network.subnet(network.selector(method, size), tuned=tuned)


def chosen_size(network: Network, words: str) -> tuple[str, int]:
    """A selector's name, and S: as the words after it say, or what is usual here."""
    name, _, small = words.partition(", S of ")
    if small:
        return name, num_params(network, small)
    name, _, share = words.rpartition(", ")
    if share.endswith("%"):
        return name, network.size_of(float(share.rstrip("%")) / 100)
    return words, size_of(network)


def num_params(network: Network, variant: str) -> int:
    """D of another network on the same data."""
    num_inputs = network.split.train[0].shape[1]
    return Shape(parse_hidden(variant)).num_params(num_inputs)


def size_of(network: Network) -> int:
    """S of a subnet: all of the smallest network's in the largest one."""
    if network.shape.hidden == parse_hidden(ENDS[1]):
        return num_params(network, ENDS[0])
    return network.size_of(network.plan.share)


def judge(network: Network, fitted: Fitted, shift: str) -> list[Score]:
    """Log likelihood and RMSE in the target's unit; held-out loss, standardized."""
    split = network.split
    x, y = split.tests["test"]
    unit = split.target_scale or 1.0
    found, held_out = fitted.predict(x), split.held_out
    values = {
        "log_likelihood": -found.nll(y) - math.log(unit),
        "rmse": found.rmse(y) * unit,
        "held_out_nll": fitted.predict(held_out[0]).nll(held_out[1]) + math.log(unit),
        "D": float(network.num_params),
        **fitted.notes,
    }
    return [Score(shift, metric, value) for metric, value in values.items()]
