"""The precision, its Jacobian routes and its diagonal against dense autograd."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from pyro_subnet.curvature.jacobian.output_map import OutputMap, identity_factors
from pyro_subnet.curvature.jacobian.route import (
    Route,
    choose_route,
    jacobian_blocks,
    squared_columns,
)
from pyro_subnet.fit.sums import diagonal_curvature, subnet_curvature
from pyro_subnet.nn import bayesianize
from pyro_subnet.options import FitOptions
from pyro_subnet.subnet import Subnet
from pyro_subnet.tracing.data import Data
from pyro_subnet.tracing.subnet_call import SubnetCall
from tests import reference
from tests.cases import (
    CASES,
    DOUBLE,
    NUM_DATA,
    Case,
    Latent,
    Observed,
    Values,
    draw,
    inputs,
    normal_prior,
    read_call,
    regression_mlp,
    standard_normal,
)
from tests.tolerances import tolerance

# Bytes: one observation and one row at a time, several at a time, and all at once.
ONE, SEVERAL, ALL = 1, 20_000, 2**30
# Sites without a data axis that they share, or whose first axis is another one.
NO_DATA_AXIS = {"two_lengths", "scalar_sites", "plates"}
SEPARABLE = [name for name in CASES if name not in NO_DATA_AXIS]
ROUTES: list[tuple[str, Route, int]] = [
    *((name, "per-datum", SEVERAL) for name in SEPARABLE),
    *((name, "columns", SEVERAL) for name in CASES),
    *((name, "forward", SEVERAL) for name in CASES),
    *((name, "reverse", SEVERAL) for name in CASES),
    *(("several_outputs", route, ONE) for route in ("per-datum", "forward", "reverse")),
    *(("two_sites", route, ONE) for route in ("per-datum", "forward", "reverse")),
]
DOUBLE_TOLERANCE = tolerance(torch.float64, "autograd")


def precision_of(case: Case, subnet: list[int] | None) -> Tensor:
    """Posterior precision as a user gets it."""
    posterior = case.guide(subnet).laplace_approximation(*case.args, **case.kwargs)
    return posterior.get_posterior().precision_matrix


def dense_precision(case: Case, subnet: list[int]) -> Tensor:
    """The oracle's precision, restricted at the very end."""
    order = sorted(subnet)
    return (case.ggn() + case.prior())[order][:, order]


def output_map(case: Case, subnet: list[int]) -> OutputMap:
    """What the routes differentiate."""
    return SubnetCall.of(*read_call(case, subnet)).outputs()


def assembled(outputs: OutputMap, route: Route | None, budget: int) -> list[Tensor]:
    """J of each site, (rows, S); fails if an element is missing or comes twice."""
    sites = [
        torch.full((count, width, outputs.size), torch.nan, dtype=outputs.loc.dtype)
        for count, width in outputs.shapes
    ]
    for block in jacobian_blocks(outputs, identity_factors(outputs), budget, route):
        into = sites[block.site][block.start : block.start + len(block.rows)]
        assert into.isnan().all()
        into.copy_(block.rows)
    return [site.flatten(0, 1) for site in sites]


@pytest.mark.parametrize("name", CASES)
def test_the_packed_vector_is_that_of_the_guide(name: str) -> None:
    case = CASES[name](DOUBLE)
    guide = case.guide()
    guide(*case.args, **case.kwargs)
    assert guide.latents.layout.names == tuple(site.name for site in case.latents)
    assert_close(guide.loc.data, case.packed, **tolerance(torch.float64, "closed_form"))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_precision_of_a_scattered_subnet(name: str, seed: int) -> None:
    case = CASES[name](DOUBLE)
    subnet = case.scattered(seed)
    expected = dense_precision(case, subnet)
    assert_close(precision_of(case, subnet), expected, **DOUBLE_TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_precision_of_one_weight(name: str) -> None:
    case = CASES[name](DOUBLE)
    last = [case.num_params - 1]
    assert_close(
        precision_of(case, last), dense_precision(case, last), **DOUBLE_TOLERANCE
    )


@pytest.mark.parametrize("name", CASES)
def test_precision_of_every_weight(name: str) -> None:
    case = CASES[name](DOUBLE)
    everything = list(range(case.num_params))
    expected = dense_precision(case, everything)
    assert_close(precision_of(case, None), expected, **DOUBLE_TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_dtype_and_device_are_kept(
    name: str, dtype: torch.dtype, device: torch.device
) -> None:
    case = CASES[name](torch.empty((), dtype=dtype, device=device))
    subnet = case.scattered()
    precision = precision_of(case, subnet)
    assert precision.dtype == dtype
    assert precision.device.type == device.type
    expected = dense_precision(case, subnet)
    assert_close(precision.double().cpu(), expected, **tolerance(dtype, "autograd"))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("budget", [ONE, SEVERAL])
def test_ggn_and_prior_at_any_budget(name: str, budget: int) -> None:
    case = CASES[name](DOUBLE)
    call, chosen = read_call(case, case.scattered())
    data = Data.single(case.args, case.kwargs)
    options = FitOptions(form="primal")
    found = subnet_curvature(call.at_map, chosen, data, options, budget=budget)
    ggn = found.likelihood.ggn
    order = chosen.flat.tolist()
    expected = case.ggn()[order][:, order].tril()
    assert_close(ggn.tril(), expected, **DOUBLE_TOLERANCE)
    prior = torch.zeros_like(ggn)
    found.prior.add_to_lower_(prior, 1.0)
    assert_close(prior, case.prior()[order][:, order].tril(), **DOUBLE_TOLERANCE)


@pytest.mark.parametrize(("name", "route", "budget"), ROUTES)
def test_every_route_gives_the_dense_jacobian(
    name: str, route: Route, budget: int
) -> None:
    case = CASES[name](DOUBLE)
    subnet = case.scattered()
    outputs = output_map(case, subnet)
    for site, jac in enumerate(assembled(outputs, route, budget)):
        expected = case.jacobian(site)[:, sorted(subnet)]
        assert_close(jac, expected, **DOUBLE_TOLERANCE)


def test_per_datum_where_a_datum_has_few_rows() -> None:
    case = regression_mlp(DOUBLE)
    outputs = output_map(case, list(range(case.num_params)))
    assert chosen_route(outputs) == "per-datum"


@pytest.mark.parametrize("name", SEPARABLE)
def test_independent_data_are_taken_one_by_one(name: str) -> None:
    case = CASES[name](DOUBLE)
    outputs = output_map(case, list(range(case.num_params)))
    # Too little memory for the whole Jacobian rules forward mode out.
    assert choose_route(outputs, identity_factors(outputs), ONE) == "per-datum"


@pytest.mark.parametrize("name", sorted(NO_DATA_AXIS))
def test_data_without_a_common_axis_are_not(name: str) -> None:
    case = CASES[name](DOUBLE)
    outputs = output_map(case, list(range(case.num_params)))
    assert choose_route(outputs, identity_factors(outputs), ONE) == "reverse"


def test_forward_where_the_subnet_is_small() -> None:
    case = CASES["tokens"](DOUBLE)
    assert chosen_route(output_map(case, list(range(5)))) == "forward"


def test_column_by_column_where_it_is_very_small() -> None:
    """No compiler is imported for a noise scale."""
    assert chosen_route(output_map(regression_mlp(DOUBLE), [0])) == "columns"


def chosen_route(outputs: OutputMap) -> Route:
    """The route at a budget that never binds."""
    return choose_route(outputs, identity_factors(outputs), ALL)


@pytest.mark.parametrize("route", ["columns", "per-datum", "forward", "reverse"])
def test_blocks_carry_no_graph(route: Route) -> None:
    """The network has a parameter of its own that needs gradients."""
    outputs = output_map(CASES["classification_mlp"](DOUBLE), [0, 1])
    for block in jacobian_blocks(outputs, identity_factors(outputs), ONE, route):
        assert not block.rows.requires_grad


def test_a_plain_number_as_scale_keeps_its_digits() -> None:
    case = regression_mlp(DOUBLE)
    scaled = dataclasses.replace(case, model=poutine.scale(case.model, scale=0.3))
    expected = 0.3 * (case.ggn() + case.prior())
    assert_close(precision_of(scaled, None), expected, **DOUBLE_TOLERANCE)


# Models whose data do not separate.


def centred(h: Tensor) -> Tensor:
    return h - h.mean(0)


def batch_normalised(h: Tensor) -> Tensor:
    return torch.nn.functional.batch_norm(h, None, None, training=True)


def attended(h: Tensor) -> Tensor:
    return torch.softmax(h @ h.T, dim=-1) @ h


def accumulated(h: Tensor) -> Tensor:
    return h.cumsum(0)


def reversed_in_order(h: Tensor) -> Tensor:
    return h.flip(0)


def coupled_in_the_derivative_alone(h: Tensor) -> Tensor:
    """Values are those of single data, derivatives are not."""
    return h - h.mean(0) + h.mean(0).detach()


MIXERS = [
    centred,
    batch_normalised,
    attended,
    accumulated,
    reversed_in_order,
    coupled_in_the_derivative_alone,
]


def mixed_case(mix: Callable[[Tensor], Tensor]) -> Case:
    """A regression whose hidden layer takes a step that may mix the data."""
    x = inputs(3)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", normal_prior(DOUBLE, 3, 2))
        v = pyro.sample("v", normal_prior(DOUBLE, 2))
        mean = torch.tanh(mix(x @ w)) @ v
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.3), obs=y)

    def outputs(v: Values) -> Tensor:
        return (torch.tanh(mix(x @ v["w"])) @ v["v"]).unsqueeze(-1)

    return Case(
        like=DOUBLE,
        model=model,
        args=(x, draw(9, NUM_DATA)),
        latents=(Latent("w", draw(2, 3, 2)), Latent("v", draw(3, 2))),
        log_prior=standard_normal,
        observed=(Observed(outputs, reference.location_information(0.3)),),
    )


@pytest.mark.parametrize("budget", [ONE, SEVERAL, ALL])
@pytest.mark.parametrize("mix", MIXERS)
def test_coupled_data_are_never_taken_one_by_one(
    mix: Callable[[Tensor], Tensor], budget: int
) -> None:
    case = mixed_case(mix)
    subnet = list(range(case.num_params))
    outputs = output_map(case, subnet)
    assert choose_route(outputs, identity_factors(outputs), budget) != "per-datum"
    (jac,) = assembled(outputs, None, budget)
    assert_close(jac, case.jacobian(0), **DOUBLE_TOLERANCE)


@pytest.mark.parametrize("mix", MIXERS)
def test_precision_of_coupled_data(mix: Callable[[Tensor], Tensor]) -> None:
    case = mixed_case(mix)
    subnet = case.scattered()
    expected = dense_precision(case, subnet)
    assert_close(precision_of(case, subnet), expected, **DOUBLE_TOLERANCE)


# Arguments that look like data.

PROJECTION = draw(4, 2, NUM_DATA)
Use = Callable[[Tensor, Tensor, Tensor], Tensor]
COINCIDENCES: dict[str, tuple[tuple[int, ...], Use]] = {
    "a Gram matrix": ((NUM_DATA, 2), lambda x, w, a: (x @ a.T @ a) @ w),
    "a projection": ((NUM_DATA, 2), lambda x, w, a: x @ PROJECTION @ a @ w),
    "a summed vector": ((NUM_DATA,), lambda x, w, a: x @ w * a.sum()),
    "a matrix of one row's worth": ((NUM_DATA, 1), lambda x, w, a: x @ w + a[0]),
    "a vector that is not used": ((NUM_DATA, 3), lambda x, w, a: x @ w),
    "a constant vector": ((NUM_DATA,), lambda x, w, a: x @ w * a[0] ** 0),
}


@pytest.mark.parametrize("kind", COINCIDENCES)
def test_an_argument_as_long_as_the_data(kind: str) -> None:
    shape, use = COINCIDENCES[kind]
    x, other = inputs(2), draw(5, *shape)

    def model(x: Tensor, other: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", normal_prior(DOUBLE, 2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Poisson(torch.tanh(use(x, w, other)).exp()), obs=y)

    case = Case(
        like=DOUBLE,
        model=model,
        args=(x, other, torch.arange(NUM_DATA).double()),
        latents=(Latent("w", draw(2, 2)),),
        log_prior=standard_normal,
        observed=(
            Observed(
                lambda v: torch.tanh(use(x, v["w"], other)).unsqueeze(-1),
                reference.poisson_information,
            ),
        ),
    )
    expected = dense_precision(case, [0, 1])
    assert_close(precision_of(case, None), expected, **DOUBLE_TOLERANCE)
    for budget in (ONE, SEVERAL, ALL):
        (jac,) = assembled(output_map(case, [0, 1]), None, budget)
        assert_close(jac, case.jacobian(0), **DOUBLE_TOLERANCE)


def test_as_many_classes_as_data() -> None:
    x, shift = inputs(2), draw(5, NUM_DATA)

    def model(x: Tensor, shift: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", normal_prior(DOUBLE, 2, NUM_DATA))
        logits = x @ w + shift
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    case = Case(
        like=DOUBLE,
        model=model,
        args=(x, shift, torch.arange(NUM_DATA)),
        latents=(Latent("w", draw(2, 2, NUM_DATA)),),
        log_prior=standard_normal,
        observed=(
            Observed(
                lambda v: (x @ v["w"] + shift).log_softmax(-1),
                reference.categorical_information,
            ),
        ),
    )
    everything = list(range(case.num_params))
    expected = dense_precision(case, everything)
    assert_close(precision_of(case, None), expected, **DOUBLE_TOLERANCE)
    (jac,) = assembled(output_map(case, everything), None, ONE)
    assert_close(jac, case.jacobian(0), **DOUBLE_TOLERANCE)


def test_one_observation() -> None:
    case = first_data(regression_mlp(DOUBLE), 1)
    full = regression_mlp(DOUBLE)
    jac = full.jacobian(0)[:1]
    expected = jac.T @ jac / 0.3**2 + full.prior()
    assert_close(precision_of(case, None), expected, **DOUBLE_TOLERANCE)


def test_data_that_the_model_holds_itself() -> None:
    case = regression_mlp(DOUBLE)

    def model() -> None:
        case.model(*case.args)

    closed = dataclasses.replace(case, model=model, args=())
    subnet = case.scattered()
    expected = dense_precision(case, subnet)
    assert_close(precision_of(closed, subnet), expected, **DOUBLE_TOLERANCE)


# Layers that are hard to differentiate forwards, twice, or under `torch.func`.


class LastStep(nn.Module):
    """A recurrent layer read at its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(2, 3, batch_first=True)
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


class Encoder(nn.Module):
    """A transformer layer, whose attention has a fast path in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(2, 1, 3, batch_first=True)
        self.head = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


class OldRectifier(torch.autograd.Function):
    """Written as before `torch.func`, with a context in `forward`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (ctx.saved_tensors[0] > 0)


class Rectified(nn.Module):
    """A layer with an autograd function of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(2, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(OldRectifier.apply(self.layer(x)).mean(1))


@pytest.mark.parametrize("kind", [LastStep, Encoder, Rectified])
def test_layers_that_are_hard_to_differentiate(kind: type[nn.Module]) -> None:
    net, x = kind().double().eval(), draw(1, NUM_DATA, 4, 2)
    bnn = bayesianize(net)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        mean = bnn(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.3), obs=y)

    case = Case(
        like=DOUBLE,
        model=model,
        args=(x, draw(9, NUM_DATA)),
        latents=tuple(
            Latent(name, value.detach() + 0.1 * draw(i, *value.shape))
            for i, (name, value) in enumerate(net.named_parameters())
        ),
        log_prior=standard_normal,
        observed=(
            Observed(
                lambda v: torch.func.functional_call(net, dict(v), (x,)),
                reference.location_information(0.3),
            ),
        ),
    )
    subnet = case.scattered()
    expected = dense_precision(case, subnet)
    assert_close(precision_of(case, subnet), expected, **DOUBLE_TOLERANCE)


def checkpointed(h: Tensor) -> Tensor:
    """Runs again in the backward pass."""
    return checkpoint(torch.tanh, h, use_reentrant=False)


def rows_in_a_loop(h: Tensor) -> Tensor:
    return torch.stack([torch.tanh(row) for row in h])


def written_in_place(h: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out[:, 0] = torch.tanh(h[:, 0])
    out[:, 1] = h[:, 1]
    out += 1
    return out


def chosen_by_a_value(h: Tensor) -> Tensor:
    keep = h.detach()[:, 0] > 0
    out = torch.zeros_like(h)
    out[keep] = torch.tanh(h[keep])
    return out


def scaled_by_a_number(h: Tensor) -> Tensor:
    return torch.tanh(h) * float(h.detach().numpy().shape[1])


@pytest.mark.parametrize(
    "step",
    [
        checkpointed,
        rows_in_a_loop,
        written_in_place,
        chosen_by_a_value,
        scaled_by_a_number,
    ],
)
def test_steps_that_are_hard_to_differentiate(step: Callable[[Tensor], Tensor]) -> None:
    case = mixed_case(step)
    for subnet in (list(range(case.num_params)), [2], [0, 3, 7]):
        expected = dense_precision(case, subnet)
        assert_close(precision_of(case, subnet), expected, **DOUBLE_TOLERANCE)


# Properties.


def first_data(case: Case, count: int) -> Case:
    """A case that sees its first data alone."""
    return dataclasses.replace(case, args=tuple(arg[:count] for arg in case.args))


@pytest.mark.parametrize("name", ["regression_mlp", "cnn", "weighted_poisson"])
def test_a_smaller_subnet_is_a_block_of_a_larger_one(name: str) -> None:
    case = CASES[name](DOUBLE)
    whole = precision_of(case, None)
    for seed in range(3):
        subnet = case.scattered(seed)
        order = sorted(subnet)
        expected = whole[order][:, order]
        assert_close(precision_of(case, subnet), expected, **DOUBLE_TOLERANCE)


def test_positions_may_come_in_any_order() -> None:
    case = CASES["tokens"](DOUBLE)
    subnet = case.scattered()
    assert subnet != sorted(subnet)
    first, second = precision_of(case, subnet), precision_of(case, sorted(subnet))
    assert_close(first, second, rtol=0.0, atol=0.0)


def test_permuted_hidden_units_permute_the_precision() -> None:
    case = regression_mlp(DOUBLE)
    units = torch.tensor([2, 0, 3, 1])
    dims = {"fc1.weight": 0, "fc1.bias": 0, "fc2.weight": 1}

    def permuted(name: str, value: Tensor) -> Tensor:
        return value.index_select(dims[name], units) if name in dims else value

    other = dataclasses.replace(
        case,
        latents=tuple(
            Latent(site.name, permuted(site.name, site.unconstrained))
            for site in case.latents
        ),
    )
    positions = case.values(torch.arange(case.num_params))
    order = torch.cat([permuted(*site).flatten() for site in positions.items()])
    expected = precision_of(case, None)[order][:, order]
    assert_close(precision_of(other, None), expected, **DOUBLE_TOLERANCE)


@pytest.mark.parametrize("name", ["cnn", "weighted_poisson", "heteroscedastic"])
def test_the_order_of_the_data_does_not_matter(name: str) -> None:
    case = CASES[name](DOUBLE)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    shuffled = dataclasses.replace(case, args=tuple(arg[order] for arg in case.args))
    assert_close(
        precision_of(shuffled, None),
        precision_of(case, None),
        **tolerance(torch.float64, "reordered"),
    )


@pytest.mark.parametrize("name", ["classification_mlp", "weighted_poisson", "cnn"])
def test_more_data_never_lower_the_precision(name: str) -> None:
    case = CASES[name](DOUBLE)
    precisions = [precision_of(first_data(case, count), None) for count in (1, 3, 7)]
    for few, many in itertools.pairwise(precisions):
        eigenvalues = torch.linalg.eigvalsh(many - few)
        assert eigenvalues.min() > -1e-10
        assert eigenvalues.max() > 1e-3


@pytest.mark.parametrize("budget", [SEVERAL, ALL])
@pytest.mark.parametrize("name", CASES)
def test_the_diagonal_is_that_of_the_matrix(name: str, budget: int) -> None:
    case = CASES[name](DOUBLE)
    call, _ = read_call(case, [0])
    data = Data.single(case.args, case.kwargs)
    found = diagonal_curvature(call.at_map, data, budget=budget)
    assert_close(found.ggn, case.ggn().diagonal(), **DOUBLE_TOLERANCE)
    assert_close(found.prior, case.prior().diagonal(), **DOUBLE_TOLERANCE)


def test_the_diagonal_of_some_elements() -> None:
    case = CASES["two_sites"](DOUBLE)
    call, chosen = read_call(case, case.scattered())
    over_subnet = SubnetCall.of(call, chosen)
    outputs = dataclasses.replace(over_subnet.outputs(), activation_bytes=10_000)
    diagonal = squared_columns(outputs, over_subnet.factors(), SEVERAL)
    expected = case.ggn().diagonal()[chosen.flat]
    assert_close(diagonal, expected, **DOUBLE_TOLERANCE)


def test_the_diagonal_is_summed_in_float64() -> None:
    case = regression_mlp(DOUBLE.float())
    call, _ = read_call(case, [0])
    found = diagonal_curvature(call.at_map, Data.single(case.args, {}))
    assert found.ggn.dtype == torch.float64


def test_a_selector_of_the_users_own() -> None:
    case = regression_mlp(DOUBLE)
    guide = case.guide(
        lambda guide, data: Subnet.from_positions(
            guide.latents.layout, torch.tensor([20, 4, 7])
        )
    )
    posterior = guide.laplace_approximation(*case.args)
    expected = dense_precision(case, [4, 7, 20])
    precision = posterior.get_posterior().precision_matrix
    assert_close(precision, expected, **DOUBLE_TOLERANCE)
