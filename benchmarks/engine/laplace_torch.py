"""laplace-torch's side, as its users run it.

``python -m benchmarks.engine.laplace_torch --help`` runs one case in this process.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from laplace import Laplace, curvature
from laplace.utils import LargestVarianceDiagLaplaceSubnetMask
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.engine.cases import (
    NOISE_SCALE,
    PRIOR_SCALES,
    WARM_UP_DATA,
    WARM_UP_SUBNET,
)
from benchmarks.engine.process import Answer, Meter, Task, Works, main

_PREDICTIVE_BACKEND = "CurvlinopsGGN"


def make_posterior(
    task: Task, net: nn.Module, backend: str, *, num_subnet: int | None = None
) -> Any:
    """An unfitted posterior over the case's subnet, or its first weights."""
    case = task.case
    positions = case.subnet(sum(p.numel() for p in net.parameters()))
    noise = {"sigma_noise": NOISE_SCALE} if case.likelihood == "regression" else {}
    return Laplace(
        net,
        case.likelihood,
        subset_of_weights="subnetwork",
        hessian_structure="full",
        subnetwork_indices=positions[:num_subnet],
        prior_precision=case.prior_precision,
        backend=getattr(curvature, backend),
        **noise,
    )


def batches(x: Tensor, y: Tensor, batch_size: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def first_data(task: Task) -> DataLoader[Any]:
    x, y = task.prepared.train
    return batches(x[:WARM_UP_DATA], y[:WARM_UP_DATA], WARM_UP_DATA)


def predict(posterior: Any, x: Tensor, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """Means and covariances of the linearized outputs: (N, C) and (N, C, C)."""
    return [
        posterior._glm_predictive_distribution(part) for part in x.split(batch_size)
    ]


def warm_up(task: Task, backend: str) -> None:
    """Fits and predicts a tiny batch, so that first-use costs are not timed.

    On a copy of the network, since some backends leave their hooks on it.
    """
    few = make_posterior(
        task, deepcopy(task.prepared.net), backend, num_subnet=WARM_UP_SUBNET
    )
    few.fit(first_data(task))
    predict(few, task.prepared.test[:WARM_UP_DATA], WARM_UP_DATA)


def comparable(task: Task, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Covariances of outputs as ours: theirs are raw logits, ours log-probabilities.

    Softmax is blind to the difference.
    """
    loc, variance = (torch.cat(part) for part in zip(*parts, strict=True))
    if task.case.likelihood == "regression":
        return variance
    shift = torch.eye(loc.shape[-1]) - loc.softmax(-1).unsqueeze(-2)
    return shift @ variance @ shift.mT


def fit_and_predict(task: Task, meter: Meter) -> Answer:
    if not task.cold:
        warm_up(task, task.side)
    x, y = task.prepared.train
    theirs = make_posterior(task, task.prepared.net, task.side)
    loader = batches(x, y, task.fit_batch)

    def fit() -> Tensor:
        theirs.fit(loader)
        # Else its first prediction would factor the precision, which ours has done.
        factor: Tensor = theirs.posterior_scale
        return factor

    if task.case.work == "predict":
        fit()
    else:
        meter.time("fit", fit)
    x = task.prepared.test
    predict(theirs, x[:1], 1)
    parts = meter.time("predict", lambda: predict(theirs, x, task.predict_batch))
    return {
        "variance": comparable(task, parts),
        "precision": theirs.posterior_precision,
    }, {}


def tune_prior(task: Task, meter: Meter) -> Answer:
    warm_up(task, _PREDICTIVE_BACKEND)
    theirs = make_posterior(task, task.prepared.net, _PREDICTIVE_BACKEND)
    theirs.fit(batches(*task.prepared.train, task.fit_batch))
    values = PRIOR_SCALES * task.case.prior_precision
    theirs.log_marginal_likelihood(prior_precision=values[:1])
    if task.side == "100 steps":
        meter.time(
            "fit",
            lambda: theirs.optimize_prior_precision(
                pred_type="glm", method="marglik", n_steps=len(values)
            ),
        )
    else:
        meter.time(
            "fit",
            lambda: [
                theirs.log_marginal_likelihood(prior_precision=value)
                for value in values.split(1)
            ],
        )
    found = []
    for value in values.split(1):
        theirs.prior_precision = value
        found.append(theirs.log_det_posterior_precision)
    return {"log_determinant": torch.stack(found)}, {}


def select(task: Task, meter: Meter) -> Answer:
    mask = make_mask(task, deepcopy(task.prepared.net))
    mask.select(first_data(task))
    mask = make_mask(task, task.prepared.net)
    loader = batches(*task.prepared.train, task.fit_batch)
    meter.time("fit", lambda: mask.select(loader))
    return {"variance": mask.diag_laplace_model.posterior_variance}, {}


def make_mask(task: Task, net: nn.Module) -> Any:
    diagonal = Laplace(
        net,
        task.case.likelihood,
        subset_of_weights="all",
        hessian_structure="diag",
        prior_precision=task.case.prior_precision,
        backend=getattr(curvature, task.side),
    )
    return LargestVarianceDiagLaplaceSubnetMask(
        net, n_params_subnet=task.case.subnet_size, diag_laplace_model=diagonal
    )


WORKS: Works = {
    "fit-predict": fit_and_predict,
    "predict": fit_and_predict,
    "prior-tuning": tune_prior,
    "selection": select,
}

if __name__ == "__main__":
    main(WORKS)
