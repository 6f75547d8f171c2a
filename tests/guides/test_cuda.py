"""On a GPU: the same numbers, and nothing that falls back to the CPU in silence."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from pyro.infer.autoguide.initialization import init_to_value
from pyro.nn import PyroModule
from torch import nn

from pyro_subnet import (
    AutoSubnetLaplace,
    AutoSubnetMultivariateNormal,
    compare_routes,
)
from pyro_subnet.diagnostics import pareto_smoothed
from pyro_subnet.nn import bayesianize, init_to_module
from pyro_subnet.selection import LargestVariance, RandomSubnet
from pyro_subnet.tensors.memory import DEFAULT_BUDGET
from tests.tolerances import tolerance

pytestmark = pytest.mark.cuda

NUM_DATA, NUM_INPUTS, NUM_CLASSES = 23, 5, 3


def fitted(
    device: str, subnet: object, curvature: Any = "ggn"
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

    guide = AutoSubnetLaplace(
        model, subnet, init_loc_fn=init_to_module(net), curvature=curvature
    )
    return model, x, guide.laplace_approximation(x, y)


def convolutions(device: str) -> tuple[torch.Tensor, AutoSubnetMultivariateNormal]:
    """A convolutional network in float32, by layers, both routes compared."""
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.GroupNorm(2, 6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 49, NUM_CLASSES),
    )
    x, y = torch.randn(NUM_DATA, 1, 16, 16), torch.randint(NUM_CLASSES, (NUM_DATA,))
    net, x, y = net.to(device), x.to(device), y.to(device)
    bnn = bayesianize(net)

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        logits = bnn(x)
        with pyro.plate("data", len(x), device=device):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    guide = AutoSubnetLaplace(
        model, RandomSubnet(300, seed=4), init_loc_fn=init_to_module(net)
    )
    with compare_routes():
        return x, guide.laplace_approximation(x, y)


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


@pytest.mark.parametrize("curvature", ["ef", "hessian"])
def test_every_curvature_agrees(curvature: str) -> None:
    chosen = {"2.bias": torch.arange(3)}
    _, _, on_cpu = fitted("cpu", chosen, curvature)
    _, _, on_gpu = fitted("cuda", chosen, curvature)
    torch.testing.assert_close(
        on_gpu.get_posterior().precision_matrix.cpu(),
        on_cpu.get_posterior().precision_matrix,
        **tolerance(torch.float64, "autograd"),
    )


@pytest.mark.parametrize("allow_tf32", [False, True])
def test_layers_on_the_gpu_take_no_shortcut(allow_tf32: bool) -> None:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    try:
        _, on_gpu = convolutions("cuda")
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    _, on_cpu = convolutions("cpu")
    found, expected = (
        posterior.get_posterior().precision_matrix.cpu()
        for posterior in (on_gpu, on_cpu)
    )
    # TF32 keeps 10 bits: its error would be about 1e-3.
    scale = expected.diagonal().sqrt()
    gap = ((found - expected) / torch.outer(scale, scale)).abs()
    assert float(gap.max()) < 1e-4


def test_log_determinants_agree() -> None:
    factors = torch.logspace(-2, 2, 12, dtype=torch.float64)
    _, _, on_cpu = fitted("cpu", RandomSubnet(11, seed=2))
    _, _, on_gpu = fitted("cuda", RandomSubnet(11, seed=2))
    torch.testing.assert_close(
        on_gpu.form.log_det_function(len(factors))(factors.cuda()).cpu(),
        on_cpu.form.log_det_function(len(factors))(factors),
        **tolerance(torch.float64, "autograd"),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_float32_curvature(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(NUM_INPUTS, 7), nn.Tanh(), nn.Linear(7, NUM_CLASSES))
    net = net.to("cuda", dtype)
    bnn = bayesianize(net)

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        logits = bnn(x).float()
        with pyro.plate("data", len(x), device="cuda"):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    x = torch.randn(NUM_DATA, NUM_INPUTS).to("cuda", dtype)
    y = torch.randint(NUM_CLASSES, (NUM_DATA,), device="cuda")
    guide = AutoSubnetLaplace(model, 0.5, init_loc_fn=init_to_module(net))
    precision = guide.laplace_approximation(x, y).get_posterior().precision_matrix
    assert precision.dtype == torch.float32
    assert precision.device.type == "cuda"


@pytest.mark.parametrize("parallel", [False, True])
def test_draws_stay_on_the_gpu(parallel: bool) -> None:
    _, x, posterior = fitted("cuda", 0.2)
    predictive = Predictive(
        posterior.linearized_model, guide=posterior, num_samples=5, parallel=parallel
    )
    for value in predictive(x).values():
        assert value.device.type == "cuda"


def test_the_tail_of_weights_on_the_gpu_is_fitted() -> None:
    raw = torch.randn(400, dtype=torch.float64)
    expected, expected_k = pareto_smoothed(raw)
    found, k_hat = pareto_smoothed(raw.to("cuda"))
    assert found.device.type == "cuda"
    assert k_hat == pytest.approx(expected_k)
    torch.testing.assert_close(found.cpu(), expected)


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


def test_batches_on_the_cpu_are_moved_to_the_model() -> None:
    """In a fit from a loader, and in predictions."""
    model, x, whole = fitted("cuda", RandomSubnet(11, seed=2))
    labels = torch.randint(NUM_CLASSES, (NUM_DATA,), device="cuda")
    guide = AutoSubnetLaplace(
        model,
        RandomSubnet(11, seed=2),
        init_loc_fn=init_to_value(values=whole.median()),
    )
    guide(x, labels)
    pairs = list(zip(x.split(5), labels.split(5), strict=True))
    on_gpu = guide.laplace_approximation_from(pairs)
    mixed = guide.laplace_approximation_from([(a.cpu(), b.cpu()) for a, b in pairs])
    exact = tolerance(torch.float64, "reordered")
    torch.testing.assert_close(
        mixed.get_posterior().precision_matrix,
        on_gpu.get_posterior().precision_matrix,
        **exact,
    )
    torch.testing.assert_close(
        mixed.output_distribution(x.cpu()).covariance_matrix,
        on_gpu.output_distribution(x).covariance_matrix,
        **exact,
    )


@pytest.mark.parametrize("allowed", [False, True])
def test_shortcuts_are_left_as_they_were(allowed: bool) -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = allowed
    try:
        _, x, posterior = fitted("cuda", None)
        posterior.predictive_distribution(x)
        assert (cudnn.allow_tf32, matmul.allow_tf32) == (allowed, allowed)
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def test_a_fit_takes_no_more_than_is_foretold() -> None:
    """The factor as `check_factor_fits` counts it, and blocks of the budget."""
    size = 6000
    net = nn.Sequential(nn.Linear(50, 100), nn.Tanh(), nn.Linear(100, 100)).cuda()
    bnn = bayesianize(net)

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        logits = bnn(x)
        with pyro.plate("data", len(x), device="cuda"):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    x = torch.randn(200, 50, device="cuda")
    y = torch.randint(100, (200,), device="cuda")
    guide = AutoSubnetLaplace(model, RandomSubnet(size, seed=1), form="primal")
    guide(x, y)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    guide.laplace_approximation(x, y)
    taken = torch.cuda.max_memory_allocated() - before
    assert taken >= 4 * size**2
    assert taken <= 1.25 * 4 * size**2 + DEFAULT_BUDGET
