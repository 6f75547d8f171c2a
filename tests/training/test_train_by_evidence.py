"""Prior and noise learned while training: against models scaled by hand, dense sums."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import arviz as az
import pyro
import pyro.distributions as dist
import pytest
import torch
from laplace import Laplace
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide.initialization import init_to_value
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from pyro_subnet import (
    AutoSubnetLaplace,
    AutoSubnetMultivariateNormal,
    to_inference_data,
)
from pyro_subnet.exceptions import (
    DataError,
    ModelError,
    NonFiniteError,
    OptionError,
    TuningWarning,
    UntrainedWarning,
)
from pyro_subnet.nn import bayesianize, classifier, init_to_module
from pyro_subnet.training.evidence import EvidenceStep
from pyro_subnet.training.loss import negative_log_joint
from tests.cases import draw
from tests.export.generation import elpd
from tests.tolerances import tolerance

NUM_DATA, NUM_HIDDEN, NOISE = 24, 6, 0.5
DTYPES = [torch.float64, torch.float32]
# Makes a model of a network, of weights N(0, scale^2) and noise r times `NOISE`.
Make = Callable[[nn.Module, float, float], Callable[..., Any]]


def network(dtype: torch.dtype = torch.float64, num_outputs: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(2, NUM_HIDDEN), nn.Tanh(), nn.Linear(NUM_HIDDEN, num_outputs)
    )
    return net.to(dtype)


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = draw(1, NUM_DATA, 2)
    y = torch.sin(2 * x[:, 0]) + 0.2 * draw(2, NUM_DATA)
    return x.to(dtype), y.to(dtype)


def held_out(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = draw(3, 9, 2)
    return x.to(dtype), (torch.sin(2 * x[:, 0]) + 0.2 * draw(4, 9)).to(dtype)


def of_bayesianized(net: nn.Module, scale: float, noise: float) -> Any:
    bnn = bayesianize(net, prior_scale=scale)

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = bnn(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, noise * NOISE), obs=y)

    return model


def of_pyro_module(net: nn.Module, scale: float, noise: float) -> Any:
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.first = PyroModule[nn.Linear](2, NUM_HIDDEN)
            self.second = PyroModule[nn.Linear](NUM_HIDDEN, 1)
            for layer in (self.first, self.second):
                for name, value in list(layer.named_parameters()):
                    zero = torch.zeros_like(value).to(next(net.parameters()))
                    prior = dist.Normal(zero, scale).to_event(value.ndim)
                    setattr(layer, name, PyroSample(prior))

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            mean = self.second(torch.tanh(self.first(x))).squeeze(-1)
            with pyro.plate("data", len(x)):
                return pyro.sample("y", dist.Normal(mean, noise * NOISE), obs=y)

    return Model()


def of_samples(net: nn.Module, scale: float, noise: float) -> Any:
    """A joint prior and masked sites among them, the observations an event."""
    shapes = {name: value.shape for name, value in net.named_parameters()}
    like = next(net.parameters()).detach()

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        values = {}
        for name, shape in shapes.items():
            prior: Any = dist.Normal(like.new_zeros(shape), scale).to_event(len(shape))
            if name == "2.bias":
                eye = torch.eye(1).to(like)
                prior = dist.MultivariateNormal(like.new_zeros(1), scale**2 * eye)
            elif name == "0.bias":
                prior = dist.Normal(like.new_zeros(()), scale).expand(shape).mask(True)
                prior = prior.to_event(1)
            values[name] = pyro.sample(name, prior)
        mean = torch.func.functional_call(net, values, x).squeeze(-1)
        return pyro.sample("y", dist.Normal(mean, noise * NOISE).to_event(1), obs=y)

    return model


WAYS: dict[str, Make] = {
    "bayesianized": of_bayesianized,
    "PyroModule": of_pyro_module,
    "samples": of_samples,
}


def trained(
    make: Make, dtype: torch.dtype = torch.float64, subnet: Any = 0.4, **options: Any
) -> AutoSubnetLaplace:
    guide = AutoSubnetLaplace(make(network(dtype), 1.0, 1.0), subnet)
    chosen = {"num_epochs": 60, "lr": 0.05, "burn_in": 20, "every": 4, **options}
    return guide.train_by_evidence([data(dtype)], **chosen)


def scaled_by_hand(
    make: Make, guide: AutoSubnetLaplace, dtype: torch.dtype, subnet: Any = 0.4
) -> AutoSubnetLaplace:
    """A guide of the model whose user has written the factors into it."""
    (factor,) = set(guide.factors.prior.values())
    model = make(network(dtype), factor**-0.5, guide.factors.noise)
    start = init_to_value(values=guide.median())
    return AutoSubnetLaplace(model, subnet, init_loc_fn=start)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_posterior_is_that_of_the_model_scaled_by_hand(
    way: str, dtype: torch.dtype
) -> None:
    make, (x, y) = WAYS[way], data(dtype)
    guide = trained(make, dtype)
    by_hand = scaled_by_hand(make, guide, dtype)
    ours = guide.laplace_approximation(x, y)
    oracle = by_hand.laplace_approximation(x, y)
    close = tolerance(dtype, "closed_form")
    assert guide.factors.noise != 1.0
    assert ours.prior_factor != 1.0
    assert torch.equal(ours.subnet.flat, oracle.subnet.flat)
    covariance = oracle.get_posterior().covariance_matrix
    assert_close(ours.get_posterior().covariance_matrix, covariance, **close)
    log_evidence = oracle.log_marginal_likelihood()
    assert_close(ours.log_marginal_likelihood(), log_evidence, **close)
    there = held_out(dtype)[0]
    for name in ("mean", "variance"):
        found = getattr(ours.predictive_distribution(there), name)
        assert_close(
            found, getattr(oracle.predictive_distribution(there), name), **close
        )
    theta = ours.gaussian.loc + 0.1
    for linearized in (False, True):
        densities = [
            poutine.trace(
                poutine.condition(each.hybrid_model(linearized), {"subnet": theta})
            )
            .get_trace(x, y)
            .log_prob_sum()
            for each in (ours, oracle)
        ]
        assert_close(*densities, **close)
    for each, other in zip(
        linearized_draws(ours, there), linearized_draws(oracle, there), strict=True
    ):
        assert_close(each, other, **close)


def linearized_draws(
    posterior: AutoSubnetMultivariateNormal, x: Tensor
) -> Iterator[Tensor]:
    pyro.set_rng_seed(0)
    found = Predictive(posterior.linearized_model, guide=posterior, num_samples=3)(x)
    yield from (found[name] for name in sorted(found))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_svi_descends_on_the_scaled_model(way: str, dtype: torch.dtype) -> None:
    """The loss and its gradient, of the user's own model and the guide."""
    make, (x, y) = WAYS[way], data(dtype)
    guide = trained(make, dtype)
    by_hand = scaled_by_hand(make, guide, dtype)
    by_hand(x, y)
    model = make(network(dtype), 1.0, 1.0)
    (factor,) = set(guide.factors.prior.values())
    scaled = make(network(dtype), factor**-0.5, guide.factors.noise)
    with torch.no_grad():
        guide.loc += 0.01
        by_hand.loc += 0.01
    losses = [
        Trace_ELBO().differentiable_loss(program, each, x, y)
        for program, each in ((model, guide), (scaled, by_hand))
    ]
    close = tolerance(dtype, "closed_form")
    assert_close(losses[0], losses[1], **close)
    gradients = [
        torch.autograd.grad(loss, each.loc)[0]
        for loss, each in zip(losses, (guide, by_hand), strict=True)
    ]
    scale = float(gradients[1].abs().max())
    assert_close(gradients[0] / scale, gradients[1] / scale, **close)


def test_svi_sees_the_subsample_that_the_model_sees() -> None:
    """A plate draws its subsample once, for the model and for what factors change."""
    guide = AutoSubnetLaplace(subsampled(1.0, 1.0), 0.4)
    guide.train_by_evidence(
        [(part,) for part in torch.arange(NUM_DATA).split(8)],
        num_epochs=20,
        burn_in=4,
        every=4,
    )
    (factor,) = set(guide.factors.prior.values())
    scaled = subsampled(factor**-0.5, guide.factors.noise)
    by_hand = AutoSubnetLaplace(
        scaled, 0.4, init_loc_fn=init_to_value(values=guide.median())
    )
    by_hand(torch.arange(8))
    found = []
    for model, each in ((subsampled(1.0, 1.0), guide), (scaled, by_hand)):
        pyro.set_rng_seed(3)
        svi = SVI(model, each, pyro.optim.Adam({}), Trace_ELBO(num_particles=2))
        found.append(svi.evaluate_loss(None))
    assert_close(*found, **tolerance(torch.float64, "closed_form"))


def subsampled(scale: float, noise: float) -> Any:
    x, y = data()
    bnn = bayesianize(network(), prior_scale=scale)

    def model(at: Tensor | None = None) -> None:
        size = None if at is not None else 8
        with pyro.plate("data", NUM_DATA, subsample_size=size, subsample=at) as index:
            mean = bnn(x[index]).squeeze(-1)
            pyro.sample("y", dist.Normal(mean, noise * NOISE), obs=y[index])

    return model


class Dense:
    """Laplace's evidence of all weights, N(0, 1 / s) priors, by dense autograd."""

    def __init__(self, net: nn.Module):
        net, (x, self.y) = net.double(), data()
        values = {name: value.detach() for name, value in net.named_parameters()}
        self.packed = parameters_to_vector(values.values())

        def outputs(vector: Tensor) -> Tensor:
            own, at = {}, 0
            for name, value in values.items():
                own[name] = vector[at : at + value.numel()].view_as(value)
                at += value.numel()
            return torch.func.functional_call(net, own, x).squeeze(-1)

        self.mean = outputs(self.packed).detach()
        self.jac = torch.autograd.functional.jacobian(outputs, self.packed)

    def log_evidence(self, s: float, noise: float) -> Tensor:
        size = len(self.packed)
        precision = self.jac.mT @ self.jac / noise**2 + s * torch.eye(size)
        likelihood = dist.Normal(self.mean, noise).log_prob(self.y).sum()
        prior = dist.Normal(torch.zeros(()), s**-0.5).log_prob(self.packed).sum()
        constant = 0.5 * size * math.log(2 * math.pi)
        half = 0.5 * torch.linalg.slogdet(precision).logabsdet
        return likelihood + prior + constant - half


def untrained(
    dtype: torch.dtype = torch.float64, noise: float = 1.0
) -> tuple[AutoSubnetLaplace, nn.Module]:
    """At a network fitted by hand, far from what N(0, 1) priors expect."""
    net = network()
    x, y = data()
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (net(x).squeeze(-1) - y).square().mean()
        (
            loss + 0.003 * parameters_to_vector(net.parameters()).square().sum()
        ).backward()
        optimizer.step()
    net = net.to(dtype)
    model = of_bayesianized(net, 1.0, noise)
    return AutoSubnetLaplace(model, 0.4, init_loc_fn=init_to_module(net)), net


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("covariance", ["auto", "full"])
def test_a_step_reports_the_dense_evidence(dtype: torch.dtype, covariance: Any) -> None:
    guide, net = untrained(dtype)
    step = guide.evidence_step([data(dtype)], covariance=covariance)
    noise = step.noise_factor * NOISE
    assert_close(
        torch.tensor(step.log_evidence, dtype=torch.float64),
        Dense(net).log_evidence(step.prior_factor, noise),
        **tolerance(dtype, "autograd"),
    )


@pytest.mark.parametrize("per_site", [False, True])
def test_steps_end_where_the_dense_evidence_is_highest(per_site: bool) -> None:
    """Against a search over both factors, and a perturbation of each site's."""
    guide, net = untrained(noise=3.0)
    for _ in range(8):  # each goes by a factor e at most
        step = guide.evidence_step([data()], per_site=per_site)
    if not per_site:
        dense = Dense(net)
        best = max(
            float(dense.log_evidence(s, r * NOISE))
            for s in torch.logspace(-2, 2, 61, dtype=torch.float64).tolist()
            for r in torch.logspace(-1, 0.5, 41, dtype=torch.float64).tolist()
        )
        assert step.log_evidence >= best
        assert step.log_evidence == pytest.approx(best, abs=0.05)
        return
    assert len(set(step.prior_factor.values())) == len(step.prior_factor) == 4
    posterior = AutoSubnetLaplace(
        of_bayesianized(net, 1.0, 3.0), init_loc_fn=init_to_module(net)
    ).laplace_approximation(*data())
    factors = {
        name: torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for name, value in step.prior_factor.items()
    }
    noise = torch.tensor(step.noise_factor, dtype=torch.float64, requires_grad=True)
    found = posterior.log_marginal_likelihood(factors, noise)
    assert found.item() == pytest.approx(step.log_evidence, abs=1e-6)
    slopes = torch.autograd.grad(found, [*factors.values(), noise])
    # d log p / d log s, of 0.1 to 10 effective parameters a site
    for value, slope in zip([*factors.values(), noise], slopes, strict=True):
        assert abs((value * slope).item()) < 1e-2


def test_kronecker_evidence_is_the_peers() -> None:
    """laplace-torch at the factors that were found; it works in float32."""
    x, y = data(torch.float32)
    guide, net = untrained(torch.float32)
    step = guide.evidence_step([(x, y)], covariance="kron")
    peer = Laplace(
        net,
        "regression",
        subset_of_weights="all",
        hessian_structure="kron",
        sigma_noise=step.noise_factor * NOISE,
        prior_precision=step.prior_factor,
    )
    peer.fit(DataLoader(TensorDataset(x, y.unsqueeze(-1)), batch_size=NUM_DATA))
    theirs = peer.log_marginal_likelihood().detach().double()
    assert_close(
        torch.tensor(step.log_evidence, dtype=torch.float64),
        theirs,
        **tolerance(torch.float32, "peer"),
    )


@pytest.mark.parametrize("covariance", ["kron", "diag"])
def test_batches_give_the_evidence_of_all_data(covariance: Any) -> None:
    x, y = data()
    whole, _ = untrained()
    split, _ = untrained()
    one = whole.evidence_step([(x, y)], covariance=covariance)
    parts = split.evidence_step([(x[:7], y[:7]), (x[7:], y[7:])], covariance=covariance)
    assert parts.log_evidence == pytest.approx(one.log_evidence, rel=1e-9)
    assert parts.prior_factor == pytest.approx(one.prior_factor, rel=1e-6)


def test_held_out_residuals_set_the_noise() -> None:
    guide, net = untrained()
    for _ in range(4):
        step = guide.evidence_step([data()], val=held_out())
    x, y = held_out()
    rmse = float((net(x).squeeze(-1) - y).detach().square().mean().sqrt())
    assert step.noise_factor == pytest.approx(rmse / NOISE, rel=1e-9)


def test_the_noise_ends_where_held_out_data_are_predicted_best() -> None:
    guide = trained(of_bayesianized, val=held_out())
    posterior = guide.laplace_approximation(*data())
    again = posterior.tune_noise_scale("nll", val=held_out())
    assert posterior.noise_factor == guide.noise_factor
    assert again.noise_factor == pytest.approx(guide.noise_factor, rel=1e-3)


def test_the_noise_is_not_below_the_residuals_of_the_training_data() -> None:
    """Held-out data without noise, beside training data with it, ask for none."""
    x, y = data()
    exact = x, torch.sin(2 * x[:, 0])
    guide = trained(of_bayesianized, val=exact, num_epochs=300, every=20)
    posterior = guide.laplace_approximation(x, y)
    fitted = posterior.output_distribution(x).mean.squeeze(-1)
    rmse = float((fitted - y).square().mean().sqrt())
    alone = posterior.tune_noise_scale("nll", val=exact)
    assert alone.noise_factor * NOISE < 0.8 * rmse
    assert guide.noise_factor * NOISE == pytest.approx(rmse, rel=1e-6)


def test_the_noise_may_end_far_below_the_models_own() -> None:
    """A model that says 5,000, beside residuals of a half: the data count."""
    guide = AutoSubnetLaplace(of_bayesianized(network(), 1.0, 1e4), 0.4)
    options = {"num_epochs": 300, "lr": 0.05, "burn_in": 20, "every": 20}
    guide.train_by_evidence([data()], val=held_out(), **options)
    x, y = held_out()
    mean = guide.laplace_approximation(*data()).output_distribution(x).mean.squeeze(-1)
    rmse = float((mean - y).square().mean().sqrt())
    assert rmse < 1
    assert guide.noise_factor * 1e4 * NOISE < 1.5 * rmse


def late_best(guide: AutoSubnetLaplace, num_epochs: int) -> EvidenceStep:
    """The look of highest evidence in the second half, where rates are small."""
    history = guide.evidence_history
    late = [step for step in history if step.epoch and 2 * step.epoch >= num_epochs]
    return max(late, key=lambda step: step.log_evidence)


def test_the_state_of_highest_evidence_is_kept() -> None:
    """Not an early one, whose weights are at no mode, though it has more."""
    guide = trained(of_bayesianized, num_epochs=500, every=20)
    best = late_best(guide, 500)
    first = max(guide.evidence_history, key=lambda step: step.log_evidence)
    assert first.epoch < 250
    assert first.log_evidence > best.log_evidence + 1
    assert guide.prior_factor == best.prior_factor
    assert guide.noise_factor == best.noise_factor
    posterior = guide.laplace_approximation(*data())
    assert set(guide.factors.prior.values()) == {posterior.prior_factor}
    # Of all weights it is the evidence that was written down.
    everything = AutoSubnetLaplace(
        of_bayesianized(network(), 1.0, 1.0),
        init_loc_fn=init_to_value(values=guide.median()),
    ).laplace_approximation(*data())
    found = everything.log_marginal_likelihood(best.prior_factor, best.noise_factor)
    assert float(found) == pytest.approx(best.log_evidence, rel=1e-9)


def test_training_is_better_by_evidence_than_before_it() -> None:
    guide = trained(of_bayesianized, burn_in=1, every=8)
    first, last = guide.evidence_history[0], guide.evidence_history[-1]
    assert last.log_evidence > first.log_evidence + 2
    assert [step.epoch for step in guide.evidence_history] == [*range(1, 60, 8), 60]


def test_an_interrupted_training_keeps_the_best_so_far() -> None:
    class Impatient:
        def __init__(self) -> None:
            self.passes = 0

        def __iter__(self) -> Iterator[Any]:
            self.passes += 1
            if self.passes > 50:
                raise KeyboardInterrupt("enough")
            return iter([data()])

    guide = AutoSubnetLaplace(of_bayesianized(network(), 1.0, 1.0), 0.4)
    with pytest.raises(KeyboardInterrupt, match="enough"):
        guide.train_by_evidence(Impatient(), num_epochs=100, burn_in=10, every=5)
    best = max(guide.evidence_history, key=lambda step: step.log_evidence)
    assert guide.prior_factor == best.prior_factor
    posterior = guide.laplace_approximation(*data())
    assert bool(posterior.gaussian.variance().isfinite().all())


@pytest.mark.parametrize("make", [of_bayesianized, of_samples])
def test_minibatches_estimate_the_joint_of_all_data(make: Make) -> None:
    """Batches of 5, 7 and 12 data, each weighted by N / B, and weighed by B / N."""
    x, y = data()
    guide = trained(make)
    at_map, loc = guide.at_map, guide.loc.detach() + 0.1
    parts = zip(x.split([5, 7, 12]), y.split([5, 7, 12]), strict=True)
    estimates = [
        len(part) / len(x) * negative_log_joint(at_map, loc, ((part, target), {}), w)[0]
        for part, target in parts
        for w in [len(x) / len(part)]
    ]
    (factor,) = set(guide.factors.prior.values())
    scaled = make(network(), factor**-0.5, guide.factors.noise)
    values = at_map.latents.constrain(at_map.latents.layout.unpack(loc))
    trace = poutine.trace(poutine.condition(scaled, values)).get_trace(x, y)
    assert_close(sum(estimates), -trace.log_prob_sum())


def test_nothing_of_the_users_is_changed() -> None:
    net = network()
    before = copy.deepcopy(net.state_dict())
    guide = AutoSubnetLaplace(of_bayesianized(net, 1.0, 1.0), 0.4)
    guide(*data())
    keys, state = set(pyro.get_param_store().keys()), torch.get_rng_state()
    with torch.no_grad():
        guide.train_by_evidence([data()], num_epochs=8, burn_in=2, every=2)
    assert torch.equal(state, torch.get_rng_state())
    assert set(pyro.get_param_store().keys()) == keys
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert guide.loc.grad is None
    assert guide.loc.requires_grad


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g))]
)
def test_copies_keep_the_factors(way: Callable[[Any], Any]) -> None:
    guide = trained(of_bayesianized)
    found = way(guide)
    assert found.factors == guide.factors
    assert found.evidence_history == guide.evidence_history


def test_a_file_keeps_the_scaled_model(tmp_path: Path) -> None:
    x, y = data()
    model = of_bayesianized(network(), 1.0, 1.0)
    guide = AutoSubnetLaplace(model, 0.4)
    guide.train_by_evidence([data()], num_epochs=40, burn_in=8, every=4)
    ours = guide.laplace_approximation(x, y)
    ours.save(tmp_path / "posterior")
    loaded = AutoSubnetMultivariateNormal.load(tmp_path / "posterior", model, x, y)
    assert loaded.prior_factor == ours.prior_factor
    assert loaded.noise_factor == ours.noise_factor
    assert_close(loaded.log_marginal_likelihood(), ours.log_marginal_likelihood())
    there = held_out()[0]
    found, expected = (
        each.predictive_distribution(there).variance for each in (loaded, ours)
    )
    assert_close(found, expected, rtol=0, atol=0)
    hybrid = [
        poutine.trace(
            poutine.condition(each.hybrid_model(), {"subnet": ours.gaussian.loc})
        )
        .get_trace(x, y)
        .log_prob_sum()
        for each in (loaded, ours)
    ]
    assert_close(*hybrid)


def test_arviz_groups_are_of_the_scaled_model() -> None:
    """Where the model is linear the posterior is exact: all ratios are the evidence."""
    net = nn.Sequential(nn.Linear(2, 1)).double()
    guide = AutoSubnetLaplace(of_bayesianized(net, 1.0, 1.0))
    guide.train_by_evidence([data()], num_epochs=100, lr=0.05, burn_in=20, every=20)
    assert guide.noise_factor != 1.0
    x, y = data()
    inputs = torch.cat([x, torch.ones(len(x), 1)], 1)
    ridge = guide.prior_factor * (guide.noise_factor * NOISE) ** 2 * torch.eye(3)
    with torch.no_grad():  # the last digits of the MAP
        guide.loc.copy_(torch.linalg.solve(inputs.mT @ inputs + ridge, inputs.mT @ y))
    posterior = guide.laplace_approximation(x, y)
    found = to_inference_data(posterior, *data(), num_samples=200, seed=0)
    ratio = found["sample_stats"]["log_importance_ratio"].values
    assert ratio.std() < 1e-7
    log_evidence = float(posterior.log_marginal_likelihood())
    assert ratio.mean() == pytest.approx(log_evidence, rel=1e-9)
    prior = found["prior"]["0.weight"].values
    scale = guide.prior_factor**-0.5
    assert prior.std() == pytest.approx(scale, rel=5 / math.sqrt(2 * prior.size))
    assert elpd(az.loo(found)) < 0


@pytest.mark.parametrize(("s", "r"), [(1.0, 1.0), (2.0, 0.7)])
def test_factors_of_a_posterior_are_of_the_models_own(s: float, r: float) -> None:
    """Whichever way they came: set anew after training, against a model by hand."""
    posterior = trained(of_bayesianized).laplace_approximation(*data())
    ours = posterior.with_prior_precision(s).with_noise_scale(r)
    by_hand = AutoSubnetLaplace(
        of_bayesianized(network(), s**-0.5, r),
        posterior.subnet.indices,
        init_loc_fn=init_to_value(values=posterior.median()),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedWarning)  # under these factors
        oracle = by_hand.laplace_approximation(*data())
    assert_close(
        ours.get_posterior().covariance_matrix,
        oracle.get_posterior().covariance_matrix,
        **tolerance(torch.float64, "closed_form"),
    )


class Classes:
    """Three classes, by a network of two inputs."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        self.x, _ = data(dtype)
        self.y = (self.x[:, 0] > 0).long() + (self.x[:, 1] > 0.3).long()
        bnn = bayesianize(network(dtype, 3))

        def model(x: Tensor, y: Tensor | None = None) -> None:
            logits = bnn(x)
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Categorical(logits=logits), obs=y)

        self.model = model


@pytest.mark.parametrize("covariance", ["auto", "kron", "diag"])
def test_classes_learn_the_prior_alone(covariance: Any) -> None:
    problem = Classes()
    guide = AutoSubnetLaplace(problem.model, 0.4)
    guide.train_by_evidence(
        [(problem.x, problem.y)],
        num_epochs=200,
        burn_in=40,
        every=20,
        covariance=covariance,
    )
    assert guide.noise_factor == 1.0
    history = guide.evidence_history
    assert history[-1].log_evidence >= history[0].log_evidence
    posterior = guide.laplace_approximation(problem.x, problem.y)
    assert posterior.predictive_distribution(problem.x).probs.shape == (NUM_DATA, 3)


def test_one_call_of_a_labelled_loader() -> None:
    problem = Classes(torch.float32)
    loader = DataLoader(TensorDataset(problem.x, problem.y), batch_size=10)
    guide = AutoSubnetLaplace(problem.model, 0.4)
    assert guide.train_by_evidence(loader, num_epochs=9) is guide
    # Nine epochs: one of burn-in, then every sixth one, and the last.
    assert [step.epoch for step in guide.evidence_history] == [1, 7, 9]


def latent_noise(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(x.new_ones(())))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, noise), obs=y)


def hierarchy(x: Tensor, y: Tensor | None = None) -> None:
    scale = pyro.sample("scale", dist.HalfNormal(x.new_ones(())))
    w = pyro.sample("w", dist.Normal(x.new_zeros(2), scale).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def test_priors_and_noise_that_no_factor_scales_are_named() -> None:
    guide = AutoSubnetLaplace(latent_noise)
    with pytest.warns(TuningWarning, match="'noise', as its prior is not normal; 'y'"):
        guide.train_by_evidence([data()], num_epochs=40)
    assert set(guide.factors.prior) == {"w"}
    assert guide.noise_factor == 1.0
    posterior = guide.laplace_approximation(*data())
    assert posterior.prior_factor == {"w": guide.factors.prior["w"], "noise": 1.0}
    assert guide.prior_factor == posterior.prior_factor


def only_noise(x: Tensor, y: Tensor | None = None) -> Tensor:
    w = pyro.sample("w", dist.Laplace(x.new_zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def test_noise_is_learned_alone_and_guides_run_without_data() -> None:
    guide = AutoSubnetLaplace(only_noise)
    with pytest.warns(TuningWarning, match="'w', as its prior is not normal"):
        guide.train_by_evidence([data()], num_epochs=20)
    assert guide.prior_factor == 1.0
    assert guide.noise_factor != 1.0
    assert torch.equal(guide(data()[0])["w"], guide.median()["w"])


def two_sites(x: Tensor, y: Tensor | None = None) -> None:
    """Weights move the first site; the second is data of its own, of joint noise."""
    w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    eye = torch.eye(2).to(x)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)
        pyro.sample("x", dist.MultivariateNormal(x.new_zeros(2), eye), obs=x)


def test_joint_noise_is_left_alone_and_named() -> None:
    guide = AutoSubnetLaplace(two_sites)
    with pytest.warns(TuningWarning, match="'x', as its noise is joint"):
        guide.evidence_step([data()])
    assert guide.noise_factor == 1.0
    assert guide.prior_factor != 1.0


def test_noise_beside_data_of_another_kind_is_left_and_named() -> None:
    """One factor is for the noise of all data."""

    def model(x: Tensor, y: Tensor, count: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)
            pyro.sample("count", dist.Poisson((x @ w).exp()), obs=count)

    x = draw(1, 20, 3)
    guide = AutoSubnetLaplace(model)
    data = [(x, draw(2, 20), torch.ones(20).double())]
    message = "left as they are: 'y', as not all data have normal noise to learn"
    with pytest.warns(TuningWarning, match=message):
        guide.train_by_evidence(data, num_epochs=2)
    assert guide.noise_factor == 1.0
    with pytest.raises(OptionError, match="all of whose data have normal noise"):
        guide.train_by_evidence(data, num_epochs=2, val=data[0])


def test_a_model_with_nothing_to_learn_is_refused() -> None:
    x, y = data()
    guide = AutoSubnetLaplace(hierarchy)
    with pytest.raises(ModelError, match="'scale': its prior is not normal; 'w': its"):
        guide.train_by_evidence([(x, (y > 0).double())], num_epochs=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_epochs": 0}, "`num_epochs` must be a whole number of at least 1; got 0"),
        ({"num_epochs": 4, "burn_in": 4}, "`burn_in` must be below num_epochs=4"),
        ({"num_epochs": 4, "lr": -1.0}, "`lr` must be positive; got -1.0"),
        ({"num_epochs": 4, "every": 0}, "`every` must be a whole number"),
    ],
)
def test_options_are_checked_before_any_work(
    options: dict[str, Any], message: str
) -> None:
    guide = AutoSubnetLaplace(of_bayesianized(network(), 1.0, 1.0), 0.4)
    with pytest.raises(OptionError, match=message):
        guide.train_by_evidence([data()], **options)


def test_held_out_data_of_classes_set_nothing() -> None:
    problem = Classes()
    guide = AutoSubnetLaplace(problem.model, 0.4)
    with pytest.raises(OptionError, match="all of whose data have normal noise"):
        guide.train_by_evidence(
            [(problem.x, problem.y)], num_epochs=4, val=(problem.x, problem.y)
        )


def test_held_out_data_are_read_before_training() -> None:
    guide = AutoSubnetLaplace(of_bayesianized(network(), 1.0, 1.0), 0.4)
    guide(*data())
    start = guide.loc.detach().clone()
    x, y = held_out()
    with pytest.raises(DataError, match="shape"):
        guide.train_by_evidence([data()], num_epochs=4, val=(x[:, :1], y))
    assert not guide.evidence_history
    assert torch.equal(guide.loc, start)


def test_training_inside_inference_mode() -> None:
    guide = AutoSubnetLaplace(of_bayesianized(network(), 1.0, 1.0), 0.4)
    guide(*data())
    start = guide.loc.detach().clone()
    with torch.inference_mode():
        guide.train_by_evidence([data()], num_epochs=6, burn_in=2, every=2)
    assert not torch.equal(guide.loc, start)


def test_a_loss_that_runs_away_is_an_error() -> None:
    guide = AutoSubnetLaplace(of_bayesianized(network(torch.float32), 1.0, 1.0), 0.4)
    with pytest.raises(NonFiniteError, match="Lower lr=1e\\+30"):
        guide.train_by_evidence([data(torch.float32)], num_epochs=9, lr=1e30, burn_in=8)


@pytest.mark.parametrize("way", WAYS)
def test_noise_follows_the_residuals_in_the_burn_in(way: str) -> None:
    """In the epochs before the first look, up to the step that each epoch makes."""
    model = WAYS[way](network(), 1.0, 1.0)
    guide = AutoSubnetLaplace(model, 0.4)
    noises = []

    class Seen:
        def __iter__(self) -> Iterator[Any]:
            noises.append(guide.factors.noise * NOISE)
            x, y = data()
            if guide.prototype_trace is not None:
                posterior = poutine.condition(model, guide.median())
                mean = poutine.trace(posterior).get_trace(x).nodes["y"]["fn"].mean
                residuals.append(float((mean - y).square().mean().sqrt()))
            return iter([(x, y)])

    residuals: list[float] = []
    guide.train_by_evidence(Seen(), num_epochs=12, lr=1e-4, burn_in=8, every=8)
    # Set up, counted and looked at five times; from the second epoch on the noise is
    # that of the epoch before. The first of all knows no weights.
    assert noises[6:13] == pytest.approx(residuals[5:12], rel=1e-2)


@pytest.mark.parametrize("label", [3, -1])
def test_labels_that_are_no_class_are_refused_by_name(label: int) -> None:
    """As a fit refuses them, also where the first batches are right."""
    x, y = torch.randn(6, 2), torch.arange(6) % 3
    net = nn.Linear(2, 3)
    guide = AutoSubnetLaplace(classifier(net), init_loc_fn=init_to_module(net))
    batches = [(x, y), (x, y.where(y != 1, label))]
    with pytest.raises(DataError, match=rf"got {label} at index \(1,\) of site 'y'"):
        guide.train_by_evidence(batches, num_epochs=2)
