"""What ArviZ's users do, end to end, under either generation of ArviZ.

No torch: ``make test-arviz1`` runs this file where there is none, on posteriors that
were stored; PYRO_SUBNET_POSTERIORS names their folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from statistics import NormalDist
from typing import Any

import arviz as az
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy import stats

from tests.export.generation import (
    IS_1,
    PLOTS,
    Array,
    bayes_factors,
    comparison,
    drawn_class_counts,
    drawn_forest,
    elpd,
    elpd_by_datum,
    extended,
    group,
    loo_pit,
)
from tests.export.known import FEATURES, KINDS, NOISE, NUM_DATA, NUM_DRAWS, WIDTHS

STORED = os.environ.get("PYRO_SUBNET_POSTERIORS")
NETWORKS = [f"width {width}" for width in WIDTHS]
# What pandas 3.1 and matplotlib 3.11 say of ArviZ 0.23.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.sort_values"),
    pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping"),
]


@pytest.fixture(scope="module")
def posteriors() -> dict[str, Any]:
    """By name; made here, or stored by a run that has torch."""
    if STORED is None:
        return dict(import_module("tests.export.posteriors").made())
    found = {path.stem: az.from_netcdf(str(path)) for path in Path(STORED).iterdir()}
    return {name: data.load() or data for name, data in found.items()}


@pytest.fixture
def pictures() -> Iterator[None]:
    """Pictures without a screen, closed at the end."""
    with mpl.rc_context({"backend": "Agg"}):
        yield
        plt.close("all")


def num_standard_errors(num_checks: int) -> float:
    """As in `tests/tolerances.py`, which needs torch."""
    return NormalDist().inv_cdf(1 - 2e-5 / (2 * num_checks))


def flat(data: Any, name: str, variable: str) -> Array:
    """Values of a variable, chains joined."""
    array = data[name][variable].values
    return np.asarray(array.reshape(-1, *array.shape[2:]))


# ----------------------------------------------------------------------------------
# Closed forms: y is normal about features @ w, and w standard normal.


def exact_posterior(data: Any) -> tuple[Array, Array]:
    """Mean and covariance of w."""
    features = data["constant_data"]["features"].values
    y = data["observed_data"]["y"].values
    precision = features.T @ features / NOISE**2 + np.eye(features.shape[1])
    covariance = np.linalg.inv(precision)
    return covariance @ features.T @ y / NOISE**2, covariance


def exact_loo(data: Any) -> tuple[Array, Array]:
    """Mean and standard deviation of each y, predicted from all others."""
    features = data["constant_data"]["features"].values
    y = data["observed_data"]["y"].values
    found = []
    for n in range(len(y)):
        phi, rest = np.delete(features, n, axis=0), np.delete(y, n)
        precision = phi.T @ phi / NOISE**2 + np.eye(features.shape[1])
        covariance = np.linalg.inv(precision)
        mean = features[n] @ covariance @ phi.T @ rest / NOISE**2
        variance = features[n] @ covariance @ features[n] + NOISE**2
        found.append((mean, np.sqrt(variance)))
    return np.array([m for m, _ in found]), np.array([s for _, s in found])


def errors_of_loo(data: Any) -> tuple[Array, Array]:
    """Standard errors of log density and PIT by importance weights, by quadrature."""
    features = data["constant_data"]["features"].values
    y = data["observed_data"]["y"].values
    mean, covariance = exact_posterior(data)
    spread = np.sqrt(np.einsum("ni,ij,nj->n", features, covariance, features))
    grid = np.linspace(-12, 12, 4001)
    mass = stats.norm.pdf(grid) / stats.norm.pdf(grid).sum()
    loo_mean, loo_spread = exact_loo(data)
    exact_pit = stats.norm.cdf(y, loo_mean, loo_spread)
    density, pit = [], []
    for n in range(len(y)):
        f = features[n] @ mean + spread[n] * grid
        weight = 1 / stats.norm.pdf(y[n], f, NOISE)
        first, second = (mass * weight).sum(), (mass * weight**2).sum()
        density.append(np.sqrt((second / first**2 - 1) / NUM_DRAWS))
        below, p = stats.norm.cdf(y[n], f, NOISE), exact_pit[n]
        square = (mass * weight**2 * (below * (1 - 2 * p) + p**2)).sum()
        pit.append(np.sqrt(square / first**2 / NUM_DRAWS))
    return np.array(density), np.array(pit)


# ----------------------------------------------------------------------------------


def test_the_container_is_what_this_arviz_has(posteriors: dict[str, Any]) -> None:
    kind = type(posteriors["linear"])
    expected = ("xarray", "DataTree") if IS_1 else ("arviz", "InferenceData")
    assert (kind.__module__.partition(".")[0], kind.__name__) == expected
    meant = os.environ.get("PYRO_SUBNET_ARVIZ")  # by `make test-arviz1`
    assert meant in {None, az.__version__.partition(".")[0]}


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("linear", [*(f"w[{feature}]" for feature in FEATURES), "b"]),
        ("elements", ["w[0]", "w[1]", "w[2]", "b"]),
        ("width 4", ["v[0]", "v[1]", "v[2]", "v[3]"]),
        ("classes", [f"w[{f}, {kind}]" for f in FEATURES for kind in KINDS]),
    ],
)
def test_rows_of_the_summary(
    name: str, rows: list[str], posteriors: dict[str, Any]
) -> None:
    data = posteriors[name]
    table = az.summary(data, kind="stats", round_to="none")
    assert list(table.index) == rows
    drawn = [flat(data, "posterior", site) for site in data["posterior"].data_vars]
    draws = np.concatenate([d.reshape(len(d), -1) for d in drawn], axis=1)
    np.testing.assert_allclose(table["mean"].astype(float), draws.mean(0), rtol=1e-9)
    np.testing.assert_allclose(table["sd"].astype(float), draws.std(0, ddof=1), 1e-9)


def test_three_networks_compared(posteriors: dict[str, Any], pictures: None) -> None:
    models = {name: posteriors[name] for name in NETWORKS}
    table = comparison(models)
    y = models[NETWORKS[0]]["observed_data"]["y"].values
    terms = {
        name: stats.norm.logpdf(y, *exact_loo(data)) for name, data in models.items()
    }
    exact = {name: each.sum() for name, each in terms.items()}
    ranked = sorted(exact, key=lambda name: -exact[name])
    assert list(table.index) == ranked
    bound = num_standard_errors(2 * len(models))
    errors = {
        name: bound * np.sqrt((errors_of_loo(data)[0] ** 2).sum())
        for name, data in models.items()
    }
    for name in ranked:
        assert abs(table["elpd"][name] - exact[name]) < errors[name]
        difference = terms[ranked[0]] - terms[name]
        error = errors[ranked[0]] + errors[name]
        assert abs(table["elpd_diff"][name] - difference.sum()) < error
        # The spread over data is far larger than what few draws do to it.
        spread = np.sqrt(len(y) * difference.var())
        assert table["dse"][name] == pytest.approx(spread, abs=error)
    assert table["weight"].sum() == pytest.approx(1)
    assert max(errors.values()) < 0.5 * min(
        exact[ranked[i]] - exact[ranked[i + 1]] for i in range(2)
    )
    az.plot_compare(az.compare(models))
    assert plt.get_fignums()


@pytest.mark.parametrize("name", ["linear", *NETWORKS])
def test_leaving_one_out(name: str, posteriors: dict[str, Any]) -> None:
    data = posteriors[name]
    found = az.loo(data, pointwise=True)
    y = data["observed_data"]["y"].values
    exact = stats.norm.logpdf(y, *exact_loo(data))
    errors, _ = errors_of_loo(data)
    assert (abs(elpd_by_datum(found) - exact) < num_standard_errors(40) * errors).all()
    assert errors.max() < 0.1
    assert elpd(found) == pytest.approx(elpd_by_datum(found).sum())
    assert found.n_data_points == NUM_DATA


@pytest.mark.skipif(IS_1, reason="ArviZ 1.x has no WAIC")
# It is told of data with leverage.
@pytest.mark.filterwarnings("ignore:For one or more samples the posterior variance")
@pytest.mark.parametrize("name", ["linear", *NETWORKS])
def test_waic(name: str, posteriors: dict[str, Any]) -> None:
    """In models this regular it is LOO to a few percent of its error."""
    loo, waic = az.loo(posteriors[name]), az.waic(posteriors[name])
    assert abs(elpd(loo) - waic.elpd_waic) < 0.1 * loo.se


@pytest.mark.parametrize("name", ["linear", *NETWORKS])
def test_pit_of_leaving_one_out(name: str, posteriors: dict[str, Any]) -> None:
    data = posteriors[name]
    y = data["observed_data"]["y"].values
    found = loo_pit(data, "y")
    exact = stats.norm.cdf(y, *exact_loo(data))
    _, errors = errors_of_loo(data)
    assert (abs(found - exact) < num_standard_errors(NUM_DATA) * errors).all()
    # From the same draws, by the definition: the weights' tails are not smoothed here,
    # which moves no value by as much as leaving an observation out does.
    weights = 1 / np.exp(flat(data, "log_likelihood", "y"))
    below = flat(data, "posterior_predictive", "y") <= y
    direct = (weights * below).sum(0) / weights.sum(0)
    np.testing.assert_allclose(found, direct, rtol=0, atol=1e-3)
    assert abs(found - below.mean(0)).max() > 1e-2


# What ArviZ 1.3 says of an array of its own.
@pytest.mark.filterwarnings("ignore:Found chain dimension to be longer than draw")
def test_predictive_check_of_classes(
    posteriors: dict[str, Any], pictures: None
) -> None:
    data = posteriors["classes"]
    y = data["observed_data"]["y"].values
    counts = np.bincount(y, minlength=3)
    assert counts.min() > 0
    np.testing.assert_allclose(drawn_class_counts(data, len(y)), counts, rtol=1e-12)
    assert set(np.unique(flat(data, "posterior_predictive", "y"))) == {0, 1, 2}


def test_posterior_against_prior(posteriors: dict[str, Any], pictures: None) -> None:
    """By Savage and Dickey's ratio of densities at 0, and moments."""
    data = posteriors["linear"]
    mean, covariance = exact_posterior(data)
    spread = np.sqrt(covariance[-1, -1])
    factor = bayes_factors(data, "b")
    exact = stats.norm.pdf(0, mean[-1], spread) / stats.norm.pdf(0)
    # A kernel estimate of a density p, with bandwidth h of 2,000 draws, has variance
    # 0.28 p / (2000 h). Silverman's h is 0.2 standard deviations, and 0.2 < p < 0.4 per
    # standard deviation: 4 to 6 percent, twice, and bias below that.
    assert factor["BF01"] == pytest.approx(exact, rel=0.35)
    assert factor["BF01"] * factor["BF10"] == pytest.approx(1)
    bound = num_standard_errors(4) / np.sqrt(NUM_DRAWS)
    for name, at, sd in (("prior", 0.0, 1.0), ("posterior", mean[-1], spread)):
        draws = flat(data, name, "b")
        assert abs(draws.mean() - at) < bound * sd
        assert abs(draws.std() / sd - 1) < bound


def exact_r_hat(draws: Array) -> float:
    """Of split chains, by ranks, as they are and folded (Vehtari et al., 2021)."""
    chains, count = draws.shape
    split = draws[:, : count // 2 * 2].reshape(2 * chains, -1)
    found = []
    for values in (split, abs(split - np.median(split))):
        ranks = stats.rankdata(values).reshape(values.shape)
        z = stats.norm.ppf((ranks - 3 / 8) / (values.size + 1 / 4))
        within = z.var(axis=1, ddof=1).mean()
        between = z.mean(axis=1).var(ddof=1)
        length = z.shape[1]
        found.append(np.sqrt((length - 1) / length + between / within))
    return float(max(found))


def test_several_chains_of_the_hybrid_model(posteriors: dict[str, Any]) -> None:
    data = posteriors["nuts"]
    w = data["posterior"]["w"]
    assert w.dims == ("chain", "draw", "feature")
    assert w.sizes["chain"] == 2
    r_hat, mcse = az.rhat(data)["w"], az.mcse(data)["w"]
    mean, covariance = exact_posterior(data)
    for i, feature in enumerate(FEATURES):
        draws = w.sel(feature=feature).values
        expected = exact_r_hat(draws)
        assert float(r_hat.sel(feature=feature)) == pytest.approx(expected, rel=1e-9)
        # The posterior is exact here; chains find it within their own error.
        error = num_standard_errors(3) * float(mcse.sel(feature=feature))
        assert abs(draws.mean() - mean[i]) < error
        assert error < np.sqrt(covariance[i, i])
    assert not data["sample_stats"]["diverging"].values.any()
    rates = data["sample_stats"].attrs["acceptance_rate"]
    assert len(rates) == 2


@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto:UserWarning")
def test_laplace_beside_nuts(posteriors: dict[str, Any], pictures: None) -> None:
    both = {name: posteriors[name] for name in ("as many as nuts", "nuts")}
    nuts, laplace = both["nuts"], posteriors["linear"]
    assert drawn_forest(both) == 2 * 4
    for name in ("posterior", "posterior_predictive", "log_likelihood", "prior"):
        assert set(laplace[name]) == set(nuts[name])
    found = elpd(az.loo(laplace)), elpd(az.loo(nuts))
    y = laplace["observed_data"]["y"].values
    exact = stats.norm.logpdf(y, *exact_loo(laplace)).sum()
    error = np.sqrt((errors_of_loo(laplace)[0] ** 2).sum())
    bound = num_standard_errors(2)
    assert abs(found[0] - exact) < bound * error
    # 300 draws of NUTS are worth at least 100 independent ones.
    assert abs(found[1] - exact) < bound * error * np.sqrt(NUM_DRAWS / 100)


def test_groups_are_added(posteriors: dict[str, Any]) -> None:
    """A call without the prior, and another's prior: the first one's groups stay."""
    ours, other = posteriors["elements"], posteriors["linear"]
    assert "prior" not in ours
    both = extended(ours, other)
    assert set(both) == set(ours) | set(other)
    for name in both:
        source = ours if name in ours else other
        assert group(both, name).identical(group(source, name)), name
    assert "prior" not in ours


@pytest.mark.parametrize("name", ["linear", "nuts", "classes", "width 1"])
def test_into_a_file_and_back(
    name: str, posteriors: dict[str, Any], tmp_path: Path
) -> None:
    data = posteriors[name]
    path = str(tmp_path / "posterior.nc")
    data.to_netcdf(path)
    read = az.from_netcdf(path)
    read.load()
    read.close()
    assert set(read) == set(data)
    for each in data:
        ours, theirs = group(data, each), group(read, each)
        assert theirs.equals(ours), each
        assert set(theirs.attrs) == set(ours.attrs)
        for key, value in ours.attrs.items():
            assert np.array_equal(theirs.attrs[key], value), key
    assert read.attrs["inference_library"] == "pyro_subnet"
    assert az.summary(read).equals(az.summary(data))


def test_names_of_axes_and_labels(posteriors: dict[str, Any]) -> None:
    data = posteriors["linear"]
    for name in ("posterior", "prior"):
        assert list(data[name]["w"]["feature"].values) == list(FEATURES)
    x = data["constant_data"]["x"]
    assert x.dims == ("patient", "feature")
    w = flat(data, "posterior", "w")
    bmi = data["posterior"]["w"].sel(feature="bmi").values.reshape(-1)
    np.testing.assert_array_equal(bmi, w[:, 1])
    assert data["log_likelihood"]["y"].dims == ("chain", "draw", "patient")
    assert data["predictions"]["y"].sizes["patient"] == 5
    classes = posteriors["classes"]["posterior"]["w"]
    assert classes.dims == ("chain", "draw", "feature", "kind")
    few = az.summary(data, var_names=["w"], coords={"feature": ["bp"]})
    assert list(few.index) == ["w[bp]"]


# With few draws.
@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto:UserWarning")
@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.parametrize("name", ["linear", "nuts"])
def test_arviz_draws_it(
    name: str, plot: str, posteriors: dict[str, Any], pictures: None
) -> None:
    PLOTS[plot](posteriors[name])
    assert plt.get_fignums()
