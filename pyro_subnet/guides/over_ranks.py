"""What the ranks of a distributed fit must have in common, before any long work."""

from __future__ import annotations

from dataclasses import asdict

from torch import Tensor

from pyro_subnet.exceptions import OptionError
from pyro_subnet.files.fingerprint import digest
from pyro_subnet.options import FitOptions
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.ranks import first_with
from pyro_subnet.tracing.data import Data
from pyro_subnet.tracing.trace import Latents


def check_same_fit(data: Data, loc: Tensor, options: FitOptions) -> None:
    """Refuses ranks that fit other weights, or fit them otherwise.

    Args:
        data: Each rank's own.
        loc: The MAP.
        options: Of the fit.

    Raises:
        OptionError: If they differ.
    """
    if data.ranks is None:
        return
    own = {"MAP": digest(loc), "options": asdict(options), "num_data": data.num_data}
    found = data.ranks.gathered(own)
    for name, value in found[0].items():
        others = [rank for rank, each in enumerate(found) if each[name] != value]
        if others:
            raise OptionError(
                f"All ranks must have the same {name} in one fit; got another on rank "
                f"{others[0]} than on rank 0. Train under `DistributedDataParallel`, "
                "or load the same file on each."
            )


def agreed(data: Data, subnet: Subnet | None, latents: Latents) -> Subnet | None:
    """The subnet of the first rank that has one, on all ranks.

    Args:
        data: Each rank's own.
        subnet: This rank's, if it has one.
        latents: The latent sites.

    Returns:
        The subnet; None if no rank has one.
    """
    if data.ranks is None:
        return subnet
    own = None if subnet is None else (subnet.flat, subnet.explained_variance)
    found = data.ranks.gathered(own)
    first = found[first_with(found)]
    if first is None:
        return None
    flat, explained = first
    return Subnet(latents.layout, flat.to(latents.loc.device), explained)
