"""Sums over minibatches equal the one call on all data, however it is cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.exceptions import DataError, ModelError, OptionError
from pyro_subnet.fit.sums import diagonal_curvature
from pyro_subnet.selection import LargestVariance, RandomSubnet
from pyro_subnet.tracing.data import Data
from tests.cases import (
    CASES,
    DOUBLE,
    MLP,
    NUM_DATA,
    Case,
    draw,
)
from tests.tolerances import tolerance

REORDERED = tolerance(torch.float64, "reordered")
SIZES = [1, 3, NUM_DATA]
# Cases whose arguments all are tensors with a row for each observation.
NAMES = [
    "regression_mlp",
    "classification_mlp",
    "cnn",
    "heteroscedastic",
    "weighted_poisson",
    "masked_bernoulli",
    "constrained",
    "tokens",
]
each_case = pytest.mark.parametrize("name", NAMES)
RANDOM = RandomSubnet(0.5, seed=3)


def batches(case: Case, size: int, order: list[int] | None = None) -> list[tuple]:
    """The data in batches, each a tuple of arguments."""
    rows = torch.tensor(order or list(range(NUM_DATA)))
    return [tuple(arg[i] for arg in case.args) for i in rows.split(size)]


def precision(posterior: AutoSubnetMultivariateNormal) -> Tensor:
    """The posterior's precision."""
    return posterior.get_posterior().precision_matrix


def same(
    ours: AutoSubnetMultivariateNormal, expected: AutoSubnetMultivariateNormal
) -> None:
    """Compares the subnets and the precisions of two posteriors."""
    assert_close(ours.subnet.flat, expected.subnet.flat, rtol=0, atol=0)
    assert_close(precision(ours), precision(expected), **REORDERED)


@pytest.mark.parametrize("size", SIZES)
@each_case
def test_any_batch_size(name: str, size: int) -> None:
    case = CASES[name](DOUBLE)
    whole = case.guide().laplace_approximation(*case.args)
    same(case.guide().laplace_approximation_from(batches(case, size)), whole)


@each_case
def test_any_order(name: str) -> None:
    case = CASES[name](DOUBLE)
    whole = case.guide(RANDOM).laplace_approximation(*case.args)
    shuffled = batches(case, 2, [6, 2, 4, 0, 5, 1, 3])
    same(case.guide(RANDOM).laplace_approximation_from(shuffled), whole)


@each_case
def test_the_same_subnet_of_a_share(name: str) -> None:
    case = CASES[name](DOUBLE)
    whole = case.guide(0.5).laplace_approximation(*case.args)
    shuffled = batches(case, 3, [6, 2, 4, 0, 5, 1, 3])
    same(case.guide(0.5).laplace_approximation_from(shuffled), whole)


@pytest.mark.filterwarnings("ignore::pyro_subnet.exceptions.NoOutputVarianceWarning")
@pytest.mark.parametrize("size", [1, 3])
@each_case
def test_the_same_subnet_of_largest_variance(name: str, size: int) -> None:
    case = CASES[name](DOUBLE)
    whole = case.guide(LargestVariance(0.5)).laplace_approximation(*case.args)
    shuffled = batches(case, size, [6, 2, 4, 0, 5, 1, 3])
    found = case.guide(LargestVariance(0.5)).laplace_approximation_from(shuffled)
    same(found, whole)
    variance = 1 / (case.ggn() + case.prior()).diagonal()
    chosen = torch.zeros(case.num_params, dtype=torch.bool)
    chosen[found.subnet.flat] = True
    assert variance[chosen].min() > variance[~chosen].max() - 1e-6
    explained = torch.tensor(found.subnet.explained_variance)
    assert_close(explained, torch.tensor(whole.subnet.explained_variance))


# Plates that subsample.

Model = Callable[..., None]


def plated(net: MLP, plate: Callable[..., Any]) -> Model:
    """A regression whose data plate knows that there are N data in all."""

    def model(x: Tensor, y: Tensor, index: Tensor | None = None) -> None:
        mean = net(x).squeeze(-1)
        with plate(x, index):
            pyro.sample("y", dist.Normal(mean, 0.3), obs=y)

    return model


def by_size(x: Tensor, index: Tensor | None) -> pyro.plate:
    """The batch is passed in; the plate is told how many data there are in all."""
    return pyro.plate("data", NUM_DATA, subsample_size=len(x))


def by_index(x: Tensor, index: Tensor | None) -> pyro.plate:
    """The batch is passed in with the data's positions."""
    return pyro.plate("data", NUM_DATA, subsample=index)


def subsampled(plate: Callable[..., Any]) -> Case:
    """The regression with positions among its data, and a plate of some kind."""
    case = CASES["regression_mlp"](DOUBLE)
    args = (*case.args, torch.arange(NUM_DATA))
    model = plated(MLP(DOUBLE, 3, 4, 1), plate)
    return dataclasses.replace(case, model=model, args=args)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("plate", [by_size, by_index])
def test_a_subsampling_plate_counts_no_observation_twice(
    plate: Callable[..., Any], size: int
) -> None:
    plain, case = CASES["regression_mlp"](DOUBLE), subsampled(plate)
    whole = plain.guide().laplace_approximation(*plain.args)
    same(case.guide().laplace_approximation(*case.args), whole)
    shuffled = batches(case, size, [6, 2, 4, 0, 5, 1, 3])
    same(case.guide().laplace_approximation_from(shuffled), whole)


@pytest.mark.parametrize("plate", [by_size, by_index])
def test_largest_variance_with_a_subsampling_plate(plate: Callable[..., Any]) -> None:
    plain, case = CASES["regression_mlp"](DOUBLE), subsampled(plate)
    whole = plain.guide(6).laplace_approximation(*plain.args)
    same(case.guide(6).laplace_approximation_from(batches(case, 3)), whole)


@pytest.mark.parametrize("plate", [by_size, by_index])
def test_one_call_on_a_batch_takes_the_scale_of_its_plate(
    plate: Callable[..., Any],
) -> None:
    case = subsampled(plate)
    (batch,) = batches(case, 3, [6, 2, 4])
    jac = case.jacobian(0)[[6, 2, 4]]
    expected = NUM_DATA / 3 * jac.T @ jac / 0.3**2 + case.prior()
    found = case.guide().laplace_approximation(*batch)
    assert_close(precision(found), expected, **tolerance(torch.float64))


@pytest.mark.parametrize("size", SIZES)
def test_batches_of_positions_alone(size: int) -> None:
    case = CASES["regression_mlp"](DOUBLE)
    net, (x, y) = MLP(DOUBLE, 3, 4, 1), case.args

    def model(index: Tensor) -> None:
        mean = net(x[index]).squeeze(-1)
        with pyro.plate("data", NUM_DATA, subsample=index) as chosen:
            pyro.sample("y", dist.Normal(mean, 0.3), obs=y[chosen])

    whole = case.guide().laplace_approximation(*case.args)
    by_position = dataclasses.replace(case, model=model, args=(torch.arange(NUM_DATA),))
    found = by_position.guide().laplace_approximation_from(
        list(torch.tensor([6, 2, 4, 0, 5, 1, 3]).split(size))
    )
    same(found, whole)


# Forms that batches come in.


def as_lists(case: Case) -> Any:
    """A DataLoader's items are lists."""
    return DataLoader(TensorDataset(*case.args), batch_size=3, shuffle=True)


def as_keywords(case: Case) -> Any:
    return [{"x": x, "y": y} for x, y in batches(case, 3)]


def as_call_arguments(case: Case) -> Any:
    return [((x,), {"y": y}) for x, y in batches(case, 3)]


def as_lists_of_call_arguments(case: Case) -> Any:
    return [[[x], {"y": y}] for x, y in batches(case, 3)]


@pytest.mark.parametrize(
    "form", [as_lists, as_keywords, as_call_arguments, as_lists_of_call_arguments]
)
@pytest.mark.parametrize("subnet", [None, 5])
def test_any_form_of_batches(form: Callable[[Case], Any], subnet: int | None) -> None:
    case = CASES["regression_mlp"](DOUBLE)
    whole = case.guide(subnet).laplace_approximation(*case.args)
    same(case.guide(subnet).laplace_approximation_from(form(case)), whole)


def test_batches_of_one_tensor() -> None:
    case = CASES["tied"](DOUBLE)
    x, _ = case.args

    def model(x: Tensor) -> None:
        case.model(x, x)

    alone = dataclasses.replace(case, model=model, args=(x,))
    whole = case.guide().laplace_approximation(x, x)
    same(alone.guide().laplace_approximation_from(list(x.split(3))), whole)


def test_a_batch_that_is_no_set_of_arguments() -> None:
    guide = CASES["regression_mlp"](DOUBLE).guide()
    with pytest.raises(DataError, match=r"one tensor; got str\. Wrap it in a tuple"):
        guide.laplace_approximation_from(["x"])


@pytest.mark.parametrize("subnet", [RANDOM, None, 5])
def test_no_batch(subnet: Any) -> None:
    case = CASES["regression_mlp"](DOUBLE)
    guide = case.guide(subnet)
    message = "must hold at least one batch; got none"
    with pytest.raises(DataError, match=message):
        guide.laplace_approximation_from([])
    guide(*case.args)
    with pytest.raises(DataError, match=message):
        guide.laplace_approximation_from([])


def one_shot(case: Case) -> Iterator[tuple]:
    """A generator over the batches."""
    yield from batches(case, 3)


@pytest.mark.parametrize("subnet", [RANDOM, None])
def test_a_one_shot_iterator_serves_where_one_pass_does(subnet: Any) -> None:
    case = CASES["regression_mlp"](DOUBLE)
    whole = case.guide(subnet).laplace_approximation(*case.args)
    guide = case.guide(subnet)
    guide(*case.args)
    same(guide.laplace_approximation_from(one_shot(case)), whole)
    same(guide.laplace_approximation_from(iter(batches(case, 1))), whole)


def test_a_one_shot_iterator_that_was_used_up() -> None:
    case = CASES["regression_mlp"](DOUBLE)
    guide = case.guide(RANDOM)
    guide(*case.args)
    used = one_shot(case)
    assert len(list(used)) == 3
    with pytest.raises(DataError, match="an iterator was not used up before"):
        guide.laplace_approximation_from(used)


def test_a_one_shot_iterator_cannot_also_choose_the_subnet() -> None:
    case = CASES["regression_mlp"](DOUBLE)
    guide, data = case.guide(LargestVariance(5)), one_shot(case)
    guide(*case.args)
    message = "re-iterable because LargestVariance passes .* got a one-shot generator"
    with pytest.raises(DataError, match=message):
        guide.laplace_approximation_from(data)
    assert len(list(data)) == 3  # it was refused before anything was read


def test_a_one_shot_iterator_cannot_also_set_the_guide_up() -> None:
    case = CASES["regression_mlp"](DOUBLE)
    data = one_shot(case)
    message = "re-iterable because setting up the guide passes .* one-shot generator"
    with pytest.raises(DataError, match=message):
        case.guide(RANDOM).laplace_approximation_from(data)
    assert len(list(data)) == 3


@pytest.mark.parametrize(
    ("subnet", "passes"), [(RANDOM, ["Curvature"]), (5, ["Variances", "Curvature"])]
)
def test_the_progress_bar(
    subnet: Any, passes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES["regression_mlp"](DOUBLE)
    guide = case.guide(subnet)
    guide(*case.args)
    guide.laplace_approximation_from(batches(case, 3))
    assert not capsys.readouterr().err
    guide.laplace_approximation_from(batches(case, 3), progress=True)
    shown = capsys.readouterr().err
    for description in passes:
        assert f"{description}: 100%" in shown
    assert "3/3" in shown
    assert "Noise" not in shown  # one batch is looked at, for which no bar is needed


# A part of the data stands for all.


def by_hand(case: Case, rows: list[int], scale: float) -> Tensor:
    """The prior, and the sum over some data times a factor."""
    jac = case.jacobian(0)[rows]
    return scale * jac.T @ jac / 0.3**2 + case.prior()


@pytest.mark.parametrize("plate", [None, by_size, by_index])
def test_num_data_scales_the_sum_up(plate: Callable[..., Any] | None) -> None:
    case = CASES["regression_mlp"](DOUBLE) if plate is None else subsampled(plate)
    part = batches(case, 3)[:1] + batches(case, 1)[5:6]
    found = case.guide().laplace_approximation_from(part, num_data=100)
    expected = by_hand(case, [0, 1, 2, 5], 100 / 4)
    assert_close(precision(found), expected, **tolerance(torch.float64))


def test_num_data_scales_the_variances_too() -> None:
    case = CASES["regression_mlp"](DOUBLE)
    guide = case.guide()
    guide(*case.args)
    part = Data(batches(case, 3)[:2], whole=False, num_data=1000)
    found = diagonal_curvature(guide.at_map, part)
    expected = by_hand(case, list(range(6)), 1000 / 6) - case.prior()
    assert_close(found.ggn, expected.diagonal(), **tolerance(torch.float64))
    assert_close(found.prior, case.prior().diagonal(), **tolerance(torch.float64))


def test_num_data_of_all_data_changes_nothing() -> None:
    case = CASES["heteroscedastic"](DOUBLE)
    whole = case.guide().laplace_approximation(*case.args)
    guide = case.guide()
    same(guide.laplace_approximation_from(batches(case, 2), num_data=NUM_DATA), whole)


def test_num_data_counts_data_of_several_outputs_once() -> None:
    case = CASES["tokens"](DOUBLE)
    whole = case.guide().laplace_approximation(*case.args)
    twice = case.guide().laplace_approximation_from(batches(case, 2), num_data=14)
    assert_close(twice.ggn(), 2 * whole.ggn(), **REORDERED)


def test_num_data_where_the_data_axis_is_not_the_first() -> None:
    """An outer plate of outputs: C = 2 stands left of N."""
    case = CASES["plates"](DOUBLE)
    x, y = case.args
    parts = [(x[:3], y[:, :3]), (x[3:], y[:, 3:])]
    whole = case.guide().laplace_approximation(x, y)
    same(case.guide().laplace_approximation_from(parts), whole)
    twice = case.guide().laplace_approximation_from(parts, num_data=2 * NUM_DATA)
    assert_close(twice.ggn(), 2 * whole.ggn(), **REORDERED)


@pytest.mark.parametrize("num_data", [0, -3])
def test_num_data_must_be_a_count(num_data: int) -> None:
    case = CASES["regression_mlp"](DOUBLE)
    with pytest.raises(OptionError, match=f"positive count; got {num_data}"):
        case.guide().laplace_approximation_from(batches(case, 3), num_data=num_data)


def test_num_data_of_sites_of_two_lengths() -> None:
    case = CASES["two_lengths"](DOUBLE)
    guide = case.guide()
    message = r"sites of one length; got \{'y': 7, 'count': 5\}"
    with pytest.raises(DataError, match=message):
        guide.laplace_approximation_from([case.args], num_data=100)
    same(
        guide.laplace_approximation_from([case.args]),
        guide.laplace_approximation(*case.args),
    )


# Priors and guides that do not fit minibatches.


def test_a_prior_that_depends_on_the_batch() -> None:
    case = CASES["regression_mlp"](DOUBLE)

    def model(x: Tensor, y: Tensor) -> None:
        case.model(x, y)
        pyro.factor("penalty", -x.square().sum())

    tilted = dataclasses.replace(case, model=model)
    message = "log prior at the MAP must be the same for every batch; got"
    with pytest.raises(ModelError, match=message):
        tilted.guide().laplace_approximation_from(batches(case, 3))
    tilted.guide().laplace_approximation(*case.args)


def test_a_latent_site_for_each_observation() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoSubnetLaplace(model)
    message = r"Site 'z' must have the shape .* \(4,\); got \(3,\) in this call"
    with pytest.raises(ModelError, match=message):
        guide.laplace_approximation_from([draw(1, 4), draw(2, 3)])


def test_a_site_that_only_some_batches_have() -> None:
    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        b = pyro.sample("b", dist.Normal(x.new_zeros(()), 1.0)) if len(x) > 3 else 0.0
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x + b, 1.0), obs=x)

    with pytest.raises(ModelError, match="got a call without site 'b'"):
        AutoSubnetLaplace(model).laplace_approximation_from([draw(1, 4), draw(2, 3)])


def test_batches_leave_the_guide_as_it_was() -> None:
    case = CASES["regression_mlp"](DOUBLE)
    guide = case.guide()
    guide(*case.args)
    loc, state = guide.loc.detach().clone(), torch.get_rng_state()
    guide.laplace_approximation_from(batches(case, 3))
    assert_close(guide.loc.detach(), loc, rtol=0, atol=0)
    assert_close(torch.get_rng_state(), state, rtol=0, atol=0)


# How many data a batch shows.


def slopes(x: Tensor) -> Tensor:
    """Two weights of a linear model, with a prior of scale 0.02."""
    return pyro.sample("w", dist.Normal(x.new_zeros(2), 0.02).to_event(1))


def unsized(x: Tensor, y: Tensor) -> None:
    w = slopes(x)
    with pyro.plate("data"):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def unsized_beside_outputs(x: Tensor, y: Tensor) -> None:
    w = slopes(x)
    with pyro.plate("outputs", 1, dim=-2), pyro.plate("data", dim=-1):
        pyro.sample("y", dist.Normal((x @ w)[None], 1.0), obs=y[None])


def sequential(x: Tensor, y: Tensor) -> None:
    w = slopes(x)
    for i in pyro.plate("data", len(x)):
        pyro.sample(f"y_{i}", dist.Normal(x[i] @ w, 1.0), obs=y[i])


def without_a_plate(x: Tensor, y: Tensor) -> None:
    w = slopes(x)
    pyro.sample("y", dist.Normal(x @ w, 1.0).to_event(1), obs=y)


COUNTED = [unsized, unsized_beside_outputs, sequential, without_a_plate]


@pytest.mark.parametrize("sizes", [(20,), (7, 13), (1, 19)])
@pytest.mark.parametrize("model", COUNTED)
def test_num_data_counts_what_a_batch_shows(
    model: Model, sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, y = torch.randn(20, 2, dtype=dtype), torch.randn(20, dtype=dtype)
    parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
    found = AutoSubnetLaplace(model).laplace_approximation_from(parts, num_data=50)
    dense = x.double()
    right = 50 / 20 * dense.T @ dense + torch.eye(2).double() / 0.02**2
    close = tolerance(dtype, "closed_form")
    assert_close(precision(found), right.to(dtype), **close)


def loop(x: Tensor, y: Tensor) -> None:
    w = slopes(x)
    for i in range(len(x)):
        pyro.sample(f"y_{i}", dist.Normal(x[i] @ w, 1.0), obs=y[i])


def parts_of_one_length(x: Tensor, y: Tensor) -> None:
    w, half = slopes(x), len(x) // 2
    for name, part in (("a", slice(half)), ("b", slice(half, None))):
        with pyro.plate(name, half):
            pyro.sample(f"y_{name}", dist.Normal(x[part] @ w, 1.0), obs=y[part])


@pytest.mark.parametrize(
    ("model", "shown"), [(loop, "10 sites"), (parts_of_one_length, "'y_a': 5")]
)
def test_num_data_where_no_plate_tells_what_a_batch_shows(
    model: Model, shown: str
) -> None:
    x, y = torch.randn(10, 2), torch.randn(10)
    message = rf"observed sites of one length; got .*{shown}.*of length 10\. Put each"
    with pytest.raises(DataError, match=message):
        AutoSubnetLaplace(model).laplace_approximation_from([(x, y)], num_data=40)


@pytest.mark.parametrize("num_data", [1, 6])
def test_num_data_of_fewer_than_there_are(num_data: int) -> None:
    case = CASES["regression_mlp"](DOUBLE)
    message = f"at least the number of data in the batches; got {num_data}, and "
    with pytest.raises(DataError, match=message):
        case.guide().laplace_approximation_from(batches(case, 3), num_data=num_data)


# More new inputs than the training data whose number the model holds.


def held(x: Tensor, y: Tensor | None = None) -> None:
    """A linear model that holds the number of its training data."""
    w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    with by_size(x, None):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def covariance(x: Tensor) -> Tensor:
    """The exact posterior covariance of its weights, float64."""
    dense = x.double()
    return torch.linalg.inv(4 * dense.T @ dense + torch.eye(2).double())


@pytest.mark.parametrize("count", [1, NUM_DATA, 40])
def test_predictions_at_any_number_of_inputs(count: int, dtype: torch.dtype) -> None:
    x, y = torch.randn(NUM_DATA, 2, dtype=dtype), torch.randn(NUM_DATA, dtype=dtype)
    posterior = AutoSubnetLaplace(held).laplace_approximation_from([(x, y)])
    new = torch.randn(count, 2, dtype=dtype)
    right = ((new.double() @ covariance(x)) * new.double()).sum(-1).to(dtype)
    close = tolerance(dtype, "closed_form")
    found = posterior.output_distribution(new).variance.flatten()
    assert_close(found, right, **close)


@pytest.mark.parametrize("kind", ["linearized", "hybrid"])
def test_models_at_more_inputs_than_data_count_each_once(kind: str) -> None:
    x, y = torch.randn(NUM_DATA, 2).double(), torch.randn(NUM_DATA).double()
    posterior = AutoSubnetLaplace(held).laplace_approximation_from([(x, y)])
    hybrid = posterior.hybrid_model(linearized=kind == "linearized")
    new_x, new_y = torch.randn(20, 2).double(), torch.randn(20).double()
    theta = torch.tensor([0.3, -0.7]).double()
    given = poutine.condition(hybrid, data={"subnet": theta})
    found = poutine.trace(given).get_trace(new_x, new_y).log_prob_sum()
    right = dist.Normal(new_x @ theta, new_x.new_tensor(0.5)).log_prob(new_y).sum()
    right = right + dist.Normal(new_x.new_zeros(2), 1.0).log_prob(theta).sum()
    assert_close(found, right, **tolerance(torch.float64, "closed_form"))
