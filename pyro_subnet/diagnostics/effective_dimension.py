"""The number of directions of the subnet that the data determine."""

from __future__ import annotations

from torch import Tensor

from pyro_subnet.guides.posterior import AutoSubnetMultivariateNormal
from pyro_subnet.laplace.evidence import prior_traces
from pyro_subnet.tensors.modes import full_precision


def effective_dimension(posterior: AutoSubnetMultivariateNormal) -> float:
    r"""Number of directions that the data determine, rather than the prior.

    .. math:: \gamma = \operatorname{tr}(P^{-1} G) = S - \operatorname{tr}(P^{-1} s P_0)
        = \sum_i \frac{e_i}{e_i + s},

    with e the eigenvalues of the GGN relative to the prior precision P0, and s the
    posterior's ``prior_factor``. It takes no pass over the data, and costs as much as
    the marginal variances.

    Args:
        posterior: The posterior.

    Returns:
        From 0 (only the prior counts) to S, for curvatures that are not negative.

    Source: MacKay (1992), "Bayesian interpolation", section 4, doi
    10.1162/neco.1992.4.3.415; Maddox, Benton and Wilson (2020), arXiv 2003.02139, for
    networks.
    """
    return float(_shares(posterior).sum())


def effective_dimension_by_site(
    posterior: AutoSubnetMultivariateNormal,
) -> dict[str, float]:
    r"""Effective dimension by site: sums over the diagonal of :math:`P^{-1} G`.

    Args:
        posterior: The posterior.

    Returns:
        ``{site: part}`` for sites with chosen weights; parts sum to the whole.
    """
    parts = posterior.subnet.split(_shares(posterior))
    return {site: float(part.sum()) for site, part in parts.items()}


@full_precision()
def _shares(posterior: AutoSubnetMultivariateNormal) -> Tensor:
    """Diagonal of I - P^-1 s P0, shape (S,)."""
    state = posterior.state
    return 1 - state.prior_factors * prior_traces(state.gaussian, state.form.prior)
