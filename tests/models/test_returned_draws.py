"""What a model returns of a draw leaves the kept Jacobian of its call alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from torch import Tensor
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace
from tests.tolerances import tolerance

RETURNS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "nothing": lambda mean, drawn: None,
    "the draw": lambda mean, drawn: drawn,
    "a view of it": lambda mean, drawn: drawn.unsqueeze(-1),
    "what is made of it": lambda mean, drawn: {"y": (2 * drawn, drawn.exp())},
    "the mean as well": lambda mean, drawn: (mean, drawn),
}


class Model:
    """A network of one matrix, whose runs are counted."""

    def __init__(self, returns: Callable[[Tensor, Tensor], Any]):
        self.returns, self.runs = returns, 0

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Any:
        self.runs += 1
        w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        mean = (x @ w).tanh()
        with pyro.plate("data", len(x)):
            drawn = pyro.sample("y", dist.Normal(mean, 0.1), obs=y)
        return self.returns(mean, drawn)


def fitted(name: str, x: Tensor) -> tuple[Model, Any]:
    model = Model(RETURNS[name])
    posterior = AutoSubnetLaplace(model).laplace_approximation(x, x[:, 0])
    return model, posterior


@pytest.mark.parametrize("name", RETURNS)
def test_a_call_that_comes_again_runs_the_network_at_the_map_alone(name: str) -> None:
    x = torch.randn(5, 3)
    model, posterior = fitted(name, x)
    predict = Predictive(posterior.linearized_model, guide=posterior, num_samples=20)
    predict(x)  # forms the Jacobian
    model.runs = 0
    predict(x)
    # One to read the call and one for its sites, in each of 20 draws and in what
    # `Predictive` does before.
    assert model.runs <= 2 * 22


@pytest.mark.parametrize("name", RETURNS)
def test_returned_values_are_expanded(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(5, 3, dtype=dtype)
    model, posterior = fitted(name, x)
    at = posterior.median()["w"]
    slope = 1 - (x @ at).tanh().square()
    for _ in range(3):
        w = at + torch.randn(3, dtype=dtype)
        held = poutine.condition(posterior.linearized_model, data={"w": w})
        trace = poutine.trace(held).get_trace(x)
        drawn = trace.nodes["y"]["value"]
        mean = (x @ at).tanh() + slope * (x @ (w - at))
        assert_close(trace.nodes["y"]["fn"].mean, mean, **tolerance(dtype))
        found = trace.nodes["_RETURN"]["value"]
        assert_close(found, model.returns(mean, drawn), **tolerance(dtype))
