"""Posteriors of laplace-torch 0.3, as its users fit them.

ELLA (Deng et al. 2022, arXiv 2210.12642) projects the linearized posterior on a few
directions of the kernel of some training inputs; VaLLA (Ortega et al. 2023, arXiv
2302.12565) trains a sparse Gaussian process whose mean is the network's. The last layer
by Kronecker factors is the library's default.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from laplace import ELLA, Laplace, VaLLA
from laplace.curvature import CurvlinopsGGN
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.harness.task import Score
from benchmarks.paper.images.case import OWN_PRIOR, Case, Fitted, Predict, nll
from benchmarks.paper.images.networks import num_params
from benchmarks.paper.images.readers import to_unit

# As many prior precisions as the library's search has, in units of the model's.
FACTORS = tuple(10 ** (step / 4 - 5) for step in range(45))
# Defaults of the papers' own code, as far as two bytes in a memory of this size allow.
_ELLA_INPUTS, _ELLA_DIRECTIONS = 2000, 20
_MOST_BYTES = 2**31
_RATES = (1e-3, 1e-2)  # of VaLLA's optimizer: its prior is learned, not tuned
_BATCH = 50


def ella(case: Case, shown: str) -> Fitted:
    """ELLA, its prior precision chosen on held-out data."""
    net = copy.deepcopy(case.net())
    loader = training_loader(case)
    room = _MOST_BYTES // (8 * num_params(net))
    count = min(_ELLA_INPUTS, room, len(loader.dataset))
    posterior = ELLA(
        net,
        "classification",
        subsample_size=count,
        n_eigenvalues=min(_ELLA_DIRECTIONS, count),
        prior_precision=own_precision(case),
        temperature=temperature(case),
        backend=CurvlinopsGGN,
        seed=case.seed,
    )
    posterior.fit(loader, balanced=True)
    return _tuned(posterior, case, shown, [Score("", "inputs", count)])


def last_layer_kron(case: Case, shown: str) -> Fitted:
    """``Laplace(net, "classification")`` as the library's users call it."""
    posterior = Laplace(
        copy.deepcopy(case.net()),
        "classification",
        prior_precision=own_precision(case),
        temperature=temperature(case),
        backend=CurvlinopsGGN,
    )
    posterior.fit(training_loader(case))
    return _tuned(posterior, case, shown, [])


def valla(case: Case, shown: str) -> Fitted:
    """VaLLA at the learning rate that held-out data choose."""
    found = []
    inducing, steps = case.setup.valla
    for rate in _RATES:
        posterior = VaLLA(
            copy.deepcopy(case.net()),
            "classification",
            "random",
            num_inducing=inducing,
            prior_precision=own_precision(case),
            temperature=temperature(case),
            backend=CurvlinopsGGN,
            seed=case.seed,
        )
        posterior.fit(
            training_loader(case, shuffled=True),
            iterations=steps,
            lr=rate,
        )
        predict = _predictor(posterior)
        found.append((nll(predict, case.tune[shown]), rate, predict, posterior))
    _, rate, predict, posterior = min(found, key=lambda each: each[0])
    factor = float(posterior.log_prior_precision.detach().exp()) / own_precision(case)
    scores = [Score("", "rate", rate), Score("", "scale", factor)]
    return Fitted(predict, scores)


def own_precision(case: Case) -> float:
    return case.setup.recipe.prior_precision(case.data)


def temperature(case: Case) -> float:
    """Of a likelihood that is summed over a part of the data, scaled up to all."""
    everything = len(case.setup.recipe.training_part(case.data))
    return min(everything, case.setup.fitted or everything) / everything


def training_loader(case: Case, *, shuffled: bool = False) -> DataLoader[Any]:
    """The training images that the curvature of ours is summed over."""
    part = case.fitted_part()
    data = TensorDataset(to_unit(part.images), part.labels)
    generator = torch.Generator().manual_seed(case.seed)
    return DataLoader(data, _BATCH, shuffle=shuffled, generator=generator)


def _tuned(posterior: Any, case: Case, shown: str, scores: list[Score]) -> Fitted:
    """The posterior at the prior precision of lowest held-out NLL."""
    predict = _predictor(posterior)
    if shown == OWN_PRIOR:
        return Fitted(predict, [Score("", "scale", 1.0), *scores])
    own, losses = own_precision(case), {}
    for factor in FACTORS:
        posterior.prior_precision = factor * own
        losses[factor] = nll(predict, case.tune[shown])
    best = min(losses, key=losses.__getitem__)
    posterior.prior_precision = best * own
    return Fitted(predict, [Score("", "scale", best), *scores])


def _predictor(posterior: Any) -> Predict:
    def predict(x: Tensor) -> Tensor:
        parts: Iterable[Tensor] = (
            posterior(part, link_approx="probit").detach() for part in x.split(_BATCH)
        )
        # In float32 they sum to one up to a few 1e-7.
        return torch.cat(list(parts)).double().log().log_softmax(1).cpu()

    return predict
