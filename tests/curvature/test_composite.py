"""Attention and recurrent layers, written out, against dense autograd.

The oracle runs torch's own functions, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close

from pyro_subnet.curvature.jacobian.route import squared_columns
from pyro_subnet.curvature.jacobian.structured.recording import Recording
from tests.curvature.test_layered import (
    CLOSE,
    DTYPE,
    LARGE,
    SMALL,
    C,
    N,
    dense_rows,
    output_map,
    random_factors,
    recording,
    rows_of,
)

POSITIONS, WIDTH = 4, 6


class Attention(nn.Module):
    """One attention layer between a mean and a linear one, as ``call`` uses it."""

    def __init__(self, call: str = "self", **options: Any) -> None:
        super().__init__()
        options.setdefault("batch_first", True)
        self.call = call
        self.attend = nn.MultiheadAttention(WIDTH, 2, **options)
        self.out = nn.Linear(WIDTH, C)

    def forward(self, x: Tensor) -> Tensor:
        positions = x.shape[1]
        padding = torch.arange(positions) >= positions - 1
        padded = padding.expand(len(x), -1)
        causal = torch.ones(positions, positions, dtype=torch.bool).triu(1)
        distance = (torch.arange(positions) - 1.0).expand(positions, -1).to(x.dtype)
        if not self.attend.batch_first:
            x = x.transpose(0, 1)
        wide = x[..., : self.attend.kdim]
        inputs, options = {
            "self": ((x, x, x), {}),
            "fast": ((x, x, x), {"need_weights": False}),
            "each head": ((x, x, x), {"average_attn_weights": False}),
            "cross": ((x, wide, wide.tanh()), {}),
            "padding": ((x, x, x), {"key_padding_mask": padded}),
            "causal": (
                (x, x, x),
                {"attn_mask": causal, "is_causal": True, "need_weights": False},
            ),
            "both masks": (
                (x, x, x),
                {"attn_mask": distance, "key_padding_mask": -9 * padded.to(x)},
            ),
            "a mask a head": (
                (x, x, x),
                {"attn_mask": distance.expand(2 * len(padded), -1, -1)},
            ),
            "two calls": ((x, x, x), {}),
        }[self.call]
        attended, weights = self.attend(*inputs, **options)
        if self.call == "two calls":
            attended, weights = self.attend(attended, x, x)
        if not self.attend.batch_first:
            attended = attended.transpose(0, 1)
        found: Tensor = self.out(attended.mean(1))
        return found if weights is None else found + weights.flatten(1).mean(1)[:, None]


class Recurrent(nn.Module):
    """A recurrent network whose outputs and last states are read."""

    def __init__(self, kind: Callable[..., Any], **options: Any) -> None:
        super().__init__()
        self.cells = kind(WIDTH, 5, **options)
        self.out = nn.LazyLinear(C)

    def forward(self, x: Tensor) -> Tensor:
        first = self.cells.batch_first
        outputs, states = self.cells(x if first else x.transpose(0, 1))
        outputs = outputs if first else outputs.transpose(0, 1)
        states = states if isinstance(states, tuple) else (states,)
        last = [state.transpose(0, 1).flatten(1) for state in states]
        found: Tensor = self.out(torch.cat([outputs.flatten(1), *last], -1))
        return found


class Stepwise(nn.Module):
    """A cell that the user's loop runs."""

    def __init__(self, kind: Callable[..., nn.Module], **options: Any) -> None:
        super().__init__()
        self.cell = kind(WIDTH, 5, **options)
        self.out = nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for row in x.unbind(1):
            state = self.cell(row, state)
        found: Tensor = self.out(state[0] if isinstance(state, tuple) else state)
        return found


class Encoder(nn.Module):
    """A stack of encoder layers, of which torch has a fast path in eval mode."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True, **options)
        # Nested tensors are for the fast path, which gradients leave.
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(WIDTH, C)

    def forward(self, x: Tensor) -> Tensor:
        padded = (torch.arange(x.shape[1]) > 2).expand(len(x), -1)
        found: Tensor = self.out(self.encoder(x, src_key_padding_mask=padded)[:, 0])
        return found


class Translator(nn.Module):
    """An encoder, and a decoder that looks at it."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Transformer(WIDTH, 2, 1, 1, 8, batch_first=True)
        self.out = nn.Linear(WIDTH, C)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]).to(x)
        found: Tensor = self.out(self.both(x, x.tanh(), tgt_mask=mask).mean(1))
        return found


ATTENTION: dict[str, Callable[[], nn.Module]] = {
    **{
        f"attention, {call}": partial(Attention, call)
        for call in (
            "self",
            "fast",
            "each head",
            "padding",
            "causal",
            "both masks",
            "a mask a head",
            "two calls",
        )
    },
    "attention, cross": partial(Attention, "cross", kdim=4, vdim=4),
    "attention, cross, packed": partial(Attention, "cross", kdim=WIDTH, vdim=WIDTH),
    "attention, positions first": partial(Attention, batch_first=False),
    "attention, no bias": partial(Attention, bias=False),
    "encoder": Encoder,
    "encoder, norm first": partial(Encoder, norm_first=True, activation="gelu"),
    "translator": Translator,
}
RECURRENT: dict[str, Callable[[], nn.Module]] = {
    f"{kind.__name__}, {name}": partial(Recurrent, kind, **options)
    for kind in (nn.LSTM, nn.GRU, nn.RNN)
    for name, options in {
        "plain": {},
        "no bias": {"bias": False},
        "deep, both ways": {
            "num_layers": 2,
            "bidirectional": True,
            "batch_first": True,
        },
    }.items()
}
RECURRENT |= {
    "LSTM, projected": partial(
        Recurrent, nn.LSTM, proj_size=3, num_layers=2, bidirectional=True
    ),
    "RNN, relu": partial(Recurrent, nn.RNN, nonlinearity="relu"),
    **{
        f"{kind.__name__}{'' if bias else ', no bias'}": partial(
            Stepwise, kind, bias=bias
        )
        for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
        for bias in (True, False)
    },
}
NETWORKS = ATTENTION | RECURRENT


def made(make: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net, x = make().to(DTYPE).eval(), torch.randn(N, POSITIONS, WIDTH, dtype=DTYPE)
    net(x)  # lazy layers
    return net, x


@pytest.mark.parametrize(
    ("share", "budget"),
    [(1.0, SMALL), (0.02, LARGE)],
    ids=["every weight, one observation at a time", "hardly any"],
)
@pytest.mark.parametrize("kind", NETWORKS)
def test_rows_are_dense_autograds(kind: str, share: float, budget: int) -> None:
    outputs = output_map(*made(NETWORKS[kind]), share=share, seed=1)
    factors = random_factors(outputs)
    assert not recording(outputs).tape.escaped
    found = rows_of(outputs, factors, "layered", budget)
    expected = dense_rows(outputs, factors)
    assert_close(found, expected, **CLOSE)
    squares = squared_columns(outputs, factors, budget)
    assert_close(squares, expected.square().sum((0, 1)), **CLOSE)


@pytest.mark.parametrize("kind", NETWORKS)
def test_values_are_those_of_torchs_own_functions(kind: str) -> None:
    """Also where a caller relies on how torch lays out what it returns."""
    outputs = output_map(*made(NETWORKS[kind]))
    recorded = Recording(outputs, whole=True).values
    for value, reference in zip(recorded, outputs.reference, strict=True):
        assert_close(value.detach(), reference, **CLOSE)


def test_a_weight_of_the_state_is_one_use_of_all_positions() -> None:
    outputs = output_map(*made(RECURRENT["LSTM, plain"]))
    uses = [use.weight.site for use in recording(outputs).tape.uses]
    assert len(uses) == len(set(uses)) == len(outputs.chosen)


class Packed(nn.Module):
    """Sequences of several lengths, packed."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.GRU(WIDTH, 5, batch_first=True)
        self.out = nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        lengths = 1 + torch.arange(len(x)) % POSITIONS
        packed = pack_padded_sequence(x, lengths, True, enforce_sorted=False)
        outputs, _ = pad_packed_sequence(self.cells(packed)[0], batch_first=True)
        found: Tensor = self.out(outputs.sum(1))
        return found


class Unbatched(nn.Module):
    """Attention among the data themselves, which are its positions."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(WIDTH, 2)
        self.out = nn.Linear(WIDTH, C)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean(1)
        found: Tensor = self.out(self.attend(x, x, x)[0])
        return found


@pytest.mark.parametrize(
    ("make", "layer"),
    [
        (partial(Attention, add_bias_kv=True), "attend"),
        (partial(Attention, add_zero_attn=True), "attend"),
        (Unbatched, "attend"),
        (Packed, "cells"),
    ],
    ids=["extra bias", "extra zeros", "unbatched", "packed"],
)
def test_what_is_not_written_out_takes_another_route(
    make: Callable[[], nn.Module], layer: str
) -> None:
    outputs = output_map(*made(make), share=0.5)
    factors = random_factors(outputs)
    escaped = recording(outputs).tape.escaped
    assert escaped == {site for site in outputs.chosen if site.startswith(layer)}
    found = rows_of(outputs, factors, None, LARGE)
    assert_close(found, dense_rows(outputs, factors), **CLOSE)


class Started(nn.Module):
    """A recurrent layer, or cell, that starts at a learned state."""

    def __init__(self, cells: nn.Module, num_states: int) -> None:
        super().__init__()
        self.cells, self.out = cells, nn.Linear(5, C)
        self.start = nn.ParameterList([torch.randn(1, 1, 5) for _ in range(num_states)])

    def forward(self, x: Tensor) -> Tensor:
        start = [each.expand(1, len(x), 5) for each in self.start]
        if not isinstance(self.cells, nn.RNNBase):
            start = [each[0] for each in start]
            x = x[:, 0]
        state = start[0] if len(start) == 1 else tuple(start)
        outputs = self.cells(x, state)
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        found: Tensor = self.out(outputs[:, -1] if outputs.ndim > 2 else outputs)
        return found


class Biased(nn.Module):
    """Attention with a learned score for each pair of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.scores = nn.Parameter(torch.randn(POSITIONS, POSITIONS))
        self.out = nn.Linear(WIDTH, C)

    def forward(self, x: Tensor) -> Tensor:
        attended = self.attend(x, x, x, attn_mask=self.scores)[0]
        found: Tensor = self.out(attended.mean(1))
        return found


@pytest.mark.parametrize(
    ("make", "escaped"),
    [
        (lambda: Started(nn.GRU(WIDTH, 5, batch_first=True), 1), {"start.0"}),
        (
            lambda: Started(nn.LSTM(WIDTH, 5, batch_first=True), 2),
            {"start.0", "start.1"},
        ),
        (lambda: Started(nn.RNNCell(WIDTH, 5), 1), {"start.0"}),
        (lambda: Started(nn.LSTMCell(WIDTH, 5), 2), {"start.0", "start.1"}),
        (Biased, {"scores"}),
    ],
    ids=["GRU", "LSTM", "RNNCell", "LSTMCell", "attention"],
)
def test_what_a_layer_takes_as_it_is_escapes_by_itself(
    make: Callable[[], nn.Module], escaped: set[str]
) -> None:
    outputs = output_map(*made(make), share=0.7)
    factors = random_factors(outputs)
    assert recording(outputs).tape.escaped == escaped
    found = rows_of(outputs, factors, None, LARGE)
    assert_close(found, dense_rows(outputs, factors), **CLOSE)
