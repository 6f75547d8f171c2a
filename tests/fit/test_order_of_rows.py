"""What the subnet moves is decided from all rows, not from those that come first.

Experts that rows are sent to, and heads that some rows have, are moved by those rows
alone. The oracle is dense autograd over all weights, restricted at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.func import functional_call
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.nn import bayesianize, init_to_module
from pyro_subnet.selection import Sites
from tests.tolerances import tolerance

N = 9


def put(out: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    return out.index_put((rows.nonzero()[:, 0],), values)


class Experts(nn.Module):
    """Each row goes through one of two layers: (loc, log scale) of a normal."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out, first = x.new_zeros(len(x), 2), x[:, 0] > 0
        for rows, layer in ((first, self.a), (~first, self.b)):
            if bool(rows.any()):
                out = put(out, rows, layer(x[rows]))
        return out


class MaskedHead(nn.Module):
    """Some rows alone have a noise of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        log_scale, noisy = x.new_zeros(len(x), 1), x[:, 0] <= 0
        if bool(noisy.any()):
            log_scale = put(log_scale, noisy, self.b(x[noisy]).tanh())
        return torch.cat([self.a(x), log_scale], dim=1)


class Gated(nn.Module):
    """A branch for the whole batch, taken where any row asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out, asks = self.a(x), (x[:, :1] <= 0).to(x)
        return out + asks * self.b(x) if bool(asks.any()) else out


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "experts": Experts,
    "masked-head": MaskedHead,
    "gated": Gated,
}
each_network = pytest.mark.parametrize("kind", NETWORKS)


def fitted(net: nn.Module, subnet: Any, *args: Tensor, **options: Any) -> Any:
    bnn = bayesianize(net)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        out = bnn(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(out[:, 0], out[:, 1].exp()), obs=y)

    guide = AutoSubnetLaplace(model, subnet, init_loc_fn=init_to_module(net), **options)
    return guide.laplace_approximation(*args)


def sorted_rows(dtype: torch.dtype, descending: bool) -> tuple[Tensor, Tensor]:
    x = torch.randn(N, 3, dtype=dtype)
    x[:4, 0], x[4:, 0] = x[:4, 0].abs() + 0.1, -x[4:, 0].abs()
    x = x[x[:, 0].argsort(descending=descending)]
    return x, torch.randn(N, dtype=dtype)


def dense_jacobian(net: nn.Module, x: Tensor) -> Tensor:
    """(N, 2, D), in float64."""
    names, values = zip(*net.named_parameters(), strict=True)
    values = tuple(value.detach().double() for value in values)

    def outputs(*at: Tensor) -> Tensor:
        return functional_call(net, dict(zip(names, at, strict=True)), (x.double(),))

    found = jacobian(outputs, values)
    return torch.cat([part.flatten(2) for part in found], dim=-1)


def dense_precision(net: nn.Module, x: Tensor) -> Tensor:
    # Information of (loc, log scale): diag(scale^-2, 2).
    jac, out = dense_jacobian(net, x), net(x).detach().double()
    roots = torch.stack([(-out[:, 1]).exp(), torch.full_like(out[:, 1], 2**0.5)], 1)
    rows = (roots[..., None] * jac).flatten(0, 1)
    return rows.mT @ rows + torch.eye(rows.shape[1], dtype=rows.dtype)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("which", ["*", "a.*", "b.*"])
@each_network
def test_precision_whatever_comes_first(
    kind: str, which: str, descending: bool, dtype: torch.dtype
) -> None:
    net = NETWORKS[kind]().to(dtype)
    x, y = sorted_rows(dtype, descending)
    posterior = fitted(net, Sites(which), x, y)
    chosen = posterior.subnet.flat
    expected = dense_precision(net, x)[chosen][:, chosen]
    found = posterior.get_posterior().precision_matrix
    assert_close(found.double(), expected, **tolerance(dtype))


@pytest.mark.parametrize("covariance", ["full", "diag"])
@each_network
def test_update_with_rows_of_another_kind(kind: str, covariance: Any) -> None:
    net = NETWORKS[kind]().double()
    x, y = sorted_rows(torch.float64, True)
    posterior = fitted(net, None, x[:4], y[:4], covariance=covariance)
    found = posterior.update(x[4:], y[4:]).get_posterior().variance
    expected = fitted(net, None, x, y, covariance=covariance).get_posterior().variance
    assert_close(found, expected, **tolerance(torch.float64, "reordered"))


@pytest.mark.parametrize("descending", [False, True])
@each_network
def test_predictions_whatever_comes_first(kind: str, descending: bool) -> None:
    net = NETWORKS[kind]().double()
    posterior = fitted(net, Sites("b.*"), *sorted_rows(torch.float64, True))
    x, _ = sorted_rows(torch.float64, descending)
    jac = dense_jacobian(net, x)[:, :, posterior.subnet.flat]
    expected = jac @ posterior.get_posterior().covariance_matrix @ jac.mT
    found = posterior.output_distribution(x).covariance_matrix
    assert_close(found, expected, **tolerance(torch.float64))
