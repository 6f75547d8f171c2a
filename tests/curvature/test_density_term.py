"""Closed forms of normal priors against autograd of the densities that Pyro gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_subnet.curvature.density_term import DensityTerm
from pyro_subnet.curvature.prior import prior_gradient, prior_precision
from pyro_subnet.subnet import Layout, Subnet
from pyro_subnet.tracing.log_prior import prior_term
from tests.cases import draw
from tests.tolerances import tolerance

SHAPE = (3, 2, 4)
NUM_PARAMS = 24
# Out of order, as a selector may give them to a subnet that sorts them.
CHOSEN = torch.tensor([17, 0, 5, 23, 6])


def plain(like: Tensor) -> None:
    """One number for all."""
    prior = dist.Normal(like.new_tensor(0.3), like.new_tensor(0.7))
    pyro.sample("w", prior.expand(SHAPE).to_event(3))


def by_row(like: Tensor) -> None:
    """A mean and a scale for each row, spread over the other axes."""
    loc, scale = draw(1, 2, 1).to(like), draw(2, 3, 1, 1).exp().to(like)
    pyro.sample("w", dist.Normal(loc, scale).expand(SHAPE).to_event(3))


def everywhere(like: Tensor) -> None:
    """A mean and a scale for each element, half of them a batch."""
    loc, scale = draw(1, *SHAPE).to(like), draw(2, *SHAPE).exp().to(like)
    pyro.sample("w", dist.Normal(loc, scale).to_event(1))


def torch_own(like: Tensor) -> None:
    """Torch's own class, which is not Pyro's."""
    base = torch.distributions.Normal(like.new_zeros(SHAPE), 0.7)
    pyro.sample("w", torch.distributions.Independent(base, 3))


def weighted(like: Tensor) -> None:
    """A tempered prior."""
    with poutine.scale(scale=0.25):
        by_row(like)


def traced(model: Callable[[Tensor], None], like: Tensor) -> DensityTerm:
    """The term of the site, at a leaf that needs gradients."""
    leaf = draw(9, *SHAPE).to(like).requires_grad_()
    given = {"w": torch.ones(SHAPE)}  # which torch's own class cannot draw
    with poutine.trace() as tracer, poutine.condition(data=given):
        model(like)
    node = tracer.trace.nodes["w"]
    transform = biject_to(node["fn"].support)
    return prior_term({**node, "value": transform(leaf)}, transform, leaf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model", [plain, by_row, everywhere, torch_own, weighted])
def test_a_normal_prior_has_its_derivatives_in_closed_form(
    model: Callable[[Tensor], None], dtype: torch.dtype
) -> None:
    """Value, gradient and curvature, at some elements and at all."""
    like = torch.empty(0, dtype=dtype)
    term = traced(model, like)
    closed, tight = term.normal, tolerance(dtype, "autograd")
    assert closed is not None
    leaf = closed.value
    (gradient,) = torch.autograd.grad(term.log_density, leaf, create_graph=True)
    (curvature,) = torch.autograd.grad(-gradient.sum(), leaf)
    assert_close(closed.log_density(), term.log_density.item(), **tight)
    assert term.value == closed.log_density()
    for within in (CHOSEN, None):
        at = slice(None) if within is None else within
        assert_close(closed.gradient(within), gradient.detach().flatten()[at], **tight)
        assert_close(closed.curvature(within), curvature.flatten()[at], **tight)


@final
class Narrow(dist.Normal):
    """A class of the user's own, with a density of its own."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Four times the normal's."""
        return 4 * super().log_prob(value)


def masked(like: Tensor) -> Any:
    """Half of the elements are left out."""
    mask = torch.arange(NUM_PARAMS).view(SHAPE) % 2 == 0
    return dist.Normal(like.new_zeros(SHAPE), 0.7).mask(mask).to_event(3)


OTHERS: dict[str, Callable[[Tensor], Any]] = {
    "left out": masked,
    "the user's class": lambda x: Narrow(x.new_zeros(SHAPE), 0.7).to_event(3),
    "not normal": lambda x: dist.Laplace(x.new_zeros(SHAPE), 0.7).to_event(3),
    "transformed": lambda x: dist.LogNormal(x.new_zeros(SHAPE), 0.7).to_event(3),
    "of a learned scale": lambda x: dist.Normal(
        x.new_zeros(SHAPE), x.new_ones(()).requires_grad_()
    ).to_event(3),
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_prior_is_differentiated(name: str) -> None:
    """What the closed form does not describe has none."""
    like = torch.empty(0, dtype=torch.float64)
    term = traced(lambda x: pyro.sample("w", OTHERS[name](x.abs())), like)
    assert term.normal is None
    assert term.value == term.log_density.item()


@final
class _Largest(TorchDispatchMode):
    """Notes the largest tensor that operations make, apart from views of one."""

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self.numel = 0
        self._given = given.data_ptr()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        for tensor in made:
            storage = tensor.untyped_storage()
            if storage.data_ptr() != self._given:
                self.numel = max(self.numel, storage.nbytes() // tensor.itemsize)
        return result


def test_chosen_elements_take_no_memory_of_the_others() -> None:
    """Of a million weights three are chosen, and no tensor has a tenth as many."""
    size = 10**6
    leaf = torch.zeros(size // 100, 100, requires_grad=True)
    prior = dist.Normal(torch.tensor(0.0), torch.tensor(0.5)).expand(leaf.shape)
    with poutine.trace() as tracer, poutine.condition(data={"w": leaf}):
        pyro.sample("w", prior.to_event(2))
    node = tracer.trace.nodes["w"]
    layout = Layout(("w",), (leaf.shape,))
    subnet = Subnet.from_positions(layout, torch.tensor([3, 70_007, 999_999]))
    with _Largest(leaf) as largest:
        terms = [prior_term(node, biject_to(node["fn"].support), leaf)]
        found = prior_precision(terms, {"w": leaf}, subnet, budget=2**20)
        gradient = prior_gradient(terms, {"w": leaf}, subnet)
        value = terms[0].value
    assert_close(found.diagonal, torch.full((3,), 4.0))
    assert_close(gradient, torch.zeros(3))
    assert_close(value, size * dist.Normal(0.0, 0.5).log_prob(torch.tensor(0.0)).item())
    assert largest.numel < size // 10
