r"""Sums of :math:`J_n^\top \Lambda_n J_n` over the data of one call."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from pyro_subnet.curvature.jacobian.output_map import Factors, OutputMap
from pyro_subnet.curvature.jacobian.route import (
    Route,
    jacobian_blocks,
    squared_columns,
)
from pyro_subnet.triangular import add_gram_

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
