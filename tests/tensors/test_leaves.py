"""Leaves of containers are those that torch's trees have."""

from collections import OrderedDict, namedtuple

import pytest
import torch
from torch.utils._pytree import tree_leaves

from pyro_subnet.tensors.leaves import leaves_of

Pair = namedtuple("Pair", "a b")
T = torch.ones(2)


@pytest.mark.parametrize(
    "value",
    [
        T,
        torch.nn.Parameter(T),
        None,
        3,
        torch.float32,
        torch.device("cpu"),
        object(),
        [],
        (T, [T, {"a": T, "b": (2, None)}]),
        Pair(T, OrderedDict(x=[T])),
        [T, T],
    ],
    ids=lambda value: type(value).__name__,
)
def test_leaves_are_those_of_torch(value):
    found, expected = leaves_of(value), tree_leaves(value)

    assert len(found) == len(expected)
    assert all(a is b for a, b in zip(found, expected, strict=True))


def test_a_size_is_one_leaf_as_it_holds_no_tensor():
    assert leaves_of(torch.Size((2, 3))) == (torch.Size((2, 3)),)
