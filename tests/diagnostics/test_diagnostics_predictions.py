"""Numbers about predictions: against sklearn, torchmetrics, scipy and plain loops."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jaxtyping
import numpy as np
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.stats
import sklearn.metrics
import torch
import torchmetrics.functional as metrics
from torch import Tensor
from torch.testing import assert_close

from pyro_subnet import diagnostics
from pyro_subnet.exceptions import DataError, NonFiniteError, OptionError
from tests.cases import double, draw
from tests.tolerances import num_standard_errors, tolerance

CLOSED = tolerance(torch.float64, "closed_form")
PEER = tolerance(torch.float32, "peer")  # torchmetrics bins and sums in float32


def classes(count: int, num_classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sharp probabilities and labels that follow them now and then."""
    generator = torch.Generator().manual_seed(seed)
    probs = (2 * draw(seed, count, num_classes)).softmax(-1)
    labels = probs.sqrt().multinomial(1, generator=generator).squeeze(-1)
    return probs, labels


@pytest.mark.parametrize(("count", "num_classes"), [(1, 1), (7, 2), (203, 3)])
def test_scores_of_classes(count: int, num_classes: int, dtype: torch.dtype) -> None:
    probs, labels = classes(count, num_classes)
    probs = probs.to(dtype)
    rel = 1e-12 if dtype == torch.float64 else 1e-5
    nll = diagnostics.negative_log_likelihood(dist.Categorical(probs), labels)
    brier = diagnostics.brier_score(probs, labels)
    for n in range(count):
        p, y = probs[n].tolist(), int(labels[n])
        expected = sum((p[c] - (c == y)) ** 2 for c in range(num_classes))
        assert float(brier[n]) == pytest.approx(expected, rel=rel, abs=rel)
        assert float(nll[n]) == pytest.approx(-math.log(p[y]), rel=rel, abs=rel)
    if num_classes > 1:
        every, probs = list(range(num_classes)), probs.double()
        probs = probs / probs.sum(-1, keepdim=True)  # to the digits that it asks for
        by_sklearn = sklearn.metrics.log_loss(labels, probs, labels=every)
        assert float(nll.mean()) == pytest.approx(by_sklearn, rel=rel)
        # Class by class: scikit-learn takes several at once from 1.7 on alone.
        by_sklearn = sum(
            sklearn.metrics.brier_score_loss(labels == c, probs[:, c], pos_label=True)
            for c in every
        )
        assert float(brier.mean()) == pytest.approx(by_sklearn, rel=rel)


@pytest.mark.parametrize("num_bins", [1, 7, 15])
@pytest.mark.parametrize(("count", "num_classes"), [(1, 3), (7, 2), (203, 3)])
def test_calibration_errors(
    count: int, num_classes: int, num_bins: int, dtype: torch.dtype
) -> None:
    probs, labels = classes(count, num_classes)
    probs = probs.to(dtype)
    expected = metrics.classification.multiclass_calibration_error(
        probs, labels, num_classes, n_bins=num_bins
    )
    found = diagnostics.expected_calibration_error(probs, labels, num_bins=num_bins)
    assert found == pytest.approx(float(expected), abs=PEER["atol"])
    by_class = [
        metrics.classification.binary_calibration_error(
            probs[:, c].contiguous(), (labels == c).long(), n_bins=num_bins
        )
        for c in range(num_classes)
    ]
    found = diagnostics.classwise_calibration_error(probs, labels, num_bins=num_bins)
    expected = torch.stack(by_class).mean()
    assert found == pytest.approx(float(expected), abs=PEER["atol"])


def test_bins_are_closed_above() -> None:
    """Confidences of 0, 1 and an inner edge, by a loop over (a, b]."""
    probs = double([[0.5, 0.5], [1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.1, 0.9]])
    labels = torch.tensor([1, 0, 0, 0, 1])
    found = diagnostics.reliability(probs, labels, num_bins=4)
    edges = [0.0, 0.25, 0.5, 0.75, 1.0]
    assert_close(found.edges, double(edges), **CLOSED)
    hits = [False, True, True, False, True]
    for b in range(4):
        inside = [
            n for n in range(5) if edges[b] < float(probs[n].max()) <= edges[b + 1]
        ]
        assert int(found.counts[b]) == len(inside)
        if inside:
            share = sum(hits[n] for n in inside) / len(inside)
            assert float(found.accuracy[b]) == pytest.approx(share)
            mean = float(probs[inside].max(-1).values.mean())
            assert float(found.confidence[b]) == pytest.approx(mean)
        else:
            assert bool(found.accuracy[b].isnan())
    # Class-wise, a promise of 0 counts too: in the first bin.
    zero = diagnostics.calibration.binned(double([0.0]), torch.tensor([True]), 4)
    assert zero.counts.tolist() == [1, 0, 0, 0]
    assert zero.ece == pytest.approx(1.0)


def mixture() -> Any:
    weights = dist.Categorical(double([[0.3, 0.7], [0.5, 0.5], [0.9, 0.1]]))
    scale = double([[0.5, 1.0], [1.0, 2.0], [0.1, 3.0]])
    parts = dist.Normal(3 * draw(4, 3, 2), scale)
    return dist.MixtureSameFamily(weights, parts)


PREDICTIVES = {
    "normal": lambda: dist.Normal(draw(1, 5), 1 + draw(2, 5).abs()),
    "several": lambda: dist.Normal(draw(1, 5, 3), 1 + draw(2, 5, 3).abs()).to_event(1),
    "dense": lambda: dist.MultivariateNormal(
        draw(1, 5, 2), scale_tril=draw(3, 5, 2, 2).tril() + 3 * torch.eye(2).double()
    ),
    "student": lambda: dist.StudentT(5.0, draw(1, 5), 2.0),
    "mixture": mixture,
    "lognormal": lambda: dist.LogNormal(draw(1, 5), double(0.5)),
}
HAS_CDF = [name for name in PREDICTIVES if name != "student"]


def marginal_cdf(predictive: Any, name: str, y: np.ndarray) -> np.ndarray:
    """By scipy."""
    if name == "mixture":
        weights = predictive.mixture_distribution.probs.numpy()
        part = predictive.component_distribution
        each = scipy.stats.norm.cdf(y[..., None], part.loc.numpy(), part.scale.numpy())
        return (weights * each).sum(-1)
    if name == "lognormal":
        return scipy.stats.lognorm.cdf(y, 0.5, scale=predictive.loc.exp().numpy())
    spread = predictive.stddev.numpy()
    return scipy.stats.norm.cdf(y, predictive.mean.numpy(), spread)


@pytest.mark.parametrize("name", HAS_CDF)
def test_pit_and_quantiles(name: str) -> None:
    predictive = PREDICTIVES[name]()
    y = predictive.sample()
    pit = diagnostics.pit_values(predictive, y)
    expected = torch.from_numpy(marginal_cdf(predictive, name, y.numpy()))
    assert_close(pit, expected, **CLOSED)
    for level in (0.001, 0.5, 0.9):
        found = diagnostics.quantile(predictive, level)
        back = torch.from_numpy(marginal_cdf(predictive, name, found.numpy()))
        assert_close(back, torch.full_like(back, level), rtol=1e-9, atol=1e-12)


def test_what_has_no_distribution_function() -> None:
    y = draw(0, 5)
    with pytest.raises(DataError, match="got StudentT of event shape"):
        diagnostics.pit_values(PREDICTIVES["student"](), y)
    with pytest.raises(DataError, match="got Categorical"):
        diagnostics.mean_interval_width(dist.Categorical(torch.ones(3)), [0.5])


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize("level", [0.01, 0.05, 0.5, 0.95])
@pytest.mark.parametrize("shape", [0.5, 2.0])
def test_quantiles_of_a_positive_number(
    shape: float, level: float, validated: bool
) -> None:
    """Below the support the distribution function is 0, whatever torch's formula."""
    rates = torch.tensor([[0.5, 1.0, 3.0], [1.0, 2.0, 4.0]]).double()
    parts = dist.Gamma(double(shape), rates, validate_args=validated)
    weights = dist.Categorical(double([0.2, 0.3, 0.5]).expand(2, 3))
    mixed = dist.MixtureSameFamily(weights, parts, validate_args=validated)
    found = diagnostics.quantile(mixed, level)
    each = scipy.stats.gamma.cdf(found.numpy()[:, None], shape, scale=1 / rates.numpy())
    assert_close((each * weights.probs.numpy()).sum(-1), np.full(2, level))
    width = diagnostics.mean_interval_width(mixed, [0.9])
    ends = [diagnostics.quantile(mixed, end) for end in (0.05, 0.95)]
    assert_close(width, (ends[1] - ends[0]).mean().unsqueeze(0))
    pit = diagnostics.pit_values(mixed, double([-1.0, torch.inf]))
    assert_close(pit, double([0.0, 1.0]))


@pytest.mark.parametrize(
    "parts",
    [dist.Poisson(torch.ones(5, 2)), dist.StudentT(4.0, torch.zeros(5, 2), 1.0)],
    ids=["Poisson", "StudentT"],
)
def test_a_mixture_of_what_has_no_distribution_function(parts: Any) -> None:
    """Torch gives the mixture a method, which then has nothing to sum."""
    mixed = dist.MixtureSameFamily(dist.Categorical(torch.ones(5, 2)), parts)
    message = "got MixtureSameFamily of event shape .*`pit_from_draws`"
    for call in (
        lambda: diagnostics.pit_values(mixed, torch.ones(5)),
        lambda: diagnostics.quantile(mixed, 0.5),
        lambda: diagnostics.mean_interval_width(mixed, [0.5]),
    ):
        with pytest.raises(DataError, match=message):
            call()


def test_missing_observations_have_no_pit() -> None:
    y = torch.tensor([0.1, torch.nan, 0.3])
    with pytest.raises(DataError, match="`y` must not be NaN; got 1 NaN of 3"):
        diagnostics.pit_from_draws(torch.randn(7, 3), y)
    with pytest.raises(DataError, match="`y` must not be NaN; got 1 NaN of 3"):
        diagnostics.pit_values(dist.Normal(torch.zeros(3), 1.0), y)
    with pytest.raises(DataError, match="`draws` must not be NaN; got 21 NaN of 21"):
        diagnostics.pit_from_draws(torch.full((7, 3), torch.nan), torch.zeros(3))


def test_what_is_no_distribution() -> None:
    with pytest.raises(DataError, match="`predictive` must be a distribution; got"):
        diagnostics.quantile(torch.ones(3), 0.5)


def test_a_quantile_at_infinity() -> None:
    weights = dist.Categorical(double([0.5, 0.5]))
    wide = dist.MixtureSameFamily(weights, dist.Normal(double([0.0, 1e308]), 1.0))
    with pytest.raises(
        NonFiniteError, match="must be finite; got none for 1 of 1 pred"
    ):
        diagnostics.quantile(wide, 0.9)


@pytest.mark.parametrize("shape", [(41,), (13, 3)])
def test_coverage_and_width(shape: tuple[int, ...]) -> None:
    predictive = dist.Normal(draw(1, *shape), 1 + draw(2, *shape).abs())
    y = predictive.mean + 1.5 * draw(3, *shape)
    levels = [0.0, 0.5, 0.9, 0.99]
    pit = diagnostics.pit_values(predictive, y)
    covered = diagnostics.interval_coverage(pit, levels)
    widths = diagnostics.mean_interval_width(predictive, levels)
    for level, share, width in zip(levels, covered, widths, strict=True):
        low, high = scipy.stats.norm.interval(
            level, predictive.loc.numpy(), predictive.scale.numpy()
        )
        inside = (low <= y.numpy()) & (y.numpy() <= high)
        assert float(share) == pytest.approx(inside.mean())
        assert float(width) == pytest.approx((high - low).mean(), abs=1e-10)
    assert diagnostics.interval_coverage(pit, [1.0]).tolist() == [1.0]


def test_a_calibrated_predictive_covers_what_it_says() -> None:
    count = 4000
    predictive = mixture().expand([count, 3])
    draws = predictive.sample((60,))
    y = predictive.sample()
    pit = diagnostics.pit_values(predictive, y)
    levels = [0.1, 0.5, 0.95]
    covered = diagnostics.interval_coverage(pit, levels)
    bound = num_standard_errors(len(levels))
    for level, share in zip(levels, covered, strict=True):
        error = (level * (1 - level) / pit.numel()) ** 0.5
        assert abs(float(share) - level) < bound * error
    # From draws: binomial around the exact value, 60 of them.
    sampled = diagnostics.pit_from_draws(draws, y)
    error = (pit * (1 - pit) / 60).mean().sqrt()
    assert float((sampled - pit).square().mean().sqrt()) == pytest.approx(
        float(error), rel=0.1
    )


def test_draws_equal_to_the_observation_count_half() -> None:
    draws, y = double([[0.0], [1.0], [1.0], [2.0]]), double([1.0])
    assert_close(diagnostics.pit_from_draws(draws, y), double([0.5]), **CLOSED)


@pytest.mark.parametrize("y", [-3.0, 0.2, 6.0])
def test_crps_of_a_normal_is_its_integral(y: float) -> None:
    loc, scale = 0.7, 1.9
    cdf = scipy.stats.norm(loc, scale).cdf
    below, _ = scipy.integrate.quad(lambda z: cdf(z) ** 2, -np.inf, y)
    above, _ = scipy.integrate.quad(lambda z: (1 - cdf(z)) ** 2, y, np.inf)
    found = diagnostics.crps_normal(double([loc]), double([scale]), double([y]))
    assert float(found) == pytest.approx(below + above, rel=1e-7)


@pytest.mark.parametrize("num_draws", [1, 2, 31])
@pytest.mark.parametrize("ties", [False, True])
def test_crps_of_draws(num_draws: int, ties: bool, dtype: torch.dtype) -> None:
    """The two means of its definition, over draws and over pairs of them."""
    draws, y = draw(1, num_draws, 5, 2).to(dtype), draw(2, 5, 2).to(dtype)
    if ties:
        draws, y = draws.round(), y.round()
    apart = (draws.unsqueeze(0) - draws.unsqueeze(1)).abs().mean((0, 1))
    expected = (draws - y).abs().mean(0) - 0.5 * apart
    found = diagnostics.crps_from_draws(draws, y)
    assert_close(found, expected, **tolerance(dtype, "closed_form"))


def test_crps_of_many_draws_is_that_of_the_normal() -> None:
    """Quantiles at (k - 1/2) / K in place of draws: the sum converges as 1 / K."""
    y = double([-1.0, 0.3, 2.0])
    places = (torch.arange(4000).double() + 0.5) / 4000
    draws = dist.Normal(0.4, 1.3).icdf(places).unsqueeze(-1).expand(-1, 3)
    expected = diagnostics.crps_normal(double([0.4] * 3), double([1.3] * 3), y)
    assert_close(diagnostics.crps_from_draws(draws, y), expected, rtol=1e-3, atol=1e-3)


def test_entropy_is_scipys() -> None:
    probs, _ = classes(11, 3)
    probs = torch.cat([probs, double([[1.0, 0.0, 0.0]])])
    expected = torch.from_numpy(scipy.stats.entropy(probs.numpy(), axis=-1))
    assert_close(diagnostics.predictive_entropy(probs), expected, **CLOSED)


@pytest.mark.parametrize("num_draws", [1, 40])
def test_the_parts_of_entropy(num_draws: int) -> None:
    """Mutual information by its own definition, a sum over joint probabilities."""
    draws = (2 * draw(3, num_draws, 6, 3)).softmax(-1)
    parts = diagnostics.decompose_entropy(draws)
    for n in range(6):
        mean = draws[:, n].mean(0)
        information = 0.0
        for k in range(num_draws):
            for c in range(3):
                joint = float(draws[k, n, c]) / num_draws
                information += joint * math.log(
                    joint / (float(mean[c]) * (1 / num_draws))
                )
        assert float(parts.epistemic[n]) == pytest.approx(information, abs=1e-12)
    assert_close(parts.total, parts.aleatoric + parts.epistemic, **CLOSED)
    assert_close(parts.total, diagnostics.predictive_entropy(draws.mean(0)), **CLOSED)


def test_draws_that_are_sure_of_different_classes() -> None:
    parts = diagnostics.decompose_entropy(torch.eye(3).double().unsqueeze(1))
    assert_close(parts.epistemic, double([math.log(3)]), **CLOSED)
    assert_close(parts.aleatoric, double([0.0]), **CLOSED)


@pytest.mark.parametrize(("inside", "outside"), [(1, 1), (7, 13), (200, 31)])
@pytest.mark.parametrize("kind", ["distinct", "ties", "equal", "close", "infinite"])
def test_auroc_is_sklearns(
    inside: int, outside: int, kind: str, dtype: torch.dtype
) -> None:
    negatives, positives = draw(1, inside), draw(2, outside) + 0.5
    if kind == "ties":
        negatives, positives = negatives.round(), positives.round()
    elif kind == "equal":
        negatives, positives = torch.zeros(inside).double(), torch.zeros(outside)
    elif kind == "close":  # by some units of the last place in float32
        negatives, positives = 1 + 1e-7 * negatives, 1 + 1e-7 * positives
    elif kind == "infinite":
        negatives, positives = negatives.log(), positives.round().log().abs()
        negatives, positives = negatives.nan_to_num(-math.inf), positives.nan_to_num(2)
    negatives, positives = negatives.to(dtype), positives.to(dtype)
    truth = [0] * inside + [1] * outside
    # Their ranks, as it refuses infinite scores.
    ranks = scipy.stats.rankdata(torch.cat([negatives, positives]))
    expected = sklearn.metrics.roc_auc_score(truth, ranks)
    assert diagnostics.auroc(negatives, positives) == pytest.approx(expected, rel=1e-12)


def test_auroc_of_entropy() -> None:
    inside, _ = classes(20, 3)
    outside = (0.3 * draw(5, 9, 3)).softmax(-1)
    scores = np.concatenate(
        [scipy.stats.entropy(p, axis=-1) for p in (inside, outside)]
    )
    expected = sklearn.metrics.roc_auc_score([0] * 20 + [1] * 9, scores)
    found = diagnostics.out_of_distribution_auroc(inside, outside)
    assert found == pytest.approx(expected, rel=1e-12)
    assert found > 0.5


@pytest.mark.parametrize("count", [1, 57])
@pytest.mark.parametrize("ties", [False, True])
def test_risk_and_coverage(count: int, ties: bool) -> None:
    uncertainty, loss = draw(1, count), (draw(2, count) > 0.3).double()
    if ties:
        uncertainty = uncertainty.round()
    curve = diagnostics.risk_coverage(uncertainty, loss)
    levels = sorted(set(uncertainty.tolist()))
    for t, level in enumerate(levels):
        answered = uncertainty <= level
        share = float(answered.double().mean())
        assert float(curve.coverage[t]) == pytest.approx(share)
        assert float(curve.risk[t]) == pytest.approx(float(loss[answered].mean()))
    assert len(curve.coverage) == len(levels)
    # The area, by the expected loss of each place in the order.
    expected = [
        float(loss[uncertainty == level].mean())
        for level in levels
        for _ in range(int((uncertainty == level).sum()))
    ]
    areas = [sum(expected[:n]) / n for n in range(1, count + 1)]
    assert curve.aurc == pytest.approx(sum(areas) / count)


def test_uncertainty_that_is_the_loss_leaves_least_risk() -> None:
    loss = (draw(2, 80) > 0.3).double()
    best = diagnostics.risk_coverage(loss, loss)
    blind = diagnostics.risk_coverage(torch.zeros(80).double(), loss)
    assert best.aurc < diagnostics.risk_coverage(draw(1, 80), loss).aurc
    assert blind.aurc == pytest.approx(float(loss.mean()))


@pytest.mark.parametrize(
    "score",
    [
        diagnostics.brier_score,
        diagnostics.expected_calibration_error,
        diagnostics.classwise_calibration_error,
    ],
)
def test_what_is_no_prediction_of_classes(score: Any) -> None:
    probs, labels = classes(4, 3)
    with pytest.raises(DataError, match=r"sum to 1 .* got a least entry of -"):
        score(probs.log(), labels)
    with pytest.raises(DataError, match="a sum that is off by nan"):
        score(probs * math.nan, labels)
    with pytest.raises(DataError, match=r"in \[0, C=3\); got .* to 3"):
        score(probs, labels.index_fill(0, torch.tensor([1]), 3))
    with pytest.raises(
        DataError, match=r"at least one observation .* got shape \(0, 3\)"
    ):
        score(probs[:0], labels[:0])


def test_options_and_shapes_that_mean_nothing() -> None:
    probs, labels = classes(4, 3)
    with pytest.raises(OptionError, match="`num_bins` must be positive; got 0"):
        diagnostics.reliability(probs, labels, num_bins=0)
    with pytest.raises(OptionError, match=r"\[0, 1\], one at least; got \[1.5\]"):
        diagnostics.interval_coverage(double([0.5]), [1.5])
    with pytest.raises(OptionError, match=r"\[0, 1\), one at least; got \[1.0\]"):
        diagnostics.mean_interval_width(dist.Normal(double([0.0]), 1.0), [1.0])
    with pytest.raises(OptionError, match=r"one at least; got \[\]"):
        diagnostics.interval_coverage(double([0.5]), [])
    with pytest.raises(DataError, match="got 2 values, of which 1 are outside"):
        diagnostics.interval_coverage(double([0.5, math.nan]), [0.5])
    with pytest.raises(DataError, match=r"`predictive` must .* \(4,\).* got \(1,\)"):
        diagnostics.negative_log_likelihood(dist.Categorical(probs[:1]), labels)
    with pytest.raises(DataError, match=r"the predictions, \(1,\).* got \(2,\)"):
        diagnostics.pit_values(dist.Normal(double([0.0]), 1.0), double([0.0, 1.0]))
    with pytest.raises(DataError, match=r"`positives` must .* got 2, of which 1 NaN"):
        diagnostics.auroc(double([0.0]), double([math.nan, 1.0]))
    with pytest.raises(DataError, match=r"`negatives` must .* got 0"):
        diagnostics.auroc(double([]), double([1.0]))
    with pytest.raises(DataError, match="`uncertainty` must be numbers; got 1 NaN"):
        diagnostics.risk_coverage(double([math.nan]), double([1.0]))


@pytest.fixture
def unchecked() -> Iterator[None]:
    """As users run it: without types checked at every call."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("unchecked")
def test_shapes_that_would_broadcast() -> None:
    probs, _ = classes(4, 3)
    for call in (diagnostics.pit_from_draws, diagnostics.crps_from_draws):
        with pytest.raises(DataError, match=r"`y`.* got shapes \(3,\) and \(1,\)"):
            call(draw(0, 5, 3), draw(1, 1))
        with pytest.raises(DataError, match=r"at least one .* got shape \(0, 3\)"):
            call(draw(0, 0, 3), draw(1, 3))
    with pytest.raises(DataError, match=r"`loc`.* got shapes \(3, 1\) and \(3,\)"):
        diagnostics.crps_normal(draw(0, 3, 1), draw(1, 3).abs(), draw(2, 3))
    with pytest.raises(DataError, match=r"`scale`.* got shapes \(1,\) and \(3,\)"):
        diagnostics.crps_normal(draw(0, 3), draw(1, 1).abs(), draw(2, 3))
    with pytest.raises(DataError, match=r"`labels`.* got shapes \(1,\) and \(4,\)"):
        diagnostics.brier_score(probs, torch.tensor([0]))
    with pytest.raises(DataError, match=r"`loss`.* got shapes \(2,\) and \(3,\)"):
        diagnostics.risk_coverage(draw(0, 2), draw(1, 3))


def test_float32_and_inputs_that_are_not_contiguous() -> None:
    probs, labels = classes(50, 3)
    single = probs.float().T.contiguous().T
    assert diagnostics.brier_score(single, labels).dtype == torch.float32
    for score in (
        diagnostics.expected_calibration_error,
        diagnostics.classwise_calibration_error,
    ):
        assert score(single, labels) == pytest.approx(score(probs, labels), abs=1e-6)
    pit = diagnostics.pit_values(
        dist.Normal(draw(1, 5).float(), 1.0), draw(2, 5).float()
    )
    assert pit.dtype == torch.float32
