"""Our side, through the public interface only.

``python -m benchmarks.engine.ours --help`` runs one case in this process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Predictive
from torch import Tensor, nn

from benchmarks.engine.cases import (
    NOISE_SCALE,
    NUM_DRAWS,
    PRIOR_SCALES,
    SEED,
    WARM_UP_DATA,
    WARM_UP_SUBNET,
    Case,
)
from benchmarks.engine.machine import forward_seconds, passes_seconds, product_rate
from benchmarks.engine.process import Answer, Meter, Task, Works, main
from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal, Subnet
from pyro_subnet.nn import bayesianize, init_to_module
from pyro_subnet.selection import LargestVariance, RandomSubnet

Model = Callable[..., None]

_PROBE = RandomSubnet(200, seed=SEED)


def make_model(task: Task) -> Model:
    """The case's network and likelihood as a Pyro model."""
    case = task.case
    bnn = bayesianize(task.prepared.net, prior_scale=case.prior_precision**-0.5)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        outputs = bnn(x)
        if case.work == "draws":
            outputs = pyro.deterministic("logits", outputs, event_dim=1)
        with pyro.plate("data", len(x)):
            if case.likelihood == "regression":
                likelihood = dist.Normal(outputs, NOISE_SCALE).to_event(1)
            else:
                likelihood = dist.Categorical(logits=outputs)
            pyro.sample("y", likelihood, obs=y)

    return model


def chosen(net: nn.Module, positions: Tensor) -> dict[str, Tensor]:
    """Positions in the flattened trained weights as positions within each parameter."""
    found, start = {}, 0
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        stop = start + parameter.numel()
        inside = positions[(positions >= start) & (positions < stop)] - start
        if len(inside):
            found[name] = inside
        start = stop
    return found


def subnet_positions(task: Task) -> Tensor:
    """The case's subnet."""
    weights = task.prepared.net.parameters()
    return task.case.subnet(sum(p.numel() for p in weights if p.requires_grad))


def make_guide(
    task: Task, model: Model, subnet: Any, data: tuple[Tensor, ...] | None
) -> AutoSubnetLaplace:
    """A guide at the network's weights, set up if there are data."""
    guide = AutoSubnetLaplace(
        model, subnet, init_loc_fn=init_to_module(task.prepared.net)
    )
    if data is not None:
        guide(*data)
    return guide


def first_data(task: Task) -> tuple[Tensor, Tensor]:
    """A tiny batch."""
    x, y = task.prepared.train
    return x[:WARM_UP_DATA], y[:WARM_UP_DATA]


def warm_up(task: Task, model: Model) -> AutoSubnetMultivariateNormal:
    """Fits and predicts a tiny batch, so that first-use costs are not timed."""
    few = chosen(task.prepared.net, subnet_positions(task)[:WARM_UP_SUBNET])
    guide = make_guide(task, model, few, first_data(task))
    posterior = guide.laplace_approximation(*first_data(task))
    predict(posterior, task.case, first_data(task)[0])
    return posterior


def predict(posterior: AutoSubnetMultivariateNormal, case: Case, x: Tensor) -> Tensor:
    """Covariances of the linearized outputs, (N, C, C)."""
    parts = x.split(case.our_batch_size or len(x))
    return torch.cat(
        [posterior.output_distribution(part).covariance_matrix for part in parts]
    )


def fitted(task: Task, model: Model) -> AutoSubnetMultivariateNormal:
    """The posterior of the case's subnet on its data; not timed."""
    data = task.prepared.train
    guide = make_guide(
        task, model, chosen(task.prepared.net, subnet_positions(task)), data
    )
    return guide.laplace_approximation(*data)


def fit_and_predict(task: Task, meter: Meter) -> Answer:
    case, model, data = task.case, make_model(task), task.prepared.train
    if not task.cold:
        warm_up(task, model)
    subnet = chosen(task.prepared.net, subnet_positions(task))
    guide = make_guide(task, model, subnet, None if task.cold else data)
    values = _timed_values(task, meter, guide)  # the posterior ends with the call
    figures = {
        "forward": forward_seconds(task.prepared.net, data[0]),
        "rate": product_rate(data[0].device),
        "passes": passes_seconds(task.prepared.net, data[0]),
    }
    if case.backends:  # at a size that nobody else can do the factor takes minutes
        start = time.perf_counter()
        guide.laplace_approximation(*first_data(task))
        figures["fixed"] = time.perf_counter() - start
    return values, figures


def _timed_values(
    task: Task, meter: Meter, guide: AutoSubnetLaplace
) -> dict[str, Tensor]:
    case, data = task.case, task.prepared.train
    posterior = meter.time("fit", lambda: guide.laplace_approximation(*data))
    if not torch.equal(posterior.subnet.flat.cpu(), subnet_positions(task)):
        raise RuntimeError("sites in another order than the network's parameters")
    x = task.prepared.test
    values = {"variance": meter.time("predict", lambda: predict(posterior, case, x))}
    if case.backends:  # else nobody compares, and a second S x S matrix is spared
        values["precision"] = posterior.get_posterior().precision_matrix
    return values


def predict_only(task: Task, meter: Meter) -> Answer:
    case, model = task.case, make_model(task)
    warm_up(task, model)
    posterior, x = fitted(task, model), task.prepared.test
    variance = meter.time("predict", lambda: predict(posterior, case, x))
    precision = posterior.get_posterior().precision_matrix
    return {"variance": variance, "precision": precision}, {}


def tune_prior(task: Task, meter: Meter) -> Answer:
    model = make_model(task)
    warm_up(task, model).tune_prior_precision()
    posterior = fitted(task, model)
    meter.time("fit", posterior.tune_prior_precision)
    factors = PRIOR_SCALES.to(posterior.loc.device, torch.float64)
    log_dets = posterior.form.log_det_function(len(factors))
    return {"log_determinant": log_dets(factors)}, {}


class TimedSelector:
    """A selector that times another one, which has no public call of its own."""

    passes_over_data = True

    def __init__(self, selector: LargestVariance, meter: Meter):
        self.selector = selector
        self.meter = meter

    def __call__(self, guide: AutoSubnetLaplace, data: Any) -> Subnet:
        return self.meter.time("fit", lambda: self.selector(guide, data))


def select(task: Task, meter: Meter) -> Answer:
    case, model, data = task.case, make_model(task), task.prepared.train
    few = make_guide(task, model, LargestVariance(WARM_UP_SUBNET), first_data(task))
    few.laplace_approximation(*first_data(task))
    selector = TimedSelector(LargestVariance(case.subnet_size), meter)
    guide = make_guide(task, model, selector, data)
    flat = guide.laplace_approximation(*data).subnet.flat
    probe = make_guide(task, model, _PROBE, data).laplace_approximation(*data)
    precision = probe.get_posterior().precision_matrix.diagonal().clone()
    return {"chosen": flat, "probe": probe.subnet.flat, "precision": precision}, {}


def draw(task: Task, meter: Meter) -> Answer:
    model, x = make_model(task), task.prepared.test
    few = warm_up(task, model)
    linearized_draws(few, x[:WARM_UP_DATA], 2)
    posterior = fitted(task, model)
    logits = meter.time("predict", lambda: linearized_draws(posterior, x, NUM_DRAWS))
    return {"variance": logits.var(0)}, {}


def linearized_draws(
    posterior: AutoSubnetMultivariateNormal, x: Tensor, count: int
) -> Tensor:
    """Logits, (draws, N, C), drawn together with classes."""
    predictive = Predictive(
        posterior.linearized_model,
        guide=posterior,
        num_samples=count,
        parallel=True,
        return_sites=("logits", "y"),
    )
    return predictive(x)["logits"]


WORKS: Works = {
    "fit-predict": fit_and_predict,
    "predict": predict_only,
    "prior-tuning": tune_prior,
    "selection": select,
    "draws": draw,
}

if __name__ == "__main__":
    main(WORKS)
