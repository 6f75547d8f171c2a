"""Every layer of ``torch.nn`` that holds weights: right, or refused in plain words.

The list is torch's own, so that a layer of a later release is not forgotten. The oracle
is the dense Jacobian of the network, by autograd in float64.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroSample
from pyro.nn.module import to_pyro_module_
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.exceptions import ModelError
from pyro_subnet.nn import bayesianize, init_to_module
from pyro_subnet.selection import RandomSubnet
from tests.tolerances import tolerance

N, C, NOISE, PRIOR_SCALE, SIZE = 5, 2, 0.5, 0.7, 9
SEQUENCE = (4, 6)


class Of(nn.Module):
    """Of what a layer returns, the outputs, a row per observation."""

    def __init__(self, layer: nn.Module, call: Callable[..., Any] | None = None):
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x: Tensor) -> Tensor:
        found = self.layer(x) if self.call is None else self.call(self.layer, x)
        found = found[0] if isinstance(found, tuple) else found
        flat: Tensor = found.flatten(1)
        return flat


def positions_first(layer: nn.Module, x: Tensor) -> Tensor:
    outputs: Tensor = layer(x.transpose(0, 1))[0].transpose(0, 1)
    return outputs


def packed(layer: nn.Module, x: Tensor) -> Tensor:
    lengths = 1 + torch.arange(len(x)) % x.shape[1]
    rows = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    outputs: Tensor = pad_packed_sequence(layer(rows)[0], batch_first=True)[0]
    return outputs


def attended(layer: nn.Module, x: Tensor) -> Tensor:
    outputs: Tensor = layer(x, x.tanh(), x.tanh())[0]
    return outputs


def translated(layer: nn.Module, x: Tensor) -> Tensor:
    outputs: Tensor = layer(x, x.tanh())
    return outputs


def paired(layer: nn.Module, x: Tensor) -> Tensor:
    outputs: Tensor = layer(x[:, 0], x[:, 1])
    return outputs


def log_prob(layer: Any, x: Tensor) -> Tensor:
    outputs: Tensor = layer.log_prob(x)
    return outputs


def bags(layer: nn.Module, words: Tensor) -> Tensor:
    starts = torch.arange(0, words.numel(), words.shape[1])
    outputs: Tensor = layer(words.flatten(), starts)
    return outputs


Make = tuple[Callable[[], nn.Module], tuple[int, ...]]
# By class, then by variant: a layer, and the shape of an observation; () for words.
WORDS: tuple[int, ...] = ()
RECIPES: dict[str, dict[str, Make]] = {
    "Linear": {"": (lambda: Of(nn.Linear(6, 3)), (6,))},
    "LazyLinear": {"": (lambda: Of(nn.LazyLinear(3)), (6,))},
    "Bilinear": {"": (lambda: Of(nn.Bilinear(6, 6, 3), paired), (2, 6))},
    "PReLU": {
        "": (lambda: Of(nn.PReLU()), (6,)),
        "a channel": (lambda: Of(nn.PReLU(2)), (2, 3)),
    },
    "Embedding": {"": (lambda: Of(nn.Embedding(7, 3)), WORDS)},
    "EmbeddingBag": {
        "": (lambda: Of(nn.EmbeddingBag(7, 3)), WORDS),
        "sum": (lambda: Of(nn.EmbeddingBag(7, 3, mode="sum")), WORDS),
        "offsets": (lambda: Of(nn.EmbeddingBag(7, 3, mode="mean"), bags), WORDS),
    },
    "AdaptiveLogSoftmaxWithLoss": {
        "": (
            lambda: Of(nn.AdaptiveLogSoftmaxWithLoss(6, 9, [3, 6], 2.0), log_prob),
            (6,),
        )
    },
    "GroupNorm": {"": (lambda: Of(nn.GroupNorm(2, 4)), (4, 3))},
    "LayerNorm": {"": (lambda: Of(nn.LayerNorm(SEQUENCE)), SEQUENCE)},
    "RMSNorm": {"": (lambda: Of(nn.RMSNorm(6)), SEQUENCE)},
    "MultiheadAttention": {
        "": (
            lambda: Of(nn.MultiheadAttention(6, 2, batch_first=True), attended),
            SEQUENCE,
        ),
        "extra bias": (
            lambda: Of(
                nn.MultiheadAttention(6, 2, batch_first=True, add_bias_kv=True),
                attended,
            ),
            SEQUENCE,
        ),
    },
    "TransformerEncoderLayer": {
        "": (
            lambda: Of(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)),
            SEQUENCE,
        )
    },
    "TransformerEncoder": {
        "": (
            lambda: Of(
                nn.TransformerEncoder(
                    nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 2
                )
            ),
            SEQUENCE,
        )
    },
    "TransformerDecoderLayer": {
        "": (
            lambda: Of(
                nn.TransformerDecoderLayer(6, 2, 8, batch_first=True), translated
            ),
            SEQUENCE,
        )
    },
    "TransformerDecoder": {
        "": (
            lambda: Of(
                nn.TransformerDecoder(
                    nn.TransformerDecoderLayer(6, 2, 8, batch_first=True), 2
                ),
                translated,
            ),
            SEQUENCE,
        )
    },
    "Transformer": {
        "": (
            lambda: Of(nn.Transformer(6, 2, 1, 1, 8, batch_first=True), translated),
            SEQUENCE,
        )
    },
}
for dims in (1, 2, 3):
    sides = (4, 5, 3)[:dims]
    for prefix in ("", "Lazy"):
        channels = () if prefix else (2,)
        for kind in ("Conv", "ConvTranspose"):
            name = f"{prefix}{kind}{dims}d"
            conv = partial(getattr(nn, name), *channels, 3, 2)
            RECIPES[name] = {"": (lambda conv=conv: Of(conv()), (2, *sides))}
        for kind, options in (("BatchNorm", {}), ("InstanceNorm", {"affine": True})):
            name = f"{prefix}{kind}{dims}d"
            norm = partial(getattr(nn, name), *channels, **options)
            RECIPES[name] = {"": (lambda norm=norm: Of(norm()), (2, *sides))}
for name in ("LSTM", "GRU", "RNN"):
    kind = getattr(nn, name)
    RECIPES[name] = {
        "": (
            lambda kind=kind: Of(kind(6, 3), positions_first),
            SEQUENCE,
        ),
        "packed": (lambda kind=kind: Of(kind(6, 3), packed), SEQUENCE),
        "deep, both ways": (
            lambda kind=kind: Of(
                kind(6, 3, num_layers=2, bidirectional=True, batch_first=True)
            ),
            SEQUENCE,
        ),
    }
    cell = getattr(nn, f"{name}Cell")
    RECIPES[f"{name}Cell"] = {"": (lambda cell=cell: Of(cell(6, 3)), (6,))}
RECIPES["LSTM"]["projected"] = (
    lambda: Of(nn.LSTM(6, 4, proj_size=3, batch_first=True)),
    SEQUENCE,
)
RECIPES["RNN"]["relu"] = (
    lambda: Of(nn.RNN(6, 3, nonlinearity="relu", batch_first=True)),
    SEQUENCE,
)
# No classes of torch.nn, but what torch offers for their weights.
RECIPES["parametrizations"] = {
    "weight_norm": (lambda: Of(weight_norm(nn.Linear(6, 3))), (6,)),
    "spectral_norm": (lambda: Of(spectral_norm(nn.Linear(6, 3))), (6,)),
    "orthogonal": (lambda: Of(orthogonal(nn.Linear(6, 3))), (6,)),
}
# Hold other layers, are their base class, run on several devices, or are losses.
NO_LAYERS = {
    "Container",
    "DataParallel",
    "LinearCrossEntropyLoss",
    "Module",
    "ModuleDict",
    "ModuleList",
    "ParameterDict",
    "ParameterList",
    "RNNBase",
    "RNNCellBase",
    "Sequential",
    "SyncBatchNorm",
}
KINDS = [(name, variant) for name, own in RECIPES.items() for variant in own]


def constructed(kind: type[nn.Module]) -> Iterator[nn.Module]:
    """Modules of a class, by arguments that most of torch's take."""
    for args in ((), (2,), (2, 2), (2, 0.5), (2, (2, 2)), (4, 2)):
        # Not with these: torch's constructors raise errors of many kinds.
        with contextlib.suppress(Exception):
            yield kind(*args)


@pytest.mark.filterwarnings("ignore")
def test_no_layer_of_torch_is_forgotten() -> None:
    classes = {
        name: kind
        for name, kind in vars(nn).items()
        if isinstance(kind, type) and issubclass(kind, nn.Module)
    }
    left = {
        name
        for name in classes.keys() - RECIPES.keys() - NO_LAYERS
        if any(list(net.parameters()) for net in constructed(classes[name]))
        or not list(constructed(classes[name]))
    }
    assert not left
    assert len(classes) > 150


def made(
    kind: tuple[str, str], dtype: torch.dtype, *, alone: bool
) -> tuple[nn.Module, Tensor]:
    """A network in eval mode, whose norms have seen data, and N inputs."""
    make, shape = RECIPES[kind[0]][kind[1]]
    torch.manual_seed(0)
    with warnings.catch_warnings():  # that lazy layers, nested tensors are not final
        warnings.simplefilter("ignore")
        layer = make()
        x = torch.randint(7, (N, 3)) if shape == WORDS else torch.randn(N, *shape)
        layers = (layer,) if alone else (layer, nn.Tanh(), nn.LazyLinear(C))
        net = nn.Sequential(*layers)
        with torch.no_grad():
            net.train()(x)
            for parameter in net.parameters():  # norms start at 1 and 0: not here
                parameter.add_(0.1 * torch.randn_like(parameter))
    x = x.to(dtype) if x.is_floating_point() else x
    return net.to(dtype).eval(), x


def sampled(net: nn.Module) -> Callable[[Tensor], Tensor]:
    """A plain network, whose weights the user's model draws."""

    def forward(x: Tensor) -> Tensor:
        values = {
            name: pyro.sample(name, prior(value))
            for name, value in net.named_parameters()
        }
        found: Tensor = functional_call(net, values, (x,))
        return found

    return forward


def pyro_module(net: nn.Module) -> Callable[[Tensor], Tensor]:
    net = copy.deepcopy(net)
    to_pyro_module_(net)
    for module in list(net.modules()):
        for name, value in list(module.named_parameters(recurse=False)):
            setattr(module, name, PyroSample(prior(value)))
    return net


def prior(value: Tensor) -> dist.Distribution:
    zeros = torch.zeros_like(value.detach())
    return dist.Normal(zeros, PRIOR_SCALE).to_event(value.ndim)


WAYS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "sampled": sampled,
    "PyroModule": pyro_module,
    "bayesianized": partial(bayesianize, prior_scale=PRIOR_SCALE),
}


def fitted(net: nn.Module, x: Tensor, way: str) -> AutoSubnetMultivariateNormal:
    network = WAYS[way](net)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        f = network(x)
        with pyro.plate("data", len(f)):
            pyro.sample("y", dist.Normal(f, NOISE).to_event(1), obs=y)

    weights = {name: value.detach() for name, value in net.named_parameters()}
    start = init_to_module(net) if way == "bayesianized" else at(weights)
    size = min(SIZE, sum(value.numel() for value in weights.values()))
    guide = AutoSubnetLaplace(model, RandomSubnet(size, seed=1), init_loc_fn=start)
    with torch.no_grad():
        y = net(x) + NOISE * torch.randn_like(net(x))
    return guide.laplace_approximation(x, y)


def at(weights: dict[str, Tensor]) -> Callable[[Any], Tensor]:
    return lambda site: weights[site["name"]]


def dense_precision(
    net: nn.Module, x: Tensor, posterior: AutoSubnetMultivariateNormal
) -> Tensor:
    """P = J^T J / sigma^2 + I / s^2, in float64."""
    net = copy.deepcopy(net).double()
    x = x.double() if x.is_floating_point() else x
    parameters = dict(net.named_parameters())
    # A PyroModule draws its weights in the order in which its layers run.
    weights = {name: parameters[name].detach() for name in posterior.median()}
    chosen = posterior.subnet.flat

    def outputs(*values: Tensor) -> Tensor:
        swapped = dict(zip(weights, values, strict=True))
        found: Tensor = functional_call(net, swapped, (x,))
        return found.flatten()

    jacobians = torch.autograd.functional.jacobian(outputs, tuple(weights.values()))
    rows = torch.cat([jac.flatten(1) for jac in jacobians], -1)[:, chosen]
    eye = torch.eye(len(chosen), dtype=rows.dtype)
    return rows.mT @ rows / NOISE**2 + eye / PRIOR_SCALE**2


def cases() -> Iterator[tuple[tuple[str, str], str, torch.dtype]]:
    """Each layer in a small network in every way, alone in one, and in both types."""
    for kind in KINDS:
        yield kind, "bayesianized", torch.float32
        # After its first call a lazy layer is another class.
        if not kind[0].startswith("Lazy"):
            yield kind, "bayesianized", torch.float64
            yield kind, "bayesianized, alone", torch.float32
            yield kind, "sampled", torch.float32
            yield kind, "PyroModule", torch.float64


# torch has no batching rule for some backward passes, and says so.
@pytest.mark.filterwarnings("ignore:There is a performance drop because")
@pytest.mark.parametrize(("kind", "way", "dtype"), list(cases()), ids=str)
def test_every_layer_is_right(
    kind: tuple[str, str], way: str, dtype: torch.dtype
) -> None:
    alone = way.endswith(", alone")
    net, x = made(kind, dtype, alone=alone)
    posterior = fitted(net, x, way.removesuffix(", alone"))
    found = posterior.get_posterior().precision_matrix
    expected = dense_precision(net, x, posterior)
    assert_close(found, expected.to(dtype), **tolerance(dtype, "autograd"))
    closed = posterior.output_distribution(x)
    assert_close(closed.loc, net(x).detach(), **tolerance(dtype, "autograd"))


def test_a_lazy_layer_before_its_first_call_is_refused() -> None:
    net = nn.Sequential(nn.LazyLinear(3), nn.Tanh(), nn.Linear(3, C))
    with pytest.raises(
        ModelError, match=r"must know its shapes; got lazy.*'0.weight'.*Call it once"
    ):
        bayesianize(net)
    net(torch.randn(N, 4))
    assert bayesianize(net).pretrained_values()["0.weight"].shape == (3, 4)


def test_complex_weights_are_refused_but_for_frozen_ones() -> None:
    """No prior of Pyro's is over complex numbers; their parts may have one."""
    net = nn.Linear(4, C)
    net.modes = nn.Parameter(torch.ones(2, dtype=torch.cfloat))
    with pytest.raises(
        ModelError, match=r"got complex parameter 'modes'\. Hold its real"
    ):
        bayesianize(net)
    net.modes.requires_grad_(False)
    assert set(bayesianize(net).pretrained_values()) == {"weight", "bias"}
