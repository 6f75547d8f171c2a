"""What guides and posteriors say of themselves."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.selection import RandomSubnet


def model(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(x.new_zeros(4), 1.0).to_event(1))
    b = pyro.sample("b", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w + b, 0.5), obs=y)


def test_each_says_what_it_holds() -> None:
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    guide = AutoSubnetLaplace(model, RandomSubnet(2, seed=1), curvature="ef")
    assert "not called yet" in repr(guide)
    posterior = guide.laplace_approximation(x, y)
    assert "MAP of 5 weights at 2 sites" in repr(guide)
    assert "RandomSubnet(size=2, seed=1" in repr(guide)
    assert "'ef'" in repr(guide)
    for part in (
        "2 of 5 weights (40.00%)",
        "curvature 'ef', covariance 'full', held in primal form",
        "prior precision times 1, noise times 1",
    ):
        assert part in repr(posterior)
    assert "S=2" in repr(posterior.get_posterior())
    assert "float64" in repr(posterior.get_posterior())


def test_factors_share_and_form_are_told() -> None:
    x, y = torch.randn(6, 4), torch.randn(6)
    posterior = AutoSubnetLaplace(model, 2).laplace_approximation(x, y)
    assert "of the output variance" in repr(posterior)
    by_site = posterior.with_prior_precision({"w": 3.0})
    assert "prior precision times 3 at w" in repr(by_site)
    assert "noise times 2.5" in repr(posterior.with_noise_scale(2.5))
    assert "tuned by evidence" in repr(posterior.tune_prior_precision())
    diagonal = AutoSubnetLaplace(model, covariance="diag").laplace_approximation(x, y)
    assert "held in diagonal form" in repr(diagonal)
    assert "all weights" in repr(AutoSubnetLaplace(model))
