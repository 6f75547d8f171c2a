"""Which weights a call's outputs were computed with last.

The model runs once, and every torch function is seen: of each tensor that comes from
the data it is known which weights were applied last on the way to it. What a function
makes of weights alone, such as the transpose of one, is still a weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_subnet.exceptions import SelectionError
from pyro_subnet.tensors.modes import differentiable
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.trace import preserved_rng

# Functions after which the weights before still count as the last ones: what they add,
# or scale a normed input with, is no layer.
_PASSING = frozenset(
    "add radd iadd sub rsub isub subtract layer_norm group_norm batch_norm rms_norm "
    "instance_norm".split()
)
_DERIVES = (
    "`LastLayer` must follow the outputs without derivatives; got a model that takes "
    "some by itself. Name the last layer's sites with `Sites([...])`."
)
_WRITES = frozenset({"setitem", "iadd", "isub", "imul", "itruediv"})


@final
@dataclass(frozen=True)
class LastWeights:
    """Latent sites by what they were last in the way to some tensor.

    Attributes:
        layers: Those of two or more dimensions that were multiplied or looked up.
        others: Those applied with them or after them: added, or without two dimensions.
        from_data: Whether the tensor comes from data; else it is made of these weights.
    """

    layers: frozenset[str] = frozenset()
    others: frozenset[str] = frozenset()
    from_data: bool = False

    def __or__(self, other: LastWeights) -> LastWeights:
        """What is last on either of two ways."""
        return LastWeights(
            self.layers | other.layers,
            self.others | other.others,
            self.from_data or other.from_data,
        )


def last_weights(call: ModelCall) -> LastWeights:
    """The weights that the outputs of a call were computed with last."""
    found = _follow(call, closures=False)
    # A model may read its data from around it, where they look like any constant.
    return found if found.layers else _follow(call, closures=True)


def _follow(call: ModelCall, *, closures: bool) -> LastWeights:
    leaves = {
        site: value.detach().clone().requires_grad_()
        for site, value in call.latents.values.items()
    }
    given = tree_leaves((call.args, dict(call.kwargs), dict(call.fixed)))
    data = [leaf for leaf in given if isinstance(leaf, Tensor)]
    flow = _Flow(leaves, data, closures=closures)
    # No derivative is taken: the graph shows what is computed, and holds no activation.
    holds_nothing = torch.autograd.graph.saved_tensors_hooks(lambda _: None, _no_value)
    with differentiable(), preserved_rng(), holds_nothing, flow:
        try:
            trace = call.run(leaves)
        except RuntimeError as error:  # of `torch.func.grad`, which takes no hooks
            if "saved tensor hooks" not in str(error):
                raise
            raise SelectionError(_DERIVES) from error
        outputs = [
            site.outputs(trace.nodes[site.name], [part])
            for site in call.sites
            for part in site.family.outputs(site.distribution.base)
        ]
    return flow.joined(outputs)


def _no_value(held: None) -> Tensor:
    raise SelectionError(_DERIVES)


@final
class _Flow(TorchFunctionMode):
    """Notes of every tensor which weights were applied last.

    Args:
        leaves: Unconstrained values of the latent sites.
        data: What the model was called with.
        closures: Whether constants of the model count as data too.
    """

    def __init__(
        self, leaves: Mapping[str, Tensor], data: Iterable[Tensor], *, closures: bool
    ):
        super().__init__()
        self._closures = closures
        self._known = WeakTensorKeyDictionary()
        for tensor in data:
            self._known[tensor] = LastWeights(from_data=True)
        for site, leaf in leaves.items():
            named = frozenset({site})
            own = LastWeights(named) if leaf.ndim > 1 else LastWeights(others=named)
            self._known[leaf] = own

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs a torch function, and notes what it did."""
        kwargs = kwargs or {}
        taken = _tensors((args, kwargs))
        known = [found for tensor in taken if (found := self._of(tensor)) is not None]
        result = func(*args, **kwargs)
        if known:
            name = getattr(func, "__name__", "")
            after = _applied(known, passing=name.strip("_") in _PASSING)
            for i, tensor in enumerate(_tensors(result)):
                # A distribution's parameters are made of one shape together.
                own = self._of(taken[i]) if name == "broadcast_tensors" else after
                if own is not None:
                    self._known[tensor] = own
            if name.strip("_") in _WRITES or name.removesuffix("_")[-1:] != name[-1:]:
                self._write(args[0], after)
        return result

    def joined(self, tensors: Iterable[Tensor]) -> LastWeights:
        """What is last on the way to any of some tensors."""
        found = LastWeights()
        for tensor in tensors:
            one = self._of(tensor)
            # A noise scale of its own is made of weights alone.
            if one is not None and one.from_data:
                found |= one
        return found

    def _of(self, tensor: Tensor) -> LastWeights | None:
        found = self._known.get(tensor)
        # What is written to a tensor after a view of it was made is in the view, too.
        if tensor._base is not None and (base := self._known.get(tensor._base)):
            found = base if found is None else found | base
        if found is None and tensor.grad_fn is not None:
            raise SelectionError(
                "`LastLayer` must see how the outputs are computed; got a value of "
                f"shape {tuple(tensor.shape)} from code that torch does not show, such "
                "as an `autograd.Function` or `torch.func`. Name the last layer's "
                "sites with `Sites([...])`."
            )
        if found is None and self._closures:
            return LastWeights(from_data=True)
        return found

    def _write(self, tensor: Tensor, after: LastWeights) -> None:
        """Adds what a tensor was changed to, in place, to what it and its base hold."""
        for changed in (tensor, tensor._base):
            if changed is not None:
                before = self._known.get(changed)
                self._known[changed] = after if before is None else before | after


def _applied(known: list[LastWeights], *, passing: bool) -> LastWeights:
    """What is last in the result of a function of tensors of which this is known."""
    weights, values = LastWeights(), LastWeights()
    for found in known:
        if found.from_data:
            values |= found
        else:
            weights |= found
    if not values.from_data:
        return weights
    if weights.layers and not passing:
        return LastWeights(weights.layers, weights.others, from_data=True)
    added = values.others | weights.layers | weights.others
    return LastWeights(values.layers, added, from_data=True)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
