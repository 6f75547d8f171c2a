"""The best subspace, against dense eigenvectors and against every subset."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace
from typing import Any

import psutil
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.exceptions import (
    MemoryLimitError,
    OptionError,
    PrecisionError,
    SelectionError,
)
from pyro_subnet.selection import Subspace, SubspacePosterior
from pyro_subnet.tracing.data import Data
from tests.cases import (
    CASES,
    DOUBLE,
    Case,
    draw,
    mlp_outputs,
    regression_mlp,
)
from tests.reference import dense_jacobian
from tests.tolerances import tolerance

AUTOGRAD = tolerance(torch.float64, "autograd")
NAMES = [
    "regression_mlp",
    "several_outputs",
    "classification_mlp",
    "heteroscedastic",
    "two_sites",
]


def fit(case: Case, subspace: Subspace) -> SubspacePosterior:
    pyro.clear_param_store()
    guide = case.guide()
    guide(*case.args, **case.kwargs)
    return subspace.fit(guide, *case.args, **case.kwargs)


def dense(case: Case, weighting: str = "equal") -> tuple[Tensor, Tensor]:
    """P, and Σ JᵀJ or Σ w JᵀΛJ, over all weights."""
    if weighting == "fisher":
        return case.ggn() + case.prior(), case.ggn()
    rows = torch.cat([case.jacobian(site) for site in range(len(case.observed))])
    return case.ggn() + case.prior(), rows.T @ rows


@pytest.mark.parametrize("weighting", ["equal", "fisher"])
@pytest.mark.parametrize("name", NAMES)
def test_kept_variance_is_that_of_the_leading_eigenvalues(
    name: str, weighting: Any
) -> None:
    """P⁻¹ A has the eigenvalues of the predictive covariance."""
    case = CASES[name](DOUBLE)
    p, a = dense(case, weighting)
    values = torch.linalg.eigvals(torch.linalg.solve(p, a)).real.sort(descending=True)
    shares = values.values.cumsum(0) / values.values.sum()
    for size in (1, 4, case.num_params):
        found = fit(case, Subspace(size, weighting=weighting))
        assert_close(found.kept_variance, shares[:size], **AUTOGRAD)
        # B spans it, and the posterior on it is that of the restricted model.
        b = found.basis
        assert b.shape == (case.num_params, size)
        assert_close(b.T @ p @ b, torch.eye(size).double(), **AUTOGRAD)
        kept = (b.T @ a @ b).trace() / torch.linalg.solve(p, a).trace()
        assert_close(kept, found.kept_variance[-1], **AUTOGRAD)


@pytest.mark.parametrize("name", NAMES)
def test_no_subset_keeps_more(name: str) -> None:
    case = CASES[name](DOUBLE)
    p, a = dense(case)
    total = torch.linalg.solve(p, a).trace()
    bound = fit(case, Subspace(case.num_params)).kept_variance
    generator = torch.Generator().manual_seed(1)
    some = [
        torch.randperm(case.num_params, generator=generator)[:size].tolist()
        for size in range(1, case.num_params + 1)
        for _ in range(20)
    ]
    pairs = [list(pair) for pair in combinations(range(case.num_params), 2)]
    for chosen in some + pairs:
        own = torch.linalg.solve(p[chosen][:, chosen], a[chosen][:, chosen])
        assert float(own.trace() / total) <= float(bound[len(chosen) - 1]) + 1e-9
    assert_close(bound[-1], torch.ones(()).double(), **AUTOGRAD)


def test_projected_predictive_at_other_inputs() -> None:
    case = regression_mlp(DOUBLE)
    p, _ = dense(case)
    reference, x = draw(7, 5, 3), draw(8, 4, 3)

    def rows(inputs: Tensor) -> Tensor:
        return dense_jacobian(
            lambda u: mlp_outputs(inputs, case.values(u)), case.packed
        )

    jac, jac_at = rows(reference).flatten(0, 1), rows(x)
    _, vectors = torch.linalg.eigh(jac @ torch.linalg.solve(p, jac.T))
    for size in (1, 3, 5):
        found = fit(case, Subspace(size, reference))
        # By the eigenvectors of the predictive covariance, mapped back to weights.
        b = torch.linalg.solve(p, jac.T @ vectors[:, -size:])
        expected = jac_at @ b @ torch.linalg.solve(b.T @ p @ b, b.T) @ jac_at.mT
        projected = jac_at @ found.basis
        assert_close(projected @ projected.mT, expected, **AUTOGRAD)
    # five rows have rank five: all of the variance there
    assert float(found.kept_variance[-1]) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("name", ["several_outputs", "classification_mlp"])
def test_all_directions_are_the_full_posterior(name: str) -> None:
    case = CASES[name](DOUBLE)
    found = fit(case, Subspace(1.0))
    pyro.clear_param_store()
    full = (
        case.guide().laplace_approximation(*case.args).output_distribution(case.args[0])
    )
    rows = case.jacobian(0).unflatten(0, full.loc.shape) @ found.basis
    assert_close(rows @ rows.mT, full.covariance_matrix, **AUTOGRAD)


def test_batches_of_inputs_and_of_training_data() -> None:
    case = regression_mlp(DOUBLE)
    pyro.clear_param_store()
    guide = case.guide()
    guide(*case.args)
    x, y = case.args
    whole = Subspace(3, x[:5]).fit(guide, x, y)
    batches = Data([(x[:4], y[:4]), (x[4:], y[4:])], whole=False)
    found = Subspace(3, [x[:2], x[2:5]])(guide, batches)
    assert_close(found.kept_variance, whole.kept_variance, **AUTOGRAD)
    assert_close(found.basis @ found.basis.T, whole.basis @ whole.basis.T, **AUTOGRAD)


def test_float32_models_are_served_in_float64() -> None:
    expected = fit(regression_mlp(DOUBLE), Subspace(4)).kept_variance
    found = fit(regression_mlp(DOUBLE.float()), Subspace(4)).kept_variance
    assert found.dtype == torch.float64
    assert_close(found, expected, rtol=1e-4, atol=0)


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SelectionError, match="`size` must be a positive int"):
        Subspace(0)
    with pytest.raises(OptionError, match=r"`inputs` must be a tensor, .*; got int"):
        Subspace(2, 3)
    case = regression_mlp(DOUBLE)
    with pytest.raises(SelectionError, match="latent parameters, 21; got 22"):
        fit(case, Subspace(22))
    free = SimpleNamespace(available=6 * 8 * 20**2)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    with pytest.raises(MemoryLimitError, match=r"got S=21.*Choose at most 20 weights"):
        fit(case, Subspace(2))


def test_a_precision_that_is_not_positive_definite() -> None:
    """A Cauchy prior has the curvature 2 (1 - w²) / (1 + w²)², negative at w = 3."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Cauchy(torch.zeros(2).to(x), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x * w[0], 1.0), obs=y)

    at = {"w": torch.tensor([0.0, 3.0]).double()}
    guide = AutoSubnetLaplace(model, init_loc_fn=init_to_value(values=at))
    x, y = draw(1, 5), draw(2, 5)
    guide(x, y)
    with pytest.raises(PrecisionError, match=r"S=2 .* smallest eigenvalue -1\.600e-01"):
        Subspace(1).fit(guide, x, y)
