"""Noise and prior in one call, against the two steps by hand and against dense sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.initialization import init_to_value
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.exceptions import DataError, OptionError
from pyro_subnet.files.checkpoint import KIND
from pyro_subnet.files.safe_file import read_file, write_file
from pyro_subnet.nn import bayesianize, init_to_module
from tests.cases import draw

NUM_DATA, NUM_HELD_OUT, NOISE = 20, 15, 0.1


class Network(PyroModule):
    """The README's network, whose noise is a latent site."""

    def __init__(self, like: Tensor):
        super().__init__()
        self.hidden = PyroModule[nn.Linear](1, 50)
        self.out = PyroModule[nn.Linear](50, 1)
        for layer in (self.hidden, self.out):
            for name, value in list(layer.named_parameters()):
                prior = dist.Normal(like.new_zeros(value.shape), 1.0)
                setattr(layer, name, PyroSample(prior.to_event(value.ndim)))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = self.out(torch.tanh(self.hidden(x))).squeeze(-1)
        noise = pyro.sample("noise", dist.HalfNormal(x.new_ones(())))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, noise), obs=y)


def of_pyro_module(net: nn.Sequential, like: Tensor) -> tuple[Any, Any]:
    weights = dict(zip(("hidden", "out"), (net[0], net[2]), strict=True))
    values = {
        f"{layer}.{name}": value.detach()
        for layer, module in weights.items()
        for name, value in module.named_parameters()
    }
    values["noise"] = like.new_tensor(NOISE)
    return Network(like), init_to_value(values=values)


def of_bayesianized(net: nn.Sequential, like: Tensor) -> tuple[Any, Any]:
    bnn = bayesianize(net)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        mean = bnn(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, NOISE), obs=y)

    return model, init_to_module(net)


def of_samples(net: nn.Sequential, like: Tensor) -> tuple[Any, Any]:
    values = {name: value.detach() for name, value in net.named_parameters()}

    def model(x: Tensor, y: Tensor | None = None) -> None:
        drawn = {
            name: pyro.sample(
                name,
                dist.Normal(torch.zeros_like(value), 1.0).to_event(value.ndim),
            )
            for name, value in values.items()
        }
        mean = torch.func.functional_call(net, drawn, x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, NOISE), obs=y)

    return model, init_to_value(values=values)


WAYS: dict[str, Callable[[nn.Sequential, Tensor], tuple[Any, Any]]] = {
    "PyroModule": of_pyro_module,
    "bayesianized": of_bayesianized,
    "samples": of_samples,
}


@dataclass
class Regression:
    """A network whose noise is too small for what it does between its data."""

    posterior: AutoSubnetMultivariateNormal
    net: nn.Sequential
    data: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, way: str, dtype: torch.dtype, subnet: Any = 0.05) -> Regression:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 1))
        x, x_val = draw(1, NUM_DATA, 1), draw(2, NUM_HELD_OUT, 1)
        net.double()
        with torch.no_grad():
            y = net(x).squeeze(-1) + NOISE * draw(3, NUM_DATA)
            y_val = net(x_val).squeeze(-1) + 5 * NOISE * draw(4, NUM_HELD_OUT)
        x, y, x_val, y_val = (each.to(dtype) for each in (x, y, x_val, y_val))
        model, start = WAYS[way](net.to(dtype), x)
        guide = AutoSubnetLaplace(model, subnet, init_loc_fn=start)
        return cls(guide.laplace_approximation(x, y), net, (x, y), (x_val, y_val))

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs, (N,), and their Jacobian over the subnet, (N, S), in float64."""
        net = self.net.double()
        values = {name: value.detach() for name, value in net.named_parameters()}
        of_values = torch.func.jacrev(
            lambda v: torch.func.functional_call(net, v, x.double()).squeeze(-1)
        )
        jacobian = torch.cat([j.flatten(1) for j in of_values(values).values()], 1)
        return net(x.double()).squeeze(-1).detach(), jacobian[
            :, self.posterior.subnet.flat
        ]

    def held_out_nll(self, noise_factor: Tensor, prior_factor: float = 1.0) -> Tensor:
        _, jac = self.rows(self.data[0])
        mean, jac_val = self.rows(self.val[0])
        noise = noise_factor * NOISE
        precision = jac.mT @ jac / noise**2 + prior_factor * torch.eye(jac.shape[1])
        covariance = jac_val @ torch.linalg.solve(precision, jac_val.mT)
        stddev = (covariance.diagonal() + noise**2).sqrt()
        return -dist.Normal(mean, stddev).log_prob(self.val[1].double()).mean()

    def log_evidence(self, prior_factor: Tensor, noise_factor: float) -> Tensor:
        """Up to a constant of the prior's factor."""
        _, jac = self.rows(self.data[0])
        weights = torch.cat([p.detach().flatten() for p in self.net.parameters()])
        weights = weights[self.posterior.subnet.flat]
        precision = jac.mT @ jac / (noise_factor * NOISE) ** 2
        precision = precision + prior_factor * torch.eye(len(weights))
        energy = prior_factor * weights.square().sum()
        return 0.5 * (len(weights) * prior_factor.log() - energy - precision.logdet())


def by_hand(posterior: AutoSubnetMultivariateNormal, val: Any) -> Any:
    return posterior.tune_noise_scale("nll", val=val).tune_prior_precision()


def factors(posterior: AutoSubnetMultivariateNormal) -> tuple[Any, float]:
    return posterior.prior_factor, posterior.noise_factor


@pytest.mark.parametrize("way", WAYS)
def test_it_is_the_noise_by_held_out_data_and_then_the_prior_by_evidence(
    way: str, dtype: torch.dtype
) -> None:
    case = Regression.of(way, dtype)
    tuned = case.posterior.tune(val=case.val)
    assert factors(tuned) == factors(by_hand(case.posterior, case.val))
    prior, noise = factors(tuned)
    assert 2 < noise < 20
    assert prior != 1.0
    # Each is the best of its kind by dense sums: no step of a percent is better.
    steps = torch.tensor([0.99, 1.0, 1.01], dtype=torch.float64)
    held_out = [float(case.held_out_nll(noise * step)) for step in steps]
    assert held_out[1] < min(held_out[0], held_out[2])
    evidence = [float(case.log_evidence(prior * step, noise)) for step in steps]
    assert evidence[1] > max(evidence[0], evidence[2])


def test_without_held_out_data_the_prior_alone_is_tuned() -> None:
    posterior = Regression.of("bayesianized", torch.float64).posterior
    tuned = posterior.tune()
    assert factors(tuned) == factors(posterior.tune_prior_precision())
    assert tuned.noise_factor == 1.0
    assert list(tuned.tunings) == ["prior"]


@pytest.mark.parametrize("kind", ["loader", "list", "mapping"])
def test_held_out_data_come_as_a_call_or_in_batches(kind: str) -> None:
    case = Regression.of("bayesianized", torch.float64)
    x, y = case.val
    val: Any = {
        "loader": DataLoader(TensorDataset(x, y), batch_size=4),
        "list": [(x[:1], y[:1]), (x[1:], y[1:])],
        "mapping": {"x": x, "y": y},
    }[kind]
    found, expected = case.posterior.tune(val=val), case.posterior.tune(val=case.val)
    assert factors(found) == pytest.approx(factors(expected), rel=1e-4)


def several(noises: tuple[float, ...]) -> Any:
    def model(x: Tensor, *ys: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            for at, noise in enumerate(noises):
                mean = (1 + at) * (x @ w)
                y = ys[at] if ys else None
                pyro.sample(f"y{at}", dist.Normal(mean, noise), obs=y)

    return model


def test_the_noise_of_several_sites_is_set_together(dtype: torch.dtype) -> None:
    noises = (0.1, 0.3)
    at = torch.tensor([1.0, -0.5], dtype=dtype)
    x, x_val = draw(5, 12, 2).to(dtype), draw(6, 9, 2).to(dtype)
    ys, ys_val = (
        [
            (1 + k) * (each @ at) + scale * noise * draw(7 + k, len(each)).to(dtype)
            for k, noise in enumerate(noises)
        ]
        for each, scale in ((x, 1), (x_val, 4))
    )
    guide = AutoSubnetLaplace(several(noises), init_loc_fn=lambda site: at)
    posterior = guide.laplace_approximation(x, *ys)
    tuned = posterior.tune(val=(x_val, *ys_val))

    def held_out_nll(factor: float) -> float:
        """Of all data of both sites, each by its own density."""
        double, inputs = x.double(), x_val.double()
        curvature = sum(((1 + k) / (factor * s)) ** 2 for k, s in enumerate(noises))
        precision = curvature * double.mT @ double + torch.eye(2)
        variance = (inputs @ precision.inverse() * inputs).sum(1)
        total = 0.0
        for k, (s, y) in enumerate(zip(noises, ys_val, strict=True)):
            stddev = ((1 + k) ** 2 * variance + (factor * s) ** 2).sqrt()
            mean = (1 + k) * (inputs @ at.double())
            total -= float(dist.Normal(mean, stddev).log_prob(y.double()).sum())
        return total / (2 * len(x_val))

    record = tuned.tunings["noise"]
    expected = torch.tensor([held_out_nll(float(r)) for r in record.scales])
    assert_close(record.objective, expected.double(), rtol=1e-4, atol=1e-4)
    grid = [held_out_nll(tuned.noise_factor * step) for step in (0.99, 1.0, 1.01)]
    assert grid[1] < min(grid[0], grid[2])
    with pytest.raises(DataError, match="must hold observations; got none at site"):
        posterior.tune(val=(x_val,))


def classes(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=(y > 0).to(x))


def heteroscedastic(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w[:1], (x @ w[1:]).exp()), obs=y)


def noise_in_the_subnet(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(x.new_ones(())))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, noise), obs=y)


@pytest.mark.parametrize("model", [classes, heteroscedastic, noise_in_the_subnet])
def test_held_out_data_for_a_noise_that_cannot_be_scaled(model: Any) -> None:
    data = draw(1, NUM_DATA, 1), draw(2, NUM_DATA)
    posterior = AutoSubnetLaplace(model).laplace_approximation(*data)
    message = r"`val` must be for a model of normal noise.*Leave `val` out"
    with pytest.raises(OptionError, match=message):
        posterior.tune(val=data)
    assert posterior.tune().tuning.method == "evidence"


# ----------------------------------------------------------------------------------
# What it says of what it did.


def test_both_records_are_kept_and_told() -> None:
    case = Regression.of("bayesianized", torch.float64)
    tuned = case.posterior.tune(val=case.val)
    prior, noise = (f"{factor:.4g}" for factor in factors(tuned))
    assert (
        f"prior precision times {prior} (by evidence), noise times {noise} "
        "(by held-out nll)\n" in repr(tuned)
    )
    assert tuned.tuning is tuned.tunings["prior"]
    assert tuned.tunings["noise"].method == "nll"
    assert tuned.tunings["noise"].best == tuned.noise_factor
    # The last is the last, whichever it is; one by hand leaves the other's alone.
    again = tuned.tune_noise_scale()
    assert list(again.tunings) == ["prior", "noise"]
    assert again.tuning is again.tunings["noise"]
    assert list(again.with_prior_precision(2.0).tunings) == ["noise"]
    assert list(again.with_noise_scale(2.0).tunings) == ["prior"]
    assert again.update(*case.val).tunings == {}
    assert case.posterior.tunings == {}
    assert case.posterior.tuning is None


def saved_and_loaded(case: Regression, posterior: Any, path: Path) -> Any:
    posterior.save(path)
    return AutoSubnetMultivariateNormal.load(path, posterior.user_model, *case.data)


def test_both_records_come_back_from_a_file(tmp_path: Path) -> None:
    case = Regression.of("bayesianized", torch.float64)
    for posterior in (
        case.posterior.tune(val=case.val),
        case.posterior.tune(val=case.val).tune_noise_scale(),
        case.posterior.tune_noise_scale().tune_prior_precision(per_site=True),
    ):
        back = saved_and_loaded(case, posterior, tmp_path / "posterior")
        assert repr(back) == repr(posterior)
        assert list(back.tunings) == list(posterior.tunings)
        for ours, theirs in zip(
            back.tunings.values(), posterior.tunings.values(), strict=True
        ):
            assert_close(ours.scales, theirs.scales, rtol=0.0, atol=0.0)
            assert_close(ours.objective, theirs.objective, rtol=0.0, atol=0.0)
            assert ours.by_site == theirs.by_site
            assert ours.best == theirs.best


def test_files_of_an_earlier_version_load(tmp_path: Path) -> None:
    """They hold the last tuning alone, and do not say of which factor it was."""
    case, path = Regression.of("bayesianized", torch.float64), tmp_path / "posterior"
    base = case.posterior
    for posterior in (
        base,
        base.tune(),
        base.tune_prior_precision(per_site=True),
        base.with_prior_precision(3.0).tune_noise_scale("nll", val=case.val),
        base.tune_prior_precision(bounds=(1.0, 1.0 + 1e-9)),
    ):
        posterior.save(path)
        tensors, content = read_file(path, KIND)
        assert content.pop("tuning_before") is None
        if content["tuning"] is not None:
            del content["tuning"]["of"]
        write_file(path, KIND, tensors, content)
        back = AutoSubnetMultivariateNormal.load(path, base.user_model, *case.data)
        assert repr(back) == repr(posterior)
        assert list(back.tunings) == list(posterior.tunings)
        assert math.isclose(back.noise_factor, posterior.noise_factor)
