"""Attention and recurrent layers, written out in layers whose first axis is the data's.

Torch runs each as one function, with positions before data within. Here the same values
come of ``F.linear`` on (data, positions, features). A form that is not written out is
left to another route.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_subnet.curvature.jacobian.structured.entries import (
    broadcast,
    linear_entries,
)
from pyro_subnet.curvature.jacobian.structured.tape import Composite, Tape

# From what the inputs and the last output give to all gates, side by side, and the
# state: the next state, whose first part is the output.
Cell = Callable[[Tensor, Tensor, Sequence[Tensor]], tuple[Tensor, ...]]
_BATCHED = 3  # axes of a batch of sequences
_ATTENTION = inspect.signature(F.multi_head_attention_forward)
_NOT_WRITTEN_OUT = ("bias_k", "bias_v", "static_k", "static_v")


def _attention(tape: Tape, *args: Any, **kwargs: Any) -> Any:
    """``F.multi_head_attention_forward``, whose inputs are (positions, data, ...)."""
    bound = _ATTENTION.bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    drops = given["training"] and given["dropout_p"] > 0
    other = any(given[name] is not None for name in _NOT_WRITTEN_OUT)
    if drops or other or given["add_zero_attn"] or given["query"].ndim != _BATCHED:
        return None
    tape.let_escape(given["attn_mask"], given["key_padding_mask"])
    with tape:
        projected = _projected(given)
    q, k, v = (
        each.unflatten(-1, (given["num_heads"], -1)).transpose(1, 2)
        for each in projected
    )
    mask = _mask(given["attn_mask"], given["key_padding_mask"], q)
    weights = None
    if given["need_weights"]:
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        weights = (scores if mask is None else scores + mask).softmax(-1)
        attended = weights @ v
        if given["average_attn_weights"]:
            weights = weights.mean(1)
    else:
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    joined = attended.transpose(1, 2).flatten(2)
    with tape:
        out = F.linear(joined, given["out_proj_weight"], given["out_proj_bias"])
    return out.transpose(0, 1).contiguous(), weights


def _projected(given: dict[str, Any]) -> Sequence[Tensor]:
    """Queries, keys and values, (data, positions, features)."""
    inputs = [given[name] for name in ("query", "key", "value")]
    weight, bias = given["in_proj_weight"], given["in_proj_bias"]
    separate = given["use_separate_proj_weight"]
    if not separate and all(each is inputs[0] for each in inputs):
        return F.linear(inputs[0].transpose(0, 1), weight, bias).chunk(3, dim=-1)
    if separate:
        weights = [given[f"{letter}_proj_weight"] for letter in "qkv"]
    else:
        weights = _thirds(weight)
    biases = [None] * 3 if bias is None else _thirds(bias)
    return [
        F.linear(x.transpose(0, 1), own, shift)
        for x, own, shift in zip(inputs, weights, biases, strict=True)
    ]


def _thirds(packed: Tensor) -> list[Any]:
    """The rows of the query, the key and the value."""
    size = len(packed) // 3
    return [packed[start * size : (start + 1) * size] for start in range(3)]


def _mask(of_scores: Tensor | None, of_keys: Tensor | None, like: Tensor) -> Any:
    """What is added to scores, broadcastable to (data, heads, queries, keys)."""
    total: Any = None
    if of_scores is not None:
        total = _additive(of_scores, like)
        if total.ndim == _BATCHED:
            total = total.unflatten(0, (len(like), -1))
    if of_keys is not None:
        own = _additive(of_keys, like)[:, None, None]
        total = own if total is None else total + own
    return total


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)


def _lstm_cell(
    given: Tensor, kept: Tensor, state: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    i, f, g, o = (given + kept).chunk(4, dim=-1)
    cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def _gru_cell(
    given: Tensor, kept: Tensor, state: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    (r_x, z_x, n_x), (r_h, z_h, n_h) = given.chunk(3, -1), kept.chunk(3, -1)
    new = (n_x + (r_x + r_h).sigmoid() * n_h).tanh()
    return (new + (z_x + z_h).sigmoid() * (state[0] - new),)


def _tanh_cell(given: Tensor, kept: Tensor, _: Sequence[Tensor]) -> tuple[Tensor]:
    return ((given + kept).tanh(),)


def _relu_cell(given: Tensor, kept: Tensor, _: Sequence[Tensor]) -> tuple[Tensor]:
    return ((given + kept).relu(),)


@final
@dataclass(frozen=True, eq=False)
class _Sweep:
    """A recurrent layer in one of its directions."""

    cell: Cell
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None  # projects outputs
    backwards: bool

    @classmethod
    def of(
        cls, cell: Cell, weights: Sequence[Tensor], *, biases: bool, backwards: bool
    ) -> _Sweep:
        """Of its weights in torch's order."""
        w_ih, w_hh, *rest = weights
        b_ih, b_hh = rest[:2] if biases else (None, None)
        (w_hr,) = rest[2 if biases else 0 :] or (None,)
        return cls(cell, w_ih, w_hh, b_ih, b_hh, w_hr, backwards)

    def run(
        self, tape: Tape, x: Tensor, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Outputs, (data, positions, features), and the last state."""
        # Weights of the state enter at every position. Zeros are added to what they
        # give there, whose gradient is that of all positions:
        # J_(o,i) = sum_t delta_to h_(t-1)i
        with tape:
            given = F.linear(x, self.w_ih, self.b_ih)
        kept, projected = _zeros(x, self.w_hh), _zeros(x, self.w_hr)
        read, inner, outputs = list[Tensor](), list[Tensor](), list[Tensor]()
        rows = list(
            zip(given.unbind(1), kept.unbind(1), projected.unbind(1), strict=True)
        )
        for given_t, kept_t, projected_t in reversed(rows) if self.backwards else rows:
            read.append(state[0])
            of_state = F.linear(state[0], self.w_hh, self.b_hh) + kept_t
            state = self.cell(given_t, of_state, state)
            if self.w_hr is not None:
                inner.append(state[0])
                out = F.linear(state[0], self.w_hr) + projected_t
                state = (out, *state[1:])
            outputs.append(state[0])
        self._note(tape, self.w_hh, kept, read)
        if self.b_hh is not None:
            tape.note(self.b_hh, kept, (), broadcast(self.b_hh, kept.shape, None))
        if self.w_hr is not None:
            self._note(tape, self.w_hr, projected, inner)
        return self._stacked(outputs), state

    def _note(
        self, tape: Tape, weight: Tensor, zeros: Tensor, inputs: list[Tensor]
    ) -> None:
        rows = self._stacked(inputs).detach()
        tape.note(weight, zeros, (rows,), partial(linear_entries, rows, weight))

    def _stacked(self, rows: list[Tensor]) -> Tensor:
        return torch.stack(rows[::-1] if self.backwards else rows, dim=1)


def _zeros(x: Tensor, weight: Tensor | None) -> Tensor:
    """To be added to what a weight gives at each position."""
    width = 0 if weight is None else weight.shape[0]
    return x.new_zeros(*x.shape[:2], width).requires_grad_()


def _recurrent(
    cell: Cell, tape: Tape, x: Tensor, start: Any, weights: Any, *options: Any
) -> tuple[Tensor, ...] | None:
    """``torch.lstm`` and its like: outputs, and the state behind the last position."""
    if not isinstance(weights, list):  # a packed sequence has an argument more
        return None
    has_biases, num_layers, dropout, trains, both_ways, batch_first = options
    if x.ndim != _BATCHED or (trains and dropout > 0):
        return None
    states = start if isinstance(start, tuple) else (start,)
    tape.let_escape(*states)
    num_ways = 2 if both_ways else 1
    count = len(weights) // (num_layers * num_ways)
    rows = x if batch_first else x.transpose(0, 1)
    ends: list[tuple[Tensor, ...]] = []
    for _ in range(num_layers):
        outputs = []
        for way in range(num_ways):
            at = len(ends)
            own = weights[at * count : (at + 1) * count]
            sweep = _Sweep.of(cell, own, biases=has_biases, backwards=way == 1)
            out, end = sweep.run(tape, rows, tuple(each[at] for each in states))
            outputs.append(out)
            ends.append(end)
        rows = torch.cat(outputs, dim=-1)
    out = rows if batch_first else rows.transpose(0, 1).contiguous()
    return out, *(torch.stack(each) for each in zip(*ends, strict=True))


def _one_step(cell: Cell, tape: Tape, x: Tensor, start: Any, *weights: Any) -> Any:
    """``torch.lstm_cell`` and its like."""
    w_ih, w_hh, b_ih, b_hh = (*weights, None, None)[:4]
    state = (start,) if isinstance(start, Tensor) else tuple(start)
    tape.let_escape(*state)
    state = tuple(each.view_as(each) for each in state)
    with tape:
        given, kept = F.linear(x, w_ih, b_ih), F.linear(state[0], w_hh, b_hh)
    found = cell(given, kept, state)
    return found[0] if isinstance(start, Tensor) else found


COMPOSITES: dict[Any, Composite] = {
    F.multi_head_attention_forward: _attention,
    torch.lstm: partial(_recurrent, _lstm_cell),
    torch.gru: partial(_recurrent, _gru_cell),
    torch.rnn_tanh: partial(_recurrent, _tanh_cell),
    torch.rnn_relu: partial(_recurrent, _relu_cell),
    torch.lstm_cell: partial(_one_step, _lstm_cell),
    torch.gru_cell: partial(_one_step, _gru_cell),
    torch.rnn_tanh_cell: partial(_one_step, _tanh_cell),
    torch.rnn_relu_cell: partial(_one_step, _relu_cell),
}
