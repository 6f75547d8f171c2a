"""The last layer is what computes the outputs, wherever the network holds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.exceptions import SelectionError
from pyro_subnet.nn import bayesianize, init_to_module, regressor
from pyro_subnet.selection import LastLayer, Sites
from pyro_subnet.tracing.data import Data

N, C = 5, 3


class Net(nn.Module):
    """Parts by name, in this order, and a function of them."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **parts: nn.Module):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def linear(rows: int = C) -> nn.Linear:
    return nn.Linear(4, rows)


def tied() -> nn.Module:
    net = Net(
        lambda m, t: m.out(m.mix(m.table(t)).tanh()),
        table=nn.Embedding(6, 4),
        mix=nn.Linear(4, 4),
        out=nn.Linear(4, 6, bias=False),
    )
    net.out.weight = net.table.weight
    return net


def written_by_part(m: Any, x: Tensor) -> Tensor:
    out = x.new_zeros(len(x), C)
    left = out[:, :1]
    left.copy_(m.first(m.body(x)))
    out[:, 1:] = m.second(m.body(x))
    return out


def routed(m: Any, x: Tensor) -> Tensor:
    """Only the last observation takes the second head."""
    out = m.first(m.body(x))
    chosen = torch.arange(len(x)) == N - 1
    if bool(chosen.any()):
        out = torch.where(chosen.unsqueeze(-1), m.second(m.body(x)), out)
    return out


def halves(m: Any, x: Tensor) -> Tensor:
    pieces = m.second(m.first(x).relu()).chunk(2, -1)
    return pieces[0] + pieces[1].tanh()


def body() -> nn.Linear:
    return nn.Linear(3, 4)


# The network, its inputs, and the sites of its last layer.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "in-order": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), linear()),
        torch.randn(N, 3),
        "2.weight 2.bias",
    ),
    "head-first": (
        lambda: Net(lambda m, x: m.head(m.body(x).tanh()), head=linear(), body=body()),
        torch.randn(N, 3),
        "head.weight head.bias",
    ),
    "tied": (tied, torch.randint(0, 6, (N,)), "table.weight"),
    "two-heads": (
        lambda: Net(
            lambda m, x: torch.cat([m.b(m.body(x)), m.a(m.body(x))], -1),
            a=linear(1),
            body=body(),
            b=linear(2),
        ),
        torch.randn(N, 3),
        "a.weight a.bias b.weight b.bias",
    ),
    "written-by-part": (
        lambda: Net(written_by_part, first=linear(1), second=linear(2), body=body()),
        torch.randn(N, 3),
        "first.weight first.bias second.weight second.bias",
    ),
    "routed": (
        lambda: Net(routed, first=linear(), second=linear(), body=body()),
        torch.randn(N, 3),
        "first.weight first.bias second.weight second.bias",
    ),
    "skip": (
        lambda: Net(
            lambda m, x: m.skip(x) + m.head(m.body(x).tanh()),
            skip=nn.Linear(3, C),
            head=linear(),
            body=body(),
        ),
        torch.randn(N, 3),
        "skip.weight skip.bias head.weight head.bias",
    ),
    "norm-and-scale-after": (
        lambda: nn.Sequential(nn.Linear(3, 4), linear(), nn.LayerNorm(C), nn.PReLU(C)),
        torch.randn(N, 3),
        "1.weight 1.bias",
    ),
    "norm-of-two-dimensions": (
        lambda: nn.Sequential(
            nn.Conv1d(2, C, 3),
            nn.Flatten(),
            nn.Unflatten(1, (C, 1)),
            nn.LayerNorm([C, 1]),
        ),
        torch.randn(N, 2, 3),
        "0.weight 0.bias",
    ),
    "weight-norm": (
        lambda: nn.Sequential(
            nn.Linear(3, 4), nn.utils.parametrizations.weight_norm(linear())
        ),
        torch.randn(N, 3),
        "1.bias 1.parametrizations.weight.original0 "
        "1.parametrizations.weight.original1",
    ),
    "recurrent": (
        lambda: Net(
            lambda m, x: m.cell(m.body(x))[0][:, -1],
            cell=nn.LSTM(4, C, batch_first=True),
            body=body(),
        ),
        torch.randn(N, 2, 3),
        "cell.weight_ih_l0 cell.weight_hh_l0 cell.bias_ih_l0 cell.bias_hh_l0",
    ),
    "convolution": (
        lambda: Net(
            lambda m, x: m.head(m.body(x).relu()).mean(-1),
            head=nn.Conv1d(4, C, 1),
            body=nn.Conv1d(2, 4, 2),
        ),
        torch.randn(N, 2, 3),
        "head.weight head.bias",
    ),
    "pieces-of-one": (
        lambda: Net(halves, second=linear(2 * C), first=nn.Linear(3, 4)),
        torch.randn(N, 3),
        "second.weight second.bias",
    ),
    "one-layer": (lambda: nn.Linear(3, C), torch.randn(N, 3), "weight bias"),
}


def chosen(model: Callable[..., Any], *data: Tensor, **options: Any) -> set[str]:
    guide = AutoSubnetLaplace(model, **options)
    guide(*data)
    subnet = LastLayer()(guide, Data.single(data, {}))
    return {site for site, count in subnet.counts.items() if count}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_what_computes_the_outputs(name: str, dtype: torch.dtype) -> None:
    make, x, expected = NETWORKS[name]
    x = x.to(dtype) if x.is_floating_point() else x
    net = make().to(dtype).eval()
    bnn = bayesianize(net)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        f = bnn(x)
        noise = pyro.sample("noise", dist.LogNormal(torch.zeros((), dtype=dtype), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(f, noise).to_event(f.ndim - 1), obs=y)

    y = torch.randn(net(x).shape, dtype=dtype)
    found = chosen(model, x, y, init_loc_fn=init_to_module(net))
    assert found == set(expected.split())


def test_all_observed_sites_have_heads() -> None:
    net = Net(
        lambda m, x: (m.rate(m.body(x)), m.mean(m.body(x))),
        mean=linear(1),
        body=nn.Linear(3, 4),
        rate=linear(1),
    )
    bnn = bayesianize(net)

    def model(x: Tensor, y: Tensor, z: Tensor) -> None:
        rate, mean = bnn(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Poisson(rate.squeeze(-1).exp()), obs=y)
            pyro.sample("z", dist.Normal(mean.squeeze(-1), 1.0), obs=z)

    x, y, z = torch.randn(N, 3), torch.ones(N), torch.zeros(N)
    found = chosen(model, x, y, z, init_loc_fn=init_to_module(net))
    assert found == {"mean.weight", "mean.bias", "rate.weight", "rate.bias"}


def test_minibatches_that_take_other_heads_count() -> None:
    make, x, expected = NETWORKS["routed"]
    net = make()
    net.run = lambda m, x: (m.first if x[0, 0] > 0 else m.second)(m.body(x))
    x = torch.stack([torch.ones(2, 3), -torch.ones(2, 3)])
    bnn = bayesianize(net)

    def model(x: Tensor, y: Tensor) -> None:
        f = bnn(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(f, 1.0).to_event(1), obs=y)

    guide = AutoSubnetLaplace(model, LastLayer(), init_loc_fn=init_to_module(net))
    batches = [(each, torch.zeros(2, C)) for each in x]
    counts = guide.laplace_approximation_from(batches).subnet.counts
    assert {site for site, count in counts.items() if count} == set(expected.split())


def test_models_of_sampled_matrices() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        # the last is sampled first
        w2 = pyro.sample("w2", dist.Normal(torch.zeros(4, C), 1.0).to_event(2))
        b2 = pyro.sample("b2", dist.Normal(torch.zeros(C), 1.0).to_event(1))
        w1 = pyro.sample("w1", dist.Normal(torch.zeros(3, 4), 1.0).to_event(2))
        b1 = pyro.sample("b1", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        logits = torch.einsum("nh,hc->nc", torch.tanh(x @ w1 + b1), w2) + b2
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    x, y = torch.randn(N, 3), torch.arange(N) % C
    assert chosen(model, x, y) == {"w2", "b2"}
    assert chosen(lambda: model(x, y)) == {"w2", "b2"}  # data from around it


def test_a_pyro_module_whose_head_comes_first() -> None:
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.head = PyroModule[nn.Linear](4, 1)
            self.body = PyroModule[nn.Linear](3, 4)
            for layer in (self.head, self.body):
                for name, value in list(layer.named_parameters()):
                    prior = dist.Normal(torch.zeros_like(value), 1.0)
                    setattr(layer, name, PyroSample(prior.to_event(value.ndim)))

        def forward(self, x: Tensor, y: Tensor | None = None) -> None:
            f = self.head(self.body(x).tanh()).squeeze(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(f, 1.0), obs=y)

    found = chosen(Model(), torch.randn(N, 3), torch.randn(N))
    assert found == {"head.weight", "head.bias"}


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy().copy())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def test_what_torch_does_not_show_is_refused() -> None:
    net = Net(lambda m, x: Hidden.apply(m.head(m.body(x))), head=linear(), body=body())
    bnn = bayesianize(net)

    def model(x: Tensor, y: Tensor) -> None:
        f = bnn(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(f, 1.0).to_event(1), obs=y)

    with pytest.raises(
        SelectionError, match=r"see how the outputs .* Name the last la"
    ):
        chosen(model, torch.randn(N, 3), torch.randn(N, C))


def test_a_network_with_torch_funcs_derivatives_names_its_last_layer() -> None:
    """An energy and its forces, of which no graph can be followed without them."""

    class Forces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.out = nn.Linear(3, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            def energy(point: Tensor) -> Tensor:
                return self.out(self.hidden(point).tanh()).squeeze(-1)

            forces = torch.func.vmap(torch.func.grad(energy))(x)
            return torch.cat([energy(x).unsqueeze(-1), forces], -1)

    x, net = torch.randn(20, 3), Forces()
    y = net(x).detach() + 0.1 * torch.randn(20, 4)
    model = regressor(net, noise=0.1)
    with pytest.raises(SelectionError, match=r"takes some by itself\. Name the last"):
        AutoSubnetLaplace(model, LastLayer()).laplace_approximation(x, y)
    named = AutoSubnetLaplace(model, Sites(["out.weight"]))
    assert named.laplace_approximation(x, y).subnet.size == 4
