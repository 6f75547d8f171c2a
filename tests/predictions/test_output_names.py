"""What the columns of ``output_distribution`` are, whether noise is one or not."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.initialization import init_to_sample
from torch import Tensor
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.selection import Sites
from tests.tolerances import tolerance

N = 4


def regression(x: Tensor, y: Tensor | None = None) -> None:
    """Outputs (N, 1), as networks give them, under a latent noise."""
    weight = pyro.sample("weight", dist.Normal(x.new_zeros(3, 1), 1.0).to_event(2))
    noise = pyro.sample("noise", dist.LogNormal(x.new_tensor(0.0), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ weight, noise).to_event(1), obs=y)


def classes(x: Tensor, y: Tensor | None = None) -> None:
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Categorical(logits=x @ weight), obs=y)


def images(x: Tensor, y: Tensor | None = None) -> None:
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3, 6), 1.0).to_event(2))
    loc = (x @ weight).unflatten(-1, (2, 3))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(loc, 1.0).to_event(2), obs=y)


def two_sites(x: Tensor, y: Tensor | None = None, z: Tensor | None = None) -> None:
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    other = pyro.sample("other", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ weight, 1.0), obs=y)
        pyro.sample("z", dist.Bernoulli(logits=x @ other), obs=z)


def fit(model: Callable[..., Any], subnet: Any, *args: Tensor) -> Any:
    guide = AutoSubnetLaplace(model, subnet, init_loc_fn=init_to_sample)
    return guide.laplace_approximation(*args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("subnet", "names"),
    [
        (None, ("loc", "log_scale")),
        (Sites(["weight"]), ("loc",)),
        (Sites(["noise"]), ("log_scale",)),
    ],
    ids=str,
)
def test_a_name_finds_its_column(
    subnet: Any, names: tuple[str, ...], dtype: torch.dtype
) -> None:
    """And predictions have the data's shape, whatever the subnet moves."""
    x, y = torch.randn(N, 3, dtype=dtype), torch.randn(N, 1, dtype=dtype)
    posterior = fit(regression, subnet, x, y)
    found = posterior.output_distribution(x)
    assert found.names == names
    at_map = posterior.median()
    expected = {
        "loc": (x @ at_map["weight"]).squeeze(-1),
        "log_scale": at_map["noise"].log().expand(N),
    }
    for column, name in enumerate(names):
        value = found.mean[:, column]
        assert_close(value, expected[name], **tolerance(dtype, "closed_form"))
    predictive = posterior.predictive_distribution(x)
    assert predictive.sample().shape == y.shape
    assert predictive.log_prob(y).shape == (N,)


@pytest.mark.parametrize(
    ("model", "data", "names"),
    [
        (classes, (torch.tensor([0, 1, 1, 0]),), ("logits[0]", "logits[1]")),
        (
            images,
            (torch.zeros(N, 2, 3),),
            tuple(f"loc[{row}, {column}]" for row in range(2) for column in range(3)),
        ),
        (two_sites, (torch.zeros(N), torch.ones(N)), ("y.loc", "z.logits")),
    ],
)
def test_names_count_elements_and_tell_sites(
    model: Callable[..., Any], data: tuple[Tensor, ...], names: tuple[str, ...]
) -> None:
    x = torch.randn(N, 3)
    posterior = fit(model, None, x, *data)
    assert posterior.output_distribution(x).names == names
    assert posterior.output_distribution(x, joint=True).names == names * N


def test_names_stay_with_copies_of_a_distribution() -> None:
    x = torch.randn(N, 3)
    found = fit(regression, None, x, torch.randn(N, 1)).output_distribution(x)
    for same in (found.expand((2, N)), pickle.loads(pickle.dumps(found))):
        assert same.names == found.names
