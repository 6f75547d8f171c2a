"""Whole sites, by name or by module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import final

import torch

from pyro_subnet.exceptions import SelectionError
from pyro_subnet.selection.base import GuideAtMAP, Selector
from pyro_subnet.subnet import Layout, Subnet
from pyro_subnet.tracing.data import Data
from pyro_subnet.tracing.trace import Latents


@final
@dataclass(frozen=True)
class Sites(Selector):
    """Keeps every element of the sites whose names match a pattern.

    Attributes:
        patterns: Names of latent sites, with the wildcards of :mod:`fnmatch`, such as
            ``["fc1.*", "sigma"]``; one pattern may be given without a list.

    Raises:
        SelectionError: When called, if a pattern matches no latent site.
    """

    patterns: Sequence[str] | str

    def __call__(self, guide: GuideAtMAP, data: Data) -> Subnet:
        """See :meth:`Selector.__call__`."""
        return _matching(guide.latents, self.patterns, fnmatchcase)


@final
@dataclass(frozen=True)
class Modules(Selector):
    """Keeps every element of the sites that belong to some modules.

    Attributes:
        names: Module paths such as ``["encoder.fc1"]``: their sites are those whose
            names begin with the path and a dot; one path may be given without a list.

    Raises:
        SelectionError: When called, if a module holds no latent site.
    """

    names: Sequence[str] | str

    def __call__(self, guide: GuideAtMAP, data: Data) -> Subnet:
        """See :meth:`Selector.__call__`."""
        return _matching(
            guide.latents, self.names, lambda site, name: site.startswith(name + ".")
        )


def _matching(
    latents: Latents, wanted: Sequence[str] | str, match: Callable[[str, str], bool]
) -> Subnet:
    """All elements of the sites that match a pattern or name; each must match one."""
    layout = latents.layout
    chosen: set[str] = set()
    for name in [wanted] if isinstance(wanted, str) else wanted:
        found = {site for site in layout.names if match(site, name)}
        if not found:
            raise SelectionError(
                f"Each name must match a latent site of the model, one of "
                f"{list(layout.names)}; got {name!r}. Check the spelling."
            )
        chosen |= found
    return whole_sites(layout, chosen, latents.loc.device)


def whole_sites(layout: Layout, chosen: set[str], device: torch.device) -> Subnet:
    """The subnet of every element of the named sites."""
    masks = {
        site: torch.ones(layout.shape(site), dtype=torch.bool, device=device)
        for site in layout.names
        if site in chosen
    }
    return Subnet.from_sites(layout, masks)
