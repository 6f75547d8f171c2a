"""Half-precision networks have float32 curvature; float32 ones never a TF32 one."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from torch import Tensor, nn
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.nn import bayesianize, init_to_module
from pyro_subnet.selection import LargestVariance, RandomSubnet
from pyro_subnet.tensors.modes import full_precision

# Unit round-off of the type times what a few layers make of it.
HALF = {torch.bfloat16: 0.05, torch.float16: 0.01}
each_half = pytest.mark.parametrize("dtype", HALF)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.GroupNorm(1, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(27, 4),
    )


def fitted(
    net: nn.Module, x: Tensor, y: Tensor, subnet: Any = None
) -> AutoSubnetMultivariateNormal:
    bnn = bayesianize(net)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        logits = bnn(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits.float()), obs=y)

    guide = AutoSubnetLaplace(model, subnet, init_loc_fn=init_to_module(net))
    return guide.laplace_approximation(x, y)


def example(dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    net = network().to(dtype)
    return net, torch.randn(11, 1, 5, 5).to(dtype), torch.randint(4, (11,))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@each_half
@pytest.mark.parametrize("subnet", [None, RandomSubnet(40, seed=1)])
def test_a_half_precision_network_has_float32_curvature(
    dtype: torch.dtype, subnet: Any
) -> None:
    net, x, y = example(dtype)
    found = fitted(net, x, y, subnet).get_posterior()
    wide = deepcopy(net).double()
    expected = fitted(wide, x.double(), y, subnet).get_posterior()
    precision = found.precision_matrix
    assert precision.dtype == found.loc.dtype == torch.float32
    assert relative(precision, expected.precision_matrix.float()) < HALF[dtype]
    assert not torch.equal(precision, precision.to(dtype).float())


@pytest.mark.filterwarnings("ignore::pyro_subnet.exceptions.UntrainedWarning")
@each_half
def test_sums_over_many_data_do_not_stall(dtype: torch.dtype) -> None:
    # Added up in half precision, ones stall at 256 (bfloat16) or 2,048 (float16).
    net, x, y = example(dtype)
    few = fitted(net, x, y)
    copies = 400
    many = fitted(net, torch.cat([x] * copies), torch.cat([y] * copies))
    assert_close(many.ggn() / copies, few.ggn(), rtol=1e-2, atol=1e-4)


@each_half
def test_draws_and_predictions_of_a_half_precision_network(dtype: torch.dtype) -> None:
    net, x, y = example(dtype)
    posterior = fitted(net, x, y, LargestVariance(30))
    assert {value.dtype for value in posterior().values()} == {dtype}
    outputs = posterior.output_distribution(x)
    wide = fitted(deepcopy(net).double(), x.double(), y, posterior.subnet.indices)
    expected = wide.output_distribution(x.double())
    assert outputs.loc.dtype == torch.float32
    found = outputs.covariance_matrix.double()
    assert relative(found, expected.covariance_matrix) < 2 * HALF[dtype]
    for model in (posterior.user_model, posterior.linearized_model):
        draws = Predictive(model, guide=posterior, num_samples=3)(x)
        assert draws["y"].shape == (3, 11)
    parallel = Predictive(
        posterior.linearized_model, guide=posterior, num_samples=40, parallel=True
    )
    assert parallel(x)["y"].shape == (40, 11)


def test_guides_of_two_types_share_no_parameter() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        net, x, y = example(dtype)
        assert fitted(net, x, y, RandomSubnet(5)).loc.dtype == dtype


@pytest.fixture
def shortcuts() -> Iterator[None]:
    """TF32 and bfloat16 products, as users allow them for training."""
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.set_float32_matmul_precision("highest")


def state() -> dict[str, Any]:
    """What the shortcuts are, by the oldest names: they say what the newer ones do."""
    return {
        "matmul": torch.backends.cuda.matmul.allow_tf32,
        "any": torch.get_float32_matmul_precision(),
        "cudnn": torch.backends.cudnn.allow_tf32,
    }


def exact() -> bool:
    """Whether products are exact now, by the newest names where there are any."""
    backends: Any = torch.backends
    if hasattr(backends.cuda.matmul, "fp32_precision"):
        modules = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul)
        return {module.fp32_precision for module in modules} == {"ieee"}
    return not (backends.cuda.matmul.allow_tf32 or backends.cudnn.allow_tf32)


@pytest.mark.usefixtures("shortcuts")
def test_curvature_takes_no_shortcut_and_gives_them_back() -> None:
    seen: list[bool] = []
    before = state()

    def model(x: Tensor, y: Tensor | None = None) -> None:
        seen.append(exact())
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(torch.tanh(x @ w), 0.5), obs=y)

    x = torch.randn(9, 2)
    guide = AutoSubnetLaplace(model)
    guide(x, x[:, 0])
    assert not any(seen)
    seen.clear()
    posterior = guide.laplace_approximation(x, x[:, 0])
    posterior.output_distribution(x)
    assert seen
    assert all(seen)
    assert state() == before


@pytest.mark.usefixtures("shortcuts")
def test_shortcuts_are_given_back_after_an_error() -> None:
    before = state()

    @full_precision()
    def fail() -> None:
        assert exact()
        raise ZeroDivisionError("no")

    with pytest.raises(ZeroDivisionError, match="no"):
        fail()
    assert state() == before


def regression(form: str) -> tuple[AutoSubnetMultivariateNormal, Tensor, Tensor]:
    net = nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 2))
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    x, y = torch.randn(11, 3), torch.randn(11, 2)
    bnn = bayesianize(net)

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = bnn(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.5).to_event(1), obs=y)
        return mean

    init = init_to_module(net)
    guide = AutoSubnetLaplace(model, LargestVariance(20), init_loc_fn=init, form=form)
    return guide.laplace_approximation(x, y), x, y


def numbers(form: str) -> dict[str, Tensor]:
    """What a user may ask of a posterior, all of it computed in the mode around."""
    posterior, x, y = regression(form)
    gaussian = posterior.get_posterior()
    outputs = posterior.output_distribution(x)
    hybrid = pyro.condition(
        posterior.hybrid_model(linearized=True), {"subnet": gaussian.loc + 0.1}
    )
    linearized = posterior.linearized_model
    options: dict[str, Any] = {"guide": posterior, "return_sites": ["_RETURN"]}
    draws = Predictive(linearized, num_samples=3, **options)
    parallel = Predictive(linearized, num_samples=30, parallel=True, **options)
    return {
        "subnet": posterior.subnet.flat,
        "precision": gaussian.precision_matrix,
        "covariance": gaussian.covariance_matrix,
        "scale_tril": gaussian.scale_tril,
        "variance": gaussian.variance,
        "log_prob": gaussian.log_prob(gaussian.loc + 0.1),
        "draws": gaussian.rsample(torch.Size([3])),
        "evidence": posterior.log_marginal_likelihood(prior_factor=2.0),
        "update": posterior.update(x, y).get_posterior().precision_matrix,
        "outputs": outputs.covariance_matrix,
        "expanded": outputs.expand([2, 11]).covariance_matrix,
        "output draws": outputs.rsample(),
        "output density": outputs.log_prob(y),
        "joint": posterior.output_distribution(x, joint=True).covariance_matrix,
        "predictive": posterior.predictive_distribution(x).covariance_matrix,
        "linearized": draws(x)["_RETURN"],
        "parallel": parallel(x)["_RETURN"],
        "hybrid": pyro.poutine.trace(hybrid).get_trace(x, y).log_prob_sum(),
    }


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_autocast_around_a_call_rounds_nothing(form: str) -> None:
    pyro.set_rng_seed(1)
    expected = numbers(form)
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        found = numbers(form)
        assert torch.is_autocast_enabled("cpu")
    for name, value in expected.items():
        assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


def test_a_model_may_enter_autocast_itself() -> None:
    seen: list[torch.dtype] = []

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with torch.autocast("cpu", torch.bfloat16):
            mean = x @ w.unsqueeze(-1)
        seen.append(mean.dtype)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean.squeeze(-1).float(), 0.5), obs=y)

    x = torch.randn(9, 2)
    posterior = AutoSubnetLaplace(model).laplace_approximation(x, x[:, 0])
    assert set(seen) == {torch.bfloat16}
    expected = 4 * x.double().T @ x.double() + torch.eye(2).double()
    found = posterior.get_posterior().precision_matrix
    assert relative(found.double(), expected) < HALF[torch.bfloat16]
