"""Data that nobody gave are an error, and no weight; real latent sites stay."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor, nn
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.exceptions import ModelError, NoObservedSiteWarning
from pyro_subnet.nn import bayesianize, init_to_module
from pyro_subnet.selection import GreedyVariance, LargestVariance, PredictiveVariance
from tests.cases import draw
from tests.tolerances import tolerance

N = 7
X, A = draw(1, N, 3), draw(2, N)
Built = tuple[Callable[..., None], dict[str, Any]]


def weights(x: Tensor) -> Tensor:
    """Means (N, 2) of a linear model."""
    return x @ pyro.sample("w", dist.Normal(torch.zeros(3, 2).to(x), 1.0).to_event(2))


def plain() -> Built:
    """Two tasks in one plate."""

    def model(x: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> None:
        f = weights(x)
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(f[:, 0], 0.5), obs=a)
            pyro.sample("b", dist.Normal(f[:, 1], 0.5), obs=b)

    return model, {}


def by_events() -> Built:
    """Two tasks without a plate."""

    def model(x: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> None:
        f = weights(x)
        pyro.sample("a", dist.Normal(f[:, 0], 0.5).to_event(1), obs=a)
        pyro.sample("b", dist.Normal(f[:, 1], 0.5).to_event(1), obs=b)

    return model, {}


def pretrained() -> Built:
    """Two tasks of a pretrained network, in two plates."""
    net = nn.Linear(3, 2, dtype=torch.float64)
    bnn = bayesianize(net)

    def model(x: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> None:
        f = bnn(x)
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(f[:, 0], 0.5), obs=a)
        with pyro.plate("more_data", len(x)):
            pyro.sample("b", dist.Normal(f[:, 1], 0.5), obs=b)

    return model, {"init_loc_fn": init_to_module(net, fallback=init_to_median)}


BUILT = [plain, by_events, pretrained]


@pytest.mark.parametrize("build", BUILT)
@pytest.mark.parametrize("count", [1, 2, N])
@pytest.mark.parametrize(("given", "missing"), [((), "a"), ((A,), "b")])
def test_no_data(
    build: Callable[[], Built], count: int, given: tuple[Tensor, ...], missing: str
) -> None:
    model, start = build()
    data = [value[:count] for value in given]
    guide = AutoSubnetLaplace(model, **start)
    with pytest.raises(ModelError, match=rf"no data for site '{missing}'.*for.*`b`"):
        guide.laplace_approximation(X[:count], *data)


@pytest.mark.parametrize(
    "subnet", [0.3, 2, LargestVariance(2), GreedyVariance(2), PredictiveVariance(2)]
)
def test_every_choice_of_weights(subnet: Any) -> None:
    model, start = pretrained()
    for given, missing in (((), "a"), ((A,), "b")):
        guide = AutoSubnetLaplace(model, subnet, **start)
        with pytest.raises(ModelError, match=f"no data for site '{missing}'"):
            guide.laplace_approximation(X, *given)
    mapped = AutoSubnetLaplace(model, {"weight": torch.arange(4)}, **start)
    with pytest.raises(ModelError, match="no data for site 'b'"):
        mapped.laplace_approximation_from([(X[:4], A[:4]), (X[4:], A[4:])])


def test_a_start_at_the_network_alone() -> None:
    """The start finds no parameter for such a site, and says what it may be."""
    net = nn.Linear(3, 1, dtype=torch.float64)
    bnn = bayesianize(net)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        mean = bnn(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    for start in (init_to_module(net), init_to_median):
        guide = AutoSubnetLaplace(model, init_loc_fn=start)
        with pytest.raises(ModelError, match=r"(?s)site 'y'.*Pass (its|the) data"):
            guide.laplace_approximation(X)


def test_an_update_without_data() -> None:
    model, start = pretrained()
    posterior = AutoSubnetLaplace(model, **start).laplace_approximation(X, A, A)
    for given, missing in (((), "a"), ((A,), "b")):
        with pytest.raises(ModelError, match=f"site '{missing}' without data"):
            posterior.update(X, *given)


def test_a_mask_that_makes_data_latent() -> None:
    def model(x: Tensor, y: Tensor, seen: Tensor) -> None:
        mean = weights(x)[:, 0]
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y, obs_mask=seen)

    guide = AutoSubnetLaplace(model)
    with pytest.raises(ModelError, match=r"'y_unobserved'.*poutine.mask"):
        guide.laplace_approximation(X, A, A > 0)


def test_latent_sites_that_data_depend_on() -> None:
    """Eight schools: a site in the data's own plate is a latent site like any other."""
    scale = torch.full((N,), 0.7, dtype=torch.float64)

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()).to(y), 2.0))
        with pyro.plate("schools", N):
            theta = pyro.sample("theta", dist.Normal(mu, 0.5))
            pyro.sample("y", dist.Normal(theta, scale), obs=y)

    posterior = AutoSubnetLaplace(model).laplace_approximation(A)
    # The joint precision of (mu, theta) of a linear-Gaussian model.
    wanted = torch.zeros(N + 1, N + 1).double()
    wanted[0, 0] = 0.25 + N / 0.25
    wanted[0, 1:] = wanted[1:, 0] = -1 / 0.25
    wanted[1:, 1:] = torch.eye(N).double() * (1 / 0.25 + 1 / 0.49)
    found = posterior.get_posterior().precision_matrix
    assert_close(found, wanted, **tolerance(torch.float64, "closed_form"))


def test_a_prior_alone_is_no_forgotten_data() -> None:
    """A model that observes nothing, and takes no data, is warned about."""

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("groups", 4):
            pyro.sample("theta", dist.Normal(mu, 1.0))

    with pytest.warns(NoObservedSiteWarning, match="no observed site"):
        posterior = AutoSubnetLaplace(model).laplace_approximation()
    assert posterior.subnet.size == 5


def test_unused_weights_with_a_prior_of_their_own_scale() -> None:
    """Weights that no output reads stand nowhere near the data, and stay weights."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        tau = pyro.sample("tau", dist.Gamma(torch.ones(()).to(x), 1.0))
        pyro.sample("unused", dist.Normal(torch.zeros(5, 2).to(x), tau).to_event(2))
        mean = tau * weights(x)[:, 0]
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guide = AutoSubnetLaplace(model, {"w": torch.arange(6)})
        posterior = guide.laplace_approximation(X, A)
    assert posterior.subnet.num_params == 17
