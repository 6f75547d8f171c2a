"""Models of a network in one line, against the model that a user would write."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, Predictive
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.exceptions import DataError, ModelError, OptionError
from pyro_subnet.nn import bayesianize, classifier, regressor
from tests.tolerances import tolerance

X = torch.randn(11, 3, generator=torch.Generator().manual_seed(0))
# Of each kind of noise, what is passed.
NOISES: dict[str, Any] = {"fixed": 0.3, "latent": dist.HalfNormal(1.0), "head": "head"}


def network(dtype: torch.dtype, num_outputs: int = 1) -> nn.Module:
    """A network with a part that is random in training mode."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, num_outputs)
    )
    return net.to(dtype)


def flat(f: Tensor) -> Tensor:
    return f.squeeze(-1) if f.shape[-1] == 1 else f


def written_out(net: nn.Module, likelihood: Callable[[Tensor], Any]) -> Any:
    """The model as a user would write it."""
    bnn = bayesianize(net).eval()

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        f = bnn(x)
        fn = likelihood(f)
        with pyro.plate("data", len(x)):
            pyro.sample("y", fn, obs=y)
        return f

    return model


def precision_of(model: Any, x: Tensor, y: Tensor, subnet: Any = 1.0) -> Tensor:
    posterior = AutoSubnetLaplace(model, subnet).laplace_approximation(x, y)
    return posterior.get_posterior().precision_matrix


@pytest.mark.parametrize("num_outputs", [1, 3])
def test_classes_are_those_of_the_outputs(dtype: torch.dtype, num_outputs: int) -> None:
    net, x = network(dtype, num_outputs), X.to(dtype)
    y = torch.arange(len(x)) % max(2, num_outputs)

    def likelihood(f: Tensor) -> Any:
        if num_outputs == 1:
            return dist.Bernoulli(logits=f.squeeze(-1))
        return dist.Categorical(logits=f)

    as_observed = y.to(dtype) if num_outputs == 1 else y
    expected = precision_of(written_out(net, likelihood), x, as_observed)
    for labels in (y, y.unsqueeze(1), y.int()):
        found = precision_of(classifier(net), x, labels)
        assert_close(found, expected, **tolerance(dtype, "reordered"))


@pytest.mark.parametrize("num_outputs", [1, 2])
@pytest.mark.parametrize("kind", list(NOISES))
def test_noise_is_fixed_latent_or_of_a_head(
    dtype: torch.dtype, kind: str, num_outputs: int
) -> None:
    x = X.to(dtype)
    net = network(dtype, 2 * num_outputs if kind == "head" else num_outputs)
    y = x[:, :num_outputs].cos()

    def likelihood(f: Tensor) -> Any:
        scale: Any = 0.3
        if kind == "latent":
            scale = pyro.sample("noise", dist.HalfNormal(torch.ones((), dtype=dtype)))
        if kind == "head":
            f, scale = f[:, :num_outputs], f[:, num_outputs:].exp()
            scale = flat(scale)
        fn = dist.Normal(flat(f), scale)
        return fn.to_event(1) if num_outputs > 1 else fn

    noise = NOISES[kind]
    if kind == "latent":
        noise = dist.HalfNormal(torch.ones((), dtype=dtype))
    residuals = y - net.eval()(x).detach()[:, :num_outputs]
    init = {name: p.detach() for name, p in net.named_parameters()}
    start = init_to_value(values={**init, "noise": residuals.square().mean().sqrt()})
    plain = written_out(net, likelihood)
    guide = AutoSubnetLaplace(plain, 1.0, init_loc_fn=start)
    posterior = guide.laplace_approximation(x, flat(y))
    expected = posterior.get_posterior().precision_matrix
    model = regressor(net, noise=noise)
    for observed in (y, flat(y)):
        found = precision_of(model, x, observed)
        assert_close(found, expected, **tolerance(dtype, "reordered"))


def test_each_output_may_have_noise_of_its_own(dtype: torch.dtype) -> None:
    net, x = network(dtype, 2), X.to(dtype)
    y = x[:, :2]
    scale = torch.tensor([0.1, 0.7], dtype=dtype)
    model = written_out(net, lambda f: dist.Normal(f, scale).to_event(1))
    found = precision_of(regressor(net, noise=scale), x, y)
    expected = precision_of(model, x, y)
    assert_close(found, expected, **tolerance(dtype, "reordered"))
    with pytest.raises(ModelError, match="one for each output"):
        precision_of(regressor(network(dtype, 1), noise=scale), x, y[:, 0])


def test_outputs_with_learned_noise_of_their_own_start_at_their_residuals() -> None:
    net = network(torch.float64, 2)
    x = X.double()
    prior = dist.HalfNormal(torch.ones(2).double())
    guide = AutoSubnetLaplace(regressor(net, noise=prior), 5)
    guide.laplace_approximation(x, x[:, :2])
    residuals = x[:, :2] - net.eval()(x)
    assert_close(guide.median()["noise"], residuals.square().mean(0).sqrt().detach())


def test_two_lines_for_a_trained_network(dtype: torch.dtype) -> None:
    """The whole program; the posterior is at the network's weights."""
    net, x = network(dtype, 3), X.to(dtype)
    before = deepcopy(net.state_dict())
    loader = DataLoader(TensorDataset(x, torch.arange(len(x)) % 3), batch_size=4)
    guide = AutoSubnetLaplace(classifier(net), 0.4)
    posterior = guide.laplace_approximation_from(loader)
    predictive = posterior.predictive_distribution(x)
    assert predictive.probs.shape == (11, 3)
    f = posterior.output_distribution(x).loc
    expected = net.eval()(x).log_softmax(-1)
    assert_close(f, expected.detach(), **tolerance(dtype, "reordered"))
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_network_keeps_its_mode_and_gradients() -> None:
    net = network(torch.float32).train()
    regressor(net, noise=0.1)(X, torch.zeros(11))
    assert all(module.training for module in net.modules())
    assert all(p.requires_grad for p in net.parameters())


class TwoInputs(nn.Module):
    """Needs two inputs, and takes a third."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, z: Tensor, scale: float = 1.0) -> Tensor:
        return self.layer(x * z) * scale


def test_observations_come_after_the_inputs_or_by_name() -> None:
    torch.manual_seed(0)
    model = classifier(TwoInputs())
    z, y = X.cos(), torch.arange(11) % 2
    calls = [
        ((X, z, y), {}),
        ((X, z), {"y": y}),
        ((X,), {"z": z, "labels": y}),
        ((), {"x": X, "z": z, "labels": y}),
        ((X, z, y), {"scale": 1.0}),
        ((X, z, None), {"y": y}),
    ]
    found = [precision_by(model, args, kwargs) for args, kwargs in calls]
    for other in found[1:]:
        assert_close(other, found[0])
    with pytest.raises(DataError, match="given once; got 2"):
        model(X, z, y, labels=y)


def precision_by(model: Any, args: Any, kwargs: Any) -> Tensor:
    posterior = AutoSubnetLaplace(model, 1.0).laplace_approximation(*args, **kwargs)
    return posterior.get_posterior().precision_matrix


def test_batches_of_a_tokenizer_with_labels() -> None:
    """Mappings with ``labels``, as the loaders of Hugging Face give them."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=3,
    )
    net = BertForSequenceClassification(config)
    ids = torch.randint(0, 20, (6, 5))
    batches = [
        {
            "input_ids": ids[at],
            "attention_mask": torch.ones_like(ids[at]),
            "labels": torch.tensor(labels),
        }
        for at, labels in ((slice(0, 4), [0, 1, 2, 0]), (slice(4, 6), [1, 2]))
    ]
    guide = AutoSubnetLaplace(classifier(net), 20)
    posterior = guide.laplace_approximation_from(batches)
    inputs = {name: v for name, v in batches[0].items() if name != "labels"}
    expected = net.eval()(**inputs).logits.softmax(-1).detach()
    probs = posterior.predictive_distribution(**inputs, link="mc").probs
    assert probs.shape == (4, 3)
    at_map = posterior.output_distribution(**inputs).loc.exp()
    assert_close(at_map, expected, **tolerance(torch.float32, "reordered"))


def test_draws_mcmc_and_pickles() -> None:
    model = regressor(network(torch.float32), noise=0.4)
    x, y = X, X[:, 0]
    posterior = AutoSubnetLaplace(model, 5).laplace_approximation(x, y)
    drawn = Predictive(posterior.linearized_model, guide=posterior, num_samples=3)(x)
    assert drawn["y"].shape == (3, 11)
    hybrid = posterior.hybrid_model()
    mcmc = MCMC(hybrid.nuts(), 4, warmup_steps=2, disable_progbar=True)
    mcmc.run(x, y)
    assert mcmc.get_samples()["subnet"].shape == (4, 5)
    buffer = io.BytesIO()
    pickle.dump(model, buffer)
    buffer.seek(0)
    again = pickle.load(buffer)
    found = precision_of(again, x, y, 5)
    assert_close(found, precision_of(model, x, y, 5))


def test_training_learns_the_noise_of_a_fresh_network() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(-1, 1, 80).unsqueeze(1)
    y = x.squeeze(1) + 0.1 * torch.randn(80, generator=generator)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    guide = AutoSubnetLaplace(regressor(net, noise=1.0), 0.5)
    guide.train_by_evidence([(x, y)], num_epochs=200, lr=0.03)
    assert 0.05 < guide.noise_factor < 0.2


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (0.0, "positive and finite"),
        (float("nan"), "positive and finite"),
        (torch.ones(2, 2), "one for each output"),
        ("learned", "'head'; got 'learned'"),
        (dist.Normal(0.0, 1.0), "of positive numbers"),
    ],
)
def test_noise_that_is_none(noise: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        regressor(network(torch.float32), noise=noise)


@pytest.mark.parametrize(
    ("model", "y", "error", "message"),
    [
        (classifier(network(torch.float32, 3)), X, DataError, "must have shape"),
        (
            classifier(network(torch.float32, 3)),
            torch.zeros(11),
            DataError,
            "class numbers",
        ),
        (
            regressor(network(torch.float32), noise=1.0),
            X[:5, 0],
            DataError,
            r"shape \(11,\)",
        ),
        (
            regressor(network(torch.float32, 3), noise="head"),
            X[:, 0],
            ModelError,
            "in pairs",
        ),
        (
            regressor(
                nn.Sequential(nn.Linear(3, 2), nn.Unflatten(1, (2, 1))), noise=1.0
            ),
            X[:, :2],
            ModelError,
            r"shape \(N,\) or \(N, E\)",
        ),
        (
            classifier(nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (2, 2)))),
            torch.zeros(11).long(),
            ModelError,
            "pixels or tokens",
        ),
    ],
)
def test_what_does_not_fit(model: Any, y: Tensor, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        AutoSubnetLaplace(model, 3).laplace_approximation(X, y)


def test_a_network_that_returns_no_tensor() -> None:
    with pytest.raises(ModelError, match=r"as `logits`; got tuple"):
        classifier(nn.LSTM(3, 2))(X.unsqueeze(1))


def test_weights_given_to_the_guide_come_first() -> None:
    """Other starting points than the network's own."""
    net = network(torch.float64)
    values = {name: p.detach() + 1.0 for name, p in net.named_parameters()}
    guide = AutoSubnetLaplace(
        regressor(net, noise=1.0), 3, init_loc_fn=init_to_value(values=values)
    )
    posterior = guide.laplace_approximation(X.double(), X[:, 0].double())
    expected = torch.cat([value.flatten() for value in values.values()])
    assert_close(posterior.at_map.latents.loc, expected)
