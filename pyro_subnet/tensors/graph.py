"""Where an autograd graph leads, by its structure alone."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def leads_to(
    value: Tensor, leaves: Iterable[Tensor], past: Tensor | None = None
) -> bool:
    """Whether a value's graph leads to a leaf.

    Args:
        value: The value.
        leaves: Any of which counts.
        past: A tensor of the graph through which no way counts.

    Returns:
        Whether there is such a way.
    """
    wanted = {id(leaf) for leaf in leaves}
    closed = None if past is None else (past.grad_fn, past.output_nr)
    waiting, seen = [(value.grad_fn, value.output_nr)], set()
    while waiting:
        node, number = waiting.pop()
        if node is None or node in seen or (node, number) == closed:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in wanted:
            return True
        waiting.extend(node.next_functions)
    return False
