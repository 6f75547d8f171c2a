"""What is public works inside `torch.inference_mode()`, and on tensors made there.

The oracle is the same call outside of it.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor, nn
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.diagnostics import effective_dimension, kept_variance, stationarity
from pyro_subnet.export.inference_data import to_inference_data
from pyro_subnet.nn import bayesianize, init_to_module
from pyro_subnet.selection import GreedyVariance, LargestGradient, LargestVariance

SUBNET = {"weight": torch.tensor([0, 2])}


class Program:
    """A network, its model, and data."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Linear(3, 1).double()
        bnn = bayesianize(self.net)

        def model(x: Tensor, y: Tensor | None = None) -> None:
            mean = bnn(x).squeeze(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

        self.model = model
        x = torch.randn(5, 3, dtype=torch.float64)
        self.x, self.y = x, x[:, 0].exp()

    def guide(self, subnet: Any = None, **options: Any) -> Any:
        start = init_to_module(self.net)
        return AutoSubnetLaplace(self.model, subnet, init_loc_fn=start, **options)

    def posterior(self, subnet: Any = None, **options: Any) -> Any:
        guide = self.guide(SUBNET if subnet is None else subnet, **options)
        return guide.laplace_approximation(self.x, self.y)


def saved(p: Program, q: Any) -> Any:
    q.save("posterior.safetensors")
    return AutoSubnetMultivariateNormal.load(
        "posterior.safetensors", p.model, p.x, p.y
    ).loc


def drawn(model: Any, guide: Any, p: Program, parallel: bool = False) -> Any:
    torch.manual_seed(1)
    return Predictive(model, guide=guide, num_samples=3, parallel=parallel)(p.x)["y"]


def hybrid(p: Program, q: Any, linearized: bool) -> Any:
    model = q.hybrid_model(linearized=linearized)
    model(p.x, p.y)
    return drawn(model, model.guide, p)


def exported(p: Program, q: Any) -> Any:
    idata = to_inference_data(q, p.x, p.y, num_samples=4, seed=0)
    return torch.as_tensor(idata.log_likelihood.y.values)


def joint(q: Any, p: Program) -> Any:
    return q.output_distribution(p.x, joint=True).covariance_matrix


CALLS: dict[str, Callable[[Program, Any], Any]] = {
    "fit": lambda p, q: p.posterior().get_posterior().variance,
    "hessian": lambda p, q: p.posterior(curvature="hessian").ggn(),
    "empirical": lambda p, q: p.posterior(curvature="ef").ggn(),
    "dual": lambda p, q: p.posterior(form="dual").get_posterior().variance,
    "kron": lambda p, q: (
        p.guide(covariance="kron")
        .laplace_approximation(p.x, p.y)
        .get_posterior()
        .variance
    ),
    "batches": lambda p, q: (
        p.guide(SUBNET).laplace_approximation_from([(p.x, p.y)]).ggn()
    ),
    "a share": lambda p, q: p.posterior(0.5).loc,
    "largest": lambda p, q: p.posterior(LargestVariance(2)).subnet_positions,
    "greedy": lambda p, q: p.posterior(GreedyVariance(2)).subnet_positions,
    "gradient": lambda p, q: p.posterior(LargestGradient(2)).subnet_positions,
    "predictive": lambda p, q: q.predictive_distribution(p.x).stddev,
    "joint": lambda p, q: joint(q, p),
    "error": lambda p, q: q.predictive_error(p.y, p.x),
    "functions": lambda p, q: q.sample_functions(2, p.x).shape,
    "update": lambda p, q: q.update(p.x, p.y).ggn(),
    "evidence": lambda p, q: q.log_marginal_likelihood(),
    "tuned": lambda p, q: q.tune_prior_precision().prior_factor,
    "by site": lambda p, q: q.tune_prior_precision(per_site=True).prior_factor,
    "held out": lambda p, q: q.tune_prior_precision("nll", val=(p.x, p.y)).prior_factor,
    "noise": lambda p, q: q.tune_noise_scale().noise_factor,
    "density": lambda p, q: q.get_posterior().log_prob(q.gaussian.loc),
    "median": lambda p, q: q.median()["weight"],
    "quantiles": lambda p, q: q.quantiles([0.1])["weight"],
    "draws": lambda p, q: drawn(p.model, q, p),
    "linearized": lambda p, q: drawn(q.linearized_model, q, p),
    "parallel": lambda p, q: drawn(q.linearized_model, q, p, parallel=True),
    "hybrid": lambda p, q: hybrid(p, q, False),
    "hybrid, linearized": lambda p, q: hybrid(p, q, True),
    "file": saved,
    "pickle": lambda p, q: joint(pickle.loads(pickle.dumps(q)).with_model(p.model), p),
    "copy": lambda p, q: joint(copy.deepcopy(q), p),
    "ArviZ": exported,
    "stationarity": lambda p, q: stationarity(q, p.x, p.y).newton_decrement,
    "dimension": lambda p, q: effective_dimension(q),
    "kept": lambda p, q: kept_variance(q, p.x, p.y),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_give_the_same_inside(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call, p = CALLS[name], Program()
    expected = call(p, p.posterior())
    with torch.inference_mode():
        inside = call(p, p.posterior())
        assert torch.is_inference_mode_enabled()
        made_inside = p.posterior()
    found = [inside, call(p, made_inside)]
    with torch.inference_mode():  # features, as a backbone gives them
        p.x, p.y = p.x + 0, p.y + 0
    assert p.x.is_inference()
    found.append(call(p, p.posterior()))
    for value in found:
        assert_close(value, expected)


def test_a_guide_that_was_called_inside_is_trained_outside() -> None:
    p = Program()
    guide = p.guide()
    with torch.inference_mode():
        guide(p.x, p.y)
    svi = SVI(p.model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    before = guide.loc.detach().clone()
    svi.step(p.x, p.y)
    assert bool((guide.loc != before).all())
    found = guide.laplace_approximation(p.x, p.y).ggn()
    assert_close(found, p.guide().laplace_approximation(p.x, p.y).ggn())
