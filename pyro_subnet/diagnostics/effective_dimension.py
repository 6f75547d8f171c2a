"""How many of the chosen weights the data have a say in."""

from __future__ import annotations

from torch import Tensor

from pyro_subnet.guides.curvature import CurvatureGuide
from pyro_subnet.laplace.evidence import prior_traces, site_scales
from pyro_subnet.tensors.modes import full_precision


def effective_dimension(posterior: CurvatureGuide) -> float:
    r"""Number of directions that the data determine, rather than the prior.

    .. math:: \gamma = \operatorname{tr}(P^{-1} G) = S - \operatorname{tr}(P^{-1} s P_0)
        = \sum_i \frac{e_i}{e_i + s},

    with e the eigenvalues of the GGN relative to the prior precision P0, and s the
    posterior's ``prior_scale``. No pass over the data; costs the marginal variances.

    Args:
        posterior: The posterior.

    Returns:
        From 0 (the prior alone speaks) to S, for curvatures that are not negative.

    Source: MacKay (1992), "Bayesian interpolation", section 4, doi
    10.1162/neco.1992.4.3.415; Maddox, Benton and Wilson (2020), arXiv 2003.02139, for
    networks.
    """
    return float(_shares(posterior).sum())


def effective_dimension_by_site(posterior: CurvatureGuide) -> dict[str, float]:
    r"""The same, site by site: sums of the diagonal of :math:`P^{-1} G`.

    Args:
        posterior: The posterior.

    Returns:
        ``{site: part}`` of the sites that hold chosen weights; parts sum to the whole.
    """
    subnet = posterior.subnet
    counts = [within.numel() for within in subnet.indices.values()]
    parts = _shares(posterior).split(counts)
    return {
        site: float(part.sum())
        for site, part in zip(subnet.indices, parts, strict=True)
    }


@full_precision()
def _shares(posterior: CurvatureGuide) -> Tensor:
    scales = site_scales(posterior.prior_scale, posterior.subnet)
    return 1 - scales * prior_traces(posterior.gaussian, posterior.prior_precision)
