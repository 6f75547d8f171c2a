"""A start outside of the prior's support is told, before anything is trained on it."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.exceptions import ModelError
from pyro_subnet.nn import bayesianize, init_to_module

# A prior, a value outside of its support, and one inside, at an edge where it has one.
STARTS: dict[str, tuple[Distribution, list[float], list[float]]] = {
    "positive": (dist.LogNormal(torch.zeros(2), 1.0), [-1.0, 2.0], [1e-30, 2.0]),
    "half line": (dist.HalfNormal(torch.ones(2)), [0.5, -1e-3], [0.5, 1e-3]),
    "interval": (dist.Uniform(-torch.ones(2), 1.0), [0.3, 1.5], [0.3, -0.999]),
    "share": (dist.Beta(torch.ones(2), 2.0), [0.3, 1.2], [0.3, 0.999]),
    "simplex": (dist.Dirichlet(torch.ones(2)), [0.9, 0.9], [0.25, 0.75]),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_start_outside_of_the_support(name: str, dtype: torch.dtype) -> None:
    prior, outside, inside = STARTS[name]

    def model(x: Tensor) -> None:
        w = pyro.sample("w", prior.to_event(1) if prior.batch_shape else prior)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w.sum().to(x), 1.0), obs=x)

    x = torch.zeros(3, dtype=dtype)
    at = init_to_value(values={"w": torch.tensor(outside, dtype=dtype)})
    message = r"start in the support of its prior; got -?\d.* at site 'w', whose supp"
    with pytest.raises(ModelError, match=message):
        AutoSubnetLaplace(model, init_loc_fn=at).laplace_approximation(x)
    svi = SVI(
        model,
        AutoSubnetLaplace(model, init_loc_fn=at),
        pyro.optim.Adam({"lr": 0.1}),
        Trace_ELBO(),
    )
    with pytest.raises(ModelError, match=message):
        svi.step(x)
    start = torch.tensor(inside, dtype=dtype)
    guide = AutoSubnetLaplace(model, init_loc_fn=init_to_value(values={"w": start}))
    guide(x)
    assert_close(guide.median()["w"], start, rtol=1e-4, atol=1e-6)


def test_trained_weights_outside_of_their_prior() -> None:
    net = nn.Linear(3, 1)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.5, -1.0, 2.0]]))

    def prior(name: str, value: Tensor) -> Distribution:
        family = dist.LogNormal if name == "weight" else dist.Normal
        return family(torch.zeros_like(value), 1.0).to_event(value.ndim)

    bnn = bayesianize(net, prior=prior)

    def model(x: Tensor, y: Tensor) -> None:
        mean = bnn(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    guide = AutoSubnetLaplace(model, init_loc_fn=init_to_module(net))
    message = r"got -1 at site 'weight', whose support is .*\(1 of 3 values"
    with pytest.raises(ModelError, match=message):
        guide.laplace_approximation(torch.randn(9, 3), torch.randn(9))
