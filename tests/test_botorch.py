"""BoTorch's model, against dense autograd, and by what BoTorch asks of its own models.

BoTorch has no suite for models of others. Of the tests of its own models, in
`test/models/test_gpytorch.py` and `test_model.py`, those apply that ask for shapes,
types, transforms, noise, subsets, conditioning and lists of models, and are followed
below. Those of kernels, likelihoods, batches of training data and `fantasize` do not.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from botorch.acquisition import (
    LogExpectedImprovement,
    qLogExpectedImprovement,
    qLogNoisyExpectedImprovement,
)
from botorch.acquisition.objective import ScalarizedPosteriorTransform
from botorch.models.model import ModelList
from botorch.models.transforms.input import Normalize
from botorch.models.transforms.outcome import Log, Standardize
from botorch.optim import optimize_acqf
from botorch.posteriors import GPyTorchPosterior, TransformedPosterior
from botorch.sampling import SobolQMCNormalSampler
from gpytorch.distributions import MultitaskMultivariateNormal
from torch import Tensor, nn
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.botorch import SubnetLaplaceModel
from pyro_subnet.exceptions import DataError, OptionError
from pyro_subnet.nn import classifier, regressor
from tests.reference import dense_jacobian
from tests.tolerances import num_standard_errors, tolerance

pytestmark = [
    pytest.mark.filterwarnings("ignore::pyro_subnet.exceptions.UntrainedWarning"),
    # Of BoTorch's and GPyTorch's own, which ask for float64 and for scaled data.
    pytest.mark.filterwarnings("ignore::botorch.exceptions.warnings.InputDataWarning"),
]
DOUBLE = torch.float64
NUM_TRAIN, NUM_INPUTS, PRIOR = 7, 2, 0.8
NOISE = torch.tensor([0.3, 0.9], dtype=DOUBLE)
BATCHES = [(), (3,), (2, 3)]


def points(*shape: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.rand(*shape, NUM_INPUTS).to(dtype)


class Case:
    """A network as it was made, a posterior there, and both by dense autograd."""

    def __init__(self, num_outputs: int = 1, dtype: torch.dtype = DOUBLE):
        self.width, self.dtype = num_outputs, dtype
        self.noise = NOISE[:num_outputs]
        self.net = nn.Sequential(
            nn.Linear(NUM_INPUTS, 5), nn.Tanh(), nn.Linear(5, num_outputs)
        ).to(dtype)
        count = sum(p.numel() for p in self.net.parameters())
        self.flat = torch.arange(0, count, 2)
        model = regressor(self.net, noise=self.noise.to(dtype), prior_scale=PRIOR)
        self.guide = AutoSubnetLaplace(model, self.chosen())
        self.x = points(NUM_TRAIN, dtype=dtype)
        self.y = torch.randn(NUM_TRAIN, num_outputs, dtype=dtype)
        posterior = self.guide.laplace_approximation(self.x, self.y)
        assert posterior.subnet.flat.tolist() == self.flat.tolist()
        self.model = SubnetLaplaceModel(posterior, self.x)

    def chosen(self) -> dict[str, Tensor]:
        """Every other weight, by site."""
        found, first = {}, 0
        for name, p in self.net.named_parameters():
            own = self.flat[(self.flat >= first) & (self.flat < first + p.numel())]
            found[name] = own - first
            first += p.numel()
        return found

    def outputs(self, x: Tensor) -> Tensor:
        """Of the network, flattened point by point, float64."""
        return copy.deepcopy(self.net).double()(x.double()).flatten().detach()

    def rows(self, x: Tensor) -> Tensor:
        """J over the subnet, (n m, S), float64."""
        plain = copy.deepcopy(self.net).double()
        values = {name: p.detach() for name, p in plain.named_parameters()}

        def function(packed: Tensor) -> Tensor:
            pieces = packed.split([value.numel() for value in values.values()])
            weights = {
                name: piece.view(value.shape)
                for (name, value), piece in zip(values.items(), pieces, strict=True)
            }
            return torch.func.functional_call(plain, weights, (x.double(),))

        packed = torch.cat([value.flatten() for value in values.values()])
        return dense_jacobian(function, packed).flatten(0, 1)[:, self.flat]

    def covariance(self, *data: Tensor) -> Tensor:
        """Of the chosen weights, given inputs of training, float64."""
        jac = self.rows(torch.cat(data))
        weights = (1 / self.noise.square()).repeat(sum(map(len, data)))
        prior = torch.eye(jac.shape[1], dtype=DOUBLE) / PRIOR**2
        return torch.linalg.inv(jac.mT @ (weights[:, None] * jac) + prior)


@pytest.mark.parametrize("num_outputs", [1, 2])
@pytest.mark.parametrize("batch", BATCHES)
def test_the_closed_form_at_each_set(
    batch: tuple[int, ...], num_outputs: int, dtype: torch.dtype
) -> None:
    case = Case(num_outputs, dtype)
    model, x = case.model, points(*batch, 4, dtype=dtype)
    assert (model.num_outputs, model.batch_shape) == (num_outputs, ())
    covariance, same = case.covariance(case.x), tolerance(dtype, "autograd")
    for noisy in (False, True):
        found = model.posterior(x, observation_noise=noisy)
        assert isinstance(found, GPyTorchPosterior)
        several = isinstance(found.distribution, MultitaskMultivariateNormal)
        assert several == (num_outputs > 1)
        assert found.mean.shape == found.variance.shape == (*batch, 4, num_outputs)
        assert found.rsample(torch.Size([5])).shape == (5, *batch, 4, num_outputs)
        assert found.mean.dtype == dtype
        matrices = found.distribution.covariance_matrix
        matrices = matrices.reshape(-1, *matrices.shape[-2:])
        sets = x.reshape(-1, 4, NUM_INPUTS)
        means = found.mean.reshape(len(sets), -1)
        variances = found.variance.reshape(len(sets), -1)
        for one, mean, matrix, variance in zip(
            sets, means, matrices, variances, strict=True
        ):
            jac = case.rows(one)
            expected = jac @ covariance @ jac.mT
            if noisy:
                expected = expected + case.noise.square().repeat(4).diag()
            assert_close(mean, case.outputs(one).to(dtype), **same)
            assert_close(matrix, expected.to(dtype), **same)
            assert_close(variance, expected.diagonal().to(dtype), **same)


@pytest.mark.parametrize("num_outputs", [1, 2])
def test_noise_of_the_users(num_outputs: int) -> None:
    case, x = Case(num_outputs), points(3, 4)
    noise = torch.rand(4, num_outputs, dtype=DOUBLE)
    clean = case.model.posterior(x).distribution.covariance_matrix
    found = case.model.posterior(x, observation_noise=noise)
    expected = clean + noise.flatten().diag()
    same = tolerance(DOUBLE, "closed_form")
    assert_close(found.distribution.covariance_matrix, expected, **same)
    with pytest.raises(DataError, match=r"broadcast to .*\(3, 4, .*; got shape \(5,\)"):
        case.model.posterior(x, observation_noise=torch.ones(5))


@pytest.mark.parametrize("num_outputs", [1, 2])
@pytest.mark.parametrize("transformed", [False, True])
def test_gradients_by_finite_differences(num_outputs: int, transformed: bool) -> None:
    case = Case(num_outputs)
    model = case.model
    if transformed:
        model = with_transforms(case)
    base = torch.randn(2, 3, num_outputs, dtype=DOUBLE)
    if num_outputs == 1:
        base = base.squeeze(-1)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        found = model.posterior(x)
        draws = found.rsample_from_base_samples(base.shape[:1], base)
        return found.mean, found.variance, draws

    x = points(3).requires_grad_()
    assert torch.autograd.gradcheck(function, (x,))


def test_draws_have_its_moments_and_agree_at_equal_points() -> None:
    case, count = Case(2), 20_000
    x = points(3)
    x[2] = x[0]
    found = case.model.posterior(x)
    draws = found.rsample(torch.Size([count]))
    assert_close(draws[:, 2], draws[:, 0], **tolerance(DOUBLE, "autograd"))
    flat = draws[:, :2].flatten(1)
    mean = found.mean[:2].flatten()
    covariance = found.distribution.covariance_matrix[:4, :4]
    limit = num_standard_errors(4 + 16)
    variance = covariance.diagonal()
    error = (flat.mean(0) - mean) / (variance / count).sqrt()
    assert float(error.abs().max()) < limit
    products = (flat - mean).T @ (flat - mean) / count
    spread = (covariance.square() + torch.outer(variance, variance)) / count
    assert float(((products - covariance) / spread.sqrt()).abs().max()) < limit


def with_transforms(case: Case) -> SubnetLaplaceModel:
    """The case's posterior, as one of data in other units."""
    low, high = torch.tensor([[-1.0, 10.0], [3.0, 30.0]], dtype=DOUBLE)
    outcomes = Standardize(m=case.width)
    outcomes(50 + 20 * torch.randn(9, case.width, dtype=DOUBLE))
    return SubnetLaplaceModel(
        case.model.subnet_posterior,
        low + (high - low) * case.x,
        input_transform=Normalize(d=NUM_INPUTS, bounds=torch.stack([low, high])),
        outcome_transform=outcomes,
    )


@pytest.mark.parametrize("num_outputs", [1, 2])
def test_transforms_are_applied_and_taken_back(num_outputs: int) -> None:
    case = Case(num_outputs)
    model, x = with_transforms(case), points(3, 4)
    raw = model.input_transform.untransform(x)
    same = tolerance(DOUBLE, "closed_form")
    plain, outcomes = case.model.posterior(x), model.outcome_transform
    for mode in (True, False):
        model.train(mode)
        found = model.posterior(raw)
        expected = outcomes.untransform_posterior(plain)
        assert_close(found.mean, expected.mean, **same)
        assert_close(found.variance, expected.variance, **same)
        matrix = expected.distribution.covariance_matrix
        assert_close(found.distribution.covariance_matrix, matrix, **same)
    # Conditioning takes data in the user's units.
    y, _ = outcomes.untransform(torch.randn(4, num_outputs, dtype=DOUBLE))
    ours = model.condition_on_observations(raw[0], y).posterior(raw[1])
    y, _ = outcomes(y)
    theirs = case.model.condition_on_observations(x[0], y).posterior(x[1])
    theirs = outcomes.untransform_posterior(theirs)
    assert_close(ours.mean, theirs.mean, **same)
    assert_close(ours.variance, theirs.variance, **same)


def test_outcomes_on_a_logarithmic_scale() -> None:
    case = Case()
    model = SubnetLaplaceModel(
        case.model.subnet_posterior, case.x, outcome_transform=Log()
    )
    x = points(3)
    found, plain = model.posterior(x), case.model.posterior(x)
    assert isinstance(found, TransformedPosterior)
    expected = (plain.mean + plain.variance / 2).exp()
    assert_close(found.mean, expected, **tolerance(DOUBLE, "closed_form"))


def test_a_posterior_transform() -> None:
    case, x = Case(2), points(3, 4)
    weights = torch.tensor([0.5, -2.0], dtype=DOUBLE)
    transform = ScalarizedPosteriorTransform(weights=weights)
    found = case.model.posterior(x, posterior_transform=transform)
    assert found.mean.shape == (3, 4, 1)
    expected = case.model.posterior(x).mean @ weights
    assert_close(found.mean.squeeze(-1), expected, **tolerance(DOUBLE, "closed_form"))


@pytest.mark.parametrize("transformed", [False, True])
def test_some_of_the_outcomes(transformed: bool) -> None:
    case, x = Case(2), points(3, 4)
    model = with_transforms(case) if transformed else case.model
    whole = model.posterior(x, observation_noise=True)
    same = tolerance(DOUBLE, "closed_form")
    kept = model.subset_output([1])
    assert (kept.num_outputs, model.num_outputs) == (1, 2)
    for found in (
        kept.posterior(x, observation_noise=True),
        model.posterior(x, output_indices=[1], observation_noise=True),
    ):
        assert_close(found.mean, whole.mean[..., 1:], **same)
        assert_close(found.variance, whole.variance[..., 1:], **same)
        full = whole.distribution.covariance_matrix[..., 1::2, 1::2]
        assert_close(found.distribution.covariance_matrix, full, **same)
    swapped = model.subset_output([1, 0]).posterior(x)
    assert_close(swapped.mean, model.posterior(x).mean.flip(-1), **same)
    with pytest.raises(OptionError, match=r"some of 2 outcomes; got \[2\]"):
        model.subset_output([2])
    y = torch.randn(4, 1, dtype=DOUBLE)
    with pytest.raises(OptionError, match=r"all outcomes; got .* \[1\] of 2"):
        kept.condition_on_observations(x[0], y)


@pytest.mark.parametrize("num_outputs", [1, 2])
def test_conditioning_is_exact_for_the_linearized_model(
    num_outputs: int, dtype: torch.dtype
) -> None:
    case = Case(num_outputs, dtype)
    new_x = points(5, dtype=dtype)
    new_y = torch.randn(5, num_outputs, dtype=dtype)
    x = points(3, 4, dtype=dtype)
    before = case.model.posterior(x).mean
    parts = case.model.condition_on_observations(new_x[:2], new_y[:2])
    parts = parts.condition_on_observations(new_x[2:], new_y[2:])
    same = tolerance(dtype, "autograd")
    # The weights' mean after all data, by the formula of the docstring.
    covariance, jac = case.covariance(case.x, new_x), case.rows(new_x)
    residuals = new_y.double().flatten() - case.outputs(new_x)
    scores = jac.mT @ (residuals / case.noise.square().repeat(5))
    once = case.model.condition_on_observations(new_x, new_y)
    for model in (once, parts):
        found = model.posterior(x)
        for one, mean, matrix in zip(
            x, found.mean, found.distribution.covariance_matrix, strict=True
        ):
            rows = case.rows(one)
            expected = case.outputs(one) + rows @ covariance @ scores
            assert_close(mean.flatten(), expected.to(dtype), **same)
            assert_close(matrix, (rows @ covariance @ rows.mT).to(dtype), **same)
    # The covariance is that of a fit to everything at the same MAP.
    everything = case.guide.laplace_approximation(
        torch.cat([case.x, new_x]), torch.cat([case.y, new_y])
    )
    ours = once.subnet_posterior.get_posterior().covariance_matrix
    theirs = everything.get_posterior().covariance_matrix
    assert_close(ours, theirs, **tolerance(dtype, "reordered"))
    # The model itself is as it was.
    assert_close(case.model.posterior(x).mean, before, rtol=0, atol=0)


def test_draws_of_outcomes_make_a_batch_of_models() -> None:
    case, new_x, x = Case(2), points(3), points(4)
    draws = SobolQMCNormalSampler(torch.Size([5]), seed=0)(
        case.model.posterior(new_x, observation_noise=True)
    )
    fantasies = case.model.condition_on_observations(new_x, draws)
    assert fantasies.batch_shape == (5,)
    same, found = tolerance(DOUBLE, "closed_form"), fantasies.posterior(x)
    assert found.mean.shape == found.variance.shape == (5, 4, 2)
    assert found.rsample(torch.Size([3])).shape == (3, 5, 4, 2)
    for draw, mean in zip(draws, found.mean, strict=True):
        one = case.model.condition_on_observations(new_x, draw).posterior(x)
        assert_close(mean, one.mean, **same)
    each = fantasies.posterior(x.expand(6, 1, 4, NUM_INPUTS))
    assert_close(each.mean, found.mean.expand(6, 5, 4, 2), **same)
    assert_close(each.variance, found.variance.expand(6, 5, 4, 2), **same)


def test_what_conditioning_refuses() -> None:
    case = Case()
    x, y = points(3), torch.randn(3, 1, dtype=DOUBLE)
    with pytest.raises(OptionError, match="takes X and Y; got 'noise'"):
        case.model.condition_on_observations(x, y, noise=y)
    with pytest.raises(DataError, match=r"one set of points.*got \(2, 3, 2\)"):
        case.model.condition_on_observations(x.expand(2, 3, 2), y)
    with pytest.raises(DataError, match=r"shape \(..., 3, 1\).*got \(3,\)"):
        case.model.condition_on_observations(x, y.squeeze(-1))
    guide = AutoSubnetLaplace(case.guide.user_model, curvature="ef")
    model = SubnetLaplaceModel(guide.laplace_approximation(case.x, case.y), case.x)
    with pytest.raises(OptionError, match="share their curvature; got 'ef'"):
        model.condition_on_observations(x, y.expand(2, 3, 1))
    assert model.condition_on_observations(x, y).batch_shape == ()


def test_models_that_are_none_are_refused_at_once() -> None:
    case = Case()
    posterior = case.model.subnet_posterior
    with pytest.raises(DataError, match=r"shape \(N, d\).*; got \(2,\)"):
        SubnetLaplaceModel(posterior, case.x[0])
    with pytest.raises(DataError, match=r"shape \(..., q, d\); got \(2,\)"):
        case.model.posterior(case.x[0])
    of_classes = AutoSubnetLaplace(classifier(case.net))
    fit = of_classes.laplace_approximation(case.x, (case.y > 0).double())
    with pytest.raises(OptionError, match="bool for Bernoulli whose logits"):
        SubnetLaplaceModel(fit, case.x)
    head = nn.Sequential(nn.Linear(NUM_INPUTS, 2)).double()
    guide = AutoSubnetLaplace(regressor(head, noise="head"))
    fit = guide.laplace_approximation(case.x, case.y)
    with pytest.raises(OptionError, match="loc, log_scale the subnet moves"):
        SubnetLaplaceModel(fit, case.x)

    def of_logarithms(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(NUM_INPUTS), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.LogNormal(x @ w, 0.5), obs=y)

    guide = AutoSubnetLaplace(of_logarithms)
    fit = guide.laplace_approximation(case.x, case.y.exp().squeeze(-1))
    with pytest.raises(OptionError, match="normal noise; got TransformedDistribution"):
        SubnetLaplaceModel(fit, case.x)


def data(num_data: int = 25) -> tuple[Tensor, Tensor]:
    """A hill whose top lies at (0.3, 6), in units of its own."""
    x = points(num_data) * torch.tensor([1.0, 10.0], dtype=DOUBLE)
    squares = (x - torch.tensor([0.3, 6.0], dtype=DOUBLE)).square()
    return x, 100 - (100 * squares[:, :1] + squares[:, 1:])


FAST: dict[str, Any] = {
    "network": (10,),
    "num_epochs": 300,
    "lr": 0.05,
    "prior_scale": 1.0,
}


# A line search ends early in float32; BoTorch 0.13 says so and begins elsewhere.
@pytest.mark.filterwarnings("ignore:Optimization failed in `gen_cand:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_a_network_is_trained_and_finds_the_top(dtype: torch.dtype) -> None:
    x, y = (part.to(dtype) for part in data())
    model = SubnetLaplaceModel.fit(x, y, **FAST)
    found = model.posterior(x)
    assert found.mean.dtype == dtype
    assert float((found.mean - y).square().mean().sqrt() / y.std()) < 0.3
    far = model.posterior(50 * x[:1]).variance
    assert float(far) > 4 * float(found.variance.mean())
    bounds = torch.tensor([[0.0, 0.0], [1.0, 10.0]], dtype=dtype)
    best = y.max()
    for acquisition, q in (
        (LogExpectedImprovement(model, best_f=best), 1),
        (qLogExpectedImprovement(model, best_f=best), 2),
        (qLogNoisyExpectedImprovement(model, x, cache_root=False), 1),
    ):
        chosen, value = optimize_acqf(
            acquisition, bounds, q=q, num_restarts=2, raw_samples=16
        )
        assert chosen.shape == (q, NUM_INPUTS)
        assert bool(value.isfinite())
    top, _ = optimize_acqf(
        LogExpectedImprovement(model, best_f=best),
        bounds,
        q=1,
        num_restarts=4,
        raw_samples=64,
    )
    assert float((top - torch.tensor([0.3, 6.0])).abs().max()) < 2.0


def test_hidden_layers_have_the_activation_asked_for() -> None:
    x, y = data(6)
    few = {**FAST, "num_epochs": 5}
    for options, kind in (({}, nn.SiLU), ({"activation": "tanh"}, nn.Tanh)):
        model = SubnetLaplaceModel.fit(x, y, **few, **options)
        found = [type(part) for part in model.subnet_posterior.user_model.modules()]
        assert found.count(kind) == 1


def test_several_outcomes_a_network_of_the_users_and_lists_of_models() -> None:
    x, y = data(15)
    both = torch.cat([y, -y], dim=1)
    net = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    before = copy.deepcopy(net.state_dict())
    options = {**FAST, "network": net, "num_epochs": 30, "subnet": 10}
    model = SubnetLaplaceModel.fit(x, both, **options)
    assert model.subnet_posterior.subnet.size == 10
    assert all(torch.equal(v, before[name]) for name, v in net.state_dict().items())
    together = ModelList(model, model.subset_output([0]))
    assert together.num_outputs == 3
    found = together.posterior(x[:4])
    same = tolerance(DOUBLE, "closed_form")
    assert_close(found.mean[..., 2], model.posterior(x[:4]).mean[..., 0], **same)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": (0,)}, "sizes of hidden layers"),
        ({"num_epochs": 0}, "`num_epochs` must be a whole number"),
        ({"activation": "relu"}, "`activation` must be 'tanh' or 'silu'; got 'relu'"),
        ({"prior_scale": ()}, "one standard deviation at least; got none"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SubnetLaplaceModel.fit(*data(5), **{**FAST, **options})


def test_data_that_are_no_matrices() -> None:
    x, y = data(5)
    with pytest.raises(DataError, match=r"\(N, d\) and \(N, m\); got \(5, 2\) and \(5"):
        SubnetLaplaceModel.fit(x, y.squeeze(-1))
    with pytest.raises(DataError, match=r"got \(5, 2\) and \(4, 1\)"):
        SubnetLaplaceModel.fit(x, y[:4])


def test_copies_and_pickles_predict_the_same() -> None:
    case, x = Case(2), points(3)
    y = torch.randn(3, 2, dtype=DOUBLE)
    model = with_transforms(case).condition_on_observations(x, y)
    expected = model.posterior(x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found = again.posterior(x)
        assert_close(found.mean, expected.mean, rtol=0, atol=0)
        assert_close(found.variance, expected.variance, rtol=0, atol=0)
        more = again.condition_on_observations(x, y).posterior(x)
        assert float((more.variance / found.variance).max()) < 1


def test_the_users_model_keeps_its_mode() -> None:
    case = Case()
    model = case.guide.user_model
    modes = [part.training for part in model.modules()]
    case.model.train()
    case.model.posterior(case.x)
    assert [part.training for part in model.modules()] == modes
