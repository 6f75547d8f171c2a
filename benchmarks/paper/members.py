"""Regression networks of one shape, stacked, so that all are trained at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.selectors.data import Pairs

Activation = Literal["relu", "tanh"]
_MODULES = {"relu": nn.ReLU, "tanh": nn.Tanh}


@dataclass(frozen=True, eq=False)
class Shape:
    """What a network looks like.

    Attributes:
        hidden: Units of each hidden layer.
        activation: After each of them.
    """

    hidden: tuple[int, ...]
    activation: Activation = "relu"

    def widths(self, num_inputs: int) -> list[tuple[int, int]]:
        """Inputs and outputs of each layer."""
        sides = (num_inputs, *self.hidden, 1)
        return list(pairwise(sides))

    def num_params(self, num_inputs: int) -> int:
        """D: weights and biases."""
        return sum((left + 1) * right for left, right in self.widths(num_inputs))


@dataclass(frozen=True, eq=False)
class Members:
    """M networks with one output and a noise scale each.

    Attributes:
        shape: Of every one.
        parameters: Weight (M, out, in) and bias (M, 1, out) of each layer in turn.
        log_scale: Logarithm of the noise's standard deviation, shape (M,).
    """

    shape: Shape
    parameters: tuple[Tensor, ...]
    log_scale: Tensor

    @classmethod
    def random(
        cls, shape: Shape, num_inputs: int, count: int, generator: torch.Generator
    ) -> Members:
        """As ``nn.Linear`` starts: uniform within 1 / sqrt(inputs)."""
        parameters = []
        for left, right in shape.widths(num_inputs):
            for size in ((count, right, left), (count, 1, right)):
                unit = 2 * torch.rand(size, generator=generator) - 1
                parameters.append(unit / left**0.5)
        return cls(shape, tuple(parameters), torch.zeros(count))

    def __call__(
        self,
        x: Tensor,
        rates: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Outputs, shape (M, B), of inputs (B, in), or (M, B, in) of each its own.

        Args:
            x: Inputs.
            rates: Of dropout after each hidden layer, shape (M,).
            generator: Of the units that are dropped.
        """
        count = len(self.log_scale)
        values = x if x.ndim == 3 else x.expand(count, *x.shape)
        for at in range(0, len(self.parameters), 2):
            if at:
                values = getattr(torch, self.shape.activation)(values)
                if rates is not None:
                    keep = (1 - rates).view(-1, 1, 1)
                    chance = torch.rand(values.shape, generator=generator)
                    values = values * (chance < keep) / keep
            weight, bias = self.parameters[at : at + 2]
            values = torch.baddbmm(bias, values, weight.mT)
        return values.squeeze(-1)

    def __getitem__(self, members: slice | Tensor) -> Members:
        return Members(
            self.shape,
            tuple(part[members] for part in self.parameters),
            self.log_scale[members],
        )

    def packed(self) -> Tensor:
        """All weights of each, in the order of ``module``'s parameters, (M, D)."""
        return torch.cat([part.flatten(1) for part in self.parameters], 1)

    def unpacked(self, vectors: Tensor) -> Members:
        """Networks of other weights, (M, D), and the first one's noise scale."""
        sizes = [part[0].numel() for part in self.parameters]
        parts = [
            values.reshape(-1, *part.shape[1:])
            for values, part in zip(
                vectors.split(sizes, 1), self.parameters, strict=True
            )
        ]
        return Members(
            self.shape, tuple(parts), self.log_scale[:1].expand(len(vectors))
        )

    def module(self, member: int) -> nn.Sequential:
        """One of them, in float64."""
        layers: list[nn.Module] = []
        for at in range(0, len(self.parameters), 2):
            weight, bias = (part[member] for part in self.parameters[at : at + 2])
            linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
            linear.weight.data.copy_(weight)
            linear.bias.data.copy_(bias[0])
            layers += [linear, _MODULES[self.shape.activation]()]
        return nn.Sequential(*layers[:-1]).eval()


@dataclass(frozen=True)
class Schedule:
    """How networks are trained.

    Attributes:
        num_steps: Of Adam.
        batch: Data of a step.
        learning_rate: Of the first step; the last one's is a hundredth. Ten times as
            much for the logarithm of the noise's scale, which of data without noise has
            a long way to go.
        every: Steps between looks at the held-out data; the best is kept. None: the
            last is.
        noise_scale: Standardized; None to learn it with the weights.
    """

    num_steps: int
    batch: int = 128
    learning_rate: float = 0.01
    every: int | None = 100
    noise_scale: float | None = None


def loss_of(members: Members, outputs: Tensor, y: Tensor, num_data: int) -> Tensor:
    """Negative log joint per observation of each, shape (M,), under N(0, 1) priors."""
    errors = (outputs - y) * torch.exp(-members.log_scale).unsqueeze(-1)
    penalty = members.packed().square().sum(1)
    return members.log_scale + 0.5 * errors.square().mean(1) + 0.5 * penalty / num_data


def train(
    start: Members,
    train_part: Pairs,
    held_out: Pairs,
    schedule: Schedule,
    *,
    rates: Tensor | None = None,
    generator: torch.Generator,
) -> Members:
    """The MAP of each, every one on batches of its own.

    Of the states that are looked at, each keeps the one of highest held-out density.
    """
    x, y = (part.float() for part in train_part)
    parameters = [part.clone().requires_grad_() for part in start.parameters]
    learned = schedule.noise_scale is None
    log_scale = start.log_scale.clone()
    if schedule.noise_scale is not None:
        log_scale.fill_(schedule.noise_scale).log_()
    log_scale.requires_grad_(learned)
    members = Members(start.shape, tuple(parameters), log_scale)
    groups = [{"params": parameters}]
    if learned:
        groups.append({"params": [log_scale], "lr": 10 * schedule.learning_rate})
    optimizer = torch.optim.Adam(groups, lr=schedule.learning_rate, fused=True)
    decay = 0.01 ** (1 / schedule.num_steps)
    best = Best(held_out)
    order = batches(len(x), schedule, len(log_scale), generator)
    for step, rows in enumerate(order, 1):
        optimizer.zero_grad()
        outputs = members(x[rows], rates, generator)
        loss_of(members, outputs, y[rows], len(x)).sum().backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= decay
        if schedule.every and step % schedule.every == 0:
            best.look(members)
    if best.members is not None:
        return best.members
    return Members(
        start.shape, tuple(part.detach() for part in parameters), log_scale.detach()
    )


class Best:
    """Of each network, the state of lowest held-out negative log density so far.

    Args:
        held_out: The data to look at.
    """

    def __init__(self, held_out: Pairs):
        self._x, self._y = (part.float() for part in held_out)
        self._loss = torch.tensor(float("inf"))
        self.members: Members | None = None

    @torch.no_grad()
    def look(self, members: Members) -> None:
        scale = members.log_scale.unsqueeze(-1)
        errors = (members(self._x) - self._y) * torch.exp(-scale)
        loss = members.log_scale + 0.5 * errors.square().mean(1)
        better = loss < self._loss
        self._loss = torch.where(better, loss, self._loss)

        def newer(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(better.view(-1, *[1] * (new.ndim - 1)), new, old)

        old = members if self.members is None else self.members
        pairs = zip(members.parameters, old.parameters, strict=True)
        self.members = Members(
            members.shape,
            tuple(newer(*pair) for pair in pairs),
            newer(members.log_scale, old.log_scale),
        )


def batches(
    num_data: int, schedule: Schedule, count: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Positions (M, B) of each step, in passes over data that each shuffles anew."""
    size = min(schedule.batch, num_data)
    order = torch.empty(count, 0, dtype=torch.int64)
    for _ in range(schedule.num_steps):
        if order.shape[1] < size:
            noise = torch.rand(count, num_data, generator=generator)
            order = noise.argsort(1)
        yield order[:, :size]
        order = order[:, size:]


def parse_hidden(variant: str) -> tuple[int, ...]:
    """``"2x50"`` as two layers of 50 units."""
    layers, units = map(int, variant.split("x"))
    return (units,) * layers
