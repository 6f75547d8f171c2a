"""A network at its MAP, as a Pyro model, and iterates of SGD around it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from benchmarks.selectors.data import Split
from pyro_subnet.nn import bayesianize
from pyro_subnet.selection import SwagMoments

Model = Callable[..., None]

_LEARNING_RATE, _BATCH, _LARGE = 0.01, 500, 1200
_ROUNDS = 2  # of noise from held-out data and the MAP under it
# Of SGD for the moments: batch size, and the step in units of the inverse of the mean
# loss's largest curvature, beyond 2 of which descent would diverge.
_SWAG_BATCH, _SWAG_STEP, _POWER_STEPS = 32, 0.2, 30


@dataclass(frozen=True, eq=False)
class Trained:
    """A network at (close to) the MAP under N(0, 1) priors.

    Attributes:
        net: The network.
        model: It, in Pyro, with these priors and the noise fixed where it was fitted.
        noise_scale: That of the normal noise, standardized; None for classes.
    """

    net: nn.Sequential
    model: Model
    noise_scale: float | None

    @property
    def num_params(self) -> int:
        return sum(part.numel() for part in self.net.parameters())


def train(
    split: Split,
    make_network: Callable[[Split], nn.Sequential],
    num_steps: int,
    rounds: int = _ROUNDS,
) -> Trained:
    """The MAP, and for regression one noise scale.

    The log scale is a parameter like the weights at first; from there on, in turns, the
    noise is the RMSE on the held-out data, and the weights the MAP under it.

    Args:
        split: The data.
        make_network: An untrained network.
        num_steps: Of Adam.
        rounds: How many turns; with none the noise stays as it was learned.
    """
    with torch.random.fork_rng():
        torch.manual_seed(split.index)
        net = make_network(split)
    log_scale = torch.zeros((), dtype=split.train[0].dtype)
    if split.target_scale is None:
        _descend(net, split, log_scale, num_steps)
        return Trained(net.eval(), pyro_model(net, None), None)
    _descend(net, split, log_scale.requires_grad_(), num_steps)
    for _ in range(rounds):
        log_scale = held_out_rmse(net, split).log()
        _descend(net, split, log_scale, num_steps)
    scale = log_scale.exp().item()
    return Trained(net.eval(), pyro_model(net, scale), scale)


@torch.no_grad()
def held_out_rmse(net: nn.Module, split: Split) -> Tensor:
    x, y = split.held_out
    return (net(x).squeeze(-1) - y).square().mean().sqrt()


def _descend(net: nn.Module, split: Split, log_scale: Tensor, num_steps: int) -> None:
    """Adam on the log joint."""
    x, _ = split.train
    parameters = [*net.parameters(), log_scale]
    optimizer = torch.optim.Adam(
        [part for part in parameters if part.requires_grad], lr=_LEARNING_RATE
    )
    decay = 0.01 ** (1 / num_steps)  # the learning rate ends at a hundredth
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, decay)
    batch = len(x) if len(x) <= _LARGE else _BATCH
    for rows in _batches(len(x), batch, num_steps, split.index):
        optimizer.zero_grad()
        log_joint_loss(net, split, log_scale, rows).backward()
        optimizer.step()
        schedule.step()


def log_joint_loss(
    net: nn.Module, split: Split, log_scale: Tensor, rows: Tensor
) -> Tensor:
    """Negative log joint per training observation, estimated on some of them."""
    x, y = (part[rows] for part in split.train)
    if split.target_scale is None:
        loss = nn.functional.cross_entropy(net(x), y)
    else:
        errors = (net(x).squeeze(-1) - y) / log_scale.exp()
        loss = log_scale + 0.5 * errors.square().mean()
    penalty = parameters_to_vector(net.parameters()).square().sum()
    return loss + 0.5 * penalty / len(split.train[0])


def _batches(num_data: int, size: int, count: int, seed: int) -> Iterator[Tensor]:
    """Positions of each batch, in passes over shuffled data; all if one holds them."""
    generator = torch.Generator().manual_seed(seed)
    order: Tensor = torch.empty(0, dtype=torch.int64)
    for _ in range(count):
        if size >= num_data:
            yield torch.arange(num_data)
            continue
        if len(order) < size:
            order = torch.randperm(num_data, generator=generator)
        yield order[:size]
        order = order[size:]


def pyro_model(net: nn.Module, noise_scale: float | None) -> Model:
    bnn = bayesianize(net)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        outputs = bnn(x)
        with pyro.plate("data", len(x)):
            if noise_scale is None:
                pyro.sample("y", dist.Categorical(logits=outputs), obs=y)
            else:
                loc = outputs.squeeze(-1)
                pyro.sample("y", dist.Normal(loc, noise_scale), obs=y)

    return model


def sgd_moments(trained: Trained, split: Split, num_steps: int) -> SwagMoments:
    """Moments of plain SGD's iterates from the MAP on, in minibatches.

    The network itself stays at the MAP.
    """
    net = copy.deepcopy(trained.net)
    log_scale = torch.tensor(
        math.log(trained.noise_scale or 1.0), dtype=split.train[0].dtype
    )
    everything = torch.arange(len(split.train[0]))
    parameters = list(net.parameters())
    loss = log_joint_loss(net, split, log_scale, everything)
    step = _SWAG_STEP / largest_curvature(loss, parameters, split.index)
    optimizer = torch.optim.SGD(parameters, lr=step)
    # Sites are packed in the order of the parameters.
    iterate = SimpleNamespace(loc=parameters_to_vector(parameters))
    moments = SwagMoments(iterate)
    for rows in _batches(len(everything), _SWAG_BATCH, num_steps, split.index):
        optimizer.zero_grad()
        log_joint_loss(net, split, log_scale, rows).backward()
        optimizer.step()
        iterate.loc = parameters_to_vector(parameters)
        moments.update()
    return moments


def largest_curvature(loss: Tensor, parameters: list[Tensor], seed: int) -> float:
    """Largest eigenvalue, by magnitude, of a loss's Hessian, by the power method."""
    slopes = torch.autograd.grad(loss, parameters, create_graph=True)
    gradient = torch.cat([part.flatten() for part in slopes])
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(len(gradient), generator=generator, dtype=gradient.dtype)
    size = torch.ones(())
    for _ in range(_POWER_STEPS):
        product = torch.autograd.grad(
            gradient @ (vector / vector.norm()), parameters, retain_graph=True
        )
        vector = torch.cat([part.flatten() for part in product])
        size = vector.norm()
    return float(size)
