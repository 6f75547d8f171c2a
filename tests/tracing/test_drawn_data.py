"""Outputs that depend on data which nobody gave have no closed form."""

from __future__ import annotations

import math
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

from pyro_subnet import (
    AutoSubnetLaplace,
    AutoSubnetMultivariateNormal,
    to_inference_data,
)
from pyro_subnet.exceptions import ModelError
from tests.cases import draw
from tests.tolerances import num_standard_errors, tolerance

NUM_DATA, INPUTS = 30, 3
Call = Callable[[AutoSubnetMultivariateNormal, Tensor], Any]


def weights(x: Tensor) -> Tensor:
    return pyro.sample("w", dist.Normal(x.new_zeros(INPUTS), 1.0).to_event(1))


def chain(x: Tensor, first: Tensor | None = None, second: Tensor | None = None) -> None:
    """The second site's mean is a function of the first one's value."""
    w = weights(x)
    with pyro.plate("data", len(x)):
        value = pyro.sample("first", dist.Normal(x @ w, 0.5), obs=first)
        pyro.sample("second", dist.Normal(2 * value + x @ w, 0.1), obs=second)


def trials(
    x: Tensor, first: Tensor | None = None, second: Tensor | None = None
) -> None:
    """The first site's value is the second one's number of trials."""
    w = weights(x)
    with pyro.plate("data", len(x)):
        count = pyro.sample("first", dist.Poisson((x @ w).exp()), obs=first)
        pyro.sample("second", dist.Binomial(count, logits=x @ w), obs=second)


def heads(x: Tensor, first: Tensor | None = None, second: Tensor | None = None) -> None:
    """Two sites that share weights alone, one of a family with a density alone."""
    w = weights(x)
    with pyro.plate("data", len(x)):
        loc = (x @ w).unsqueeze(-1) + x.new_tensor([-1.0, 1.0])
        parts = dist.Categorical(x.new_ones(2)), dist.Normal(loc, 0.5)
        pyro.sample("first", dist.MixtureSameFamily(*parts), obs=first)
        pyro.sample("second", dist.Normal(x @ w, 0.5), obs=second)


def fitted(model: Any, dtype: torch.dtype) -> AutoSubnetMultivariateNormal:
    x = draw(1, NUM_DATA, INPUTS).to(dtype)
    start = init_to_value(values={"w": draw(2, INPUTS).to(dtype)})
    first, second = x.new_full((2, NUM_DATA), 3.0)
    guide = AutoSubnetLaplace(model, curvature="ef", init_loc_fn=start)
    return guide.laplace_approximation(x, first, second)


def exported(
    posterior: AutoSubnetMultivariateNormal, x: Tensor, *, linearized: bool
) -> Any:
    """With predictions at inputs whose data are not given."""
    return to_inference_data(
        posterior,
        x,
        x[:, 0],
        x[:, 0],
        num_samples=4,
        predictions_args=(x,),
        linearized=linearized,
    )


CALLS: dict[str, Call] = {
    "outputs": lambda posterior, x: posterior.output_distribution(x),
    "variances": lambda posterior, x: posterior.output_variance(x),
    "functions": lambda posterior, x: posterior.sample_functions(3, x),
    "predictions": lambda posterior, x: posterior.predictive_distribution(
        x, site="second"
    ),
    "ArviZ": lambda posterior, x: exported(posterior, x, linearized=True),
    "ArviZ, networks": lambda posterior, x: exported(posterior, x, linearized=False),
}


@pytest.mark.parametrize("name", CALLS)
def test_outputs_of_drawn_data_are_refused(name: str, dtype: torch.dtype) -> None:
    """Their numbers would be those given one hidden draw."""
    posterior = fitted(chain, dtype)
    message = r"got site 'second', which differs with the draws of \['first'\]"
    with pytest.raises(ModelError, match=message):
        CALLS[name](posterior, draw(3, 5, INPUTS).to(dtype))


@pytest.mark.parametrize("count", [1, 5])
def test_a_number_of_trials_that_is_drawn(count: int, dtype: torch.dtype) -> None:
    """A count of few values may be the same in two runs."""
    posterior = fitted(trials, dtype)
    x = draw(3, count, INPUTS).to(dtype)
    with pytest.raises(ModelError, match="Outputs in closed form must not depend on"):
        posterior.predictive_distribution(x, site="second", link="mc")


def test_data_that_are_given(dtype: torch.dtype) -> None:
    """Means and variances are the linear-Gaussian closed form's."""
    posterior = fitted(chain, dtype)
    x, first = draw(3, 5, INPUTS).to(dtype), draw(4, 5).to(dtype)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    found = posterior.predictive_distribution(x, first, site="second")
    alone = posterior.predictive_distribution(x, site="first")
    assert torch.equal(torch.get_rng_state(), state)
    covariance = torch.linalg.inv(posterior.get_posterior().precision_matrix)
    variance = ((x @ covariance) * x).sum(-1)
    close = tolerance(dtype, "closed_form")
    assert_close(found.mean, 2 * first + x @ draw(2, INPUTS).to(dtype), **close)
    assert_close(found.variance, variance + 0.1**2, **close)
    assert_close(alone.variance, variance + 0.5**2, **close)


def test_missing_data_of_a_site_after_one_without_data(dtype: torch.dtype) -> None:
    """NaN under a mask is in no support, and says nothing of a dependence."""

    def model(
        x: Tensor, first: Tensor | None = None, second: Tensor | None = None
    ) -> None:
        w = weights(x)
        with pyro.plate("data", len(x)):
            pyro.sample("first", dist.Normal(x @ w, 0.5), obs=first)
            seen = None if second is None else second.isfinite()
            with pyro.poutine.mask(mask=True if seen is None else seen):
                pyro.sample("second", dist.Normal(x @ w, 0.5), obs=second)

    posterior = fitted(model, dtype)
    x, second = draw(3, 5, INPUTS).to(dtype), draw(4, 5).to(dtype)
    second[2] = torch.nan
    found = posterior.predictive_distribution(x, second=second, site="second")
    mean = x @ draw(2, INPUTS).to(dtype)
    assert_close(found.mean, mean, **tolerance(dtype, "closed_form"))


def test_draws_of_all_sites(dtype: torch.dtype) -> None:
    """The way out that the message names has the variance of both noises; 500 draws."""
    posterior, count = fitted(chain, dtype), 500
    x = draw(3, 4, INPUTS).to(dtype)
    torch.manual_seed(0)
    predictive = Predictive(
        posterior.linearized_model, guide=posterior, num_samples=count
    )
    found = predictive(x)["second"]
    covariance = torch.linalg.inv(posterior.get_posterior().precision_matrix)
    variance = 9 * ((x @ covariance) * x).sum(-1) + 4 * 0.5**2 + 0.1**2
    ratio = found.var(0) / variance - 1
    limit = num_standard_errors(len(x)) * math.sqrt(2 / count)
    assert float(ratio.abs().max()) < limit < 0.4


def test_sites_that_share_weights_alone(dtype: torch.dtype) -> None:
    posterior = fitted(heads, dtype)
    x = draw(3, 5, INPUTS).to(dtype)
    found = posterior.predictive_distribution(x, site="second")
    assert_close(
        found.mean, x @ draw(2, INPUTS).to(dtype), **tolerance(dtype, "closed_form")
    )
    data = exported(posterior, x, linearized=False)
    assert data["predictions"]["first"].shape == (1, 4, 5)
