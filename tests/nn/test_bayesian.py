"""Pretrained ``torch.nn`` networks as Pyro models: layers, priors, names, buffers.

The oracle of a fit is the network itself under autograd's dense Jacobian.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide.initialization import init_to_median, init_to_value
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.exceptions import ModelError, OptionError
from pyro_subnet.nn import bayesianize, init_to_module
from pyro_subnet.selection import RandomSubnet
from tests.tolerances import tolerance

Model = Callable[..., Any]

CLOSED = tolerance(torch.float64, "closed_form")
DENSE = tolerance(torch.float64, "autograd")
EQUAL = {"rtol": 0.0, "atol": 0.0}
NOISE, PRIOR_SCALE, N, C = 0.4, 0.7, 6, 2


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


# ----------------------------------------------------------------------------------
# Networks, each with inputs: N data in, (N, C) out.


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]):
        super().__init__()
        self.cell = kind(3, 4, num_layers=2, batch_first=True)
        self.head = nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.head = nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


class BareParameters(nn.Module):
    """Parameters without a layer, one in a list, one without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ParameterList([torch.randn(4, 3), torch.randn(C, 4)])
        self.shift = nn.Parameter(torch.randn(C))
        self.gain = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = (x @ self.layers[0].mT).tanh()
        return self.gain * hidden @ self.layers[1].mT + self.shift


class Tied(nn.Module):
    """An embedding that is also the output layer, as in language models."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(C, 3)
        self.mix = nn.Linear(3, 3)
        self.out = nn.Linear(3, C, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mix(self.embed(x)).tanh())


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, C))


def batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, stride=2),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, C),
    )


def other_norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 2, groups=2),
        nn.GroupNorm(2, 4),
        nn.SiLU(),
        nn.InstanceNorm2d(4, affine=True),
        nn.Flatten(),
        nn.LayerNorm(36),
        nn.Linear(36, C),
    )


def weight_normed() -> nn.Module:
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
        nn.Tanh(),
        nn.Dropout(0.5),
        nn.Linear(4, C),
    )


def embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(6, C))


def image() -> Tensor:
    return double(N, 2, 4, 4)


def words() -> Tensor:
    return torch.randint(7, (N, 2))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (mlp, lambda: double(N, 3)),
    "batch-norm": (batch_norm, image),
    "other-norms": (other_norms, image),
    "weight-norm": (weight_normed, lambda: double(N, 3)),
    "embedding": (embedding, words),
    "bare-parameters": (BareParameters, lambda: double(N, 3)),
    "tied": (Tied, lambda: torch.randint(C, (N,))),
    "lstm": (lambda: Recurrent(nn.LSTM), lambda: double(N, 3, 3)),
    "gru": (lambda: Recurrent(nn.GRU), lambda: double(N, 3, 3)),
    "attention": (Attention, lambda: double(N, 3, 4)),
    "transformer": (Transformer, lambda: double(N, 3, 4)),
}


def make(name: str) -> tuple[nn.Module, Tensor]:
    """A network in float64 and eval mode, with statistics in its norms, and inputs."""
    build, inputs = NETWORKS[name]
    net, x = build().double(), inputs()
    with torch.no_grad():
        net.train()(x)
        for parameter in net.parameters():  # norms start at 1 and 0: not here
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net.eval(), x


def observing(bnn: Model) -> Model:
    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        f = bnn(x)
        with pyro.plate("data", len(f)):
            pyro.sample("y", dist.Normal(f, NOISE).to_event(1), obs=y)
        return f

    return model


def fit(net: nn.Module, x: Tensor, subnet: Any = None) -> AutoSubnetMultivariateNormal:
    """In two lines, without training."""
    model = observing(bayesianize(net, PRIOR_SCALE))
    guide = AutoSubnetLaplace(model, subnet, init_loc_fn=init_to_module(net))
    return guide.laplace_approximation(x, double(N, C))


def dense_jacobian(net: nn.Module, x: Tensor) -> tuple[list[str], list[Tensor]]:
    """Names and dense Jacobians, (N, C, size), of the trainable parameters."""
    weights = {n: p.detach() for n, p in net.named_parameters() if p.requires_grad}

    def output(*values: Tensor) -> Tensor:
        swapped = dict(zip(weights, values, strict=True))
        return torch.func.functional_call(net, swapped, (x,))

    found = torch.autograd.functional.jacobian(output, tuple(weights.values()))
    return list(weights), [jac.reshape(N, C, -1) for jac in found]


# torch has no batching rule for the backward pass of weight norm, and says so.
UNBATCHED = pytest.mark.filterwarnings(
    "ignore:There is a performance drop because:UserWarning"
)


@pytest.fixture(
    params=[
        pytest.param(name, marks=UNBATCHED) if name == "weight-norm" else name
        for name in NETWORKS
    ]
)
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    return make(request.param)


def test_sites_are_the_parameters(network: tuple[nn.Module, Tensor]) -> None:
    net, x = network
    nodes = poutine.trace(bayesianize(net, PRIOR_SCALE)).get_trace(x)
    parameters = dict(net.named_parameters())
    assert list(nodes.stochastic_nodes) == list(parameters)
    for name, parameter in parameters.items():
        value, fn = nodes.nodes[name]["value"], nodes.nodes[name]["fn"]
        assert value.shape == parameter.shape
        assert value.dtype == parameter.dtype
        assert fn.event_dim == parameter.ndim
        expected = dist.Normal(torch.zeros((), dtype=torch.float64), PRIOR_SCALE)
        assert_close(fn.log_prob(value), expected.log_prob(value).sum(), **CLOSED)


def test_at_the_networks_weights_the_model_is_the_network(
    network: tuple[nn.Module, Tensor],
) -> None:
    net, x = network
    bnn = bayesianize(net, PRIOR_SCALE)
    guide = AutoSubnetLaplace(observing(bnn), init_loc_fn=init_to_module(net))
    guide(x, double(N, C))
    median = guide.median()
    assert median.keys() == dict(net.named_parameters()).keys()
    for name, parameter in net.named_parameters():
        assert_close(median[name], parameter.detach(), **EQUAL)
    with torch.no_grad():
        output = poutine.condition(bnn, data=median)(x)
        assert_close(output, net(x), **CLOSED)


def test_fit_without_training(network: tuple[nn.Module, Tensor]) -> None:
    """Median, outputs and precision, for every weight: P = JᵀJ / σ² + I / s²."""
    net, x = network
    posterior = fit(net, x)
    for name, parameter in net.named_parameters():
        assert_close(posterior.median()[name], parameter.detach(), **EQUAL)
    closed = posterior.output_distribution(x)
    assert_close(closed.loc, net(x).detach(), **CLOSED)

    _, jacobians = dense_jacobian(net, x)
    jac = torch.cat(jacobians, -1)
    flat = jac.flatten(0, 1)
    precision = flat.mT @ flat / NOISE**2
    precision += torch.eye(len(precision), dtype=precision.dtype) / PRIOR_SCALE**2
    found = posterior.get_posterior().precision_matrix
    assert_close(found, precision, **DENSE)
    variance = jac @ torch.linalg.solve(precision, jac.mT)
    assert_close(closed.covariance_matrix, variance, **DENSE)


def test_scattered_subnet(network: tuple[nn.Module, Tensor]) -> None:
    net, x = network
    posterior = fit(net, x, RandomSubnet(9, seed=3))
    _, jacobians = dense_jacobian(net, x)
    flat = torch.cat(jacobians, -1).flatten(0, 1)[:, posterior.subnet.flat]
    precision = flat.mT @ flat / NOISE**2
    precision += torch.eye(9, dtype=precision.dtype) / PRIOR_SCALE**2
    assert_close(posterior.get_posterior().precision_matrix, precision, **DENSE)


@pytest.mark.parametrize("parallel", [False, True])
def test_linearized_predictive(
    network: tuple[nn.Module, Tensor], parallel: bool
) -> None:
    net, x = network
    posterior = fit(net, x, RandomSubnet(9, seed=3))
    names, jacobians = dense_jacobian(net, x)
    result = Predictive(
        posterior.linearized_model,
        guide=posterior,
        num_samples=3,
        parallel=parallel,
        return_sites=(*names, "_RETURN", "y"),
    )(x)
    assert result["y"].shape == (3, N, C)
    weights = dict(net.named_parameters())
    for k in range(3):
        expected = net(x).detach()
        for name, jac in zip(names, jacobians, strict=True):
            step = result[name][k].reshape(-1) - weights[name].detach().flatten()
            expected = expected + jac @ step
        assert_close(result["_RETURN"][k].reshape(N, C), expected, **DENSE)


def test_weight_space_predictive_is_the_network_at_the_draws(
    network: tuple[nn.Module, Tensor],
) -> None:
    net, x = network
    posterior = fit(net, x, RandomSubnet(9, seed=3))
    names = [name for name, _ in net.named_parameters()]
    result = Predictive(
        posterior.user_model,
        guide=posterior,
        num_samples=2,
        return_sites=(*names, "_RETURN"),
    )(x)
    for k in range(2):
        drawn = {
            name: result[name][k].reshape(parameter.shape)
            for name, parameter in net.named_parameters()
        }
        expected = torch.func.functional_call(net, drawn, (x,))
        assert_close(result["_RETURN"][k], expected.detach(), **CLOSED)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("parallel", [False, True])
def test_recurrent_networks_in_single_precision(kind: str, parallel: bool) -> None:
    """There, without gradients, torch runs a fused kernel without forward mode."""
    net, x = make(kind)
    net, x = net.float(), x.float()
    model = observing(bayesianize(net))
    guide = AutoSubnetLaplace(model, RandomSubnet(4), init_loc_fn=init_to_module(net))
    posterior = guide.laplace_approximation(x, torch.randn(N, C))
    predictive = Predictive(
        posterior.linearized_model, guide=posterior, num_samples=2, parallel=parallel
    )
    assert predictive(x)["y"].shape == (2, N, C)
    closed = posterior.output_distribution(x)
    assert_close(closed.loc, net(x).detach(), **tolerance(torch.float32, "autograd"))


def test_a_padding_row_counts_alike_everywhere() -> None:
    """To forward mode it is a weight like others, to reverse mode and to training a
    constant. Whichever is meant, the precision of a subset is the block of the whole,
    and linearized outputs move if, and only if, it has curvature."""
    net = nn.Sequential(
        nn.Embedding(7, 3, padding_idx=0), nn.Flatten(), nn.Linear(6, C)
    )
    net = net.double().eval()
    x = words()
    x[:2, 0], x[2:4, 0] = 0, 1
    whole = fit(net, x).get_posterior().precision_matrix
    few = fit(net, x, {"0.weight": torch.arange(6)})  # the padding row and the next
    found = few.get_posterior().precision_matrix
    assert_close(found, whole[:6, :6], **DENSE)
    values = {name: p.detach().clone() for name, p in net.named_parameters()}
    values["0.weight"][0] += 1.0
    moved = poutine.condition(few.linearized_model, data=values)(x) - net(x)
    has_curvature = float(found[0, 0]) > 1.01 / PRIOR_SCALE**2
    assert (float(moved.detach().abs().max()) > 1e-8) == has_curvature


def test_at_a_draw_a_padding_row_moves_what_its_linearization_says() -> None:
    """The network is linear in its embedding, so at equal draws the model and its
    linearization are equal. A padding row that is drawn from its prior, as if no output
    saw it, while the outputs do see it, would part them."""
    net = nn.Sequential(
        nn.Embedding(7, 3, padding_idx=0), nn.Flatten(), nn.Linear(6, C)
    )
    net = net.double().eval()
    x = words()
    x[:2, 0] = 0
    posterior = fit(net, x, {"0.weight": torch.arange(21)})
    drawn = posterior(x)
    outputs = [
        poutine.condition(model, data=drawn)(x).detach()
        for model in (posterior.user_model, posterior.linearized_model)
    ]
    assert_close(outputs[0], outputs[1], **DENSE)


# ----------------------------------------------------------------------------------
# What is left alone.


def snapshot(net: nn.Module) -> dict[str, Any]:
    """Everything about a network that a careless guest could change."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {
        "state": {n: v.detach().clone() for n, v in net.state_dict().items()},
        "gradients": {n: p.requires_grad for n, p in net.named_parameters()},
        "filled": {n: p.grad is not None for n, p in net.named_parameters()},
        "identity": {n: id(p) for n, p in net.named_parameters()},
        "modes": {n: m.training for n, m in net.named_modules()},
        "classes": {n: type(m) for n, m in net.named_modules()},
        "attributes": {n: sorted(vars(m)) for n, m in net.named_modules()},
        "hooks": {n: [len(vars(m)[h]) for h in hooks] for n, m in net.named_modules()},
    }


def assert_untouched(net: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(net)
    for name, value in before.pop("state").items():
        assert_close(after["state"].pop(name), value, **EQUAL)
    assert after.pop("state") == {}
    assert after == before


def test_the_users_network_is_untouched(network: tuple[nn.Module, Tensor]) -> None:
    net, x = network
    before = snapshot(net)
    posterior = fit(net, x, RandomSubnet(5))
    Predictive(posterior.linearized_model, guide=posterior, num_samples=2)(x)
    Predictive(posterior.user_model, guide=posterior, num_samples=2)(x)
    posterior.output_distribution(x)
    assert_untouched(net, before)


def test_a_copy_is_made() -> None:
    net, x = make("batch-norm")
    bnn = bayesianize(net)
    expected = net(x).detach()
    with torch.no_grad():
        for value in net.state_dict().values():
            value.zero_()
    values = {name: site for name, site in bnn.pretrained_values().items()}
    assert_close(poutine.condition(bnn, data=values)(x), expected, **CLOSED)


def test_modes_are_copied_one_by_one() -> None:
    net, _ = make("batch-norm")
    net[0].train()
    bnn = bayesianize(net)
    assert [m.training for m in bnn.net.modules()] == [
        m.training for m in net.modules()
    ]


@pytest.mark.usefixtures("no_guides_of_other_tests")
def test_nothing_reaches_the_param_store(network: tuple[nn.Module, Tensor]) -> None:
    net, x = network
    model = observing(bayesianize(net))
    poutine.trace(model).get_trace(x)
    model(x)
    assert list(pyro.get_param_store().keys()) == []
    guide = AutoSubnetLaplace(model, RandomSubnet(5), init_loc_fn=init_to_module(net))
    posterior = guide.laplace_approximation(x, double(N, C))
    guide(x)
    Predictive(posterior.linearized_model, guide=posterior, num_samples=2)(x)
    assert list(pyro.get_param_store().keys()) == ["AutoSubnetLaplace.loc"]


def test_there_is_nothing_to_train_but_the_guide() -> None:
    net, x = make("mlp")
    bnn = bayesianize(net)
    assert list(bnn.parameters()) == []
    y = net(x).detach() + 0.5
    model = observing(bnn)
    guide = AutoSubnetLaplace(model, init_loc_fn=init_to_module(net))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step(x, y) for _ in range(20)]
    assert losses[-1] < losses[0]
    assert guide.median()["0.weight"].shape == net[0].weight.shape


# ----------------------------------------------------------------------------------
# Buffers, dtypes, saving.


def test_buffers_are_kept_and_used() -> None:
    net, _ = make("batch-norm")
    bnn = bayesianize(net)
    buffers = dict(bnn.named_buffers())
    for name, value in net.named_buffers():
        assert_close(buffers[f"net.{name}"], value, **EQUAL)
    assert float(net[1].running_mean.abs().sum()) > 0
    assert set(bnn.state_dict()) >= {f"net.{name}" for name in net.state_dict()}


def test_state_dict_restores_another_network() -> None:
    net, x = make("batch-norm")
    other, _ = make("batch-norm")
    target = bayesianize(other)
    target.load_state_dict(bayesianize(net).state_dict())
    values = target.pretrained_values()
    assert_close(values["0.weight"], net[0].weight.detach(), **EQUAL)
    output = poutine.condition(target, data=values)(x)
    assert_close(output, net(x).detach(), **CLOSED)


@pytest.mark.parametrize("kind", ["batch-norm", "mlp", "lstm"])
def test_moving_to_another_dtype_moves_everything(kind: str) -> None:
    """As ``.to`` of any network: what it holds, and what it samples."""
    net, x = make(kind)
    bnn = bayesianize(net).to(torch.float32)
    trace = poutine.trace(bnn).get_trace(x.float())
    dtypes = {trace.nodes[site]["value"].dtype for site in trace.stochastic_nodes}
    assert dtypes == {torch.float32}
    assert trace.nodes["_RETURN"]["value"].dtype == torch.float32
    assert {v.dtype for v in bnn.pretrained_values().values()} == {torch.float32}


def test_fit_in_double_after_the_move() -> None:
    net, x = make("mlp")
    single = copy.deepcopy(net).float()
    moved = bayesianize(single, 0.5).double()
    y = double(N, C)
    guide = AutoSubnetLaplace(observing(moved), init_loc_fn=init_to_module(moved))
    found = guide.laplace_approximation(x, y).get_posterior().precision_matrix
    assert found.dtype == torch.float64
    direct = bayesianize(copy.deepcopy(single).double(), 0.5)
    guide = AutoSubnetLaplace(observing(direct), init_loc_fn=init_to_module(direct))
    expected = guide.laplace_approximation(x, y).get_posterior().precision_matrix
    assert_close(found, expected, **CLOSED)


def test_single_precision_stays_single() -> None:
    net, x = make("batch-norm")
    net, x = net.float(), x.float()
    model = observing(bayesianize(net))
    guide = AutoSubnetLaplace(model, RandomSubnet(6), init_loc_fn=init_to_module(net))
    posterior = guide.laplace_approximation(x, torch.randn(N, C))
    assert {v.dtype for v in posterior.median().values()} == {torch.float32}
    assert posterior.get_posterior().precision_matrix.dtype == torch.float32
    assert posterior.output_distribution(x).covariance_matrix.dtype == torch.float32


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies_sample_the_same(how: str) -> None:
    net, x = make("mlp")
    bnn = bayesianize(net)
    copied = (
        copy.deepcopy(bnn) if how == "deepcopy" else pickle.loads(pickle.dumps(bnn))
    )
    outputs = []
    for module in (bnn, copied, bnn):
        pyro.set_rng_seed(3)
        outputs.append(module(x))
    assert_close(outputs[1], outputs[0], **EQUAL)
    assert_close(outputs[2], outputs[0], **EQUAL)


# ----------------------------------------------------------------------------------
# Tied and frozen parameters.


def test_tied_weights_are_one_site() -> None:
    net, x = make("tied")
    names = [name for name, _ in net.named_parameters()]
    assert "out.weight" not in names
    bnn = bayesianize(net)
    assert poutine.trace(bnn).get_trace(x).stochastic_nodes == names
    # one value in both places: the network with it, not with half of it
    value = double(C, 3)
    conditioned = poutine.condition(
        bnn, data={**bnn.pretrained_values(), "embed.weight": value}
    )
    hidden = net.mix(value[x]).tanh()
    assert_close(conditioned(x), (hidden @ value.mT).detach(), **CLOSED)


def test_frozen_parameters_stay_constants() -> None:
    net, x = make("mlp")
    net[0].requires_grad_(False)
    before = snapshot(net)
    posterior = fit(net, x)
    assert list(posterior.subnet.counts) == ["2.weight", "2.bias"]
    assert posterior.subnet.num_params == 4 * C + C
    assert_close(posterior.output_distribution(x).loc, net(x).detach(), **CLOSED)
    names, jacobians = dense_jacobian(net, x)
    assert names == ["2.weight", "2.bias"]
    flat = torch.cat(jacobians, -1).flatten(0, 1)
    precision = flat.mT @ flat / NOISE**2
    precision += torch.eye(len(precision), dtype=precision.dtype) / PRIOR_SCALE**2
    assert_close(posterior.get_posterior().precision_matrix, precision, **DENSE)
    assert_untouched(net, before)


def half_frozen() -> tuple[nn.Module, Tensor]:
    net, x = make("mlp")
    net[0].requires_grad_(False)
    return net, x


def test_frozen_parameters_are_held_once() -> None:
    net, _ = half_frozen()
    bnn = bayesianize(net)
    for name, parameter in net.named_parameters():
        own = bnn.net.get_buffer(name)
        assert (own.data_ptr() == parameter.data_ptr()) != parameter.requires_grad


def test_the_network_stays_where_it_is_when_its_copy_moves() -> None:
    net, _ = half_frozen()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    bnn = bayesianize(net)
    other, _ = half_frozen()
    loaded = bayesianize(other).state_dict()
    bnn.load_state_dict({name: value + 1 for name, value in loaded.items()})
    bnn.float()
    for name, value in net.state_dict().items():
        assert value.dtype == torch.float64
        assert_close(value, before[name], **EQUAL)
        assert_close(
            bnn.net.get_buffer(name), (other.state_dict()[name] + 1).float(), **EQUAL
        )


def test_a_frozen_parameter_that_changes_after_the_first_call_is_noticed() -> None:
    net, x = half_frozen()
    bnn = bayesianize(net)
    bnn(x)
    with torch.no_grad():
        net[0].weight.add_(1.0)
    guide = AutoSubnetLaplace(observing(bnn), init_loc_fn=init_to_module(net))
    with pytest.raises(ModelError, match=r"must stay as it was copied.*0\.weight"):
        guide(x, double(N, C))


def test_a_frozen_parameter_that_is_trained_later_is_refused() -> None:
    """Else a posterior would predict with another backbone than it was fitted to."""
    net, x = half_frozen()
    posterior = fit(net, x, RandomSubnet(3, seed=0))
    again = pickle.loads(pickle.dumps(bayesianize(net)))
    expected = posterior.output_distribution(x).loc
    assert_close(posterior.output_distribution(x).loc, expected, **EQUAL)
    net.requires_grad_(True)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    net(x).square().sum().backward()
    sgd.step()
    with pytest.raises(ModelError, match=r"must stay as it was copied.*0\.bias"):
        posterior.output_distribution(x)
    # A copy has its own.
    before = again(x)
    assert before.shape == (N, C)


def test_a_frozen_parameter_that_is_replaced_before_is_taken_up() -> None:
    net, x = half_frozen()
    bnn = bayesianize(net)
    net[0].weight = nn.Parameter(double(*net[0].weight.shape), requires_grad=False)
    guide = AutoSubnetLaplace(observing(bnn), init_loc_fn=init_to_module(net))
    guide(x, double(N, C))
    output = poutine.condition(bnn, data=guide.median())(x)
    assert_close(output, net(x), **CLOSED)


class Quantized(nn.Parameter):
    """A parameter that is more than its numbers."""

    step = 0.5


def test_a_parameter_of_another_class_is_not_touched() -> None:
    net, x = half_frozen()
    value = Quantized(net[0].weight.detach(), requires_grad=False)
    net[0].weight = value
    bnn = bayesianize(net)
    assert bnn.net.get_buffer("0.weight") is value
    assert net[0].weight is value
    weights = bnn.pretrained_values()
    assert_close(poutine.condition(bnn, data=weights)(x), net(x), **CLOSED)


def test_a_frozen_layer_does_not_shift_positions() -> None:
    net, x = make("mlp")
    net[0].weight.requires_grad_(False)
    posterior = fit(net, x, {"2.weight": torch.tensor([1])})
    assert posterior.subnet.names == ["2.weight[0, 1]"]
    draw = Predictive(posterior.user_model, guide=posterior, num_samples=1)(x)
    moved = draw["2.weight"].reshape(C, 4) != net[2].weight
    assert moved.nonzero().tolist() == [[0, 1]]


def test_a_network_without_trainable_parameters_is_refused() -> None:
    net, _ = make("mlp")
    message = "must have a parameter with `requires_grad=True` .* got none"
    with pytest.raises(ModelError, match=message):
        bayesianize(net.requires_grad_(False))
    with pytest.raises(ModelError, match=message):
        bayesianize(nn.ReLU())


# ----------------------------------------------------------------------------------
# Priors.


def test_custom_prior() -> None:
    """A mean and a scale for every weight, another family for biases."""
    net, x = make("mlp")
    asked: list[tuple[str, torch.Size]] = []

    def prior(name: str, parameter: Tensor) -> dist.TorchDistribution:
        asked.append((name, parameter.shape))
        if name.endswith("bias"):
            base = dist.StudentT(4.0, torch.zeros_like(parameter), 0.8)
            return base.to_event(1)
        count = torch.arange(parameter.numel(), dtype=parameter.dtype)
        scale = (0.5 + count / 10).reshape(parameter.shape)
        return dist.Normal(torch.full_like(scale, 0.3), scale)

    bnn = bayesianize(net, prior=prior)
    assert asked == [(name, p.shape) for name, p in net.named_parameters()]
    trace = poutine.trace(bnn).get_trace(x)
    for name, parameter in net.named_parameters():
        fn = trace.nodes[name]["fn"]
        assert (fn.batch_shape, fn.event_shape) == ((), parameter.shape)

    guide = AutoSubnetLaplace(
        observing(bnn), {"0.weight": torch.arange(12)}, init_loc_fn=init_to_module(net)
    )
    posterior = guide.laplace_approximation(x, double(N, C))
    _, jacobians = dense_jacobian(net, x)
    flat = jacobians[0].flatten(0, 1)
    scale = 0.5 + torch.arange(12, dtype=torch.float64) / 10
    expected = flat.mT @ flat / NOISE**2 + (scale**-2).diag()
    assert_close(posterior.get_posterior().precision_matrix, expected, **DENSE)


def test_prior_may_have_batch_or_event_dimensions() -> None:
    net, x = make("mlp")
    priors: list[Callable[[str, Tensor], dist.TorchDistribution]] = [
        lambda name, p: dist.Normal(torch.zeros_like(p), 1.0),
        lambda name, p: dist.Normal(torch.zeros_like(p), 1.0).to_event(1),
        lambda name, p: dist.Normal(torch.zeros_like(p), 1.0).to_event(p.ndim),
        lambda name, p: dist.Normal(0.0, 1.0).expand(p.shape),
    ]
    for prior in priors:
        trace = poutine.trace(bayesianize(net, prior=prior)).get_trace
        nodes = trace(x.float() if prior is priors[-1] else x).nodes
        assert nodes["0.weight"]["fn"].event_shape == (4, 3)
        assert nodes["2.bias"]["fn"].batch_shape == ()


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (lambda p: dist.Normal(0.0, 1.0), r"\(\)"),
        (lambda p: dist.Normal(torch.zeros(p.numel()), 1.0).to_event(1), r"\(12,\)"),
        (lambda p: dist.Normal(torch.zeros(2, *p.shape), 1.0), r"\(2, 4, 3\)"),
    ],
    ids=["scalar", "flat", "too-many"],
)
def test_prior_of_the_wrong_shape(
    wrong: Callable[[Tensor], dist.TorchDistribution], got: str
) -> None:
    net, _ = make("mlp")
    message = (
        rf"prior of parameter '0\.weight' must have its shape, \(4, 3\); "
        rf"got {got}\. Use"
    )
    with pytest.raises(OptionError, match=message):
        bayesianize(net, prior=lambda name, parameter: wrong(parameter))


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_prior_scale_must_be_positive_and_finite(scale: float) -> None:
    net, _ = make("mlp")
    message = rf"`prior_scale` must be positive and finite.*got {scale}\. Pass 1\.0"
    with pytest.raises(OptionError, match=message):
        bayesianize(net, scale)


# ----------------------------------------------------------------------------------
# Inside other modules.


class Siamese(PyroModule):
    """A pretrained encoder, used twice in a call, under a sampled head."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = bayesianize(encoder, PRIOR_SCALE)
        self.head = PyroModule[nn.Linear](C, 1, dtype=torch.float64)
        prior = dist.Normal(torch.zeros(1, C, dtype=torch.float64), 1.0)
        self.head.weight = PyroSample(prior.to_event(2))
        del self.head.bias
        self.head.bias = None

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        f = self.head(self.encoder(x) - self.encoder(-x)).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(f, NOISE), obs=y)
        return f


def test_inside_another_module_names_are_prefixed_and_weights_shared() -> None:
    net, x = make("mlp")
    model = Siamese(net)
    trace = poutine.trace(model).get_trace(x)
    expected = [f"encoder.{name}" for name, _ in net.named_parameters()]
    sites = [site for site in trace.stochastic_nodes if site != "data"]
    assert sites == [*expected, "head.weight", "y"]

    head = torch.tensor([[0.5, -1.0]], dtype=torch.float64)
    start = init_to_module(net, fallback=init_to_value(values={"head.weight": head}))
    guide = AutoSubnetLaplace(model, init_loc_fn=start)
    posterior = guide.laplace_approximation(x, double(N))
    for name, parameter in net.named_parameters():
        found = posterior.median()[f"encoder.{name}"]
        assert_close(found, parameter.detach(), **EQUAL)
    assert_close(posterior.median()["head.weight"], head, **EQUAL)

    # both uses of a weight count: J is that of their difference
    jac = [
        here - there
        for here, there in zip(
            dense_jacobian(net, x)[1], dense_jacobian(net, -x)[1], strict=True
        )
    ]
    flat = torch.einsum("c,ncs->ns", head[0], torch.cat(jac, -1))
    difference = (net(x) - net(-x)).detach()
    flat = torch.cat([flat, difference], -1)
    prior = torch.cat(
        [
            torch.full((flat.shape[1] - C,), PRIOR_SCALE**-2, dtype=torch.float64),
            torch.ones(C, dtype=torch.float64),
        ]
    )
    precision = flat.mT @ flat / NOISE**2 + prior.diag()
    assert_close(posterior.get_posterior().precision_matrix, precision, **DENSE)


def test_two_networks_inside_one_module() -> None:
    class Pair(PyroModule):
        def __init__(self, first: nn.Module, second: nn.Module):
            super().__init__()
            self.first, self.second = bayesianize(first), bayesianize(second)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.second(x)

    first, x = make("mlp")
    second, _ = make("mlp")
    model = Pair(first, second)
    names = [name for name, _ in first.named_parameters()]
    sites = poutine.trace(model).get_trace(x).stochastic_nodes
    assert sites == [f"{m}.{name}" for m in ("first", "second") for name in names]


def test_init_takes_the_longest_name_that_fits() -> None:
    """``a.weight`` of one module does not pass for ``weight`` of another."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((2, 2), 1.0))
            self.a = nn.Linear(2, 2, bias=False)
            nn.init.constant_(self.a.weight, 2.0)

    init = init_to_module(Both())

    def start(name: str, *shape: int) -> Tensor:
        fn = dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape))
        return init({"name": name, "fn": fn})

    assert_close(start("weight", 2, 2), torch.full((2, 2), 1.0))
    assert_close(start("a.weight", 2, 2), torch.full((2, 2), 2.0))
    assert_close(start("net.a.weight", 2, 2), torch.full((2, 2), 2.0))
    assert_close(start("net.weight", 2, 2), torch.full((2, 2), 1.0))
    # a part of a name is none, and neither is one of another shape
    for name, shape in (("xweight", (2, 2)), ("a.weight", (3, 2)), ("tau", (4,))):
        with pytest.raises(ModelError, match=r"name and shape; got none .*fallback"):
            start(name, *shape)
    median = init_to_module(Both(), fallback=init_to_median)
    fn = dist.Normal(torch.full((2, 2), 3.0), 1e-3).to_event(2)
    assert_close(median({"name": "xweight", "fn": fn}), fn.mean, rtol=0, atol=0.01)
    # a number is, unless the network has a parameter like it
    assert start("sigma").shape == ()


def test_init_of_other_sites() -> None:
    net, x = make("mlp")
    bnn = bayesianize(net)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        f = bnn(x)
        one = torch.ones((), dtype=torch.float64)
        sigma = pyro.sample("sigma", dist.LogNormal(0.0 * one, one))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(f, sigma).to_event(1), obs=y)

    sigma = torch.tensor(0.25, dtype=torch.float64)
    fallback = init_to_value(values={"sigma": sigma})
    for source in (net, bnn):
        init = init_to_module(source, fallback=fallback)
        guide = AutoSubnetLaplace(model, init_loc_fn=init)
        guide(x, double(N, C))
        assert_close(guide.median()["sigma"], sigma, **CLOSED)
        assert_close(guide.median()["0.weight"], net[0].weight.detach(), **EQUAL)
    guide = AutoSubnetLaplace(model, init_loc_fn=init_to_module(net))
    guide(x, double(N, C))
    assert float(guide.median()["sigma"]) > 0


def test_starting_values_are_the_guides_own() -> None:
    """Training a guide does not write through to the network or to the next guide."""
    net, x = make("mlp")
    before = snapshot(net)
    init = init_to_module(net)
    model = observing(bayesianize(net))
    guide = AutoSubnetLaplace(model, init_loc_fn=init)
    y = double(N, C)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(x, y)
    assert not torch.equal(guide.median()["0.weight"], net[0].weight)
    assert_untouched(net, before)
    pyro.clear_param_store()
    fresh = AutoSubnetLaplace(model, init_loc_fn=init)
    fresh(x, y)
    assert_close(fresh.median()["0.weight"], net[0].weight.detach(), **EQUAL)
