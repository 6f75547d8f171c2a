"""The Gram matrix of outputs' gradients that are held."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributions import Categorical, OneHotCategorical

from pyro_subnet.exceptions import PrecisionError
from pyro_subnet.tensors.triangular import add_gram_, mirror_
from pyro_subnet.tracing.output_site import OutputSite


def is_of_classes(site: OutputSite) -> bool:
    """Whether a site's outputs are the log-probabilities of classes."""
    return site.family.distribution in (Categorical, OneHotCategorical)


@final
class HeldRows(NamedTuple):
    """Gradients of some elements' outputs.

    Attributes:
        rows: J over the candidates, (elements, outputs, M).
        is_bounded: Whether what an element has to gain is bounded, as for classes.
    """

    rows: Float[Tensor, "elements outputs pool"]
    is_bounded: bool


@final
class HeldGram:
    r"""Gram matrix :math:`A = \sum_n (R_n J_n)^\top R_n J_n`.

    R is the identity, until weights are chosen. Where what an element has to gain is
    bounded it is then :math:`(I + V_n)^{-1}`, with V the covariance that these weights
    give its outputs: the trace of :math:`V (I + V)^{-1}` rises with dV by that of dV
    between two such factors.

    Args:
        held: The gradients.
        precision: P of the candidates, (M, M).
        sum_: Adds up what several processes hold, in place.
        is_whole: Whether these are all gradients, and not of a part of the data.

    Attributes:
        is_bounded: Whether R changes with what is chosen.
    """

    def __init__(
        self,
        held: Sequence[HeldRows],
        precision: Float[Tensor, "pool pool"],
        sum_: Callable[[Tensor], None],
        *,
        is_whole: bool = True,
    ):
        self._held, self._precision, self._sum_ = held, precision, sum_
        self._is_whole = is_whole
        bounded = self._zeros(1) + sum(each.is_bounded for each in held)
        sum_(bounded)
        self.is_bounded = bool((bounded > 0).any())
        self._factors: list[Tensor | None] = [None] * len(held)
        self._formed = self._form()

    def choose(self, at: Int[Tensor, " chosen"]) -> None:
        """Takes R to be what the chosen weights at these positions leave to gain."""
        # Costs T^2 operations a row of J.
        tril = lower_factor(self._precision[at][:, at])
        self._factors = [
            _left_to_gain(rows[:, :, at], tril) if is_bounded else None
            for rows, is_bounded in self._held
        ]
        self._formed = self._form()

    def diagonal(self) -> Float[Tensor, " pool"]:
        """The diagonal of A, float64."""
        if self._formed is not None:
            return self._formed.diagonal().clone()
        total = self._zeros(1)
        for (rows, _), factor in zip(self._held, self._factors, strict=True):
            left = rows if factor is None else factor.to(rows) @ rows
            total += left.square().sum((0, 1))
        self._sum_(total)
        return total[0]

    def rows(self, block: Int[Tensor, " block"]) -> Float[Tensor, "block pool"]:
        """Rows of A, float64."""
        if self._formed is not None:
            return self._formed[block]
        total = self._zeros(len(block))
        for (rows, _), factor in zip(self._held, self._factors, strict=True):
            own = rows[:, :, block]
            if factor is not None:
                own = (factor @ factor).to(own) @ own
            total += own.flatten(0, 1).mT @ rows.flatten(0, 1)
        self._sum_(total)
        return total

    def _form(self) -> Float[Tensor, "pool pool"] | None:
        """All of A where J is whole; else the rows asked for are fewer."""
        # In float64, twice as long as in float32, weights that are nearly alike are
        # told apart the same way whatever the order of the sum, and over ranks. Of a
        # part of the data that matters less.
        if not self._is_whole:
            return None
        total = self._zeros(len(self._precision))
        for (rows, _), factor in zip(self._held, self._factors, strict=True):
            wide = rows.to(torch.float64)
            left = wide if factor is None else factor @ wide
            add_gram_(total, left.flatten(0, 1))
        self._sum_(total)
        mirror_(total)
        return total

    def _zeros(self, count: int) -> Float[Tensor, "count pool"]:
        return self._precision.new_zeros(count, len(self._precision))


def _left_to_gain(
    own: Float[Tensor, "elements outputs chosen"], tril: Float[Tensor, "chosen chosen"]
) -> Float[Tensor, "elements outputs outputs"]:
    """:math:`(I + V)^{-1}`, float64, from J and the chosen weights' factor."""
    white = torch.linalg.solve_triangular(
        tril, own.flatten(0, 1).mT.to(tril), upper=False
    )
    roots = white.mT.unflatten(0, own.shape[:2])  # V = Q Q^T
    total = roots @ roots.mT
    total.diagonal(dim1=-2, dim2=-1).add_(1.0)
    return torch.linalg.inv(total)


def lower_factor(precision: Tensor) -> Tensor:
    """The Cholesky factor of a block's precision, given all blocks before."""
    factor, info = torch.linalg.cholesky_ex(precision)
    if int(info):
        smallest = float(torch.linalg.eigvalsh(precision)[0])
        raise PrecisionError(
            "The precision over the candidates must be positive definite; got smallest "
            f"eigenvalue {smallest:.3e} in a block of {len(precision)}. Train closer "
            "to the MAP, run the model in float64, or choose by diagonal scores."
        )
    return factor
