"""Prior precisions and noise scales by tuning, against fine grids and gradients."""

from __future__ import annotations

import math
import re
import statistics
import types
from dataclasses import replace
from typing import Any

import psutil
import pyro
import pyro.distributions as dist
import pytest
import scipy.optimize
import torch
from torch import Tensor
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.exceptions import (
    DataError,
    NoOutputVarianceWarning,
    OptionError,
    PrecisionError,
    TuningWarning,
)
from pyro_subnet.laplace.search import Tuning, minimize, nearest_to_own
from tests.cases import CASES, DOUBLE, draw
from tests.laplace.test_evidence import Linear

# Of a few data, whose best is at a bound more often than not.
at_any_bound = pytest.mark.filterwarnings(
    "ignore::pyro_subnet.exceptions.TuningWarning"
)
EXACT = {"rtol": 1e-10, "atol": 1e-8}
WIDE = (1e-6, 1e6)
GRID = torch.logspace(-6, 6, 241, dtype=torch.float64)


def fitted(name: str, **options: Any) -> AutoSubnetMultivariateNormal:
    case = CASES[name](DOUBLE)
    guide = case.guide(case.scattered(), **options)
    return guide.laplace_approximation(*case.args, **case.kwargs)


@pytest.mark.parametrize("form", ["primal", "dual"])
@pytest.mark.parametrize("name", ["regression_mlp", "classification_mlp"])
def test_no_prior_has_more_evidence(name: str, form: str) -> None:
    posterior = fitted(name, form=form)
    tuned = posterior.tune_prior_precision()
    best = tuned.log_marginal_likelihood()
    grid = torch.stack([posterior.log_marginal_likelihood(float(s)) for s in GRID])
    assert float(best) >= float(grid.max()) - 1e-9
    nearest = float(GRID[grid.argmax()])
    assert abs(math.log(tuned.prior_factor / nearest)) < math.log(10) * 12 / 240
    # Stationary.
    scale = torch.tensor(tuned.prior_factor, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(posterior.log_marginal_likelihood(scale), scale)
    assert abs(float(slope) * tuned.prior_factor) < 1e-3


def test_the_record_is_that_of_the_evidence() -> None:
    posterior = fitted("regression_mlp").with_noise_scale(1.5)
    tuned = posterior.tune_prior_precision()
    tuning = tuned.tuning
    assert tuning is not None
    assert (tuning.method, tuning.at_bound, tuning.by_site) == ("evidence", False, None)
    expected = [posterior.log_marginal_likelihood(float(s)) for s in tuning.scales]
    assert_close(tuning.objective, torch.stack(expected), **EXACT)
    assert tuning.best == tuned.prior_factor
    assert float(tuning.objective.max()) == float(
        tuning.objective[tuning.scales == tuning.best].max()
    )
    assert posterior.tuning is None
    assert tuned.with_prior_precision(1.0).tuning is None


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_each_site_has_its_stationary_scale(form: str) -> None:
    posterior = fitted("several_outputs", form=form)
    tuned = posterior.tune_prior_precision(per_site=True)
    assert isinstance(tuned.prior_factor, dict)
    assert tuned.tuning is not None
    assert tuned.tuning.by_site == tuned.prior_factor
    uniform = posterior.tune_prior_precision().log_marginal_likelihood()
    assert float(tuned.log_marginal_likelihood()) >= float(uniform)
    inside = {
        site: torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for site, value in tuned.prior_factor.items()
        if WIDE[0] * 1.01 < value < WIDE[1] / 1.01
    }
    assert len(inside) >= 2
    evidence = posterior.log_marginal_likelihood({**tuned.prior_factor, **inside})
    slopes = torch.autograd.grad(evidence, list(inside.values()))
    for slope, value in zip(slopes, inside.values(), strict=True):
        assert abs(float(slope * value.detach())) < 1e-4


@pytest.mark.parametrize("prior_factor", [1.0, {"w": 3.0}])
@pytest.mark.parametrize("form", ["primal", "dual"])
def test_no_noise_has_more_evidence(form: str, prior_factor: Any) -> None:
    case = Linear.of()
    at = case.map(torch.ones(4).double(), 1.0)
    posterior = case.fitted(at, form=form).with_prior_precision(prior_factor)
    tuned = posterior.tune_noise_scale()
    grid = torch.stack(
        [posterior.log_marginal_likelihood(None, float(r)) for r in GRID[80:161]]
    )
    assert float(tuned.log_marginal_likelihood()) >= float(grid.max()) - 1e-9
    assert tuned.prior_factor == prior_factor
    assert tuned.tuning is not None
    expected = [
        posterior.log_marginal_likelihood(None, float(r)) for r in tuned.tuning.scales
    ]
    assert_close(tuned.tuning.objective, torch.stack(expected), **EXACT)


def test_the_best_outside_the_bounds_is_at_one_of_them() -> None:
    posterior = fitted("regression_mlp")
    best = posterior.tune_prior_precision().prior_factor
    assert isinstance(best, float)
    message = r"Tuning the prior by evidence ended at one of its bounds, .*`bounds`"
    with pytest.warns(TuningWarning, match=message) as caught:
        low = posterior.tune_prior_precision(bounds=(2 * best, 10 * best))
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(TuningWarning, match=message):
        high = posterior.tune_prior_precision(bounds=(0.1 * best, 0.5 * best))
    for tuned, edge in ((low, 2 * best), (high, 0.5 * best)):
        assert tuned.tuning is not None
        assert tuned.tuning.at_bound
        assert abs(math.log(tuned.prior_factor / edge)) < 1e-3


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (2.0, 1.0), (1.0, math.inf)])
@pytest.mark.parametrize("call", ["tune_prior_precision", "tune_noise_scale"])
def test_bad_bounds(call: str, bounds: tuple[float, float]) -> None:
    posterior = fitted("regression_mlp")
    message = (
        rf"`bounds` must be positive, finite and in order; got {re.escape(str(bounds))}"
    )
    with pytest.raises(OptionError, match=message):
        getattr(posterior, call)(bounds=bounds)


def test_bad_options() -> None:
    posterior = fitted("regression_mlp")
    with pytest.raises(OptionError, match="must be 'evidence' or 'nll'; got 'grid'"):
        posterior.tune_prior_precision("grid")
    with pytest.raises(OptionError, match="method='nll' and no `val`"):
        posterior.tune_prior_precision("nll")
    with pytest.raises(OptionError, match="method='evidence' and some `val`"):
        posterior.tune_prior_precision(val=(torch.zeros(1),))
    with pytest.raises(OptionError, match="`scale` must be a number, a mapping"):
        posterior.with_prior_precision("half")


def test_the_papers_scaling_by_the_share_of_weights() -> None:
    posterior = fitted("regression_mlp")
    scaled = posterior.with_prior_precision("fraction")
    share = posterior.subnet.size / posterior.subnet.num_params
    assert scaled.prior_factor == share
    expected = posterior.with_prior_precision(share).get_posterior()
    assert_close(scaled.get_posterior().precision_matrix, expected.precision_matrix)


def test_a_search_finds_the_lower_of_two_minima() -> None:
    def loss(s: float) -> float:
        log = math.log(s)
        return min((log + 8) ** 2 + 0.5, (log - 5.2) ** 2)

    found = minimize(loss, WIDE, "evidence")
    assert abs(math.log(found.best) - 5.2) < 1e-4
    assert not found.at_bound


@pytest.mark.parametrize("prior", [1e-4, 0.3, 50.0])
def test_a_search_is_as_good_as_scipys(prior: float, dtype: torch.dtype) -> None:
    """Of one minimum: the evidence of weights, each by its own curvature."""
    curvature = (2 * draw(3, 40)).exp().to(dtype)
    squares = draw(4, 40).square().to(dtype) / prior

    def loss(s: float) -> float:
        determined = (curvature / s).log1p()  # 2 nats each
        return float(0.5 * (determined + s * squares).sum())

    found = minimize(loss, WIDE, "evidence")
    peer = scipy.optimize.minimize_scalar(
        lambda log: loss(math.exp(log)),
        bounds=[math.log(bound) for bound in WIDE],
        method="bounded",
        options={"xatol": 1e-8},
    )
    single = dtype == torch.float32  # whose round-off is the objective's last 1e-6
    assert loss(found.best) <= peer.fun * (1 + (1e-5 if single else 1e-9))
    assert math.log(found.best) == pytest.approx(peer.x, abs=1e-2 if single else 1e-4)


def test_a_search_steps_around_what_does_not_exist() -> None:
    """NaN and indefinite precisions are no minimum, and are on the record."""

    def loss(s: float) -> float:
        if s < 1.0:
            raise PrecisionError("no")
        return math.nan if s > 1e4 else (math.log(s) - 2.0) ** 2

    found = minimize(loss, WIDE, "evidence")
    assert abs(math.log(found.best) - 2.0) < 1e-4
    assert bool(found.objective.isinf().any())
    assert not bool(found.objective.isnan().any())
    with pytest.raises(PrecisionError, match="must be finite at some scale between"):
        minimize(lambda s: math.nan, WIDE, "evidence")


@pytest.mark.parametrize(
    ("bounds", "expected"), [(WIDE, 1.0), ((2.0, 8.0), 2.0), ((0.01, 0.5), 0.5)]
)
def test_where_nothing_moves_the_scale_stays(
    bounds: tuple[float, float], expected: float
) -> None:
    """The minimum of round-off is no choice."""
    found = minimize(lambda s: 0.5 + 1e-6 * math.sin(40 * s), bounds, "nll")
    assert found.is_flat
    assert abs(found.best - expected) < 1e-12
    assert found.at_bound is (expected != 1.0)
    assert not minimize(lambda s: 2e-3 * math.log(s), bounds, "nll").is_flat


def test_data_that_the_subnet_does_not_move_keep_the_prior() -> None:
    """Weights of an input that is always zero: held-out data say nothing."""
    x, y = draw(1, 9, 2), draw(2, 9)
    x[:, 1] = 0.0

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    guide = AutoSubnetLaplace(model, {"w": torch.tensor([1])})
    with pytest.warns(NoOutputVarianceWarning, match="moves no output at any"):
        posterior = guide.laplace_approximation(x, y)
    tuned = posterior.tune_prior_precision("nll", val=(x, y))
    assert tuned.tuning is not None
    assert tuned.tuning.is_flat
    assert tuned.prior_factor == 1.0


def tensors(posterior: AutoSubnetMultivariateNormal) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in posterior.named_buffers()}


def test_tuning_leaves_the_posterior_alone() -> None:
    posterior = fitted("regression_mlp")
    before = tensors(posterior)
    posterior.tune_prior_precision(per_site=True).tune_noise_scale()
    assert (posterior.prior_factor, posterior.noise_factor) == (1.0, 1.0)
    for name, buffer in posterior.named_buffers():
        assert_close(buffer, before[name], rtol=0.0, atol=0.0, equal_nan=True)


def held_out_nll(posterior: AutoSubnetMultivariateNormal, val: Any) -> float:
    """Mean, from the posterior's own predictive distribution."""
    x, y, *rest = val
    found = posterior.predictive_distribution(x, None, *rest)
    return -float(found.log_prob(y).mean())


@at_any_bound
@pytest.mark.parametrize("form", ["primal", "dual"])
@pytest.mark.parametrize("name", ["regression_mlp", "classification_mlp"])
def test_held_out_data_choose_the_prior(name: str, form: str) -> None:
    case = CASES[name](DOUBLE)
    posterior = fitted(name, form=form)
    x, y = case.args
    val = (x[2:5] + 0.3, y[2:5])
    tuned = posterior.tune_prior_precision("nll", val=val, standard_errors=0)
    assert tuned.tuning is not None
    assert tuned.tuning.method == "nll"
    grid = [
        held_out_nll(posterior.with_prior_precision(float(s)), val) for s in GRID[::4]
    ]
    best = held_out_nll(tuned, val)
    assert best <= min(grid) + 1e-9
    expected = [
        held_out_nll(posterior.with_prior_precision(float(s)), val)
        for s in tuned.tuning.scales[::5]
    ]
    found = tuned.tuning.objective[::5]
    assert_close(found, torch.tensor(expected, dtype=torch.float64), **EXACT)


def test_held_out_data_choose_the_noise() -> None:
    case = CASES["regression_mlp"](DOUBLE)
    posterior = fitted("regression_mlp").with_prior_precision(0.5)
    x, y = case.args
    val = (x[2:5] + 0.3, y[2:5])
    tuned = posterior.tune_noise_scale("nll", val=val)
    assert tuned.prior_factor == 0.5
    grid = [
        held_out_nll(posterior.with_noise_scale(float(r)), val) for r in GRID[80:161:2]
    ]
    assert held_out_nll(tuned, val) <= min(grid) + 1e-9


def serving(
    posterior: AutoSubnetMultivariateNormal,
    val: Any,
    tuning: Tuning,
    errors: int | float,
) -> list[float]:
    """Scales whose loss to the best is within errors, by the textbook's formula."""
    x, y = val
    tried = tuning.scales.tolist()
    losses = [
        posterior.with_prior_precision(s).predictive_distribution(x).log_prob(y).neg()
        for s in tried
    ]
    best = losses[int(tuning.objective.argmin())]
    found = []
    for scale, loss in zip(tried, losses, strict=True):
        worse = (loss - best).tolist()
        mean = statistics.fmean(worse)
        if mean <= errors * statistics.pstdev(worse) / len(worse) ** 0.5 + 1e-12:
            found.append(scale)
    return found


@at_any_bound
@pytest.mark.parametrize("name", ["regression_mlp", "classification_mlp"])
@pytest.mark.parametrize("errors", [0.5, 3.0])
def test_what_held_out_data_do_not_tell_apart_keeps_the_prior(
    name: str, errors: float
) -> None:
    case = CASES[name](DOUBLE)
    posterior = fitted(name).with_prior_precision(3.0)
    x, y = case.args
    val = (x[2:5] + 0.3, y[2:5])
    tuned = posterior.tune_prior_precision("nll", val=val, standard_errors=errors)
    assert tuned.tuning is not None
    assert 1.0 in tuned.tuning.scales.tolist()
    serve = serving(posterior, val, tuned.tuning, errors)
    assert tuned.prior_factor == min(serve, key=lambda scale: abs(math.log(scale)))


@at_any_bound
def test_many_errors_keep_the_prior_and_none_take_the_best() -> None:
    case = CASES["regression_mlp"](DOUBLE)
    posterior = fitted("regression_mlp")
    x, y = case.args
    val = (x[2:5] + 0.3, y[2:5])
    best = posterior.tune_prior_precision("nll", val=val, standard_errors=0)
    assert best.prior_factor != 1.0
    none = posterior.tune_prior_precision("nll", val=val, standard_errors=0.0)
    assert none.prior_factor == best.prior_factor
    many = posterior.tune_prior_precision("nll", val=val, standard_errors=1e6)
    assert many.prior_factor == 1.0
    assert not many.tuning.at_bound
    with pytest.warns(TuningWarning, match="prior by held-out nll ended at one of its"):
        edge = posterior.tune_prior_precision(
            "nll", val=val, standard_errors=1e6, bounds=(2.0, 8.0)
        )
    assert edge.prior_factor == 2.0
    assert edge.tuning.at_bound
    assert len(edge.tuning.scales) == len(best.tuning.scales) + 1


def of_waves(dtype: torch.dtype) -> tuple[AutoSubnetMultivariateNormal, Any]:
    """A regression far from its prior, and held-out data near the MAP."""
    x = (torch.linspace(-1, 1, 60).unsqueeze(-1) * torch.arange(1, 6)).sin().to(dtype)
    y = x @ torch.tensor([1.0, -2.0, 0.5, 1.0, -1.0], dtype=dtype)
    y, noise = y + 0.3 * draw(3, 60).to(dtype), 0.3

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(5), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, noise), obs=y)

    gram = x.mT @ x / noise**2 + torch.eye(5, dtype=dtype)
    at = torch.linalg.solve(gram, x.mT @ y / noise**2)
    guide = AutoSubnetLaplace(model, init_loc_fn=lambda site: at)
    # Errors a little smaller than the noise, in no order.
    at_random = 7 * torch.arange(20) % 20
    errors = dist.Normal(0.0, 0.83 * noise).icdf((at_random + 0.5) / 20).to(dtype)
    val = (x[::3], x[::3] @ at + errors)
    return guide.laplace_approximation(x, y), val


@at_any_bound
def test_by_default_held_out_data_like_the_others_leave_the_prior(
    dtype: torch.dtype,
) -> None:
    """Their best is where nothing is left of the posterior; two errors are nearer."""
    posterior, val = of_waves(dtype)
    with pytest.warns(TuningWarning, match=r"leaves .* predictions are the MAP's"):
        best = posterior.tune_prior_precision("nll", val=val, standard_errors=0)
    assert best.prior_factor > 1e3
    x, y = val
    left = [p.output_distribution(x).variance.sum() for p in (best, posterior)]
    assert float(left[0] / left[1]) < 1e-3
    tuned = posterior.tune_prior_precision("nll", val=val)
    serve = serving(posterior, val, tuned.tuning, 2.0)
    assert tuned.prior_factor == min(serve, key=lambda scale: abs(math.log(scale)))
    assert tuned.prior_factor == 1.0
    # Where data are far off, they do argue against it.
    far = x, y + 10 * x[:, 0]
    other = posterior.tune_prior_precision("nll", val=far, bounds=(1e-4, 1e6))
    assert other.prior_factor < 0.1


@at_any_bound
def test_a_prior_that_leaves_nothing_is_not_taken_unasked(dtype: torch.dtype) -> None:
    """A model whose noise is too large for the held-out data is always too wide."""
    posterior, (x, _) = of_waves(dtype)
    exact = posterior.predictive_distribution(x).mean
    message = "the model's own prior stays.*pass `standard_errors=2`"
    with pytest.warns(TuningWarning, match=message) as caught:
        tuned = posterior.tune_prior_precision("nll", val=(x, exact))
    assert [each.filename for each in caught] == [__file__]
    assert (tuned.prior_factor, tuned.tuning.best) == (1.0, 1.0)
    assert_close(tuned.gaussian.variance(), posterior.gaussian.variance())
    with pytest.warns(TuningWarning, match=r"leaves .* predictions are the MAP's"):
        asked = posterior.tune_prior_precision("nll", val=(x, exact), standard_errors=2)
    assert asked.prior_factor > 1e3


def test_a_prior_that_leaves_nothing_is_told_of_weights_that_move_no_output() -> None:
    """In training they have no variance to lose."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    x = torch.randn(9, 3, dtype=torch.float64)
    blank = x * torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    guide = AutoSubnetLaplace(
        model,
        {"w": torch.tensor([2])},
        init_loc_fn=lambda site: torch.zeros(3, dtype=torch.float64),
    )
    with pytest.warns(NoOutputVarianceWarning, match="moves no output"):
        posterior = guide.laplace_approximation(blank, torch.zeros_like(x[:, 0]))
    with pytest.warns(TuningWarning, match="predictions are the MAP's"):
        tuned = posterior.tune_prior_precision(
            "nll", val=(5 * x, torch.zeros_like(x[:, 0])), standard_errors=0
        )
    assert tuned.prior_factor > 1e3


def test_a_noise_at_a_bound_is_told() -> None:
    posterior, val = of_waves(torch.float64)
    x, y = val
    far = (x, y + 100.0)
    with pytest.warns(TuningWarning, match=r"the noise by held-out nll ended at"):
        tuned = posterior.tune_noise_scale("nll", val=far, bounds=(0.5, 2.0))
    assert tuned.tuning.at_bound


@pytest.mark.parametrize(
    ("bounds", "message"),
    [((900.0, 950.0), "ended at one of"), ((5e6, 6e6), "predictions are the MAP's")],
)
def test_a_choice_warns_once(bounds: tuple[float, float], message: str) -> None:
    posterior, _ = of_waves(torch.float64)
    with pytest.warns(TuningWarning, match=message) as caught:
        posterior.tune_prior_precision(bounds=bounds)
    assert len(caught) == 1


def test_without_standard_errors_the_evidence_is_tuned_alike() -> None:
    posterior = fitted("regression_mlp")
    found = [
        posterior.tune_prior_precision(standard_errors=errors).prior_factor
        for errors in (None, 0, 0.0)
    ]
    assert found == [posterior.tune_prior_precision().prior_factor] * 3


def test_errors_count_the_weights_of_data() -> None:
    """An observation of weight 2 pulls twice, and one of weight 0 not at all."""
    losses = {
        0.1: torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64),
        # Worse by 0, 0.9 and 9, which under the weights is 0.3 in the mean.
        1.0: torch.tensor([1.0, 1.9, 10.0], dtype=torch.float64),
    }
    weights = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    tried = torch.tensor([0.1, 1.0], dtype=torch.float64)
    tuning = Tuning("nll", tried, tried, 0.1, at_bound=False)
    error = (4 * 0.3**2 + 0.6**2) ** 0.5 / 3
    for factor, expected in ((0.999, 0.1), (1.001, 1.0)):
        errors = factor * 0.3 / error
        found = nearest_to_own(tuning, losses, weights, errors, WIDE)
        assert found.best == expected


@pytest.mark.parametrize(
    ("scales", "nearest"),
    [
        ((0.2, 2.5), 2.5),  # farther from 1 than 0.2 in value, nearer in ratio
        ((0.5, 1.6), 1.6),
        ((0.7, 1.6), 0.7),
        ((1e-3, 500.0), 500.0),
    ],
)
def test_the_nearest_scale_is_so_in_ratio(
    scales: tuple[float, float], nearest: float
) -> None:
    losses = {scale: torch.zeros(3, dtype=torch.float64) for scale in scales}
    tried = torch.tensor(scales, dtype=torch.float64)
    weights = torch.ones(3, dtype=torch.float64)
    for best in scales:
        tuning = Tuning("nll", tried, torch.zeros_like(tried), best, at_bound=False)
        assert nearest_to_own(tuning, losses, weights, 1.0, WIDE).best == nearest


def test_bad_standard_errors() -> None:
    posterior = fitted("regression_mlp")
    with pytest.raises(OptionError, match=r"must be finite and at least 0; got -1"):
        posterior.tune_prior_precision("nll", val=(0,), standard_errors=-1)
    with pytest.raises(OptionError, match=r"at least 0; got nan"):
        posterior.tune_prior_precision("nll", val=(0,), standard_errors=math.nan)
    with pytest.raises(OptionError, match=r"must go with method='nll'.*'evidence'"):
        posterior.tune_prior_precision(standard_errors=1.0)


def test_held_out_data_without_room_for_their_jacobian(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same scale, with a run of the network or more for each that is tried."""
    case, runs = CASES["regression_mlp"](DOUBLE), 0

    def counted(x: Tensor, y: Tensor) -> Any:
        nonlocal runs
        runs += 1
        return case.model(x, y)

    guide = replace(case, model=counted).guide(case.scattered())
    posterior = guide.laplace_approximation(*case.args)
    fitting = runs
    held = posterior.tune_prior_precision("nll", val=case.args)
    few = runs - fitting
    # Enough for the factor, S x S, and less than the Jacobian may take.
    memory_now = types.SimpleNamespace(available=1500)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory_now)
    anew = posterior.tune_prior_precision("nll", val=case.args)
    assert held.prior_factor == anew.prior_factor
    assert anew.tuning is not None
    num_tried = len(anew.tuning.scales)
    assert few < num_tried
    assert runs - fitting - few >= num_tried


def test_held_out_data_that_do_not_serve() -> None:
    case = CASES["regression_mlp"](DOUBLE)
    posterior = fitted("regression_mlp")
    with pytest.raises(DataError, match="must hold observations; got none at site 'y'"):
        posterior.tune_prior_precision("nll", val=(case.args[0],))
    with pytest.raises(DataError, match=r"A batch must be .* got int"):
        posterior.tune_prior_precision("nll", val=3)


def test_held_out_data_leave_the_random_numbers_alone() -> None:
    """Also where a family takes draws: these are the search's own."""
    posterior = fitted("weighted_poisson")
    args = CASES["weighted_poisson"](DOUBLE).args
    torch.manual_seed(4)
    state = torch.get_rng_state()
    first = posterior.tune_prior_precision("nll", val=args)
    second = posterior.tune_prior_precision("nll", val=args)
    assert bool((torch.get_rng_state() == state).all())
    assert first.prior_factor == second.prior_factor
