"""Against laplace-torch 0.3: the same network, subnet, prior precision and data.

Its default backend (curvlinops; for subnets it takes Jacobians by ``torch.func``) gives
right numbers on all networks here, group norm included. It works in float32, and so do
both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from laplace import Laplace
from laplace.curvature import CurvlinopsEF
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal, Subnet
from pyro_subnet.nn import bayesianize, init_to_module
from pyro_subnet.selection import RandomSubnet
from tests.tolerances import tolerance

Model = Callable[..., Any]

PEER = tolerance(torch.float32, "peer")
NUM_TRAIN, NUM_TEST = 30, 7
SUBNET_SIZE = 25
PRIOR_PRECISION = 2.5
NOISE_SCALE = 0.3


def mlp(num_outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, num_outputs))


def cnn(num_outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, num_outputs),
    )


def group_norm_cnn(num_outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, num_outputs),
    )


NETWORKS = {
    "mlp": (mlp, (4,)),
    "cnn": (cnn, (1, 8, 8)),
    "group-norm": (group_norm_cnn, (1, 8, 8)),
}


@dataclass(frozen=True)
class Pair:
    """Both libraries' posteriors of one network, and what it learned from."""

    ours: AutoSubnetMultivariateNormal
    theirs: Any
    train: tuple[Tensor, Tensor]
    test: Tensor


def backwards_model(net: nn.Module, likelihood: str) -> Model:
    """Samples the weights from the last to the first.

    So our packing order (the order of the trace) is not the order of
    ``parameters_to_vector``, and no comparison passes by luck.
    """
    weights = dict(net.named_parameters())
    prior = dist.Normal(0.0, PRIOR_PRECISION**-0.5)

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        sampled = {
            name: pyro.sample(name, prior.expand(w.shape).to_event(w.ndim))
            for name, w in reversed(weights.items())
        }
        outputs = torch.func.functional_call(net, sampled, (x,))
        return observe(outputs, likelihood, y)

    return model


def observe(outputs: Tensor, likelihood: str, y: Tensor | None) -> Tensor:
    with pyro.plate("data", len(outputs)):
        if likelihood == "regression":
            noise = dist.Normal(outputs, NOISE_SCALE).to_event(1)
            return pyro.sample("y", noise, obs=y)
        return pyro.sample("y", dist.Categorical(logits=outputs), obs=y)


def their_positions(net: nn.Module, subnet: Subnet) -> Tensor:
    """Our subnet's positions in the vector that laplace-torch indexes.

    Entry by entry, in the order of our rows and columns: ours counts in the packed
    vector of sites in trace order, theirs in ``parameters_to_vector``.
    """
    starts, start = {}, 0
    for name, parameter in net.named_parameters():
        starts[name] = start
        start += parameter.numel()
    return torch.cat([starts[site] + at for site, at in subnet.indices.items()])


def peer(
    net: nn.Module, likelihood: str, indices: Tensor, loader: DataLoader[Any]
) -> Any:
    """A fitted laplace-torch posterior of a copy of the network.

    A copy, because its fit leaves the model in eval mode, with an attribute more.
    """
    noise = {"sigma_noise": NOISE_SCALE} if likelihood == "regression" else {}
    theirs = Laplace(
        deepcopy(net),
        likelihood,
        subset_of_weights="subnetwork",
        hessian_structure="full",
        subnetwork_indices=indices,
        prior_precision=PRIOR_PRECISION,
        **noise,
    )
    theirs.fit(loader)
    return theirs


def make_pair(network: str, likelihood: str) -> Pair:
    build, shape = NETWORKS[network]
    num_outputs = 2 if likelihood == "regression" else 3
    net = build(num_outputs)
    x = torch.randn(NUM_TRAIN, *shape)
    net(x)  # batch norm takes its statistics
    net.eval()
    y = torch.randint(num_outputs, (NUM_TRAIN,))
    if likelihood == "regression":
        y = torch.randn(NUM_TRAIN, num_outputs)
    guide = AutoSubnetLaplace(
        backwards_model(net, likelihood),
        RandomSubnet(SUBNET_SIZE, seed=1),
        init_loc_fn=init_to_module(net),
    )
    ours = guide.laplace_approximation(x, y)
    indices = their_positions(net, ours.subnet)
    loader = DataLoader(TensorDataset(x, y), batch_size=11)
    theirs = peer(net, likelihood, indices, loader)
    return Pair(ours, theirs, (x, y), torch.randn(NUM_TEST, *shape))


@pytest.fixture(
    params=[(n, k) for n in NETWORKS for k in ("regression", "classification")],
    ids="-".join,
)
def pair(request: pytest.FixtureRequest) -> Pair:
    return make_pair(*request.param)


def normalized(pair: Pair, loc: Tensor, jac: Tensor) -> tuple[Tensor, Tensor]:
    r"""Their outputs as ours, with the Jacobian.

    Theirs are raw logits f, ours log-probabilities :math:`\eta = f - \log\sum e^f`:
    softmax is blind to a constant per row, so only these are determined by the model.
    Linearized, :math:`d\eta = T df` with :math:`T = I - 1 p^\top`, hence
    :math:`\operatorname{Var} \eta = T \operatorname{Var} f\, T^\top`.
    """
    if pair.theirs.likelihood == "regression":
        return loc, jac
    p = loc.softmax(-1)
    transform = torch.eye(p.shape[-1]) - p.unsqueeze(-2)
    return loc.log_softmax(-1), transform @ jac


def test_our_order_differs_from_theirs(pair: Pair) -> None:
    positions = pair.theirs.backend.subnetwork_indices
    assert not torch.equal(positions, pair.ours.subnet.flat)
    assert not torch.equal(positions, positions.sort().values)


def test_map_agrees_through_both_orders(pair: Pair) -> None:
    theirs = parameters_to_vector(pair.theirs.model.parameters())
    positions = pair.theirs.backend.subnetwork_indices
    ours = pair.ours.get_posterior().loc
    assert_close(ours, theirs[positions].detach(), rtol=0.0, atol=0.0)


def test_posterior_precision_agrees(pair: Pair) -> None:
    ours = pair.ours.get_posterior().precision_matrix
    assert ours.dtype == torch.float32
    assert_close(ours, pair.theirs.posterior_precision, **PEER)


def test_posterior_covariance_agrees(pair: Pair) -> None:
    ours = pair.ours.get_posterior().covariance_matrix
    assert_close(ours, pair.theirs.posterior_covariance, **PEER)


def test_glm_predictive_agrees(pair: Pair) -> None:
    jac, f = pair.theirs.backend.jacobians(pair.test)
    loc, jac = normalized(pair, f, jac)
    ours = pair.ours.output_distribution(pair.test)
    assert_close(ours.loc, loc, **PEER)
    expected = pair.theirs.functional_variance(jac)
    assert_close(ours.covariance_matrix, expected, **PEER)


def test_joint_glm_predictive_agrees(pair: Pair) -> None:
    # Called with `joint=True`, theirs ignores it for classes; what it is made of does
    # not.
    jac, f = pair.theirs.backend.jacobians(pair.test)
    loc, jac = normalized(pair, f, jac)
    ours = pair.ours.output_distribution(pair.test, joint=True)
    assert_close(ours.loc, loc.flatten(), **PEER)
    expected = pair.theirs.functional_covariance(jac)
    assert_close(ours.covariance_matrix, expected, **PEER)


@pytest.mark.parametrize("network", NETWORKS)
def test_regression_agrees_with_their_public_predictive(network: str) -> None:
    pair = make_pair(network, "regression")
    f_loc, f_var = pair.theirs(pair.test, pred_type="glm")
    ours = pair.ours.output_distribution(pair.test)
    assert_close(ours.loc, f_loc, **PEER)
    assert_close(ours.covariance_matrix, f_var, **PEER)


@pytest.mark.parametrize("network", NETWORKS)
def test_minibatches_agree(network: str) -> None:
    pair = make_pair(network, "classification")
    loader = DataLoader(TensorDataset(*pair.train), batch_size=8, shuffle=True)
    guide = AutoSubnetLaplace(
        pair.ours.user_model,
        {site: at for site, at in pair.ours.subnet.indices.items()},
        init_loc_fn=init_to_module(pair.theirs.model),
    )
    ours = guide.laplace_approximation_from(loader).get_posterior()
    assert_close(ours.precision_matrix, pair.theirs.posterior_precision, **PEER)


@pytest.mark.parametrize("likelihood", ["regression", "classification"])
@pytest.mark.parametrize("network", NETWORKS)
def test_bayesianized_network_agrees(network: str, likelihood: str) -> None:
    """The two-line route, whose packing order happens to be theirs."""
    pair = make_pair(network, likelihood)
    net = pair.theirs.model
    bnn = bayesianize(net, prior_scale=PRIOR_PRECISION**-0.5)

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        return observe(bnn(x), likelihood, y)

    guide = AutoSubnetLaplace(
        model,
        {site: at for site, at in pair.ours.subnet.indices.items()},
        init_loc_fn=init_to_module(net),
    )
    ours = guide.laplace_approximation(*pair.train)
    indices = their_positions(net, ours.subnet)
    assert_close(indices, ours.subnet.flat)
    loader = DataLoader(TensorDataset(*pair.train), batch_size=NUM_TRAIN)
    theirs = peer(net, likelihood, indices, loader)
    ours_precision = ours.get_posterior().precision_matrix
    assert_close(ours_precision, theirs.posterior_precision, **PEER)


def test_every_weight_agrees_with_their_full_laplace() -> None:
    net = mlp(3).eval()
    x, y = torch.randn(NUM_TRAIN, 4), torch.randint(3, (NUM_TRAIN,))
    guide = AutoSubnetLaplace(
        backwards_model(net, "classification"), init_loc_fn=init_to_module(net)
    )
    ours = guide.laplace_approximation(x, y)
    order = their_positions(net, ours.subnet)
    theirs = Laplace(
        deepcopy(net),
        "classification",
        subset_of_weights="all",
        hessian_structure="full",
        prior_precision=PRIOR_PRECISION,
    )
    theirs.fit(DataLoader(TensorDataset(x, y), batch_size=NUM_TRAIN))
    expected = theirs.posterior_precision[order][:, order]
    assert_close(ours.get_posterior().precision_matrix, expected, **PEER)


def test_group_norm_weights_are_counted() -> None:
    """One of its backends leaves them out, which shifts every later position."""
    pair = make_pair("group-norm", "classification")
    num_params = sum(p.numel() for p in pair.theirs.model.parameters())
    assert pair.ours.subnet.num_params == num_params
    assert {"1.weight", "1.bias"} <= set(pair.ours.subnet.counts)
    guide = AutoSubnetLaplace(
        pair.ours.user_model,
        {"1.weight": torch.arange(4), "1.bias": torch.arange(4)},
        init_loc_fn=init_to_module(pair.theirs.model),
    )
    ours = guide.laplace_approximation(*pair.train)
    indices = their_positions(pair.theirs.model, ours.subnet)
    loader = DataLoader(TensorDataset(*pair.train), batch_size=NUM_TRAIN)
    theirs = peer(pair.theirs.model, "classification", indices, loader)
    ours_precision = ours.get_posterior().precision_matrix
    assert_close(ours_precision, theirs.posterior_precision, **PEER)


def test_the_empirical_fisher_of_classes_agrees() -> None:
    """Theirs leaves out a factor 1 / noise variance in regression."""
    pair = make_pair("mlp", "classification")
    guide = AutoSubnetLaplace(
        pair.ours.user_model,
        init_loc_fn=init_to_module(pair.theirs.model),
        curvature="ef",
    )
    ours = guide.laplace_approximation(*pair.train)
    order = their_positions(pair.theirs.model, ours.subnet)
    theirs = Laplace(
        deepcopy(pair.theirs.model),
        "classification",
        subset_of_weights="all",
        hessian_structure="full",
        prior_precision=PRIOR_PRECISION,
        backend=CurvlinopsEF,
    )
    theirs.fit(DataLoader(TensorDataset(*pair.train), batch_size=NUM_TRAIN))
    expected = theirs.posterior_precision[order][:, order]
    assert_close(ours.get_posterior().precision_matrix, expected, **PEER)
