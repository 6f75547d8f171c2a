"""The structured route against dense autograd, layer by layer, in float64.

What it cannot serve goes to another route, site by site, and never to a wrong number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.infer.autoguide.initialization import init_to_value
from pyro.nn import PyroModule, PyroSample
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from pyro_subnet import (
    AutoSubnetLaplace,
    AutoSubnetMultivariateNormal,
    compare_routes,
)
from pyro_subnet.curvature.jacobian.output_map import Factors, OutputMap
from pyro_subnet.curvature.jacobian.route import jacobian_blocks, squared_columns
from pyro_subnet.curvature.jacobian.structured.entries import Contraction
from pyro_subnet.curvature.jacobian.structured.recording import NotLayered, Recording
from pyro_subnet.curvature.jacobian.structured.squares import layered_diagonal
from pyro_subnet.exceptions import RouteError
from pyro_subnet.nn import bayesianize
from pyro_subnet.selection import RandomSubnet
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.subnet_call import SubnetCall

Model = Callable[..., None]

DTYPE = torch.float64
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
N, C = 5, 3
LARGE, SMALL = 2**30, 1  # budgets: all data at once, and one observation at a time


def images(channels: int = 2, *sides: int) -> Tensor:
    return torch.randn(N, channels, *sides, dtype=DTYPE)


def headed(*layers: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """Layers, with a linear one behind them."""
    x = x.to(DTYPE)
    body = nn.Sequential(*layers, nn.Flatten()).to(DTYPE).eval()
    with torch.no_grad():
        width = body(x).shape[1]
    return nn.Sequential(body, nn.Linear(width, C)).to(DTYPE).eval(), x


class Tied(nn.Module):
    """An embedding whose weight is the output layer's too."""

    def __init__(self, padding: int | None) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4, padding_idx=padding)
        self.out = nn.Linear(4, 7)
        self.out.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.out(torch.tanh(self.embed(words)).mean(1))


class Twice(nn.Module):
    """One layer used twice, and a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.out = nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.inner(x))
        return self.out(x + torch.tanh(self.inner(x)))


class Matrices(nn.Module):
    """Plain matrices, as a functional Pyro model has them: cut, turned, broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 4))
        self.b = nn.Parameter(torch.randn(5))
        self.v = nn.Parameter(torch.randn(1, 5))
        self.u = nn.Parameter(torch.randn(15))
        self.k = nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x @ self.w.T + self.b) * self.v[0] - self.k
        return self.k + h @ self.u.view(5, 3) + self.v[0, :3] + self.v[0, 1:4]


class Vector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 5))
        self.v = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.tanh(torch.matmul(x, self.w)) @ self.v).unsqueeze(-1)


class Flattened(nn.Module):
    """Positions in the axis of the data, as time-distributed layers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten())
        self.all = nn.Linear(18, C)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.each(x.flatten(0, 1))
        return self.all(torch.tanh(rows.reshape(len(x), -1)))


def networks() -> dict[str, Callable[[], tuple[nn.Module, Tensor]]]:
    """A network and its input for every kind of layer that the route serves."""
    line, plane = (N, 2, 9), (2, 9, 8)
    return {
        "linear": lambda: headed(nn.Linear(4, 6), nn.Tanh(), x=torch.randn(N, 4)),
        "linear-without-bias": lambda: headed(
            nn.Linear(4, 6, bias=False), nn.Tanh(), x=torch.randn(N, 4)
        ),
        "linear-on-a-sequence": lambda: headed(
            nn.Linear(4, 6), nn.Tanh(), x=torch.randn(N, 3, 4)
        ),
        "outputs-per-token": lambda: (
            nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, C)),
            torch.randn(N, 3, 4),
        ),
        "positions-in-the-data-axis": lambda: (Flattened(), torch.randn(N, 3, 2, 3)),
        "conv1d": lambda: headed(
            nn.Conv1d(2, 4, 3, stride=2), nn.Tanh(), x=torch.randn(line)
        ),
        "conv1d-causal": lambda: headed(
            nn.Conv1d(2, 4, 3, padding=4, dilation=2), nn.Tanh(), x=torch.randn(line)
        ),
        "conv2d": lambda: headed(
            nn.Conv2d(2, 4, 3, stride=(2, 1), padding=(1, 2), dilation=2),
            nn.ReLU(inplace=True),
            x=images(*plane),
        ),
        "conv2d-groups": lambda: headed(
            nn.Conv2d(2, 6, (3, 2), groups=2, bias=False), nn.Tanh(), x=images(*plane)
        ),
        "conv2d-depthwise": lambda: headed(
            nn.Conv2d(2, 2, 3, groups=2), nn.Tanh(), x=images(*plane)
        ),
        "conv2d-same": lambda: headed(
            nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(1, 2)),
            nn.Tanh(),
            x=images(*plane),
        ),
        "conv2d-valid": lambda: headed(
            nn.Conv2d(2, 3, 3, padding="valid"), nn.Tanh(), x=images(*plane)
        ),
        **{
            f"conv2d-{mode}": lambda mode=mode: headed(
                nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode),
                nn.Tanh(),
                x=images(*plane),
            )
            for mode in ("reflect", "replicate", "circular")
        },
        "conv3d": lambda: headed(
            nn.Conv3d(2, 4, 2, stride=(1, 2, 1)), nn.Tanh(), x=images(2, 4, 5, 3)
        ),
        "conv-transpose1d": lambda: headed(
            nn.ConvTranspose1d(
                2, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2
            ),
            nn.Tanh(),
            x=torch.randn(line),
        ),
        "conv-transpose2d": lambda: headed(
            nn.ConvTranspose2d(
                2, 4, (3, 2), stride=(2, 3), padding=1, output_padding=(1, 0)
            ),
            nn.Tanh(),
            x=images(*plane),
        ),
        "conv-transpose3d": lambda: headed(
            nn.ConvTranspose3d(2, 3, 2), nn.Tanh(), x=images(2, 2, 3, 2)
        ),
        "batch-norm": lambda: headed(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), x=images(*plane)
        ),
        "batch-norm1d": lambda: headed(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), x=torch.randn(N, 4)
        ),
        "group-norm": lambda: headed(
            nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), x=images(*plane)
        ),
        "instance-norm": lambda: headed(
            nn.Conv2d(2, 4, 3),
            nn.InstanceNorm2d(4, affine=True),
            nn.ReLU(),
            x=images(*plane),
        ),
        "instance-norm-running": lambda: headed(
            nn.InstanceNorm2d(2, affine=True, track_running_stats=True),
            nn.Conv2d(2, 4, 3),
            x=images(*plane),
        ),
        "layer-norm": lambda: headed(
            nn.Linear(4, 6), nn.LayerNorm((3, 6)), nn.ReLU(), x=torch.randn(N, 3, 4)
        ),
        "rms-norm": lambda: headed(
            nn.Linear(4, 6), nn.RMSNorm(6), nn.ReLU(), x=torch.randn(N, 3, 4)
        ),
        "embedding": lambda: (Tied(None), torch.randint(7, (N, 6))),
        "embedding-with-padding": lambda: (Tied(2), torch.randint(7, (N, 6))),
        "used-twice": lambda: (Twice(), torch.randn(N, 4)),
        "matrices": lambda: (Matrices(), torch.randn(N, 4)),
        "matrices-on-a-sequence": lambda: (Matrices(), torch.randn(N, 2, 4)),
        "vector": lambda: (Vector(), torch.randn(N, 4)),
    }


NETWORKS = networks()


def output_map(
    net: nn.Module, x: Tensor, share: float = 0.3, seed: int = 0
) -> OutputMap:
    """The outputs of a network as a function of scattered elements of its weights."""
    net = net.to(DTYPE).eval()
    x = x.to(DTYPE) if x.is_floating_point() else x
    generator = torch.Generator().manual_seed(seed)
    chosen, base = {}, {}
    for name, parameter in net.named_parameters():
        picked = torch.rand(parameter.numel(), generator=generator) < share
        if bool(picked.any()):
            chosen[name] = picked.nonzero().squeeze(-1)
            base[name] = parameter.detach().clone()

    def of_sites(
        values: Mapping[str, Tensor], rows: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, ...]:
        (inputs,) = (x,) if rows is None else rows
        with sdpa_kernel(SDPBackend.MATH):
            outputs = functional_call(net, dict(values), (inputs,))
        return (outputs.reshape(-1, outputs.shape[-1]),)

    with torch.no_grad():
        reference = of_sites(base, None)
    return OutputMap(
        base=base,
        chosen=chosen,
        of_sites=of_sites,
        reference=reference,
        rows=(x,),
        num_data=len(x),
        activation_bytes=10_000,
    )


def random_factors(outputs: OutputMap, rank: int = 2) -> Factors:
    return tuple(
        torch.randn(count, rank, width, dtype=DTYPE) for count, width in outputs.shapes
    )


def dense_rows(outputs: OutputMap, factors: Factors) -> Tensor:
    """R J of all elements by autograd over whole weights, row by row: (M, r, S)."""
    leaves = {s: v.detach().requires_grad_() for s, v in outputs.base.items()}
    (values,) = outputs.of_sites(leaves, None)
    result = []
    for value, factor in zip(values, factors[0], strict=True):
        for row in factor:
            found = torch.autograd.grad(
                value,
                list(leaves.values()),
                row,
                retain_graph=True,
                materialize_grads=True,
            )
            pieces = [
                gradient.flatten()[at]
                for gradient, at in zip(found, outputs.chosen.values(), strict=True)
            ]
            result.append(torch.cat(pieces))
    return torch.stack(result).unflatten(0, factors[0].shape[:2])


def rows_of(
    outputs: OutputMap, factors: Factors, which: str | None, budget: int
) -> Tensor:
    blocks = list(jacobian_blocks(outputs, factors, budget, which))
    starts = [block.start for block in blocks]
    assert starts == sorted(starts)
    return torch.cat([block.rows for block in blocks])


def recording(outputs: OutputMap) -> Recording:
    return Recording(outputs, whole=True)


# torch, of an even kernel that is padded to the same size.
quiet = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@quiet
@pytest.mark.parametrize("budget", [LARGE, SMALL], ids=["all", "one"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_rows_are_dense_autograds(kind: str, budget: int) -> None:
    outputs = output_map(*NETWORKS[kind]())
    factors = random_factors(outputs)
    assert not recording(outputs).tape.escaped
    found = rows_of(outputs, factors, "layered", budget)
    assert_close(found, dense_rows(outputs, factors), **CLOSE)


def test_data_are_divided_in_halves_or_less_or_not_at_all() -> None:
    """A remainder of a few is not worth what it takes to see that they may be."""
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
    outputs = output_map(net, torch.randn(40, 6))
    factors = random_factors(outputs)
    largest = set()
    for power in range(40, 80):
        budget = int(2 ** (power / 4))
        blocks = jacobian_blocks(outputs, factors, budget, "layered")
        sizes = [len(block.rows) for block in blocks]
        assert sum(sizes) == 40
        largest.add(max(sizes))
    assert 40 in largest
    assert 10 < max(largest - {40}) <= 20


@quiet
@pytest.mark.parametrize("share", [1.0, 0.02])
@pytest.mark.parametrize("kind", NETWORKS)
def test_every_weight_and_hardly_any(kind: str, share: float) -> None:
    """Both ways to form entries: dense blocks of channels, and gathered products."""
    outputs = output_map(*NETWORKS[kind](), share=share, seed=3)
    if not outputs.chosen:
        outputs = output_map(*NETWORKS[kind](), share=0.1, seed=3)
    factors = random_factors(outputs)
    found = rows_of(outputs, factors, "layered", LARGE)
    assert_close(found, dense_rows(outputs, factors), **CLOSE)


@quiet
@pytest.mark.parametrize("budget", [LARGE, SMALL], ids=["all", "one"])
@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("kind", NETWORKS)
def test_squared_columns_are_dense_autograds(
    kind: str, share: float, budget: int
) -> None:
    outputs = output_map(*NETWORKS[kind](), share=share)
    factors = random_factors(outputs)

    def never(part: OutputMap, of_part: Factors) -> Tensor:
        raise AssertionError("no site escapes")

    with torch.no_grad():
        found = layered_diagonal(outputs, factors, budget, never)
    expected = dense_rows(outputs, factors).square().sum((0, 1))
    assert found.dtype == torch.float64
    assert_close(found, expected, **CLOSE)


# ----------------------------------------------------------------------------------
# What it does not serve.


class Squared(nn.Module):
    """A weight that enters a layer, and a penalty that no layer is."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 5)
        self.out = nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(x))) + self.out.weight.square().sum()


class Overwritten(nn.Module):
    """Changes the input of a layer afterwards, where autograd need not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.out = nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        hidden = torch.tanh(self.inner(x))
        x.mul_(2.0)
        return self.out(hidden + x)


class TimeFirst(nn.Module):
    """Runs a layer with positions before data."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 5)
        self.out = nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(x.transpose(0, 1)))
        return self.out(hidden.transpose(0, 1).mean(1))


class Vmapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 5)
        self.out = nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.vmap(lambda row: torch.tanh(self.inner(row)))(x))


class Halved(nn.Module):
    """A layer in lower precision, as under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 5)
        self.out = nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.linear(x.float(), self.inner.weight.float(), self.inner.bias.float())
        return self.out(torch.tanh(inner).to(x.dtype))


ESCAPES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[str]]] = {
    "used-outside-its-layer": (Squared, (N, 4), {"out.weight"}),
    "vmapped": (Vmapped, (N, 4), {"inner.weight", "inner.bias"}),
    "other-precision": (Halved, (N, 4), {"inner.weight", "inner.bias"}),
}


@pytest.mark.parametrize("budget", [LARGE, SMALL], ids=["all", "one"])
@pytest.mark.parametrize("kind", ESCAPES)
def test_sites_that_escape_take_another_route(kind: str, budget: int) -> None:
    make, shape, escaped = ESCAPES[kind]
    outputs = output_map(make(), torch.randn(shape), share=0.6)
    factors = random_factors(outputs)
    assert recording(outputs).tape.escaped == escaped
    found = rows_of(outputs, factors, None, budget)
    exact = kind != "other-precision"  # there the derivative itself is a float32 one
    tolerance = CLOSE if exact else {"rtol": 1e-4, "atol": 1e-5}
    expected = dense_rows(outputs, factors)
    assert_close(found, expected, **tolerance)
    squares = squared_columns(outputs, factors, budget)
    assert_close(squares, expected.square().sum((0, 1)), **tolerance)


def test_an_input_that_is_overwritten_is_torchs_own_error() -> None:
    outputs = output_map(Overwritten(), torch.randn(N, 4), share=0.6)
    assert recording(outputs).tape.escaped == {"inner.weight"}
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rows_of(outputs, random_factors(outputs), None, LARGE)


class Centred(nn.Module):
    """Subtracts the mean over the batch: each output needs all data."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 5)
        self.out = nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x)
        return self.out(torch.tanh(hidden - hidden.mean(0)))


class Neighbour(nn.Module):
    """Couples one pair of data only."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 5)
        self.out = nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(x))
        if len(x) == N:
            hidden = torch.cat([hidden[:1] * hidden[1:2], hidden[1:]])
        return self.out(hidden)


class BatchStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(5, track_running_stats=False)
        self.out = nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.norm(self.inner(x))))


@pytest.mark.parametrize("budget", [LARGE, SMALL], ids=["all", "one"])
@pytest.mark.parametrize(
    "make", [Centred, Neighbour, BatchStatistics, TimeFirst], ids=lambda m: m.__name__
)
def test_models_that_do_not_fit_take_another_route(
    make: Callable[[], nn.Module], budget: int
) -> None:
    shape = (N, N, 4) if make is TimeFirst else (N, 4)
    outputs = output_map(make(), torch.randn(shape), share=0.6)
    factors = random_factors(outputs)
    with pytest.raises(NotLayered, match="layers"):
        rows_of(outputs, factors, "layered", LARGE)
    found = rows_of(outputs, factors, None, budget)
    expected = dense_rows(outputs, factors)
    assert_close(found, expected, **CLOSE)
    squares = squared_columns(outputs, factors, budget)
    assert_close(squares, expected.square().sum((0, 1)), **CLOSE)


@pytest.mark.parametrize(
    ("share", "is_dense", "in_order"),
    [(0.6, True, False), (0.025, False, False), (0.008, False, True)],
)
def test_every_way_of_a_convolution(
    share: float, is_dense: bool, in_order: bool
) -> None:
    """A dense block of channels, gathered products, and those of rows in order."""
    x = images(8, 4, 3)
    layers = nn.Sequential(nn.Conv2d(8, 150, 2), nn.Flatten(), nn.Linear(900, C))
    outputs = output_map(layers, x, share=share).over(["0.weight"])
    (column,) = recording(outputs).columns()
    assert isinstance(column.entries, Contraction)
    assert column.entries.dense == is_dense
    assert (column.entries.q is None) == in_order
    factors = random_factors(outputs)
    expected = dense_rows(outputs, factors)
    assert_close(rows_of(outputs, factors, "layered", LARGE), expected, **CLOSE)
    squares = squared_columns(outputs, factors, LARGE)
    assert_close(squares, expected.square().sum((0, 1)), **CLOSE)


class StoppedGradient(nn.Module):
    """Values follow single data; derivatives follow others too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 5)
        self.out = nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(x))
        others = hidden.roll(3, 0)
        return self.out(hidden + others - others.detach())


class ByPlace(nn.Module):
    """A weight for each place in the batch; they are equal, so values do not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 5)
        self.scale = nn.Parameter(torch.ones(30, 1))
        self.out = nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(x)) * self.scale[: len(x)])


@pytest.mark.parametrize("count", [2, 6, 7, 23])
@pytest.mark.parametrize("make", [StoppedGradient, ByPlace], ids=lambda m: m.__name__)
def test_derivatives_that_do_not_separate_are_noticed(
    make: Callable[[], nn.Module], count: int
) -> None:
    """Though each group's values are those of the whole call."""
    outputs = output_map(make(), torch.randn(count, 4), share=0.6)
    factors = random_factors(outputs)
    with pytest.raises(NotLayered, match="couple data"):
        rows_of(outputs, factors, "layered", SMALL)
    expected = dense_rows(outputs, factors)
    assert_close(rows_of(outputs, factors, None, SMALL), expected, **CLOSE)
    squares = squared_columns(outputs, factors, SMALL)
    assert_close(squares, expected.square().sum((0, 1)), **CLOSE)


def test_nothing_upstream_of_the_first_chosen_layer_is_differentiated() -> None:
    reached = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, delta: Tensor) -> Tensor:
            reached.append(delta)
            return delta

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 5)
            self.last = nn.Linear(5, C)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(Watched.apply(torch.tanh(self.first(x))))

    outputs = output_map(Deep(), torch.randn(N, 4), share=1.0).over(["last.weight"])
    factors = random_factors(outputs)
    found = rows_of(outputs, factors, "layered", LARGE)
    assert_close(found, dense_rows(outputs, factors), **CLOSE)
    assert not reached


def test_data_that_differ_in_value_alone_are_noticed_late() -> None:
    """A later group that does not separate falls back; earlier ones were right."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(4, C)

        def forward(self, x: Tensor) -> Tensor:
            outputs = self.out(x)
            if len(x) == N:  # the last two data see each other
                mixed = outputs[-2:].tanh().flip(0) + outputs[-2:]
                outputs = torch.cat([outputs[:-2], mixed])
            return outputs

    outputs = output_map(Late(), torch.randn(N, 4), share=0.8)
    factors = random_factors(outputs)
    found = rows_of(outputs, factors, None, SMALL)
    assert_close(found, dense_rows(outputs, factors), **CLOSE)


# ----------------------------------------------------------------------------------
# The switch that compares both routes.


def test_comparing_passes_where_routes_agree() -> None:
    outputs = output_map(*NETWORKS["conv2d"]())
    factors = random_factors(outputs)
    with compare_routes():
        found = rows_of(outputs, factors, None, SMALL)
    assert_close(found, dense_rows(outputs, factors), **CLOSE)


def test_comparing_finds_routes_that_disagree() -> None:
    """A derivative that changes from run to run: within one, all checks pass."""
    runs = 0

    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 6)
            self.out = nn.Linear(6, C)

        def forward(self, x: Tensor) -> Tensor:
            nonlocal runs
            runs += 1
            hidden = torch.tanh(self.inner(x))
            scale = 1.0 if runs == 1 else 1.001
            return self.out(hidden.detach() + scale * (hidden - hidden.detach()))

    outputs = output_map(Changing(), torch.randn(N, 4))
    factors = random_factors(outputs)
    message = (
        r"must give the same Jacobian to .*; got .* at element \d of observed site 0"
    )
    runs = 0
    with compare_routes(), pytest.raises(RouteError, match=message):
        rows_of(outputs, factors, None, LARGE)
    runs = 0
    rows_of(outputs, factors, None, LARGE)  # and the switch is off again


class Hooked(nn.Module):
    """Changes a gradient on its way to a weight, which no layer shows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 6)
        self.out = nn.Linear(6, C)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.inner.weight.view(6, 4)
        if weight.requires_grad:
            weight.register_hook(lambda gradient: 1.001 * gradient)
        return self.out(torch.tanh(F.linear(x, weight, self.inner.bias)))


def test_a_wrong_layer_is_never_used() -> None:
    """Nothing escapes, but autograd's gradient is another one."""
    outputs = output_map(Hooked(), torch.randn(N, 4))
    factors = random_factors(outputs)
    assert not recording(outputs).tape.escaped
    for budget in (LARGE, SMALL):
        with pytest.raises(NotLayered, match="layers"):
            rows_of(outputs, factors, "layered", budget)
        found = rows_of(outputs, factors, None, budget)
        expected = dense_rows(outputs, factors)
        assert_close(found, expected, **CLOSE)
        squares = squared_columns(outputs, factors, budget)
        assert_close(squares, expected.square().sum((0, 1)), **CLOSE)


# ----------------------------------------------------------------------------------
# The route is found by itself, in whatever way the model is written.


def sampled_layers(likelihood: Callable[[Tensor], dist.Distribution]) -> Model:
    """``PyroModule`` layers whose weights are ``PyroSample``s."""
    net = PyroModule[nn.Sequential](
        PyroModule[nn.Linear](4, 6), nn.Tanh(), PyroModule[nn.Linear](6, C)
    )
    for layer in (net[0], net[2]):
        for name, value in list(layer.named_parameters()):
            prior = dist.Normal(torch.zeros(value.shape, dtype=DTYPE), 1.0)
            setattr(layer, name, PyroSample(prior.to_event(value.ndim)))

    def model(x: Tensor, y: Tensor | None = None) -> None:
        observe(likelihood(net(x)), x, y)

    return model


def lifted_network(likelihood: Callable[[Tensor], dist.Distribution]) -> Model:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, C)).to(DTYPE)
    bnn = bayesianize(net)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        observe(likelihood(bnn(x)), x, y)

    return model


def sampled_matrices(likelihood: Callable[[Tensor], dist.Distribution]) -> Model:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        shapes = {"w": (4, 6), "b": (6,), "v": (6, C)}
        at = {
            name: pyro.sample(
                name,
                dist.Normal(torch.zeros(shape, dtype=DTYPE), 1.0).to_event(len(shape)),
            )
            for name, shape in shapes.items()
        }
        outputs = torch.tanh(x @ at["w"] + at["b"]) @ at["v"]
        observe(likelihood(outputs), x, y)

    return model


def observe(distribution: dist.Distribution, x: Tensor, y: Tensor | None) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("y", distribution, obs=y)


LIKELIHOODS = {
    "categorical": lambda f: dist.Categorical(logits=f),
    "normal": lambda f: dist.Normal(f, 0.3).to_event(1),
    "heteroscedastic": lambda f: dist.Normal(f[:, 0], f[:, 1].exp()),
}


class OutsideLayers(Messenger):
    """Hands latent values on as products: no layer sees a weight as it was drawn."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"]:
            msg["value"] = 1.0 * msg["value"]


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize(
    "make", [sampled_layers, lifted_network, sampled_matrices], ids=lambda m: m.__name__
)
def test_every_idiom_is_served(make: Callable[..., Model], likelihood: str) -> None:
    model = make(LIKELIHOODS[likelihood])
    x = torch.randn(N, 4, dtype=DTYPE)
    y = {
        "categorical": torch.randint(C, (N,)),
        "normal": torch.randn(N, C, dtype=DTYPE),
        "heteroscedastic": torch.randn(N, dtype=DTYPE),
    }[likelihood]
    guide = AutoSubnetLaplace(model, RandomSubnet(17))
    posterior = guide.laplace_approximation(x, y)
    outputs, factors = routes_of(posterior, x, y)
    assert not recording(outputs).tape.escaped
    rows_of(outputs, factors, "layered", LARGE)  # an error where it does not serve

    pyro.clear_param_store()
    init = init_to_value(values=posterior.median())
    chosen = dict(posterior.subnet.indices)
    other = AutoSubnetLaplace(OutsideLayers()(model), chosen, init_loc_fn=init)
    general = other.laplace_approximation(x, y)
    outputs, factors = routes_of(general, x, y)
    with pytest.raises(NotLayered, match="no chosen site"):
        rows_of(outputs, factors, "layered", LARGE)

    found = posterior.get_posterior().precision_matrix
    assert_close(found, general.get_posterior().precision_matrix, **CLOSE)
    closed, expected = (p.output_distribution(x) for p in (posterior, general))
    assert_close(closed.covariance_matrix, expected.covariance_matrix, **CLOSE)


def routes_of(
    posterior: AutoSubnetMultivariateNormal, *args: Tensor
) -> tuple[OutputMap, Factors]:
    """What the routes are given in a fit."""
    call = ModelCall.read(posterior.at_map, args, {})
    over_subnet = SubnetCall.of(call, posterior.subnet)
    return over_subnet.outputs(), over_subnet.factors()
