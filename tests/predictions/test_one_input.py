"""One input at a time, as in service: the same numbers, by fewer runs of the model."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor, nn
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal, compare_routes
from pyro_subnet.nn import bayesianize
from tests.networks import moved
from tests.reference import dense_jacobian
from tests.tolerances import tolerance

NUM_CLASSES = 3
X = torch.randn(9, 4, generator=torch.Generator().manual_seed(2))


def network(dtype: torch.dtype) -> nn.Module:
    """A small convolution and a layer that is used twice."""
    torch.manual_seed(1)
    shared = nn.Linear(6, 6)
    return nn.Sequential(
        nn.Unflatten(1, (1, 4)),
        nn.Conv1d(1, 2, 2),
        nn.Flatten(),
        nn.Tanh(),
        shared,
        nn.Tanh(),
        shared,
        nn.Linear(6, NUM_CLASSES),
    ).to(dtype)


def posterior_of(
    net: nn.Module, runs: list[int], subnet: float = 1.0
) -> AutoSubnetMultivariateNormal:
    """The posterior of a classifier that writes down how many data each run has."""
    bnn = bayesianize(net)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        runs.append(len(x))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=bnn(x)), obs=y)

    guide = AutoSubnetLaplace(
        model, subnet, init_loc_fn=init_to_value(values=moved(net))
    )
    x = X.to(next(net.parameters()).dtype)
    return guide.laplace_approximation(x, torch.arange(len(x)) % NUM_CLASSES)


def raw_jacobian(net: nn.Module, x: Tensor) -> Tensor:
    """J of the raw logits in float64, (C, D), by dense autograd."""
    values = {name: value.double() for name, value in moved(net).items()}

    def outputs(packed: Tensor) -> Tensor:
        pieces = packed.split([value.numel() for value in values.values()])
        weights = {
            name: piece.view(value.shape)
            for (name, value), piece in zip(values.items(), pieces, strict=True)
        }
        return torch.func.functional_call(net.double(), weights, (x.double(),))[0]

    packed = torch.cat([value.flatten() for value in values.values()])
    return dense_jacobian(outputs, packed)


@pytest.mark.parametrize("row", [0, 8])
def test_one_input_has_the_moments_of_dense_autograd(
    dtype: torch.dtype, row: int
) -> None:
    net = network(dtype)
    posterior = posterior_of(net, [])
    x = X[row : row + 1].to(dtype)
    ours = posterior.output_distribution(x)
    jac = raw_jacobian(net, x)
    # Of classes, outputs are log-probabilities: J of f - logsumexp(f).
    p = ours.loc.exp()[0].double()
    centred = jac - p @ jac
    covariance = posterior.get_posterior().covariance_matrix.double()
    expected = centred @ covariance @ centred.mT
    assert_close(ours.covariance_matrix[0].double(), expected, **tolerance(dtype))
    variance = posterior.output_variance(x)[0].double()
    assert_close(variance, expected.diagonal(), **tolerance(dtype))


@pytest.mark.parametrize("link", ["probit", "bridge-norm", "pairwise"])
@pytest.mark.parametrize("count", [1, 2])
def test_few_inputs_are_predicted_as_among_many(
    dtype: torch.dtype, count: int, link: str
) -> None:
    posterior = posterior_of(network(dtype), [], 0.3)
    x = X.to(dtype)
    many = posterior.predictive_distribution(x, link=link).probs
    few = posterior.predictive_distribution(x[:count], link=link).probs
    assert_close(few, many[:count], **tolerance(dtype, "reordered"))


@pytest.mark.parametrize(
    ("predict", "most"),
    [
        (lambda posterior, x: posterior.output_distribution(x), 2),
        (lambda posterior, x: posterior.output_variance(x), 2),
        (lambda posterior, x: posterior.predictive_distribution(x), 3),
    ],
)
def test_one_input_takes_few_runs(
    predict: Callable[[AutoSubnetMultivariateNormal, Tensor], object], most: int
) -> None:
    runs: list[int] = []
    posterior = posterior_of(network(torch.float32), runs, 0.3)
    runs.clear()
    predict(posterior, X[:1])
    assert 0 < len(runs) <= most


def test_routes_of_one_input_can_be_compared() -> None:
    runs: list[int] = []
    posterior = posterior_of(network(torch.float64), runs, 0.3)
    x = X[:1].double()
    expected = posterior.output_distribution(x).covariance_matrix
    runs.clear()
    with compare_routes():
        found = posterior.output_distribution(x).covariance_matrix
    assert len(runs) > 2
    assert_close(found, expected, **tolerance(torch.float64, "reordered"))
