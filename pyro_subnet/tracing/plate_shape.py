"""The shape of a site's log probability, which its plates declare."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from pyro.util import check_site_shape
from torch import Tensor

from pyro_subnet.exceptions import ModelError
from pyro_subnet.tracing.trace import Node


def check_shape(node: Node) -> None:
    """Refuses a site whose data broadcast beyond its plates, by Pyro's own rule.

    Means of shape (N, 1) with data of shape (N,) are N x N elements, in which every
    observation counts N times. Outside of all plates, where Pyro takes one element
    alone, it suffices that no observation is repeated.

    Raises:
        ModelError: If the log probability has another shape than the plates, or the
            data lack or repeat values of an event.
    """
    name, fn, value = node["name"], node["fn"], node["value"]
    if not isinstance(value, Tensor):
        raise ModelError(
            f"The data of an observed site must be a tensor; got {type(value).__name__}"
            f" at site {name!r}. Pass `torch.as_tensor(...)` of them."
        )
    _check_event(name, fn, value)
    batch = value.shape[: value.ndim - fn.event_dim]
    parts = [fn.batch_shape, batch]
    for weight in (node["scale"], node["mask"]):  # which broadcast as the data do
        parts += [weight.shape] if isinstance(weight, Tensor) else []
    try:
        shape = np.broadcast_shapes(*parts)
    except ValueError as err:
        raise ModelError(_does_not_fit(name, fn, value)) from err
    if shape == batch and not any(f.vectorized for f in node["cond_indep_stack"]):
        return  # no plate, but every observation counts once
    log_prob = torch.empty(()).expand(shape)
    try:
        check_site_shape({**node, "log_prob": log_prob}, math.inf)
    except ValueError as err:
        words = str(err).replace("\n ", "")
        raise ModelError(
            "The log probability of an observed site must have the shape of its plates:"
            f" {words}. The distribution has shape {tuple(fn.shape())}, the data "
            f"{tuple(value.shape)}: give both one shape, such as `mean.squeeze(-1)`."
        ) from err


def _check_event(name: str, fn: Any, value: Tensor) -> None:
    """Refuses data that lack event dimensions, or are repeated along one."""
    event = tuple(fn.event_shape)
    own = tuple(value.shape[value.ndim - len(event) :])
    # Each number of the data counts once: they may be wider than the distribution, as
    # five replicates with one mean are, and not the other way round.
    wider = len(own) == len(event) and all(
        there in {here, 1} for here, there in zip(own, event, strict=True)
    )
    if not wider:
        raise ModelError(_does_not_fit(name, fn, value))


def _does_not_fit(name: str, fn: Any, value: Tensor) -> str:
    classes = (
        "Labels of a `Categorical` are class numbers, `y.argmax(-1)`; those of a "
        "`OneHotCategorical` are `torch.nn.functional.one_hot(y, C)`."
    )
    return (
        "The data of an observed site must have the shape of its distribution; got "
        f"data of shape {tuple(value.shape)} at site {name!r} for batch shape "
        f"{tuple(fn.batch_shape)} and event shape {tuple(fn.event_shape)}. Reshape "
        f"the data, or check `to_event`. {classes}"
    )
