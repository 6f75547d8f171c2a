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
from pathlib import Path
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
from pyro_subnet.exceptions import MonteCarloFisherWarning
from tests.tolerances import tolerance

Model = Callable[..., Any]
Names = dict[str, Any]

PATH = Path(__file__).resolve().parents[2] / "docs" / "models.md"
TEXT = PATH.read_text(encoding="utf-8")
# As in the options of pytest, which have the reason.
TORCHSCRIPT = "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
AUTOGRAD = tolerance(torch.float64, "autograd")
SUM = tolerance(torch.float64, "reordered")


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


USE, SETTING = blocks(TEXT.split("\n## ")[0])
IDIOMS = {
    section.partition("\n")[0].strip("`"): "".join(blocks(section.split("\n## ")[0]))
    for section in re.split(r"^### ", TEXT, flags=re.MULTILINE)[1:]
}
(MINIBATCHES,) = blocks(TEXT.split("\n## Minibatches")[1])


@contextmanager
def double_precision() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def run(code: str, names: Names) -> Names:
    exec(compile(code, str(PATH), "exec"), names)
    return names


def fitted(code: str) -> Names:
    """What the page's code makes of an idiom's: its names, ``posterior`` among them."""
    names = run(SETTING, {})
    names = run(code, names)
    # Where a section needs a subnet of its own it says so.
    use = USE if "subnet" not in names else USE.replace("subnet=0.5", "subnet=subnet")
    return run(use, names)


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
    scale = torch.as_tensor(node["scale"], dtype=torch.float64)
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
        return total

    potential = initialize_model(names["model"], args, kwargs)[1]

    def negative_log_prior(theta: Tensor) -> Tensor:
        values = unpacked(posterior, theta)
        nodes = trace_at(names, values, prototype).nodes
        log_likelihoods = []
        for name in observed:
            log_prob = nodes[name]["fn"].log_prob(nodes[name]["value"])
            weights = weights_of(nodes[name], log_prob.shape)
            log_likelihoods.append((log_prob * weights).sum())
        return potential(values) + torch.stack(log_likelihoods).sum()

    with sdpa_kernel(SDPBackend.MATH), pyro.validation_enabled(False):
        ggn = dense_hessian(total_divergence, loc)
        precision = dense_hessian(negative_log_prior, loc)
    return ggn, precision


def dense_hessian(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    return torch.autograd.functional.hessian(function, at)


# ----------------------------------------------------------------------------------
# Every idiom.


@pytest.fixture(scope="module", params=IDIOMS)
def names(request: pytest.FixtureRequest) -> Iterator[Names]:
    """An idiom, trained and fitted as the page does."""
    pyro.clear_param_store()
    pyro.set_rng_seed(20110711)
    with double_precision(), warnings.catch_warnings():
        warnings.simplefilter("error", MonteCarloFisherWarning)
        yield fitted(IDIOMS[request.param])


def test_curvature_is_the_oracles(names: Names) -> None:
    ggn, prior = expected_curvature(names)
    posterior = names["posterior"]
    assert float(ggn.abs().max()) > 0.1
    assert_close(posterior.ggn().tril(), ggn.tril(), **AUTOGRAD)
    precision = posterior.get_posterior().precision_matrix
    assert_close(precision, ggn + prior, **AUTOGRAD)


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
    assert_close(found.log_prob_sum(), expected, **SUM)
    assert not set(sites) & set(found.nodes)
    assert set(prototype.observation_nodes) <= set(found.nodes)


def test_minibatches() -> None:
    with double_precision():
        names = run(MINIBATCHES, run(SETTING, {}))
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
    command = [sys.executable, "-W", "error", "-W", TORCHSCRIPT, "-c", program]
    done = subprocess.run(
        command, cwd=PATH.parents[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "effective sample size" in done.stdout
