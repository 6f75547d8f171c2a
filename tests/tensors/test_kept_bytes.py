"""A call keeps nothing of itself, and a large network is held no more than it must be.

Storages are counted, by the garbage collector's list of tensors.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.nn import bayesianize
from pyro_subnet.selection import LastLayer
from pyro_subnet.tensors.kept_bytes import counting_kept_bytes

WIDTH = 61  # of the layer that is looked for: no other tensor has as many numbers


def held() -> int:
    """How many storages as large as the layer's weight there are."""
    gc.collect()
    kinds = (Tensor, nn.Parameter)
    tensors = [one for one in gc.get_objects() if type(one) in kinds]
    large = [one for one in tensors if one.untyped_storage().nbytes() >= 4 * WIDTH**2]
    return len({one.untyped_storage().data_ptr() for one in large})


# Operations that keep their own output for the backward pass.
OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "softmax": lambda x: x.softmax(-1),
    "cholesky": lambda x: torch.linalg.cholesky(x @ x.mT + 99 * torch.eye(WIDTH)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_graph_whose_bytes_were_counted_is_freed(name: str) -> None:
    before = held()
    x = torch.randn(WIDTH, WIDTH, requires_grad=True)
    y, nbytes = counting_kept_bytes(partial(OPERATIONS[name], x), [x])
    assert nbytes >= 4 * WIDTH**2
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(OPERATIONS[name](x).sum(), x)
    torch.testing.assert_close(gradient.detach(), expected)
    del x, y, gradient, expected
    assert held() == before


class Shifted(nn.Module):
    """A frozen layer and a buffer, both of which are kept for the backward pass."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.register_buffer("shift", torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 2:
            raise KeyError("too many")
        shifted: Tensor = self.inner(x) @ self.shift
        return shifted


def test_what_is_there_anyway_or_is_a_view_of_less_does_not_count() -> None:
    """Frozen weights, which many data share, and an input that is expanded."""
    x, net = torch.randn(2, WIDTH, requires_grad=True), Shifted()
    _, nbytes = counting_kept_bytes(partial(net, x), [x])
    assert nbytes == 0
    row = torch.randn(1, WIDTH)
    _, nbytes = counting_kept_bytes(lambda: x[:1] * row.expand(100, -1), [x])
    assert nbytes == row.nbytes


def test_modules_are_let_go_of_also_when_they_raise() -> None:
    net = Shifted()
    with pytest.raises(KeyError, match="too many"):
        counting_kept_bytes(partial(net, torch.randn(3, WIDTH)), [])
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None


def test_networks_that_run_under_vmap_run_once() -> None:
    """Their weights, wrapped, have no storage of their own."""
    nets = [nn.Linear(3, 4) for _ in range(3)]
    weights, _ = stack_module_state(nets)
    x, runs = torch.randn(5, 3), []

    def run() -> Tensor:
        runs.append(1)
        return vmap(lambda own: functional_call(nets[0], own, (x,)).tanh())(weights)

    outputs, nbytes = counting_kept_bytes(run, list(weights.values()))
    assert len(runs) == 1
    # The product keeps the input, tanh its own outputs.
    assert nbytes == x.nbytes + outputs.nbytes


def test_a_network_is_held_by_its_copy_and_by_the_guides() -> None:
    before = held()
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3))
    bnn = bayesianize(net)
    assert held() - before == 2  # the network, its copy; one number for the prior

    def model(x: Tensor, y: Tensor | None = None) -> None:
        logits = bnn(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    x, y = torch.randn(4, WIDTH), torch.tensor([0, 1, 2, 0])
    guide = AutoSubnetLaplace(model, LastLayer())
    guide(x, y)
    assert held() - before == 3  # and where it is trained
    posterior: Any = guide.laplace_approximation(x, y)
    assert held() - before == 4  # and where it was then
    for _ in range(3):
        posterior.predictive_distribution(x)
        posterior.sample_functions(2, x)
    assert held() - before == 4
    del posterior
    assert held() - before == 3
