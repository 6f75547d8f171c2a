"""Comparisons of selectors, against dense matrices, square roots and quadrature."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jaxtyping
import psutil
import pyro
import pyro.distributions as dist
import pytest
import scipy.linalg
import torch
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, Subnet
from pyro_subnet.comparison.compare import (
    SubnetComparison,
    SubnetComparisonRow,
    compare_subnets,
)
from pyro_subnet.exceptions import (
    MemoryLimitError,
    ModelError,
    OptionError,
    SelectionError,
)
from pyro_subnet.selection import (
    GreedyVariance,
    LargestGradient,
    LargestMagnitude,
    LargestVariance,
    LastLayer,
    PredictiveVariance,
    RandomSubnet,
    Subspace,
)
from tests.cases import (
    CASES,
    DOUBLE,
    NUM_DATA,
    Case,
    classification_mlp,
    double,
    draw,
    mlp_outputs,
    regression_mlp,
    several_outputs,
)
from tests.reference import dense_jacobian
from tests.tolerances import tolerance

AUTOGRAD = tolerance(torch.float64, "autograd")


def compare(case: Case, **options: Any) -> SubnetComparison:
    pyro.clear_param_store()
    return compare_subnets(
        case.guide(), *case.args, model_kwargs=case.kwargs, **options
    )


def fixed(positions: list[int]) -> Any:
    """A selector of given weights."""

    def choose(guide: Any, data: Any) -> Subnet:
        return Subnet.from_positions(guide.latents.layout, torch.tensor(positions))

    return choose


def embedded(p: Tensor, chosen: list[int]) -> Tensor:
    """P_SS⁻¹ with zeros around."""
    covariance = torch.zeros_like(p)
    at = torch.tensor(chosen)
    covariance[at[:, None], at] = p[at][:, at].inverse()
    return covariance


def distance(first: Tensor, second: Tensor, chosen: list[int]) -> float:
    """2-Wasserstein of centred Gaussians, by scipy's square roots.

    The second is zero but for the chosen rows and columns, where its root is regular.
    """
    root = scipy.linalg.sqrtm(second[chosen][:, chosen].numpy())
    cross = scipy.linalg.sqrtm(root @ first[chosen][:, chosen].numpy() @ root)
    squared = float(first.trace() + second.trace()) - 2 * cross.trace().real
    return math.sqrt(max(0.0, squared))


def normal_kl(first: Tensor, second: Tensor) -> Tensor:
    """By torch's multivariate normals, one observation at a time."""
    return torch.stack(
        [
            torch.distributions.kl_divergence(
                torch.distributions.MultivariateNormal(torch.zeros(len(a)).to(a), a),
                torch.distributions.MultivariateNormal(torch.zeros(len(b)).to(b), b),
            )
            for a, b in zip(first, second, strict=True)
        ]
    )


@pytest.mark.parametrize("case_of", [regression_mlp, several_outputs])
def test_regression(case_of: Any) -> None:
    case = case_of(DOUBLE)
    c = 1 if case_of is regression_mlp else 3
    width = 3 if case_of is regression_mlp else 2
    noise = double([0.3] if c == 1 else [0.3, 1.0, 2.5])
    p = case.ggn() + case.prior()
    sigma = p.inverse()
    shifted = draw(21, 5, width) + 2
    subsets = {"a": [0], "b": [1, 4, 7, case.num_params - 1]}
    subsets["c"] = list(range(case.num_params))
    result = compare(
        case,
        selectors={name: fixed(chosen) for name, chosen in subsets.items()},
        inputs={"in": case.args, "out": [shifted[:2], shifted[2:]]},
        subspace=False,
    )
    assert result.num_params == case.num_params
    rows = iter(result.rows)
    for name, chosen in subsets.items():
        own = embedded(p, chosen)
        for where, x in (("in", case.args[0]), ("out", shifted)):
            row = next(rows)
            assert (row.selector, row.size, row.inputs) == (name, len(chosen), where)
            jac = dense_jacobian(
                lambda u, x=x: mlp_outputs(x, case.values(u)), case.packed
            )
            full_var, own_var = jac @ sigma @ jac.mT, jac @ own @ jac.mT
            kept = own_var.diagonal(dim1=1, dim2=2).sum()
            kept = kept / full_var.diagonal(dim1=1, dim2=2).sum()
            assert row.kept_variance == pytest.approx(float(kept), rel=1e-8)
            expected = distance(sigma, own, chosen) ** 2
            scale = float(sigma.trace())
            assert row.wasserstein**2 == pytest.approx(expected, abs=1e-7 * scale)
            r = torch.diag(noise**2)
            kl = float(normal_kl(full_var + r, own_var + r).mean())
            assert row.kl == pytest.approx(kl, rel=1e-8, abs=1e-10)
    assert next(rows, None) is None
    assert row.kept_variance == pytest.approx(1.0, rel=1e-10)
    assert row.kl == pytest.approx(0.0, abs=1e-10)
    assert row.wasserstein == pytest.approx(0.0, abs=1e-6)


def test_classes() -> None:
    case = classification_mlp(DOUBLE)
    p = case.ggn() + case.prior()
    chosen = [0, 5, 11, 20, 25]
    (row,) = compare(case, selectors={"x": fixed(chosen)}, subspace=False).rows
    jac = case.jacobian(0).unflatten(0, (NUM_DATA, 3))
    eta = case.observed[0].outputs(case.values(case.packed))
    total = 0.0
    for n in range(NUM_DATA):
        probabilities = []
        for covariance in (p.inverse(), embedded(p, chosen)):
            v = (jac[n] @ covariance @ jac[n].T).diagonal()
            weights = (eta[n] / (1 + math.pi * v / 8).sqrt()).exp()
            probabilities.append(weights / weights.sum())
        full, own = probabilities
        total += float((full * (full / own).log()).sum())
    assert row.kl == pytest.approx(total / NUM_DATA, rel=1e-8)
    assert row.kl > 0


def test_bernoulli_and_log_normal_sites() -> None:
    """Two sites over one input: their divergences are added up."""
    x, n = draw(3, 6, 2), 6

    def model(x: Tensor, y: Any = None, z: Any = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2).to(x), 1.0).to_event(1))
        v = pyro.sample("v", dist.Normal(torch.zeros(2).to(x), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)
            pyro.sample("z", dist.LogNormal(x @ v, 0.5), obs=z)

    pyro.clear_param_store()
    at = {"w": draw(4, 2), "v": draw(5, 2)}
    guide = AutoSubnetLaplace(
        model,
        init_loc_fn=init_to_value(values=at),
    )
    y, z = (draw(6, n) > 0).double(), draw(7, n).exp()
    (row,) = compare_subnets(
        guide, x, y, z, selectors={"s": fixed([0, 3])}, subspace=False
    ).rows
    logits = x @ at["w"]
    q = 1 / (1 + (-logits).exp())
    p_w = (x.T * (q * (1 - q))) @ x + torch.eye(2).double()
    p_v = x.T @ x / 0.25 + torch.eye(2).double()
    expected = 0.0
    for i in range(n):
        first = float(x[i] @ p_w.inverse() @ x[i])
        second = float(x[i, 0] ** 2 / p_w[0, 0])
        a, b = (
            float(torch.sigmoid(logits[i] / math.sqrt(1 + math.pi * v / 8)))
            for v in (first, second)
        )
        expected += a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))
        first = float(x[i] @ p_v.inverse() @ x[i]) + 0.25
        second = float(x[i, 1] ** 2 / p_v[1, 1]) + 0.25
        expected += 0.5 * (first / second - 1 - math.log(first / second))
    assert row.kl == pytest.approx(expected / n, rel=1e-9)


def test_a_family_without_a_closed_form() -> None:
    result = compare(
        CASES["weighted_poisson"](DOUBLE), selectors={"x": RandomSubnet(3)}
    )
    assert [row.kl for row in result.rows] == [None, None]
    assert result.table().splitlines()[1].endswith(" -")


@pytest.mark.parametrize("weighting", ["equal", "fisher"])
def test_every_selector_at_every_size_below_the_bound(weighting: Any) -> None:
    case = classification_mlp(DOUBLE)
    x = draw(8, 6, 3)
    selectors = [
        LargestVariance(1),
        LargestGradient(1),
        GreedyVariance(1),
        PredictiveVariance(1, method="diagonal", weighting=weighting),
        LargestMagnitude(1),
        RandomSubnet(1, seed=3),
        LastLayer(),
    ]
    result = compare(
        case,
        selectors=selectors,
        sizes=[2, 0.5, case.num_params],
        inputs={"training": None, "shifted": x * 3},
        weighting=weighting,
    )
    d = case.num_params
    last = 12
    by_size = {
        (row.inputs, row.size): row.kept_variance
        for row in result.rows
        if row.selector == "Subspace"
    }
    assert {size for _, size in by_size} == {2, last, round(d / 2), d}
    names = [type(selector).__name__ for selector in selectors]
    for name in names:
        own = [row for row in result.rows if row.selector == name]
        sizes = [last] if name == "LastLayer" else [2, round(d / 2), d]
        assert [row.size for row in own if row.inputs == "shifted"] == sizes
        for where in ("training", "shifted"):
            rows = [row for row in own if row.inputs == where]
            for row in rows:
                bound = by_size[where, row.size]
                assert row.kept_variance <= bound + 1e-9
            distances = [row.wasserstein for row in rows]
            assert distances == sorted(distances, reverse=True)
    # The same numbers as the subspace's own.
    pyro.clear_param_store()
    guide = case.guide()
    guide(*case.args)
    bound = Subspace(d, x * 3, weighting).fit(guide, *case.args).kept_variance
    assert by_size["shifted", 2] == pytest.approx(float(bound[1]), rel=1e-9)


def test_rows_of_the_subspace() -> None:
    case = regression_mlp(DOUBLE)
    p = case.ggn() + case.prior()
    _, row = compare(case, selectors={"x": RandomSubnet(3)}).rows
    pyro.clear_param_store()
    guide = case.guide()
    guide(*case.args)
    basis = Subspace(3).fit(guide, *case.args).basis
    own = basis @ basis.T
    # The trace of the root is the sum of the roots of the eigenvalues of the product.
    cross = torch.linalg.eigvals(p.inverse() @ own).real.clamp(min=0).sqrt().sum()
    expected = float(p.inverse().trace() + own.trace() - 2 * cross)
    assert (row.selector, row.size) == ("Subspace", 3)
    assert row.wasserstein**2 == pytest.approx(
        expected, abs=1e-7 * float(p.inverse().trace())
    )
    jac = case.jacobian(0).unsqueeze(1)
    r = 0.3**2
    kl = normal_kl(jac @ p.inverse() @ jac.mT + r, jac @ own @ jac.mT + r)
    assert row.kl == pytest.approx(float(kl.mean()), rel=1e-8)


def test_table() -> None:
    rows = (
        SubnetComparisonRow("LargestVariance", 12, "training", 0.5, 1.23456, 0.001234),
        SubnetComparisonRow("Subspace", 3, "shifted", 1.0, 10.0, None),
    )
    comparison = SubnetComparison(rows, 20)
    assert str(comparison) == comparison.table()
    assert comparison.table().splitlines() == [
        "selector          S  inputs      kept     W2        KL",
        "LargestVariance  12  training  0.5000  1.235  0.001234",
        "Subspace          3  shifted   1.0000     10         -",
    ]


def test_the_guide_is_left_as_it_was() -> None:
    case = regression_mlp(DOUBLE)
    pyro.clear_param_store()
    guide = case.guide()
    guide(*case.args)
    before, state = guide.loc.detach().clone(), torch.get_rng_state()
    compare_subnets(guide, *case.args, selectors=[LargestVariance(3)])
    assert_close(guide.loc.detach(), before, rtol=0, atol=0)
    assert_close(torch.get_rng_state(), state, rtol=0, atol=0)


def test_float32() -> None:
    expected = compare(regression_mlp(DOUBLE), selectors=[LargestVariance(4)])
    found = compare(regression_mlp(DOUBLE.float()), selectors=[LargestVariance(4)])
    for ours, theirs in zip(found.rows, expected.rows, strict=True):
        assert ours.kept_variance == pytest.approx(theirs.kept_variance, rel=1e-3)
        assert ours.wasserstein == pytest.approx(theirs.wasserstein, rel=1e-3)
        assert ours.kl == pytest.approx(theirs.kl, rel=1e-3)


@pytest.fixture
def as_users_run_it() -> Iterator[None]:
    """Without the run-time type checks of the tests, which come before our own."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"selectors": {}}, OptionError, r"at least one, .*; got \[\]"),
        (
            {"selectors": [RandomSubnet(1), RandomSubnet(2)]},
            OptionError,
            r"a name of its own; got \['RandomSubnet', 'RandomSubnet'\]",
        ),
        ({"inputs": {}}, OptionError, "at least one set of inputs; got none"),
        ({"inputs": {"a": 3}}, OptionError, "`inputs` must be a tensor, .*got int"),
        (
            {"inputs": {"a": torch.zeros(2, 3).double() * torch.nan}},
            Exception,
            "must be finite",
        ),
        ({"weighting": "x"}, OptionError, "must be 'equal' or 'fisher'; got 'x'"),
        (
            {"selectors": {"s": Subspace(2)}},
            SelectionError,
            "must return a Subnet; got SubspacePosterior",
        ),
        ({"sizes": [99]}, SelectionError, "parameters, 21; got 99"),
    ],
)
def test_errors(options: Any, error: Any, message: str) -> None:
    case = regression_mlp(DOUBLE)
    with pytest.raises(error, match=message):
        compare(case, **{"selectors": [RandomSubnet(1)], **options})


def test_observed_sites_of_two_lengths() -> None:
    message = r"must share one data axis .*; got lengths \{'y': 7, 'count': 5\}"
    with pytest.raises(ModelError, match=message):
        compare(CASES["two_lengths"](DOUBLE), selectors=[RandomSubnet(1)])


def test_memory_is_checked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    case = regression_mlp(DOUBLE)
    free = SimpleNamespace(available=8 * 8 * 20**2)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    with pytest.raises(MemoryLimitError, match=r"got S=21.*Choose at most 20 weights"):
        compare(case, selectors=[RandomSubnet(1)])
