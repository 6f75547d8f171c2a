r"""Sums of :math:`J_n^\top \Lambda_n J_n` over the data of one call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.curvature.jacobian.output_map import Factors, OutputMap
from pyro_subnet.curvature.jacobian.route import (
    Route,
    jacobian_blocks,
    squared_columns,
)
from pyro_subnet.curvature.prior import PriorPrecision
from pyro_subnet.exceptions import OptionError
from pyro_subnet.gaussians.dual_curvature import dual_pays
from pyro_subnet.tensors.memory import check_factor_fits
from pyro_subnet.tensors.triangular import add_gram_

# How a curvature is asked for, and how it is held in the end.
Form = Literal["auto", "primal", "dual", "diagonal"]
Held = Literal["matrix", "rows", "diagonal"]

# Blocks of fewer rows are put together before they are added: an update reads and
# writes the whole triangle, which takes longer than the products of a few rows, and
# every addition rounds (`add_gram_` says how far).
_FEW_ROWS = 256


def add_ggn_(
    ggn: Float[Tensor, "subnet subnet"],
    outputs: OutputMap,
    factors: Factors,
    budget: int,
    route: Route | None = None,
) -> None:
    r"""Adds :math:`\sum_n w_n J_n^\top \Lambda_n J_n` of one call, in place.

    Only the lower triangle is read and written.

    Args:
        ggn: The sum so far in its lower triangle, shape (S, S), nats per parameter
            squared.
        outputs: The subnet's outputs in this call.
        factors: :math:`\sqrt{w_n} R_n` with :math:`R_n^\top R_n = \Lambda_n`, one
            (M, r, c) tensor a site.
        budget: Bytes of Jacobian and activations that may be held at once.
        route: Forces a Jacobian route; by default the cheapest right one.

    Source: Daxberger et al. (2021), eq. 4, arXiv 2010.14689.
    """
    few = ggn.new_empty(_FEW_ROWS, outputs.size)
    held = 0
    for block in jacobian_blocks(outputs, factors, budget, route):
        rows = block.rows.flatten(0, 1).to(ggn)
        if len(rows) >= _FEW_ROWS:
            add_gram_(ggn, rows)
            continue
        if held + len(rows) > _FEW_ROWS:
            add_gram_(ggn, few[:held])
            held = 0
        few[held : held + len(rows)] = rows
        held += len(rows)
    add_gram_(ggn, few[:held])


def ggn_diagonal(
    outputs: OutputMap, factors: Factors, budget: int
) -> Float[Tensor, " params"]:
    r"""Diagonal of :math:`\sum_n w_n J_n^\top \Lambda_n J_n`, without the matrix.

    Args:
        outputs: Outputs as a function of all D elements (or any subset).
        factors: As for :func:`add_ggn_`.
        budget: Bytes of Jacobian and activations that may be held at once.

    Returns:
        Shape (D,), float64: sums over many data keep their digits.
    """
    return squared_columns(outputs, factors, budget)


class GGNSum:
    r"""The sum :math:`\sum_n w_n J_n^\top \Lambda_n J_n`, in the form that is wanted.

    Attributes:
        form: Which: see :func:`~pyro_subnet.fit.sums.subnet_curvature`. ``"auto"``
            becomes one of the others once that is decided.
    """

    def __init__(self, size: int, like: Tensor, form: Form):
        self.form = form
        self._size = size
        self._like = like
        self._rows: list[Tensor] = []
        self._total: Tensor | None = None

    def meet(self, prior: PriorPrecision, kind: str) -> None:
        """Settles what the prior and the kind of curvature decide.

        Args:
            prior: P0.
            kind: Of the curvature; ``"hessian"`` has no rows.

        Raises:
            OptionError: If rows are asked for, and these have none.
        """
        positive = not prior.coupled.numel() and bool((prior.diagonal > 0).all())
        if self.form == "dual" and not (positive and kind != "hessian"):
            found = (
                "an exact Hessian"
                if kind == "hessian"
                else "a prior that couples weights or does not curve"
            )
            raise OptionError(
                "`form='dual'` must have a Gauss-Newton curvature and a prior whose "
                f"precision is a positive diagonal; got {found}. Pass `form='primal'`."
            )
        if self.form == "auto" and not (positive and kind != "hessian"):
            self.form = "primal"

    def add(self, outputs: OutputMap, factors: Factors, budget: int) -> None:
        """Adds one call.

        Args:
            outputs: The subnet's outputs in this call.
            factors: As for :func:`add_ggn_`.
            budget: Bytes of Jacobian and activations that may be held at once.
        """
        if self.form == "auto":
            held = sum(len(rows) for rows in self._rows)
            more = sum(factor.shape[0] * factor.shape[1] for factor in factors)
            if not dual_pays(held + more, self._size, self._like.dtype):
                self.form = "primal"
        if self.form == "diagonal":
            squares = ggn_diagonal(outputs, factors, budget)
            self._total = squares if self._total is None else self._total + squares
        elif self.form == "primal":
            add_ggn_(self.matrix(), outputs, factors, budget)
        else:
            for block in jacobian_blocks(outputs, factors, budget):
                self._rows.append(block.rows.flatten(0, 1).to(torch.float64))

    def matrix(self) -> Tensor:
        """The sum so far, to be added to in its lower triangle, shape (S, S).

        Returns:
            The buffer itself.

        Raises:
            MemoryLimitError: If it does not fit.
        """
        if self._total is None:
            check_factor_fits(self._size, self._like.dtype, self._like.device)
            self._total = self._like.new_zeros(self._size, self._size)
            for rows in self._rows:
                add_gram_(self._total, rows.to(self._like))
            self._rows = []
        return self._total

    def tensors(self) -> dict[str, Tensor]:
        """The sum so far, for files; with :attr:`form` it is all there is.

        Returns:
            ``{name: tensor}``, not copied. Rows stay in the blocks that they came in,
            so that what is added later rounds alike.
        """
        if self._total is not None:
            return {"total": self._total}
        return {f"rows.{i}": rows for i, rows in enumerate(self._rows)}

    def restore(self, form: Form, tensors: Mapping[str, Tensor]) -> None:
        """Undoes :meth:`tensors`.

        Args:
            form: What :attr:`form` was.
            tensors: What it gave; others are not read.
        """
        self.form = form
        moved = {name: part.to(self._like.device) for name, part in tensors.items()}
        self._total = moved.get("total")
        count = sum(name.startswith("rows.") for name in moved)
        self._rows = [moved[f"rows.{i}"] for i in range(count)]

    def finish(self, scale: float) -> tuple[Tensor, Held]:
        """The sum over all data.

        Args:
            scale: What the sum over the seen data is multiplied by.

        Returns:
            The sum, and how it is held.
        """
        if self.form == "diagonal":
            total = self._like.new_zeros(self._size, dtype=torch.float64)
            return (total if self._total is None else self._total) * scale, "diagonal"
        if self.form == "primal" or (self.form == "auto" and not self._rows):
            return self.matrix().mul_(scale), "matrix"
        rows = self._rows or [self._like.new_zeros(0, self._size, dtype=torch.float64)]
        return torch.cat(rows).mul_(scale**0.5), "rows"
