"""Forward mode's first use in a process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch.testing import assert_close

from pyro_subnet.curvature.jacobian.directional import forward_derivative
from tests.tolerances import tolerance

ROOT = Path(__file__).resolve().parents[2]
# More outputs than weights, and no layers: forward mode is the cheapest route.
FIT = """
import pyro
import pyro.distributions as dist
import torch
from pyro_subnet import AutoSubnetLaplace

def model(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(40), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * w.exp()).sum(-1).sin(), 1.0), obs=y)

x, y = torch.randn(100, 40), torch.randn(100)
AutoSubnetLaplace(model).laplace_approximation(x, y)
"""


def test_users_hear_nothing_of_what_torch_deprecates_in_itself() -> None:
    """By 2.13 it is a DeprecationWarning, by 2.14 a FutureWarning, which is shown."""
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", FIT],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "torch.jit" not in done.stderr


def test_a_derivative_inside_of_another_one() -> None:
    point, direction = torch.tensor([0.3, -0.7]), torch.tensor([1.0, 2.0])

    def inner(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return forward_derivative(lambda z: (z.sin(),), x, direction)[1]

    second = torch.func.jvp(inner, (point,), (direction,))[1][0]
    close = tolerance(torch.float32, "autograd")
    assert_close(second, -point.sin() * direction**2, **close)
