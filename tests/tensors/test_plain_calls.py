"""What torch saves in training costs no derivative: against plain networks."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.exceptions import ModelError
from pyro_subnet.nn import bayesianize, init_to_module
from tests.networks import called, fitted, model_of, moved, precision
from tests.tolerances import tolerance

NUM_WORDS = 7
WORDS = torch.tensor([0, 1, 1, 2, 2, 2, 6])
BAGS = torch.tensor([[0, 1], [1, 1], [2, 6], [3, 4], [5, 5], [0, 0], [6, 5]])


class Lookup(nn.Module):
    """An embedding or a bag of them, and a head."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.words = embedding
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(x)))


class Renormed(nn.Module):
    """A norm-bounded embedding out of place: torch gives the cut no gradient."""

    def __init__(self, max_norm: float, norm_type: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(NUM_WORDS, 3))
        self.max_norm, self.norm_type = max_norm, norm_type

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for row in self.weight:
            norm = float(row.detach().norm(self.norm_type))
            cut = row.detach() * (self.max_norm / (norm + 1e-7))
            rows.append(row + (cut - row.detach()) if norm > self.max_norm else row)
        return torch.stack(rows)[x]


def of_weights(plain: nn.Module, net: nn.Module) -> nn.Module:
    plain.to(next(net.parameters()).dtype).load_state_dict(net.state_dict())
    return plain


def compare(net: nn.Module, plain: nn.Module, x: Tensor, **options: Any) -> None:
    """A fit's precision with the oracle's; the network keeps its weights."""
    before = copy.deepcopy(net.state_dict())
    found = fitted(net, x, **options).get_posterior().precision_matrix
    expected = precision(of_weights(plain, net), x)
    assert_close(found.double(), expected, **tolerance(found.dtype))
    for name, value in net.state_dict().items():
        assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("option", ["sparse", "scale_grad_by_freq"])
def test_gradients_of_embeddings_made_for_training(
    option: str, dtype: torch.dtype
) -> None:
    net = Lookup(nn.Embedding(NUM_WORDS, 3, **{option: True})).to(dtype)
    compare(net, Lookup(nn.Embedding(NUM_WORDS, 3)), WORDS)


@pytest.mark.parametrize("norm_type", [1.0, 2.0])
@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_a_norm_bounded_embedding_leaves_all_weights(
    max_norm: float, norm_type: float, dtype: torch.dtype
) -> None:
    words = nn.Embedding(NUM_WORDS, 3, max_norm=max_norm, norm_type=norm_type)
    compare(Lookup(words).to(dtype), Lookup(Renormed(max_norm, norm_type)), WORDS)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("sparse", [True, False])
def test_bags_of_embeddings(mode: str, sparse: bool) -> None:
    net = Lookup(nn.EmbeddingBag(NUM_WORDS, 3, mode=mode, sparse=sparse)).double()
    compare(net, Lookup(nn.EmbeddingBag(NUM_WORDS, 3, mode=mode)), BAGS)


def test_draws_and_svi_leave_a_norm_bounded_embedding(dtype: torch.dtype) -> None:
    net = Lookup(nn.Embedding(NUM_WORDS, 3, max_norm=0.1, sparse=True)).to(dtype)
    before = copy.deepcopy(net.state_dict())
    model = model_of(bayesianize(net), called)
    guide = AutoSubnetLaplace(model, init_loc_fn=init_to_module(net))
    y = torch.zeros(len(WORDS), dtype=dtype)
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 1e-9}), Trace_ELBO())
    svi.step(WORDS, y)
    start = torch.cat([value.flatten() for value in net.state_dict().values()])
    assert_close(guide.loc.detach(), start, rtol=0, atol=1e-6)
    posterior = guide.laplace_approximation(WORDS, y)
    Predictive(model, guide=posterior, num_samples=2)(WORDS)
    for name, value in net.state_dict().items():
        assert_close(value, before[name], rtol=0, atol=0)


class Recurrent(nn.Module):
    """The last state of a recurrent layer, and a head."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.cells = getattr(nn, kind)(2, 3, batch_first=True, **options)
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0][:, -1])


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("training", [True, False])
def test_recurrent_layers_in_both_modes(
    kind: str, training: bool, dtype: torch.dtype
) -> None:
    net = Recurrent(kind).to(dtype).train(training)
    compare(net, Recurrent(kind), torch.randn(5, 4, 2, dtype=dtype))
    assert net.training == training
    assert torch.backends.cudnn.enabled


class Packed(Recurrent):
    """The same on packed sequences of two lengths."""

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.tensor([x.shape[1]] * (len(x) - 1) + [1])
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        states, _ = nn.utils.rnn.pad_packed_sequence(
            self.cells(packed)[0], batch_first=True
        )
        return self.head(states[:, 0])


class Kernels(TorchFunctionMode):
    """Notes of every recurrent call whether it may take torch's fast kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.fast: list[bool] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.lstm, torch.gru, torch.rnn_tanh):
            self.fast.append(torch.backends.cudnn.enabled)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("network", [Recurrent, Packed])
@pytest.mark.parametrize("training", [True, False])
def test_training_keeps_the_fast_kernels_of_recurrent_layers(
    training: bool, network: type[Recurrent], kind: str
) -> None:
    """In training mode, whose kernels have first derivatives; a fit needs others."""
    net = network(kind).train(training)
    model = model_of(bayesianize(net), called)
    x, y = torch.randn(5, 4, 2), torch.randn(5)
    guide = AutoSubnetLaplace(model, init_loc_fn=init_to_module(net))
    guide(x, y)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    with Kernels() as kernels:
        svi.step(x, y)
    assert kernels.fast == [training] * len(kernels.fast)
    assert kernels.fast
    if network is Recurrent:  # `vmap` has no packed sequences
        with Kernels() as kernels:
            guide.laplace_approximation(x, y)
        assert kernels.fast
        assert not any(kernels.fast)


class Checkpointed(nn.Module):
    """A layer that is run again in the backward pass."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 1)
        self.reentrant = reentrant

    def block(self, hidden: Tensor) -> Tensor:
        return torch.tanh(self.second(hidden))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        if self.reentrant is None:
            hidden = self.block(hidden)
        else:
            hidden = checkpoint(self.block, hidden, use_reentrant=self.reentrant)
        return self.head(hidden)


@pytest.mark.parametrize("curvature", ["ggn", "ef"])
def test_checkpointed_layers_are_not_run_again(
    curvature: Any, dtype: torch.dtype
) -> None:
    # Run again they would find the network's weights, not those of the MAP.
    net, x = Checkpointed(False).to(dtype), torch.randn(6, 3, dtype=dtype)
    if curvature == "ggn":
        compare(net, Checkpointed(None), x)
        return
    plain = of_weights(Checkpointed(None).to(dtype), net)
    found, expected = (
        fitted(each, x, curvature=curvature).get_posterior().precision_matrix
        for each in (net, plain)
    )
    assert_close(found, expected, **tolerance(dtype))


def test_svi_trains_checkpointed_layers_at_their_draws() -> None:
    x, losses = torch.randn(6, 3).double(), []
    state = Checkpointed(None).double().state_dict()
    for reentrant in (False, None):
        pyro.clear_param_store()
        net = Checkpointed(reentrant).double()
        net.load_state_dict(state)
        model = model_of(bayesianize(net), called)
        guide = AutoSubnetLaplace(model, init_loc_fn=init_to_module(net))
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        losses.append([svi.step(x, x[:, 0]) for _ in range(5)])
    assert_close(losses[0], losses[1])


def test_reentrant_checkpoints_are_refused() -> None:
    net, x = Checkpointed(True), torch.randn(6, 3)
    with pytest.raises(ModelError, match=r"use_reentrant=False`.*got `use_reentrant"):
        fitted(net, x)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def whole(net: nn.Sequential) -> nn.Module:
    return torch.compile(net, backend="eager")


def part(net: nn.Sequential) -> nn.Module:
    net[0] = torch.compile(net[0], backend="eager")
    return net


def in_place(net: nn.Sequential) -> nn.Module:
    net.compile(backend="eager")
    return net


@pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning")
@pytest.mark.parametrize("how", [whole, part, in_place])
def test_compiled_networks_have_the_numbers_of_plain_ones(
    how: Callable[[nn.Sequential], nn.Module],
) -> None:
    plain, x = mlp(), torch.randn(6, 3).double()
    net = how(copy.deepcopy(plain))
    model = model_of(bayesianize(net), called)
    guide = AutoSubnetLaplace(model, init_loc_fn=init_to_module(net))
    posterior = guide.laplace_approximation(x, x[:, 0])
    expected = AutoSubnetLaplace(
        model_of(bayesianize(plain), called), init_loc_fn=init_to_module(plain)
    ).laplace_approximation(x, x[:, 0])
    found = posterior.get_posterior().precision_matrix
    assert_close(found, expected.get_posterior().precision_matrix)
    assert_close(
        posterior.output_distribution(x).covariance_matrix,
        expected.output_distribution(x).covariance_matrix,
    )


@pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning")
def test_a_compiled_model_has_the_numbers_of_a_plain_one() -> None:
    net, x = mlp(), torch.randn(6, 3).double()
    found, runs = [], list[int]()

    def backend(graph: Any, inputs: Any) -> Any:
        runs.append(threading.get_ident())
        return graph.forward

    for compiled in (True, False):
        pyro.clear_param_store()
        bnn: Any = bayesianize(net)
        if compiled:
            bnn = torch.compile(bnn, backend=backend)
        guide = AutoSubnetLaplace(
            model_of(bnn, called), init_loc_fn=init_to_module(net)
        )
        posterior = guide.laplace_approximation(x, x[:, 0])
        found.append(posterior.get_posterior().precision_matrix)
    assert_close(*found)
    assert not runs
    # The compiler is as it was.
    torch.compile(mlp(), backend=backend)(x)
    assert runs


def test_moved_values_differ_from_the_networks() -> None:
    # Else a layer that is run again with the network's weights would be right.
    net = mlp()
    for name, value in moved(net).items():
        assert not torch.equal(value, net.get_parameter(name))
