"""A network's copy, whatever a call left on it."""

from __future__ import annotations

import copy
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from pyro_subnet.exceptions import ModelError

_COPIED_BY_TORCH = {torch.strided, torch.sparse_coo}


def copied(net: nn.Module) -> nn.Module:
    """A deep copy of a network but for its frozen parameters, which are the network's.

    Tensors that a call kept on it become plain values.

    Args:
        net: The network; it is not changed.

    Returns:
        The copy.

    Raises:
        ModelError: If a layer has no shapes yet, a weight to train is complex, a
            scripted part has weights to train, or a part has no copy.
    """
    for name, parameter in net.named_parameters():
        if is_lazy(parameter):
            raise ModelError(
                f"A network must know its shapes; got lazy parameter {name!r}. Call it "
                "once, on a few data, and bayesianize it then."
            )
        if parameter.is_complex() and parameter.requires_grad:
            raise ModelError(
                "The weights of a network must be real numbers; got complex parameter "
                f"{name!r}. Hold its real and imaginary parts as parameters, joined by "
                "`torch.complex`, or freeze it."
            )
    for path, module in net.named_modules():
        trained = any(parameter.requires_grad for parameter in module.parameters())
        if isinstance(module, torch.jit.ScriptModule) and trained:
            raise ModelError(
                "A network must be of Python for its weights to be drawn; got the "
                f"TorchScript module {path or type(net).__name__!r}. Pass the network "
                "that was scripted or traced."
            )
    # A backbone may be large, quantized, or shared with others: it stays where it is.
    frozen = {id(p): p for p in net.parameters() if not p.requires_grad}
    with _WithoutGraphs():
        try:
            return copy.deepcopy(net, memo=frozen)
        # Whatever a network holds may refuse, with any error.
        except Exception as error:
            raise ModelError(
                "A network must have a deep copy; got none of attribute "
                f"{_what_refuses(net)} ({type(error).__name__}: {error}). Delete it, "
                "or set it to None."
            ) from error


@final
class _WithoutGraphs(TorchFunctionMode):
    """Copies tensors that a call has computed, as attention maps kept for later."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Copies the values of what torch refuses: with a graph, or sparse by rows."""
        if func is Tensor.__deepcopy__ and (
            not args[0].is_leaf or args[0].layout not in _COPIED_BY_TORCH
        ):
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = tensor.detach().clone()
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def _what_refuses(net: nn.Module) -> str:
    """The name of the first attribute that has no deep copy."""
    for path, module in net.named_modules():
        for name, value in vars(module).items():
            if name == "_modules":
                continue
            try:
                copy.deepcopy(value)
            except Exception:
                return repr(f"{path}.{name}".removeprefix("."))
    return repr(type(net).__name__)
