r"""Sums of :math:`J_n^\top \Lambda_n J_n` over the calls of a fit.

A sum is held as the posterior's form will hold it: as an S x S matrix, as the rows it
is the Gram matrix of, or as its diagonal. Kronecker factors are in ``kronecker.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.curvature.density_term import DensityTerm
from pyro_subnet.curvature.jacobian.output_map import Factors, OutputMap
from pyro_subnet.curvature.jacobian.route import jacobian_blocks, squared_columns
from pyro_subnet.curvature.prior import (
    PriorPrecision,
    prior_diagonal,
    prior_precision,
)
from pyro_subnet.curvature.scores import Watch
from pyro_subnet.curvature.sums import CurvatureSum, Summed
from pyro_subnet.exceptions import OptionError
from pyro_subnet.options import Curvature, FormName, HeldAs
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.memory import check_factor_fits, check_fits
from pyro_subnet.tensors.ranks import Ranks
from pyro_subnet.tensors.stored import check_stored
from pyro_subnet.tensors.triangular import add_gram_

# Blocks of fewer rows are put together before they are added: an update reads and
# writes the whole triangle, which takes longer than the products of a few rows, and
# every addition rounds (`add_gram_` says how far).
_FEW_ROWS = 256
# R x R matrices held at once: the kernel's factor C, and C + I during a solve.
_KERNEL_MATRICES = 2


@final
class GGNSum(CurvatureSum):
    r"""G as a matrix in its lower triangle, or as rows W with :math:`G = W^\top W`."""

    def __init__(self, size: int, like: Tensor, form: HeldAs):
        self.form = form
        self._size = size
        self._like = like
        self._rows: list[Tensor] = []
        self._total: Tensor | None = None

    def meet(self, prior: PriorPrecision, kind: Curvature) -> None:
        """See :meth:`CurvatureSum.meet`."""
        has_rows = kind != "hessian"
        if self.form == "primal" or (has_rows and prior.is_positive_diagonal):
            return
        if self.form == "dual":
            coupled = "a prior that couples weights or does not curve"
            found = coupled if has_rows else "an exact Hessian"
            raise OptionError(
                "`form='dual'` must have a Gauss-Newton curvature and a prior whose "
                f"precision is a positive diagonal; got {found}. Pass `form='primal'`."
            )
        self.form = "primal"

    def add(
        self,
        outputs: OutputMap,
        factors: Factors,
        weights: Tensor,
        budget: int,
        watch: Watch | None = None,
    ) -> None:
        """See :meth:`CurvatureSum.add`; ``watch`` is given every block of rows."""
        if self.form == "auto":
            # As soon as the rows cost more they turn into a matrix, and never back.
            held = sum(len(rows) for rows in self._rows)
            more = sum(factor.shape[0] * factor.shape[1] for factor in factors)
            if not dual_pays(held + more, self._size, self._like.dtype):
                self.form = "primal"
        if self.form == "primal":
            add_ggn_(self.matrix(), outputs, factors, budget, watch)
        else:
            self._check_rows_fit(
                sum(factor.shape[0] * factor.shape[1] for factor in factors)
            )
            for block in jacobian_blocks(outputs, factors, budget):
                if watch is not None:
                    watch(block)
                self._rows.append(block.rows.flatten(0, 1).to(torch.float64))

    def add_terms(
        self,
        terms: Sequence[DensityTerm],
        leaves: Mapping[str, Tensor],
        subnet: Subnet,
        budget: int,
    ) -> None:
        """See :meth:`CurvatureSum.add_terms`."""
        if self.form == "dual":
            raise OptionError(
                "`form='dual'` must have observed sites alone for data; got "
                f"`pyro.factor` site {terms[0].site!r} in the data's plate. Pass "
                "`form='primal'`, or observe the data by a distribution."
            )
        self.form = "primal"
        hessian = prior_precision(terms, leaves, subnet, budget)
        hessian.to(self._like.dtype).add_to_lower_(self.matrix(), 1.0)

    def _check_rows_fit(self, more: int) -> None:
        held = sum(len(rows) for rows in self._rows)
        # The new rows, all of them joined, and the kernel.
        kernel = _KERNEL_MATRICES * (held + more) ** 2
        check_fits(
            8 * (more * self._size + (held + more) * self._size + kernel),
            self._like.device,
            f"The rows and the R x R kernel of the dual form must fit in memory; got "
            f"R={held + more} and S={self._size}",
            "Pass `form='primal'`, an S x S factor, or fewer data.",
        )

    def matrix(self) -> Float[Tensor, "subnet subnet"]:
        """The S x S buffer of the sum, whose lower triangle may be added to."""
        if self._total is None:
            check_factor_fits(self._size, self._like.dtype, self._like.device)
            self._total = self._like.new_zeros(self._size, self._size)
            for rows in self._rows:
                add_gram_(self._total, rows.to(self._like))
            self._rows = []
        return self._total

    def join(self, ranks: Ranks) -> None:
        """See :meth:`CurvatureSum.join`: rows are gathered, where they still pay."""
        found = ranks.gathered((self.form, sum(len(rows) for rows in self._rows)))
        total = sum(count for _, count in found)
        pays = self.form == "dual" or dual_pays(total, self._size, self._like.dtype)
        if any(form == "primal" for form, _ in found) or not pays:
            self.form = "primal"
            with ranks.together():  # one rank may have less memory
                matrix = self.matrix()
            ranks.sum_lower_(matrix)
            return
        with ranks.together():
            self._check_rows_fit(total)
        none = self._like.new_zeros(0, self._size, dtype=torch.float64)
        self._rows = [ranks.rows(torch.cat([none, *self._rows]))]

    def finish(self, scale: float) -> Summed:
        """See :meth:`CurvatureSum.finish`."""
        if self.form == "primal" or (self.form == "auto" and not self._rows):
            matrix = self.matrix().mul_(scale)
            # A positive semidefinite matrix is zero where its diagonal is.
            return Summed("primal", matrix, not bool((matrix.diagonal() != 0).any()))
        rows = self._rows or [self._like.new_zeros(0, self._size, dtype=torch.float64)]
        joined = torch.cat(rows).mul_(scale**0.5)  # W^T W takes the scale itself
        return Summed("dual", joined, not bool((joined != 0).any()))

    def tensors(self) -> dict[str, Tensor]:
        """See :meth:`CurvatureSum.tensors`."""
        if self._total is not None:
            return {"total": self._total}
        # Rows stay in their blocks, so that what is added later rounds alike.
        return {f"rows.{i}": rows for i, rows in enumerate(self._rows)}

    def restore(self, form: HeldAs, tensors: Mapping[str, Tensor]) -> None:
        """See :meth:`CurvatureSum.restore`."""
        axes = {
            name: ("S", "S") if name == "total" else (name, "S") for name in tensors
        }
        if "total" not in tensors:
            axes = {f"rows.{i}": (f"R{i}", "S") for i in range(len(tensors))}
        types = {
            name: self._like.dtype if name == "total" else torch.float64
            for name in axes
        }
        check_stored(tensors, axes, types, {"S": self._size})
        self.form = form
        moved = {name: part.to(self._like.device) for name, part in tensors.items()}
        self._total = moved.get("total")
        rows = (
            [] if "total" in moved else [moved[f"rows.{i}"] for i in range(len(moved))]
        )
        self._rows = rows


@final
class DiagonalSum(CurvatureSum):
    """The diagonal of G in float64, so that sums over many data keep their digits."""

    form: FormName = "diagonal"

    def __init__(self, size: int, like: Tensor):
        self._total = like.new_zeros(size, dtype=torch.float64)

    def add(
        self, outputs: OutputMap, factors: Factors, weights: Tensor, budget: int
    ) -> None:
        """See :meth:`CurvatureSum.add`."""
        self._total = self._total + squared_columns(outputs, factors, budget)

    def add_terms(
        self,
        terms: Sequence[DensityTerm],
        leaves: Mapping[str, Tensor],
        subnet: Subnet,
        budget: int,
    ) -> None:
        """See :meth:`CurvatureSum.add_terms`."""
        self._total = self._total + subnet.gather(prior_diagonal(terms, leaves, budget))

    def join(self, ranks: Ranks) -> None:
        """See :meth:`CurvatureSum.join`."""
        ranks.sum_(self._total)

    def finish(self, scale: float) -> Summed:
        """See :meth:`CurvatureSum.finish`."""
        total = self._total * scale
        return Summed("diagonal", total, not bool((total != 0).any()))

    def tensors(self) -> dict[str, Tensor]:
        """See :meth:`CurvatureSum.tensors`."""
        return {"total": self._total}

    def restore(self, form: HeldAs, tensors: Mapping[str, Tensor]) -> None:
        """See :meth:`CurvatureSum.restore`."""
        own = {"total": self._total.dtype}
        check_stored(tensors, {"total": ("S",)}, own, {"S": len(self._total)})
        self._total = tensors["total"].to(self._total.device)


def add_ggn_(
    ggn: Float[Tensor, "subnet subnet"],
    outputs: OutputMap,
    factors: Factors,
    budget: int,
    watch: Watch | None = None,
) -> None:
    r"""Adds :math:`\sum_n w_n J_n^\top \Lambda_n J_n` of one call to a lower triangle.

    ``factors`` and ``budget`` are those of :meth:`CurvatureSum.add`; ``watch`` is given
    every block of rows.

    Source: Daxberger et al. (2021), eq. 4, arXiv 2010.14689.
    """
    few = ggn.new_empty(_FEW_ROWS, outputs.size)
    held = 0
    for block in jacobian_blocks(outputs, factors, budget):
        if watch is not None:
            watch(block)
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


def dual_pays(num_rows: int, size: int, dtype: torch.dtype) -> bool:
    """Whether the dual form costs no more than the S x S factor, in all that counts."""
    width = torch.finfo(dtype).bits // 8
    # Memory: R S float64 numbers and R x R matrices, against S^2 numbers.
    own_bytes = 8 * (num_rows * size + _KERNEL_MATRICES * num_rows**2)
    in_memory = own_bytes <= width * size**2
    # Float64 operations count twice against those of a float32 factor.
    weight = 8 // width
    # A fit: R^2 S + R^3/3, against R S^2 + S^3/3; both times three, for whole numbers.
    own_fit = weight * (3 * num_rows**2 * size + num_rows**3)
    fit = own_fit <= 3 * num_rows * size**2 + size**3
    # Each draw or whitened row: 4 R S + 2 R^2, against S^2. This decides nearly always,
    # at R about 0.22 S for a float64 factor and 0.12 S for a float32 one, where memory
    # and fit have long been cheaper.
    each_row = weight * (4 * num_rows * size + 2 * num_rows**2) <= size**2
    return in_memory and fit and each_row
