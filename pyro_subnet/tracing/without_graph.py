"""Traces of models that differentiate themselves, without the graph that they leave."""

from __future__ import annotations

import copy
from typing import Any, final

from pyro import poutine
from torch import Tensor
from torch.distributions import Distribution, Transform
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from pyro_subnet.tensors.leaves import PLAIN, leaves_of

_HOLDERS = (Distribution, Transform)


def without_graph(trace: poutine.Trace) -> poutine.Trace:
    """The trace, with tensors that need gradients detached in place of themselves."""
    nodes = trace.nodes.values()
    parts = [part for node in nodes for part in (node["value"], node.get("fn"))]
    if not any(leaf.requires_grad for leaf in _tensors(*parts)):
        return trace
    for node in nodes:
        if any(leaf.requires_grad for leaf in _tensors(node["value"])):
            node["value"] = tree_map_only(Tensor, Tensor.detach, node["value"])
        fn = node.get("fn")
        if any(leaf.requires_grad for leaf in _tensors(fn)):
            with _Detaching():
                node["fn"] = copy.deepcopy(fn)
    return trace


def _tensors(*values: Any) -> list[Tensor]:
    """Tensors of containers, and of distributions in distributions."""
    found, parts, seen = list[Tensor](), [*values], set[int]()
    for part in parts:  # grows
        if type(part) in PLAIN:
            continue
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, _HOLDERS):
            # A transform and its inverse hold each other.
            if id(part) not in seen:
                seen.add(id(part))
                parts += vars(part).values()
        else:
            parts += [leaf for leaf in leaves_of(part) if leaf is not part]
    return found


@final
class _Detaching(TorchFunctionMode):
    """Takes the graph off tensors that are copied; their numbers are shared."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs a torch function, or detaches where it would copy."""
        if func is Tensor.__deepcopy__:
            return args[0].detach()
        return func(*args, **(kwargs or {}))
