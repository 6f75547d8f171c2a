"""Integrals over Gaussian outputs, against adaptive quadrature and known moments."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import torch
from torch import Tensor
from torch.testing import assert_close

from pyro_subnet.predictions.links.bridge import bridge
from pyro_subnet.predictions.links.nodes import gauss_hermite
from pyro_subnet.predictions.links.pairwise import pairwise
from pyro_subnet.predictions.links.probit import probit
from pyro_subnet.predictions.links.quadrature import mean_logistic
from tests.tolerances import tolerance


def adaptive(loc: float, scale: float) -> float:
    """P(y = 1), split where the logistic function turns."""
    turn = max(-12.0, min(12.0, -loc / scale))
    found = scipy.integrate.quad(
        lambda z: math.exp(-z * z / 2) / (1 + math.exp(-(loc + scale * z))),
        -12,
        12,
        epsabs=0.0,
        epsrel=1e-13,
        limit=1000,
        points=[turn],
    )
    return found[0] / math.sqrt(2 * math.pi)


@pytest.mark.parametrize("scale", [0.01, 0.5, 0.999, 1.001, 3.0, 8.0, 30.0])
def test_the_mean_of_a_logistic_function(scale: float) -> None:
    loc = torch.linspace(-2.5, 2.5, 7, dtype=torch.float64) * max(scale, 1.0)
    scales = torch.full_like(loc, scale)
    expected = torch.tensor(
        [adaptive(mean, scale) for mean in loc.tolist()], dtype=torch.float64
    )
    fine = mean_logistic(loc, scales, coarse=False).sigmoid()
    assert_close(fine, expected, rtol=1e-11, atol=1e-12)
    coarse = mean_logistic(loc, scales, coarse=True).sigmoid()
    error = (fine - coarse).abs().amax()
    assert float((fine - expected).abs().amax()) <= float(error) + 1e-13
    assert float(error) < 1e-5


def test_the_mean_of_a_logistic_function_has_gradients_everywhere() -> None:
    loc = torch.tensor([0.3, -2.0, 40.0, 0.7], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.0, 0.4, 0.9, 6.0], dtype=torch.float64)
    value = mean_logistic(loc, scale, coarse=False)
    (gradient,) = torch.autograd.grad(value.sum(), loc)
    assert bool(gradient.isfinite().all())
    assert float(value[0].detach()) == pytest.approx(0.3, abs=1e-12)
    scale = torch.tensor([0.3, 0.4, 0.9, 6.0], dtype=torch.float64, requires_grad=True)

    def both(loc: Tensor, scale: Tensor) -> Tensor:
        return mean_logistic(loc, scale, coarse=False)

    assert torch.autograd.gradcheck(both, (loc, scale))


@pytest.mark.parametrize("num_nodes", [1, 2, 5, 32, 64])
def test_nodes_integrate_polynomials(num_nodes: int) -> None:
    like = torch.empty((), dtype=torch.float64)
    nodes, log_weights = gauss_hermite(num_nodes, like)
    for degree in range(0, min(2 * num_nodes, 12)):
        moment = math.prod(range(degree - 1, 0, -2)) if degree % 2 == 0 else 0
        found = (log_weights.exp() * nodes**degree).sum()
        assert float(found) == pytest.approx(moment, rel=1e-9, abs=1e-7)


@pytest.mark.parametrize("num_nodes", [1, 5, 32, 64])
def test_every_weight_has_its_digits(num_nodes: int, dtype: torch.dtype) -> None:
    """Those of the tails, too, by scipy: sums of logarithms weigh them as well."""
    every, weights = scipy.special.roots_hermitenorm(num_nodes)
    kept = weights > 1e-24 * weights.sum()
    found = gauss_hermite(num_nodes, torch.empty((), dtype=dtype))
    log_weights = np.log(weights[kept] / weights.sum())
    for ours, exact in zip(found, (every[kept], log_weights), strict=True):
        expected = torch.as_tensor(exact, dtype=dtype)
        assert_close(ours, expected, **tolerance(dtype, "closed_form"))


def test_a_bridge_does_not_overflow() -> None:
    loc = torch.tensor([[800.0, -800.0, 3.0]], dtype=torch.float64)
    factor = torch.eye(3, dtype=torch.float64).unsqueeze(0)
    expected = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    for normalized in (False, True):
        assert_close(bridge(loc, factor, normalized=normalized), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairs_do_not_see_what_all_logits_share(dtype: torch.dtype) -> None:
    """Neither in the mean nor, of any size, in the variance."""
    generator = torch.Generator().manual_seed(0)
    loc = torch.randn(7, 4, generator=generator, dtype=dtype)
    factor = torch.randn(7, 4, 6, generator=generator, dtype=dtype)
    shared = torch.full((7, 4, 1), 300.0, dtype=dtype)
    found = pairwise(loc + 40, torch.cat([factor, shared], -1)).softmax(-1)
    exact = 1e-4 if dtype == torch.float32 else 1e-12
    assert_close(found, pairwise(loc, factor).softmax(-1), rtol=exact, atol=exact)


def test_pairs_are_nearer_to_the_integral_than_probit() -> None:
    """Where one logit of three is uncertain: mean total variation over random means."""
    generator = torch.Generator().manual_seed(0)
    loc = 3 * torch.randn(50, 3, generator=generator, dtype=torch.float64)
    factor = torch.zeros(50, 3, 1, dtype=torch.float64)
    factor[:, 0] = 3.0
    nodes, log_weights = gauss_hermite(64, loc)
    along = loc.unsqueeze(-2) + nodes.unsqueeze(-1) * factor.mT
    expected = (log_weights.exp().unsqueeze(-1) * along.softmax(-1)).sum(-2)
    by_probit = probit(loc, factor.squeeze(-1).square()).softmax(-1)
    far, near = (
        float((found - expected).abs().sum(-1).mean()) / 2
        for found in (by_probit, pairwise(loc, factor).softmax(-1))
    )
    assert near < 0.04
    assert far > 0.1


def test_pairs_do_not_overflow() -> None:
    loc = torch.tensor([[800.0, -800.0, 3.0, -math.inf, -math.inf]])
    expected = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]])
    assert_close(pairwise(loc, torch.eye(5).unsqueeze(0)).softmax(-1), expected)
