"""Whether the data of a site are values that its likelihood allows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributions as td
from torch import Tensor

from pyro_subnet.exceptions import DataError, NonFiniteError
from pyro_subnet.tracing.output_site import OutputSite

_MASK = "Leave it out with `poutine.mask`"
# What users pass in place of the labels that a family takes, and the way out.
_WAYS_OUT: Mapping[type, str] = {
    td.Bernoulli: f"Pass labels 0 and 1, such as `(y > 0).float()`. {_MASK} if missing",
    td.Categorical: "Pass class numbers from 0 to C - 1. Where it stands for no class, "
    "as `ignore_index` does, leave it out with `poutine.mask(mask=y != ...)`",
    td.OneHotCategorical: "Pass `torch.nn.functional.one_hot(labels, C)`. Soft labels "
    "are no data of this likelihood: take their `argmax(-1)`",
}


def check_data(site: OutputSite) -> None:
    """Refuses data that a site's likelihood forbids, where no mask leaves them out.

    Sites without data pass. Costs one evaluation of the log density, which is kept.

    Raises:
        DataError: If a value is NaN, infinite, or outside the support.
        NonFiniteError: If the log density of a value is not finite at the MAP.
    """
    if not site.node["is_observed"]:
        return
    taken, value = site.distribution, site.node["value"]
    shape, event = taken.element_shape, taken.base.event_shape
    wide = value.expand(shape + event)
    live = (site.weights(without_plates=False) != 0).reshape(shape)
    finite = wide.isfinite().unsqueeze(-1).flatten(len(shape)).all(-1)
    _refuse(site, live & ~finite, _when_missing(site))
    _refuse(site, live & ~_inside_support(taken.base, site.value), _way_out(site))
    bad = live & ~_log_density(site).isfinite()
    if bool(bad.any()):
        raise NonFiniteError(
            f"The log density of the data must be finite at the MAP; got "
            f"{float(site.log_density[bad][0])} for {_first(site, bad)}. Check the "
            "inputs, the network and the noise; train on if the model rules it out."
        )


def _refuse(site: OutputSite, bad: Tensor, way_out: str) -> None:
    if bool(bad.any()):
        base: Any = site.distribution.base
        raise DataError(
            "Data must lie in the support of their distribution, where no mask leaves "
            f"them out; got {_first(site, bad)}, for {type(base).__name__} on "
            f"{_support(base)}. {way_out}."
        )


def _first(site: OutputSite, bad: Tensor) -> str:
    """Names the first offending element: its value, its index and its site."""
    index = tuple(bad.nonzero()[0].tolist())
    taken = site.distribution
    value = site.node["value"].expand(taken.element_shape + taken.base.event_shape)
    found = value[index].tolist()
    at = f"at index {index} " if index else ""
    return f"{found} {at}of site {site.name!r} ({int(bad.sum())} of {bad.numel()})"


def _inside_support(base: Any, value: Tensor) -> Tensor:
    """Whether each element is in the support; all of a family that declares none."""
    shape = value.shape[: value.ndim - len(base.event_shape)]
    try:
        support = base.support
    except NotImplementedError:
        support = None
    if support is None:
        return torch.ones(shape, dtype=torch.bool, device=value.device)
    # A bool has no remainder, by which a support tells whole numbers.
    inside: Tensor = support.check(value.byte() if value.dtype == torch.bool else value)
    # A support of fewer event dimensions than the family's own.
    inside = inside.expand(value.shape[: inside.ndim])
    return inside.unsqueeze(-1).flatten(len(shape)).all(-1)


def _support(base: Any) -> str:
    try:
        return repr(base.support)
    except NotImplementedError:
        return "no declared support"


def _way_out(site: OutputSite) -> str:
    kind = site.family.distribution
    found = (way for family, way in _WAYS_OUT.items() if issubclass(kind, family))
    return next(found, f"Check the data and the family. {_MASK} if it is missing")


def _when_missing(site: OutputSite) -> str:
    way = f"{_MASK}, such as `poutine.mask(mask=y.isfinite())`"
    if site.distribution.leaves_out_nan and site.distribution.base.event_shape:
        return (
            "An event that is missing in part has no closed-form information here. "
            f"{_MASK}, or observe each component at a site of its own"
        )
    return way


def _log_density(site: OutputSite) -> Tensor:
    try:
        return site.log_density
    except (RuntimeError, ValueError, IndexError, TypeError) as err:
        kind = type(site.distribution.base).__name__
        value = site.node["value"]
        raise DataError(
            f"The data of site {site.name!r} must be of a dtype and shape that "
            f"`{kind}.log_prob` takes; got {value.dtype}, {tuple(value.shape)}: "
            f"{err} Pass `y.to(x.dtype)`, or labels as the family takes them."
        ) from err
