"""The GGN of calls with very many outputs, against Fisher informations by hand."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.selection import RandomSubnet
from tests.tolerances import tolerance


def test_a_gaussian_process(dtype: torch.dtype) -> None:
    r"""F_ij = tr(K^-1 K_i K^-1 K_j) / 2 for two hyperparameters in logarithms."""
    x = torch.linspace(-2, 2, 95, dtype=dtype)

    def kernel(u: Tensor) -> Tensor:
        length, noise = u.exp()
        smooth = torch.exp(-0.5 * ((x[:, None] - x) / length) ** 2)
        return smooth + noise * torch.eye(95, dtype=u.dtype)

    def model(y: Tensor | None = None) -> None:
        zero = x.new_zeros(())
        length = pyro.sample("length", dist.LogNormal(zero, 1.0))
        noise = pyro.sample("noise", dist.LogNormal(zero, 1.0))
        u = torch.stack([length, noise]).log()
        with poutine.scale(scale=3.0):
            loc = x.new_zeros(95)
            pyro.sample("y", dist.MultivariateNormal(loc, kernel(u)), obs=y)

    guide = AutoSubnetLaplace(model, form="primal")
    posterior = guide.laplace_approximation(torch.sin(2 * x))
    u = posterior.loc.double()
    found = torch.autograd.functional.jacobian(kernel, u)
    parts = torch.linalg.solve(kernel(u), found.movedim(-1, 0))
    information = 1.5 * torch.einsum("iab,jba->ij", parts, parts)
    # The log prior of a log-normal in its logarithm is a normal one.
    expected = information + torch.eye(2, dtype=torch.float64)
    precision = posterior.get_posterior().precision_matrix
    assert_close(precision, expected.to(dtype), **tolerance(dtype))


def test_a_thousand_classes(dtype: torch.dtype) -> None:
    x = torch.randn(30, 4, dtype=dtype)
    y, mask = torch.randint(1000, (30,)), torch.arange(30) % 3 > 0

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(4, 1000), 1.0).to_event(2))
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            pyro.sample("y", dist.Categorical(logits=x @ w), obs=y)

    guide = AutoSubnetLaplace(model, RandomSubnet(7, seed=0))
    posterior = guide.laplace_approximation(x, y)
    row, column = posterior.subnet.flat // 1000, posterior.subnet.flat % 1000
    wide = x.double()[mask]
    p = (wide @ posterior.median()["w"].double()).softmax(-1)[:, column]
    same = (column[:, None] == column).double()
    hessian = p[:, :, None] * (same - p[:, None])
    ggn = torch.einsum("ns,nt,nst->st", wide[:, row], wide[:, row], hessian)
    expected = ggn + torch.eye(7, dtype=torch.float64)
    precision = posterior.get_posterior().precision_matrix
    assert_close(precision, expected.to(dtype), **tolerance(dtype))
