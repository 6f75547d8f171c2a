"""Fisher information of the known families against quadrature over the labels.

The oracle knows the log density alone: it integrates outer products of autograd's
scores over a grid of labels, with no formula for the information.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributions as td
from torch import Tensor
from torch.testing import assert_close

from pyro_subnet.curvature.families.family import LowerTriangle
from pyro_subnet.curvature.families.information import psd_root
from pyro_subnet.curvature.likelihood import Family, find_family
from pyro_subnet.exceptions import (
    NonFiniteError,
    OptionError,
    UnsupportedLikelihoodError,
)
from tests.tolerances import tolerance

# Labels (n, *batch, *event), and the volume or the weight that each stands for.
Grid = tuple[Tensor, Tensor]
SHAPES = [(), (3,), (2, 5)]


def log_grid(center: Tensor, low: float, high: float, step: float = 0.05) -> Grid:
    """Positive labels, evenly spaced in their logarithm around a center."""
    s = torch.arange(low, high, step, dtype=torch.float64)
    y = center * s.exp().reshape(-1, *(1,) * center.ndim)
    return y, y * step


def two_sided(loc: Tensor, scale: Tensor, high: float) -> Grid:
    """Real labels on both sides of a location, where densities may have a kink."""
    y, volume = log_grid(scale, -45.0, high)
    return torch.cat([loc - y, loc + y]), torch.cat([volume, volume])


def power_grid(d: td.Weibull) -> Grid:
    """Labels whose power k is evenly spaced in its logarithm."""
    power, _ = log_grid(torch.ones_like(d.scale), -45.0, 4.0)
    y = d.scale * power.log().div(d.concentration).exp()
    return y, y * 0.05 / d.concentration


def unit_grid(d: td.Beta) -> Grid:
    s = torch.arange(-400.0, 36.0, 0.05, dtype=torch.float64)
    s = s.reshape(-1, *(1,) * len(d.batch_shape)).expand(-1, *d.batch_shape)
    return s.sigmoid(), s.sigmoid() * (-s).sigmoid() * 0.05


def triangle_grid(d: td.Dirichlet) -> Grid:
    """The simplex of three classes, broken like a stick."""
    s = torch.arange(-36.0, 36.0, 0.15, dtype=torch.float64)
    s, t = (
        x.reshape(-1, *(1,) * len(d.batch_shape))
        for x in torch.meshgrid(s, s, indexing="ij")
    )
    rest = (-s).sigmoid()
    y = torch.stack([s.sigmoid(), rest * t.sigmoid(), rest * (-t).sigmoid()], dim=-1)
    volume = y.prod(-1) * 0.15**2
    shape = d.batch_shape
    return y.expand(-1, *shape, 3), volume.expand(-1, *shape)


def circle(d: td.VonMises) -> Grid:
    angle = torch.linspace(-np.pi, np.pi, 801, dtype=torch.float64)[:-1]
    angle = angle.reshape(-1, *(1,) * len(d.batch_shape)).expand(-1, *d.batch_shape)
    return angle, torch.full_like(angle, 2 * np.pi / 800)


def counts(size: int) -> Callable[[td.Distribution], Grid]:
    def grid(d: td.Distribution) -> Grid:
        y = torch.arange(float(size), dtype=torch.float64)
        y = y.reshape(-1, *(1,) * len(d.batch_shape)).expand(-1, *d.batch_shape)
        return y, torch.ones_like(y)

    return grid


def trials(d: td.Binomial) -> Grid:
    y, ones = counts(1 + int(d.total_count.max()))(d)
    return torch.minimum(y, d.total_count), ones * (y <= d.total_count)


def events(labels: Tensor) -> Callable[[td.Distribution], Grid]:
    """The same finite support, of any event shape, at every batch element."""

    def grid(d: td.Distribution) -> Grid:
        dims = len(d.event_shape)
        shape = (len(labels), *(1,) * len(d.batch_shape), *labels.shape[1:])
        y = labels.reshape(shape).expand(-1, *d.batch_shape, *(-1,) * dims)
        return y, torch.ones(len(labels), *d.batch_shape, dtype=torch.float64)

    return grid


def gauss_hermite(d: td.MultivariateNormal) -> Grid:
    """Exact for scores, which are quadratic in the label."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(6)
    size = d.event_shape[0]
    z = torch.tensor(list(itertools.product(nodes, repeat=size)))
    weight = torch.tensor(list(itertools.product(weights, repeat=size))).prod(-1)
    z = z.reshape(-1, *(1,) * len(d.batch_shape), size)
    y = d.loc + (d.scale_tril @ z.unsqueeze(-1)).squeeze(-1)
    weight = (weight / weight.sum()).reshape(-1, *(1,) * len(d.batch_shape))
    return y, weight / d.log_prob(y).exp()


def compositions(total: int, classes: int) -> Tensor:
    rows = itertools.product(range(total + 1), repeat=classes)
    return torch.tensor([row for row in rows if sum(row) == total]).double()


@dataclass(frozen=True)
class Case:
    """A family at awkward values: each argument's first axis is cycled over a batch."""

    distribution: Callable[..., td.Distribution]
    arguments: Mapping[str, list]
    grid: Callable[[td.Distribution], Grid]
    rtol: float = 1e-9

    def at(
        self, shape: tuple[int, ...], dtype: torch.dtype = torch.float64
    ) -> td.Distribution:
        size = int(np.prod(shape))
        arguments = {}
        for name, rows in self.arguments.items():
            column = torch.tensor(rows, dtype=dtype)
            cycled = column[torch.arange(size) % len(rows)]
            arguments[name] = cycled.reshape(shape + column.shape[1:])
        return self.distribution(**arguments)


LOGITS = {"logits": [-3.0, 0.0, 2.5]}
CLASSES = {"logits": [[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [-9.0, 3.0, 3.5]]}
LOC_SCALE = {"loc": [0.0, -2.0, 5.0], "scale": [1.0, 0.03, 40.0]}
TRILS = [
    [[1.0, 0.0, 0.0], [0.5, 0.2, 0.0], [-3.0, 1.0, 2.0]],
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
    [[9.0, 0.0, 0.0], [-1.0, 3.0, 0.0], [2.0, 2.0, 0.1]],
]
MEANS = [[0.0, 1.0, 2.0], [-1.0, 0.0, 0.0], [30.0, 0.0, -5.0]]

CASES = {
    "normal": Case(dist.Normal, LOC_SCALE, lambda d: two_sided(d.loc, d.scale, 2.5)),
    "log_normal": Case(
        dist.LogNormal,
        {"loc": [0.0, -2.0, 5.0], "scale": [1.0, 0.3, 2.0]},
        lambda d: log_grid(d.loc.exp(), -25.0, 25.0),
    ),
    "laplace": Case(dist.Laplace, LOC_SCALE, lambda d: two_sided(d.loc, d.scale, 4.0)),
    "cauchy": Case(dist.Cauchy, LOC_SCALE, lambda d: two_sided(d.loc, d.scale, 45.0)),
    "gumbel": Case(dist.Gumbel, LOC_SCALE, lambda d: two_sided(d.loc, d.scale, 3.8)),
    "student_t": Case(
        dist.StudentT,
        {"df": [4.0, 0.2, 60.0], **LOC_SCALE},
        lambda d: two_sided(d.loc, d.scale, 300.0),
    ),
    # torch's density uses Bessel functions good to 1e-7.
    "von_mises": Case(
        dist.VonMises,
        {"loc": [0.0, 3.0, -1.0], "concentration": [1.0, 0.2, 40.0]},
        circle,
        rtol=2e-6,
    ),
    "half_normal": Case(
        dist.HalfNormal,
        {"scale": [1.0, 0.03, 9.0]},
        lambda d: log_grid(d.scale, -45, 3),
    ),
    "half_cauchy": Case(
        dist.HalfCauchy,
        {"scale": [1.0, 0.03, 9.0]},
        lambda d: log_grid(d.scale, -45, 45),
    ),
    "exponential": Case(
        dist.Exponential,
        {"rate": [1.0, 0.03, 9.0]},
        lambda d: log_grid(1 / d.rate, -45, 4),
    ),
    "gamma": Case(
        dist.Gamma,
        {"concentration": [1.0, 0.1, 50.0], "rate": [3.0, 0.2, 100.0]},
        lambda d: log_grid(d.concentration / d.rate, -400, 8),
    ),
    "inverse_gamma": Case(
        dist.InverseGamma,
        {"concentration": [1.0, 0.1, 50.0], "rate": [3.0, 0.2, 100.0]},
        lambda d: log_grid(d.rate / d.concentration, -8, 400),
    ),
    "weibull": Case(
        dist.Weibull,
        {"scale": [1.0, 0.2, 30.0], "concentration": [1.0, 0.4, 8.0]},
        power_grid,
    ),
    "beta": Case(
        dist.Beta,
        {"concentration1": [3.0, 0.1, 50.0], "concentration0": [5.0, 1.0, 2.0]},
        unit_grid,
    ),
    "dirichlet": Case(
        dist.Dirichlet,
        {"concentration": [[1.0, 2.0, 3.0], [7.0, 1.0, 1.5], [2.0, 2.0, 9.0]]},
        triangle_grid,
    ),
    "bernoulli": Case(dist.Bernoulli, LOGITS, counts(2)),
    "bernoulli_probs": Case(dist.Bernoulli, {"probs": [0.5, 1e-6, 0.99]}, counts(2)),
    "binomial": Case(dist.Binomial, {"total_count": [7.0, 1.0, 4.0], **LOGITS}, trials),
    "geometric": Case(dist.Geometric, LOGITS, counts(1500)),
    "negative_binomial": Case(
        dist.NegativeBinomial, {"total_count": [0.3, 5.0, 40.0], **LOGITS}, counts(4000)
    ),
    "poisson": Case(dist.Poisson, {"rate": [1.0, 1e-3, 60.0]}, counts(300)),
    "categorical": Case(dist.Categorical, CLASSES, counts(3)),
    "one_hot": Case(dist.OneHotCategorical, CLASSES, events(torch.eye(3).double())),
    "multinomial": Case(
        lambda logits: dist.Multinomial(4, logits=logits),
        CLASSES,
        events(compositions(4, 3)),
    ),
    "multivariate_normal": Case(
        dist.MultivariateNormal, {"loc": MEANS, "scale_tril": TRILS}, gauss_hermite
    ),
    "low_rank_normal": Case(
        dist.LowRankMultivariateNormal,
        {
            "loc": MEANS,
            "cov_factor": [[[1.0], [0.5], [0.0]]] * 3,
            "cov_diag": [[1.0, 0.3, 2.0], [1.0, 1.0, 1.0], [0.1, 4.0, 0.2]],
        },
        gauss_hermite,
    ),
}
any_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def expected_fisher(family: Family, d: td.Distribution, grid: Grid) -> Tensor:
    """E[score scoreᵀ] by quadrature, all parts."""
    labels, volume = grid
    outputs = {
        name: eta.detach().expand(len(labels), *eta.shape).clone().requires_grad_()
        for name, eta in family.outputs(d).items()
    }
    rebuilt = family.distribution(**family.parameters(d, outputs))
    log_prob = rebuilt.log_prob(labels)
    scores = torch.cat(
        torch.autograd.grad(log_prob.sum(), list(outputs.values())), dim=-1
    )
    p = log_prob.detach().exp() * volume
    total = p.sum(0)
    assert_close(total, torch.ones_like(total), rtol=1e-6, atol=1e-6)
    return torch.einsum("n...,n...i,n...j->...ij", p, scores, scores)


def assert_same_information(actual: Tensor, expected: Tensor, rtol: float) -> None:
    """Entries in units of the root mean square scores, as a zero has no scale."""
    scale = expected.diagonal(dim1=-2, dim2=-1).sqrt()
    units = scale.unsqueeze(-1) * scale.unsqueeze(-2)
    assert_close(actual / units, expected / units, rtol=rtol, atol=rtol)


@any_case
@pytest.mark.parametrize("shape", SHAPES)
def test_fisher_is_the_mean_outer_product_of_scores(case: Case, shape) -> None:
    d = case.at(shape)
    family = find_family(d)
    assert family.exact
    actual = family.fisher(d, family.part_names)
    assert actual.shape[:-2] == torch.Size(shape)
    assert_same_information(actual, expected_fisher(family, d, case.grid(d)), case.rtol)


@any_case
@pytest.mark.parametrize("shape", SHAPES)
def test_root_squares_to_fisher_for_every_choice_of_parts(
    case: Case, shape, dtype
) -> None:
    d = case.at(shape, dtype)
    family = find_family(d)
    full = family.fisher(d, family.part_names)
    widths = [eta.shape[-1] for eta in family.outputs(d).values()]
    starts = np.cumsum([0, *widths])
    for size in range(1, len(widths) + 1):
        for picked in itertools.combinations(range(len(widths)), size):
            names = [family.part_names[i] for i in picked]
            index = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in picked])
            # The order in which parts are named does not matter.
            fisher = family.fisher(d, names[::-1])
            root = family.root(d, names)
            assert fisher.dtype == root.dtype == dtype
            assert not root.requires_grad
            assert root.shape[-2] <= root.shape[-1] == len(index)
            block = full[..., index, :][..., index]
            assert_close(fisher, block, **tolerance(dtype, "closed_form"))
            units = block.diagonal(dim1=-2, dim2=-1).rsqrt().diag_embed()
            assert_close(
                units @ (root.mT @ root) @ units,
                units @ block @ units,
                **tolerance(dtype, "closed_form"),
            )


@any_case
def test_parameters_invert_outputs(case: Case, dtype) -> None:
    d = case.at((2, 5), dtype)
    family = find_family(d)
    outputs = family.outputs(d)
    rebuilt = family.distribution(**family.parameters(d, outputs))
    assert rebuilt.batch_shape == d.batch_shape
    assert rebuilt.event_shape == d.event_shape
    for name, eta in family.outputs(rebuilt).items():
        assert eta.shape[:-1] == d.batch_shape
        assert_close(eta, outputs[name], **tolerance(dtype, "closed_form"))
    y = d.sample()
    assert_close(rebuilt.log_prob(y), d.log_prob(y), rtol=1e-3, atol=1e-3)


@any_case
def test_parameters_take_leading_dimensions_and_some_of_the_parts(case: Case) -> None:
    d = case.at((3,))
    family = find_family(d)
    outputs = family.outputs(d)
    for name, eta in outputs.items():
        moved = torch.stack([eta, eta + 0.1])
        rebuilt = family.distribution(**family.parameters(d, {name: moved}))
        assert rebuilt.batch_shape == (2, 3)
        assert rebuilt.sample().shape == (2, 3, *d.event_shape)
        found = family.outputs(rebuilt)
        expected = {other: outputs[other].expand_as(found[other]) for other in found}
        expected[name] = (
            moved - (moved.logsumexp(-1, keepdim=True) if moved.shape[-1] > 1 else 0.0)
            if name == "logits"
            else moved
        )
        assert_close(found, expected)


@any_case
def test_outputs_pass_through_transforms(case: Case) -> None:
    d = case.at((3,))
    family = find_family(d)
    start = {name: eta.detach() for name, eta in family.outputs(d).items()}

    def outputs(eta: dict[str, Tensor]) -> dict[str, Tensor]:
        arguments = family.parameters(d, eta)
        rebuilt = family.distribution(**arguments, validate_args=False)
        return find_family(rebuilt).outputs(rebuilt)

    tangent = {name: torch.randn_like(eta) for name, eta in start.items()}
    with pyro.validation_enabled(False):
        _, forward = torch.func.jvp(outputs, (start,), (tangent,))
        _, pull = torch.func.vjp(outputs, start)
        (backward,) = pull(tangent)
        many = {name: torch.stack([eta, eta - 0.2]) for name, eta in start.items()}
        batched = torch.func.vmap(outputs)(many)
        looped = [outputs({name: eta[k] for name, eta in many.items()}) for k in (0, 1)]
    for name, eta in start.items():
        assert_close(batched[name], torch.stack([one[name] for one in looped]))
        # Log-probabilities do not see a shift of all logits; else outputs are η itself.
        if name == "logits" and eta.shape[-1] > 1:
            p = eta.softmax(-1)
            shift = (p * tangent[name]).sum(-1, keepdim=True)
            assert_close(forward[name], tangent[name] - shift)
            total = tangent[name].sum(-1, keepdim=True)
            assert_close(backward[name], tangent[name] - p * total)
        else:
            assert_close(forward[name], tangent[name])
            assert_close(backward[name], tangent[name])


EXTREMES = [
    dist.Bernoulli(logits=torch.tensor([-40.0, 40.0])),
    dist.Binomial(5, logits=torch.tensor([-40.0, 40.0])),
    dist.Geometric(logits=torch.tensor([-40.0, 40.0])),
    dist.Categorical(logits=torch.tensor([40.0, -40.0, 0.0])),
    dist.Categorical(logits=torch.tensor([[-90.0, 0.0], [0.0, -90.0]])),
    dist.Multinomial(1000, logits=torch.tensor([40.0, -40.0, 0.0])),
    dist.Poisson(torch.tensor([-15.0, 15.0]).exp()),
    dist.Gamma(torch.tensor([1e-3, 1e4, 1e-3]), torch.tensor([1e6, 1e-6, 1e-6])),
    dist.Beta(torch.tensor([1e-3, 1e4, 1e4]), torch.tensor([1e-3, 1e4, 1e-3])),
    dist.Dirichlet(torch.tensor([[1e-3, 1e4, 1.0], [1e4, 1e4, 1e4]])),
    dist.NegativeBinomial(
        torch.tensor([1e-3, 1e4, 1e4, 1.0]),
        logits=torch.tensor([15.0, -15.0, 15.0, 40.0]),
    ),
    dist.StudentT(torch.tensor([1e-2, 1e3, 1e6]), 0.0, torch.tensor([1e-6, 1.0, 1e6])),
    dist.VonMises(torch.zeros(3), torch.tensor([1e-4, 1e3, 1e6])),
    dist.Weibull(torch.tensor([1e-6, 1e6]), torch.tensor([1e-2, 1e2])),
    dist.Normal(0.0, torch.tensor([1e-6, 1e6])),
]


@pytest.mark.parametrize("d", EXTREMES, ids=lambda d: type(d).__name__)
def test_float32_keeps_its_digits_at_extremes(d: td.Distribution) -> None:
    family = find_family(d)
    wide = {
        name: value.double() if torch.is_tensor(value) else value
        for name, value in family.parameters(d, {}).items()
    }
    expected = family.fisher(family.distribution(**wide), family.part_names)
    actual = family.fisher(d, family.part_names)
    root = family.root(d, family.part_names)
    assert actual.dtype == root.dtype == torch.float32
    assert_close(actual, expected.float(), rtol=1e-5, atol=1e-30)
    # The root is exact in units of the parts, also where the parts nearly coincide.
    units = expected.diagonal(dim1=-2, dim2=-1).rsqrt().diag_embed()
    squared = root.double().mT @ root.double()
    assert_close(
        units @ squared @ units, units @ expected @ units, rtol=1e-5, atol=1e-6
    )


def test_gamma_and_beta_agree_where_nothing_can_be_integrated() -> None:
    # A Beta in log a at b = 1 is a power of a uniform label: score 1 + a log y, so 1.
    one = dist.Beta(torch.tensor([1e-3, 1e4]).double(), torch.ones(2).double())
    family = find_family(one)
    got = family.fisher(one, ["log_concentration1"]).flatten()
    assert_close(got, torch.ones(2).double(), rtol=1e-10, atol=0)
    # Large shapes: a gamma is a normal whose log has the variance 1/α.
    gamma = dist.Gamma(torch.tensor(1e8).double(), torch.tensor(1.0).double())
    fisher = find_family(gamma).fisher(gamma, ["log_concentration", "log_rate"])
    determinant = fisher[0, 0] * fisher[1, 1] - fisher[0, 1] ** 2
    assert_close(determinant, torch.tensor(0.5e8).double(), rtol=1e-6, atol=0)


def test_classes_that_are_masked_out_carry_no_information() -> None:
    logits = torch.tensor([0.3, -torch.inf, 1.0, -torch.inf], dtype=torch.float64)
    d = dist.Categorical(logits=logits)
    family = find_family(d)
    kept = dist.Categorical(logits=logits[[0, 2]])
    expected = torch.zeros(4, 4, dtype=torch.float64)
    expected[::2, ::2] = family.fisher(kept, ["logits"])
    assert_close(family.fisher(d, ["logits"]), expected)
    assert_close(find_family(d).root(d, ["logits"]).shape[-2], 3)


def test_a_single_class_has_one_row_of_zeros() -> None:
    d = dist.Categorical(logits=torch.zeros(2, 1))
    root = find_family(d).root(d, ["logits"])
    assert_close(root, torch.zeros(2, 1, 1))


def test_normal_noise_scale_is_left_out_on_demand() -> None:
    d = dist.Normal(torch.zeros(4, 1), torch.tensor(0.5)).expand([4, 1])
    family = find_family(d)
    assert_close(family.fisher(d, ["loc"]), torch.full((4, 1, 1, 1), 4.0))
    assert list(family.outputs(d, ["loc"])) == ["loc"]


def test_ordered_logistic_is_a_categorical() -> None:
    predictor = torch.tensor([-1.0, 0.3], dtype=torch.float64, requires_grad=True)
    d = dist.OrderedLogistic(predictor, torch.tensor([-1.0, 0.5, 2.0]).double())
    family = find_family(d)
    assert family.distribution is td.Categorical
    rebuilt = family.distribution(**family.parameters(d, family.outputs(d)))
    assert_close(rebuilt.probs, d.probs)
    (gradient,) = torch.autograd.grad(family.outputs(d)["logits"][0, 1], predictor)
    assert gradient[0] != 0
    assert_close(
        family.fisher(d, ["logits"]),
        expected_fisher(family, d, counts(4)(d)),
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize(
    ("d", "known"),
    [
        (td.Chi2(torch.tensor([3.0])), td.Gamma),
        (td.OneHotCategoricalStraightThrough(torch.ones(3)), td.OneHotCategorical),
        (
            dist.OMTMultivariateNormal(torch.zeros(2), torch.eye(2)),
            td.MultivariateNormal,
        ),
        (dist.Poisson(torch.ones(2), is_sparse=True), td.Poisson),
        (td.Normal(0.0, 1.0), td.Normal),
    ],
)
def test_subclasses_that_keep_the_density_share_the_family(d, known) -> None:
    assert find_family(d).distribution is known


class Renamed(dist.Normal):
    """A user's subclass that adds nothing to the density."""


class Doubled(dist.Normal):
    """A user's subclass with its own density."""

    def log_prob(self, value: Tensor) -> Tensor:
        return 2 * super().log_prob(value)


class Shifted(dist.LogNormal):
    """A user's subclass whose density changes through its transforms."""

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__(loc, scale)
        self.transforms = [*self.transforms, td.AffineTransform(3.0, 1.0)]


def test_a_subclass_with_its_own_density_gets_no_closed_form() -> None:
    loc, scale = torch.zeros(2), torch.ones(2)
    assert find_family(Renamed(loc, scale)).exact
    for kind in (Doubled, Shifted):
        family = find_family(kind(loc, scale))
        assert not family.exact
        assert family.distribution is kind


def test_unknown_parts_are_refused() -> None:
    d = dist.Normal(torch.zeros(2), 1.0)
    family = find_family(d)
    message = r"`parts` must name parts of Normal, .* loc, log_scale; got \['scale'\]"
    with pytest.raises(OptionError, match=message):
        family.fisher(d, ["scale"])
    with pytest.raises(OptionError, match=message):
        family.outputs(d, ["scale"])
    with pytest.raises(OptionError, match=message):
        family.parameters(d, {"scale": torch.zeros(2, 1)})
    with pytest.raises(OptionError, match=r"got \[\]"):
        family.root(d, [])


def test_information_that_overflows_is_named() -> None:
    d = dist.Normal(torch.zeros(2), torch.tensor([1.0, 1e-30]))
    message = r"Normal must be finite; got 1 .* of 2 in torch.float32 .*index \(1,\)"
    with pytest.raises(NonFiniteError, match=message):
        find_family(d).fisher(d, ["loc"])
    with pyro.validation_enabled(False):
        gamma = dist.Gamma(torch.tensor(torch.nan), torch.tensor(1.0))
    with pytest.raises(NonFiniteError, match="of Gamma must be finite; got 1"):
        find_family(gamma).root(gamma, ["log_rate", "log_concentration"])


@pytest.mark.parametrize(
    ("d", "reason"),
    [
        (dist.Delta(torch.zeros(2)), "Delta, whose argument `v` has no unconstrained"),
        (dist.Unit(torch.zeros(2)), "Unit, whose values are empty"),
        (
            dist.MixtureSameFamily(
                dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2), 1.0)
            ),
            "whose argument `mixture_distribution` is a Categorical",
        ),
    ],
)
def test_what_has_no_information_is_refused(d, reason) -> None:
    message = rf"must be one of Bernoulli, Beta, .*Weibull.*; got .*{reason}.* Observe"
    with pytest.raises(UnsupportedLikelihoodError, match=message):
        find_family(d)


def test_root_of_a_singular_matrix_and_of_one_that_is_not_semidefinite() -> None:
    # Rank one, a part without information, and units that differ by 1e12.
    column = torch.tensor([1e-6, 0.0, -1e6]).double()
    matrix = torch.stack([torch.outer(column, column), torch.eye(3).double()])
    root = psd_root(matrix)
    assert_close(root.mT @ root, matrix, rtol=1e-9, atol=0)
    with pytest.raises(UnsupportedLikelihoodError, match=r"eigenvalue of -1\.000e\+00"):
        psd_root(torch.tensor([[1.0, 2.0], [2.0, 1.0]]).double())


def test_packed_factors_know_their_shapes() -> None:
    packing = LowerTriangle()
    factor = torch.tensor(TRILS)
    packed = packing.inv(factor)
    assert packed.shape == packing.inverse_shape(factor.shape) == (3, 6)
    assert packing.forward_shape(packed.shape) == factor.shape
    assert_close(packing(packed), factor)


def test_families_compare_and_pickle() -> None:
    d = dist.StudentT(torch.ones(2))
    family = find_family(d)
    copy = pickle.loads(pickle.dumps(family))
    assert copy == family
    assert copy != find_family(dist.Normal(0.0, 1.0))
    assert_close(copy.fisher(d, ["log_df"]), family.fisher(d, ["log_df"]))
