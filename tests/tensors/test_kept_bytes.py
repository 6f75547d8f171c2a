"""A call keeps nothing of itself, and a large network is held no more than it must be.

Storages are counted, by the garbage collector's list of tensors.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

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


def test_what_is_there_anyway_or_is_a_view_of_less_does_not_count() -> None:
    """Frozen weights, which many data share, and an input that is expanded."""
    frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    frozen.register_buffer("shift", torch.randn(WIDTH, WIDTH))
    x = torch.randn(2, WIDTH, requires_grad=True)

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = frozen

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) @ self.inner.shift

    _, nbytes = counting_kept_bytes(partial(Shifted(), x), [x])
    assert nbytes == 0
    row = torch.randn(1, WIDTH)
    _, nbytes = counting_kept_bytes(lambda: x[:1] * row.expand(100, -1), [x])
    assert nbytes == row.nbytes
    assert not torch.nn.modules.module._global_forward_pre_hooks


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
