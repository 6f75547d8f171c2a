"""Likelihoods that have a density and nothing else, such as mixtures.

A Hessian and an empirical Fisher ask for no more; the oracles are dense autograd on the
density itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.exceptions import UnsupportedLikelihoodError
from pyro_subnet.selection import LargestVariance
from tests.tolerances import num_standard_errors, tolerance

Family = Callable[[Tensor], Any]
# Of the prior: small enough that the negative Hessian is positive definite.
SCALE = 0.2


class Hidden(dist.TorchDistribution):
    """A user's own, whose parameter nobody can read back."""

    arg_constraints = {}  # noqa: RUF012 - torch's own interface
    support = dist.constraints.real

    def __init__(self, center: Tensor):
        self.hidden = center
        super().__init__(center.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return -torch.log1p((value - self.hidden.sin()) ** 2)


def two_normals(f: Tensor) -> Any:
    parts = dist.Normal(torch.stack([f, 2 - f], -1), 0.7)
    weights = torch.stack([f, -f], -1)
    return dist.MixtureSameFamily(dist.Categorical(logits=weights), parts)


FAMILIES: dict[str, Family] = {
    "mixture": two_normals,
    "own": Hidden,
    "masked": lambda f: two_normals(f).mask(torch.arange(len(f)) != 1),
    "event": lambda f: two_normals(torch.stack([f, f.sin()], -1)).to_event(1),
}


def model_of(family: Family) -> Callable[..., None]:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(2), SCALE).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", family((x @ w).tanh()), obs=y)

    return model


def data(name: str, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    shape = (count, 2) if name == "event" else (count,)
    x, y = torch.randn(count, 2, dtype=dtype), torch.randn(shape, dtype=dtype)
    if name == "masked" and count > 1:
        y[1] = torch.nan
    return x, y, torch.tensor([0.4, -0.9], dtype=dtype)


def densities(family: Family, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return family((x @ w).tanh()).log_prob(y.where(y.isfinite(), 0.0))


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_hessian_needs_a_density_alone(
    name: str, count: int, dtype: torch.dtype
) -> None:
    family = FAMILIES[name]
    x, y, w = data(name, count, dtype)

    def energy(w: Tensor) -> Tensor:
        return w.square().sum() / (2 * SCALE**2) - densities(family, x, y, w).sum()

    expected: Any = torch.autograd.functional.hessian(energy, w)
    start = init_to_value(values={"w": w})
    guide = AutoSubnetLaplace(
        model_of(family), curvature="hessian", init_loc_fn=start, form="primal"
    )
    found = guide.laplace_approximation(x, y).get_posterior().precision_matrix
    assert_close(found, expected, **tolerance(dtype, "autograd"))
    batches = list(zip(x.split(2), y.split(2), strict=True))
    if name != "masked":  # whose mask knows the row
        found = guide.laplace_approximation_from(batches).get_posterior()
        assert_close(found.precision_matrix, expected, **tolerance(dtype, "autograd"))


@pytest.mark.parametrize("name", ["mixture", "own"])
def test_an_empirical_fisher_needs_a_density_alone(
    name: str, dtype: torch.dtype
) -> None:
    family = FAMILIES[name]
    x, y, w = data(name, 5, dtype)
    scores: Any = torch.autograd.functional.jacobian(
        lambda w: densities(family, x, y, w), w
    )
    start = init_to_value(values={"w": w})
    guide = AutoSubnetLaplace(model_of(family), curvature="ef", init_loc_fn=start)
    found = guide.laplace_approximation(x, y).get_posterior().precision_matrix
    expected = torch.eye(2, dtype=dtype) / SCALE**2 + scores.mT @ scores
    assert_close(found, expected, **tolerance(dtype, "autograd"))


def test_labels_of_a_mixture_give_the_fisher_information_that_it_has() -> None:
    """Of two equal normals it is that of one, 1 / scale^2 per observation."""
    count, scale = 4000, 0.5

    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.tensor(0.0), 1.0))
        parts = dist.Normal(loc.expand(2), scale)
        with pyro.plate("data", len(y)):
            weights = dist.Categorical(torch.ones(2))
            pyro.sample("y", dist.MixtureSameFamily(weights, parts), obs=y)

    guide = AutoSubnetLaplace(model, curvature="ggn-mc")
    found = guide.laplace_approximation(torch.zeros(count)).get_posterior()
    expected = count / scale**2
    bound = num_standard_errors(1) * expected * (2 / count) ** 0.5
    assert abs(float(found.precision_matrix) - 1 - expected) < bound


def test_what_needs_outputs_names_what_does_not() -> None:
    x, y, w = data("mixture", 5, torch.float64)
    model = model_of(two_normals)
    start = init_to_value(values={"w": w})
    message = (
        r"MixtureSameFamily.*Observe one of these instead\. Its density alone .*'hes"
    )
    for subnet, curvature in ((None, "ggn"), (LargestVariance(1), "hessian")):
        guide: Any = AutoSubnetLaplace
        guide = guide(model, subnet, curvature=curvature, init_loc_fn=start)
        with pytest.raises(UnsupportedLikelihoodError, match=message):
            guide.laplace_approximation(x, y)
    guide = AutoSubnetLaplace(model, curvature="hessian", init_loc_fn=start)
    posterior = guide.laplace_approximation(x, y)
    for call in (
        posterior.predictive_distribution,
        posterior.output_distribution,
        posterior.linearized_model,
        lambda x: posterior.sample_functions(3, x),
    ):
        with pytest.raises(UnsupportedLikelihoodError, match=message):
            call(x)
    drawn = Predictive(model, guide=posterior, num_samples=7)(x)
    assert drawn["y"].shape == (7, 5)
    assert bool(posterior.log_marginal_likelihood().isfinite())
