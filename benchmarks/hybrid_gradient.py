"""What one gradient of MCMC costs: the user's model, and the hybrid ones made of it.

Medians in milliseconds, for a network of 25 weights on 40 data, and for a CNN of 500
images with S = 50::

    .venv/bin/python -m benchmarks.hybrid_gradient

A kernel by ``hybrid.nuts()`` holds the density of a linearized model during a run; any
other one runs that model for each gradient.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor, nn

from benchmarks.engine.networks import cnn
from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.nn import bayesianize, init_to_module
from pyro_subnet.selection import RandomSubnet

Potential = Callable[[Mapping[str, Tensor]], Tensor]
SECONDS = 4.0  # spent on each median, beyond the first gradient


@dataclass(frozen=True)
class Case:
    """A network, its likelihood and data, and how many weights are chosen."""

    net: nn.Module
    likelihood: Callable[[Tensor], Any]
    x: Tensor
    size: int


def small() -> Case:
    """One input, eight hidden units, one output."""
    net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0))
    x = torch.linspace(-1, 1, 40).unsqueeze(1)
    return Case(net, lambda f: dist.Normal(f, 0.1), x, 25)


def images() -> Case:
    """The engine benchmark's CNN."""
    x = torch.rand(500, 1, 28, 28)
    return Case(cnn(), lambda f: dist.Categorical(logits=f), x, 50)


CASES = {"25 weights, 40 data": small, "CNN, S = 50, 500 images": images}


def potentials(case: Case) -> dict[str, tuple[Potential, Mapping[str, Tensor]]]:
    """Potential energies, and where each is taken."""
    net, bnn, x = case.net, bayesianize(case.net), case.x

    def model(x: Tensor, y: Tensor | None = None) -> None:
        outputs = bnn(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", case.likelihood(outputs), obs=y)

    with torch.no_grad():
        y = case.likelihood(net(x)).sample()
    guide = AutoSubnetLaplace(
        model, RandomSubnet(case.size), init_loc_fn=init_to_module(net)
    )
    posterior = guide.laplace_approximation(x, y)
    start, own = initialize_model(model, (x, y))[:2]
    found: dict[str, tuple[Potential, Mapping[str, Tensor]]] = {
        "the user's model": (own, start)
    }
    for linearized in (False, True):
        hybrid = posterior.hybrid_model(linearized=linearized)
        at = hybrid.initial_params()
        name = "linearized hybrid" if linearized else "hybrid"
        found[f"{name}, any kernel"] = initialize_model(hybrid, (x, y))[1], at
    kernel = hybrid.nuts()
    kernel.initial_params = at
    kernel.setup(1, x, y)
    found["linearized hybrid, its nuts()"] = kernel.potential_fn, at
    return found


def milliseconds(potential: Potential, at: Mapping[str, Tensor]) -> float:
    """Median time of a value and its gradient."""
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while not times or time.perf_counter() < end:
        leaves = {name: u.detach().clone().requires_grad_() for name, u in at.items()}
        start = time.perf_counter()
        torch.autograd.grad(potential(leaves), list(leaves.values()))
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:] or times)


def main() -> None:
    """Prints the table."""
    for name, case in CASES.items():
        pyro.set_rng_seed(0)
        ways = potentials(case())
        times = {way: milliseconds(*each) for way, each in ways.items()}
        own = times["the user's model"]
        print(name)
        for way, found in times.items():
            print(f"  {way:30}{found:10.2f} ms{found / own:8.3f} of the user's")


if __name__ == "__main__":
    main()
