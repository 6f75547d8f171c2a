"""A fit from end to end: checks, sums, the posterior in numbers, and warnings."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pyro_subnet.fit.absorbed_noise import warn_of_absorbed_noise
from pyro_subnet.fit.sums import FitSums
from pyro_subnet.gaussians.registry import form_of
from pyro_subnet.gaussians.rounding import warn_of_rounding
from pyro_subnet.laplace.state import PosteriorState
from pyro_subnet.options import FitOptions
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.memory import check_factor_fits
from pyro_subnet.tensors.modes import at_least_float32
from pyro_subnet.tracing.data import Batch, Data
from pyro_subnet.tracing.trace import ModelAtMAP


def fitted_state(
    at_map: ModelAtMAP,
    subnet: Subnet,
    data: Data,
    options: FitOptions,
    *,
    chosen_by: str,
    resumed: Callable[[FitSums], Iterable[Batch]] | None = None,
    holds_sums: bool = False,
) -> PosteriorState:
    """The posterior of a subnet, in terms of the model and the factors it is under.

    Args:
        at_map: The model at its MAP.
        subnet: The chosen elements.
        data: All training data.
        options: Which curvature.
        chosen_by: What chose the subnet, for people.
        resumed: Gives the batches that are left of a fit that a file keeps.
        holds_sums: Whether that file holds the matrix already.

    Returns:
        The posterior.

    Raises:
        SubnetError: One of its kinds.
    """
    latents = at_map.latents
    with data.together():
        if options.may_need_matrix(data.whole) and not holds_sums:
            dtype = at_least_float32(latents.loc.dtype)
            check_factor_fits(subnet.size, dtype, latents.loc.device)
        sums = FitSums(at_map, subnet, data, options, scores=True)
        batches = resumed(sums) if resumed else data.calls("Curvature")
    curvature = sums.over(batches)
    curvature.warn_of_doubts()
    curvature.warn_of_no_data(subnet)
    form = form_of(curvature.likelihood, curvature.prior, latents.layout)
    state = PosteriorState(
        latents.loc,
        subnet,
        form,
        curvature.summary,
        options,
        chosen_by=chosen_by,
        num_seen=curvature.num_seen,
    )
    warn_of_rounding(state.gaussian)
    curvature.warn_of_training(state.gaussian.whiten)
    if resumed is None and data.ranks is None:  # else no batch is read again
        warn_of_absorbed_noise(at_map, data, curvature)
    return state
