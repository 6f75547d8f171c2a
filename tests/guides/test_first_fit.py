"""What the first fit of a process costs beyond any other."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Predictive
from torch import nn

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.nn import bayesianize, init_to_module

net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, {width}))
bnn = bayesianize(net)


def model(x, y=None):
    outputs = bnn(x)
    noise = pyro.sample("noise", dist.LogNormal(-2.0, 0.5))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", {likelihood}, obs=y)


x = torch.randn(20, 3)
y = model(x).detach()
guide = AutoSubnetLaplace(model, 0.5, init_loc_fn=init_to_module(net))
posterior = guide.laplace_approximation(x, y)
posterior.output_distribution(x)
posterior.predictive_distribution(x)
posterior.tune_prior_precision()
Predictive(model, guide=posterior, num_samples=2)(x)
Predictive(posterior.linearized_model, guide=posterior, num_samples=2)(x)
print({module!r} in sys.modules)
"""
LIKELIHOODS = {
    "normal": "dist.Normal(outputs, 0.1).to_event(1)",
    "latent noise": "dist.Normal(outputs, noise).to_event(1)",
    "classes": "dist.Categorical(logits=outputs)",
}


def has_imported(module: str, likelihood: str, width: int) -> bool:
    """Whether a process that fits and predicts for the first time imports a module."""
    program = PROGRAM.replace("{likelihood}", likelihood)
    program = program.replace("{width}", str(width)).replace("{module!r}", repr(module))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() in ("True", "False")
    return done.stdout.strip() == "True"


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_no_computer_algebra_is_imported(kind: str) -> None:
    """Torch does for some calls that have cheap twins: half a second of a process."""
    assert not has_imported("sympy", LIKELIHOODS[kind], 3)


def test_no_compiler_is_imported() -> None:
    """As the transforms of ``torch.func`` do, by which derivatives could be had.

    With more outputs than a first call of the linearized model makes a Jacobian for.
    """
    assert not has_imported("torch._dynamo", LIKELIHOODS["normal"], 40)
