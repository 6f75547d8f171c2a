"""Runs a user's model apart from everything around it, and reads the trace."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial, reduce
from typing import Any, final

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro import poutine
from pyro.distributions.torch_distribution import (
    ExpandedDistribution,
    MaskedDistribution,
)
from pyro.infer.autoguide import AutoContinuous
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK, Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import (
    ComposeTransform,
    Independent,
    IndependentTransform,
    Transform,
    biject_to,
)
from torch.distributions.constraints import Constraint, independent
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_subnet.exceptions import ModelError
from pyro_subnet.options import ModelFactors
from pyro_subnet.subnet import Layout, Subnet
from pyro_subnet.tensors.modes import (
    at_least_float32,
    differentiable,
    one_thread_at_a_time,
    outside_inference_mode,
    without_autocast,
)
from pyro_subnet.tensors.plain_calls import plain_calls
from pyro_subnet.tracing.one_thread import OneThread
from pyro_subnet.tracing.plates import WidePlates
from pyro_subnet.tracing.scaled_model import ScaledModel
from pyro_subnet.tracing.without_graph import without_graph

Model = Callable[..., Any]
Node = dict[str, Any]
# Key of the node of the returned value: the model needs gradients on where it runs.
DIFFERENTIATES = "differentiates"
# What torch says of `autograd.grad` and `backward` where gradients are off.
_NO_GRAPH = "element 0 of tensors does not require grad"


@final
@dataclass(frozen=True, eq=False)
class Latents:
    """The latent sites at the MAP.

    Attributes:
        layout: Where they lie in the packed vector.
        transforms: From unconstrained to constrained values, one for each site, which
            are of the type that the model draws where that is not the type of ``loc``.
        loc: The MAP, packed, shape (D,), unconstrained.
    """

    layout: Layout
    transforms: Mapping[str, Transform]
    loc: Tensor

    @classmethod
    def from_guide(cls, guide: AutoContinuous, loc: Tensor) -> Latents:
        """The latent sites that a guide found when it was set up.

        Args:
            guide: A guide that was set up.
            loc: The MAP, packed, shape (D,).

        Returns:
            The latent sites, with ``loc`` detached.
        """
        own = types_of_sites(guide, loc.dtype)
        transforms = {
            name: _transform(node, loc.dtype, own[name])
            for name, node in guide.prototype_trace.iter_stochastic_nodes()
        }
        shapes = guide._unconstrained_shapes
        layout = Layout(tuple(shapes), tuple(shapes.values()))
        loc = loc.detach()
        if loc.is_inference():  # as of a guide that was copied in inference mode
            with outside_inference_mode():
                loc = loc.clone()
        return cls(layout, transforms, loc)

    @cached_property
    def values(self) -> Mapping[str, Tensor]:
        """The MAP of every site, unconstrained: views of the packed vector."""
        return self.layout.unpack(self.loc)

    @cached_property
    def at_map(self) -> Mapping[str, Tensor]:
        """The MAP of every site, as the model sees it."""
        with torch.no_grad():
            return self.constrain(self.values)

    @property
    def everything(self) -> Subnet:
        """The subnet of all D elements."""
        return Subnet.whole(self.layout, self.loc.device)

    def values_with(
        self, subnet: Subnet, theta: Float[Tensor, " subnet"]
    ) -> dict[str, Tensor]:
        """Values of all sites at one draw of a subnet, the other elements at the MAP.

        Args:
            subnet: The chosen elements.
            theta: Their values.

        Returns:
            ``{site: value}``, unconstrained.
        """
        packed = self.loc.index_copy(0, subnet.flat, theta.to(self.loc))
        return self.layout.unpack(packed)

    def constrain(self, unconstrained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Maps unconstrained values of sites to the values that the model sees.

        Args:
            unconstrained: ``{site: value}``.

        Returns:
            The same sites, constrained.
        """
        return {name: self.transforms[name](u) for name, u in unconstrained.items()}


@final
@dataclass(frozen=True, eq=False)
class ModelAtMAP:
    """A user's model, and its latent sites at the MAP.

    Attributes:
        model: The model, as the user wrote it.
        latents: Its latent sites.
        factors: What its own priors and noise are multiplied by.
    """

    model: Model
    latents: Latents
    factors: ModelFactors = field(default_factory=ModelFactors)

    @property
    def program(self) -> Model:
        """The model under the factors: what is run."""
        if self.factors.are_own:
            return self.model
        return ScaledModel(self.model, self.factors, self.latents.layout.names)


@final
class _ToType(Transform):
    """Values in another floating point type."""

    bijective = True
    sign = 1

    def __init__(self, support: Constraint, inside: torch.dtype, outside: torch.dtype):
        super().__init__()
        self.domain = self.codomain = support
        self._inside, self._outside = inside, outside

    def _call(self, x: Tensor) -> Tensor:
        return x.to(self._outside)

    def _inverse(self, y: Tensor) -> Tensor:
        return y.to(self._inside)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Zero, an element each."""
        return x.new_zeros(x.shape[: x.ndim - self.domain.event_dim])


def types_of_sites(guide: AutoContinuous, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The type of each latent site, where the packed vector has the type ``dtype``."""
    # At set-up the vector had the widest of them, and float32 at least. Sites of that
    # one follow it, when the guide is moved to another.
    nodes = guide.prototype_trace.iter_stochastic_nodes()
    own = {name: node["value"].dtype for name, node in nodes}
    widest = reduce(torch.promote_types, own.values())
    if dtype == at_least_float32(widest):
        return own
    return {name: dtype if kind == widest else kind for name, kind in own.items()}


def _transform(node: Node, dtype: torch.dtype, outside: torch.dtype) -> Transform:
    """From a site's unconstrained value, of a type, to what the model draws."""
    transform = biject_to(node["fn"].support)
    if outside == dtype:
        return transform
    # As in a backbone of bfloat16 with adapters in float32.
    support, event_dim = transform.codomain, transform.codomain.event_dim
    while isinstance(support, independent):
        support = support.base_constraint
    to_type: Transform = _ToType(support, dtype, outside)
    if event_dim > support.event_dim:  # it acts on each of the elements
        to_type = IndependentTransform(to_type, event_dim - support.event_dim)
    return ComposeTransform([transform, to_type])


def run_model(
    model: Model,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    values: Mapping[str, Tensor],
    fixed: Mapping[str, Tensor],
) -> poutine.Trace:
    """Trace of a model at constrained values, hidden from all handlers around it.

    Without gradients, where the mode around says so, also of a model that
    differentiates itself, which needs them on while it runs.

    Args:
        model: The user's model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        values: Constrained values of latent sites.
        fixed: Values of other sites that a run would draw.

    Returns:
        The trace, with what the model returned at ``"_RETURN"``.

    Raises:
        RuntimeError: As the model does.
    """
    if torch.is_grad_enabled():
        return _run(model, args, kwargs, values, fixed)
    try:
        trace = _run(model, args, kwargs, values, fixed)
    except RuntimeError as error:
        if not str(error).startswith(_NO_GRAPH):
            raise
        with differentiable():
            trace = _run(model, args, kwargs, values, fixed)
        trace.nodes["_RETURN"][DIFFERENTIATES] = True
    return without_graph(trace)


def _run(
    model: Model,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    values: Mapping[str, Tensor],
    fixed: Mapping[str, Tensor],
) -> poutine.Trace:
    # Validation branches on values, which `vmap` cannot do. Attention runs on its plain
    # kernels, which have derivatives of every order. Autocast around the call would
    # round its outputs; a model that wants it enters it itself.
    with (
        apart(),
        without_autocast(),
        plain_calls(),
        _plain_attention(),
        pyro.validation_enabled(False),
        poutine.block(),
        poutine.trace() as tracer,
        WidePlates(),
        _Substitute(values, fixed),
        OneThread(),
    ):
        returned = model(*args, **kwargs)
    trace = tracer.trace
    trace.add_node("_RETURN", name="_RETURN", type="return", value=returned)
    return trace


@final
class _Substitute(Messenger):
    """Gives latent sites their values and keeps other draws from happening again."""

    def __init__(self, values: Mapping[str, Tensor], fixed: Mapping[str, Tensor]):
        super().__init__()
        self.values = values
        self.fixed = fixed

    def _pyro_sample(self, msg: Message) -> None:
        name = msg["name"]
        if msg["value"] is not None:
            return
        if name in self.values:
            needed = msg["fn"].batch_shape + msg["fn"].event_shape
            if math.prod(needed) != self.values[name].numel():
                raise ModelError(
                    f"Site {name!r} must have the shape that the guide was set up "
                    f"with, {tuple(self.values[name].shape)}; got {tuple(needed)} in "
                    "this call. Latent sites inside a plate over the data are not "
                    "supported."
                )
            msg["value"] = self.values[name]
        else:
            msg["value"] = self.fixed.get(name)


@contextmanager
def apart() -> Iterator[None]:
    """Keeps the param store and the open plates around the call as they are.

    One thread at a time, as a process has one of each, and of Pyro's switches.

    Raises:
        KeyboardInterrupt: As it came.
    """
    with one_thread_at_a_time():
        store = pyro.get_param_store()
        known, around = set(store.keys()), list(_PYRO_STACK)
        open_plates = _DIM_ALLOCATOR._stack
        try:
            # Plates open around the call would collide with the same plates inside it.
            _DIM_ALLOCATOR._stack = []
            yield
        except KeyboardInterrupt:
            _PYRO_STACK[:] = around  # between two of Pyro's lines it leaves others
            raise
        finally:
            _DIM_ALLOCATOR._stack = open_plates
            for name in set(store.keys()) - known:
                del store[name]


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Switches off fused attention, which has no forward mode or second derivatives."""
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Gives the global RNG back as it was, on the CPU and the current GPU."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with one_thread_at_a_time(), torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def other_random_numbers(turn: int) -> Iterator[Callable[[], bool]]:
    """Other random numbers for a while; what it gives tells whether any were drawn."""
    with preserved_rng():
        # A seed also drops the spare normal that a generator may hold, and would give.
        seed = int(torch.randint(2**62, ())) + turn
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(seed)
        yield partial(_has_drawn_since, _random_states())


def _has_drawn_since(before: list[Tensor]) -> bool:
    pairs = zip(before, _random_states(), strict=True)
    return not all(torch.equal(one, other) for one, other in pairs)


def _random_states() -> list[Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return states


@contextmanager
def refuse_training_mode() -> Iterator[None]:
    """Raises a ModelError when a layer runs in a mode that is not deterministic."""
    # Before it runs, because batch statistics would change the layer's buffers. The
    # hook is global and is removed afterwards: no module is touched. Another thread may
    # be training a network of its own.
    owner, handle = [threading.get_ident()], None
    try:
        handle = register_module_forward_pre_hook(partial(_check_mode, owner))
        yield
    finally:
        owner.clear()  # the hook of an interrupted registration checks nothing
        if handle is not None:
            handle.remove()


def _check_mode(owner: list[int], module: nn.Module, inputs: tuple[Any, ...]) -> None:
    if threading.get_ident() not in owner:
        return
    if module.training and (_changes_itself(module) or _is_random(module)):
        raise ModelError(
            "The network must run in eval mode where a layer's training mode is random "
            f"or changes its buffers; got {type(module).__name__} in training mode. "
            "Call `.eval()` on the network first."
        )


def _changes_itself(module: nn.Module) -> bool:
    """Whether a layer in training mode updates running statistics."""
    norm = isinstance(module, nn.modules.batchnorm._NormBase)
    return norm and bool(getattr(module, "track_running_stats", False))


def _is_random(module: nn.Module) -> bool:
    """Whether a layer in training mode draws random numbers."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        return float(module.dropout) > 0
    return isinstance(module, nn.RReLU)


def is_output(name: str, node: Node, latents: Latents) -> bool:
    """Whether a node is a site that is observed, or would be if data were given."""
    # `pyro.deterministic` and `pyro.factor` count as observed but have no likelihood.
    return (
        node["type"] == "sample"
        and name not in latents.layout.names
        and not site_is_subsample(node)
        and not is_deterministic(node)
        and not is_factor(node)
    )


def is_deterministic(node: Node) -> bool:
    """Whether a node is a ``pyro.deterministic`` site, or was a reparametrized one."""
    if node["type"] != "sample":
        return False
    fn, is_masked = node["fn"], False
    # `poutine.reparam` leaves a Delta that is masked out in the site's place.
    while isinstance(fn, MaskedDistribution | ExpandedDistribution | Independent):
        is_masked |= isinstance(fn, MaskedDistribution) and fn._mask is False
        fn = fn.base_dist
    return bool(node["infer"].get("_deterministic")) or (
        is_masked and isinstance(fn, dist.Delta)
    )


def is_factor(node: Node) -> bool:
    """Whether a node is a ``pyro.factor`` site."""
    return node["type"] == "sample" and isinstance(node["fn"], dist.Unit)
