"""A model that is random in its own way is an error, which names what is hidden."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoGuideList
from torch import Tensor, nn
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.exceptions import ModelError
from tests.cases import draw
from tests.tolerances import tolerance

X, Y = draw(1, 40, 2), draw(2, 40)


def model(x: Tensor, y: Tensor | None = None) -> None:
    """A linear model whose noise is latent, and whose data may be switched."""
    noise = pyro.sample("noise", dist.HalfNormal(torch.ones(()).to(x)))
    w = pyro.sample("w", dist.Normal(torch.zeros(2).to(x), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, noise), obs=y)


def switched(x: Tensor, y: Tensor | None = None) -> None:
    """A hidden switch, which two runs draw alike every other time."""
    with poutine.block(hide=["switch"]):
        on = pyro.sample("switch", dist.Bernoulli(torch.tensor(0.5).to(x)))
    w = pyro.sample("w", dist.Normal(torch.zeros(2).to(x), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w + on, 0.5), obs=y)


def scaled(x: Tensor, y: Tensor | None = None) -> None:
    """A hidden scale of the prior, which no output reads."""
    tau = pyro.sample("tau", dist.HalfNormal(torch.ones(()).to(x)))
    w = pyro.sample("w", dist.Normal(torch.zeros(2).to(x), tau).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


@pytest.mark.parametrize("spare", [False, True])
@pytest.mark.parametrize(
    ("hidden", "said"),
    [
        (poutine.block(model, hide=["noise"]), r"outputs.*\['noise'\] are hidden"),
        (poutine.block(scaled, hide=["tau"]), r"prior.*\['tau'\] are hidden"),
        (switched, r"outputs.*show what is hidden"),
        (
            poutine.scale(poutine.block(model, expose=["w", "y"]), 2.0),
            r"outputs.*\['noise'\] are hidden.*pass the full model",
        ),
    ],
)
def test_hidden_latents_are_an_error(hidden: Any, said: str, spare: bool) -> None:
    """Also where torch's generator holds a spare normal, which it gives out twice."""
    for seed in range(6):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            guide = AutoSubnetLaplace(hidden)
            guide(X, Y)
            if spare:
                torch.randn(1)
            with pytest.raises(ModelError, match=rf"must give the same {said}"):
                guide.laplace_approximation(X, Y)


def test_a_member_of_a_guide_list() -> None:
    guides = AutoGuideList(model)
    guides.append(AutoDelta(poutine.block(model, expose=["noise"])))
    member = AutoSubnetLaplace(poutine.block(model, hide=["noise"]))
    guides.append(member)
    guides(X, Y)
    with pytest.raises(
        ModelError, match=r"\['noise'\] are hidden, as by `poutine.block`"
    ):
        member.laplace_approximation(X, Y)


def test_a_latent_that_is_held() -> None:
    """The way out that the message names."""
    held = pyro.condition(model, data={"noise": torch.tensor(0.5).double()})
    posterior = AutoSubnetLaplace(held).laplace_approximation(X, Y)
    wanted = X.T @ X / 0.25 + torch.eye(2).double()
    found = posterior.get_posterior().precision_matrix
    assert_close(found, wanted, **tolerance(torch.float64, "closed_form"))


def test_random_numbers_that_nothing_depends_on() -> None:
    """A network made inside the model draws its own weights, and takes others."""
    net = nn.Linear(2, 1, dtype=torch.float64)
    with torch.no_grad():
        weight = net.weight.clone()

    def model(x: Tensor, y: Tensor | None = None) -> None:
        inside = nn.Linear(2, 1, dtype=torch.float64)
        w = pyro.sample("w", dist.Normal(torch.zeros(1, 2).to(x), 1.0).to_event(2))
        params = {"weight": w + weight, "bias": torch.zeros(1).to(x)}
        mean = torch.func.functional_call(inside, params, (x,)).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    posterior = AutoSubnetLaplace(model).laplace_approximation(X, Y)
    wanted = X.T @ X / 0.25 + torch.eye(2).double()
    found = posterior.get_posterior().precision_matrix
    assert_close(found, wanted, **tolerance(torch.float64, "closed_form"))
