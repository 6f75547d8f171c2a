r"""The data's gradient, against those that data drawn from the model would have.

A row of the weighted Jacobian is :math:`W_n = \sqrt{w_n} R_n J_n` with
:math:`R_n^\top R_n = \Lambda_n`. Of an observation's score
:math:`r_n = \nabla_\eta \log p` take u with
:math:`\sqrt{w_n} R_n^\top u_n = w_n r_n`: then :math:`\sum_n W_n^\top u_n` is the
gradient over the subnet, at no pass of its own. Were the data drawn from the
model at these weights, the u would be uncorrelated, of mean 0 and variance w: random
signs in their place show how large a gradient chance alone makes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.curvature.jacobian.output_map import Factors, JacobianBlock
from pyro_subnet.tensors.modes import at_least_float32
from pyro_subnet.tensors.ranks import Ranks

# Outputs of an element beyond which a solve in each costs more than it tells.
MAX_OUTPUTS = 100
# Gradients of random signs: their mean square has a standard error of 1/2 where one
# weight is determined, and less where more are.
_DRAWS = 8
_SEED = 20_106_896  # any serves; the global random state stays as it was
_RIDGE = 1e-12
# Our choice, between what was measured (`docs/errors.md` has the table): how many times
# what chance makes, and nats twice an element.
_TIMES, _TWICE_NATS = 6.0, 0.2
# Observed elements below which chance and training are not told apart.
_ENOUGH = 50
# A noise that is too small makes all scores large: up to five times is allowed for.
_LARGEST_SQUARE = 25.0

Watch = Callable[[JacobianBlock], None]


@final
@dataclass(frozen=True)
class Departure:
    r"""How far weights are from where the data would have them.

    Attributes:
        gain: Nats that a Newton step of the subnet would gain an observed element,
            :math:`\tfrac12 g^\top P^{-1} g` over their number.
        times: That, in multiples of what it is for data drawn from the model.
        is_far: Whether the weights seem not to be trained on the data.
    """

    gain: float
    times: float
    is_far: bool


@final
class ScoreSum:
    """The gradient of the log likelihood, and those of random signs, over a subnet."""

    def __init__(self, size: int, device: torch.device, rank: int = 0):
        # The data's own first.
        self._total = torch.zeros(size, 1 + _DRAWS, dtype=torch.float64, device=device)
        self._generator = torch.Generator(device).manual_seed(_SEED + rank)
        self._weight = 0.0  # sum of w over elements
        self._squares = 0.0  # sum of u^2 / w, none above the largest
        self._rank = 0

    def join(self, ranks: Ranks) -> None:
        """Adds up the sums of all ranks, whose signs are random apart."""
        ranks.sum_(self._total)
        own = self._weight, self._squares, self._rank
        weights, squares, counts = zip(*ranks.gathered(own), strict=True)
        self._weight, self._squares = sum(weights), sum(squares)
        self._rank = sum(counts)

    def watching(
        self, factors: Factors, scores: Factors, weights: tuple[Tensor, ...]
    ) -> Watch:
        r"""What adds one call's gradients, block by block of its rows.

        Args:
            factors: :math:`\sqrt{w} R` of each element, (M, r, c) an observed site.
            scores: :math:`w r` of each element, (M, c) an observed site.
            weights: w of each element, (M,) an observed site.

        Returns:
            What every block of the call's rows is to be given to.
        """
        columns = [
            self._columns(*site) for site in zip(factors, scores, weights, strict=True)
        ]

        def watch(block: JacobianBlock) -> None:
            rows = block.rows.flatten(0, 1)
            rows = rows.to(at_least_float32(rows.dtype))
            stop = block.start + len(block.rows)
            part = columns[block.site][block.start : stop].flatten(0, 1)
            # The few columns lie along the rows: four times faster than across them.
            self._total += (part.to(rows).mT @ rows).mT

        return watch

    def departure(
        self,
        whiten: Callable[[Tensor], Tensor],
        prior_gradient: Float[Tensor, " subnet"],
        scale: float,
    ) -> Departure:
        """How far the weights are from stationary, against chance.

        Args:
            whiten: The posterior's :meth:`Gaussian.whiten`.
            prior_gradient: Gradient of the log prior, shape (S,).
            scale: What the sums over the data are multiplied by.

        Returns:
            The lesser of the departures with and without the prior: one that pulls
            hard, or that training did not know, says nothing of the data.
        """
        own = scale * self._total[:, :1]
        pulled = own + prior_gradient.to(own).unsqueeze(1)
        # Data that stand for more are a random part, whose own gradient is not 0.
        chance = scale * self._total[:, 1:]
        gradients = torch.cat([pulled, own, chance], 1).mT
        decrements = whiten(gradients).double().square().sum(1)
        decrement = float(decrements[:2].min())
        by_chance = float(decrements[2:].mean())
        count = scale * self._weight
        too_small = max(1.0, self._squares / max(1, self._rank))
        far = decrement > _TIMES * too_small * by_chance
        if not count or not by_chance:  # nothing is seen, or nothing is moved
            return Departure(0.0, 0.0, False)
        gain, times = 0.5 * decrement / count, decrement / by_chance
        is_much = 2 * gain > _TWICE_NATS and self._weight >= _ENOUGH
        return Departure(gain, times, far and is_much)

    def _columns(self, root: Tensor, score: Tensor, weight: Tensor) -> Tensor:
        """u of each row, then its random signs, (M, r, 1 + draws), float64."""
        root, score, weight = root.double(), score.double(), weight.double()
        u = _solved(root, score)
        live = weight > 0
        squares = u[live].square() / weight[live].unsqueeze(-1)
        self._squares += float(squares.clamp(max=_LARGEST_SQUARE).sum())
        self._rank += squares.numel()
        self._weight += float(weight.sum())
        shape = (*u.shape, _DRAWS)
        drawn = torch.randint(2, shape, generator=self._generator, device=u.device)
        signs = weight.sqrt()[:, None, None] * (2 * drawn - 1)
        return torch.cat([u.unsqueeze(-1), signs], -1)


def _solved(root: Tensor, score: Tensor) -> Tensor:
    r"""Returns u of least length with :math:`A^\top u = r`, (M, r), for A (M, r, c)."""
    image = (root @ score.unsqueeze(-1)).squeeze(-1)
    if root.shape[1] == 1:
        square = root.square().sum(-1)
        return (image / square).where(square > 0, 0.0)
    gram = root @ root.mT
    # Outputs without information, such as a class of probability zero, have no score.
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    ridge = (_RIDGE * mean).where(mean > 0, 1.0)
    gram.diagonal(dim1=-2, dim2=-1).add_(ridge.unsqueeze(-1))
    factor, _ = torch.linalg.cholesky_ex(gram)
    return torch.cholesky_solve(image.unsqueeze(-1), factor).squeeze(-1)
