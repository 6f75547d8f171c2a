"""The models of docs/models.md, as they stand there, against dense derivatives.

The oracle knows nothing of Jacobians, families or layers: the GGN is the Hessian of the
divergence of the observed distributions from those at the MAP (its gradient is zero
there), and the prior's is that of Pyro's own potential without the observed sites.
"""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.mcmc.util import initialize_model
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to, kl_divergence
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from pyro_subnet import AutoSubnetMultivariateNormal
from pyro_subnet.exceptions import MonteCarloFisherWarning, UntrainedWarning
from tests.docs.pages import ROOT, blocks, run
from tests.tolerances import tolerance

Model = Callable[..., Any]
Names = dict[str, Any]

PATH = ROOT / "docs" / "models.md"
TEXT = PATH.read_text(encoding="utf-8")
DTYPES = {"float32": torch.float32, "float64": torch.float64}
AUTOGRAD = tolerance(torch.float64, "autograd")


USE, SETTING = blocks(TEXT.split("\n## ")[0])
IDIOMS = {
    section.partition("\n")[0].strip("`"): "".join(blocks(section.split("\n## ")[0]))
    for section in re.split(r"^### ", TEXT, flags=re.MULTILINE)[1:]
}
# Their Fisher information is a mean over draws.
MONTE_CARLO = {
    name: IDIOMS.pop(name) for name in ("Zero-inflated counts",) if name in IDIOMS
}
(MINIBATCHES,) = blocks(TEXT.split("\n## Minibatches")[1])


@contextmanager
def precision(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def fitted(code: str) -> Names:
    """What the page's code makes of an idiom's: its names, ``posterior`` among them."""
    names = run(code, **run(SETTING))
    # Where a section needs a subnet of its own it says so.
    use = USE if "subnet" not in names else USE.replace("subnet=0.5", "subnet=subnet")
    if torch.get_default_dtype() == torch.float32:  # once trained is enough
        use = use.replace("range(200)", "range(5)")
    return run(use, **names)


# ----------------------------------------------------------------------------------
# The oracle.


def trace_at(
    names: Names, unconstrained: Mapping[str, Tensor], prototype: poutine.Trace
) -> poutine.Trace:
    values = {
        site: biject_to(prototype.nodes[site]["fn"].support)(u)
        for site, u in unconstrained.items()
    }
    given = poutine.condition(names["model"], data=values)
    return poutine.trace(given).get_trace(*names["args"], **names["kwargs"])


def is_likelihood(node: Any) -> bool:
    return (
        node["type"] == "sample"
        and node["is_observed"]
        and not node["infer"].get("_deterministic")
        and not isinstance(node["fn"], dist.Unit)
        and not site_is_subsample(node)
    )


def is_data_factor(node: Any) -> bool:
    """Whether a site is a factor in a plate, which holds the data."""
    if node["type"] != "sample" or not isinstance(node["fn"], dist.Unit):
        return False
    return bool(node["cond_indep_stack"])


def log_densities(nodes: Mapping[str, Any], names: list[str]) -> list[Tensor]:
    found = []
    for name in names:
        log_prob = nodes[name]["fn"].log_prob(nodes[name]["value"])
        weights = weights_of(nodes[name], log_prob.shape)
        found.append((log_prob * weights).sum())
    return found


def base_of(fn: Any) -> Any:
    while isinstance(fn, dist.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    return fn


def divergence(at_map: Any, here: Any) -> Tensor:
    """KL of each element; of Student's t by the trapezoidal rule."""
    p, q = base_of(at_map), base_of(here)
    if isinstance(p, dist.StudentT):
        z = torch.linspace(-14, 14, 8001)
        t = z.sinh() / 10  # reaches far into the tails
        points = p.loc.unsqueeze(-1) + p.scale.unsqueeze(-1) * t
        log_p, log_q = (
            dist.StudentT(
                d.df.unsqueeze(-1), d.loc.unsqueeze(-1), d.scale.unsqueeze(-1)
            ).log_prob(points)
            for d in (p, q)
        )
        change = p.scale.unsqueeze(-1) * z.cosh() / 10
        return torch.trapezoid(log_p.exp() * (log_p - log_q) * change, z)
    return kl_divergence(p, q)


def weights_of(node: Any, shape: torch.Size) -> Tensor:
    scale = torch.as_tensor(node["scale"], dtype=torch.get_default_dtype())
    mask = torch.as_tensor(True if node["mask"] is None else node["mask"])
    return (scale * mask).expand(shape)


def unpacked(posterior: AutoSubnetMultivariateNormal, theta: Tensor) -> Names:
    layout = posterior.subnet.layout
    packed = posterior.loc.index_put((posterior.subnet.flat,), theta)
    sizes = [shape.numel() for shape in layout.shapes]
    return {
        site: piece.reshape(shape)
        for site, shape, piece in zip(
            layout.names, layout.shapes, packed.split(sizes), strict=True
        )
    }


def expected_curvature(names: Names) -> tuple[Tensor, Tensor]:
    """GGN and prior precision over the subnet."""
    posterior = names["posterior"]
    args, kwargs = names["args"], names["kwargs"]
    loc = posterior.get_posterior().loc
    prototype = poutine.trace(names["model"]).get_trace(*args, **kwargs)
    with torch.no_grad():
        at_map = trace_at(names, unpacked(posterior, loc), prototype)
    # Of the prototype: a condition makes observed sites of all.
    nodes = prototype.nodes
    observed = [name for name, node in nodes.items() if is_likelihood(node)]
    factors = [name for name, node in nodes.items() if is_data_factor(node)]
    assert observed

    def total_divergence(theta: Tensor) -> Tensor:
        here = trace_at(names, unpacked(posterior, theta), prototype)
        total = theta.new_zeros(())
        for name in observed:
            found = divergence(at_map.nodes[name]["fn"], here.nodes[name]["fn"])
            weights = weights_of(
                at_map.nodes[name], at_map.nodes[name]["fn"].batch_shape
            )
            extra = found.ndim - weights.ndim
            total = (
                total + (found * weights.reshape(*weights.shape, *(1,) * extra)).sum()
            )
        # A factor counts by its own Hessian.
        return total - sum(log_densities(here.nodes, factors), total.new_zeros(()))

    potential = initialize_model(names["model"], args, kwargs)[1]

    def negative_log_prior(theta: Tensor) -> Tensor:
        values = unpacked(posterior, theta)
        nodes = trace_at(names, values, prototype).nodes
        found = log_densities(nodes, [*observed, *factors])
        return potential(values) + torch.stack(found).sum()

    with sdpa_kernel(SDPBackend.MATH), pyro.validation_enabled(False):
        ggn = dense_hessian(total_divergence, loc)
        prior = dense_hessian(negative_log_prior, loc)
    return ggn, prior


def dense_hessian(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    return torch.autograd.functional.hessian(function, at)


# ----------------------------------------------------------------------------------
# Every idiom.


@pytest.fixture(
    scope="module",
    params=[(idiom, dtype) for idiom in IDIOMS for dtype in DTYPES],
    ids=", ".join,
)
def names(request: pytest.FixtureRequest) -> Iterator[Names]:
    """An idiom, trained and fitted as the page does."""
    pyro.clear_param_store()
    pyro.set_rng_seed(20110711)
    idiom, dtype = request.param
    with precision(DTYPES[dtype]), warnings.catch_warnings():
        warnings.simplefilter("error", MonteCarloFisherWarning)
        if dtype == "float32":  # which `fitted` hardly trains
            warnings.simplefilter("ignore", UntrainedWarning)
        # peft reads what transformers has renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        yield fitted(IDIOMS[idiom])


def scaled_tolerance(ggn: Tensor) -> dict[str, float]:
    """Entries are sums over the data, which round as the largest of them."""
    close = tolerance(ggn.dtype, "autograd")
    if ggn.dtype == torch.float64:
        return {**close}
    return {"rtol": close["rtol"], "atol": close["atol"] * float(ggn.abs().max())}


def test_curvature_is_the_oracles(names: Names) -> None:
    ggn, prior = expected_curvature(names)
    posterior = names["posterior"]
    assert float(ggn.abs().max()) > 0.1
    close = scaled_tolerance(ggn)
    assert_close(posterior.ggn().tril(), ggn.tril(), **close)
    found = posterior.get_posterior().precision_matrix
    assert_close(found, ggn + prior, **close)


def test_it_predicts(names: Names) -> None:
    draws = names["draws"](*names["args"], **names["kwargs"])
    assert draws
    for name, value in draws.items():
        assert bool(value.isfinite().all()), name
    in_weight_space = Predictive(
        names["model"], guide=names["posterior"], num_samples=3
    )(*names["args"], **names["kwargs"])
    for name, value in in_weight_space.items():
        assert bool(value.isfinite().all()), name


def test_its_hybrid_models_density_is_the_models(names: Names) -> None:
    posterior, args, kwargs = names["posterior"], names["args"], names["kwargs"]
    theta = posterior.get_posterior().loc * 0.9
    prototype = poutine.trace(names["model"]).get_trace(*args, **kwargs)
    sites = unpacked(posterior, theta)
    expected = -initialize_model(names["model"], args, kwargs)[1](sites)
    hybrid = posterior.hybrid_model()
    given = poutine.condition(hybrid, data={"subnet": theta})
    found = poutine.trace(given).get_trace(*args, **kwargs)
    assert_close(found.log_prob_sum(), expected, **tolerance(theta.dtype, "reordered"))
    assert not set(sites) & set(found.nodes)
    assert set(prototype.observation_nodes) <= set(found.nodes)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_zero_inflated_counts_are_fitted_from_draws(dtype: str) -> None:
    """Against the Fisher information as a sum over all counts that may come."""
    with precision(DTYPES[dtype]):
        with pytest.warns(MonteCarloFisherWarning, match="a mean over 4096 draws"):
            names = fitted(MONTE_CARLO["Zero-inflated counts"])
        posterior, (x, _) = names["posterior"], names["args"]
        theta = posterior.get_posterior().loc.detach().double()
        counts = torch.arange(80.0, dtype=torch.float64).unsqueeze(-1)
        x = x.double()

        def log_prob(theta: Tensor) -> Tensor:
            rate, gate = (x @ theta[:3]).exp(), torch.sigmoid(x @ theta[3:] - 1.0)
            found: Tensor = dist.ZeroInflatedPoisson(rate, gate=gate).log_prob(counts)
            return found.flatten()

        scores = torch.autograd.functional.jacobian(log_prob, theta)
        probs = log_prob(theta).exp()
    assert float(probs.sum()) == pytest.approx(len(x), rel=1e-9)
    fisher = (scores * probs.unsqueeze(-1)).mT @ scores
    # Three standard errors of some 3%, if one observation were all that counts.
    gap = torch.linalg.norm(posterior.ggn().double() - fisher)
    assert float(gap / torch.linalg.norm(fisher)) < 0.09


def test_minibatches() -> None:
    with precision(torch.float64):
        names = run(MINIBATCHES, **run(SETTING))
        posterior = names["posterior"]
        one_call = names["guide"].laplace_approximation(names["x"], names["y"])
        names.update(args=(names["x"], names["y"]), posterior=one_call)
        ggn, prior = expected_curvature(names)
    found = posterior.get_posterior().precision_matrix
    assert_close(found, ggn + prior, **AUTOGRAD)


# ----------------------------------------------------------------------------------
# The page on the hybrid model.


CLAIMS = """
assert draws["subnet"].numel() == 300 * 20
assert draws["y"].shape == (300, 200)
assert mcmc.get_samples()["subnet"].shape == (200, 20)
"""


def test_the_page_on_the_hybrid_model() -> None:
    # As users run it: types that are checked in each of a sampler's thousands of calls
    # take several times as long as the calls.
    text = PATH.with_name("hybrid.md").read_text(encoding="utf-8")
    program = "\n".join([*blocks(text), CLAIMS])
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(
        command, cwd=PATH.parents[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "effective sample size" in done.stdout
