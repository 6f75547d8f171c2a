"""Running moments of the iterates of stochastic gradient descent."""

from __future__ import annotations

from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.exceptions import ModelError, NonFiniteError, SelectionError

MIN_UPDATES = 2  # a variance takes two values


@final
class SwagMoments:
    r"""Mean and variance of a guide's ``loc`` over the steps of a training run.

    Once the training has come near its optimum, call :meth:`update` every step or
    epoch, at a learning rate that keeps the iterates moving::

        moments = SwagMoments(guide)
        for _ in range(1000):
            svi.step(x, y)
            moments.update()
        guide = AutoSubnetLaplace(
            model,
            LargestVariance(0.05, estimator="swag", moments=moments),
            init_loc_fn=init_to_value(values=guide.median()),
        )

    With T iterates :math:`\theta_t`, after Welford and in float64,

    .. math:: \bar\theta = \tfrac1T \sum_t \theta_t, \qquad
        \sigma_j^2 = \tfrac1T \sum_t (\theta_{tj} - \bar\theta_j)^2

    An update costs one pass over ``loc``; memory is 2 D numbers.

    Args:
        guide: A guide whose parameter is ``loc``, such as
            :class:`~pyro_subnet.AutoSubnetLaplace`; it need not be set up yet. Read,
            never changed.

    Source: Maddox et al. (2019), section 3.2 (SWAG-Diagonal), arXiv 1902.02476. Theirs
    subtracts the squared mean from the mean square, which is equal up to round-off, and
    bounds variances from below, which ranking does not need.
    """

    def __init__(self, guide: Any):
        self._guide = guide
        self._count = 0
        self._mean: Tensor | None = None
        self._sum_of_squares: Tensor | None = None

    @torch.no_grad()
    def update(self) -> None:
        """Takes the guide's present ``loc`` into the moments.

        Raises:
            ModelError: If the guide is not set up.
            SelectionError: If ``loc`` has another length than before.
            NonFiniteError: If it is not finite; the moments stay as they were.
        """
        loc = getattr(self._guide, "loc", None)
        if not isinstance(loc, Tensor):
            raise ModelError(
                "The guide must be set up before its iterates are collected; got one "
                "without `loc`. Take an SVI step first."
            )
        iterate = loc.detach().to(torch.float64)
        if self._mean is None or self._sum_of_squares is None:
            self._mean = torch.zeros_like(iterate)
            self._sum_of_squares = torch.zeros_like(iterate)
        if iterate.shape != self._mean.shape:
            raise SelectionError(
                f"`loc` must keep its length, {len(self._mean)}; got {len(iterate)}. "
                "Make new `SwagMoments` for another guide."
            )
        bad = int((~iterate.isfinite()).sum())
        if bad:
            raise NonFiniteError(
                f"Iterates must be finite; got {bad} non-finite of {len(iterate)} "
                f"values at update {self._count + 1}. Lower the learning rate."
            )
        self._count += 1
        before = iterate - self._mean
        self._mean.add_(before, alpha=1 / self._count)
        self._sum_of_squares.addcmul_(before, iterate - self._mean)

    @property
    def count(self) -> int:
        """T, the number of iterates collected."""
        return self._count

    @property
    def mean(self) -> Float[Tensor, " params"]:
        """Mean of the iterates, unconstrained, shape (D,), float64.

        Raises:
            SelectionError: If there is no iterate.
        """
        if self._mean is None or not self._count:
            raise SelectionError(
                "A mean takes at least one update; got 0. Call `update()` after a step."
            )
        return self._mean.clone()

    @property
    def variance(self) -> Float[Tensor, " params"]:
        """Variances of the iterates (divided by T), shape (D,), float64.

        Raises:
            SelectionError: If there are fewer than two iterates.
        """
        if self._sum_of_squares is None or self._count < MIN_UPDATES:
            raise SelectionError(
                f"A variance takes at least {MIN_UPDATES} updates; got {self._count}. "
                "Call `update()` after every step or epoch of the end of training."
            )
        return self._sum_of_squares / self._count
