"""Pyro's side: ``Predictive`` on the network itself, run once for each draw."""

from __future__ import annotations

from pyro.infer import Predictive
from torch import Tensor

from benchmarks.engine.cases import NUM_DRAWS, WARM_UP_DATA
from benchmarks.engine.ours import Model, fitted, make_model, warm_up
from benchmarks.engine.process import Answer, Meter, Task, Works, main
from pyro_subnet import AutoSubnetMultivariateNormal


def draw(task: Task, meter: Meter) -> Answer:
    model, x = make_model(task), task.prepared.test
    sampled_draws(model, warm_up(task, model), x[:WARM_UP_DATA], 2)
    posterior = fitted(task, model)
    logits = meter.time(
        "predict", lambda: sampled_draws(model, posterior, x, NUM_DRAWS)
    )
    return {"variance": logits.var(0)}, {}


def sampled_draws(
    model: Model, posterior: AutoSubnetMultivariateNormal, x: Tensor, count: int
) -> Tensor:
    """Logits, (draws, N, C), drawn together with classes."""
    predictive = Predictive(
        model, guide=posterior, num_samples=count, return_sites=("logits", "y")
    )
    return predictive(x)["logits"]


WORKS: Works = {"draws": draw}

if __name__ == "__main__":
    main(WORKS)
