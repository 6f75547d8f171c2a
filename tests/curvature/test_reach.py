"""Rows of J at the weights that reach an output, against dense autograd in float64.

Where a place of a layer's output reaches several outputs there are no such rows.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from pyro_subnet.curvature.jacobian.output_map import OutputMap, identity_factors
from pyro_subnet.curvature.jacobian.structured.reach import reached_rows
from pyro_subnet.curvature.jacobian.structured.recording import NotLayered
from tests.curvature.test_layered import CLOSE, DTYPE, N, dense_rows, output_map

F, C = 12, 8
LARGE, SMALL = 2**30, 1  # budgets: all data at once, and one observation at a time


class Changed(nn.Module):
    """A linear layer, and what is made of its outputs and the inputs."""

    def __init__(self, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(F, C)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.layer(x), x)


class Heads(nn.Module):
    """Two heads, one of them a product and a sum, the other divided."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(F, 3)
        self.w = nn.Parameter(torch.randn(F, C))
        self.b = nn.Parameter(torch.randn(C))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x @ self.w + self.b, self.one(x) / 0.7], dim=-1)


class Shared(nn.Module):
    """A head whose two uses add up, and a scale of each output."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(F, C)
        self.scale = nn.Parameter(torch.rand(C))

    def forward(self, x: Tensor) -> Tensor:
        return (self.out(x) - self.out(x.flip(-1).square())) * self.scale


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(-1)


def at_positions(layer: nn.Module, channels: int) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (channels, -1)), layer)


def divided(z: Tensor, _: Tensor) -> Tensor:
    return 3.0 - z.flip(-1) / torch.arange(1, C + 1)


SERVED: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(F, C),
    "one output": lambda: nn.Linear(F, 1),
    "divided": lambda: Changed(divided),
    "zero at some data": lambda: Changed(lambda z, _: z.relu()),
    "by the inputs": lambda: Changed(lambda z, x: z * x[:, :C].cos()),
    "several elements": lambda: Changed(lambda z, _: z.unflatten(1, (2, 4)).mT),
    "heads": Heads,
    "shared": Shared,
    "tokens": lambda: at_positions(nn.Linear(3, C), 4),
    "pixels": lambda: at_positions(nn.Conv1d(4, 5, 1), 4),
    "pixels of one class": lambda: at_positions(nn.Conv1d(3, 1, 1), 3),
    "kernel": lambda: at_positions(nn.Conv1d(3, 5, 3, padding=1), 3),
    "groups": lambda: at_positions(nn.Conv1d(4, 6, 2, groups=2), 4),
    "transposed": lambda: at_positions(nn.ConvTranspose1d(3, 5, 2, stride=2), 3),
    "overlapping": lambda: at_positions(nn.ConvTranspose1d(3, 5, 3, padding=1), 3),
    "pooled": lambda: nn.Sequential(at_positions(nn.Conv1d(3, C, 2), 3), Mean()),
}


def inputs() -> Tensor:
    x = torch.randn(N, F, dtype=DTYPE)
    x[0] = 0.0  # where a weight moves nothing
    x[1:, 2] = 0.0
    return x


def dense(outputs: OutputMap) -> Tensor:
    """All rows of J by autograd, (N, rows of an observation, S)."""
    rows = dense_rows(outputs, identity_factors(outputs))
    return rows.reshape(outputs.num_data, -1, outputs.size)


def filled(outputs: OutputMap, budget: int) -> Tensor:
    """All rows of J from those at the weights that reach an output."""
    (shape,) = outputs.shapes
    count = shape[0] * shape[1] // outputs.num_data
    found = torch.zeros(outputs.num_data, count, outputs.size, dtype=DTYPE)
    for some in reached_rows(outputs, budget):
        block = torch.zeros(*some.rows.shape[:2], outputs.size, dtype=DTYPE)
        block[..., some.columns] = some.rows
        found[some.start : some.start + len(block), some.outputs] += block
    return found


@pytest.mark.parametrize("kind", SERVED)
@pytest.mark.parametrize(("budget", "share"), [(LARGE, 1.0), (SMALL, 0.3)])
def test_rows_are_dense_autograds(kind: str, budget: int, share: float) -> None:
    outputs = output_map(SERVED[kind](), inputs(), share)
    assert_close(filled(outputs, budget), dense(outputs), **CLOSE)


def test_one_observation() -> None:
    outputs = output_map(nn.Linear(F, C), inputs()[-1:], 1.0)
    assert_close(filled(outputs, LARGE), dense(outputs), **CLOSE)


def leaking(z: Tensor, x: Tensor) -> Tensor:
    """One observation's last logit holds a little of its first."""
    return torch.cat([z[:, :-1], z[:, -1:] + 1e-6 * (x[:, 3:4] > 2) * z[:, :1]], dim=1)


def coupled(z: Tensor, _: Tensor) -> Tensor:
    return z + 1e-6 * z.roll(1, 0)


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "one entry of one observation": lambda: Changed(leaking),
    "data": lambda: Changed(coupled),
    "a constant a row": lambda: Changed(lambda z, _: z.log_softmax(-1)),
    "no sum": lambda: Changed(lambda z, _: z - z.mean(-1, keepdim=True)),
    "a place twice": lambda: Changed(lambda z, _: torch.cat([z, 2 * z], -1)),
    "a hidden layer": lambda: nn.Sequential(
        nn.Linear(F, 3), nn.Tanh(), nn.Linear(3, C)
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_outputs_that_share_a_place_have_none(kind: str) -> None:
    x = inputs()
    x[:, 3] = torch.tensor([0.0, 0.0, 0.0, 3.0, 0.0])
    outputs = output_map(REFUSED[kind](), x, 1.0)
    with pytest.raises(NotLayered, match="layer"):
        filled(outputs, LARGE)


class Hooked(nn.Module):
    """A head with a gradient of one weight that is not its layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(F, C)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.out.weight.view(C, F)
        if weight.requires_grad:
            scale = torch.ones(C, F, dtype=DTYPE)
            scale[5, 7] = 1.001
            weight.register_hook(lambda gradient: gradient * scale)
        return nn.functional.linear(x, weight, self.out.bias)


def test_a_wrong_entry_is_found() -> None:
    outputs = output_map(Hooked(), inputs(), 1.0)
    with pytest.raises(NotLayered, match="couple data"):
        filled(outputs, LARGE)


@pytest.mark.parametrize("num_outputs", [4, 400])
def test_passes_do_not_grow_with_the_outputs(num_outputs: int) -> None:
    passes: list[float] = []

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(F, num_outputs)

        def forward(self, x: Tensor) -> Tensor:
            z = self.out(x) * 1.0
            if z.requires_grad:  # not batched: a number has no batch
                z.register_hook(lambda gradient: passes.append(gradient.sum().item()))
            return z

    outputs = output_map(Counted(), inputs(), 1.0)
    for _ in reached_rows(outputs, LARGE):
        pass
    assert len(passes) == 4
