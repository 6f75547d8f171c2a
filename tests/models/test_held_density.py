"""The density that a NUTS run holds, against runs of the linearized model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor, nn
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.models.hybrid import HybridModel
from pyro_subnet.nn import bayesianize, init_to_module
from pyro_subnet.selection import RandomSubnet
from tests.tolerances import tolerance

N, SIZE = 7, 9
Likelihood = Callable[[Tensor], Any]


class Counted(nn.Module):
    """A small network that counts its calls."""

    calls = 0

    def __init__(self, outputs: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, outputs))

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        found: Tensor = self.layers(x)
        return found


def hybrid_of(
    dtype: torch.dtype,
    likelihood: Likelihood,
    outputs: int = 1,
    prior: Callable[..., Any] | None = None,
    after: Callable[[], Any] | None = None,
) -> tuple[HybridModel, Tensor, Tensor]:
    """A linearized hybrid model over some weights of a small network, and its data."""
    torch.manual_seed(1)
    net = Counted(outputs).to(dtype)
    bnn = bayesianize(net, **({} if prior is None else {"prior": prior}))

    def model(x: Tensor, y: Tensor | None = None) -> None:
        f = bnn(x)
        if after is not None:
            after()
        pyro.sample("y", likelihood(f), obs=y)

    x = torch.randn(N, 2, dtype=dtype)
    with torch.no_grad():
        y = likelihood(net(x)).sample()
    guide = AutoSubnetLaplace(
        model, RandomSubnet(SIZE, seed=3), init_loc_fn=init_to_module(net)
    )
    posterior = guide.laplace_approximation(x, y)
    return posterior.hybrid_model(linearized=True), x, y


def gaussian(f: Tensor) -> Any:
    return dist.Normal(f, 0.5).to_event(1)


def classes(f: Tensor) -> Any:
    return dist.Categorical(logits=f)


def shaped_events(f: Tensor) -> Any:
    """Two events of two numbers each a data point, some of them masked."""
    wide = f.unflatten(-1, (2, 2))
    left_in = torch.arange(N * 2).reshape(N, 2) % 3 > 0
    return dist.Normal(wide, wide.exp()).to_event(1).mask(left_in).to_event(1)


def student(name: str, parameter: Tensor) -> Any:
    zeros = torch.zeros_like(parameter)
    return dist.StudentT(5.0, zeros, 0.7).to_event(parameter.ndim)


MADE: dict[str, dict[str, Any]] = {
    "normal": {"likelihood": gaussian},
    "counts": {"likelihood": lambda f: dist.Poisson(f.exp()).to_event(1)},
    "classes": {"likelihood": classes, "outputs": 3},
    "masked events": {"likelihood": shaped_events, "outputs": 4},
    "another prior": {"likelihood": classes, "outputs": 3, "prior": student},
}


def kernel_potential(hybrid: HybridModel, *args: Any) -> Callable[..., Any]:
    """The potential energy of a run, which is set up."""
    kernel = hybrid.nuts()
    kernel.initial_params = hybrid.initial_params()
    kernel.setup(1, *args)
    found: Callable[..., Any] = kernel.potential_fn
    return found


def with_gradient(potential: Callable[..., Any], theta: Tensor) -> tuple[Tensor, ...]:
    leaf = theta.clone().requires_grad_()
    value = potential({"subnet": leaf})
    return value.detach(), *torch.autograd.grad(value, leaf)


def compare(hybrid: HybridModel, *args: Any) -> int:
    """Compares at some draws; returns how often the network ran for the held one."""
    held = kernel_potential(hybrid, *args)
    plain = initialize_model(hybrid, args)[1]
    total = 0
    for theta in hybrid.guide.get_posterior().sample(torch.Size([3])):
        before = Counted.calls
        found = with_gradient(held, theta)
        total += Counted.calls - before
        expected = with_gradient(plain, theta)
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours, theirs, **tolerance(theta.dtype, "autograd"))
    return total


@pytest.mark.parametrize("name", MADE)
def test_density_is_the_models_without_a_run_of_the_network(
    name: str, dtype: torch.dtype
) -> None:
    hybrid, x, y = hybrid_of(dtype, **MADE[name])
    assert compare(hybrid, x, y) == 0


def test_a_scaled_model(dtype: torch.dtype) -> None:
    hybrid, x, y = hybrid_of(dtype, gaussian)
    scaled = poutine.scale(hybrid.at_map.model, 2.5)
    guide = AutoSubnetLaplace(scaled, RandomSubnet(SIZE, seed=3))
    posterior = guide.laplace_approximation(x, y)
    assert compare(posterior.hybrid_model(linearized=True), x, y) == 0


def test_a_factor_takes_runs_of_the_model(dtype: torch.dtype) -> None:
    hybrid, x, y = hybrid_of(
        dtype, gaussian, after=lambda: pyro.factor("more", torch.ones(()))
    )
    assert compare(hybrid, x, y) > 0


def test_a_prior_that_depends_on_another_site(dtype: torch.dtype) -> None:
    one = torch.ones((), dtype=dtype)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        scale = pyro.sample("scale", dist.HalfNormal(one))
        w = pyro.sample("w", dist.Normal(torch.zeros_like(x[0]), scale).to_event(1))
        pyro.sample("y", dist.Normal(x @ w, 0.5).to_event(1), obs=y)

    x = torch.randn(N, 2, dtype=dtype)
    posterior = AutoSubnetLaplace(model, subnet=None).laplace_approximation(x, x[:, 0])
    compare(posterior.hybrid_model(linearized=True), x, x[:, 0])


def test_a_run_holds_its_own_data() -> None:
    hybrid, x, y = hybrid_of(torch.float64, gaussian)
    kernel = hybrid.nuts()
    theta = hybrid.guide.get_posterior().sample()
    values = []
    for _ in range(2):
        mcmc = MCMC(
            kernel,
            2,
            warmup_steps=1,
            initial_params=hybrid.initial_params(),
            disable_progbar=True,
        )
        mcmc.run(x, y)
        values.append(kernel.potential_fn({"subnet": theta}))
        expected = initialize_model(hybrid, (x, y))[1]({"subnet": theta})
        assert_close(values[-1], expected, **tolerance(torch.float64, "autograd"))
        y.add_(1.0)
    assert abs(float(values[1] - values[0])) > 1.0


def test_parameters_off_the_map_are_heeded() -> None:
    hybrid, x, y = hybrid_of(torch.float64, gaussian)
    hybrid(x, y)
    store = pyro.get_param_store()
    for name in list(store.keys()):
        if name.startswith("hybrid"):
            store[name] = store[name].detach() + 0.3
    assert compare(hybrid, x, y) > 0
