"""Models that are linear and Gaussian, where everything is known in closed form.

Guides start at the exact MAP: nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoLaplaceApproximation
from pyro.infer.autoguide.initialization import init_to_value
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from tests import reference
from tests.cases import NUM_DATA, double, draw, inputs, triangle
from tests.tolerances import tolerance

CLOSED_FORM = tolerance(torch.float64, "closed_form")
NUM_TEST = 5


@dataclass(frozen=True)
class LinearGaussian:
    """A linear model, and the matrices that say the same: rows of X are outputs."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    shapes: dict[str, tuple[int, ...]]
    design: Tensor
    targets: Tensor
    noise_scale: Tensor
    prior_loc: Tensor
    prior_covariance: Tensor
    test_args: tuple[Any, ...]
    test_design: Tensor
    num_outputs: int = 1

    @property
    def posterior(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance over all D weights."""
        return reference.conjugate_posterior(
            self.design,
            self.targets,
            self.noise_scale,
            self.prior_loc,
            self.prior_covariance,
        )

    def init(self) -> Callable[..., Tensor]:
        """Starts a guide at the MAP."""
        loc, _ = self.posterior
        sizes = [torch.Size(shape).numel() for shape in self.shapes.values()]
        pieces = zip(self.shapes.items(), loc.split(sizes), strict=True)
        return init_to_value(
            values={site: piece.reshape(shape) for (site, shape), piece in pieces}
        )

    def fitted(self, subnet: Any = None) -> AutoSubnetMultivariateNormal:
        """Our posterior."""
        guide = AutoSubnetLaplace(self.model, subnet, init_loc_fn=self.init())
        return guide.laplace_approximation(*self.args)


def one_output() -> LinearGaussian:
    """A correlated prior whose mean is not zero; targets in a plate."""
    x, test = inputs(4), draw(7, NUM_TEST, 4)
    y, loc, factor = draw(9, NUM_DATA), draw(5, 4), triangle(6, 4)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.MultivariateNormal(loc, scale_tril=factor))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    return LinearGaussian(
        model=model,
        args=(x, y),
        shapes={"w": (4,)},
        design=x,
        targets=y,
        noise_scale=double([0.5] * NUM_DATA),
        prior_loc=loc,
        prior_covariance=factor @ factor.T,
        test_args=(test,),
        test_design=test,
    )


def three_outputs() -> LinearGaussian:
    """A linear layer with a bias, C = 3, a noise scale for each output."""
    x, test = inputs(2), draw(7, NUM_TEST, 2)
    y, scale = draw(9, 3, NUM_DATA).T, double([0.3, 1.0, 2.0])
    layer = PyroModule[nn.Linear](2, 3).double()
    weight_prior = dist.Normal(double([[0.3] * 2] * 3), 2.0)
    layer.weight = PyroSample(weight_prior.to_event(2))
    layer.bias = PyroSample(dist.Normal(torch.zeros(3).double(), 0.7).to_event(1))

    def model(x: Tensor, y: Tensor | None = None) -> None:
        mean = layer(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, scale).to_event(1), obs=y)

    def design(x: Tensor) -> Tensor:
        eye = torch.eye(3).double()
        return torch.cat([torch.cat([torch.kron(eye, r[None]), eye], 1) for r in x])

    return LinearGaussian(
        model=model,
        args=(x, y),
        shapes={"weight": (3, 2), "bias": (3,)},
        design=design(x),
        targets=y.flatten(),
        noise_scale=scale.repeat(NUM_DATA),
        prior_loc=double([0.3] * 6 + [0.0] * 3),
        prior_covariance=double([4.0] * 6 + [0.49] * 3).diag(),
        test_args=(test,),
        test_design=design(test),
        num_outputs=3,
    )


def hierarchical() -> LinearGaussian:
    """A common mean of the weights, data with weights, some of them missing."""
    x, test, y = inputs(3), draw(7, NUM_TEST, 3), draw(9, NUM_DATA)
    weights = double([0.5, 2.0, 1.0, 3.0, 1.0, 0.1, 4.0])
    seen = torch.tensor([True, True, False, True, True, True, False])

    def model(x: Tensor, y: Tensor, weights: Tensor, seen: Tensor) -> None:
        center = pyro.sample("center", dist.Normal(torch.zeros(()).double(), 2.0))
        prior = dist.Normal(center.expand(3), 0.8).to_event(1)
        mean = x @ pyro.sample("w", prior)
        scaled, masked = poutine.scale(scale=weights), poutine.mask(mask=seen)
        with scaled, masked, pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    # (center, w) = A (center, independent deviations)
    mixing = torch.eye(4).double()
    mixing[1:, 0] = 1.0
    variances = double([4.0, 0.64, 0.64, 0.64])
    none, unit = torch.zeros(NUM_TEST).double(), torch.ones(NUM_TEST).double()
    return LinearGaussian(
        model=model,
        args=(x, y, weights, seen),
        shapes={"center": (), "w": (3,)},
        design=torch.nn.functional.pad(x, (1, 0))[seen],
        targets=y[seen],
        noise_scale=(0.5 / weights.sqrt())[seen],
        prior_loc=torch.zeros(4).double(),
        prior_covariance=mixing @ variances.diag() @ mixing.T,
        test_args=(test, none, unit, unit.bool()),
        test_design=torch.nn.functional.pad(test, (1, 0)),
    )


def without_plates() -> LinearGaussian:
    """A scalar mean, and N values of a site that has no plate."""
    y = draw(9, NUM_DATA)

    def model(y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(double(0.5), 2.0))
        b = pyro.sample("b", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(a + 2 * b[0] - b[1], 0.5), obs=y)

    row = double([1.0, 2.0, -1.0])
    return LinearGaussian(
        model=model,
        args=(y,),
        shapes={"a": (), "b": (2,)},
        design=row.expand(NUM_DATA, 3),
        targets=y,
        noise_scale=double([0.5] * NUM_DATA),
        prior_loc=double([0.5, 0.0, 0.0]),
        prior_covariance=double([4.0, 1.0, 1.0]).diag(),
        test_args=(torch.zeros(NUM_TEST).double(),),
        test_design=row.expand(NUM_TEST, 3),
    )


MODELS = [one_output, three_outputs, hierarchical, without_plates]
Build = Callable[[], LinearGaussian]
each_model = pytest.mark.parametrize("build", MODELS)


def pyros_covariance(case: LinearGaussian) -> tuple[Tensor, Tensor]:
    """Mean and covariance of Pyro's full Laplace approximation at the same MAP."""
    guide = AutoLaplaceApproximation(case.model, init_loc_fn=case.init())
    guide(*case.args)
    posterior = guide.laplace_approximation(*case.args).get_posterior()
    return posterior.mean.detach(), posterior.covariance_matrix.detach()


@each_model
def test_the_posterior_is_the_conjugate_one(build: Build) -> None:
    case = build()
    loc, covariance = case.posterior
    found = case.fitted().get_posterior()
    assert_close(found.loc, loc, **CLOSED_FORM)
    assert_close(found.covariance_matrix, covariance, **CLOSED_FORM)
    assert_close(found.variance, covariance.diagonal(), **CLOSED_FORM)
    assert_close(found.precision_matrix, torch.linalg.inv(covariance), **CLOSED_FORM)


@each_model
def test_the_posterior_is_that_of_pyro(build: Build) -> None:
    case = build()
    loc, covariance = pyros_covariance(case)
    found = case.fitted().get_posterior()
    assert_close(found.loc, loc, **CLOSED_FORM)
    assert_close(found.covariance_matrix, covariance, **CLOSED_FORM)


@each_model
def test_the_guide_is_stationary_at_the_map(build: Build) -> None:
    case = build()
    guide = AutoSubnetLaplace(case.model, init_loc_fn=case.init())
    guide(*case.args)
    # Validation would refuse a batch outside of plates.
    with pyro.validation_enabled(False):
        loss = Trace_ELBO().differentiable_loss(case.model, guide, *case.args)
    (gradient,) = torch.autograd.grad(loss, guide.loc)
    assert_close(gradient, torch.zeros_like(gradient), **CLOSED_FORM)


@each_model
@pytest.mark.parametrize("source", ["conjugate", "Pyro's"])
def test_the_linearized_predictive(build: Build, source: str) -> None:
    case = build()
    posterior = case.posterior if source == "conjugate" else pyros_covariance(case)
    loc, covariance = reference.linear_predictive(case.test_design, *posterior)
    outputs = case.fitted().output_distribution(*case.test_args)
    num_outputs = case.num_outputs
    assert outputs.batch_shape == (NUM_TEST,)
    assert outputs.event_shape == (num_outputs,)
    assert_close(outputs.loc.flatten(), loc, **CLOSED_FORM)
    blocks = covariance.reshape(NUM_TEST, num_outputs, NUM_TEST, num_outputs)
    for datum in range(NUM_TEST):
        assert_close(
            outputs.covariance_matrix[datum], blocks[datum, :, datum], **CLOSED_FORM
        )


@each_model
def test_the_joint_linearized_predictive(build: Build) -> None:
    case = build()
    loc, covariance = reference.linear_predictive(case.test_design, *case.posterior)
    outputs = case.fitted().output_distribution(*case.test_args, joint=True)
    assert outputs.event_shape == (NUM_TEST * case.num_outputs,)
    assert_close(outputs.loc, loc, **CLOSED_FORM)
    assert_close(outputs.covariance_matrix, covariance, **CLOSED_FORM)


@each_model
def test_a_strict_subset_is_conditional_on_the_rest(build: Build) -> None:
    case = build()
    loc, covariance = case.posterior
    num_params = len(loc)
    for kept in ([num_params - 1], [0, num_params - 1], list(range(1, num_params))):
        positions = torch.tensor(kept)
        found = case.fitted(by_site(case, positions)).get_posterior()
        expected = reference.conditional_covariance(covariance, kept)
        # The others are at the MAP, so the conditional mean is the MAP's.
        assert_close(found.loc, loc[kept], **CLOSED_FORM)
        assert_close(found.covariance_matrix, expected, **CLOSED_FORM)


@each_model
def test_the_linearized_predictive_of_a_strict_subset(build: Build) -> None:
    case = build()
    loc, covariance = case.posterior
    kept = list(range(1, len(loc)))
    outputs = case.fitted(by_site(case, torch.tensor(kept))).output_distribution(
        *case.test_args, joint=True
    )
    conditional = reference.conditional_covariance(covariance, kept)
    design = case.test_design[:, kept]
    expected = design @ conditional @ design.T
    assert_close(outputs.loc, case.test_design @ loc, **CLOSED_FORM)
    assert_close(outputs.covariance_matrix, expected, **CLOSED_FORM)


def by_site(case: LinearGaussian, positions: Tensor) -> dict[str, Tensor]:
    """Packed positions as masks of the sites."""
    mask = torch.zeros(len(case.prior_loc), dtype=torch.bool)
    mask[positions] = True
    sizes = [torch.Size(shape).numel() for shape in case.shapes.values()]
    pieces = zip(case.shapes.items(), mask.split(sizes), strict=True)
    return {site: piece.reshape(shape) for (site, shape), piece in pieces}
