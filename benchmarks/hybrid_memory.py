"""What ``Predictive`` holds: all D weights a draw, or the hybrid model's S.

A ResNet-18 (D = 11.2M) with S = 1,000, each way in a process of its own::

    .venv/bin/python -m benchmarks.hybrid_memory

Both draw outputs from the same posterior and return them; memory is the most in use
during the draws, beyond what the fitted posterior takes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Predictive
from torch import Tensor

from benchmarks.engine.networks import resnet18_batchnorm
from benchmarks.engine.process import Meter
from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.nn import bayesianize, init_to_module
from pyro_subnet.selection import RandomSubnet

SUBNET_SIZE, NUM_DATA = 1000, 2
MIB = 2**20


def fitted() -> tuple[AutoSubnetMultivariateNormal, Callable[..., None], Tensor]:
    """The posterior, its model, and images."""
    torch.manual_seed(0)
    net, x = resnet18_batchnorm().eval(), torch.rand(NUM_DATA, 3, 32, 32)
    bnn = bayesianize(net)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        logits = bnn(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    init = init_to_module(net)
    guide = AutoSubnetLaplace(model, RandomSubnet(SUBNET_SIZE), init_loc_fn=init)
    y = torch.arange(NUM_DATA)
    return guide.laplace_approximation(x, y), model, x


def measure(way: str, num_samples: int) -> None:
    """Draws one way, and prints what it took."""
    posterior, model, x = fitted()
    hybrid = posterior.hybrid_model()
    if way == "hybrid":
        draw: Any = Predictive(hybrid, guide=hybrid.guide, num_samples=num_samples)
    else:
        draw = Predictive(model, guide=posterior, num_samples=num_samples)
    hybrid(x)  # makes the parameters, which are no cost of a draw
    meter = Meter()
    found = meter.time("draws", lambda: draw(x))
    numbers = sum(value.numel() for value in found.values())
    print(
        f"{way:9s} {num_samples} draws: {numbers:,} numbers, "
        f"{(meter.peak - meter.baseline) / MIB:,.0f} MiB, "
        f"{meter.seconds['draws']:.1f} s"
    )


def main() -> None:
    """Runs both, or the one that is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--way", choices=["hybrid", "posterior"])
    parser.add_argument("--num-samples", type=int, default=20)
    options = parser.parse_args()
    if options.way:
        measure(options.way, options.num_samples)
        return
    for way in ("hybrid", "posterior"):
        command = [sys.executable, "-m", "benchmarks.hybrid_memory", "--way", way]
        command += ["--num-samples", str(options.num_samples)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
