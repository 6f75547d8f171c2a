"""On a GPU: the same numbers, and nothing that falls back to the CPU in silence."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from pyro.nn import PyroModule
from torch import nn

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.nn import bayesianize, init_to_module
from pyro_subnet.selection import LargestVariance, RandomSubnet
from tests.tolerances import tolerance

pytestmark = pytest.mark.cuda

NUM_DATA, NUM_INPUTS, NUM_CLASSES = 23, 5, 3


def fitted(
    device: str, subnet: object
) -> tuple[PyroModule, torch.Tensor, AutoSubnetMultivariateNormal]:
    """A small classifier in float64, fitted on a device."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Linear(NUM_INPUTS, 7), nn.Tanh(), nn.Linear(7, NUM_CLASSES)
    ).double()
    x = torch.randn(NUM_DATA, NUM_INPUTS, dtype=torch.float64)
    y = torch.randint(NUM_CLASSES, (NUM_DATA,))
    net, x, y = net.to(device), x.to(device), y.to(device)
    bnn = bayesianize(net)

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        logits = bnn(x)
        with pyro.plate("data", len(x), device=device):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)
        return logits

    guide = AutoSubnetLaplace(model, subnet, init_loc_fn=init_to_module(net))
    return model, x, guide.laplace_approximation(x, y)


@pytest.mark.parametrize(
    "subnet", [None, 0.3, LargestVariance(9), RandomSubnet(11, seed=2)]
)
def test_gpu_and_cpu_agree(subnet: object) -> None:
    _, x_cpu, on_cpu = fitted("cpu", subnet)
    _, x_gpu, on_gpu = fitted("cuda", subnet)

    torch.testing.assert_close(on_gpu.subnet.flat.cpu(), on_cpu.subnet.flat)
    torch.testing.assert_close(
        on_gpu.get_posterior().precision_matrix.cpu(),
        on_cpu.get_posterior().precision_matrix,
        **tolerance(torch.float64, "autograd"),
    )
    ours, expected = (
        on_gpu.output_distribution(x_gpu),
        on_cpu.output_distribution(x_cpu),
    )
    torch.testing.assert_close(
        ours.covariance_matrix.cpu(),
        expected.covariance_matrix,
        **tolerance(torch.float64, "autograd"),
    )


@pytest.mark.parametrize("parallel", [False, True])
def test_draws_stay_on_the_gpu(parallel: bool) -> None:
    _, x, posterior = fitted("cuda", 0.2)
    predictive = Predictive(
        posterior.linearized_model, guide=posterior, num_samples=5, parallel=parallel
    )
    for value in predictive(x).values():
        assert value.device.type == "cuda"


def test_a_posterior_moves_to_the_cpu() -> None:
    _, _, posterior = fitted("cuda", RandomSubnet(11, seed=2))
    expected = posterior.get_posterior().variance.cpu()
    moved = posterior.to("cpu")
    torch.testing.assert_close(
        moved.get_posterior().variance, expected, **tolerance(torch.float64, "autograd")
    )
    assert moved.subnet.flat.device.type == "cpu"
    assert all(value.device.type == "cpu" for value in moved.median().values())


def test_positions_may_live_on_the_gpu() -> None:
    chosen = {"0.bias": torch.tensor([1, 4], device="cuda")}
    _, _, posterior = fitted("cuda", chosen)
    assert posterior.subnet.names == ["0.bias[1]", "0.bias[4]"]
