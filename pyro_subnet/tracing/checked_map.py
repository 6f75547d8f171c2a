"""What a MAP must be for its model: finite, and of the sites that the model has."""

from __future__ import annotations

from pyro import poutine

from pyro_subnet.exceptions import ModelError, NonFiniteError
from pyro_subnet.tracing.trace import Latents


def check_finite_map(latents: Latents) -> None:
    """Raises a NonFiniteError if the MAP holds NaN or infinity."""
    # A sum is finite only if all are; it takes a tenth of a look at each.
    if bool(latents.loc.sum().isfinite()) or bool(latents.loc.isfinite().all()):
        return
    for site, value in latents.values.items():
        bad = int((~value.isfinite()).sum())
        if bad:
            raise NonFiniteError(
                f"The MAP must be finite; got {bad} non-finite of {value.numel()} "
                f"values at site {site!r}. Train again with a smaller learning rate, "
                "or start from other values with `init_loc_fn`."
            )


def check_latents(trace: poutine.Trace, latents: Latents) -> None:
    """Raises a ModelError if a run has not all latent sites, or data for one."""
    for name in latents.layout.names:
        node = trace.nodes.get(name)
        if node is None:
            raise ModelError(
                f"The model must have the guide's latent sites in every call; got a "
                f"call without site {name!r}. Make its sites independent of the data."
            )
        if node["is_observed"]:
            raise ModelError(
                f"A latent site of the guide must not be observed; got data for site "
                f"{name!r}. The guide was first called without them, so it took the "
                "site for a latent one: make a new guide and call it with the data."
            )
