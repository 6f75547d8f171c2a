"""Networks with sparse matrices and with parameters of no numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from torch import Tensor, nn
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.nn import bayesianize, init_to_module, regressor
from tests.cases import draw
from tests.tolerances import tolerance

NODES, INPUTS, CLASSES = 12, 3, 3
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "coo": Tensor.to_sparse,
    "csr": Tensor.to_sparse_csr,
    "csc": Tensor.to_sparse_csc,
}


class Graph(nn.Module):
    """Two graph convolutions (Kipf and Welling, 2017)."""

    def __init__(self, adjacency: Tensor | None = None, layout: Any = None):
        super().__init__()
        self.first, self.second = nn.Linear(INPUTS, 4), nn.Linear(4, CLASSES)
        self.register_buffer("adjacency", adjacency)
        self.layout = layout

    def forward(self, x: Tensor, adjacency: Tensor | None = None) -> Tensor:
        around = self.adjacency if adjacency is None else adjacency
        if self.layout is not None:
            around = self.layout(around)
        return around @ self.second((around @ self.first(x)).tanh())


def adjacency_of(dtype: torch.dtype) -> Tensor:
    dense = (draw(1, NODES, NODES) < -0.5).to(dtype) + torch.eye(NODES, dtype=dtype)
    return dense / dense.sum(1, keepdim=True)


def fitted(net: nn.Module, *args: Tensor) -> AutoSubnetMultivariateNormal:
    """A posterior of all weights, which start alike in each network."""
    with torch.no_grad():
        for turn, parameter in enumerate(net.parameters()):
            parameter.copy_(draw(10 + turn, *parameter.shape))
    bnn = bayesianize(net)

    def model(x: Tensor, *more: Tensor, y: Tensor | None = None) -> None:
        logits = bnn(x, *more)
        with pyro.plate("nodes", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    guide = AutoSubnetLaplace(model, init_loc_fn=init_to_module(net))
    return guide.laplace_approximation(*args, y=torch.arange(NODES) % CLASSES)


@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("where", ["argument", "buffer", "made inside"])
def test_a_sparse_adjacency(where: str, layout: str, dtype: torch.dtype) -> None:
    """As the dense one, wherever it comes from."""
    x, dense = draw(2, NODES, INPUTS).to(dtype), adjacency_of(dtype)
    expected = fitted(Graph().to(dtype), x, dense)
    sparse = LAYOUTS[layout]
    args = (x, sparse(dense)) if where == "argument" else (x,)
    net = {
        "argument": Graph,
        "buffer": lambda: Graph(sparse(dense)),
        "made inside": lambda: Graph(dense, sparse),
    }[where]()
    for part in (net.first, net.second):  # torch casts no buffer of these layouts
        part.to(dtype)
    found = fitted(net, *args)
    close = tolerance(dtype, "reordered")
    assert_close(
        found.get_posterior().precision_matrix,
        expected.get_posterior().precision_matrix,
        **close,
    )
    assert_close(
        found.output_distribution(*args).covariance_matrix,
        expected.output_distribution(x, dense).covariance_matrix,
        **close,
    )


class Optional(nn.Module):
    """A network whose further inputs may be none."""

    def __init__(self, num_more: int | None):
        super().__init__()
        self.hidden, self.out = nn.Linear(INPUTS, 4), nn.Linear(4, 1)
        if num_more is not None:
            self.more = nn.Parameter(torch.zeros(4, num_more))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(x).tanh())


def test_a_parameter_without_numbers(dtype: torch.dtype) -> None:
    """All models made of the posterior are those of the network without it."""
    x, y = draw(1, 20, INPUTS).to(dtype), draw(2, 20, 1).to(dtype)
    found = []
    for num_more in (0, None):
        net = Optional(num_more).to(dtype)
        with torch.no_grad():
            for turn, part in enumerate((net.hidden, net.out)):
                part.weight.copy_(draw(3 + turn, *part.weight.shape))
                part.bias.fill_(0.1)
        guide = AutoSubnetLaplace(
            regressor(net, noise=0.3), 0.5, init_loc_fn=init_to_module(net)
        )
        posterior = guide.laplace_approximation(x, y)
        own = []
        for parallel in (False, True):
            torch.manual_seed(0)
            predictive = Predictive(
                posterior.linearized_model,
                guide=posterior,
                num_samples=4,
                parallel=parallel,
            )
            own.append(predictive(x)["y"])
        for linearized in (False, True):
            hybrid = posterior.hybrid_model(linearized=linearized)
            theta = {"subnet": posterior.get_posterior().mean + 0.1}
            given = pyro.condition(hybrid, data=theta)
            trace = pyro.poutine.trace(given).get_trace(x, y)
            own.append(trace.log_prob_sum().detach())
        found.append(own)
    for ours, expected in zip(*found, strict=True):
        assert_close(ours, expected, **tolerance(dtype, "reordered"))
