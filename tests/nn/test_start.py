"""Where guides start: at the network that was asked for, or an error.

The oracle is the network itself: its weights, and what it gives for the inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.exceptions import ModelError, OptionError
from pyro_subnet.nn import bayesianize, init_to_module
from tests.tolerances import tolerance

CLOSED = tolerance(torch.float64, "closed_form")
EQUAL = {"rtol": 0.0, "atol": 0.0}
N, C = 6, 2


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, C))


def observing(net: Callable[..., Tensor]) -> Callable[..., None]:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        f = net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(f, 0.4).to_event(1), obs=y)

    return model


class Wrapper(nn.Module):
    """Holds a network, as a module that trains one does."""

    def __init__(self, **parts: nn.Module):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def frozen_body() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, C))
    net[0].requires_grad_(False)
    return net


def trained(net: nn.Module) -> nn.Module:
    """Every tensor another one, as after training; frozen ones too."""
    with torch.no_grad():
        for value in net.state_dict().values():
            if value.is_floating_point():
                value.add_(0.1 + torch.rand_like(value))
    return net.eval()


SOURCES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "itself": lambda net: net,
    "wrapped": lambda net: Wrapper(net=net),
    "wrapped-twice": lambda net: Wrapper(task=Wrapper(net=net), loss=nn.Linear(9, 1)),
    "data-parallel": nn.DataParallel,
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "wrapped-compiled": lambda net: Wrapper(net=torch.compile(net, backend="eager")),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "bayesianized": bayesianize,
    "wrapped-bayesianized": lambda net: Wrapper(net=bayesianize(net)),
    "registered-twice": lambda net: Wrapper(body=net[0], net=net),
}
GUIDES = {"ours": AutoSubnetLaplace, "pyros": AutoDelta}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", GUIDES)
@pytest.mark.parametrize("source", SOURCES)
def test_a_guide_starts_at_the_network_in_any_wrapper(
    source: str, kind: str, dtype: torch.dtype
) -> None:
    net = trained(frozen_body().to(dtype))
    model = bayesianize(net)
    guide: Any = GUIDES[kind](model, init_loc_fn=init_to_module(SOURCES[source](net)))
    guide(torch.randn(N, 3, dtype=dtype))
    found = guide.median()
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert_close(found[name], parameter.detach(), **EQUAL)


@pytest.mark.parametrize("wrapped", ["data-parallel", "compiled", "wrapped"])
def test_a_wrapper_may_be_bayesianized_and_the_network_given(wrapped: str) -> None:
    net = trained(frozen_body())
    guide = AutoSubnetLaplace(
        bayesianize(SOURCES[wrapped](net)), init_loc_fn=init_to_module(net)
    )
    guide(torch.randn(N, 3))
    found = {name.rpartition("3.")[2]: v for name, v in guide.median().items()}
    assert_close(found["weight"], net[3].weight.detach(), **EQUAL)


def test_several_networks_in_one_wrapper_are_told_apart_or_refused() -> None:
    net, other = trained(frozen_body()), trained(frozen_body())
    both = Wrapper(net=net, target=other)
    for asked in (both, nn.ModuleList([net, other])):
        guide = AutoSubnetLaplace(bayesianize(net), init_loc_fn=init_to_module(asked))
        with pytest.raises(ModelError, match=r"one parameter for .* Pass the netw"):
            guide(torch.randn(N, 3))
    guide = AutoSubnetLaplace(bayesianize(net), init_loc_fn=init_to_module(both.net))
    guide(torch.randn(N, 3))
    assert_close(guide.median()["3.weight"], net[3].weight.detach(), **EQUAL)


class Sum(PyroModule):
    """Two Bayesian networks whose layers have the same names."""

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second = bayesianize(first), bayesianize(second)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


def test_each_of_two_networks_starts_at_its_own() -> None:
    first, second = trained(frozen_body()), trained(frozen_body())
    x = torch.randn(N, 3)
    guide = AutoSubnetLaplace(
        Sum(first, second), init_loc_fn=init_to_module(first.requires_grad_(True))
    )
    with pytest.raises(ModelError, match=r"running statistics|which network"):
        guide(x)
    named = nn.ModuleDict({"first": first, "second": second})
    for asked in (named, Sum(first, second)):
        pyro.clear_param_store()
        model = Sum(first, second)
        guide = AutoSubnetLaplace(model, init_loc_fn=init_to_module(asked))
        guide(x)
        for name, net in named.items():
            found = guide.median()[f"{name}.3.weight"]
            assert_close(found, net[3].weight.detach(), **EQUAL)


def test_two_networks_without_constants_are_not_confused() -> None:
    first, second = (nn.Sequential(nn.Linear(3, C)) for _ in range(2))
    x = torch.randn(N, 3)
    guide = AutoSubnetLaplace(Sum(first, second), init_loc_fn=init_to_module(first))
    with pytest.raises(ModelError, match=r"which network a site.*ModuleDict"):
        guide(x)
    # the same network twice is no confusion
    twin = AutoSubnetLaplace(Sum(first, first), init_loc_fn=init_to_module(first))
    twin(x)
    assert_close(twin.median()["second.0.bias"], first[0].bias.detach(), **EQUAL)


def test_another_head_is_refused() -> None:
    net, other = mlp(), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, C + 1))
    for model in (bayesianize(net), bayesianize(nn.Sequential(net, nn.Linear(C, 2)))):
        guide = AutoSubnetLaplace(model, init_loc_fn=init_to_module(other))
        with pytest.raises(ModelError, match=r"a parameter for each weight.*got "):
            guide(torch.randn(N, 3))


def test_sites_under_names_of_their_own_are_refused() -> None:
    """Also where the user writes the sites: nothing starts at a median unsaid."""
    net = mlp()

    def model(x: Tensor) -> None:
        for name, value in net.named_parameters():
            prior = dist.Normal(torch.zeros_like(value), 1.0).to_event(value.ndim)
            pyro.sample(name.replace(".", "_"), prior)

    guide = AutoSubnetLaplace(model, init_loc_fn=init_to_module(net))
    with pytest.raises(ModelError, match=r"none for site '0_weight' of shape \(4, 3\)"):
        guide(torch.randn(N, 3))


@pytest.mark.parametrize("source", ["itself", "wrapped", "compiled", "copy"])
@pytest.mark.parametrize("first", ["guide", "copy", "function"])
def test_training_may_come_after_the_copy(first: str, source: str) -> None:
    """The oracle is the trained network; its statistics and frozen layers count."""
    net, x = frozen_body().double(), double(N, 3)
    bnn = bayesianize(net)
    asked = bnn if source == "copy" else SOURCES[source](net)
    start = init_to_module(asked) if first != "copy" else None
    model = observing(bnn)
    guide = AutoSubnetLaplace(model, init_loc_fn=start) if first == "guide" else None
    trained(net)
    bnn.eval()
    guide = guide or AutoSubnetLaplace(
        model, init_loc_fn=start or init_to_module(asked)
    )
    posterior = guide.laplace_approximation(x, double(N, C))
    assert_close(posterior.output_distribution(x).loc, net(x).detach(), **CLOSED)


def test_training_after_the_first_call_is_refused() -> None:
    net, x = frozen_body().eval(), torch.randn(N, 3)
    bnn = bayesianize(net)
    before = AutoSubnetLaplace(bnn, init_loc_fn=init_to_module(net))
    before(x)
    kept = before.median()["3.weight"]
    trained(net)
    for asked in (net, bnn, Wrapper(net=net)):
        guide = AutoSubnetLaplace(bnn, init_loc_fn=init_to_module(asked))
        with pytest.raises(ModelError, match=r"stay as it was copied.*got other"):
            guide(x)
    assert_close(bnn.pretrained_values()["3.weight"], kept, **EQUAL)
    # a copy of the copy is what it was
    again = copy.deepcopy(bnn)
    guide = AutoSubnetLaplace(again, init_loc_fn=init_to_module(again))
    guide(x)
    assert_close(guide.median()["3.weight"], kept, **EQUAL)


@pytest.mark.parametrize("part", ["1.running_mean", "0.weight"])
def test_constants_of_another_network_are_refused(part: str) -> None:
    net = trained(frozen_body())
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.state_dict()[part].add_(1.0)
    guide = AutoSubnetLaplace(bayesianize(net), init_loc_fn=init_to_module(other))
    with pytest.raises(ModelError, match=rf"running statistics.*another '{part}'.*bay"):
        guide(torch.randn(N, 3))


def test_constants_in_another_precision_are_the_same() -> None:
    net = trained(frozen_body().double())
    guide = AutoSubnetLaplace(bayesianize(net).float(), init_loc_fn=init_to_module(net))
    guide(torch.randn(N, 3))
    found = guide.median()["3.weight"]
    assert_close(found, net[3].weight.detach().float(), **EQUAL)


def test_a_copy_that_loaded_other_weights_keeps_them() -> None:
    net = frozen_body()
    bnn = bayesianize(net)
    bnn.load_state_dict(bayesianize(trained(frozen_body())).state_dict())
    expected = bnn.pretrained_values()["3.weight"].clone()
    trained(net)
    bnn.eval()
    guide = AutoSubnetLaplace(bnn, init_loc_fn=init_to_module(bnn))
    guide(torch.randn(N, 3))
    assert_close(guide.median()["3.weight"], expected, **EQUAL)


@pytest.mark.parametrize(
    "asked", [mlp().state_dict(), nn.Tanh()], ids=["dict", "empty"]
)
def test_a_start_needs_a_network(asked: Any) -> None:
    with pytest.raises(
        OptionError, match=r"`net` must .*got .*Pass the trained network"
    ):
        init_to_module(asked)
