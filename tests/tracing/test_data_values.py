"""Data that a likelihood forbids are an error, and what a mask leaves out is not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, to_inference_data
from pyro_subnet.diagnostics import stationarity
from pyro_subnet.diagnostics.scores import negative_log_likelihood
from pyro_subnet.exceptions import DataError, NonFiniteError
from tests.cases import draw
from tests.tolerances import tolerance

N = 9
Make = Callable[[Tensor], Any]
DTYPES = [torch.float32, torch.float64]
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def normal(f: Tensor) -> Any:
    """Regression."""
    return dist.Normal(f, 0.5)


def bernoulli(f: Tensor) -> Any:
    """Two classes."""
    return dist.Bernoulli(logits=f)


def classes(f: Tensor) -> Any:
    """Three classes, by their numbers."""
    return dist.Categorical(logits=torch.stack([f, -f, 0.5 * f], -1))


def one_hot(f: Tensor) -> Any:
    """Three classes, as rows."""
    return dist.OneHotCategorical(logits=torch.stack([f, -f, 0.5 * f], -1))


def counts(f: Tensor) -> Any:
    """Counts."""
    return dist.Poisson(f.exp())


def trials(f: Tensor) -> Any:
    """Counts of four trials."""
    return dist.Binomial(4, logits=f)


def pairs(f: Tensor) -> Any:
    """Two correlated numbers per observation."""
    return dist.MultivariateNormal(torch.stack([f, -f], -1), torch.eye(2).to(f))


def model(family: Make, event: int = 0) -> Any:
    """A linear model; ``mask`` leaves data out."""

    def model(x: Tensor, y: Tensor | None = None, mask: Tensor | bool = True) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3).to(x), 1.0).to_event(1))
        fn = family(x @ w)
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            pyro.sample("y", fn.to_event(event) if event else fn, obs=y)

    return model


def fit(family: Make, x: Tensor, *data: Tensor, **options: Any) -> Any:
    """The posterior at one MAP, whatever the data."""
    pyro.clear_param_store()
    at = {"w": x.new_tensor([0.3, -0.2, 0.1])}
    start = pyro.infer.autoguide.initialization.init_to_value(values=at)
    guide = AutoSubnetLaplace(model(family), init_loc_fn=start, **options)
    return guide.laplace_approximation(x, *data)


Y, X = draw(2, N), draw(1, N, 3)
LABELS = torch.arange(N) % 3


def at_three(values: Tensor, value: float) -> Tensor:
    """Values with another one at index 3."""
    return values.index_fill(0, torch.tensor([3]), value)


WRONG = [
    (
        normal,
        at_three(Y, math.nan),
        r"got nan at index \(3,\).*\(1 of 9\).*poutine.mask",
    ),
    (normal, at_three(Y, -math.inf), r"got -inf at index \(3,\)"),
    (bernoulli, Y.sign(), r"got -1.0.*Boolean\(\).*labels 0 and 1"),
    (bernoulli, at_three(Y * 0, 0.3), r"got 0.3 at index \(3,\)"),
    (bernoulli, at_three(Y * 0, math.nan), r"got nan at index \(3,\)"),
    (bernoulli, Y > 0, r"of a dtype.*got torch.bool.*y.to\(x.dtype\)"),
    (classes, at_three(LABELS, -100), r"got -100 at.*IntegerInterval.*ignore_index"),
    (classes, at_three(LABELS, -1), r"got -1 at index \(3,\)"),
    (classes, at_three(LABELS, 3), r"got 3 at index \(3,\).*from 0 to C - 1"),
    (classes, 0.5 * torch.ones(N), r"got 0.5 at index \(0,\).*\(9 of 9\)"),
    (
        one_hot,
        0.9 * torch.eye(3).double()[LABELS] + 0.1 / 3,
        r"got \[0.93.*OneHot\(\).*Soft labels",
    ),
    (one_hot, torch.zeros(N, 3), r"got \[0.0, 0.0, 0.0\] at index \(0,\)"),
    (counts, at_three(LABELS, -1), r"got -1 at.*IntegerGreaterThan\(lower_bound=0\)"),
    (counts, at_three(LABELS.double(), 0.5), r"got 0.5 at index \(3,\)"),
    (trials, at_three(LABELS, 5), r"got 5 at index \(3,\)"),
    (lambda f: dist.Gamma(f.exp(), 1.0), Y, r"Gamma on GreaterThan"),
    (lambda f: dist.Beta(f.exp(), 1.0), 2 + Y.abs(), r"Beta on Interval"),
    (lambda f: dist.LogNormal(f, 1.0), 0 * Y, r"got 0.0 at index \(0,\)"),
    (
        pairs,
        torch.stack([Y, at_three(Y, math.nan)], -1),
        r"got \[.*, nan\] at index \(3,",
    ),
]


@pytest.mark.parametrize(("family", "data", "said"), WRONG)
def test_data_that_the_likelihood_forbids(
    family: Make, data: Tensor, said: str
) -> None:
    with pytest.raises(DataError, match=rf"(?s)(?=.*site 'y').*{said}"):
        fit(family, X, data)


def test_one_observation_and_no_plate() -> None:
    """A scalar has no index to name."""

    def model(y: Tensor) -> None:
        pyro.sample(
            "y", dist.Normal(pyro.sample("w", dist.Normal(0.0, 1.0)), 1.0), obs=y
        )

    guide = AutoSubnetLaplace(model)
    with pytest.raises(DataError, match=r"got nan of site 'y' \(1 of 1\)"):
        guide.laplace_approximation(torch.tensor(math.nan))


def test_what_is_not_finite_at_the_map() -> None:
    """Noise of zero, and NaN in the inputs: the message names what came."""
    noise = torch.tensor(0.5).double()
    posterior = fit(lambda f: dist.Normal(f, noise), X, Y)
    broken = X.index_fill(0, torch.tensor([2]), math.nan)
    with pytest.raises(NonFiniteError, match=r"1 NaN or inf of 9 .*`loc` at site 'y'"):
        posterior.update(broken, Y)
    noise.zero_()
    said = r"log density.*got nan for -?\d.* at index \(0,\) of site 'y' \(9 of 9\)"
    with pytest.raises(NonFiniteError, match=said):
        posterior.update(X, Y)


def test_every_door() -> None:
    posterior = fit(normal, X, Y)
    bad = at_three(Y, math.nan)
    batches = list(zip(X.split(4), bad.split(4), strict=True))
    guide = AutoSubnetLaplace(model(normal))
    doors: list[Callable[[], Any]] = [
        lambda: guide.laplace_approximation_from(batches),
        lambda: fit(normal, X, bad, subnet=2),
        lambda: fit(normal, X, bad, covariance="diag"),
        lambda: fit(normal, X, bad, curvature="ef"),
        lambda: posterior.update(X, bad),
        lambda: posterior.update_from(batches),
        lambda: posterior.tune_prior_precision("nll", val=(X, bad)),
        lambda: posterior.tune_noise_scale("nll", val=(X, bad)),
        lambda: stationarity(posterior, X, bad),
        lambda: to_inference_data(posterior, X, bad, num_samples=4),
    ]
    for door in doors:
        with pytest.raises(DataError, match=r"got nan at index \([03],\) of site 'y'"):
            door()
    posterior.predictive_distribution(X, bad)  # which does not look at y


FORBIDDEN = [
    (normal, Y, math.nan),
    (normal, Y, math.inf),
    (bernoulli, (Y > 0).double(), math.nan),
    (bernoulli, (Y > 0).double(), -1.0),
    (classes, LABELS, -100),
    (counts, LABELS, -1),
    (trials, LABELS.double(), math.nan),
]
OTHERS = [FORBIDDEN[0], FORBIDDEN[4]]


MASKED = [
    *((*one, "ggn", dtype) for one in FORBIDDEN for dtype in DTYPES),
    *((*one, kind, torch.float64) for one in OTHERS for kind in ("ef", "hessian")),
]


# Of a few data, whose best prior may be at a bound.
@pytest.mark.filterwarnings("ignore::pyro_subnet.exceptions.TuningWarning")
@pytest.mark.parametrize(("family", "data", "value", "curvature", "dtype"), MASKED)
def test_masked_data_may_hold_anything(
    family: Make, data: Tensor, value: float, curvature: str, dtype: torch.dtype
) -> None:
    """The posterior, its evidence and its tuning are those of the data that count."""
    data = data.to(dtype) if data.is_floating_point() else data
    x, seen = X.to(dtype), torch.arange(N) % 4 != 0
    holed = data.masked_fill(~seen, value)
    options = {"curvature": curvature}
    with torch.random.fork_rng():
        state = torch.random.get_rng_state()
        ours = fit(family, x, holed, seen, **options)
        assert torch.equal(torch.random.get_rng_state(), state)
    few = fit(family, x[seen], data[seen], **options)
    close = tolerance(dtype, "reordered")
    for name in ("precision_matrix", "loc"):
        found, wanted = (getattr(p.get_posterior(), name) for p in (ours, few))
        assert_close(found, wanted, **close)
    evidence = [p.log_marginal_likelihood() for p in (ours, few)]
    assert_close(*evidence, **close)
    if curvature == "ggn" and dtype == torch.float64 and value in {math.inf, -100}:
        tuned = [
            p.tune_prior_precision("nll", val=val, standard_errors=0).prior_factor
            for p, val in ((ours, (x, holed, seen)), (few, (x[seen], data[seen])))
        ]
        assert tuned[0] == pytest.approx(tuned[1], rel=1e-2)


@each_dtype
@pytest.mark.parametrize("curvature", ["ggn", "ef", "hessian"])
def test_missing_normal_data_are_missing(curvature: str, dtype: torch.dtype) -> None:
    """Pyro's own family for them; the oracle is the fit to the rest."""
    x, y = X.to(dtype), Y.to(dtype)
    seen = torch.arange(N) % 4 != 0
    holed = y.masked_fill(~seen, math.nan)

    def masked(f: Tensor) -> Any:
        return dist.NanMaskedNormal(f, torch.full_like(f, 0.5))

    close = tolerance(dtype, "closed_form")
    ours = fit(masked, x, holed, curvature=curvature)
    few = fit(normal, x[seen], y[seen], curvature=curvature)
    if curvature == "ggn":
        wanted = x[seen].T @ x[seen] / 0.25 + torch.eye(3, dtype=dtype)
        assert_close(ours.get_posterior().precision_matrix, wanted, **close)
    both = [p.get_posterior().precision_matrix for p in (ours, few)]
    assert_close(*both, **close)
    assert_close(*[p.log_marginal_likelihood() for p in (ours, few)], **close)
    assert_close(*[p.tune_noise_scale().noise_factor for p in (ours, few)], **close)
    # The linearized model takes the same data as the user's own.
    traces = [
        poutine.trace(poutine.condition(m, data=ours.median())).get_trace(x, holed)
        for m in (ours.linearized_model, model(masked))
    ]
    assert_close(*[t.log_prob_sum() for t in traces], **close)
    outputs = [p.predictive_distribution(x).mean for p in (ours, few)]
    assert_close(*outputs, **close)


@each_dtype
def test_missing_events_are_missing(dtype: torch.dtype) -> None:
    """Events missing as a whole; in part, where no closed form is known, an error."""
    x = X.to(dtype)
    y = torch.stack([Y, Y.flip(0)], -1).to(dtype)
    seen = torch.arange(N) % 4 != 0
    scale = torch.tensor([[1.0, 0.0], [0.5, 0.7]]).to(dtype)

    def family(kind: Any) -> Make:
        return lambda f: kind(torch.stack([f, -f], -1), scale_tril=scale)

    holed = y.masked_fill(~seen[:, None], math.nan)
    ours = fit(family(dist.NanMaskedMultivariateNormal), x, holed)
    few = fit(family(dist.MultivariateNormal), x[seen], y[seen])
    close = tolerance(dtype, "reordered")
    both = [p.get_posterior().precision_matrix for p in (ours, few)]
    assert_close(*both, **close)
    assert_close(*[p.log_marginal_likelihood() for p in (ours, few)], **close)
    holed[5, 0] = math.nan
    with pytest.raises(DataError, match=r"nan, .* at index \(5,\).*missing in part"):
        fit(family(dist.NanMaskedMultivariateNormal), x, holed)


def test_scores_of_data_that_predictions_do_not_allow() -> None:
    predictive = fit(normal, X, Y).predictive_distribution(X)
    wanted = dist.Normal(predictive.mean, predictive.stddev).log_prob(Y)
    found = negative_log_likelihood(predictive, Y)
    assert_close(found, -wanted, **tolerance(torch.float64, "closed_form"))
    with pytest.raises(
        DataError, match=r"shape of the predictions, \(9,\); got \(9, 1\)"
    ):
        negative_log_likelihood(predictive, Y[:, None])
    with pytest.raises(DataError, match=r"`y` must hold values.*Normal"):
        negative_log_likelihood(predictive, at_three(Y, math.nan))
    labels = fit(classes, X, LABELS).predictive_distribution(X)
    with pytest.raises(
        DataError, match=r"shape of the predictions, \(9,\); got \(9, 3\)"
    ):
        negative_log_likelihood(labels, torch.eye(3)[LABELS])
    with pytest.raises(DataError, match=r"`y` must hold values that the predictions"):
        negative_log_likelihood(labels, at_three(LABELS, 3))
