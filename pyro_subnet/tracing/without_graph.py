"""Traces of models that differentiate themselves, without the graph that they leave."""

from __future__ import annotations

import copy
from typing import Any, final

from pyro import poutine
from torch import Tensor
from torch.distributions import Distribution, Transform
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only


def without_graph(trace: poutine.Trace) -> poutine.Trace:
    """The trace, with tensors that need gradients detached in place of themselves."""
    for node in trace.nodes.values():
        if any(leaf.requires_grad for leaf in _tensors(node["value"])):
            node["value"] = tree_map_only(Tensor, Tensor.detach, node["value"])
        fn = node.get("fn")
        if any(leaf.requires_grad for leaf in _tensors(fn)):
            with _Detaching():
                node["fn"] = copy.deepcopy(fn)
    return trace


def _tensors(value: Any) -> list[Tensor]:
    """Tensors of containers, and of distributions in distributions."""
    found, waiting, seen = list[Tensor](), [value], set[int]()
    while waiting:
        for leaf in tree_leaves(waiting.pop()):
            if isinstance(leaf, Tensor):
                found.append(leaf)
            # A transform and its inverse hold each other.
            elif isinstance(leaf, Distribution | Transform) and id(leaf) not in seen:
                seen.add(id(leaf))
                waiting.append(list(vars(leaf).values()))
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
