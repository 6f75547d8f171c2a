"""Models under ``poutine.reparam``; the oracle is the dense Hessian of their density.

Pyro's own guide is none here: in its approximation the function that starts the guide
gives a reparametrized site its value once more, so that no data reach the new site.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.autoguide.initialization import init_to_value
from pyro.infer.reparam import LocScaleReparam, TransformReparam
from torch import Tensor
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.exceptions import ModelError
from tests.tolerances import tolerance

GROUPS = 4
Model = Callable[..., Any]


def effects(y: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    zero, noise = torch.zeros((), dtype=dtype), torch.full((GROUPS,), 2.0, dtype=dtype)
    mean = pyro.sample("mean", dist.Normal(zero, 3.0))
    spread = pyro.sample("spread", dist.HalfNormal(zero + 3.0))
    with pyro.plate("groups", GROUPS):
        effect = pyro.sample("effect", dist.Normal(mean, spread))
        pyro.sample("y", dist.Normal(effect, noise), obs=y)
    return effect


def positive(y: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    base = dist.Normal(torch.zeros(GROUPS, dtype=dtype), 1.0)
    exp = dist.transforms.ExpTransform()
    rate = pyro.sample("rate", dist.TransformedDistribution(base, exp).to_event(1))
    with pyro.plate("groups", GROUPS):
        pyro.sample("y", dist.Normal(rate, 0.5), obs=y)
    return rate


CASES: dict[str, tuple[Model, dict[str, Any]]] = {
    "loc-scale": (effects, {"effect": LocScaleReparam(0.0)}),
    "partly-centred": (effects, {"effect": LocScaleReparam(0.3)}),
    "transform": (positive, {"rate": TransformReparam()}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_a_reparametrized_model_has_its_posterior(
    case: str, dtype: torch.dtype
) -> None:
    original, config = CASES[case]
    model = poutine.reparam(original, config=config)
    values = {
        "mean": torch.tensor(0.7, dtype=dtype),
        "spread": torch.tensor(2.5, dtype=dtype),
        # Pyro sets the reparametrized sites by their own names, not by the new ones.
        "effect": torch.linspace(0.5, 0.8, GROUPS, dtype=dtype),
        "rate": torch.linspace(1.0, 4.0, GROUPS, dtype=dtype),
    }
    start = init_to_value(values=values)
    y = values[next(iter(config))]
    guide = AutoSubnetLaplace(model, curvature="hessian", init_loc_fn=start)
    posterior = guide.laplace_approximation(y, dtype)
    sites = posterior.subnet.layout

    def negative_density(packed: Tensor) -> Tensor:
        u = sites.unpack(packed)
        values = {**u, "spread": u["spread"].exp()} if "spread" in u else u
        conditioned = poutine.condition(model, data=values)
        density = poutine.trace(conditioned).get_trace(y, dtype).log_prob_sum()
        return -density - (u["spread"] if "spread" in u else 0.0)

    wanted = torch.autograd.functional.hessian(negative_density, posterior.loc)
    close = tolerance(dtype, "autograd")
    assert_close(posterior.get_posterior().precision_matrix, wanted, **close)

    # the site itself is shown, at the draws and linearized
    site = next(iter(config))
    for each in (model, posterior.linearized_model):
        drawn = Predictive(each, guide=posterior, num_samples=3)(None, dtype)
        assert drawn[site].shape[-1] == GROUPS
        assert len(drawn[site][:, ..., 0].unique()) == 3
    at_map = posterior.output_distribution(y, dtype).loc.squeeze(-1)
    with poutine.condition(data=posterior.median()):
        assert_close(at_map, model(y, dtype), **close)


def test_data_that_latent_sites_move_are_refused() -> None:
    """As where a site with data is reparametrized: no Fisher information sees it."""
    model = poutine.reparam(effects, config={"y": LocScaleReparam(0.0)})
    with pytest.raises(ModelError, match=r"Data must not depend on .*got .*latent sit"):
        AutoSubnetLaplace(model).laplace_approximation(torch.zeros(GROUPS).double())
