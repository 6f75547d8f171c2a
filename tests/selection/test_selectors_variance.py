"""Selectors by predictive variance, against dense autograd over all weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

import jaxtyping
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, Subnet
from pyro_subnet.exceptions import (
    DataError,
    MemoryLimitError,
    OptionError,
    PrecisionError,
    SelectionError,
)
from pyro_subnet.selection import (
    GreedyVariance,
    LargestGradient,
    LargestVariance,
    PredictiveVariance,
    Selector,
)
from pyro_subnet.selection.greedy import (
    add_in_blocks,
    check_pool_fits,
    exchange_,
    pool_size,
)
from pyro_subnet.selection.held_gram import HeldGram, HeldRows
from pyro_subnet.selection.output_variance import (
    dense_precision,
    held_rows,
    squared_gradients,
)
from pyro_subnet.selection.predictive_variance import share_read
from pyro_subnet.tensors.agreement import random_stream
from pyro_subnet.tracing.data import Data
from tests.cases import (
    CASES,
    DOUBLE,
    NUM_DATA,
    Case,
    classification_mlp,
    draw,
    mlp_outputs,
    regression_mlp,
    several_outputs,
)
from tests.reference import categorical_information, dense_jacobian
from tests.tolerances import tolerance

SUM = tolerance(torch.float64, "reordered")
AUTOGRAD = tolerance(torch.float64, "autograd")
# Those whose precision over all weights is positive definite at their point.
NAMES = [
    "regression_mlp",
    "several_outputs",
    "classification_mlp",
    "heteroscedastic",
    "cnn",
    "two_sites",
]


def case_of(name: str) -> Case:
    return CASES[name](DOUBLE)


def select(case: Case, selector: Any, data: Data | None = None) -> Subnet:
    pyro.clear_param_store()  # a guide that is gone leaves its `loc` to the next one
    guide = case.guide()
    guide(*case.args, **case.kwargs)
    return selector(guide, data or Data.single(case.args, case.kwargs))


def gram(case: Case, weighting: str = "equal") -> Tensor:
    """Σ JᵀJ, or Σ w JᵀΛJ, at the training inputs."""
    if weighting == "fisher":
        return case.ggn()
    jacs = [case.jacobian(site) for site in range(len(case.observed))]
    return sum((jac.T @ jac for jac in jacs), torch.zeros(()).double())


def precision(case: Case) -> Tensor:
    return case.ggn() + case.prior()


def kept(p: Tensor, a: Tensor, chosen: Any) -> float:
    """tr P_SS⁻¹ A_SS, by an inverse."""
    at = torch.as_tensor(chosen)
    return float((p[at][:, at].inverse() @ a[at][:, at]).trace())


def top(scores: Tensor, size: int) -> list[int]:
    """Positions of the largest scores; scores that agree to 1e-9 go by position."""
    order = sorted(range(len(scores)), key=lambda i: (-float(f"{scores[i]:.8e}"), i))
    return sorted(order[:size])


def test_the_names_are_cases() -> None:
    for name in NAMES:
        assert float(torch.linalg.eigvalsh(precision(case_of(name)))[0]) > 0


# ----------------------------------------------------------------------------------
# Diagonal scores.


@pytest.mark.parametrize("name", NAMES)
def test_largest_gradient(name: str) -> None:
    case = case_of(name)
    scores = gram(case).diagonal()
    for size in (1, 5, case.num_params - 1, case.num_params):
        found = select(case, LargestGradient(size))
        assert found.flat.tolist() == top(scores, size)
        assert found.explained_variance is None


@pytest.mark.parametrize("weighting", ["equal", "fisher"])
@pytest.mark.parametrize("name", NAMES)
def test_predictive_variance_by_its_diagonal(name: str, weighting: Any) -> None:
    case = case_of(name)
    p, ggn = precision(case).diagonal(), case.ggn().diagonal()
    scores = gram(case, weighting).diagonal() / p
    for size in (1, 5, case.num_params):
        found = select(
            case, PredictiveVariance(size, method="diagonal", weighting=weighting)
        )
        assert found.flat.tolist() == top(scores, size)
        expected = (ggn / p)[found.flat].sum() / (ggn / p).sum()
        assert found.explained_variance == pytest.approx(float(expected), rel=1e-8)


def test_the_fisher_weighted_diagonal_explains_most() -> None:
    case = case_of("heteroscedastic")
    diagonal = PredictiveVariance(3, method="diagonal", weighting="fisher")
    best = select(case, diagonal).explained_variance
    ggn = case.ggn().diagonal()
    share = ggn / precision(case).diagonal()
    for chosen in combinations(range(case.num_params), 3):
        assert best is not None
        assert best >= float(share[list(chosen)].sum() / share.sum()) - 1e-9


# ----------------------------------------------------------------------------------
# Inputs.


def other_inputs(case: Case) -> tuple[Tensor, Tensor]:
    """Eight inputs unlike the training data, and Σ JᵀJ at them."""
    x = draw(77, 8, 3) * 2 + 1
    jac = dense_jacobian(lambda u: mlp_outputs(x, case.values(u)), case.packed)
    rows = jac.flatten(0, -2)
    return x, rows.T @ rows


SELECTORS = [
    LargestGradient,
    GreedyVariance,
    lambda size, inputs: PredictiveVariance(size, inputs, method="diagonal"),
    PredictiveVariance,
]


@pytest.mark.parametrize("kind", SELECTORS)
def test_every_form_of_inputs_is_the_same(kind: Any) -> None:
    case = regression_mlp(DOUBLE)
    x, _ = other_inputs(case)
    expected = select(case, kind(6, x))
    forms = [
        (x,),
        (x, None),
        {"x": x},
        ((), {"x": x}),
        ((x,), {}),
        [x[:3], x[3:4], (x[4:],)],
        [x],
    ]
    for inputs in forms:
        found = select(case, kind(6, inputs))
        assert found.flat.tolist() == expected.flat.tolist()
    training = select(case, kind(6, None))
    again = select(case, kind(6, case.args))
    assert training.flat.tolist() == again.flat.tolist()


def test_other_inputs_are_where_gradients_are_taken() -> None:
    case = regression_mlp(DOUBLE)
    x, a = other_inputs(case)
    p = precision(case)
    assert select(case, LargestGradient(6, x)).flat.tolist() == top(a.diagonal(), 6)
    found = select(case, PredictiveVariance(6, x, method="diagonal"))
    assert found.flat.tolist() == top(a.diagonal() / p.diagonal(), 6)
    ggn = case.ggn().diagonal()
    share = ggn / p.diagonal()  # on the training inputs still
    assert found.explained_variance == pytest.approx(
        float(share[found.flat].sum() / share.sum()), rel=1e-8
    )


@pytest.mark.parametrize("kind", SELECTORS)
def test_minibatches_and_their_order_change_nothing(kind: Any) -> None:
    case = classification_mlp(DOUBLE)
    expected = select(case, kind(9, None))
    x, y = case.args
    order = torch.randperm(NUM_DATA)
    for size in (1, 3, NUM_DATA):
        batches = list(zip(x[order].split(size), y[order].split(size), strict=True))
        found = select(case, kind(9, None), Data(batches, whole=False))
        assert found.flat.tolist() == expected.flat.tolist()
    guide = case.guide(kind(9, None))
    posterior = guide.laplace_approximation_from([(x[:4], y[:4]), (x[4:], y[4:])])
    assert posterior.subnet.flat.tolist() == expected.flat.tolist()


@pytest.mark.parametrize("kind", SELECTORS)
def test_float32_chooses_the_same(kind: Any) -> None:
    expected = select(several_outputs(DOUBLE), kind(5, None))
    found = select(several_outputs(DOUBLE.float()), kind(5, None))
    assert found.flat.tolist() == expected.flat.tolist()


def test_one_shot_training_batches_serve_where_they_are_not_read_twice() -> None:
    case = regression_mlp(DOUBLE)
    x, y = case.args
    guide = case.guide(LargestGradient(4, x))
    guide(x, y)
    posterior = guide.laplace_approximation_from(iter([(x, y)]))
    assert (
        posterior.subnet.flat.tolist() == select(case, LargestGradient(4)).flat.tolist()
    )
    again = case.guide(LargestGradient(4))
    again(x, y)
    with pytest.raises(DataError, match="must be re-iterable because LargestGradient"):
        again.laplace_approximation_from(iter([(x, y)]))


# ----------------------------------------------------------------------------------
# Greedy choices.


def forward_greedy(
    p: Tensor, a: Tensor, size: int, block_size: int, start: list[int] | None = None
) -> list[int]:
    """Tries every weight at every block, by inverses."""
    chosen = list(start or [])
    while len(chosen) < size:
        before = kept(p, a, chosen) if chosen else 0.0
        rest = [j for j in range(len(p)) if j not in chosen]
        gain = {j: kept(p, a, [*chosen, j]) - before for j in rest}
        order = sorted(rest, key=lambda j: (-float(f"{gain[j]:.6e}"), j))
        chosen += order[: min(block_size, size - len(chosen))]
    return sorted(chosen)


@pytest.mark.parametrize("block_size", [1, 3])
@pytest.mark.parametrize("name", ["regression_mlp", "several_outputs", "two_sites"])
def test_greedy_is_forward_selection(name: str, block_size: int) -> None:
    case = case_of(name)
    p, a = precision(case), gram(case)
    most = float(case.num_params)
    for size in (1, 4, 7):
        options: dict[str, Any] = {"pool": most, "block_size": block_size}
        if name == "two_sites":  # one of them of classes
            options["weighting"] = "equal"
        chosen = PredictiveVariance(size, method="greedy", **options)
        found = select(case, chosen)
        assert found.flat.tolist() == forward_greedy(p, a, size, block_size)
    everything = PredictiveVariance(case.num_params, method="greedy")
    assert select(case, everything).size == case.num_params


def test_greedy_chooses_among_the_best_by_the_diagonal() -> None:
    case = classification_mlp(DOUBLE)
    p, a = precision(case), gram(case)
    size, pool = 4, 2.5
    among = torch.tensor(top(a.diagonal() / p.diagonal(), 10))
    chosen = forward_greedy(p[among][:, among], a[among][:, among], size, 1)
    selector = PredictiveVariance(size, method="greedy", weighting="equal", pool=pool)
    found = select(case, selector)
    assert found.flat.tolist() == sorted(among[chosen].tolist())


def kept_of_classes(covariance: Tensor) -> Tensor:
    """Σ over inputs of tr V (I + V)⁻¹, which is at most C each."""
    eye = torch.eye(covariance.shape[-1]).to(covariance)
    share = covariance @ torch.linalg.inv(eye + covariance)
    return share.diagonal(dim1=1, dim2=2).sum()


def bounded_greedy(case: Case, size: int, block_size: int) -> list[int]:
    """Greedy by the slope in V of what is kept, which is read anew in five rounds."""
    p, chosen = precision(case), list[int]()
    for end in sorted({round(size * eighths / 8) for eighths in (1, 2, 4, 6, 8)} - {0}):
        a = torch.zeros_like(p)
        for site, observed in enumerate(case.observed):
            jac = case.jacobian(site).unflatten(0, (NUM_DATA, -1))
            slope = torch.eye(jac.shape[1]).to(jac)
            if observed.information is categorical_information:
                own = jac[:, :, chosen]
                covariance = own @ torch.linalg.inv(p[chosen][:, chosen]) @ own.mT
                slope = torch.func.grad(kept_of_classes)(covariance)
            a += (jac.mT @ slope @ jac).sum(0)
        chosen = forward_greedy(p, a, end, block_size, chosen)
    return chosen


@pytest.mark.parametrize("block_size", [1, 2])
@pytest.mark.parametrize("name", ["classification_mlp", "two_sites"])
def test_classes_are_bounded_at_each_input(name: str, block_size: int) -> None:
    case, differs = case_of(name), False
    options: dict[str, Any] = {"pool": case.num_params, "block_size": block_size}
    for size in (1, 9):
        found = select(case, PredictiveVariance(size, **options))
        assert found.flat.tolist() == sorted(bounded_greedy(case, size, block_size))
        equal = select(case, PredictiveVariance(size, weighting="equal", **options))
        differs |= equal.flat.tolist() != found.flat.tolist()
    assert differs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [35, 4])
@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("is_whole", [False, True])
def test_a_share_of_the_inputs_is_read(
    dtype: torch.dtype, batch: int, coupled: bool, is_whole: bool
) -> None:
    """A random one, across batches; of data that cannot be taken apart the elements.

    The precision's part stands for all data, which are all read if coupled.
    """
    x = draw(3, 35, 2).to(dtype)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        first = pyro.sample("a", dist.Normal(x.new_zeros(2, 2), 1.0).to_event(2))
        last = pyro.sample("b", dist.Normal(x.new_zeros(3, 2), 1.0).to_event(2))
        hidden = torch.tanh((x - x.mean(0) if coupled else x) @ first.T)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=hidden @ last.T), obs=y)

    values = {"a": draw(4, 2, 2).to(dtype), "b": draw(5, 3, 2).to(dtype)}
    guide = AutoSubnetLaplace(model, init_loc_fn=init_to_value(values=values))
    guide(x, torch.arange(35) % 3)
    at_map = guide.at_map
    pool = at_map.latents.everything

    calls = [(x[i : i + batch],) for i in range(0, len(x), batch)]
    read = torch.rand(len(x), generator=random_stream()) < 0.3
    assert 5 < int(read.sum()) < 15

    def log_probs(packed: Tensor) -> Tensor:
        first, last = packed[:4].view(2, 2), packed[4:].view(3, 2)
        centred = [part - part.mean(0) if coupled else part for (part,) in calls]
        return (torch.tanh(torch.cat(centred) @ first.T) @ last.T).log_softmax(-1)

    packed = torch.cat([values["a"].flatten(), values["b"].flatten()])
    jac = dense_jacobian(log_probs, packed)[read]
    probs = log_probs(packed)[read].exp()
    own = jac[:, :, [8, 3]]  # chosen, each with a precision of one
    left = torch.linalg.inv(torch.eye(3).to(jac) + own @ own.mT) @ jac
    fisher = probs.diag_embed() - probs[:, :, None] * probs[:, None]
    expected = {
        "equal": (left.mT @ left).sum(0).double(),
        "fisher": (jac.mT @ fisher @ jac).sum(0).double(),
    }
    eye = torch.eye(10).double()
    for weighting in ("equal", "fisher"):
        held = held_rows(
            at_map,
            pool,
            Data(calls, whole=False),
            weighting,
            is_bounded=weighting == "equal",
            share=0.3,
        )
        found = HeldGram(held, eye, lambda total: None, is_whole=is_whole)
        assert found.is_bounded == (weighting == "equal")
        found.choose(torch.tensor([8, 3]))
        assert_close(
            found.diagonal(),
            expected[weighting].diagonal(),
            **tolerance(dtype, "autograd"),
        )
        block = torch.tensor([1, 8, 0])
        assert_close(
            found.rows(block),
            expected[weighting][block],
            **tolerance(dtype, "autograd"),
        )

    def ggn(calls: list[tuple[Tensor]], **options: float) -> Tensor:
        labelled = [(*call, torch.arange(len(call[0])) % 3) for call in calls]
        data = Data(labelled, whole=False)
        return dense_precision(at_map, pool, data, **options) - torch.eye(10)

    expected = ggn(calls) if coupled else ggn([(x[read],)]) / 0.3
    assert_close(ggn(calls, share=0.3), expected, **tolerance(dtype, "autograd"))


def test_how_much_of_many_data_is_read() -> None:
    """Two rows of J for each candidate, or all where that takes a second."""
    assert share_read(30_000, 2048) == 1.0
    assert share_read(100_000, 6000) == 0.12
    assert share_read(10_000, 6000) == 1.0
    assert share_read(2**17, 2048) == 0.25
    assert share_read(2**17, 4096) == 0.0625
    assert share_read(2**17, 1024) == 0.5  # 512 MiB


def test_of_many_training_data_a_part_is_read() -> None:
    """What the rest alone would move is not chosen; by those inputs it is."""
    num_data, classes, features = 1100, 8, 512
    share = share_read(classes * num_data, classes * features)
    read = torch.rand(num_data, generator=random_stream()) < share
    x = 0.01 * draw(3, num_data, features).float()
    x[:, 0] = torch.where(read, 0.0, 10.0)
    y = torch.arange(num_data) % classes

    def model(x: Tensor, y: Tensor | None = None) -> None:
        prior = dist.Normal(x.new_zeros(classes, features), 1.0).to_event(2)
        weight = pyro.sample("w", prior)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=x @ weight.T), obs=y)

    assert 0.9 < share < 1
    assert 50 < int((~read).sum()) < 100
    guide = AutoSubnetLaplace(model)
    guide(x, y)

    def chosen(inputs: Tensor | None) -> set[int]:
        selector = PredictiveVariance(4, inputs, pool=classes * features / 4)
        found = selector(guide, Data.single((x, y), {}))
        return set((found.flat % features).tolist())

    assert 0 not in chosen(None)
    assert chosen(x[~read]) == {0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_class_is_left_out_where_others_vary_more(dtype: torch.dtype) -> None:
    """Two of four logits have ten times the size, and four weights each."""
    x, size = 1 + draw(7, 6, 4).abs().to(dtype), torch.tensor([10.0, 10, 1, 1])

    def model(x: Tensor, y: Tensor | None = None) -> None:
        weight = pyro.sample("w", dist.Normal(x.new_zeros(4, 4), 1.0).to_event(2))
        with pyro.plate("data", len(x)):
            logits = size.to(x) * (x @ weight.T)
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    y = torch.arange(6) % 4
    data = Data.single((x, y), {})

    def classes(weighting: Any) -> set[int]:
        selector = PredictiveVariance(6, weighting=weighting)
        pyro.clear_param_store()
        guide = AutoSubnetLaplace(model, selector)
        guide(x, y)
        return set((selector(guide, data).flat // 4).tolist())

    assert classes("equal") == {0, 1}
    assert classes("bounded") == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("pool", "size", "expected"),
    [
        (None, 3, 2048),
        (None, 1000, 4000),
        (None, 4000, 9000),
        (None, 9000, 9000),
        (2.5, 4, 10),
        (1, 7, 7),
        (1.2, 1, 1),
        (1e9, 7, 9000),
    ],
)
def test_how_many_candidates(pool: Any, size: int, expected: int) -> None:
    assert pool_size(pool, size, 9000, 4.0) == expected


@pytest.mark.parametrize(
    "selector",
    [
        lambda **pool: PredictiveVariance(2, method="greedy", block_size=1, **pool),
        lambda **pool: GreedyVariance(2, **pool),
    ],
    ids=["PredictiveVariance", "GreedyVariance"],
)
def test_copies_do_not_fill_the_pool(selector: Any) -> None:
    """Nine inputs that are copies, and one of half their size that is not."""
    main, other = draw(0, 40), draw(1, 40)
    x = torch.stack([*([main] * 9), 0.5 * other], -1)

    def model(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(x.new_zeros(10), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x @ weight, 1.0).to_event(1), obs=y)

    pyro.clear_param_store()
    guide = AutoSubnetLaplace(model, selector())
    data = Data.single((x, main), {})
    guide(x, main)
    assert 9 in selector()(guide, data).flat.tolist()
    # Four candidates a weight are all copies.
    assert 9 not in selector(pool=4)(guide, data).flat.tolist()


def line(dtype: torch.dtype, num_weights: int) -> tuple[Any, Tensor, Tensor]:
    """A line with a latent noise, whose scale is multiplied as the call says."""
    x = (draw(2, 6, num_weights) * torch.arange(1, num_weights + 1)).to(dtype)

    def model(x: Tensor, y: Tensor, factor: Tensor) -> None:
        noise = pyro.sample("noise", dist.HalfNormal(x.new_ones(())))
        weight = pyro.sample(
            "w", dist.Normal(x.new_zeros(num_weights), 1.0).to_event(1)
        )
        pyro.sample("y", dist.Normal(x @ weight, factor * noise).to_event(1), obs=y)

    return model, x, draw(3, 6).to(dtype)


def chosen_sites(
    model: Any, selector: Selector, calls: list[tuple[Any, ...]]
) -> dict[str, int]:
    pyro.clear_param_store()
    guide = AutoSubnetLaplace(model, selector)
    guide(*calls[0])
    return selector(guide, Data(calls, whole=False)).counts


NOISE_KINDS = [
    PredictiveVariance,
    lambda size: PredictiveVariance(size, method="diagonal"),
    LargestGradient,
    GreedyVariance,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_noise_that_all_data_share_stays_a_point_estimate(
    kind: Any, dtype: torch.dtype
) -> None:
    """However small the weights' part in the outputs is beside a step of its log."""
    model, x, y = line(dtype, 4)
    x, one = 1e-3 * x, torch.ones((), dtype=dtype)
    for size in (1, 4):
        for rows in (6, 4, 1):
            calls = [(x[i : i + rows], y[i : i + rows], one) for i in range(0, 6, rows)]
            found = chosen_sites(model, kind(size), calls)
            assert found == {"noise": 0, "w": size}
    assert chosen_sites(model, kind(5), [(x, y, one)]) == {"noise": 1, "w": 4}


@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_noise_that_differs_from_call_to_call_is_an_output(kind: Any) -> None:
    model, x, y = line(torch.float64, 4)
    x, one = 1e-3 * x, torch.ones(()).double()
    calls = [(x[:3], y[:3], one), (x[3:], y[3:], 2 * one)]
    assert chosen_sites(model, kind(1), calls) == {"noise": 1, "w": 0}
    together = [(x, y, torch.tensor([1.0, 1, 1, 2, 2, 2]).double())]
    assert chosen_sites(model, kind(1), together) == {"noise": 1, "w": 0}


@pytest.mark.parametrize("kind", [PredictiveVariance, GreedyVariance])
def test_a_weight_that_moves_no_reference_output_may_add(kind: Any) -> None:
    """Data hold two weights together, of which the reference input has the first."""
    x = torch.tensor([[1.0, 0.0, 1.0], [2.0, 0.1, 2.0], [0.0, 1.0, 0.0]]).double()
    at = torch.tensor([[1.0, 0.0, 0.0]]).double()

    def model(x: Tensor, y: Tensor | None = None) -> None:
        weight = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x @ weight, 1.0).to_event(1), obs=y)

    p, a = x.T @ x + torch.eye(3).double(), at.T @ at
    assert kept(p, a, [0, 2]) > kept(p, a, [0, 1]) + 0.1
    pyro.clear_param_store()
    guide = AutoSubnetLaplace(model, kind(2, at))
    guide(x, x[:, 0])
    found = kind(2, at)(guide, Data.single((x, x[:, 0]), {}))
    assert found.flat.tolist() == [0, 2]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_scales_that_differ_count_alike_in_batches_of_any_size(size: int) -> None:
    """A batch of one observation shows one scale, whether or not all data share it."""
    case = case_of("heteroscedastic")
    x, *rest = case.args
    pyro.clear_param_store()
    guide = case.guide()
    guide(*case.args, **case.kwargs)
    cuts = range(0, len(x), size)
    calls = [(x[i : i + size], *(one[i : i + size] for one in rest)) for i in cuts]
    data = Data(calls, whole=False)
    found = squared_gradients(guide.at_map, data, "equal").total
    assert_close(found, gram(case).diagonal(), **AUTOGRAD)


@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_noise_is_shared_or_not_site_by_site(kind: Any) -> None:
    x, y = 1e-3 * draw(2, 6, 2), draw(3, 6)

    def model(x: Tensor, y: Tensor, factor: Tensor) -> None:
        one, two = (
            pyro.sample(f"noise{i}", dist.HalfNormal(x.new_ones(()))) for i in "12"
        )
        weight = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x @ weight, one).to_event(1), obs=y)
        pyro.sample("z", dist.Normal(x @ weight, factor * two).to_event(1), obs=y)

    one = torch.ones(()).double()
    calls = [(x[:3], y[:3], one), (x[3:], y[3:], 2 * one)]
    assert chosen_sites(model, kind(1), calls) == {"noise1": 0, "noise2": 1, "w": 0}
    assert chosen_sites(model, kind(3), calls) == {"noise1": 0, "noise2": 1, "w": 2}


@pytest.mark.parametrize(("num_weights", "expected"), [(50, [0, 2]), (8300, [0, 1])])
def test_a_pool_too_large_to_count_correlations(
    num_weights: int, expected: list[int]
) -> None:
    """Of two copies of an input the diagonal takes both, and a greedy choice one."""
    x = 1e-3 * draw(4, 3, num_weights)
    x[:, 0] = x[:, 1] = torch.tensor([3.0, 0.0, 0.0])
    x[:, 2] = torch.tensor([0.0, 1.0, 0.0])

    def model(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample(
            "w", dist.Normal(x.new_zeros(num_weights), 1.0).to_event(1)
        )
        pyro.sample("y", dist.Normal(x @ weight, 1.0).to_event(1), obs=y)

    selector = PredictiveVariance(2, pool=4100)
    pyro.clear_param_store()
    guide = AutoSubnetLaplace(model, selector)
    guide(x, x[:, 0])
    found = selector(guide, Data.single((x, x[:, 0]), {}))
    assert found.flat.tolist() == expected


def exchanged(p: Tensor, a: Tensor, start: list[int], most: int) -> list[int]:
    at = torch.tensor(start)
    return exchange_(p.clone(), a.clone(), at, max_swaps=most, noise=1e-9).tolist()


def gram_of(rows: Tensor) -> HeldGram:
    held = [HeldRows(rows[:, None], is_bounded=False)]
    return HeldGram(held, torch.eye(rows.shape[1]).double(), lambda total: None)


def test_greedy_counts_correlations() -> None:
    """Two inputs that are copies: the diagonal takes both, greedy one of them."""
    p = torch.tensor([[2.0, 0.99, 0.0], [0.99, 2.0, 0.0], [0.0, 0.0, 2.0]]).double()
    a = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.5]]).double()
    assert top(a.diagonal() / p.diagonal(), 2) == [0, 1]
    rows = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.5**0.5]]).double()
    assert_close(rows.T @ rows, a)
    gram = gram_of(rows)
    found = add_in_blocks(p, gram, 2, block_size=1, noise=1e-9)
    assert found.tolist() == [0, 2]
    assert exchanged(p, a, [0, 1], 5) == [1, 2]
    assert exchanged(p, a, [0, 1], 0) == [0, 1]


def random_pair(seed: int, count: int, rank: int) -> tuple[Tensor, Tensor]:
    rows, wide = draw(seed, rank, count), draw(seed + 1, count + 2, count)
    return wide.T @ wide + 0.1 * torch.eye(count).double(), rows.T @ rows


def swaps(p: Tensor, a: Tensor, start: list[int], most: int) -> list[int]:
    """The exchange, every price by inverses."""
    inside = list(start)
    for _ in range(most):
        cost = {i: kept(p, a, [j for j in inside if j != i] or [i]) for i in inside}
        if len(inside) == 1:
            cost = dict.fromkeys(inside, 0.0)
        leaves = max(inside, key=lambda i: (cost[i], -i))
        rest = [j for j in inside if j != leaves]
        outside = [j for j in range(len(p)) if j not in inside]
        if not outside:
            break
        enters = max(outside, key=lambda j: kept(p, a, [*rest, j]))
        if kept(p, a, [*rest, enters]) <= kept(p, a, inside) * (1 + 1e-9):
            break
        inside = [*rest, enters]
    return sorted(inside)


@pytest.mark.parametrize("seed", range(0, 20, 2))
@pytest.mark.parametrize("size", [1, 4, 11])
def test_exchange(seed: int, size: int) -> None:
    p, a = random_pair(seed, 12, 1 + seed % 9)
    start = top(a.diagonal(), size)
    for most in (1, 100):
        found = exchanged(p, a, start, most)
        assert found == swaps(p, a, start, most)
        assert kept(p, a, found) >= kept(p, a, start) - 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_greedy_variance_refines_the_largest_gradients(name: str) -> None:
    case = case_of(name)
    p, a = precision(case), gram(case)
    for size in (1, 6, case.num_params):
        found = select(case, GreedyVariance(size, pool=2)).flat
        pool = torch.tensor(top(a.diagonal(), min(2 * size, case.num_params)))
        start = torch.searchsorted(pool, torch.tensor(top(a.diagonal(), size)))
        expected = swaps(p[pool][:, pool], a[pool][:, pool], start.tolist(), 200)
        assert kept(p, a, found) == pytest.approx(kept(p, a, pool[expected]), rel=1e-8)
        gradients = select(case, LargestGradient(size)).flat
        assert kept(p, a, found) >= kept(p, a, gradients) * (1 - 1e-9)
        unrefined = select(case, GreedyVariance(size, pool=2, max_swaps=0)).flat
        assert unrefined.tolist() == gradients.tolist()


# ----------------------------------------------------------------------------------
# What is proved: no part of the weights keeps more than a larger one.


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [name for name in NAMES if name != "heteroscedastic"])
def test_every_subnet_underestimates_and_less_as_it_grows(name: str, seed: int) -> None:
    """J_S P_SS⁻¹ J_Sᵀ rises with S in the order of symmetric matrices, at any input,
    up to J P⁻¹ Jᵀ: for nested random subnets, of the posteriors as they are fitted."""
    case = case_of(name)
    jac = torch.cat([case.jacobian(site) for site in range(len(case.observed))])
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(case.num_params, generator=generator)
    sizes = sorted({1, 2, case.num_params // 3, case.num_params // 2, case.num_params})
    before = torch.zeros(len(jac), len(jac)).double()
    for size in sizes:
        chosen = order[:size].sort().values
        posterior = case.guide(chosen.tolist()).laplace_approximation(
            *case.args, **case.kwargs
        )
        rows = posterior.gaussian.whiten(jac[:, chosen])
        covariance = rows @ rows.T
        least = float(torch.linalg.eigvalsh(covariance - before)[0])
        assert least >= -1e-9 * float(covariance.diagonal().amax())
        before = covariance
    full = jac @ torch.linalg.solve(precision(case), jac.T)
    assert_close(before, full, **AUTOGRAD)


# ----------------------------------------------------------------------------------
# Ties, permutations, options.


@pytest.mark.parametrize("kind", SELECTORS)
def test_weights_without_gradient_come_last_and_by_position(kind: Any) -> None:
    """All inputs are zero but the first: two columns of the first layer are idle."""
    case = regression_mlp(DOUBLE)
    x = torch.zeros(5, 3).double()
    x[:, 0] = draw(5, 5)
    case = replace(case, args=(x, draw(6, 5)))
    moving = case.num_params - 8
    idle = [3 * row + column for row in range(4) for column in (1, 2)]
    found = select(case, kind(moving + 3, None)).flat.tolist()
    assert sorted(set(found) & set(idle)) == idle[:3]


@pytest.mark.parametrize("kind", SELECTORS)
def test_a_permutation_of_the_sites_permutes(kind: Any) -> None:
    case = classification_mlp(DOUBLE)
    expected = select(case, kind(6, None))
    values = case.values(case.packed)
    bias = draw(8, 3)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        v = {"fc2.bias": bias}
        for site in ("fc2.weight", "fc1.bias", "fc1.weight"):
            zeros = torch.zeros_like(values[site])
            v[site] = pyro.sample(site, dist.Normal(zeros, 1.0).to_event(zeros.ndim))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=mlp_outputs(x, v)), obs=y)

    found = select(replace(case, model=model), kind(6, None))
    assert found.layout.names == expected.layout.names[::-1]
    assert sorted(found.names) == sorted(expected.names)


def test_the_model_is_left_as_it_was() -> None:
    case = classification_mlp(DOUBLE)
    state = torch.get_rng_state()
    guide = case.guide()
    guide(*case.args)
    before = guide.loc.detach().clone()
    torch.set_rng_state(state)
    for kind in SELECTORS:
        kind(3, case.args)(guide, Data.single(case.args, {}))
    assert_close(torch.get_rng_state(), state, rtol=0, atol=0)
    assert_close(guide.loc.detach(), before, rtol=0, atol=0)


@pytest.fixture
def as_users_run_it() -> Iterator[None]:
    """Without the run-time type checks of the tests, which come before our own."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LargestGradient(0), SelectionError, "`size` must be a positive int"),
        (lambda: GreedyVariance(1.5), SelectionError, "`size` must be a positive int"),
        (lambda: PredictiveVariance(True), SelectionError, "`size` must be"),
        (
            lambda: PredictiveVariance(3, method="best"),  # type: ignore[arg-type]
            OptionError,
            "`method` must be 'auto', 'greedy' or 'diagonal'; got 'best'",
        ),
        (
            lambda: PredictiveVariance(3, weighting="x"),  # type: ignore[arg-type]
            OptionError,
            "`weighting` must be 'bounded', 'equal' or 'fisher'; got 'x'",
        ),
        (
            lambda: PredictiveVariance(3, pool=0.5),
            OptionError,
            r"`pool` must be at least 1, .*; got 0\.5",
        ),
        (
            lambda: PredictiveVariance(3, block_size=0),
            OptionError,
            "`block_size` must be at least 1; got 0",
        ),
        (
            lambda: GreedyVariance(3, pool=float("nan")),
            OptionError,
            "`pool` must be at least 1, .*; got nan",
        ),
        (
            lambda: GreedyVariance(3, max_swaps=-1),
            OptionError,
            "`max_swaps` must be a count; got -1",
        ),
        (
            lambda: LargestGradient(3, 7),
            OptionError,
            "`inputs` must be a tensor, .*; got int",
        ),
        (
            lambda: LargestGradient(3, iter([torch.zeros(2)])),
            DataError,
            "must be re-iterable because a selector at `inputs`.*one-shot",
        ),
    ],
)
def test_bad_options(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("kind", SELECTORS)
def test_sizes(kind: Any) -> None:
    case = regression_mlp(DOUBLE)
    assert select(case, kind(0.25, None)).size == round(0.25 * case.num_params)
    assert issubclass(type(kind(1, None)), Selector)
    message = rf"at most the number of latent parameters, {case.num_params}; got 99"
    with pytest.raises(SelectionError, match=message):
        select(case, kind(99, None))


@pytest.mark.parametrize("kind", [LargestGradient, PredictiveVariance])
def test_inputs_that_nothing_moves(kind: Any) -> None:
    """Without the last layer's weights random, at inputs of zero: tanh(0) v."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3).to(x), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    x, y = draw(1, 4, 3), draw(2, 4)
    guide = AutoSubnetLaplace(model, kind(1, torch.zeros(2, 3).double()))
    with pytest.raises(SelectionError, match="got gradients that are all zero"):
        guide.laplace_approximation(x, y)


def test_a_precision_that_is_not_positive_definite() -> None:
    p = torch.tensor([[1.0, 2.0], [2.0, 1.0]]).double()
    with pytest.raises(PrecisionError, match=r"got smallest eigenvalue -\d.*of 2\. "):
        exchanged(torch.block_diag(p, p), torch.eye(4).double(), [0, 1], 1)
    with pytest.raises(PrecisionError, match=r"got smallest eigenvalue -1.*of 2\. "):
        add_in_blocks(
            torch.block_diag(p, p),
            gram_of(torch.eye(4).double()),
            4,
            block_size=2,
            noise=1e-9,
        )


def test_a_pool_too_large_for_the_memory() -> None:
    message = r"A pool of M .* got M=9999999, which needs \d+\.\d GiB .*diagonal scores"
    with pytest.raises(MemoryLimitError, match=message):
        check_pool_fits(9_999_999, 3.0, torch.device("cpu"))


def test_gradients_disagree_with_marginal_variances() -> None:
    """As the docstring says: what one ranks first the other leaves out."""
    case = regression_mlp(DOUBLE)
    gradients = set(select(case, LargestGradient(5)).flat.tolist())
    variances = set(select(case, LargestVariance(5)).flat.tolist())
    assert not gradients & variances
