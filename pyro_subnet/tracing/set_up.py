"""A guide's first run of its model, and what is told where Pyro's own ends in an error.

Pyro looks at the latent sites when a guide is set up, before any other check of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from pyro_subnet.exceptions import DataError, ModelError
from pyro_subnet.tensors.plain_calls import plain_calls
from pyro_subnet.tracing.arguments import (
    Call,
    arguments_without_value,
    is_of_shapes,
    run_on,
)
from pyro_subnet.tracing.trace import Model, apart, preserved_rng


def set_up(
    guide: AutoContinuous,
    prepare: Callable[..., Any],
    model: Model,
    call: Call,
    like: Tensor | None = None,
) -> None:
    """Sets up a guide by a run of its model.

    Args:
        guide: The guide.
        prepare: Pyro's own set-up of it.
        model: The user's model.
        call: Positional and keyword arguments of the model.
        like: Of the dtype and device of its latent sites, if they are known.

    Raises:
        ModelError: If there is no latent site, or one stands in a plate where it
            cannot.
        DataError: If the arguments show why the model cannot be run.
        RuntimeError: As the model does.
    """
    try:
        with plain_calls():
            run_on(prepare, model, *call, like)
    except (RuntimeError, DataError) as error:
        said = str(error)
        if "found no latent variables" in said:
            raise ModelError(
                "The model must have a latent site, drawn by `pyro.sample` without "
                "data; got none. Make a torch network Bayesian with "
                "`pyro_subnet.nn.bayesianize(net)`."
            ) from error
        if "does not support sequential" in said:
            raise ModelError(
                _in_sequence(guide.prototype_trace, model, call)
            ) from error
        if is_of_shapes(error.__cause__ or error):
            _explain_weights_in_plates(error, model, *call)
        raise


def _in_sequence(trace: Any, model: Model, call: Call) -> str:
    sites = _latents_in_plates(trace, vectorized=False)
    name, frame = next(sites)
    empty = ", ".join(f"`{one}`" for one in arguments_without_value(model, *call))
    came = f" (no value came for {empty})" if empty else ""
    return (
        "Latent sites must stand outside of sequential plates, `for i in "
        f"pyro.plate(...)`; got site {name!r} in plate {frame.name!r}, without "
        f"data{came}. Pass the data of the site, or write `with pyro.plate(...)` and "
        "draw weights before it."
    )


def _explain_weights_in_plates(
    error: Exception, model: Model, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Raises a ModelError if a model that failed had drawn latent sites in plates."""
    with torch.no_grad(), preserved_rng(), apart(), poutine.block():
        with poutine.trace() as tracer:
            try:
                model(*args, **kwargs)
            except Exception:  # the one that is explained here
                pass
    name, frame = next(_latents_in_plates(tracer.trace, vectorized=True), (None, None))
    if frame is None:
        return
    raise ModelError(
        "Weights must be drawn outside of the plate over the data, in which each "
        f"observation has its own; got site {name!r} in plate {frame.name!r}, and "
        f"then: {error.__cause__ or error}. "
        "Where one weight serves all data, call the network before the plate, as in "
        "`mean = net(x)`."
    ) from error


def _latents_in_plates(
    trace: poutine.Trace, *, vectorized: bool
) -> Iterator[tuple[str, CondIndepStackFrame]]:
    for name, node in trace.iter_stochastic_nodes():
        for frame in node["cond_indep_stack"]:
            if frame.vectorized == vectorized:
                yield name, frame
