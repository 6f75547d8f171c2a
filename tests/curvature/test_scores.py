"""The data's gradient by the rows of the curvature, against dense autograd."""

from __future__ import annotations

import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor
from torch.func import hessian
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.exceptions import UntrainedWarning
from pyro_subnet.fit.sums import FitSums
from pyro_subnet.options import FitOptions
from pyro_subnet.tracing.data import Data
from tests.tolerances import num_standard_errors

D, CLASSES = 7, 3


def likelihood(kind: str, f: Tensor) -> Any:
    """A distribution of y whose outputs are linear in the weights."""
    made = {
        "normal": lambda: dist.Normal(f[:, 0], 0.3),
        "normal with a scale": lambda: dist.Normal(f[:, 0], (0.5 * f[:, 1]).exp()),
        "poisson": lambda: dist.Poisson(f[:, 0].exp()),
        "labels": lambda: dist.Bernoulli(logits=f[:, 0]),
        "classes": lambda: dist.Categorical(logits=f),
        "vectors": lambda: dist.Normal(f, 0.7).to_event(1),
    }
    return made[kind]()


KINDS = (
    "normal",
    "normal with a scale",
    "poisson",
    "labels",
    "classes",
    "vectors",
)


class Problem:
    """A generalized linear model at weights that nobody trained."""

    def __init__(self, kind: str, count: int, dtype: torch.dtype):
        torch.manual_seed(3)
        self.kind, self.x = kind, torch.randn(count, D, CLASSES, dtype=dtype)
        self.y = likelihood(kind, torch.randn(count, CLASSES, dtype=dtype)).sample()
        self.w = 0.3 * torch.randn(D, dtype=dtype)

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(D), 0.8).to_event(1))
        f = torch.einsum("nic,i->nc", x, w)
        with pyro.plate("data", len(x)):
            pyro.sample("y", likelihood(self.kind, f), obs=y)

    def guide(self, **options: Any) -> AutoSubnetLaplace:
        start = init_to_value(values={"w": self.w})
        made = AutoSubnetLaplace(self.model, init_loc_fn=start, **options)
        made(self.x, self.y)
        return made

    def log_likelihood(self, w: Tensor) -> Tensor:
        """In float64, by torch alone."""
        f = torch.einsum("nic,i->nc", self.x.double(), w)
        y = self.y.double() if self.y.is_floating_point() else self.y
        return likelihood(self.kind, f).log_prob(y)

    def expected_gain(self) -> float:
        """g' P^-1 g / 2 per observation, the lesser with and without the prior."""
        w = self.w.double().requires_grad_()
        (own,) = torch.autograd.grad(self.log_likelihood(w).sum(), w)
        # The GGN is the Hessian of the divergence from the weights to themselves.
        f = torch.einsum("nic,i->nc", self.x.double(), w.detach())
        at = likelihood(self.kind, f)

        def divergence(v: Tensor) -> Tensor:
            other = likelihood(self.kind, torch.einsum("nic,i->nc", self.x.double(), v))
            return torch.distributions.kl_divergence(at, other).sum()

        precision = hessian(divergence)(w.detach()) + torch.eye(D).double() / 0.8**2
        pulled = own - w.detach() / 0.8**2
        found = [float(g @ torch.linalg.solve(precision, g)) for g in (own, pulled)]
        elements = CLASSES if self.kind == "vectors" else 1
        return 0.5 * min(found) / (len(self.x) * elements)


def departure(problem: Problem, form: Any, batches: Any, **given: Any) -> Any:
    """What the fit finds, and the Gaussian that it is measured by."""
    guide = problem.guide(form=form)
    data = Data(batches, whole=False, **given)
    subnet = guide.latents.everything
    sums = FitSums(guide.at_map, subnet, data, FitOptions(form=form), scores=True)
    found = sums.over(data.calls("Scores"))
    assert found.departure_by is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedWarning)
        posterior = guide.laplace_approximation_from(batches, **given)
    return found.departure_by(posterior.gaussian.whiten), posterior


@pytest.mark.parametrize(
    ("form", "count", "dtype"),
    [("primal", 40, torch.float64), ("dual", 1, torch.float32)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_gain_is_that_of_autograd(
    kind: str, form: Any, count: int, dtype: torch.dtype
) -> None:
    problem = Problem(kind, count, dtype)
    found, _ = departure(problem, form, [(problem.x, problem.y)])
    close = {"rtol": 1e-9 if dtype == torch.float64 else 1e-3, "atol": 1e-6}
    assert_close(found.gain, problem.expected_gain(), **close)


def test_batches_make_no_difference() -> None:
    problem = Problem("normal with a scale", 40, torch.float64)
    x, y = problem.x, problem.y
    whole, _ = departure(problem, "primal", [(x, y)])
    parts, _ = departure(problem, "primal", [(x[:9], y[:9]), (x[9:], y[9:])])
    assert_close(parts.gain, whole.gain)


def test_data_that_stand_for_more_count_so_often() -> None:
    problem = Problem("classes", 40, torch.float64)
    x, y = problem.x, problem.y
    often, _ = departure(problem, "primal", [(x, y)] * 3)
    scaled, _ = departure(problem, "primal", [(x, y)], num_data=120)
    assert_close(scaled.gain, often.gain)


@pytest.mark.parametrize("scale", [1, 10])
@pytest.mark.parametrize("kind", ["normal", "classes"])
def test_chance_is_the_number_of_weights_that_data_determine(
    kind: str, scale: int
) -> None:
    r"""Over draws of s sets of data from the model, of which one is seen: s tr(G P^-1).

    The gradient is s times that of the data seen, and G is s times theirs.
    """
    problem = Problem(kind, 40, torch.float64)
    batches, num_data = [(problem.x, problem.y)], 40 * scale
    found, posterior = departure(problem, "primal", batches, num_data=num_data)
    by_chance = 2 * num_data * found.gain / found.times / scale
    shares = torch.linalg.eigvals(
        torch.linalg.solve(posterior.gaussian.precision_matrix(), posterior.ggn())
    ).real
    # Hutchinson: the variance of z' K z is at most 2 |K|^2; 8 draws.
    error = float((2 * shares.square().sum() / 8).sqrt())
    assert abs(by_chance - float(shares.sum())) < num_standard_errors(4) * error
