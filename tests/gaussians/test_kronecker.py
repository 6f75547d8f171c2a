"""Kronecker factors of the curvature, and the Gaussians that are made of them.

The oracle is dense: Jacobians of each layer's output rows by autograd, the factors by
loops over data and positions, Kronecker products and inverses as matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from laplace import Laplace
from laplace.curvature import BackPackGGN, CurvlinopsGGN
from pyro import poutine
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.curvature.kronecker_factors import KroneckerBlock, KroneckerFactors
from pyro_subnet.curvature.prior import PriorPrecision
from pyro_subnet.exceptions import (
    CheckpointError,
    MemoryLimitError,
    ModelError,
    NoKroneckerFactorsWarning,
    NonFiniteError,
    PrecisionError,
)
from pyro_subnet.files.checkpoint import KIND
from pyro_subnet.files.safe_file import read_file, write_file
from pyro_subnet.fit.sums import (
    SubnetCurvature,
    diagonal_curvature,
    subnet_curvature,
)
from pyro_subnet.gaussians.diagonal import DiagonalGaussian
from pyro_subnet.gaussians.kronecker import KroneckerForm
from pyro_subnet.gaussians.kronecker_gaussian import KroneckerGaussian
from pyro_subnet.laplace.evidence import log_evidence
from pyro_subnet.laplace.summary import FitSummary
from pyro_subnet.nn import init_to_module
from pyro_subnet.options import Curvature, FitOptions
from pyro_subnet.selection import LargestVariance
from pyro_subnet.subnet import Layout
from pyro_subnet.tracing.data import Data
from pyro_subnet.tracing.trace import ModelAtMAP
from tests.cases import CASES, DOUBLE
from tests.tolerances import num_standard_errors, tolerance

Model = Callable[..., Any]
EXACT = tolerance(torch.float64, "closed_form")
AUTOGRAD = tolerance(torch.float64)
NUM_DATA = 11
PRIOR_SCALE = 0.7
NOISE_SCALE = 0.4
LAYOUT = Layout(
    ("matrix", "vector", "scale"),
    (torch.Size([2, 3]), torch.Size([2]), torch.Size([])),
)


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(3)
    yield
    torch.set_default_dtype(torch.float32)


def network_model(
    net: nn.Module,
    likelihood: str = "regression",
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    latent_noise: bool = False,
) -> Model:
    """The network with Normal priors, the last weights sampled first."""
    found = dict(net.named_parameters())

    def model(x: Tensor, y: Tensor, weights: Any = weights, mask: Any = mask) -> None:
        sampled = {
            name: pyro.sample(
                name, dist.Normal(0.0, PRIOR_SCALE).expand(w.shape).to_event(w.ndim)
            )
            for name, w in reversed(found.items())
        }
        noise: Any = NOISE_SCALE
        if latent_noise:
            noise = pyro.sample("noise", dist.LogNormal(0.0, 0.5))
        outputs = torch.func.functional_call(net, sampled, (x,))
        with (
            pyro.plate("data", len(x)),
            poutine.scale(scale=1.0 if weights is None else weights),
            poutine.mask(mask=True if mask is None else mask),
        ):
            if likelihood == "regression":
                pyro.sample("y", dist.Normal(outputs, noise).to_event(1), obs=y)
            else:
                pyro.sample("y", dist.Categorical(logits=outputs), obs=y)

    return model


def mlp(num_outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, num_outputs))


def cnn(num_outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 4, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4 * 2 * 2, num_outputs),
    )


def narrow(num_outputs: int) -> nn.Sequential:
    """One channel out: its bias is a scalar at many positions."""
    return nn.Sequential(
        nn.Conv2d(2, 1, 2, dilation=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4 * 2, num_outputs),
    )


def sequence(num_outputs: int) -> nn.Sequential:
    """A linear layer with an axis of positions."""
    return nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(5 * 4, num_outputs)
    )


INPUTS = {
    "mlp": (mlp, (4,)),
    "cnn": (cnn, (2, 6, 6)),
    "narrow": (narrow, (2, 6, 4)),
    "sequence": (sequence, (5, 3)),
}


def labels(likelihood: str, num_outputs: int, count: int = NUM_DATA) -> Tensor:
    if likelihood == "regression":
        return torch.randn(count, num_outputs)
    return torch.randint(num_outputs, (count,))


def at_map_of(model: Model, net: nn.Module, *args: Any) -> ModelAtMAP:
    pyro.clear_param_store()
    guide = AutoSubnetLaplace(model, init_loc_fn=init_to_module(net))
    guide(*args)
    return guide.at_map


def curvature_of(
    at_map: ModelAtMAP, data: Data, kind: Curvature = "ggn", **options: Any
) -> SubnetCurvature:
    """Both parts of the precision, the likelihood's in Kronecker factors."""
    wanted = FitOptions(kind, covariance="kron")
    everything = at_map.latents.everything
    return subnet_curvature(at_map, everything, data, wanted, **options)


def factors_at(
    at_map: ModelAtMAP, data: Data, kind: Curvature = "ggn", **options: Any
) -> KroneckerFactors:
    return curvature_of(at_map, data, kind, **options).likelihood.ggn


def factors(model: Model, net: nn.Module, *args: Any, **options: Any) -> Any:
    at_map = at_map_of(model, net, *args)
    return factors_at(at_map, Data.single(args, {}), **options)


def form_of(curvature: SubnetCurvature, layout: Layout) -> KroneckerForm:
    return KroneckerForm.of(curvature.likelihood.ggn, curvature.prior, layout)


def gaussian_of(curvature: SubnetCurvature, at_map: ModelAtMAP) -> KroneckerGaussian:
    latents = at_map.latents
    return form_of(curvature, latents.layout).gaussian(latents.loc)


def full_ggn(at_map: ModelAtMAP, data: Data) -> Tensor:
    """The likelihood's part without Kronecker factors."""
    everything, options = at_map.latents.everything, FitOptions(form="primal")
    lower = subnet_curvature(at_map, everything, data, options).likelihood.ggn
    return lower.tril() + lower.tril(-1).mT


def dense(ggn: KroneckerFactors) -> Tensor:
    """The likelihood's part as a matrix."""
    found = ggn.diagonal.diag()
    for block in ggn.blocks:
        at = block.positions.flatten()
        found[at.unsqueeze(1), at] = torch.kron(block.output, block.input).double()
    return found


def information_root(likelihood: str, logits: Tensor) -> Tensor:
    """R with R^T R = Λ, by an eigendecomposition of Λ."""
    if likelihood == "regression":
        return torch.eye(len(logits)) / NOISE_SCALE
    p = logits.softmax(0)
    values, vectors = torch.linalg.eigh(p.diag() - p.outer(p))
    return values.clamp(min=0).sqrt().unsqueeze(1) * vectors.mT


def expected_factors(
    net: nn.Sequential, x: Tensor, likelihood: str, weights: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each layer with weights, by loops over data and positions."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for at, layer in enumerate(net):
        if not hasattr(layer, "weight"):
            continue
        width = layer.weight[0].numel()
        a, b = torch.zeros(width, width), torch.zeros(2 * [len(layer.weight)])
        total = 0.0
        for datum, weight in zip(x, weights, strict=True):
            inputs = net[:at](datum.unsqueeze(0))
            output = layer(inputs)
            logits, rest = net[at + 1 :](output).squeeze(0), net[at + 1 :]
            jac = torch.autograd.functional.jacobian(rest, output)
            if isinstance(layer, nn.Conv2d):
                jac = jac.reshape(len(logits), len(layer.weight), -1)
                options: Any = {
                    name: getattr(layer, name)
                    for name in ("kernel_size", "dilation", "padding", "stride")
                }
                patches = F.unfold(inputs, **options)
            else:
                jac = jac.reshape(len(logits), -1, len(layer.weight)).mT
                patches = inputs.reshape(1, -1, width).mT
            jac = torch.einsum("rc,cot->rot", information_root(likelihood, logits), jac)
            for t in range(patches.shape[-1]):
                a += weight * patches[0, :, t].outer(patches[0, :, t])
                b += weight * jac[..., t].mT @ jac[..., t]
                total += float(weight)
        found[str(at)] = (a / total, b)
    return found


def check_blocks(
    ggn: KroneckerFactors,
    expected: dict[str, tuple[Tensor, Tensor]],
    **bounds: Any,
) -> None:
    blocks = {block.site: block for block in ggn.blocks}
    assert set(blocks) == {f"{k}.{part}" for k in expected for part in PARTS}
    for name, (a, b) in expected.items():
        weight, bias = blocks[f"{name}.weight"], blocks[f"{name}.bias"]
        assert_close(weight.input, a.to(weight.input), **bounds)
        assert_close(weight.output, b.to(weight.input), **bounds)
        assert_close(bias.output, b.to(weight.input), **bounds)
        assert_close(bias.input, torch.ones_like(bias.input))
        assert bool((weight.positions.diff(dim=1) == 1).all())  # as the weight lies


PARTS = ("weight", "bias")


@pytest.mark.parametrize("network", list(INPUTS))
@pytest.mark.parametrize("likelihood", ["regression", "classification"])
@pytest.mark.parametrize("num_outputs", [1, 3])
def test_factors_are_those_of_loops(
    network: str, likelihood: str, num_outputs: int
) -> None:
    make, shape = INPUTS[network]
    net, x = make(num_outputs), torch.randn(NUM_DATA, *shape)
    y = labels(likelihood, num_outputs)
    ggn = factors(network_model(net, likelihood), net, x, y)
    with torch.no_grad():
        expected = expected_factors(net, x, likelihood, torch.ones(NUM_DATA))
    check_blocks(ggn, expected, **AUTOGRAD)
    assert not bool(ggn.diagonal.any())
    assert_close(ggn.ggn_diagonal(), dense(ggn).diagonal(), **EXACT)


def test_factors_in_float32() -> None:
    net, x, y = cnn(3), torch.randn(NUM_DATA, 2, 6, 6), labels("classification", 3)
    with torch.no_grad():
        expected = expected_factors(net, x, "classification", torch.ones(NUM_DATA))
    torch.set_default_dtype(torch.float32)
    net = net.float()
    ggn = factors(network_model(net, "classification"), net, x.float(), y)
    assert {block.output.dtype for block in ggn.blocks} == {torch.float32}
    check_blocks(ggn, expected, **tolerance(torch.float32))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize(
    ("network", "backend"),
    # BackPACK's convolutions have other factors: those of the inputs are sums over
    # positions, those of the outputs are of gradients summed over them.
    [("mlp", CurvlinopsGGN), ("mlp", BackPackGGN), ("cnn", CurvlinopsGGN)],
)
@pytest.mark.parametrize("likelihood", ["regression", "classification"])
def test_agrees_with_laplace_torch(
    network: str, likelihood: str, backend: type
) -> None:
    make, shape = INPUTS[network]
    net, x, y = make(3), torch.randn(NUM_DATA, *shape), labels(likelihood, 3)
    model = network_model(net, likelihood)
    at_map = at_map_of(model, net, x, y)
    ours = gaussian_of(curvature_of(at_map, Data.single((x, y), {})), at_map)
    noise = {"sigma_noise": NOISE_SCALE} if likelihood == "regression" else {}
    theirs = Laplace(
        deepcopy(net),
        likelihood,  # type: ignore[arg-type]
        subset_of_weights="all",
        hessian_structure="kron",
        prior_precision=PRIOR_SCALE**-2,
        backend=backend,
        **noise,
    )
    theirs.fit(DataLoader(TensorDataset(x, y), batch_size=4))
    offsets = at_map.latents.layout.offsets
    order = torch.cat(
        [torch.arange(w.numel()) + offsets[name] for name, w in net.named_parameters()]
    )
    found = ours.precision_matrix()[order][:, order]
    assert_close(found, theirs.posterior_precision.to_matrix(), **AUTOGRAD)
    assert_close(2 * ours.half_log_det(), theirs.posterior_precision.logdet())


@pytest.mark.parametrize("likelihood", ["regression", "classification"])
def test_one_observation_is_exact_within_blocks(likelihood: str) -> None:
    net, x, y = mlp(3), torch.randn(1, 4), labels(likelihood, 3, 1)
    model = network_model(net, likelihood)
    at_map = at_map_of(model, net, x, y)
    data = Data.single((x, y), {})
    found, full = dense(factors_at(at_map, data)), full_ggn(at_map, data)
    start = 0
    for size in at_map.latents.layout.sizes:
        own = slice(start, start + size)
        assert_close(found[own, own], full[own, own], **EXACT)
        start += size


def test_a_transposed_convolution_of_one_position_is_exact_for_one_row() -> None:
    net = nn.ConvTranspose1d(2, 3, 3, bias=False)
    x, y = torch.randn(1, 2, 1), torch.randn(1, 3, 3)

    def model(x: Tensor, y: Tensor) -> None:
        kernel = dist.Normal(torch.zeros(2, 3, 3), 1.0).to_event(3)
        out = F.conv_transpose1d(x, pyro.sample("weight", kernel))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(torch.sin(out), 1.0).to_event(2), obs=y)

    at_map = at_map_of(model, net, x, y)
    data = Data.single((x, y), {})
    found = factors_at(at_map, data)
    assert len(found.blocks) == 1
    assert_close(dense(found), full_ggn(at_map, data), **EXACT)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_what_a_sum_adds_has_its_exact_block(
    shape: tuple[int, ...], sign: float
) -> None:
    """At many positions too, where a layer's bias takes them for data."""
    x, y = torch.randn(NUM_DATA, 2, 3), torch.randn(NUM_DATA, 2, 3)

    def model(x: Tensor, y: Tensor) -> None:
        base = dist.Normal(torch.zeros(shape), 1.0)
        shift = pyro.sample("shift", base.to_event(len(shape)))
        out = torch.sin(x + shift if sign > 0 else x - shift)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(out.cumsum(-1), 1.0).to_event(2), obs=y)

    pyro.clear_param_store()
    guide = AutoSubnetLaplace(model)
    guide(x, y)
    at_map, data = guide.at_map, Data.single((x, y), {})
    found = factors_at(at_map, data)
    assert len(found.blocks) == 1
    assert_close(dense(found), full_ggn(at_map, data), **EXACT)


def test_two_observed_sites_add_up() -> None:
    """Where both reach a layer, and where one does not."""
    net, x = mlp(3), torch.randn(NUM_DATA, 4)
    y, z = torch.randn(NUM_DATA, 3), torch.randint(2, (NUM_DATA,))
    found = dict(net.named_parameters())

    def model(x: Tensor, y: Tensor, z: Tensor) -> None:
        sampled = {
            name: pyro.sample(name, dist.Normal(0.0, 1.0).expand(w.shape).to_event())
            for name, w in found.items()
        }
        hidden = torch.tanh(F.linear(x, sampled["0.weight"], sampled["0.bias"]))
        out = F.linear(hidden, sampled["2.weight"], sampled["2.bias"])
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(out, 1.0).to_event(1), obs=y)
            pyro.sample("z", dist.Bernoulli(logits=hidden.sum(-1)), obs=z.double())

    ggn = factors(model, net, x, y, z)
    blocks = {block.site: block for block in ggn.blocks}
    hidden = net[:2](x).detach()
    slope = 1 - hidden.square()
    p = hidden.sum(-1).sigmoid()
    direct = slope * (p * (1 - p)).sqrt().unsqueeze(1)
    through = slope.unsqueeze(1) * net[2].weight.detach()
    expected = direct.mT @ direct + through.flatten(0, 1).mT @ through.flatten(0, 1)
    assert_close(blocks["0.weight"].output, expected, **AUTOGRAD)
    assert_close(blocks["0.weight"].input, x.mT @ x / NUM_DATA, **AUTOGRAD)
    assert_close(blocks["2.weight"].output, NUM_DATA * torch.eye(3), **AUTOGRAD)


def test_linear_regression_is_exact() -> None:
    """Output gradients are the same for all inputs: A and B are unrelated."""
    net, x = nn.Linear(3, 2, bias=False), torch.randn(NUM_DATA, 3)
    y = labels("regression", 2)
    model = network_model(net)
    found = dense(factors(model, net, x, y))
    gram = x.mT @ x / NOISE_SCALE**2
    assert_close(found, torch.kron(torch.eye(2), gram), **EXACT)


@pytest.mark.parametrize("sizes", [(4, 4, 3), (1, 10), (11,)])
@pytest.mark.parametrize("kind", ["ggn", "ef"])
def test_batches_add_up(sizes: tuple[int, ...], kind: Any) -> None:
    net, x = cnn(3), torch.randn(NUM_DATA, 2, 6, 6)
    y = labels("classification", 3)
    model = network_model(net, "classification")
    at_map = at_map_of(model, net, x, y)
    whole = factors_at(at_map, Data.single((x, y), {}), kind)
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    parts = factors_at(at_map, Data(batches, whole=False), kind)
    # The same with a budget that one observation exceeds.
    groups = factors_at(at_map, Data.single((x, y), {}), kind, budget=1)
    bounds = tolerance(torch.float64, "reordered")
    for other in (parts, groups):
        assert_close(dense(other), dense(whole), **bounds)


def test_the_number_of_data_scales_the_sum() -> None:
    net, x, y = mlp(3), torch.randn(NUM_DATA, 4), labels("regression", 3)
    model = network_model(net)
    at_map = at_map_of(model, net, x, y)
    one = factors_at(at_map, Data.single((x, y), {}))
    data = Data([(x, y)], whole=False, num_data=10 * NUM_DATA)
    assert_close(dense(factors_at(at_map, data)), 10 * dense(one), **EXACT)


@pytest.mark.parametrize("forgetting", [1.0, 0.25])
def test_more_data_are_those_of_one_pass(forgetting: float) -> None:
    net, x = cnn(3), torch.randn(NUM_DATA, 2, 6, 6)
    y = labels("classification", 3)
    weights = torch.ones(NUM_DATA)
    weights[:4] = forgetting
    model = network_model(net, "classification")
    at_map = at_map_of(model, net, x, y)
    latents = at_map.latents

    def seen(*args: Any) -> SubnetCurvature:
        return curvature_of(at_map, Data.single(args, {}))

    more = seen(x[4:], y[4:]).likelihood.ggn
    form = form_of(seen(x[:4], y[:4]), latents.layout)
    found = form.updated(more, 1.0, forgetting=forgetting)
    expected = form_of(seen(x, y, weights), latents.layout)
    assert_close(
        found.gaussian(latents.loc).precision_matrix(),
        expected.gaussian(latents.loc).precision_matrix(),
        **tolerance(torch.float64, "reordered"),
    )
    with pytest.raises(ModelError, match=r"the same 6 Kronecker blocks; got 5"):
        found.updated(replace(more, blocks=more.blocks[1:]), 1.0)
    other = (more.blocks[1], more.blocks[0], *more.blocks[2:])
    with pytest.raises(ModelError, match=r"got a change \(site '5.bias' in other"):
        found.updated(replace(more, blocks=other), 1.0)


@pytest.mark.cuda
def test_factors_on_a_gpu() -> None:
    net, x, y = cnn(3), torch.randn(NUM_DATA, 2, 6, 6), labels("classification", 3)
    here = factors(network_model(net, "classification"), net, x, y)
    net, x, y = net.cuda(), x.cuda(), y.cuda()
    model = network_model(net, "classification")
    at_map = at_map_of(model, net, x, y)
    there = curvature_of(at_map, Data.single((x, y), {}))
    assert_close(dense(there.likelihood.ggn).cpu(), dense(here), **AUTOGRAD)
    gaussian = gaussian_of(there, at_map)
    assert gaussian.draw(torch.randn(2, gaussian.size).cuda()).is_cuda
    assert gaussian.variance().is_cuda


def test_empirical_fisher_factors() -> None:
    """With a row per observation: the gradient of its log density."""
    net, x, y = mlp(3), torch.randn(NUM_DATA, 4), labels("classification", 3)
    ggn = factors(network_model(net, "classification"), net, x, y, kind="ef")
    gap = net(x).softmax(-1).detach() - F.one_hot(y, 3)
    block = next(b for b in ggn.blocks if b.site == "2.weight")
    hidden = net[:2](x).detach()
    assert_close(block.output, gap.mT @ gap, **AUTOGRAD)
    assert_close(block.input, hidden.mT @ hidden / NUM_DATA, **AUTOGRAD)


def test_sampled_labels_have_the_factors_for_their_mean() -> None:
    """Many copies of one observation, against the moments over its three labels."""
    count = 20_000
    net, x = nn.Linear(2, 3), torch.randn(1, 2).expand(count, 2)
    y = torch.zeros(count, dtype=torch.long)
    model = network_model(net, "classification")
    at_map = at_map_of(model, net, x, y)
    torch.manual_seed(17)
    ggn = factors_at(at_map, Data.single((x, y), {}), "ggn-mc")
    found = next(b for b in ggn.blocks if b.site == "weight").output / count
    p = net(x[0]).softmax(-1).detach()
    gaps = p - torch.eye(3)
    squares = torch.einsum("yi,yj->yij", gaps, gaps)
    mean = torch.einsum("y,yij->ij", p, squares)
    variance = torch.einsum("y,yij->ij", p, (squares - mean).square())
    error = (found - mean).abs() / (variance / count).sqrt()
    assert float(error.max()) < num_standard_errors(9)


def test_weights_count_as_repetitions() -> None:
    net, x, y = cnn(3), torch.randn(NUM_DATA, 2, 6, 6), labels("classification", 3)
    weights = torch.tensor([1.0, 1.0, 2.0, 3.0, 1.0, 1.0, 2.0, 1.0, 1.0, 2.0, 1.0])
    model = network_model(net, "classification")
    weighted = factors(model, net, x, y, weights)
    often = weights.long()
    repeated = factors(
        model, net, x.repeat_interleave(often, 0), y.repeat_interleave(often, 0)
    )
    assert_close(dense(weighted), dense(repeated), **AUTOGRAD)
    with torch.no_grad():
        expected = expected_factors(net, x, "classification", weights)
    check_blocks(weighted, expected, **AUTOGRAD)


def test_masked_data_leave_no_trace() -> None:
    net, x, y = mlp(3), torch.randn(NUM_DATA, 4), labels("regression", 3)
    mask = torch.arange(NUM_DATA) % 3 > 0
    model = network_model(net)
    masked = factors(model, net, x, y, None, mask)
    other = torch.where(mask.unsqueeze(1), x, 100.0)
    assert_close(dense(factors(model, net, other, y, None, mask)), dense(masked))
    assert_close(dense(masked), dense(factors(model, net, x[mask], y[mask])), **EXACT)


def test_all_masked_is_the_prior() -> None:
    net, x, y = mlp(3), torch.randn(NUM_DATA, 4), labels("regression", 3)
    nothing = torch.zeros(NUM_DATA, dtype=torch.bool)
    assert not bool(dense(factors(network_model(net), net, x, y, None, nothing)).any())


def test_a_latent_noise_scale_has_its_diagonal() -> None:
    net, x, y = mlp(3), torch.randn(NUM_DATA, 4), labels("regression", 3)
    model = network_model(net, latent_noise=True)
    at_map = at_map_of(model, net, x, y)
    data = Data.single((x, y), {})
    curvature = curvature_of(at_map, data)
    ggn = curvature.likelihood.ggn
    names = {name for name, _ in net.named_parameters()}
    assert {block.site for block in ggn.blocks} == names
    expected = diagonal_curvature(at_map, data)
    at = at_map.latents.layout.offsets["noise"]
    # An element's noise scale has information 2 in its logarithm.
    assert_close(float(ggn.diagonal[at]), 2.0 * NUM_DATA * 3, **AUTOGRAD)
    assert_close(ggn.diagonal[at], expected.ggn[at], **EXACT)
    assert_close(curvature.prior.diagonal, expected.prior, **EXACT)


class Mixed(nn.Module):
    """Layers with and without factors."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4)
        self.grouped = nn.Conv1d(4, 4, 2, groups=2)
        self.plain = nn.Parameter(torch.randn(8, 3))
        self.shift = nn.Parameter(torch.randn(3))
        self.curve = nn.Parameter(torch.randn(3))

    def forward(self, words: Tensor) -> Tensor:
        h = self.norm(self.embed(words)).mT
        h = torch.tanh(self.grouped(h)).flatten(1)
        return h @ self.plain + self.shift + self.curve.exp()


def test_other_layers_have_their_exact_diagonal() -> None:
    net, x = Mixed(), torch.randint(6, (NUM_DATA, 3))
    y = labels("regression", 3)
    model = network_model(net)
    at_map = at_map_of(model, net, x, y)
    data, layout = Data.single((x, y), {}), at_map.latents.layout
    ggn = factors_at(at_map, data)
    # `grouped` has no full grid; `curve` enters through another function.
    blocks = {"plain", "shift", "grouped.bias"}
    assert {block.site for block in ggn.blocks} == blocks
    expected = diagonal_curvature(at_map, data).ggn
    for site, start in layout.offsets.items():
        own = slice(start, start + layout.unpack(expected)[site].numel())
        if site not in blocks:
            assert_close(ggn.diagonal[own], expected[own], **EXACT)
    # Sampled matrices in plain products: the grid is (out, in), the site (in, out).
    plain = next(b for b in ggn.blocks if b.site == "plain")
    start = layout.offsets["plain"]
    at = torch.arange(24).view(8, 3).mT + start
    assert torch.equal(plain.positions, at)
    assert_close(plain.output, NUM_DATA * torch.eye(3) / NOISE_SCALE**2, **EXACT)


@pytest.mark.filterwarnings(
    "ignore::pyro_subnet.exceptions.NoKroneckerFactorsWarning",
    "ignore::pyro_subnet.exceptions.MonteCarloFisherWarning",
)
@pytest.mark.parametrize("name", CASES)
def test_what_is_in_no_block_is_exact_in_every_model(name: str) -> None:
    case = CASES[name](DOUBLE)
    guide = case.guide()
    guide(*case.args, **case.kwargs)
    data = Data.single(case.args, case.kwargs)
    curvature = curvature_of(guide.at_map, data)
    found = curvature.likelihood.ggn
    expected = case.ggn().diagonal().clone()
    for block in found.blocks:
        expected[block.positions] = 0.0
    assert_close(found.diagonal, expected, **AUTOGRAD)
    assert_close(curvature.prior.diagonal, case.prior().diagonal(), **AUTOGRAD)
    assert float(torch.linalg.eigvalsh(dense(found)).min()) > -1e-9


class Twice(nn.Module):
    """One matrix in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.w)), self.w)


class Tied(Twice):
    """One matrix and its transpose in two layers."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.w)), self.w.mT)


def test_a_matrix_in_two_layers_has_two_positions() -> None:
    net, x, y = Twice(), torch.randn(NUM_DATA, 3), labels("regression", 3)
    (block,) = factors(network_model(net), net, x, y).blocks
    w = net.w.detach()
    hidden = torch.tanh(x @ w.mT)
    gram = x.mT @ x + hidden.mT @ hidden
    assert_close(block.input, gram / (2 * NUM_DATA), **AUTOGRAD)
    inner = [w @ (1 - h.square()).diag() for h in hidden]
    b = sum((j.mT @ j + torch.eye(3)) / NOISE_SCALE**2 for j in inner)
    assert_close(block.output, b, **AUTOGRAD)


def test_a_tied_transpose_has_its_exact_diagonal() -> None:
    net, x, y = Tied(), torch.randn(NUM_DATA, 3), labels("regression", 3)
    model = network_model(net)
    at_map = at_map_of(model, net, x, y)
    data = Data.single((x, y), {})
    with pytest.warns(NoKroneckerFactorsWarning, match="all 9 elements"):
        ggn = factors_at(at_map, data)
    assert_close(ggn.diagonal, diagonal_curvature(at_map, data).ggn)


def test_one_site_that_holds_two_matrices_has_two_blocks() -> None:
    x, y = torch.randn(NUM_DATA, 3), torch.randn(NUM_DATA, 2)

    def model(x: Tensor, y: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(torch.zeros(15), 1.0).to_event(1))
        h = torch.tanh(x @ theta[:9].view(3, 3))
        with pyro.plate("data", len(x)):
            out = F.linear(h, theta[9:].view(2, 3))
            pyro.sample("y", dist.Normal(out, 1.0).to_event(1), obs=y)

    guide = AutoSubnetLaplace(model)
    guide(x, y)
    ggn = factors_at(guide.at_map, Data.single((x, y), {}))
    spans = [block.positions.flatten().sort().values for block in ggn.blocks]
    assert_close(spans[0], torch.arange(9))
    assert_close(spans[1], torch.arange(9, 15))
    h = torch.tanh(x @ guide.latents.loc[:9].view(3, 3)).detach()
    assert_close(ggn.blocks[1].input, h.mT @ h / NUM_DATA, **AUTOGRAD)


class Centred(nn.Module):
    """A layer that couples data."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def test_coupled_data_are_told_apart() -> None:
    net = nn.Sequential(nn.Linear(4, 3), Centred())
    x, y = torch.randn(NUM_DATA, 4), labels("regression", 3)
    model = network_model(net)
    at_map = at_map_of(model, net, x, y)
    data = Data.single((x, y), {})
    with pytest.warns(NoKroneckerFactorsWarning, match="outputs depend on other data"):
        ggn = factors_at(at_map, data)
    assert_close(ggn.diagonal, diagonal_curvature(at_map, data).ggn)


def test_layers_that_change_are_refused() -> None:
    w = torch.randn(3, 3)

    def model(x: Tensor, y: Tensor, transposed: bool) -> None:
        w_ = pyro.sample("w", dist.Normal(w, 1.0).to_event(2))
        out = F.linear(x, w_) if transposed else x @ w_
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(out, 1.0).to_event(1), obs=y)

    x, y = torch.randn(4, 3), torch.randn(4, 3)
    guide = AutoSubnetLaplace(model)
    guide(x, y, True)
    data = Data([(x, y, True), (x, y, False)], whole=False)
    with pytest.raises(ModelError, match="must enter the same layers in every batch"):
        factors_at(guide.at_map, data)


def test_factors_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, y = mlp(3), torch.randn(NUM_DATA, 4), labels("regression", 3)
    model = network_model(net)
    at_map = at_map_of(model, net, x, y)
    free = SimpleNamespace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    # B and A of 5 and 4, 3 and 5, and B and 1 of 5 and 3, twice.
    needed = 16 * (25 + 16 + 9 + 25 + 25 + 1 + 9 + 1)
    with pytest.raises(MemoryLimitError, match=rf"\(5, 4\) at .*\({needed} bytes\)"):
        factors_at(at_map, Data.single((x, y), {}))


# The Gaussians.


def random_blocks(dtype: torch.dtype = torch.float64) -> tuple[KroneckerBlock, ...]:
    """A matrix whose elements lie transposed, B of low rank, and a vector."""
    generator = torch.Generator().manual_seed(5)

    def gram(size: int, rank: int) -> Tensor:
        root = torch.randn(size, rank, generator=generator, dtype=torch.float64)
        return (root @ root.mT).to(dtype)

    positions = torch.arange(6).view(2, 3).mT
    one = torch.ones(1, 1, dtype=dtype)
    return (
        KroneckerBlock("matrix", positions, gram(3, 2), gram(2, 5), one[0, 0]),
        KroneckerBlock("vector", torch.tensor([[6], [7]]), gram(2, 3), one, one[0, 0]),
    )


DIAGONAL = torch.tensor([0.0] * 8 + [1.7], dtype=torch.float64)
PRIOR = torch.tensor([0.5] * 6 + [0.25] * 2 + [3.0], dtype=torch.float64)


def random_form(
    prior: Tensor = PRIOR, blocks: tuple[KroneckerBlock, ...] | None = None
) -> KroneckerForm:
    ggn = KroneckerFactors(random_blocks() if blocks is None else blocks, DIAGONAL)
    return KroneckerForm.of(ggn, PriorPrecision.of_diagonal(prior), LAYOUT)


def each_of(scales: tuple[float, float, float]) -> Tensor:
    """A factor for each element, from one for each site."""
    return torch.tensor(scales).repeat_interleave(torch.tensor(LAYOUT.sizes))


def dense_precision(scales: tuple[float, float, float]) -> Tensor:
    matrix, vector = random_blocks()
    found = DIAGONAL.diag()
    for block in (matrix, vector):
        at = block.positions.flatten()
        found[at.unsqueeze(1), at] = torch.kron(block.output, block.input)
    return found + (PRIOR * each_of(scales)).diag()


def diagonal_gaussian(loc: Tensor, factor: float | Tensor = 1.0) -> DiagonalGaussian:
    return DiagonalGaussian(loc, (torch.arange(9.0) + PRIOR * factor).to(loc))


def kronecker_gaussian(loc: Tensor, factor: float | Tensor = 1.0) -> KroneckerGaussian:
    return random_form().rescaled(factor).gaussian(loc)


GAUSSIANS = {
    "kron": (kronecker_gaussian, dense_precision),
    "diag": (
        diagonal_gaussian,
        lambda scales: (torch.arange(9.0) + PRIOR * each_of(scales)).diag(),
    ),
}
LOC = torch.linspace(-1.0, 1.0, 9, dtype=torch.float64)


@pytest.fixture(params=list(GAUSSIANS))
def case(request: pytest.FixtureRequest) -> tuple[Callable[..., Any], Any]:
    return GAUSSIANS[request.param]


@pytest.mark.parametrize(
    "scales", [(1.0, 1.0, 1.0), (0.3, 0.3, 0.3), (2.0, 1e-6, 40.0)]
)
def test_gaussian_is_that_of_the_dense_matrix(
    case: Any, scales: tuple[float, float, float]
) -> None:
    make, matrix = case
    factor = scales[0] if len(set(scales)) == 1 else each_of(scales)
    gaussian, expected = make(LOC, factor), matrix(scales)
    covariance = torch.linalg.inv(expected)
    normal = torch.distributions.MultivariateNormal(LOC, precision_matrix=expected)
    values = torch.randn(4, 2, 9)
    jac = torch.randn(3, 9)
    white = gaussian.whiten(jac)
    assert gaussian.size == 9
    assert_close(gaussian.precision_matrix(), expected, **EXACT)
    assert_close(gaussian.precision_diagonal(), expected.diagonal(), **EXACT)
    eigenvalues = torch.linalg.eigvalsh(expected)
    ends = torch.tensor(gaussian.extreme_precisions())
    assert_close(ends, eigenvalues[[0, -1]], **EXACT)
    assert_close(gaussian.covariance_matrix() @ expected, torch.eye(9), **EXACT)
    assert_close(gaussian.variance(), covariance.diagonal(), **EXACT)
    root = gaussian.scale_tril()
    assert_close(root, torch.linalg.cholesky(gaussian.covariance_matrix()), **EXACT)
    assert_close(gaussian.log_prob(values), normal.log_prob(values), **EXACT)
    assert_close(gaussian.entropy(), normal.entropy(), **EXACT)
    assert_close(gaussian.half_log_det(), 0.5 * expected.logdet(), **EXACT)
    assert_close(white @ white.mT, jac @ covariance @ jac.mT, **EXACT)
    assert gaussian.whiten(jac.view(3, 1, 9)).shape == (3, 1, 9)
    assert gaussian.whiten(jac[0]).shape == (9,)
    # Draws are linear in the noise: their matrix M has M M^T = Σ.
    spread = gaussian.draw(torch.eye(9).view(3, 3, 9)).view(9, 9) - LOC
    assert_close(spread.mT @ spread, covariance, **EXACT)


def test_draws_are_undone_by_the_log_density(case: Any) -> None:
    gaussian = case[0](LOC)
    noise = torch.randn(5, 9)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum(-1)
    found = gaussian.log_prob(gaussian.draw(noise)) - gaussian.half_log_det()
    assert_close(found, normal, **EXACT)


def log_det(form: KroneckerForm, factor: Tensor) -> Tensor:
    """As the evidence has it, differentiable, where all else in it is known."""
    nothing = FitSummary(0.0, 0.0, torch.zeros(9), 0.0, 0.0, False)
    one = torch.tensor(1.0)
    constant = 9 * torch.tensor(2 * torch.pi).log() + factor.log().expand(9).sum()
    return constant - 2 * log_evidence(form, nothing, factor, one, one)


def test_log_determinants_of_many_factors() -> None:
    form, matrix = random_form(), dense_precision
    factors_ = torch.tensor([[0.1, 1.0], [3.0, 20.0]])
    found = form.log_det_function(4)(factors_)
    expected = [matrix((s,) * 3).logdet() for s in factors_.flatten().tolist()]
    assert_close(found, torch.stack(expected).view(2, 2), **EXACT)


@pytest.mark.parametrize("factor", [0.1, 1.0, 3.0, 20.0])
def test_gradients_reach_the_factor(factor: float) -> None:
    inverse = torch.linalg.inv(dense_precision((factor,) * 3))
    point = torch.tensor(factor, requires_grad=True)
    (gradient,) = torch.autograd.grad(log_det(random_form(), point), point)
    assert_close(gradient, (inverse.diagonal() * PRIOR).sum(), **EXACT)


def test_gradients_reach_the_factor_of_each_site() -> None:
    form = random_form()
    sizes = torch.tensor(LAYOUT.sizes)

    def of_sites(factors_: Tensor) -> Tensor:
        return log_det(form, factors_.repeat_interleave(sizes))

    point = torch.tensor([0.5, 1.0, 2.0], requires_grad=True)
    assert torch.autograd.gradcheck(of_sites, (point,))


def test_gaussian_keeps_the_type_of_its_mean(case: Any) -> None:
    make, matrix = case
    gaussian = make(LOC.float())
    bounds = tolerance(torch.float32, "closed_form")
    for found in (gaussian.variance(), gaussian.draw(torch.zeros(2, 9).float())):
        assert found.dtype == torch.float32
    dense_ = matrix((1.0, 1.0, 1.0)).float()
    assert_close(gaussian.precision_matrix(), dense_, **bounds)


def test_tensors_go_there_and_back() -> None:
    form = random_form().rescaled(each_of((2.0, 0.5, 4.0)))
    tensors = form.tensors()
    assert all("." not in name for name in tensors)
    assert all(isinstance(tensor, Tensor) for tensor in tensors.values())
    again = KroneckerForm.from_tensors(tensors, LAYOUT)
    found, expected = again.gaussian(LOC), form.gaussian(LOC)
    assert torch.equal(found.variance(), expected.variance())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kronecker_block_3_output_values": None}, "must hold the tensors"),
        (
            {"kronecker_block_0_output_values": torch.ones(2)},
            r"'kronecker_block_0_output_values' must have shape \(3\).*; got \(2,\)",
        ),
        (
            {"kronecker_prior": torch.ones(3)},
            r"'kronecker_prior' must have shape \(43\).*; got \(3,\)",
        ),
    ],
)
def test_tensors_of_other_blocks_are_refused(
    changes: dict[str, Tensor | None], match: str, tmp_path: Path
) -> None:
    net, x, y = mlp(3), torch.randn(NUM_DATA, 4), labels("regression", 3)
    model, path = network_model(net), tmp_path / "posterior"
    pyro.clear_param_store()
    init = init_to_module(net)
    guide = AutoSubnetLaplace(model, covariance="kron", init_loc_fn=init)
    guide.laplace_approximation(x, y).save(path)
    tensors, content = read_file(path, KIND)
    for key in ("kind", "version", "pyro_subnet", "torch", "pyro", "safetensors"):
        content.pop(key)
    changed = {**tensors, **changes}
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    write_file(path, KIND, kept, content)
    with pytest.raises(CheckpointError, match=match):
        AutoSubnetMultivariateNormal.load(path, model, x, y)


def test_a_prior_that_varies_within_a_matrix_is_refused() -> None:
    prior = PRIOR.clone()
    prior[2] = 0.75
    with pytest.raises(ModelError, match=r"got 0.5 to 0.75 at site 'matrix'"):
        random_form(prior)


def test_factors_that_are_none_are_refused() -> None:
    first, second = random_blocks()
    negative = replace(first, input=torch.tensor([[1.0, 0.0], [0.0, -0.1]]))
    with pytest.raises(PrecisionError, match=r"eigenvalue -1.000e-01 at site 'matrix'"):
        random_form(blocks=(negative, second))
    nan = replace(first, output=first.output * torch.nan)
    with pytest.raises(NonFiniteError, match="at site 'matrix'"):
        random_form(blocks=(nan, second))


def test_round_off_below_zero_is_none() -> None:
    """A factor of rank one in float32 has tiny negative eigenvalues."""
    root = torch.linspace(-1, 1, 40)
    gram = root.outer(root).float()
    one = torch.ones(1, 1).float()
    block = KroneckerBlock("w", torch.arange(40).view(40, 1), gram, one, one[0, 0])
    layout = Layout(("w",), (torch.Size([40]),))
    ggn = KroneckerFactors((block,), torch.zeros(40))
    found = KroneckerForm.of(ggn, PriorPrecision.of_diagonal(torch.ones(40)), layout)
    assert float(torch.linalg.eigvalsh(gram.double()).min()) < 0
    assert float(found.blocks[0].output_values.min()) == 0


def test_precisions_that_are_none_are_refused() -> None:
    prior = PRIOR.clone()
    prior[8] = -9.0
    with pytest.raises(PrecisionError, match=r"eigenvalue -\d.*at site 'scale'"):
        random_form(prior)
    prior[8] = torch.nan
    with pytest.raises(NonFiniteError, match="got nan at site 'scale'"):
        random_form(prior)


def test_factors_at_which_there_is_no_precision_are_refused() -> None:
    """The data curve by 1.7 where this prior takes 1 away."""
    prior = PRIOR.clone()
    prior[8] = -1.0
    form, match = random_form(prior), r"eigenvalue -3.000e-01 at site 'scale'"
    with pytest.raises(PrecisionError, match=match):
        form.rescaled(2.0)
    with pytest.raises(PrecisionError, match=match):
        form.log_det_function(1)(torch.tensor(2.0))


def test_no_curvature_at_all_is_refused() -> None:
    with pytest.raises(PrecisionError, match="at site 'matrix'"):
        random_form(torch.where(PRIOR == 0.5, 0.0, PRIOR))


def test_draws_have_the_moments_of_the_posterior() -> None:
    gaussian = kronecker_gaussian(LOC)
    count = 20_000
    generator = torch.Generator().manual_seed(11)
    draws = gaussian.draw(torch.randn(count, 9, generator=generator))
    error = (draws.mean(0) - LOC) / (gaussian.variance() / count).sqrt()
    assert float(error.abs().max()) < num_standard_errors(9)


# The selector.


@pytest.mark.filterwarnings("ignore::pyro_subnet.exceptions.NoOutputVarianceWarning")
def test_largest_variance_under_kronecker_factors() -> None:
    net, x, y = mlp(3), torch.randn(NUM_DATA, 4), labels("classification", 3)
    x[:, 2] = 0.0  # an input that is zero in all data
    model = network_model(net, "classification")
    pyro.clear_param_store()
    guide = AutoSubnetLaplace(
        model,
        LargestVariance(12, estimator="kfac"),
        init_loc_fn=init_to_module(net),
    )
    subnet = guide.laplace_approximation(x, y).subnet
    latents = guide.latents
    curvature = curvature_of(guide.at_map, Data.single((x, y), {}))
    full = dense(curvature.likelihood.ggn) + curvature.prior.diagonal.diag()
    variance = torch.linalg.inv(full).diagonal()
    expected = variance.argsort(descending=True)
    idle = latents.layout.offsets["0.weight"] + 4 * torch.arange(5) + 2
    # Ties: the weights that move no output come first, at the prior's variance.
    assert set(idle.tolist()) <= set(subnet.flat.tolist())
    assert set(subnet.flat.tolist()) == set(expected[:12].tolist())
    without = LargestVariance(12, estimator="kfac", keep_dead=False)
    chosen = without(guide, Data.single((x, y), {})).flat
    assert not set(chosen.tolist()) & set(idle.tolist())
