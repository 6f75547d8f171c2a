"""Draws of whole functions: one draw of the weights serves every input."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.exceptions import OptionError
from tests.tolerances import num_standard_errors, tolerance

NUM_DRAWS = 20_000
EXACT = tolerance(torch.float64, "reordered")


def fitted(num_outputs: int) -> tuple[AutoSubnetMultivariateNormal, Tensor]:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        zero = torch.zeros(4, 3, dtype=torch.float64)
        w = pyro.sample("w", dist.Normal(zero, 0.8).to_event(2))
        zero = torch.zeros(num_outputs, 4, dtype=torch.float64)
        v = pyro.sample("v", dist.Normal(zero, 0.8).to_event(2))
        f = F.linear(F.linear(x, w).tanh(), v)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(f, 0.5).to_event(1), obs=y)

    at = {
        "w": torch.randn(4, 3, dtype=torch.float64),
        "v": torch.randn(num_outputs, 4, dtype=torch.float64),
    }
    subnet = {"w": torch.tensor([0, 2, 7]), "v": torch.tensor([1])}
    guide = AutoSubnetLaplace(model, subnet, init_loc_fn=init_to_value(values=at))
    x = torch.randn(9, 3, dtype=torch.float64)
    y = torch.randn(9, num_outputs, dtype=torch.float64)
    return guide.laplace_approximation(x, y), torch.randn(5, 3, dtype=torch.float64)


@pytest.mark.parametrize("num_outputs", [1, 3])
def test_draws_have_the_joint_moments(num_outputs: int) -> None:
    posterior, x = fitted(num_outputs)
    joint = posterior.output_distribution(x, joint=True)
    found = posterior.sample_functions(NUM_DRAWS, x)
    assert found.shape == (NUM_DRAWS, len(x), num_outputs)
    flat = found.flatten(1)
    size = flat.shape[1]
    deviations = num_standard_errors(size + size * size)
    error = joint.variance.sqrt() / NUM_DRAWS**0.5
    assert bool(((flat.mean(0) - joint.loc).abs() <= deviations * error).all())
    covariance = joint.covariance_matrix
    centred = flat - joint.loc
    product = centred.unsqueeze(-1) * centred.unsqueeze(-2)
    spread = (joint.variance.outer(joint.variance) + covariance.square()).sqrt()
    gap = (product.mean(0) - covariance).abs()
    assert bool((gap <= deviations * spread / NUM_DRAWS**0.5).all())


def test_a_function_is_linear_in_one_draw_of_the_weights() -> None:
    """More inputs than weights: K draws span no more than S dimensions."""
    posterior, x = fitted(3)
    loc = posterior.output_distribution(x).loc
    found = posterior.sample_functions(50, x) - loc
    singular = torch.linalg.svdvals(found.flatten(1))
    assert float(singular[posterior.subnet.size - 1]) > 1e-6
    assert float(singular[posterior.subnet.size :].amax()) < 1e-9


def test_inputs_together_or_alone_have_the_same_functions() -> None:
    posterior, x = fitted(3)

    def seeded(inputs: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return posterior.sample_functions(7, inputs, generator=generator)

    alone = torch.cat([seeded(x[:2]), seeded(x[2:])], dim=1)
    assert_close(seeded(x), alone, **EXACT)


def test_a_generator_leaves_the_global_one_alone() -> None:
    posterior, x = fitted(1)
    state = torch.get_rng_state()
    first, again, other = (
        posterior.sample_functions(2, x, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_there_must_be_draws() -> None:
    posterior, x = fitted(1)
    with pytest.raises(OptionError, match=r"`num_samples` must be at least 1; got 0"):
        posterior.sample_functions(0, x)
