"""Curvatures other than the GGN, against dense autograd and Pyro's own densities."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide import AutoLaplaceApproximation
from torch import Tensor
from torch.autograd.functional import hessian, jacobian
from torch.testing import assert_close

from pyro_subnet.exceptions import PrecisionError
from pyro_subnet.fit.sums import diagonal_curvature, subnet_curvature
from pyro_subnet.options import Curvature, FitOptions
from pyro_subnet.selection import LargestVariance
from pyro_subnet.tracing.data import Data
from tests.cases import CASES, DOUBLE, Case, draw, inputs, read_call
from tests.tolerances import num_standard_errors, tolerance

DOUBLE_TOLERANCE = tolerance(torch.float64, "autograd")
REORDERED = tolerance(torch.float64, "reordered")
# One observation at a time, some at a time, and all at once.
BUDGETS = [1, 20_000, 2**26]
EXACT: list[Curvature] = ["ef", "hessian"]


def datum_densities(case: Case, packed: Tensor, power: float) -> list[Tensor]:
    """Log densities weighted by w^power, (N,) a site; one sum where sites share N."""
    values = case.values(packed)
    conditioned = poutine.condition(case.model, data=values)
    trace = poutine.trace(conditioned).get_trace(*case.args, **case.kwargs)
    sites = []
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or name in values or not node["is_observed"]:
            continue
        density = node["fn"].log_prob(node["value"])
        scale = torch.as_tensor(node["scale"]).double() ** power
        weighted = scale_and_mask(density, scale, node["mask"])
        sites.append(weighted.reshape(len(weighted), -1).sum(1))
    together = len({len(site) for site in sites}) == 1
    return [torch.stack(sites).sum(0)] if together and sites else sites


def dense_empirical_fisher(case: Case) -> Tensor:
    """Sum of outer products of the data's gradients, shape (D, D)."""
    total = torch.zeros(case.num_params, case.num_params, dtype=torch.float64)
    for site, _ in enumerate(datum_densities(case, case.packed, 0.5)):
        rows = jacobian(
            lambda packed, site=site: datum_densities(case, packed, 0.5)[site],
            case.packed,
        )
        for row in rows:
            total += torch.outer(row, row)
    return total


def dense_hessian(case: Case) -> Tensor:
    """Second derivatives of the negative log likelihood, shape (D, D)."""

    def log_likelihood(packed: Tensor) -> Tensor:
        sites = datum_densities(case, packed, 1.0)
        return torch.stack([site.sum() for site in sites]).sum()

    return -hessian(log_likelihood, case.packed)


DENSE: dict[str, Callable[[Case], Tensor]] = {
    "ef": dense_empirical_fisher,
    "hessian": dense_hessian,
}


def likelihood_curvature(
    case: Case, subnet: list[int], kind: Curvature, budget: int = BUDGETS[-1]
) -> Tensor:
    """What the engine sums over the data, symmetric."""
    call, chosen = read_call(case, subnet)
    data = Data.single(case.args, case.kwargs)
    options = FitOptions(kind, form="primal")
    found = subnet_curvature(call.at_map, chosen, data, options, budget=budget)
    lower = found.likelihood.ggn
    return lower.tril() + lower.tril(-1).mT


def positive(case: Case) -> list[int]:
    """Positions among which the exact precision is positive definite."""
    matrix = dense_hessian(case) + case.prior()
    kept: list[int] = []
    for i in range(len(matrix)):
        block = matrix[[*kept, i]][:, [*kept, i]]
        if torch.linalg.eigvalsh(block)[0] > 1e-3:
            kept.append(i)
    return kept


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", CASES)
def test_curvature_of_a_scattered_subnet(
    name: str, budget: int, kind: Curvature
) -> None:
    case = CASES[name](DOUBLE)
    order = sorted(case.scattered())
    expected = DENSE[kind](case)[order][:, order]
    found = likelihood_curvature(case, order, kind, budget)
    assert_close(found, expected, **DOUBLE_TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_the_guide_adds_the_prior_to_the_empirical_fisher(name: str) -> None:
    case = CASES[name](DOUBLE)
    guide = case.guide(curvature="ef")
    posterior = guide.laplace_approximation(*case.args, **case.kwargs)
    expected = dense_empirical_fisher(case) + case.prior()
    found = posterior.get_posterior().precision_matrix
    assert_close(found, expected, **DOUBLE_TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_the_guide_adds_the_prior_to_the_hessian(name: str) -> None:
    case = CASES[name](DOUBLE)
    order = positive(case)
    guide = case.guide(order, curvature="hessian")
    posterior = guide.laplace_approximation(*case.args, **case.kwargs)
    expected = (dense_hessian(case) + case.prior())[order][:, order]
    found = posterior.get_posterior().precision_matrix
    assert_close(found, expected, **DOUBLE_TOLERANCE)


def trained_model(x: Tensor, y: Tensor | None = None) -> None:
    """Logistic regression with a latent scale: its Hessian is no GGN."""
    scale = pyro.sample("scale", dist.Gamma(x.new_tensor(6.0), 5.0))
    w = pyro.sample("w", dist.Normal(x.new_zeros(3), scale).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=(x @ w).sinh()), obs=y)


def test_the_hessian_over_every_weight_is_what_pyro_computes() -> None:
    x, y = inputs(3), (torch.arange(7) % 2).double()
    case = dataclasses.replace(
        CASES["masked_bernoulli"](DOUBLE), model=trained_model, args=(x, y)
    )
    values = {"scale": torch.tensor(1.2).double(), "w": draw(2, 3) * 0.2}
    init = pyro.infer.autoguide.initialization.init_to_value(values=values)
    theirs = AutoLaplaceApproximation(trained_model, init_loc_fn=init)
    theirs(*case.args)
    covariance = theirs.laplace_approximation(*case.args).get_posterior()
    ours = type(case.guide())(trained_model, init_loc_fn=init, curvature="hessian")
    found = ours.laplace_approximation(*case.args).get_posterior()
    assert_close(
        found.covariance_matrix,
        covariance.covariance_matrix.detach(),
        **tolerance(torch.float64, "autograd"),
    )


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    "name", ["classification_mlp", "cnn", "weighted_poisson", "heteroscedastic"]
)
def test_batches_add_up_to_the_one_call(name: str, size: int, kind: Curvature) -> None:
    case = CASES[name](DOUBLE)
    order = positive(case)
    whole = case.guide(order, curvature=kind).laplace_approximation(*case.args)
    rows = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    batches = [tuple(arg[i] for arg in case.args) for i in rows.split(size)]
    parts = case.guide(order, curvature=kind).laplace_approximation_from(batches)
    assert_close(
        parts.get_posterior().precision_matrix,
        whole.get_posterior().precision_matrix,
        **REORDERED,
    )


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("name", ["weighted_poisson", "masked_bernoulli"])
def test_masked_labels_may_be_missing(name: str, kind: Curvature) -> None:
    case = CASES[name](DOUBLE)
    which = {"weighted_poisson": (1, 3), "masked_bernoulli": (2, 1)}[name]
    labels, seen = (case.args[i] for i in which)
    args = list(case.args)
    args[which[0]] = labels.where(seen, torch.nan)
    missing = dataclasses.replace(case, args=tuple(args))
    order = sorted(case.scattered())
    assert_close(
        likelihood_curvature(missing, order, kind),
        DENSE[kind](case)[order][:, order],
        **DOUBLE_TOLERANCE,
    )


def repeated(arg: Any, count: int) -> Any:
    """Data, each of them several times."""
    if isinstance(arg, dict):
        return {key: repeated(value, count) for key, value in arg.items()}
    return torch.cat([arg] * count)


@pytest.mark.parametrize("name", ["several_outputs", "weighted_poisson", "two_sites"])
def test_sampled_labels_give_the_ggn_on_average(name: str) -> None:
    # 60 means over 20 copies of the data. Student's t with 59 degrees of freedom lies
    # beyond the limit of 60 normal checks, 5.1, for 4e-6 of the time: 2e-5 for all 6.
    copies, count = 20, 60
    case = CASES[name](DOUBLE)
    call, chosen = read_call(case, [0, 7, case.num_params - 1])
    args = tuple(repeated(arg, copies) for arg in case.args)
    data = Data.single(args, repeated(case.kwargs, copies))
    lower = torch.tril_indices(3, 3).unbind()
    options = FitOptions("ggn-mc", form="primal")
    torch.manual_seed(5)
    means = torch.stack(
        [
            subnet_curvature(call.at_map, chosen, data, options).likelihood.ggn[lower]
            / copies
            for _ in range(count)
        ]
    )
    order = chosen.flat.tolist()
    expected = case.ggn()[order][:, order][lower]
    error = means.std(0) / count**0.5
    assert bool((error > 0).all())
    gap = (means.mean(0) - expected).abs()
    assert bool((gap < num_standard_errors(60) * error).all())


def test_sampled_labels_take_one_row_per_observation() -> None:
    case = CASES["classification_mlp"](DOUBLE)
    everything = list(range(case.num_params))
    torch.manual_seed(0)
    sampled = likelihood_curvature(case, everything, "ggn-mc")
    full = likelihood_curvature(case, everything, "ggn")
    num_data = len(case.args[0])
    assert int(torch.linalg.matrix_rank(sampled)) == num_data
    assert int(torch.linalg.matrix_rank(full)) > num_data


def test_sampled_labels_follow_the_seed() -> None:
    case = CASES["classification_mlp"](DOUBLE)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(likelihood_curvature(case, [0, 3, 5], "ggn-mc"))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


@pytest.mark.parametrize("kind", EXACT)
def test_the_users_random_numbers_are_left_alone(kind: Curvature) -> None:
    case = CASES["weighted_poisson"](DOUBLE)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    likelihood_curvature(case, [0, 4], kind)
    assert torch.equal(torch.rand(2), expected)


def test_a_hessian_that_is_not_positive_is_an_error() -> None:
    def saddle(y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(y.new_zeros(()), 10.0))
        b = pyro.sample("b", dist.Normal(y.new_zeros(()), 10.0))
        pyro.sample("y", dist.Normal((a * b).expand(len(y)), 0.1).to_event(1), obs=y)

    guide = type(CASES["cnn"](DOUBLE).guide())(saddle, curvature="hessian")
    with pytest.raises(PrecisionError, match=r"smallest eigenvalue -.*Train closer"):
        guide.laplace_approximation(torch.full((4,), 2.0).double())


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", CASES)
def test_the_diagonal_is_that_of_the_matrix(name: str, budget: int) -> None:
    case = CASES[name](DOUBLE)
    call, _ = read_call(case, [0])
    data = Data.single(case.args, case.kwargs)
    found = diagonal_curvature(call.at_map, data, kind="ef", budget=budget)
    assert_close(found.ggn, dense_empirical_fisher(case).diagonal(), **DOUBLE_TOLERANCE)


@pytest.mark.filterwarnings("ignore::pyro_subnet.exceptions.NoOutputVarianceWarning")
def test_largest_variance_ranks_by_the_empirical_fisher() -> None:
    case = CASES["classification_mlp"](DOUBLE)
    size = 9
    guide = case.guide(LargestVariance(size, estimator="ef"))
    found = guide.laplace_approximation(*case.args).subnet
    variance = 1 / (dense_empirical_fisher(case) + case.prior()).diagonal()
    best = variance.topk(size + 1).values
    assert best[-2] > best[-1] * (1 + 1e-6)
    assert set(found.flat.tolist()) == set(variance.topk(size).indices.tolist())


def test_every_kind_serves_without_outputs_that_move() -> None:
    def model(y: Any = None) -> None:
        pyro.sample("w", dist.Normal(torch.zeros(2).double(), 0.5).to_event(1))
        pyro.sample("y", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1), obs=y)

    for kind in ("ggn", "ggn-mc", "ef", "hessian"):
        guide = type(CASES["cnn"](DOUBLE).guide())(model, curvature=kind)
        with pytest.warns(UserWarning, match="moves no output"):
            posterior = guide.laplace_approximation(torch.ones(3).double())
        precision = posterior.get_posterior().precision_matrix
        assert_close(precision, 4 * torch.eye(2).double())
        assert posterior.subnet.size == guide.latents.everything.size
