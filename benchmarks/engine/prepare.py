"""The network and data of a case: made once, then read by both sides.

Inputs are drawn from a seed: images are uniform noise in the shape of MNIST's or
CIFAR-10's, since neither library's work depends on what they show.

A Jacobian jumps where a ReLU's input is zero, or two pixels of a pool are equal. An
input so close to such a kink that float32 cannot tell its side has no one right
Jacobian: batches of another size give another one, in the same library. So inputs are
kept only if their gradient stays as it is when they are moved by a little more than
float32 resolves; what then differs by more than rounding is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.engine.cases import NOISE_SCALE, SEED, Case

_STEP = 1e-6  # by which inputs in (0, 1) are moved; float32 resolves 1e-7
_NUM_STEPS = 2
_MAX_CHANGE = 1e-4  # of the gradient, relative to its largest entry
_GROUP = 32  # inputs looked at together
_MAX_GROUPS = 500


@dataclass(frozen=True)
class Prepared:
    """What both sides start from.

    Attributes:
        net: The network, in eval mode.
        train: Inputs and targets of the fit.
        test: Inputs of the prediction.
    """

    net: nn.Module
    train: tuple[Tensor, Tensor]
    test: Tensor

    def to(self, device: torch.device) -> Prepared:
        """The same on a device."""
        x, y = self.train
        moved = (x.to(device), y.to(device))
        return Prepared(self.net.to(device), moved, self.test.to(device))


def prepare(case: Case) -> Prepared:
    """Makes a case's network and data.

    A case that nothing is compared with takes its inputs as they come.
    """
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    net = _network(case, _inputs(case, 32, generator))
    count = case.num_data + case.num_predict
    if case.backends:
        x = _smooth_inputs(case, net, count, generator)
    else:
        x = _inputs(case, count, generator)
    train, test = x.split([case.num_data, case.num_predict])
    return Prepared(net, (train, _targets(case, train, generator)), test)


def save(prepared: Prepared, path: Path) -> None:
    """Writes it all to a file."""
    x, y = prepared.train
    weights = prepared.net.state_dict()
    torch.save({"net": weights, "x": x, "y": y, "test": prepared.test}, path)


def load(case: Case, path: Path) -> Prepared:
    """Reads the file, of the data as many as the case has."""
    found = torch.load(path)
    net = case.network()
    net.load_state_dict(found["net"])
    train = found["x"][: case.num_data], found["y"][: case.num_data]
    return Prepared(net.eval(), train, found["test"][: case.num_predict])


def _network(case: Case, x: Tensor) -> nn.Module:
    """The network as it is initialized, with statistics of x in its batch norms."""
    net = case.network()
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    if norms:
        for norm in norms:
            norm.momentum = 1.0  # keeps nothing of what was there
        with torch.no_grad():
            net.train()(x)
    return net.eval()


def _inputs(case: Case, count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, *case.input_shape, generator=generator)


def _targets(case: Case, x: Tensor, generator: torch.Generator) -> Tensor:
    if case.likelihood == "regression":
        mean = torch.sin(6 * x[:, : case.num_outputs])
        return mean + NOISE_SCALE * torch.randn(mean.shape, generator=generator)
    return torch.randint(case.num_outputs, (len(x),), generator=generator)


def _smooth_inputs(
    case: Case, net: nn.Module, count: int, generator: torch.Generator
) -> Tensor:
    found: list[Tensor] = []
    for _ in range(_MAX_GROUPS):
        x = _inputs(case, min(_GROUP, 2 * count), generator)
        found.append(x[smooth(net, x, generator)])
        if sum(map(len, found)) >= count:
            return torch.cat(found)[:count]
    raise RuntimeError(f"{case.name}: too few inputs are clear of the network's kinks")


def smooth(net: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
    """Which inputs keep their gradient when they are moved a little, shape (N,)."""
    weights = torch.randn(len(net(x[:1])[0]), generator=generator)

    def gradient(at: Tensor) -> Tensor:
        at = at.requires_grad_()
        return torch.autograd.grad((net(at) @ weights).sum(), at)[0].flatten(1)

    base = gradient(x.clone())
    kept = torch.ones(len(x), dtype=torch.bool)
    for _ in range(_NUM_STEPS):
        step = _STEP * torch.randn(x.shape, generator=generator)
        for moved in (x + step, x - step):
            change = (gradient(moved) - base).abs().amax(1)
            kept &= change <= _MAX_CHANGE * base.abs().amax(1)
    return kept
