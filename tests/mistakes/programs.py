"""The small right program that each mistake is made in, and how it is judged."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.exceptions import SubnetError
from pyro_subnet.nn import bayesianize, init_to_module

N, INPUTS, CLASSES = 6, 3, 4
PACKAGE = str(Path(__file__).parents[2] / "pyro_subnet")


class Program:
    """A pretrained network, a model of it, and its data."""

    def __init__(self) -> None:
        self.net = nn.Linear(INPUTS, 1)
        bnn = bayesianize(self.net)

        def model(x: Tensor, y: Tensor | None = None) -> None:
            mean = bnn(x).squeeze(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

        self.bnn, self.model = bnn, model
        self.x, self.y = torch.randn(N, INPUTS), torch.randn(N)
        self.loader = DataLoader(TensorDataset(self.x, self.y), batch_size=4)

    def guide(self, subnet: Any = None, **options: Any) -> Any:
        start = {"init_loc_fn": init_to_module(self.net), **options}
        return AutoSubnetLaplace(self.model, subnet, **start)

    def posterior(self, subnet: Any = None, **options: Any) -> Any:
        return self.guide(subnet, **options).laplace_approximation(self.x, self.y)


Mistake = Callable[[Program], Any]


def assert_told(mistake: Mistake, message: str, kind: type[Exception]) -> None:
    """Our own error, raised by our own code, with the rule and the way out."""
    with pytest.raises(kind, match=re.compile(message, re.DOTALL)) as caught:
        mistake(Program())
    assert issubclass(kind, SubnetError | AttributeError | ImportError)
    assert str(caught.traceback[-1].path).startswith(PACKAGE)


@pytest.fixture(autouse=True)
def as_users_run_it() -> Iterator[None]:
    """Without the run-time type checks of the tests, which come before our own."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
