"""The weights of the last layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from pyro_subnet.exceptions import SelectionError
from pyro_subnet.selection.base import GuideAtMAP, Selector
from pyro_subnet.selection.sites import whole_sites
from pyro_subnet.subnet import Subnet
from pyro_subnet.tracing.data import Data


@final
@dataclass(frozen=True)
class LastLayer(Selector):
    """Keeps the weights of the module that is sampled last.

    It is the module of the last site, in trace order, that has two or more dimensions:
    ``fc3.weight`` and ``fc3.bias`` for a network whose last layer is ``fc3``.

    Raises:
        SelectionError: When called, if the sites' names show no modules.

    Source: last-layer Laplace, Kristiadi et al. (2020), arXiv 2002.10118.
    """

    def __call__(self, guide: GuideAtMAP, data: Data) -> Subnet:
        """See :meth:`Selector.__call__`."""
        latents = guide.latents
        layout = latents.layout
        weights = [
            site for site in layout.names if "." in site and len(layout.shape(site)) > 1
        ]
        if not weights:
            raise SelectionError(
                "`LastLayer` needs a weight matrix whose site is named by its module, "
                f"such as 'fc3.weight'; got sites {list(layout.names)}. Name the last "
                "layer's sites with `Sites([...])`."
            )
        module = weights[-1].rpartition(".")[0]
        chosen = {site for site in layout.names if site.rpartition(".")[0] == module}
        return whole_sites(layout, chosen, latents.loc.device)
