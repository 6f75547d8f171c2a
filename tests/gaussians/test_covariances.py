"""Diagonal and Kronecker posteriors through the guide, against dense matrices."""

from __future__ import annotations

import pickle
from copy import deepcopy
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from laplace import Laplace
from pyro.infer import Predictive
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.exceptions import OptionError
from pyro_subnet.nn import bayesianize, init_to_module
from pyro_subnet.selection import RandomSubnet
from tests.cases import CASES, DOUBLE, Case, draw
from tests.tolerances import tolerance

AUTOGRAD = tolerance(torch.float64, "autograd")
SAME = tolerance(torch.float64, "reordered")
PEER = tolerance(torch.float32, "peer")
# Without the network whose latent scale is not positive definite at the point.
DIAGONALS = ["regression_mlp", "several_outputs", "classification_mlp", "cnn", "plates"]


def fitted(case: Case, subnet: Any = None, **options: Any) -> Any:
    guide = case.guide(subnet, **options)
    return guide.laplace_approximation(*case.args, **case.kwargs)


@pytest.mark.parametrize("some", [True, False], ids=["some", "all-weights"])
@pytest.mark.parametrize("name", DIAGONALS)
def test_the_diagonal_is_that_of_the_full_precision(name: str, some: bool) -> None:
    case = CASES[name](DOUBLE)
    positions = case.scattered() if some else list(range(case.num_params))
    posterior = fitted(case, positions if some else None, covariance="diag")
    order = sorted(positions)
    for scale in (1.0, 0.03):
        expected = (case.ggn() + scale * case.prior()).diagonal()[order]
        found = posterior.with_prior_precision(scale)
        assert_close(found.get_posterior().variance, 1 / expected, **AUTOGRAD)
        precision = found.get_posterior().precision_matrix
        assert_close(precision, expected.diag(), **AUTOGRAD)
    jac = case.jacobian(0)[:, order]
    variance = (jac.square() / (case.ggn() + case.prior()).diagonal()[order]).sum(1)
    found = posterior.output_distribution(*case.args, **case.kwargs)
    if name != "classification_mlp":  # its outputs are log-probabilities, not logits
        assert_close(found.variance.flatten(), variance, **AUTOGRAD)


def log_marginal(posterior: AutoSubnetMultivariateNormal) -> Tensor:
    return posterior.log_marginal_likelihood()


@pytest.mark.parametrize("covariance", ["diag", "kron"])
def test_the_evidence_has_its_log_determinant(covariance: str) -> None:
    """Beside that, it is the full covariance's."""
    case = CASES["several_outputs"](DOUBLE)
    reference, full = fitted(case, covariance=covariance), fitted(case)
    for scale in (1.0, 0.4, 7.0):
        ours = reference.with_prior_precision(scale).get_posterior()
        theirs = full.with_prior_precision(scale).get_posterior()
        half_log_dets = [0.5 * p.precision_matrix.logdet() for p in (ours, theirs)]
        expected = full.log_marginal_likelihood(scale)
        expected = expected + half_log_dets[1] - half_log_dets[0]
        assert_close(reference.log_marginal_likelihood(scale), expected, **AUTOGRAD)
        tensor = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
        found = reference.log_marginal_likelihood(tensor)
        assert_close(found.detach(), expected, **AUTOGRAD)


@pytest.mark.parametrize("covariance", ["diag", "kron"])
def test_everything_a_posterior_does(covariance: str) -> None:
    case = CASES["regression_mlp"](DOUBLE)
    posterior = fitted(case, covariance=covariance)
    x, y = case.args
    dense = posterior.get_posterior().covariance_matrix
    joint = posterior.output_distribution(x, joint=True).covariance_matrix
    jac = case.jacobian(0)
    assert_close(joint, jac @ dense @ jac.T, **AUTOGRAD)
    for model in (case.model, posterior.linearized_model):
        found = Predictive(model, guide=posterior, num_samples=3)(x)["y"]
        assert found.shape == (3, len(x))
    hybrid = posterior.hybrid_model(linearized=True)
    assert Predictive(hybrid, guide=hybrid.guide, num_samples=2)(x)["y"].shape[0] == 2
    tuned = posterior.tune_prior_precision().tune_noise_scale()
    assert float(log_marginal(tuned)) >= float(log_marginal(posterior))
    by_site = posterior.tune_prior_precision(per_site=True)
    one = posterior.tune_prior_precision()
    assert float(log_marginal(by_site)) >= float(log_marginal(one))
    held_out = posterior.tune_prior_precision("nll", val=(x, y))
    assert held_out.tuning is not None
    for other in (deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):
        for name, buffer in tuned.named_buffers():
            assert torch.equal(dict(other.named_buffers())[name], buffer)


@pytest.mark.parametrize("covariance", ["diag", "kron"])
@pytest.mark.parametrize("name", ["regression_mlp", "classification_mlp", "cnn"])
def test_more_data(name: str, covariance: str) -> None:
    case = CASES[name](DOUBLE)
    guide = case.guide(covariance=covariance)
    expected = guide.laplace_approximation(*case.args)
    parts = [tuple(arg[at] for arg in case.args) for at in (slice(3), slice(3, 7))]
    found = guide.laplace_approximation(*parts[0]).update(*parts[1])
    in_batches = guide.laplace_approximation_from(parts)
    for other in (found, in_batches):
        ours, theirs = other.get_posterior(), expected.get_posterior()
        assert_close(ours.precision_matrix, theirs.precision_matrix, **SAME)
        assert_close(log_marginal(other), log_marginal(expected), **SAME)


@pytest.mark.parametrize("likelihood", ["regression", "classification"])
@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_laplace_torch_agrees(structure: str, likelihood: str) -> None:
    """Variances of outputs and the evidence, at two prior precisions."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
    x = torch.randn(25, 3)
    regression = likelihood == "regression"
    y = torch.randn(25, 2) if regression else torch.arange(25) % 2
    theirs = Laplace(
        deepcopy(net),
        likelihood,
        subset_of_weights="all",
        hessian_structure=structure,
        prior_precision=2.0,
        **({"sigma_noise": 0.3} if regression else {}),
    )
    theirs.fit(DataLoader(TensorDataset(x, y), batch_size=25))
    bnn = bayesianize(net.eval(), prior_scale=2.0**-0.5)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        outputs = bnn(x)
        with pyro.plate("data", len(x)):
            if regression:
                pyro.sample("y", dist.Normal(outputs, 0.3).to_event(1), obs=y)
            else:
                pyro.sample("y", dist.Categorical(logits=outputs), obs=y)

    guide = AutoSubnetLaplace(
        model, init_loc_fn=init_to_module(net), covariance=structure
    )
    posterior = guide.laplace_approximation(x, y)
    for precision in (2.0, 0.5):
        theirs.prior_precision = torch.tensor(precision)
        ours = posterior.with_prior_precision(precision / 2.0)
        if regression:
            _, covariance = theirs(x)
            found = ours.output_distribution(x).covariance_matrix
            assert_close(found, covariance.detach(), **PEER)
        else:
            found = ours.predictive_distribution(x, link="probit").probs
            expected = theirs(x, pred_type="glm", link_approx="probit")
            assert_close(found, expected.detach(), **PEER)
        evidence = theirs.log_marginal_likelihood().detach()
        found = ours.log_marginal_likelihood().float()
        assert_close(found, evidence, rtol=1e-4, atol=1e-3)


def test_a_kronecker_posterior_covers_every_weight() -> None:
    case = CASES["regression_mlp"](DOUBLE)
    with pytest.raises(OptionError, match="must cover every weight; got a `subnet`"):
        case.guide(RandomSubnet(3), covariance="kron")


def test_draws_of_a_kronecker_posterior_have_its_covariance() -> None:
    posterior = fitted(CASES["several_outputs"](DOUBLE), covariance="kron")
    gaussian = posterior.gaussian
    root = gaussian.draw(torch.eye(gaussian.size).double()) - gaussian.loc
    covariance = torch.linalg.inv(posterior.get_posterior().precision_matrix)
    assert_close(root.T @ root, covariance, **AUTOGRAD)
    value = gaussian.loc + 0.1 * draw(1, gaussian.size)
    expected = torch.distributions.MultivariateNormal(gaussian.loc, covariance)
    found = posterior.get_posterior().log_prob(value)
    assert_close(found, expected.log_prob(value), **AUTOGRAD)
