"""The weights of the last layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from pyro_subnet.exceptions import SelectionError
from pyro_subnet.selection.base import GuideAtMAP, Selector
from pyro_subnet.selection.sites import whole_sites
from pyro_subnet.subnet import Subnet
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.data import Data
from pyro_subnet.tracing.last_weights import LastWeights, last_weights


@final
@dataclass(frozen=True)
class LastLayer(Selector):
    """Keeps the weights of the layers that compute the outputs.

    The model shows which they are: the weight matrices (or tables) that were multiplied
    (or looked up) last on the way to an output, wherever the network holds them, with
    the other weights of their modules that enter there, such as biases. All heads
    count, and a layer that skips the others. Elementwise scales and norms are no layer.

    Raises:
        SelectionError: When called, if no weight matrix computes the outputs, or torch
            does not show how they are computed.

    Source: last-layer Laplace, Kristiadi et al. (2020), arXiv 2002.10118.
    """

    passes_over_data = True

    def __call__(self, guide: GuideAtMAP, data: Data) -> Subnet:
        """See :meth:`Selector.__call__`."""
        data.require_repeatable(type(self).__name__)
        latents, found = guide.latents, LastWeights()
        with data.together():
            for args, kwargs in data.calls("Last layer"):
                found |= last_weights(ModelCall.read(guide.at_map, args, kwargs))
        for others in [] if data.ranks is None else data.ranks.gathered(found):
            found |= others
        if not found.layers:
            raise SelectionError(
                "`LastLayer` needs a weight matrix that the outputs are computed with; "
                f"got sites {list(latents.layout.names)}. Name the last layer's sites "
                "with `Sites([...])`."
            )
        modules = {_module(site) for site in found.layers}
        with_them = {site for site in found.others if _module(site) in modules}
        return whole_sites(
            latents.layout, {*found.layers, *with_them}, latents.loc.device
        )


def _module(site: str) -> str:
    """The module that a site is named by; of a parametrized weight, its owner."""
    owner, parametrized, _ = site.partition(".parametrizations.")
    return owner if parametrized else site.rpartition(".")[0]
