"""Which observed sites are data, and which are hyperparameters held at a value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pyro_subnet.tracing.output_site import OutputSite


def stand_alike(sites: Sequence[OutputSite]) -> bool:
    """Whether all sites stand in the same plates, with one length: all are data."""
    return len({_place(site) for site in sites}) < 2  # noqa: PLR2004 - nothing to tell


def data_sites(
    sites: Sequence[OutputSite], nodes: Mapping[str, Any], leaves: list[Tensor]
) -> tuple[OutputSite, ...]:
    """The sites that are data, by the graph of a run to all latent leaves."""
    # `pyro.condition` makes an observed site of a hyperparameter as it does of data. No
    # latent site moves it, and it stands elsewhere than what they do move.
    moved = [site for site in sites if site.moved_parts(nodes[site.name], leaves)]
    places = {_place(site) for site in moved}
    return tuple(
        site
        for site in sites
        if not moved or not site.node["is_observed"] or _place(site) in places
    )


def _place(site: OutputSite) -> tuple[frozenset[str], tuple[int, ...]]:
    """The plates around a site, and the length of its first axis, if it has one."""
    frames = site.node["cond_indep_stack"]
    plates = frozenset(frame.name for frame in frames if frame.vectorized)
    return plates, tuple(site.distribution.element_shape[:1])
