"""Weights that the user names one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from pyro_subnet.exceptions import SelectionError, shown
from pyro_subnet.selection.base import GuideAtMAP, Selector
from pyro_subnet.subnet import Subnet
from pyro_subnet.tracing.data import Data


@final
@dataclass(frozen=True, eq=False)
class Mask(Selector):
    """Keeps the elements that masks or positions name.

    Attributes:
        mapping: ``{site: bool mask of the site's unconstrained shape, or LongTensor of
            flat positions within the site}``.

    Raises:
        SelectionError: When called, if a site is unknown, a mask has another shape,
            positions repeat or are out of range, or nothing is chosen.
    """

    mapping: Mapping[str, Tensor]

    def __call__(self, guide: GuideAtMAP, data: Data) -> Subnet:
        """See :meth:`Selector.__call__`."""
        device = guide.latents.loc.device
        mapping = {
            site: _as_tensor(site, choice, device)
            for site, choice in self.mapping.items()
        }
        return Subnet.from_sites(guide.latents.layout, mapping)


def _as_tensor(site: str, choice: Any, device: torch.device) -> Tensor:
    try:
        return torch.as_tensor(choice, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SelectionError(
            f"`subnet` of site {site!r} must be a bool mask or flat positions; got "
            f"{shown(choice)}. Pass `Sites([{site!r}])` for all of the site."
        ) from error
