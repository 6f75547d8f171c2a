"""ELLA and VaLLA of laplace-torch 0.3 on regression networks, as its users fit them.

ELLA: Deng et al. (2022), arXiv 2210.12642. VaLLA: Ortega et al. (2023), arXiv
2302.12565.
Both are posteriors over all weights, without a matrix of their number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from laplace import ELLA, VaLLA
from laplace.curvature import CurvlinopsGGN
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.paper.regression import SCALES, Fitted, Mixture, Network

# Of the papers' own code: inputs that give ELLA's kernel, and its directions.
_ELLA_INPUTS, _ELLA_DIRECTIONS = 2000, 20
_INDUCING, _STEPS = 100, 1000
_RATES = (1e-3, 1e-2)  # of VaLLA's optimizer: its prior and noise are learned
_BATCH = 256


def ella(network: Network) -> Fitted:
    """Its prior precision chosen on held-out data, if that of others is."""
    posterior = _ella_of_full_rank(network)
    notes = {"directions": float(posterior.n_eigenvalues)}
    if network.plan.tuned:
        x, y = network.split.held_out
        losses = {}
        for scale in SCALES:
            posterior.prior_precision = scale
            losses[scale] = _fitted(posterior).predict(x).nll(y)
        notes["scale"] = min(losses, key=losses.__getitem__)
        posterior.prior_precision = notes["scale"]
    return _fitted(posterior, notes)


def _ella_of_full_rank(network: Network) -> Any:
    """With as many directions as the kernel has; it refuses more."""
    count = min(_ELLA_INPUTS, len(network.split.train[0]))
    for directions in range(min(_ELLA_DIRECTIONS, count), 0, -1):
        posterior = ELLA(
            network.members.module(0),
            "regression",
            subsample_size=count,
            n_eigenvalues=directions,
            sigma_noise=float(network.members.log_scale[0].exp()),
            prior_precision=1.0,
            backend=CurvlinopsGGN,
            seed=network.split.index,
        )
        try:
            posterior.fit(_loader(network))
        except ValueError as error:
            if "positive rank" not in str(error):
                raise
        else:
            return posterior
    raise ValueError("ELLA's kernel has no direction: no input moves the network.")


def valla(network: Network) -> Fitted:
    """At the learning rate that held-out data choose."""
    x, y = network.split.held_out
    found = []
    for rate in _RATES:
        posterior = VaLLA(
            network.members.module(0),
            "regression",
            "random",
            num_inducing=min(_INDUCING, len(network.split.train[0])),
            sigma_noise=float(network.members.log_scale[0].exp()),
            prior_precision=1.0,
            backend=CurvlinopsGGN,
            seed=network.split.index,
        )
        steps = min(_STEPS, network.plan.schedule.num_steps)
        posterior.fit(_loader(network), iterations=steps, lr=rate)
        found.append(_fitted(posterior, {"rate": rate}))
    return min(found, key=lambda fitted: fitted.predict(x).nll(y))


def _loader(network: Network) -> DataLoader[Any]:
    x, y = network.split.train
    generator = torch.Generator().manual_seed(network.split.index)
    data = TensorDataset(x, y.unsqueeze(-1))
    return DataLoader(data, _BATCH, shuffle=True, generator=generator)


def _fitted(posterior: Any, notes: dict[str, float] | None = None) -> Fitted:
    moments = _moments(posterior)

    def predict(x: Tensor) -> Mixture:
        mean, variance = moments(x)
        scale = (variance + float(posterior.sigma_noise.detach()) ** 2).sqrt()
        return Mixture(mean.unsqueeze(0), scale.unsqueeze(0))

    return Fitted(predict, lambda x: moments(x)[1].sqrt(), notes or {})


def _moments(posterior: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Mean and variance of the function, each of shape (N,)."""

    def of(x: Tensor) -> tuple[Tensor, Tensor]:
        parts = [posterior.predictive_moments(part) for part in x.split(_BATCH)]
        mean = torch.cat([part[0].detach().flatten() for part in parts])
        variance = torch.cat([part[1].detach().flatten() for part in parts])
        return mean, variance

    return of
