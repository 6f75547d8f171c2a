"""A fit says where float32 has hardly a digit of the posterior left."""

from __future__ import annotations

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.exceptions import RoundingWarning
from tests.cases import draw

NUM_DATA = 40


def variances(noise: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of the weights of two inputs that are nearly one: a fit's, and in float64."""
    x = draw(1, NUM_DATA, 1) + 1e-4 * draw(2, NUM_DATA, 2)

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, noise), obs=y)

    precision = x.mT @ x / noise**2 + torch.eye(2).double()
    y = draw(3, NUM_DATA) * noise
    mean = torch.linalg.solve(precision, x.mT @ y / noise**2)
    start = init_to_value(values={"w": mean.to(dtype)})
    guide = AutoSubnetLaplace(model, init_loc_fn=start)
    found = guide.laplace_approximation(x.to(dtype), y.to(dtype))
    return found.get_posterior().variance, torch.linalg.inv(precision).diagonal()


def test_a_precision_that_float32_hardly_resolves() -> None:
    message = r"a weight's precision is \de-07 of its own, and rounding is 1e-07"
    with pytest.warns(RoundingWarning, match=message):
        variances(4e-3, torch.float32)


@pytest.mark.parametrize(
    ("noise", "dtype"), [(4e-3, torch.float64), (0.5, torch.float32)]
)
def test_a_precision_that_is_resolved(noise: float, dtype: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, expected = variances(noise, dtype)
    assert_close(found.double(), expected, rtol=1e-3, atol=0.0)
