"""SWAG (Maddox et al., 2019): a normal distribution from the iterates of SGD."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.paper.members import Members, Schedule, batches, loss_of
from benchmarks.selectors.data import Pairs
from benchmarks.selectors.network import largest_curvature
from pyro_subnet.selection import SwagMoments

# Step sizes in units of the inverse of the loss's largest curvature, and what the
# covariance is multiplied by: held-out data choose among all pairs.
STEPS = (0.05, 0.2, 0.8)
SCALES = tuple(10 ** (power / 2) for power in range(-4, 9))
RANK = 20
_BATCH, _FOR_CURVATURE = 32, 1000


@dataclass(frozen=True, eq=False)
class Swag:
    """The distribution that was chosen.

    Attributes:
        moments: Mean and variances of the iterates.
        draws: Networks from it.
        scale: What its covariance is multiplied by.
        step: Of SGD, in units of the inverse of the largest curvature.
        loss: Its held-out negative log density.
    """

    moments: SwagMoments
    draws: Members
    scale: float
    step: float
    loss: float


def swag(
    start: Members,
    train_part: Pairs,
    held_out: Pairs,
    num_steps: int,
    *,
    num_draws: int,
    generator: torch.Generator,
) -> Swag:
    """Runs SGD at each step size at once, and chooses on held-out data."""
    x, y = (part.float() for part in train_part)
    iterates = start[torch.zeros(len(STEPS), dtype=torch.int64)]
    members = Members(
        start.shape,
        tuple(part.clone().requires_grad_() for part in iterates.parameters),
        iterates.log_scale,
    )
    rates = torch.tensor(STEPS) / _curvature(start, (x, y))
    at = [SimpleNamespace(loc=vector) for vector in iterates.packed()]
    moments = [SwagMoments(each) for each in at]
    last: deque[Tensor] = deque(maxlen=RANK)
    schedule = Schedule(num_steps, _BATCH)
    every = max(1, num_steps // RANK)
    for step, rows in enumerate(batches(len(x), schedule, len(STEPS), generator), 1):
        loss = loss_of(members, members(x[rows]), y[rows], len(x)).sum()
        gradients = torch.autograd.grad(loss, members.parameters)
        with torch.no_grad():
            for part, gradient in zip(members.parameters, gradients, strict=True):
                part.sub_(rates.view(-1, 1, 1) * gradient)
            vectors = members.packed()
        for each, moment, vector in zip(at, moments, vectors, strict=True):
            if vector.isfinite().all():
                each.loc = vector
                moment.update()
        if step % every == 0:
            last.append(vectors)
    ways = [
        (place, scale)
        for place in range(len(STEPS))
        if vectors[place].isfinite().all()
        for scale in SCALES
    ]
    noise = (
        torch.randn(num_draws, vectors.shape[1], generator=generator),
        torch.randn(num_draws, len(last), generator=generator),
    )
    found = []
    for place, scale in ways:
        deviations = torch.stack(list(last))[:, place]
        draws = start.unpacked(_draw(moments[place], deviations, scale, noise))
        loss = _held_out(draws, held_out)
        found.append(Swag(moments[place], draws, scale, STEPS[place], loss))
    return min(found, key=lambda each: each.loss)


def _draw(
    moments: SwagMoments,
    iterates: Tensor,
    scale: float,
    noise: tuple[Tensor, Tensor],
) -> Tensor:
    r"""Weights: half of the covariance diagonal, half of the last iterates' rank.

    .. math:: \bar\theta + \sqrt{c} \left(\tfrac1{\sqrt2} \sigma \odot z_1
        + \tfrac1{\sqrt{2 (K - 1)}} D z_2\right)

    Source: Maddox et al. (2019), eq. 1, arXiv 1902.02476, with their scale c; the
    columns of D are deviations from the final mean, theirs from the running one.
    """
    mean = moments.mean
    deviations = iterates.double() - mean
    diagonal = moments.variance.sqrt() * noise[0].double() / 2**0.5
    low_rank = noise[1].double() @ deviations / (2 * max(1, len(iterates) - 1)) ** 0.5
    return (mean + scale**0.5 * (diagonal + low_rank)).float()


@torch.no_grad()
def _held_out(draws: Members, held_out: Pairs) -> float:
    """Negative log density of the mixture."""
    x, y = (part.float() for part in held_out)
    scale = draws.log_scale.exp().unsqueeze(-1)
    parts = torch.distributions.Normal(draws(x), scale, validate_args=False).log_prob(y)
    loss = math.log(len(parts)) - float(parts.logsumexp(0).mean())
    return loss if math.isfinite(loss) else math.inf


def _curvature(start: Members, data: Pairs) -> float:
    """Largest eigenvalue of the loss's Hessian, on some of the data."""
    x, y = (part[:_FOR_CURVATURE] for part in data)
    parameters = [part.clone().requires_grad_() for part in start.parameters]
    members = Members(start.shape, tuple(parameters), start.log_scale)
    loss = loss_of(members, members(x), y, len(data[0])).sum()
    return largest_curvature(loss, parameters, 0)
