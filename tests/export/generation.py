"""The two generations of ArviZ, 0.x and 1.x, under one set of names; no torch.

What differs is what ``docs/arviz.md`` has in its table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import arviz as az
import numpy as np
import xarray
from numpy.typing import NDArray

IS_1 = int(az.__version__.partition(".")[0]) >= 1
Array = NDArray[np.float64]


def group(data: Any, name: str) -> Any:
    """One group as an ``xarray.Dataset``."""
    return data[name].to_dataset() if IS_1 else data[name]


def elpd(loo: Any) -> float:
    """The sum over data."""
    return float(loo.elpd if IS_1 else loo.elpd_loo)


def elpd_by_datum(loo: Any) -> Array:
    """Its terms; asked for by ``az.loo(..., pointwise=True)``."""
    return np.asarray((loo.elpd_i if IS_1 else loo.loo_i).values)


def comparison(models: dict[str, Any]) -> Any:
    """``az.compare``, unrounded, with a column ``elpd`` and differences >= 0."""
    if not IS_1:
        return az.compare(models).rename(columns={"elpd_loo": "elpd"})
    table = az.compare(models, round_to="none")
    return table.assign(elpd_diff=-table["elpd_diff"])


def loo_pit(data: Any, name: str) -> Array:
    """Where each observation falls in its prediction from the others."""
    found = az.loo_pit(data, var_names=name)[name] if IS_1 else az.loo_pit(data, y=name)
    return np.asarray(found)


def bayes_factors(data: Any, name: str) -> dict[str, float]:
    """Savage and Dickey's ratio for a scalar at 0, and its inverse, by name."""
    if IS_1:
        found = az.bayes_factor(data, name)[name]
        return {kind: float(found.sel(bf_type=kind)) for kind in ("BF01", "BF10")}
    ratios, _ = az.plot_bf(data, var_name=name)  # 0.20 has no other way
    return {kind: float(value) for kind, value in ratios.items()}


def psislw(log_weights: Array) -> tuple[Array, float]:
    """Pareto-smoothed, normalized log weights of one target, and k-hat."""
    if not IS_1:
        smoothed, k_hat = az.psislw(log_weights.copy())
        return np.asarray(smoothed), float(k_hat)
    # 1.x takes log likelihoods, and leaving one out weighs by their inverses.
    array = xarray.DataArray(-log_weights, dims=["draw"])
    smoothed, k_hat = array.azstats.psislw(dim="draw")
    return np.asarray(smoothed), float(k_hat)


def extended(data: Any, other: Any) -> Any:
    """A copy with the groups of another that it lacks."""
    found = data.copy()
    if IS_1:
        found.update({name: other[name] for name in other if name not in found})
    else:
        found.extend(other)
    return found


PLOTS: dict[str, Callable[[Any], Any]] = {
    "trace": az.plot_trace,
    "forest": az.plot_forest,
    "pair": az.plot_pair,
    "k-hat": lambda data: az.plot_khat(az.loo(data, pointwise=True)),
}
if IS_1:
    PLOTS |= {
        "posterior predictive": az.plot_ppc_dist,
        "prior predictive": lambda d: az.plot_ppc_dist(d, group="prior_predictive"),
        "LOO-PIT": az.plot_loo_pit,
        "prior and posterior": az.plot_prior_posterior,
        "trace and density": az.plot_trace_dist,
    }
else:
    PLOTS |= {
        "posterior predictive": lambda d: az.plot_ppc(d, num_pp_samples=5),
        "prior predictive": lambda d: az.plot_ppc(d, group="prior", num_pp_samples=5),
        "LOO-PIT": lambda data: az.plot_loo_pit(data, y="y"),
        "prior and posterior": az.plot_dist_comparison,
    }


def drawn_forest(models: dict[str, Any]) -> int:
    """Draws intervals of several models; how many it drew."""
    if IS_1:
        drawn = az.plot_forest(models, combined=True).viz["point_estimate"]
        return sum(each.size for each in drawn.dataset.values())
    (axes,) = az.plot_forest(
        list(models.values()), model_names=list(models), combined=True
    )
    return len(axes.get_lines())  # the points; intervals are collections of lines


def drawn_class_counts(data: Any, count: int) -> Array:
    """How often each class was observed, read off the predictive check's picture."""
    if IS_1:
        markers = az.plot_ppc_rootogram(data).viz["observed_markers"]["y"].item()
        return np.asarray(markers.get_offsets())[:, 1]
    axes = az.plot_ppc(data, num_pp_samples=5)
    (line,) = [line for line in axes.lines if line.get_label() == "Observed"]
    return np.asarray(line.get_ydata())[1:] * count
