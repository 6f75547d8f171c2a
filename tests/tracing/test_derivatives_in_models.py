"""Models that take derivatives themselves: of physics, of energies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.selection import RandomSubnet
from tests.reference import dense_jacobian
from tests.tolerances import tolerance

NUM_UNITS = 5


def field(w: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """u(x), (N,), of inputs (N, 1)."""
    return torch.tanh(x * w) @ v


def by_autograd(u: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(u(x).sum(), x, create_graph=True)[0]


def with_gradients_on(u: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.enable_grad():
        return by_autograd(u, x)


def by_grad(u: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    def of_row(row: Tensor) -> Tensor:
        return u(row.unsqueeze(0)).sum()

    return torch.func.vmap(torch.func.grad(of_row))(x)


def by_jvp(u: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.func.jvp(u, (x,), (torch.ones_like(x),))[1].unsqueeze(-1)


def by_jacrev(u: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.func.jacrev(u)(x).diagonal(dim1=0, dim2=1).reshape(len(x), 1)


DERIVATIVES = [by_autograd, with_gradients_on, by_grad, by_jvp, by_jacrev]


def example(
    derivative: Any, dtype: torch.dtype, num_data: int = 6, **options: Any
) -> tuple[AutoSubnetMultivariateNormal, Tensor, Tensor, dict[str, Tensor]]:
    start = {
        "w": torch.randn(NUM_UNITS, dtype=dtype),
        "v": torch.randn(NUM_UNITS, dtype=dtype),
    }
    x, y = torch.rand(num_data, 1, dtype=dtype), torch.randn(num_data, dtype=dtype)

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        zeros = x.new_zeros(NUM_UNITS)
        w = pyro.sample("w", dist.Normal(zeros, 1.0).to_event(1))
        v = pyro.sample("v", dist.Normal(zeros, 1.0).to_event(1))
        slope = derivative(lambda x: field(w, v, x), x).squeeze(-1)
        with pyro.plate("points", len(x)):
            pyro.sample("u", dist.Normal(field(w, v, x), 0.5), obs=y)
            pyro.sample("slope", dist.Normal(slope, 0.25), obs=torch.zeros_like(slope))
        return slope

    init = init_to_value(values=start)
    guide = AutoSubnetLaplace(model, init_loc_fn=init, **options)
    return guide.laplace_approximation(x, y), x, y, start


def rows(x: Tensor, start: dict[str, Tensor]) -> Tensor:
    """J over the noise of both sites, (N, 2, D), by hand and in float64."""
    x = x.double()

    def outputs(packed: Tensor) -> Tensor:
        w, v = packed.split(NUM_UNITS)
        slope = ((1 - torch.tanh(x * w).square()) * w) @ v
        return torch.stack([field(w, v, x) / 0.5, slope / 0.25], -1)

    packed = torch.cat([start["w"], start["v"]]).double()
    return dense_jacobian(outputs, packed)


@pytest.mark.parametrize("num_data", [1, 6])
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_a_derivative_in_the_model_is_differentiated(
    derivative: Any, num_data: int, dtype: torch.dtype
) -> None:
    posterior, x, _, start = example(derivative, dtype, num_data)
    jac = rows(x, start).flatten(0, 1)
    expected = jac.T @ jac + torch.eye(2 * NUM_UNITS).double()
    found = posterior.get_posterior().precision_matrix
    assert_close(found.double(), expected, **tolerance(dtype))


@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_predictions_of_a_derivative(derivative: Any) -> None:
    posterior, x, _, start = example(
        derivative, torch.float64, subnet=RandomSubnet(4, seed=0)
    )
    outputs = posterior.output_distribution(x)
    jac = rows(x, start)[..., posterior.subnet.flat]
    scaled = jac * torch.tensor([0.5, 0.25]).double().unsqueeze(-1)
    covariance = torch.linalg.inv(
        jac.flatten(0, 1).T @ jac.flatten(0, 1) + torch.eye(4).double()
    )
    expected = scaled @ covariance @ scaled.mT
    assert_close(outputs.covariance_matrix, expected, **tolerance(torch.float64))
    assert not outputs.loc.requires_grad
    draws = Predictive(posterior.linearized_model, guide=posterior, num_samples=2)(x)
    assert draws["slope"].numel() == 2 * 6
    assert not draws["slope"].requires_grad


@pytest.mark.parametrize("curvature", ["ef", "hessian"])
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_every_curvature_of_a_derivative(derivative: Any, curvature: Any) -> None:
    posterior, x, y, start = example(
        derivative, torch.float64, subnet=RandomSubnet(3, seed=0), curvature=curvature
    )
    packed = torch.cat([start["w"], start["v"]])

    def log_density(packed: Tensor) -> Tensor:
        w, v = packed.split(NUM_UNITS)
        slope = ((1 - torch.tanh(x * w).square()) * w) @ v
        found = dist.Normal(field(w, v, x), 0.5).log_prob(y)
        return found + dist.Normal(slope, 0.25).log_prob(torch.zeros(()))

    chosen = posterior.subnet.flat
    if curvature == "ef":
        jac = dense_jacobian(log_density, packed)[:, chosen]
        expected = jac.T @ jac
    else:
        hessian = torch.autograd.functional.hessian(
            lambda packed: -log_density(packed).sum(), packed
        )
        expected = hessian[chosen][:, chosen]
    assert_close(posterior.ggn(), expected, **tolerance(torch.float64))


def test_svi_trains_and_the_fit_goes_on() -> None:
    x = torch.randn(9, 2).double()
    y = torch.randn(9).double()

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        x = x.clone().requires_grad_()
        u = x.square() @ w
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        with pyro.plate("data", len(x)):
            pyro.sample("u", dist.Normal(u, 0.5), obs=y)
            pyro.sample("r", dist.Normal(slope.sum(-1), 0.5), obs=torch.zeros(len(x)))

    guide = AutoSubnetLaplace(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(x, y)
    posterior = guide.laplace_approximation(x, y)
    jac = torch.cat([x.square(), 2 * x])
    expected = 4 * jac.T @ jac + torch.eye(2).double()
    found = posterior.get_posterior().precision_matrix
    assert_close(found, expected, **tolerance(torch.float64))
    with torch.inference_mode():
        again = guide.laplace_approximation(x, y)
    assert_close(again.get_posterior().precision_matrix, expected)


def test_a_models_own_error_stays_its_own() -> None:
    def model(x: Tensor) -> None:
        pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        raise RuntimeError("the model's own")

    with pytest.raises(RuntimeError, match="the model's own"):
        AutoSubnetLaplace(model).laplace_approximation(torch.zeros(2))
