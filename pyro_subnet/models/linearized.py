r"""The user's model with its outputs expanded to first order about the MAP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import numpy as np
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK, Message
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from pyro_subnet.exceptions import ChoiceWarning, warn
from pyro_subnet.models.draws import Draws
from pyro_subnet.models.expansion import Expander
from pyro_subnet.models.kept_jacobian import Key
from pyro_subnet.models.seen import Changed, Record, Seen
from pyro_subnet.tensors.agreement import random_direction
from pyro_subnet.tensors.modes import without_autocast
from pyro_subnet.tensors.plain_calls import plain_calls
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.plates import WidePlates
from pyro_subnet.tracing.site_distribution import SiteDistribution
from pyro_subnet.tracing.trace import (
    DIFFERENTIATES,
    Model,
    ModelAtMAP,
    is_deterministic,
    is_factor,
    preserved_rng,
    refuse_training_mode,
)

# Calls on the same data that were others after all, by which all are read.
_MISSES = 2


@final
class LinearizedModel:
    r"""A Pyro model whose outputs are linear in its latent sites' unconstrained values.

    .. math:: \eta_\text{lin}(x; \theta) = \eta(x; \hat\theta) + J(x)(\theta-\hat\theta)

    Latent sites keep their priors. The network itself only ever runs at the MAP, so
    batched latent values (``Predictive(parallel=True)``, vectorized particles) need no
    batched layers.

    Many draws cost one Jacobian and one product. So do many calls: where no gradients
    are wanted, the Jacobian of a call that comes again with the same tensors is kept
    until another call comes, if it takes no more than 256 MiB. Such a call runs the
    model once, at the MAP, and notices if anything there is not what it was.

    Deterministic sites of integers or truth values have no derivative: they keep their
    values at the MAP, and the first call says so of those that the weights move.

    Args:
        at_map: The user's model and its latent sites.

    Source: Daxberger et al. (2021), eq. 5, arXiv 2010.14689.
    """

    def __init__(self, at_map: ModelAtMAP):
        self._at_map = at_map
        self._expander = Expander()
        # Parents of latent sites; found out in the first call.
        self._parents: dict[str, frozenset[str]] | None = None
        # Of the last call, and how often one on the same data was another after all.
        self._last: Record | None = None
        self._misses = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model; the returned tensors are expanded to first order as well."""
        seen, last, run = Seen.of(args, kwargs), self._last, None
        if last is None or not last.seen.has_arguments_of(seen):
            self._misses = 0
        elif last.may_serve and self._misses < _MISSES and self._expander.is_kept:
            self._expander.meet_again()
            run = _LinearizedSites(self._expander, Record(seen, last.call, last))
            try:
                return run.of(self._at_map.program)
            except Changed:
                self._misses += 1
        # A run at the MAP that nobody sees, and one for the handlers around.
        call = ModelCall.read(self._at_map, args, kwargs)
        if self._parents is None:
            self._parents = call.latent_parents()
            _warn_of_no_derivative(call)
        self._expander.meet(call, seen)
        record = Record(seen, call)
        if run is None:
            run = _LinearizedSites(self._expander, record)
        run.prepare(record, self._parents)
        returned = run.of(self._at_map.program)
        self._last = None if self._parents else record
        return returned

    def __getstate__(self) -> dict[str, Any]:
        """State for pickling: without what is kept of the last call."""
        return {**self.__dict__, "_expander": Expander(), "_last": None}


@final
class _LinearizedSites(Messenger):
    """Runs the model at the MAP and puts first-order outputs in place of its own.

    Args:
        expander: Of the model.
        record: Of the call.
    """

    def __init__(self, expander: Expander, record: Record):
        super().__init__()
        self._expander = expander
        self._record = record
        self._draws = Draws(record.call)
        self._around = list(_PYRO_STACK), list(_DIM_ALLOCATOR._stack)
        # By site: what the handlers around have seen, and what the model goes on with.
        self._shown: dict[str, Any] = {}
        self._own_values: dict[str, Tensor] = {}
        # Of as many sites as are drawn.
        self._tangents: tuple[int, dict[Key, Tensor]] = (-1, {})
        self._log_factors: dict[str, Tensor] = {}

    def prepare(self, record: Record, parents: Mapping[str, frozenset[str]]) -> None:
        """Takes up a call that was read anew: shows the sites that were not yet shown.

        Args:
            record: Of the call.
            parents: Latent sites that the prior of a latent site depends on.
        """
        self._record, draws = record, self._draws
        draws.follow(record.call, parents)
        for name in record.call.latents.layout.names:
            if name not in draws.values:
                draws.show(name)
        self._tangents = len(draws.values), self._expander.tangents(draws)
        self._log_factors = _log_factors(record.call, draws)

    def of(self, program: Model) -> Any:
        """Runs the model.

        Args:
            program: The model.

        Returns:
            What it returns, expanded.

        Raises:
            Changed: If the record is held to one of another call.
        """
        record, call = self._record, self._record.call
        on = record.wants_gradients or DIFFERENTIATES in call.trace.nodes["_RETURN"]
        with (
            refuse_training_mode(),
            without_autocast(),
            plain_calls(),
            torch.set_grad_enabled(on),
            WidePlates(),
            self,
        ):
            returned = program(*call.args, **call.kwargs)
        if not record.wants_gradients:
            returned = tree_map_only(Tensor, Tensor.detach, returned)
        leaves, spec = tree_flatten(returned)
        keys = {i: ("return", str(i)) for i in range(len(leaves))}
        keys = {i: key for i, key in keys.items() if key in self._expander.keys}
        for i, key in keys.items():
            record.meet(key, leaves[i])
        record.finish()
        for i, key in keys.items():
            leaves[i] = leaves[i] + self._tangent(key)
        return tree_unflatten(leaves, spec)

    def _pyro_sample(self, msg: Message) -> None:
        name, draws, record = msg["name"], self._draws, self._record
        latents = record.call.latents.at_map
        if name in latents:
            # Hidden: the handlers outside are shown the latent sites by themselves,
            # and the model's own code goes on with values at the MAP.
            if not record.has(name):
                record.meet((name, "prior"), msg["fn"], msg["fn"])
                plates = msg["cond_indep_stack"]
                record.meet(name, (msg["scale"], msg["mask"], plates))
            if name not in draws.values:
                with self._outside():
                    draws.show(name)
            msg["value"] = latents[name]
            msg["stop"] = True
        elif is_deterministic(msg):
            record.meet(name, msg["value"])
            self._expand_deterministic(msg)
        elif is_factor(msg):
            # A factor is a term of the prior: it is taken at the draws, not expanded.
            record.meet(name, msg["fn"])
            own = msg["fn"].log_factor.shape
            factor = draws.spread(self._log_factors[name], own, len(own))
            msg["fn"] = dist.Unit(factor)
            msg["value"] = msg["fn"].sample()
        elif any(site.name == name for site in record.call.sites):
            record.meet(name, msg["fn"])
            # Past our replacements of torch's functions, which no product needs.
            with torch._C.DisableTorchFunction():
                self._expand_output(msg)
        else:
            record.meet(name, ())
        if name in self._shown:
            msg["value"] = self._shown[name]
            msg["stop"] = True

    def _expand_deterministic(self, msg: Message) -> None:
        if ("deterministic", msg["name"]) not in self._expander.keys:
            return
        tangent = self._tangent(("deterministic", msg["name"]))
        self._own_values[msg["name"]] = own = msg["value"]
        fn = msg["fn"]
        # In a plate the value may lack a batch dimension that the site has.
        missing = len(fn.batch_shape) + fn.event_dim - own.ndim
        shape = (1,) * missing + own.shape if self._draws.count else own.shape
        value = own + self._draws.spread(tangent, shape, len(fn.batch_shape))
        delta = dist.Delta(value, event_dim=fn.event_dim).mask(False)
        batch_shape = np.broadcast_shapes(fn.batch_shape, delta.batch_shape)
        msg["value"] = value
        msg["fn"] = delta.expand(batch_shape)

    def _expand_output(self, msg: Message) -> None:
        name, fn = msg["name"], msg["fn"]
        site = next(site for site in self._record.call.sites if site.name == name)
        taken = SiteDistribution.of(fn, site.node["value"])
        own = site.family.outputs(taken.base)
        if not self._record.wants_gradients:
            own = {part: value.detach() for part, value in own.items()}
        tangent = self._tangent(("output", name))
        shape = taken.element_shape
        # eta_lin = eta + J (theta - MAP), parameter by parameter.
        pieces = tangent.split([part.shape[-1] for part in own.values()], dim=-1)
        outputs = {}
        for (part, value), piece in zip(own.items(), pieces, strict=True):
            wide = (*shape, value.shape[-1])
            batch_dim = len(shape) - taken.event_dim
            outputs[part] = value + self._draws.spread(piece, wide, batch_dim)
        msg["fn"] = taken.at(site.family, outputs)

    def _pyro_post_sample(self, msg: Message) -> None:
        if msg["name"] not in self._record.call.latents.at_map:
            self._shown[msg["name"]] = msg["value"]
        # The handlers outside have seen the expanded value; the model's own code, run
        # at the MAP, must not: what it computes from it is expanded by itself.
        if msg["name"] in self._own_values:
            msg["value"] = self._own_values[msg["name"]]

    def _tangent(self, key: Key) -> Tensor:
        """The tangent at all that is drawn so far."""
        draws = self._draws
        if self._tangents[0] != len(draws.values):
            tangents = self._expander.tangents_by_kept(draws)
            if tangents is None:
                raise Changed
            self._tangents = len(draws.values), tangents
        return self._tangents[1][key]

    @contextmanager
    def _outside(self) -> Iterator[None]:
        """Leaves the handlers and plates that the model has entered."""
        handlers, plates = list(_PYRO_STACK), _DIM_ALLOCATOR._stack
        try:
            _PYRO_STACK[:], _DIM_ALLOCATOR._stack = self._around
            with torch.set_grad_enabled(self._record.wants_gradients):
                yield
        finally:
            _PYRO_STACK[:], _DIM_ALLOCATOR._stack = handlers, plates


def _warn_of_no_derivative(call: ModelCall) -> None:
    """Says which deterministic sites stay as they are, as labels made of logits do."""
    still = {
        name: node["value"]
        for name, node in call.trace.nodes.items()
        if is_deterministic(node) and not node["value"].is_floating_point()
    }
    if not still:
        return
    # No graph leads to them: a run at other weights tells whether they follow those.
    far = {
        name: u + random_direction(u.shape, u)
        for name, u in call.latents.values.items()
    }
    try:
        with torch.no_grad(), preserved_rng():
            nodes = call.run(far).nodes
    except Exception:  # the user's code may refuse such weights
        return
    found = {
        name: value.dtype
        for name, value in still.items()
        if not torch.equal(nodes[name]["value"], value)
    }
    if found:
        warn(
            "Deterministic sites of a linearized model must hold floating point "
            f"numbers to follow the draws; got {found}, which keep their values at the "
            "MAP in every draw. Make them of what is drawn: of the outputs, or of "
            "other deterministic sites.",
            ChoiceWarning,
        )


def _log_factors(call: ModelCall, draws: Draws) -> dict[str, Tensor]:
    """Log factors at the drawn values, led by K if there are draws."""
    names = [name for name, node in call.trace.nodes.items() if is_factor(node)]
    if not names:
        return {}

    def log_factors(values: dict[str, Tensor]) -> dict[str, Tensor]:
        nodes = call.run(values).nodes
        return {name: nodes[name]["fn"].log_factor for name in names}

    return draws.over_draws(log_factors, draws.unconstrained())
