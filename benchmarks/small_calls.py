"""What one small call takes: a prediction for one input, and a draw in sequence.

Medians in milliseconds, in one process with one thread::

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.small_calls

A prediction stands beside one run of the model under Pyro's handlers and a backward
pass for each output; a draw by Pyro's ``Predictive`` of the linearized model beside one
of the network itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Predictive
from torch import Tensor, nn

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.nn import bayesianize

Model = Callable[..., Tensor]
WIDTH, NUM_INPUTS, NUM_DATA = 64, 20, 200
SUBNET = 0.05
SECONDS = 2.0  # spent on each median, beyond the first call
NUM_DRAWS = 100


def fitted(num_outputs: int) -> tuple[Model, AutoSubnetMultivariateNormal, Tensor]:
    """A model of one number or of classes, its posterior, and the inputs."""
    pyro.set_rng_seed(0)
    net = nn.Sequential(
        nn.Linear(NUM_INPUTS, WIDTH),
        nn.Tanh(),
        nn.Linear(WIDTH, WIDTH),
        nn.Tanh(),
        nn.Linear(WIDTH, num_outputs),
    )
    bnn = bayesianize(net)

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        f = bnn(x)
        fn: Any = dist.Categorical(logits=f)
        if num_outputs == 1:
            fn = dist.Normal(f.squeeze(-1), 0.3)
        with pyro.plate("data", len(x)):
            pyro.sample("y", fn, obs=y)
        return f

    x = torch.randn(NUM_DATA, NUM_INPUTS)
    y = torch.randn(NUM_DATA)
    if num_outputs > 1:
        y = torch.arange(NUM_DATA) % num_outputs
    posterior = AutoSubnetLaplace(model, SUBNET).laplace_approximation(x, y)
    return model, posterior, x


def gradients_of(
    model: Model, posterior: AutoSubnetMultivariateNormal, x: Tensor
) -> list[Any]:
    """One run at the MAP under Pyro's handlers, and a backward pass an output."""
    leaves = {n: v.detach().requires_grad_() for n, v in posterior.median().items()}
    outputs = pyro.condition(model, leaves)(x)
    weights = list(leaves.values())
    return [
        torch.autograd.grad(f, weights, retain_graph=True) for f in outputs.flatten()
    ]


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call."""
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(times) < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return median(times[1:])


def predictions(num_outputs: int) -> dict[str, float]:
    """Times of one input, by what is done with it."""
    model, posterior, x = fitted(num_outputs)
    one = x[:1]
    return {
        "run and backward passes": milliseconds(
            lambda: gradients_of(model, posterior, one)
        ),
        "output_distribution": milliseconds(lambda: posterior.output_distribution(one)),
        "predictive_distribution": milliseconds(
            lambda: posterior.predictive_distribution(one)
        ),
    }


def draws() -> dict[str, float]:
    """Times of a draw of 200 outputs, by the model that is run."""
    model, posterior, x = fitted(1)
    found = {}
    for name, drawn, parallel in (
        ("the network", model, False),
        ("linearized_model", posterior.linearized_model, False),
        ("linearized_model, parallel", posterior.linearized_model, True),
    ):
        predictive = Predictive(
            drawn, guide=posterior, num_samples=NUM_DRAWS, parallel=parallel
        )
        found[name] = milliseconds(lambda predictive=predictive: predictive(x))
    return {name: taken / NUM_DRAWS for name, taken in found.items()}


def report(title: str, times: dict[str, float]) -> None:
    """Prints times, each as a multiple of the first."""
    print(title)
    first = next(iter(times.values()))
    for name, found in times.items():
        print(f"  {name:28}{found:8.2f} ms{found / first:7.1f}x")


def main() -> None:
    """Prints the tables."""
    for num_outputs in (1, 3, 10):
        report(f"one input, C = {num_outputs}", predictions(num_outputs))
    report(f"one draw of {NUM_DATA} outputs", draws())


if __name__ == "__main__":
    main()
