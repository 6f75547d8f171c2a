"""Each observation counts once, or the shapes are an error: never N x N elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, to_inference_data
from pyro_subnet.exceptions import ModelError
from pyro_subnet.nn import bayesianize, init_to_module
from tests.cases import draw
from tests.tolerances import tolerance

N, NOISE = 12, 0.5
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
each_way = pytest.mark.parametrize("way", ["plain", "network"])


def regression(
    way: str,
    shape: Callable[[Tensor], Tensor],
    *,
    event: int = 0,
    plate: bool = True,
    dtype: torch.dtype = torch.float64,
) -> tuple[Any, dict[str, Any]]:
    """A linear model whose means (N, 1) go through ``shape``, and guide options.

    The weights are a site of their own, or a pretrained network's.
    """
    net = nn.Linear(3, 1, bias=False, dtype=dtype)
    bnn = bayesianize(net)

    def model(x: Tensor, y: Tensor | None = None, mask: Tensor | bool = True) -> None:
        if way == "network":
            mean = bnn(x)
        else:
            prior = dist.Normal(torch.zeros(3, 1).to(x), 1.0).to_event(2)
            mean = x @ pyro.sample("w", prior)
        fn = dist.Normal(shape(mean), NOISE).to_event(event)
        with poutine.mask(mask=mask):
            if plate:
                with pyro.plate("data", len(x)):
                    pyro.sample("y", fn, obs=y)
            else:
                pyro.sample("y", fn, obs=y)

    start = {"init_loc_fn": init_to_module(net)} if way == "network" else {}
    return model, start


def squeezed(mean: Tensor) -> Tensor:
    """Means of shape (N,)."""
    return mean.squeeze(-1)


def kept(mean: Tensor) -> Tensor:
    """Means of shape (N, 1), a squeeze forgotten."""
    return mean


RIGHT = [
    (squeezed, (N,), {}),
    (kept, (N, 1), {"event": 1}),
    (squeezed, (N,), {"event": 1, "plate": False}),
    (kept, (N, 1), {"event": 2, "plate": False}),
    (squeezed, (N,), {"plate": False}),
    (kept, (N, 1), {"plate": False}),
]
WRONG = [
    (kept, (N,), {}),
    (squeezed, (N, 1), {}),
    (kept, (N, 1), {}),
    (kept, (1, N), {}),
    (kept, (N,), {"event": 2, "plate": False}),
    (kept, (1, N), {"event": 2, "plate": False}),
    (squeezed, (N, 1), {"event": 1, "plate": False}),
    (kept, (N,), {"plate": False}),
]


@each_dtype
@each_way
@pytest.mark.parametrize(("shape", "of_data", "written"), RIGHT)
def test_each_observation_counts_once(
    shape: Any, of_data: tuple[int, ...], written: Any, way: str, dtype: torch.dtype
) -> None:
    model, start = regression(way, shape, dtype=dtype, **written)
    x, y = draw(1, N, 3).to(dtype), draw(2, N).to(dtype)
    posterior = AutoSubnetLaplace(model, **start).laplace_approximation(
        x, y.reshape(of_data)
    )
    wanted = x.T @ x / NOISE**2 + torch.eye(3, dtype=dtype)
    found = posterior.get_posterior().precision_matrix
    assert_close(found, wanted, **tolerance(dtype, "closed_form"))


@each_way
@pytest.mark.parametrize(("shape", "of_data", "written"), WRONG)
def test_data_that_broadcast_are_refused(
    shape: Any, of_data: tuple[int, ...], written: Any, way: str
) -> None:
    model, start = regression(way, shape, **written)
    x, y = draw(1, N, 3), draw(2, N).reshape(of_data)
    guide = AutoSubnetLaplace(model, **start)
    with pytest.raises(ModelError, match=r"(?s)site.*must have.*['\"]y['\"]"):
        guide.laplace_approximation(x, y)


def test_the_words_are_those_of_svi() -> None:
    model, start = regression("network", kept)
    with pytest.raises(
        ModelError, match=r'at site "y", invalid log_prob shape'
    ) as ours:
        AutoSubnetLaplace(model, **start).laplace_approximation(
            draw(1, N, 3), draw(2, N)
        )
    assert f"Expected [{N}], actual [{N}, {N}]" in str(ours.value)
    assert "mean.squeeze(-1)" in str(ours.value)


@pytest.mark.parametrize("count", [1, 2])
def test_one_observation_may_have_an_axis_more(count: int) -> None:
    """With N=1 nothing is repeated; the second observation makes it an error."""
    model, _ = regression("plain", kept)
    x, y = draw(1, count, 3), draw(2, count)
    guide = AutoSubnetLaplace(model)
    if count > 1:
        with pytest.raises(ModelError, match="invalid log_prob shape"):
            guide.laplace_approximation(x, y)
        return
    found = guide.laplace_approximation(x, y).get_posterior().precision_matrix
    wanted = x.T @ x / NOISE**2 + torch.eye(3).double()
    assert_close(found, wanted, **tolerance(torch.float64, "closed_form"))


def test_every_door() -> None:
    """Batches, updates, held-out data, exports and predictions meet the same check."""
    model, start = regression("network", squeezed)
    x, y = draw(1, N, 3), draw(2, N)
    posterior = AutoSubnetLaplace(model, **start).laplace_approximation(x, y)
    wrong = y[:, None]
    batches = list(zip(x.split(5), wrong.split(5), strict=True))
    doors: list[Callable[[], Any]] = [
        lambda: AutoSubnetLaplace(model, **start).laplace_approximation_from(batches),
        lambda: AutoSubnetLaplace(model, 2, **start).laplace_approximation(x, wrong),
        lambda: posterior.update(x, wrong),
        lambda: posterior.update_from(batches),
        lambda: posterior.tune_prior_precision("nll", val=(x, wrong)),
        lambda: posterior.predictive_distribution(x, wrong),
        lambda: to_inference_data(posterior, x, wrong, num_samples=4),
        lambda: posterior.update(x, y, mask=torch.ones(N, 1, dtype=torch.bool)),
    ]
    for door in doors:
        with pytest.raises(ModelError, match=r'at site "y", invalid log_prob shape'):
            door()


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (
            torch.eye(3)[torch.arange(N) % 3],
            r"data of shape \(12, 3\).*y.argmax\(-1\)",
        ),
        ((torch.arange(N) % 3)[:, None], r"Expected \[12\], actual \[12, 12\]"),
        (torch.arange(N)[:5] % 3, r"data of shape \(5,\) at site 'y'"),
        (0.5, r"must be a tensor; got float at site 'y'"),
    ],
)
def test_labels_of_another_shape(labels: Any, said: str) -> None:
    net = nn.Linear(3, 3, dtype=torch.float64)
    bnn = bayesianize(net)

    def model(x: Tensor, y: Any = None) -> None:
        logits = bnn(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    guide = AutoSubnetLaplace(model, init_loc_fn=init_to_module(net))
    with pytest.raises(ModelError, match=rf"(?s){said}"):
        guide.laplace_approximation(draw(1, N, 3), labels)


def test_crossed_plates_and_replicates() -> None:
    """Data (G, R) in two plates; five replicates in one event, with one mean."""
    x = draw(1, 4, 3)

    def model(y: Tensor, wide: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3).to(x), 1.0).to_event(1))
        mean = x @ w
        with pyro.plate("columns", 2, dim=-1), pyro.plate("rows", 4, dim=-2):
            pyro.sample("y", dist.Normal(mean[:, None], NOISE), obs=y)
        with pyro.plate("data", 4):
            fn = dist.Normal(mean[:, None], NOISE).to_event(1)
            pyro.sample("wide", fn, obs=wide)

    posterior = AutoSubnetLaplace(model).laplace_approximation(
        draw(2, 4, 2), draw(3, 4, 5)
    )
    wanted = 7 * x.T @ x / NOISE**2 + torch.eye(3).double()
    found = posterior.get_posterior().precision_matrix
    assert_close(found, wanted, **tolerance(torch.float64, "closed_form"))
