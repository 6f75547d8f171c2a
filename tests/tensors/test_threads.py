"""Threads: closed forms are those of one, and switches are given back."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.exceptions import ModelError
from pyro_subnet.nn import bayesianize, init_to_module
from pyro_subnet.selection import RandomSubnet
from tests.tolerances import tolerance


@pytest.fixture
def _many_switches() -> Iterator[None]:
    """Threads take turns fifty times as often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(interval)


def run(*functions: Callable[[], None]) -> list[BaseException]:
    """Runs functions in a thread each; what they raised."""
    raised: list[BaseException] = []

    def caught(function: Callable[[], None]) -> None:
        try:
            function()
        # Whatever a thread raises is what the test looks at.
        except BaseException as error:
            raised.append(error)

    threads = [
        threading.Thread(target=caught, args=(function,), daemon=True)
        for function in functions
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return raised


def linear(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)


def of_network(dtype: torch.dtype, width: int) -> tuple[Any, Tensor]:
    """A posterior of a convolution's classes, whose routes record layers."""
    net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.PReLU(), nn.Flatten(), nn.Linear(8, 3))
    bnn = bayesianize(net.to(dtype))

    def model(x: Tensor, y: Tensor | None = None) -> None:
        logits = bnn(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    x = torch.randn(7, 1, 6, dtype=dtype)
    guide = AutoSubnetLaplace(
        model, RandomSubnet(width, seed=0), init_loc_fn=init_to_module(net)
    )
    return guide.laplace_approximation(x, torch.randint(3, (7,))), x


@pytest.mark.usefixtures("_many_switches")
def test_predictions_from_many_threads_are_those_of_one(dtype: torch.dtype) -> None:
    x = torch.randn(20, 3, dtype=dtype)
    posterior = AutoSubnetLaplace(linear).laplace_approximation(x, x.sum(-1))
    wide = x.double()
    covariance = torch.linalg.inv(wide.T @ wide / 0.09 + torch.eye(3).double())
    right = ((wide @ covariance) * wide).sum(-1).to(dtype)
    classes, z = of_network(dtype, 9)
    probs = classes.predictive_distribution(z).probs
    before = Distribution._validate_args, torch.is_grad_enabled()
    state = torch.get_rng_state()

    def variances() -> None:
        for _ in range(8):
            found = posterior.output_distribution(x).variance.flatten()
            assert_close(found, right, **tolerance(dtype, "closed_form"))

    def probabilities() -> None:
        assert_close(classes.predictive_distribution(z).probs, probs)

    assert run(variances, probabilities, variances, probabilities) == []
    assert (Distribution._validate_args, torch.is_grad_enabled()) == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("_many_switches")
def test_a_thread_trains_a_network_while_another_predicts() -> None:
    x = torch.randn(20, 3)
    posterior = AutoSubnetLaplace(linear).laplace_approximation(x, x.sum(-1))

    def train() -> None:
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout())
        for _ in range(200):
            net(x).sum().backward()

    def predict() -> None:
        for _ in range(20):
            posterior.output_distribution(x)

    assert run(train, predict) == []


def test_training_mode_is_refused_in_the_thread_that_predicts() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Dropout(), nn.Linear(2, 1))
    bnn, x = bayesianize(net.eval()), torch.randn(5, 3)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        mean = bnn(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    posterior = AutoSubnetLaplace(model).laplace_approximation(x, x[:, 0])
    bnn.train()
    (error,) = run(lambda: posterior.output_distribution(x))
    with pytest.raises(ModelError, match=r"eval mode .* got Dropout in training mode"):
        raise error


def test_precision_switches_are_given_back_by_the_last_thread() -> None:
    settings = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(settings, "fp32_precision") else "allow_tf32"
    before = getattr(settings, name)
    x = torch.randn(6, 3)
    inside, done = threading.Event(), threading.Event()

    def waiting(x: Tensor, y: Tensor | None = None) -> None:
        linear(x, y)
        if slow.is_set():
            inside.set()
            done.wait(60)

    slow = threading.Event()
    guide = AutoSubnetLaplace(waiting)
    posterior = guide.laplace_approximation(x, x[:, 0])
    other = AutoSubnetLaplace(linear).laplace_approximation(x, x[:, 0])
    slow.set()

    def second() -> None:
        inside.wait(60)
        slow.clear()
        done.set()
        other.output_distribution(x)

    assert run(lambda: posterior.output_distribution(x), second) == []
    assert getattr(settings, name) == before


def test_a_site_of_another_thread_is_an_error_that_says_so() -> None:
    x = torch.randn(6, 3)
    raised: list[BaseException] = []

    def model(x: Tensor, y: Tensor | None = None) -> None:
        linear(x, y)
        if visits:
            visits.pop()
            raised.extend(run(lambda: pyro.sample("z", dist.Normal(0.0, 1.0))))

    visits = list[int]()
    posterior = AutoSubnetLaplace(model).laplace_approximation(x, x[:, 0])
    visits.append(1)
    posterior.output_distribution(x)
    with pytest.raises(ModelError, match=r"one thread at a time.* got site 'z' of"):
        raise raised[0]


def test_handlers_of_another_thread_are_an_error_that_says_so() -> None:
    x = torch.randn(6, 3)
    other = poutine.trace()

    def model(x: Tensor, y: Tensor | None = None) -> None:
        linear(x, y)
        if visits:
            visits.pop()
            run(lambda: other.__enter__() and None)

    visits = list[int]()
    posterior = AutoSubnetLaplace(model).laplace_approximation(x, x[:, 0])
    visits.append(1)
    with pytest.raises(ModelError, match=r"one thread at a time.* got handlers of"):
        posterior.output_distribution(x)
    pyro.sample("late", dist.Normal(0.0, 1.0))
    assert "late" not in other.trace
