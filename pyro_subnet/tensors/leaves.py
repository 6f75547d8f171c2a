"""What nested containers hold, at little cost where there is no container."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, no_type_check

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# Types of what functions of torch mostly take beside tensors; none holds a tensor.
PLAIN = frozenset(
    {type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size}
)


# Called for each torch function of a run: checks at run time would take longer.
@no_type_check
def leaves_of(value: Any) -> Sequence[Any]:
    """Leaves of nested containers; the value itself, where it is none."""
    # A tree takes much longer to flatten than its parts to look at.
    if isinstance(value, Tensor) or type(value) in PLAIN:
        return (value,)
    return tree_leaves(value)
