"""Whether a noise that was learned with a network is likely too small."""

from __future__ import annotations

from typing import Any

import torch

from pyro_subnet.exceptions import ModelError
from pyro_subnet.fit.absorbed_noise import AbsorbedNoise, measure, network_of
from pyro_subnet.guides.posterior import AutoSubnetMultivariateNormal
from pyro_subnet.tensors.modes import full_precision
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.data import Data


@torch.inference_mode(False)
@full_precision()
def absorbed_noise(
    posterior: AutoSubnetMultivariateNormal, *args: Any, **kwargs: Any
) -> AbsorbedNoise:
    r"""Holds the weights that the data determine against the number of data.

    A network that has nearly as many effective parameters as there are data follows
    their noise, so that residuals, and a noise learned from them, come out too small by
    about :math:`\sqrt{N / (N - \gamma)}`, the ``factor`` of what is returned. Up to
    1.5 is no cause for concern; above 2 only held-out data tell what the noise is. A
    fit warns of that by itself where the model learns its noise and N is small; this
    measures it for a noise that was learned elsewhere, under the posterior's
    ``prior_factor`` and ``noise_factor``. It takes a pass over the data, R D numbers of
    memory, and :math:`R^2 D` operations, of R data times outputs.

    Args:
        posterior: A posterior of any subnet; all weights of the network are looked at.
        args: The training data, as the model takes them.
        kwargs: Keyword arguments of the model.

    Returns:
        N, the number of effective parameters, and the factor.

    Raises:
        ModelError: If no latent site moves the location of the only observed site.
        OptionError: If the prior couples weights, or does not curve.

    Source: MacKay (1992), "Bayesian interpolation", doi 10.1162/neco.1992.4.3.415.
    """
    at_map = posterior.scaled_at_map
    call = ModelCall.read(at_map, args, kwargs)
    network = network_of(call, call.graph(with_prior=False))
    if network is None:
        raise ModelError(
            "`absorbed_noise` must be of a model with one observed site, normal, whose "
            f"location latent sites move; got {[site.name for site in call.sites]}. "
            "It means nothing for other families."
        )
    return measure(at_map, network, Data.single(args, kwargs))
