"""Work on one triangle in place, against dense float64, and its memory."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import Tensor
from torch.testing import assert_close

from pyro_subnet.tensors.triangular import (
    add_gram_,
    cholesky_,
    mirror_,
    multiply_rows,
    solve_rows_,
)
from tests.cases import draw
from tests.tolerances import tolerance

# Halving stops at 128 (on a GPU at 512), 512 rows are solved or mirrored at once.
SIZES = [1, 2, 127, 128, 129, 256, 257, 300, 1100]
# Side up to which LAPACK factors the whole. Beyond it a matrix is halved, and a half
# above 1024 again: the left one of the first size, both of the second.
WHOLE = 2048
HALVED, TWICE_HALVED = WHOLE + 1, 2500
STATUS = Path("/proc/self/status")


def positive_definite(size: int) -> Tensor:
    """A well-conditioned precision, float64."""
    rank = size + 3 if size < WHOLE else 100
    root = draw(size, size, rank) / math.sqrt(size)
    return root @ root.T + torch.eye(size, dtype=torch.float64)


def above(like: Tensor) -> Tensor:
    """A strict upper triangle that no arithmetic would leave as it is."""
    odd = torch.tensor([math.nan, -0.0, math.inf, -1e-30, 3.0])
    return odd.to(like).repeat(like.numel())[: like.numel()].view_as(like).triu(1)


def with_upper(lower: Tensor, upper: Tensor) -> Tensor:
    """A matrix of two triangles; the first has the diagonal."""
    is_lower = torch.ones_like(lower, dtype=torch.bool).tril()
    return torch.where(is_lower, lower, upper)


def assert_upper_is(matrix: Tensor, upper: Tensor) -> None:
    """Compares strict upper triangles bit by bit."""
    strict = torch.ones_like(matrix, dtype=torch.bool).triu(1)
    bits = {torch.float32: torch.int32, torch.float64: torch.int64}[matrix.dtype]
    found, expected = matrix[strict].view(bits), upper[strict].view(bits)
    assert_close(found, expected, rtol=0, atol=0)


def is_close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    """Compares values, and checks that the dtype was kept."""
    assert ours.dtype == dtype
    assert_close(ours.cpu().double(), theirs, **tolerance(dtype, "closed_form"))


def check_gram(size: int, num_rows: int, like: Tensor) -> None:
    before, rows = draw(1, size, size), draw(2, num_rows, size)
    rows /= math.sqrt(max(num_rows, 1))
    expected = before + 0.5 * torch.from_numpy(rows.numpy().T @ rows.numpy())
    upper = above(before.to(like))
    lower = with_upper(before.to(like), upper)
    add_gram_(lower, rows.to(like), alpha=0.5)
    is_close(lower.tril(), expected.tril(), like.dtype)
    assert_upper_is(lower, upper)


def check_factor(size: int, like: Tensor) -> None:
    precision = positive_definite(size)
    upper = above(precision.to(like))
    lower = with_upper(precision.to(like), upper)
    assert cholesky_(lower) == 0
    expected = torch.from_numpy(np.linalg.cholesky(precision.numpy()))
    is_close(lower.tril(), expected, like.dtype)
    assert_upper_is(lower, upper)


def check_products(size: int, num_rows: int, like: Tensor) -> None:
    factor, rows = torch.linalg.cholesky(positive_definite(size)), draw(3, 4, size)
    rows = rows.repeat(num_rows, 1)[:num_rows] / math.sqrt(size)
    lower = with_upper(factor, above(factor)).to(like)
    product = multiply_rows(rows.to(like), lower)
    is_close(product, torch.from_numpy(rows.numpy() @ factor.numpy()), like.dtype)
    solved = rows.to(like).clone()
    solve_rows_(lower, solved)
    expected = linalg.solve_triangular(factor.numpy(), rows.numpy().T, lower=True).T
    is_close(solved, torch.from_numpy(expected.copy()), like.dtype)


def check_mirror(size: int, like: Tensor) -> None:
    matrix = draw(4, size, size).to(like)
    down, up = matrix.clone(), matrix.clone()
    mirror_(down)
    mirror_(up.mT)
    exact = {"rtol": 0.0, "atol": 0.0}
    assert_close(down, matrix.tril() + matrix.tril(-1).mT, **exact)
    assert_close(up, matrix.triu() + matrix.triu(1).mT, **exact)


@pytest.mark.parametrize("size", SIZES)
def test_triangles(size: int, dtype: torch.dtype, device: torch.device) -> None:
    like = torch.empty((), dtype=dtype, device=device)
    for num_rows in (0, 1, 5, 600):
        check_gram(size, num_rows, like)
        check_products(size, num_rows, like)
    check_factor(size, like)
    check_mirror(size, like)


@pytest.mark.parametrize("size", [HALVED, TWICE_HALVED])
def test_a_factor_in_blocks(
    size: int, dtype: torch.dtype, device: torch.device
) -> None:
    check_factor(size, torch.empty((), dtype=dtype, device=device))


@pytest.mark.parametrize(
    "view",
    [
        lambda rows: rows.T.contiguous().T,
        lambda rows: torch.stack([rows, rows], dim=2)[:, :, 1],
        lambda rows: torch.cat([rows, rows], dim=1)[:, : rows.shape[1]],
        lambda rows: rows.flip(0).flip(0),
        lambda rows: rows[:1].expand(7, -1),
    ],
    ids=["columns", "strided", "sliced", "flipped", "expanded"],
)
def test_rows_that_are_not_contiguous(view: Callable[[Tensor], Tensor]) -> None:
    rows = view(draw(5, 7, 300))
    lower = torch.zeros(300, 300, dtype=torch.float64)
    add_gram_(lower, rows)
    is_close(lower, (rows.T @ rows).tril(), torch.float64)


@pytest.mark.parametrize("size", [300, HALVED])
def test_a_matrix_that_is_a_view_of_a_larger_one(size: int) -> None:
    whole = torch.zeros(size + 15, size + 25, dtype=torch.float64)
    part = whole[3 : size + 3, 9 : size + 9]
    part.copy_(positive_definite(size))
    add_gram_(part, draw(6, 4, size))
    precision = part.tril() + part.tril(-1).mT
    mirror_(part)
    is_close(part, precision, torch.float64)
    assert cholesky_(part) == 0
    is_close(part.tril(), torch.linalg.cholesky(precision), torch.float64)
    part.zero_()
    assert_close(whole, torch.zeros_like(whole), rtol=0.0, atol=0.0)


def check_failure(size: int, orders: Iterable[int], dtype: torch.dtype) -> None:
    """The leading minor of each order fails, and no smaller one."""
    precision = positive_definite(size).to(dtype)
    diagonal = precision.diagonal().clone()
    for order in orders:
        # No smaller minor holds this entry.
        precision.diagonal().copy_(diagonal)
        precision[order - 1 :: 3, order - 1 :: 3].diagonal().neg_()
        assert cholesky_(precision.clone()) == order
        assert int(torch.linalg.cholesky_ex(precision).info) == order


def test_the_first_minor_that_fails_is_named(dtype: torch.dtype) -> None:
    check_failure(25, range(1, 26), dtype)
    check_failure(300, (1, 128, 129, 257, 299, 300), dtype)


@pytest.mark.parametrize("orders", [(1, 640, 641, 1152), (1153, 2048, 2049)])
def test_the_first_minor_that_fails_in_blocks_is_named(
    orders: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Halves of 1152 and 897, the first one in halves of 640 and 512."""
    check_failure(HALVED, orders, dtype)


@pytest.mark.parametrize("size", [25, HALVED])
def test_a_singular_matrix_fails(size: int) -> None:
    precision = positive_definite(size)
    place = 4 * size // 5
    precision[place, :] = precision[:, place] = 0.0
    assert cholesky_(precision) == place + 1


def check_what_is_not_finite(precision: Tensor, row: int, column: int) -> None:
    """NaN and infinities at one place."""
    for bad in (math.nan, math.inf, -math.inf):
        changed = precision.clone()
        changed[row, column] = bad
        failed = cholesky_(changed)
        assert failed or not bool(changed.diagonal().isfinite().all())


def test_what_is_not_finite_fails_or_shows_on_the_diagonal(dtype: torch.dtype) -> None:
    for size in (8, 25):
        precision = positive_definite(size).to(dtype)
        for row in range(size):
            for column in range(row + 1):
                check_what_is_not_finite(precision, row, column)


@pytest.mark.parametrize(
    ("row", "column"), [(300, 300), (900, 20), (1100, 700), (1500, 400), (2048, 1700)]
)
def test_what_is_not_finite_in_a_block_fails_or_shows_on_the_diagonal(
    row: int, column: int, dtype: torch.dtype
) -> None:
    """In each triangle, and in each block below them."""
    check_what_is_not_finite(positive_definite(HALVED).to(dtype), row, column)


@pytest.mark.parametrize(("size", "fast_mode"), [(20, False), (150, True)])
def test_a_product_is_differentiable(size: int, fast_mode: bool) -> None:
    """Along one direction alone where the matrix is large enough to be halved."""
    rows = draw(7, 3, size).requires_grad_()
    lower = torch.linalg.cholesky(positive_definite(size)).requires_grad_()
    inputs = (rows, lower)
    assert torch.autograd.gradcheck(multiply_rows, inputs, fast_mode=fast_mode)


@pytest.mark.parametrize("batch_size", [100, 1000])
def test_float32_sums_do_not_drift(batch_size: int) -> None:
    """1e5 rows: twice the error in the docstring, and no bias of the diagonal."""
    rows = draw(8, 100_000, 200).float()
    exact = rows.double().T @ rows.double()
    total = torch.zeros(200, 200)
    for batch in rows.split(batch_size):
        add_gram_(total, batch)
    scale = exact.diagonal().sqrt()
    relative = ((total.double() - exact) / scale / scale[:, None]).tril()
    assert relative.abs().max() < 3.4e-6
    assert relative.diagonal().mean().abs() < 3e-7


# ----------------------------------------------------------------------------------
# Memory, in a process of its own: what a fit and its posterior take beside the data.

PEAK = """
import sys
from pathlib import Path

import pyro.distributions as dist
import torch
import pyro
from pyro_subnet import AutoSubnetLaplace

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])

def model(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

def use(size):
    x, y = torch.randn(8, size), torch.randn(8)
    start = peak()
    guide = AutoSubnetLaplace(model)
    posterior = guide.laplace_approximation(x, y)
    print("fit", (peak() - start) / (4 * size**2))
    normal = posterior.get_posterior()
    normal.log_prob(normal.rsample((3,)))
    normal.variance, normal.entropy()
    posterior.output_distribution(x)
    posterior(x)
    print("use", (peak() - start) / (4 * size**2))
    posterior.with_prior_precision(2.0)
    print("scaled", (peak() - start) / (4 * size**2))

torch.set_num_threads(1)
use(300)  # loads what is loaded at first use
print("size", sys.argv[1])
use(int(sys.argv[1]))
"""


@pytest.mark.skipif(not STATUS.exists(), reason="peak memory is read from /proc")
def test_one_matrix_and_a_quarter_are_enough() -> None:
    """Baseline: what the process took at most before, its libraries loaded."""
    run = subprocess.run(
        [sys.executable, "-c", PEAK, "5000"],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    found = dict(line.split() for line in run.stdout.splitlines()[-3:])
    assert float(found["fit"]) < 1.25
    assert float(found["use"]) < 1.25
    assert float(found["scaled"]) < 2.25
