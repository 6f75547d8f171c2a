"""A bayesianized network in a model: called twice, in a plate, with what it keeps."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from torch import Tensor, nn
from torch.nn.utils import weight_norm
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.exceptions import ModelError
from pyro_subnet.nn import bayesianize, init_to_module
from tests.networks import called, fitted, model_of, precision
from tests.reference import dense_jacobian
from tests.tolerances import tolerance


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def difference(net: Callable[..., Tensor], x: Tensor) -> Tensor:
    """Of rewards, say: the network is called twice."""
    return (net(x) - net(x.square())).squeeze(-1)


@pytest.mark.parametrize("in_plate", [False, True])
@pytest.mark.parametrize("body", [called, difference])
def test_calls_of_a_network_share_its_weights(
    body: Any, in_plate: bool, dtype: torch.dtype
) -> None:
    net, x = mlp().to(dtype), torch.randn(6, 3, dtype=dtype)
    posterior = fitted(net, x, body, in_plate=in_plate)
    found = posterior.get_posterior().precision_matrix
    assert_close(found.double(), precision(net, x, body), **tolerance(dtype))
    for program in (posterior.user_model, posterior.linearized_model):
        draws = Predictive(program, guide=posterior, num_samples=2)(x)
        assert draws["y"].shape == (2, 6)
        assert draws["0.weight"].numel() == 2 * 4 * 3


def test_a_hybrid_models_density_counts_a_site_once() -> None:
    net, x = mlp().double(), torch.randn(6, 3).double()
    posterior = fitted(net, x, difference)
    theta, y = posterior.get_posterior().loc + 0.1, torch.zeros(6).double()
    hybrid = pyro.condition(posterior.hybrid_model(), {"subnet": theta})
    found = poutine.trace(hybrid).get_trace(x, y).log_prob_sum()
    weights = posterior.latents.layout.unpack(theta)
    model = pyro.condition(posterior.user_model, weights)
    assert_close(found, poutine.trace(model).get_trace(x, y).log_prob_sum())


def test_svi_and_nuts_call_a_network_twice_in_a_plate() -> None:
    net, x = mlp(), torch.randn(6, 3)
    model = model_of(bayesianize(net), difference, in_plate=True)
    guide = AutoSubnetLaplace(model, init_loc_fn=init_to_module(net))
    for particles in (1, 3):
        elbo = Trace_ELBO(num_particles=particles)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
        assert svi.step(x, x[:, 0]) > 0
    mcmc = MCMC(NUTS(model, max_tree_depth=2), 2, warmup_steps=1, disable_progbar=True)
    mcmc.run(x, x[:, 0])
    assert mcmc.get_samples()["0.weight"].shape == (2, 4, 3)


def test_a_subsampling_plate_scales_no_prior() -> None:
    net, x = mlp().double(), torch.randn(6, 3).double()
    bnn = bayesianize(net)

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", 60, subsample_size=6, subsample=torch.arange(6)):
            pyro.sample("y", dist.Normal(bnn(x).squeeze(-1), 0.5), obs=y)

    nodes = poutine.trace(model).get_trace(x, x[:, 0]).nodes
    assert nodes["0.weight"]["scale"] == 1.0
    assert nodes["0.weight"]["value"].shape == (4, 3)
    assert nodes["y"]["scale"] == 10.0


def test_two_networks_with_the_same_names_are_no_one_network() -> None:
    first, second = bayesianize(mlp()), bayesianize(mlp())

    def model(x: Tensor) -> Tensor:
        return first(x) + second(x)

    with pytest.raises(ModelError, match=r"different names; got site '0.weight' twice"):
        poutine.trace(model).get_trace(torch.randn(2, 3))


def test_each_run_draws_anew() -> None:
    model = model_of(bayesianize(mlp()), difference)
    x = torch.randn(6, 3)
    one, other = (poutine.trace(model).get_trace(x) for _ in range(2))
    assert not torch.equal(one.nodes["0.bias"]["value"], other.nodes["0.bias"]["value"])


class Keeping(nn.Module):
    """Keeps what it computed, for a look at it later."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.features = torch.tanh(self.body(x))
        self.maps = {"all": [self.features, self.features]}
        return self.head(self.features)


def test_a_network_that_keeps_its_activations(dtype: torch.dtype) -> None:
    net, x = Keeping().to(dtype), torch.randn(6, 3, dtype=dtype)
    net(x)
    kept = net.features
    found = fitted(net, x).get_posterior().precision_matrix
    assert net.features is kept
    assert net.features.grad_fn is not None
    assert_close(found.double(), precision(of_weights(net), x), **tolerance(dtype))


def of_weights(net: nn.Module) -> nn.Module:
    plain = Keeping().to(next(net.parameters()).dtype)
    plain.load_state_dict(net.state_dict())
    return plain


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_weights_that_a_hook_computes() -> None:
    x = torch.randn(6, 3).double()
    net = nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1))
    net.double()(x)  # leaves the weight with its graph
    model = model_of(bayesianize(net), called)
    guide = AutoSubnetLaplace(model, init_loc_fn=init_to_module(net))
    posterior = guide.laplace_approximation(x, x[:, 0])

    def outputs(packed: Tensor) -> Tensor:
        at = posterior.latents.layout.unpack(packed)
        g, v = at["0.weight_g"], at["0.weight_v"]
        weight = g * v / v.norm(dim=1, keepdim=True)
        hidden = torch.tanh(x @ weight.T + at["0.bias"])
        return (hidden @ at["2.weight"].T + at["2.bias"]).squeeze(-1)

    jac = dense_jacobian(outputs, posterior.latents.loc)
    expected = 4 * jac.T @ jac + torch.eye(jac.shape[-1]).double()
    found = posterior.get_posterior().precision_matrix
    assert_close(found, expected, **tolerance(torch.float64))


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_scripted_weights_are_refused_and_frozen_ones_are_not() -> None:
    scripted = torch.jit.script(nn.Linear(3, 4))
    net = nn.Sequential(scripted, nn.Tanh(), nn.Linear(4, 1))
    with pytest.raises(ModelError, match=r"TorchScript module '0'. Pass the network"):
        bayesianize(net)
    with pytest.raises(ModelError, match=r"must be of Python"):
        bayesianize(torch.jit.trace(mlp(), torch.randn(2, 3)))
    for parameter in scripted.parameters():
        parameter.requires_grad_(False)
    x = torch.randn(6, 3)
    model = model_of(bayesianize(net.eval()), called)
    guide = AutoSubnetLaplace(model, init_loc_fn=init_to_module(net))
    found = guide.laplace_approximation(x, x[:, 0]).get_posterior().precision_matrix
    hidden = torch.cat([torch.tanh(scripted(x)), torch.ones(6, 1)], -1).double()
    expected = 4 * hidden.T @ hidden + torch.eye(5).double()
    assert_close(found.double(), expected, **tolerance(torch.float32))


def test_an_attribute_without_a_copy_is_named() -> None:
    net = mlp()
    net[0].lock = threading.Lock()
    with pytest.raises(ModelError, match=r"deep copy; got none of attribute '0.lock'"):
        bayesianize(net)
    assert copy.copy(net)[0].lock is net[0].lock
