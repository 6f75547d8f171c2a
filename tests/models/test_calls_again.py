"""A call on the same data runs the model once, and what has changed is noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.exceptions import ModelError
from pyro_subnet.models.linearized import LinearizedModel
from pyro_subnet.nn import bayesianize
from tests.tolerances import tolerance

NUM_DATA = 5


class World:
    """A model of two outputs, and what it reads beside its arguments."""

    def __init__(self, dtype: torch.dtype):
        self.runs = 0
        self.prior_scale = 1.0
        self.factor = torch.ones((), dtype=dtype)
        self.second = torch.ones((), dtype=dtype)
        self.noise = 0.5
        self.extra = False
        self.returned = torch.ones((), dtype=dtype)

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Any:
        self.runs += 1
        w = pyro.sample("w", dist.Normal(x.new_zeros(2), self.prior_scale).to_event(1))
        v = pyro.sample("v", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        f = pyro.deterministic("f", self.factor * torch.sin(x @ w))
        g = self.second * torch.cos(x @ v)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(f, self.noise), obs=y)
            pyro.sample("z", dist.Normal(g, 0.5), obs=y)
            if self.extra:
                pyro.sample("extra", dist.Normal(0.0, 1.0))
        return self.returned * g


def fitted(model: Any, dtype: torch.dtype) -> tuple[LinearizedModel, Any, Tensor]:
    x = torch.randn(NUM_DATA, 2, dtype=dtype)
    posterior = AutoSubnetLaplace(model).laplace_approximation(x, x[:, 0])
    return posterior.linearized_model, posterior.median(), x


def run(model: Any, values: dict[str, Tensor], x: Tensor) -> poutine.Trace:
    return poutine.trace(poutine.condition(model, data=values)).get_trace(x)


def expected(world: World, at: dict[str, Tensor], w: dict[str, Tensor], x: Tensor):
    """Outputs and returned value, by the slopes of sine and cosine."""
    step = {name: w[name] - at[name] for name in at}
    f, g = x @ at["w"], x @ at["v"]
    first = world.factor * (f.sin() + f.cos() * (x @ step["w"]))
    second = world.second * (g.cos() - g.sin() * (x @ step["v"]))
    return first, second, world.returned * second


CHANGES: dict[str, Callable[[World], None]] = {
    "nothing": lambda world: None,
    "a prior": lambda world: setattr(world, "prior_scale", 2.0),
    "the first output": lambda world: setattr(world, "factor", 2 * world.factor),
    "the second output": lambda world: setattr(world, "second", 2 * world.second),
    "in place": lambda world: world.second.fill_(3.0),
    "the noise": lambda world: setattr(world, "noise", 0.7),
    "a site more": lambda world: setattr(world, "extra", True),
    "the returned value": lambda world: setattr(world, "returned", 2 * world.returned),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_noticed(change: str, dtype: torch.dtype) -> None:
    world = World(dtype)
    model, at, x = fitted(world, dtype)
    draws = [{name: u + torch.randn_like(u) for name, u in at.items()} for _ in "12345"]
    with torch.no_grad():
        for i, values in enumerate(draws):
            if i == 3:
                CHANGES[change](world)
            before = world.runs
            trace = run(model, values, x)
            nodes = trace.nodes
            first, second, returned = expected(world, at, values, x)
            assert_close(nodes["y"]["fn"].mean, first, **tolerance(dtype))
            assert_close(nodes["z"]["fn"].mean, second, **tolerance(dtype))
            assert_close(nodes["f"]["value"], first, **tolerance(dtype))
            assert_close(nodes["_RETURN"]["value"], returned, **tolerance(dtype))
            assert_close(
                nodes["w"]["fn"].base_dist.scale,
                torch.full_like(values["w"], world.prior_scale),
            )
            assert float(nodes["y"]["fn"].stddev[0]) == pytest.approx(world.noise)
            assert ("extra" in nodes) == world.extra
            if i in (2, 4):  # the Jacobian is kept
                assert world.runs - before == 1
            # Handlers around see each site once, in the model's order but for latents.
            order = [n for n, node in nodes.items() if node["type"] == "sample"]
            assert sorted(order) == sorted(
                ["w", "v", "f", "data", "y", "z"] + ["extra"] * world.extra
            )


@pytest.mark.parametrize("wrap", [bayesianize, lambda net: net])
def test_networks_run_once(wrap: Callable[[Any], Any], dtype: torch.dtype) -> None:
    runs = []

    class Net(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = PyroModule[nn.Linear](2, 1).to(dtype)

        def forward(self, x: Tensor) -> Tensor:
            runs.append(x)
            return self.layer(x).squeeze(-1).tanh()

    net = Net()
    if wrap is bayesianize:
        inner = wrap(net)
    else:
        normal = dist.Normal(torch.zeros((), dtype=dtype), 1.0)
        net.layer.weight = PyroSample(normal.expand([1, 2]).to_event(2))
        net.layer.bias = PyroSample(normal.expand([1]).to_event(1))
        inner = net

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        f = inner(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(f, 0.5), obs=y)

    linearized, at, x = fitted(model, dtype)
    names = list(at)
    for i in range(5):
        values = {name: u + torch.randn_like(u) for name, u in at.items()}
        before = len(runs)
        with torch.no_grad():
            trace = run(linearized, values, x)
        f = (x @ at[names[0]].mT).squeeze(-1) + at[names[1]]
        step = {name: values[name] - at[name] for name in names}
        moved = (x @ step[names[0]].mT).squeeze(-1) + step[names[1]]
        wanted = f.tanh() + (1 - f.tanh().square()) * moved
        assert_close(trace.nodes["y"]["fn"].mean, wanted, **tolerance(dtype))
        assert i < 2 or len(runs) - before == 1


def test_gradients_of_calls_that_come_again(dtype: torch.dtype) -> None:
    world = World(dtype)
    model, at, x = fitted(world, dtype)
    for i in range(5):
        leaves = {n: (u + 0.3 * i).detach().requires_grad_() for n, u in at.items()}
        trace = run(model, leaves, x)
        total = trace.nodes["_RETURN"]["value"].sum()
        total = total + trace.nodes["y"]["fn"].mean.square().sum()
        found = torch.autograd.grad(total, list(leaves.values()))
        first, _, returned = expected(world, at, leaves, x)
        wanted = torch.autograd.grad(
            returned.sum() + first.square().sum(), list(leaves.values())
        )
        assert_close(found, wanted, **tolerance(dtype))


@pytest.mark.parametrize("when", [0, 3])
def test_gradients_to_a_tensor_of_the_model_are_not_lost(
    when: int, dtype: torch.dtype
) -> None:
    """Whether it wants them from the first call on, or only later."""
    world = World(dtype)
    model, at, x = fitted(world, dtype)
    for i in range(6):
        if i == when:
            world.factor = world.factor.clone().requires_grad_()
        values = {n: (u + 0.3 * (i + 1)) for n, u in at.items()}
        mean = run(model, values, x).nodes["y"]["fn"].mean
        if i >= when:
            (found,) = torch.autograd.grad(mean.sum(), world.factor)
            assert_close(
                found, (mean.sum() / world.factor).detach(), **tolerance(dtype)
            )


def test_training_mode_is_refused_in_a_call_that_comes_again() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).eval()
    bnn = bayesianize(net)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        f = bnn(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(f, 0.5), obs=y)

    linearized, at, x = fitted(model, torch.float32)
    with torch.no_grad():
        for _ in range(3):
            run(linearized, at, x)
    bnn.train()
    with pytest.raises(ModelError, match=r"eval"):
        run(linearized, at, x)
    buffers = dict(bnn.named_buffers())
    counts = [v for name, v in buffers.items() if name.endswith("batches_tracked")]
    assert [int(count) for count in counts] == [0]


def test_a_draw_and_a_mean_in_one_returned_number_are_read_anew() -> None:
    """What is returned differs in each call: after two such calls all are read."""
    runs = []

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        runs.append(x)
        w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        mean = (x @ w).sin()
        with pyro.plate("data", len(x)):
            return mean + pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    linearized, at, x = fitted(model, torch.float64)
    counts = []
    with torch.no_grad():
        for _ in range(8):
            values = {"w": at["w"] + torch.randn(2, dtype=torch.float64)}
            before = len(runs)
            trace = run(linearized, values, x)
            counts.append(len(runs) - before)
            f, step = x @ at["w"], x @ (values["w"] - at["w"])
            mean = f.sin() + f.cos() * step
            assert_close(trace.nodes["y"]["fn"].mean, mean)
            # The draw is of the expanded output, which the model's own sum has in it;
            # the mean is expanded, of which the draw's derivative is none.
            drawn = trace.nodes["y"]["value"]
            assert_close(trace.nodes["_RETURN"]["value"], drawn + mean)
    # Two calls are run once for nothing, and no more: after them all are read at once.
    assert len(set(counts[3:])) == 1
    assert [count - counts[-1] for count in counts[1:3]] == [1, 1]
