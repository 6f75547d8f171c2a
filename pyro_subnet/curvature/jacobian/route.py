"""Chooses how a Jacobian is computed: by what it costs, within a memory budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from pyro_subnet.curvature.jacobian.directional import forward_mode_agrees
from pyro_subnet.curvature.jacobian.general.full_batch import (
    column_blocks,
    forward_blocks,
    forward_bytes,
    reverse_blocks,
)
from pyro_subnet.curvature.jacobian.general.per_datum import (
    per_datum_blocks,
    separates_by_datum,
)
from pyro_subnet.curvature.jacobian.output_map import (
    Blocks,
    Factors,
    JacobianBlock,
    OutputMap,
)
from pyro_subnet.curvature.jacobian.plain import PlainRun, require_held_gradients
from pyro_subnet.curvature.jacobian.structured.recording import NotLayered
from pyro_subnet.curvature.jacobian.structured.rows import layered_blocks
from pyro_subnet.curvature.jacobian.structured.squares import layered_diagonal
from pyro_subnet.exceptions import RouteError
from pyro_subnet.tensors.modes import at_least_float32

Route = Literal["layered", "columns", "per-datum", "forward", "reverse"]

# A forward-mode direction costs about two forward passes of the call, a reverse-mode
# row about three (its forward, its two products backward).
_FORWARD_PASSES = 2
_REVERSE_PASSES = 3

_COMPARES = ContextVar("compares", default=False)
# So many elements are differentiated column by column, without forward mode.
_FEW_COLUMNS = 4
# A backward pass that is differentiated keeps its own tensors beside the forward's.
_GRAPHS_HELD = 3
_GENERAL = {
    "columns": column_blocks,
    "per-datum": per_datum_blocks,
    "forward": forward_blocks,
    "reverse": reverse_blocks,
}


def choose_route(outputs: OutputMap, factors: Factors, budget: int) -> Route:
    """The general route that is tried first."""
    return next(_general_routes(outputs, factors, budget))


def _general_routes(
    outputs: OutputMap, factors: Factors, budget: int
) -> Iterator[Route]:
    """General routes that may give right numbers, within the budget, cheapest first."""
    # The last one, reverse mode over the whole call, is right for any model.
    held = _GRAPHS_HELD * outputs.activation_bytes + forward_bytes(outputs)
    if outputs.size <= _FEW_COLUMNS and held <= budget:
        yield "columns"
    num_rows = sum(factor.shape[0] * factor.shape[1] for factor in factors)
    forward = _FORWARD_PASSES * outputs.size
    per_datum = _REVERSE_PASSES * num_rows / outputs.num_data
    forward_mode = forward_mode_agrees(outputs.outputs, outputs.loc)
    forward_serves = forward_mode and forward_bytes(outputs) <= budget
    forward_first = forward_serves and forward <= per_datum
    if forward_first:
        yield "forward"
    if separates_by_datum(outputs, budget, forward_mode):
        yield "per-datum"
    if forward_serves and not forward_first and forward <= _REVERSE_PASSES * num_rows:
        yield "forward"
    yield "reverse"


def jacobian_blocks(
    outputs: OutputMap,
    factors: Factors,
    budget: int,
    route: Route | None = None,
    run: PlainRun | None = None,
) -> Blocks:
    """Yields blocks of :math:`R J`, by the cheapest right route unless one is named.

    Of a ``run`` that is there they are its gradients.
    """
    # Together they hold every element of every site once, without an outer graph. One
    # data point is always done, whatever the budget.
    with torch.no_grad():
        blocks = _blocks(outputs, factors, budget, route, run)
        block = next(blocks, None)
    while block is not None:
        yield block
        with torch.no_grad():  # not across the yield: there it would be the caller's
            block = next(blocks, None)


def differentiable_blocks(outputs: OutputMap, factors: Factors, budget: int) -> Blocks:
    """Yields blocks of :math:`R J` that carry gradients to the data of the call."""
    # By a general route: the structured one keeps activations apart from their graph.
    # All blocks' graphs stay in memory until the caller drops them.
    with torch.no_grad():
        routes = [
            route
            for route in _general_routes(outputs, factors, budget)
            if route not in ("columns", "reverse")  # which keep no graph
        ]
    for route in routes:
        try:
            blocks = list(_GENERAL[route](outputs, factors, budget))
            require_held_gradients(outputs, factors, blocks)
        except Exception:  # the last route meets the same error if it is the model's
            continue
        yield from blocks
        return
    yield from reverse_blocks(outputs, factors, budget, create_graph=True)


def joined_rows(
    blocks: Blocks, num_sites: int, function: Callable[[Tensor], Tensor], dim: int = 0
) -> list[Tensor]:
    """What ``function`` makes of each block's rows, (m, r, S), joined site by site."""
    parts: list[list[Tensor]] = [[] for _ in range(num_sites)]
    for block in blocks:
        parts[block.site].append(function(block.rows))
    # A single result may be large, so it is not copied.
    return [own[0] if len(own) == 1 else torch.cat(own, dim=dim) for own in parts]


def squared_columns(outputs: OutputMap, factors: Factors, budget: int) -> Tensor:
    r"""Diagonal of :math:`(R J)^\top R J`, summed over all elements, (S,), float64."""
    general = partial(_general_squares, budget)
    with torch.no_grad():
        try:
            return layered_diagonal(outputs, factors, budget, general)
        except NotLayered:
            return general(outputs, factors)


@contextmanager
def compare_routes() -> Iterator[None]:
    """Computes every Jacobian by the structured and by a general route, and compares.

    Use it to find out whether a layer is differentiated as it should be. It is slow,
    and holds whole Jacobians in memory.

    ::

        with compare_routes():
            posterior = guide.laplace_approximation(x, y)

    Yields:
        Nothing; inside, disagreement raises a ``RouteError``.
    """
    token = _COMPARES.set(True)
    try:
        yield
    finally:
        _COMPARES.reset(token)


def _blocks(
    outputs: OutputMap,
    factors: Factors,
    budget: int,
    route: Route | None,
    run: PlainRun | None,
) -> Blocks:
    if route == "layered":
        yield from _layered_blocks(outputs, factors, budget)
    elif route is not None:
        yield from _GENERAL[route](outputs, factors, budget)
    else:
        general = _general_makers(outputs, factors, budget)
        first = [partial(_layered_blocks, outputs, factors, budget)]
        if run is not None and not _COMPARES.get():
            first.insert(0, partial(run.blocks, outputs, factors))
        yield from _first_held(chain(first, general), len(factors))


def _layered_blocks(outputs: OutputMap, factors: Factors, budget: int) -> Blocks:
    """Blocks by the structured route; general ones serve what it does not."""
    general = partial(_general_blocks, budget=budget)
    for block in layered_blocks(outputs, factors, budget, general):
        if _COMPARES.get():
            _compare(block, general(outputs, factors))
        yield block


def _general_squares(budget: int, outputs: OutputMap, factors: Factors) -> Tensor:
    total = torch.zeros(outputs.size, dtype=torch.float64, device=outputs.loc.device)
    for block in _general_blocks(outputs, factors, budget):
        rows = block.rows.flatten(0, 1).to(at_least_float32(block.rows.dtype))
        total += rows.square().sum(0)
    return total


def _general_blocks(outputs: OutputMap, factors: Factors, budget: int) -> Blocks:
    makers = _general_makers(outputs, factors, budget)
    return _first_held(makers, len(factors))


def _general_makers(
    outputs: OutputMap, factors: Factors, budget: int
) -> Iterator[Callable[[], Blocks]]:
    for route in _general_routes(outputs, factors, budget):
        yield partial(_GENERAL[route], outputs, factors, budget)


def _first_held(routes: Iterable[Callable[[], Blocks]], num_sites: int) -> Blocks:
    """Blocks of the first route that does not fail; what follows is the next one's."""
    # A route that refuses after some blocks, which are right, leaves the remaining
    # elements of every site to the next.
    done = [0] * num_sites
    failure: Exception | None = None
    for make in routes:
        try:
            for block in make():
                rest = _after(block, done[block.site])
                if rest is not None:
                    yield rest
                    done[block.site] += len(rest.rows)
            return
        except RouteError:  # asked for by `compare_routes`
            raise
        except Exception as error:  # the user's code may fail on a route in any way
            failure = error
    if failure is not None:
        raise failure


def _compare(block: JacobianBlock, others: Blocks) -> None:
    start, stop = block.start, block.start + len(block.rows)
    tolerance = 10 * torch.finfo(block.rows.dtype).eps ** 0.75
    for other in others:
        first, last = max(start, other.start), min(stop, other.start + len(other.rows))
        if other.site != block.site or first >= last:
            continue
        expected = other.rows[first - other.start : last - other.start]
        gap = (block.rows[first - start : last - start] - expected).abs()
        limit = tolerance * float(expected.abs().amax())
        if float(gap.amax()) > limit:
            row, rank, column = torch.unravel_index(gap.argmax(), gap.shape)
            raise RouteError(
                f"Both routes must give the same Jacobian to {limit:.1e}; got "
                f"{float(gap.amax()):.1e} between them at element "
                f"{first + int(row)} of observed site {block.site}, row {int(rank)}, "
                f"subnet element {int(column)}. Please report the layer that this "
                "weight enters."
            )


def _after(block: JacobianBlock, start: int) -> JacobianBlock | None:
    """The part of a block from element ``start`` of its site on."""
    skipped = max(0, start - block.start)
    if skipped >= len(block.rows):
        return None
    return JacobianBlock(block.site, block.start + skipped, block.rows[skipped:])
