"""Standard deviations of linear combinations of weights, against dense covariances."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pyro_subnet.gaussians.base import Gaussian
from pyro_subnet.gaussians.diagonal import DiagonalGaussian
from pyro_subnet.gaussians.dual_gaussian import DualGaussian
from pyro_subnet.gaussians.factored import FactoredGaussian
from pyro_subnet.gaussians.kronecker_gaussian import EigenBlock, KroneckerGaussian
from tests.cases import draw
from tests.tolerances import tolerance

SIZE = 17


def vectors(size: int) -> Tensor:
    return torch.linalg.qr(draw(size, size, size)).Q


def gaussian(kind: str, dtype: torch.dtype) -> Gaussian:
    loc, positive = draw(1, SIZE).to(dtype), draw(2, SIZE).square().to(dtype) + 0.5
    if kind == "diagonal":
        return DiagonalGaussian(loc, positive)
    if kind == "dual":
        return DualGaussian.of(loc, draw(3, 4, SIZE).to(dtype), positive)
    if kind == "factored":
        root = draw(4, SIZE, SIZE).to(dtype)
        return FactoredGaussian.of_(loc, root @ root.mT + torch.eye(SIZE).to(root))
    # A matrix (3, 4), a vector (3, 1), and two elements in no block.
    order, blocks = torch.randperm(SIZE), []
    for start, shape in ((0, (3, 4)), (12, (3, 1))):
        at = order[start : start + shape[0] * shape[1]].reshape(shape)
        sides = (vectors(shape[0]).to(dtype), vectors(shape[1]).to(dtype))
        blocks.append(EigenBlock(at, *sides, positive[at]))
    return KroneckerGaussian(loc, tuple(blocks), order[15:], positive[order[15:]])


def some_columns(which: str, found: Gaussian) -> Tensor:
    if which == "one row of a block" and isinstance(found, KroneckerGaussian):
        matrix, vector = (block.positions for block in found.blocks)
        return torch.cat([matrix[1, [3, 0, 1]], vector[2], found.positions[:1]])
    return torch.tensor([[16], [3, 11, 0, 8, 5]][which != "one"])


@pytest.mark.parametrize("num_rows", [1, 2, 9])
@pytest.mark.parametrize("which", ["one", "several", "one row of a block"])
@pytest.mark.parametrize("kind", ["diagonal", "dual", "factored", "kronecker"])
def test_scales_of_rows_are_the_dense_ones(
    kind: str, which: str, num_rows: int, dtype: torch.dtype
) -> None:
    found = gaussian(kind, dtype)
    columns = some_columns(which, found)
    rows = draw(7, 2, num_rows, len(columns)).to(dtype)
    whole = torch.zeros(2, num_rows, SIZE, dtype=dtype)
    whole[..., columns] = rows
    covariance = found.covariance_matrix().double()
    right = ((whole.double() @ covariance) * whole.double()).sum(-1).sqrt()
    close = tolerance(dtype, "closed_form")
    for ours in (found.row_scales(rows, columns), found.row_scales(whole)):
        assert ours.dtype == dtype
        assert_close(ours.double(), right, **close)
