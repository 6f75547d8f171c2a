"""Records where a model's chosen weights enter its layers.

The model runs as it stands. Every torch function that takes a chosen site's value is
seen: one with a rule leaves a :class:`Use` (its input, and the place in the graph at
which the gradient of its output arrives); one that only rearranges the value leaves an
alias; any other lets the site *escape*, and another route must serve it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final, no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from pyro_subnet.tensors.leaves import leaves_of

# How weights enter whose curvature has Kronecker factors: a layer multiplies inputs by
# matrices and adds vectors to the results, a sum only adds.
Affine = Literal["layer", "sum"]


class Entries(ABC):
    """Entries of J at the S chosen elements of one weight, at one of its uses."""

    @property
    @abstractmethod
    def held_bytes(self) -> int:
        """Bytes that it holds."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that it holds, and that one call takes."""

    @abstractmethod
    def __call__(self, delta: Float[Tensor, "rows ..."]) -> Float[Tensor, "batch s"]:
        """Entries for one gradient of the layer's output, in that output's shape."""

    def summed(self, delta: Float[Tensor, "rows ..."]) -> Float[Tensor, " s"]:
        """The same, summed over the data."""
        return self(delta).sum(0)

    @property
    @abstractmethod
    def part_columns(self) -> Int[Tensor, " parts"]:
        """Which of the S elements each of :meth:`parts` belongs to."""

    @abstractmethod
    def places(self, delta: Float[Tensor, "rows ..."]) -> Float[Tensor, "batch parts"]:
        """The one number of the gradient that each of :meth:`parts` multiplies."""

    @abstractmethod
    def parts(self, delta: Float[Tensor, "rows ..."]) -> Float[Tensor, "batch parts"]:
        """Products of one number of the gradient each, which entries are sums of."""

    def new_squares(self) -> Tensor:
        """An empty sum of squares for :meth:`add_squares_`, in a shape of its own."""
        return torch.zeros((), dtype=torch.float64)

    def add_squares_(self, total: Tensor, delta: Tensor) -> Tensor:
        """The sum with one gradient's squared entries; ``total`` may be overwritten."""
        return total + self(delta).square().sum(0)

    def squares(self, total: Tensor) -> Float[Tensor, " s"]:
        """Squared entries from that sum, summed over gradients and data."""
        return total


@final
@dataclass(frozen=True, eq=False)
class Weight:
    """A site's value, or a rearrangement of it, as a layer sees it."""

    site: str
    value: Tensor  # what the layer sees
    rearranged: Tensor | None = None  # flat positions within the site; None: as it is

    @property
    def index(self) -> Tensor:
        """Flat positions within the site, in the shape that the layer sees."""
        if self.rearranged is not None:
            return self.rearranged
        # Made where it is asked for: it takes twice the memory of the weights.
        value = self.value
        return torch.arange(value.numel(), device=value.device).view(value.shape)


@final
@dataclass(frozen=True, eq=False)
class Use:
    """One place at which a weight enters a layer."""

    weight: Weight
    edge: GradientEdge  # where the gradient of the layer's output arrives
    shape: torch.Size  # of that output
    inputs: tuple[tuple[Tensor, int], ...]  # that `entries` reads, with versions
    # From chosen flat positions in the layer's view of the weight, and how many data.
    entries: Callable[[Tensor, int], Entries]
    affine: Affine | None = None


# A rule takes the arguments and the result of a call. For each argument that may be a
# weight it gives what its entries read and how they follow; None if it does not apply.
Part = tuple[tuple[Tensor, ...], Callable[[Tensor, int], Entries]]
Rule = Callable[[Mapping[str, Any], Tensor], Mapping[str, Part] | None]


@final
@dataclass(frozen=True, eq=False)
class Layer:
    """A torch function that weights may enter."""

    parameters: Sequence[str]  # names of its arguments, in order
    rule: Rule
    affine: Affine | None = None

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The given arguments of a call by name."""
        return {**dict(zip(self.parameters, args, strict=False)), **kwargs}


# A function that is written out in layers: with the tape and its arguments, its result,
# or None for a form that is not.
Composite = Callable[..., Any]


@final
class Tape(TorchFunctionMode):
    """Watches where sites' values, the ``leaves``, go while it is entered."""

    def __init__(
        self,
        leaves: Mapping[str, Tensor],
        layers: Mapping[Any, Layer],
        rearrangements: frozenset[Any],
        composites: Mapping[Any, Composite],
    ):
        super().__init__()
        self.uses: list[Use] = []
        self.escaped: set[str] = set()  # sites with a use that no rule describes
        self._layers = layers
        self._rearrangements = rearrangements  # functions that only move elements
        self._composites = composites  # written out where a weight enters
        # By identity; the tensor is kept so that its identity stays its own.
        self._marked: dict[int, Weight] = {}
        for site, leaf in leaves.items():
            self._marked[id(leaf)] = Weight(site, leaf)

    # Called for each torch function of a run: checks at run time would take longer.
    @no_type_check
    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs a torch function, and notes what it did with marked tensors."""
        kwargs = kwargs or {}
        weights = [
            self._marked[id(leaf)]
            for arg in (*args, *kwargs.values())
            for leaf in leaves_of(arg)
            if id(leaf) in self._marked
        ]
        if weights and func in self._composites:
            result = self._composites[func](self, *args, **kwargs)
            if result is not None:
                return result
        result = func(*args, **kwargs)
        if weights and any(isinstance(leaf, Tensor) for leaf in leaves_of(result)):
            if not self._note(func, args, kwargs, result, len(weights)):
                self.escaped.update(weight.site for weight in weights)
        return result

    def let_escape(self, *tensors: Tensor | None) -> None:
        """Lets sites escape that a layer which is written out takes as they are."""
        found = (self._marked.get(id(tensor)) for tensor in tensors)
        self.escaped.update(weight.site for weight in found if weight is not None)

    def note(
        self,
        weight: Tensor,
        output: Tensor,
        inputs: tuple[Tensor, ...],
        entries: Callable[[Tensor, int], Entries],
    ) -> None:
        """Records a use in a layer that is written out, if the weight is marked.

        Args:
            weight: The weight.
            output: At which the gradient of what it gives arrives.
            inputs: What ``entries`` reads.
            entries: As of :class:`Use`.
        """
        if id(weight) not in self._marked:
            return
        own = self._marked[id(weight)]
        if weight.dtype != output.dtype:  # as under autocast
            self.escaped.add(own.site)
            return
        versions = tuple((tensor, tensor._version) for tensor in inputs)
        edge = get_gradient_edge(output)
        self.uses.append(Use(own, edge, output.shape, versions, entries, "layer"))

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
            # The same function moves the positions as it moved the values.
            weight = self._marked[id(args[0])]
            index = func(weight.index, *args[1:], **kwargs)
            if not isinstance(result, Tensor) or index.shape != result.shape:
                return False
            self._marked[id(result)] = Weight(weight.site, result, index)
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
            weight = self._marked[id(bound[name])]
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
