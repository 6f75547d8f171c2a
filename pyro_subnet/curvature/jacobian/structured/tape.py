r"""Records where a model's chosen weights enter its layers.

The model runs as it stands. Every torch function that takes a chosen site's value is
seen: one with a rule leaves a :class:`Use` (its input, and the place in the graph at
which the gradient of its output arrives); one that only rearranges the value leaves an
alias; any other lets the site *escape*, and another route must serve it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pyro_subnet.curvature.jacobian.structured.entries import Entries

Affine = Literal["layer", "sum"]


@dataclass(frozen=True, eq=False)
class Weight:
    """A site's value, or a rearrangement of it, as a layer sees it.

    Attributes:
        site: Name of the site.
        index: Flat positions within the site, in the shape that the layer sees.
        as_is: Whether it is the site's value, not a rearrangement.
    """

    site: str
    index: Tensor
    as_is: bool = False


@dataclass(frozen=True, eq=False)
class Use:
    """One place at which a weight enters a layer.

    Attributes:
        weight: The weight.
        edge: Where the gradient of the layer's output arrives.
        shape: Shape of that output.
        inputs: Tensors that ``entries`` reads, and their versions when recorded.
        entries: From the chosen flat positions of the weight, as the layer sees it, and
            the number of data to the entries of J.
        affine: See :class:`Layer`.
    """

    weight: Weight
    edge: GradientEdge
    shape: torch.Size
    inputs: tuple[tuple[Tensor, int], ...]
    entries: Callable[[Tensor, int], Entries]
    affine: Affine | None = None


# What a rule makes of a call: for each argument that may be a weight, what its entries
# read, and how they follow; None if it does not serve this call.
Part = tuple[tuple[Tensor, ...], Callable[[Tensor, int], Entries]]
Rule = Callable[[Mapping[str, Any], Tensor], Mapping[str, Part] | None]


@dataclass(frozen=True, eq=False)
class Layer:
    """A torch function that weights may enter.

    Attributes:
        parameters: Names of its arguments, in order.
        rule: How entries of J follow.
        affine: How weights enter whose curvature has Kronecker factors: ``"layer"``,
            it multiplies inputs by matrices and adds vectors to the results; ``"sum"``,
            it adds alone.
    """

    parameters: Sequence[str]
    rule: Rule
    affine: Affine | None = None

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of a call by name.

        Args:
            args: Positional arguments.
            kwargs: Keyword arguments.

        Returns:
            Those that were given.
        """
        return {**dict(zip(self.parameters, args, strict=False)), **kwargs}


class Tape(TorchFunctionMode):
    """Watches where marked tensors go while it is entered.

    Args:
        leaves: ``{site: value}``, tensors that need gradients.
        layers: What is known about torch functions.
        rearrangements: Functions that give elements other places and do no more.

    Attributes:
        uses: What was recorded.
        escaped: Sites that were used in a way that no rule describes.
    """

    def __init__(
        self,
        leaves: Mapping[str, Tensor],
        layers: Mapping[Any, Layer],
        rearrangements: frozenset[Any],
    ):
        super().__init__()
        self.uses: list[Use] = []
        self.escaped: set[str] = set()
        self._layers = layers
        self._rearrangements = rearrangements
        # By identity; the tensor is kept so that its identity stays its own.
        self._marked: dict[int, tuple[Tensor, Weight]] = {}
        for site, leaf in leaves.items():
            index = torch.arange(leaf.numel(), device=leaf.device).view(leaf.shape)
            self._marked[id(leaf)] = (leaf, Weight(site, index, as_is=True))

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs a torch function, and notes what it did with marked tensors."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        weights = [
            self._marked[id(leaf)][1]
            for leaf in tree_leaves((args, kwargs))
            if id(leaf) in self._marked
        ]
        if weights and any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            if not self._note(func, args, kwargs, result, len(weights)):
                self.escaped.update(weight.site for weight in weights)
        return result

    def settle(self) -> None:
        """Lets sites escape whose recorded inputs were changed in place afterwards."""
        for use in self.uses:
            if any(tensor._version != version for tensor, version in use.inputs):
                self.escaped.add(use.weight.site)
        self.uses = [use for use in self.uses if use.weight.site not in self.escaped]

    def _note(
        self, func: Any, args: tuple[Any, ...], kwargs: Any, result: Any, count: int
    ) -> bool:
        """Records a call that takes ``count`` marked tensors; False if it cannot."""
        if func in self._rearrangements and count == 1 and id(args[0]) in self._marked:
            weight = self._marked[id(args[0])][1]
            index = func(weight.index, *args[1:], **kwargs)
            if not isinstance(result, Tensor) or index.shape != result.shape:
                return False
            self._marked[id(result)] = (result, Weight(weight.site, index))
            return True
        layer = self._layers.get(func)
        if layer is None or not _differentiable(result):
            return False
        bound = layer.bind(args, kwargs)
        names = [name for name, value in bound.items() if id(value) in self._marked]
        parts = layer.rule(bound, result) if len(names) == count else None
        if parts is None or not set(names) <= set(parts):
            return False
        edge = get_gradient_edge(result)
        for name in names:
            inputs, entries = parts[name]
            weight = self._marked[id(bound[name])][1]
            if bound[name].dtype != result.dtype:  # as under autocast
                return False
            versions = tuple((tensor, tensor._version) for tensor in inputs)
            self.uses.append(
                Use(weight, edge, result.shape, versions, entries, layer.affine)
            )
        return True


def _differentiable(result: Any) -> bool:
    return (
        isinstance(result, Tensor)
        and result.requires_grad
        and not torch._C._functorch.is_functorch_wrapped_tensor(result)
    )
