"""Batches on the CPU for a model elsewhere: on ``"meta"``, which every machine has."""

from __future__ import annotations

from collections import UserDict
from typing import Any, final

import pytest
import torch
from torch import Tensor, nn

from pyro_subnet.exceptions import DataError
from pyro_subnet.tracing.arguments import run_on

ELSEWHERE = torch.device("meta")
WEIGHT = torch.ones(2, 3, device=ELSEWHERE)


@final
class Encoding(UserDict[str, Any]):
    """As a tokenizer gives it: a mapping that is no dictionary, and that moves."""

    def to(self, device: torch.device) -> Encoding:
        """A copy of it there."""
        return Encoding({name: part.to(device) for name, part in self.items()})


def model(x: Tensor) -> Tensor:
    # Of a product alone "meta" does not mind where the other factor is.
    return (x + 0 * WEIGHT[:, 0]) @ WEIGHT


def of_mapping(batch: Any) -> Tensor:
    return model(batch["x"])


@pytest.mark.parametrize("kind", [dict, Encoding])
def test_batches_move_to_the_model(kind: Any) -> None:
    """The call that is kept is the one that ran."""
    x = torch.ones(4, 2)
    found, ((moved,), _) = run_on(model, model, (x,), {}, WEIGHT)
    assert found.shape == (4, 3)
    assert moved.device == ELSEWHERE
    assert x.device.type == "cpu"
    found, ((batch,), _) = run_on(of_mapping, of_mapping, (kind(x=x),), {}, WEIGHT)
    assert found.device == ELSEWHERE
    assert isinstance(batch, kind)


def test_what_runs_as_it_is_stays_where_it_is() -> None:
    """Lengths of sequences must be on the CPU, and a model may move its data itself."""

    def moves(x: Tensor, lengths: Tensor) -> list[int]:
        model(x.to(ELSEWHERE))
        return lengths.tolist()

    given = (torch.ones(4, 2), torch.tensor([3, 1]))
    found, (args, _) = run_on(moves, moves, given, {}, WEIGHT)
    assert found == [3, 1]
    assert args[0] is given[0]


def test_what_does_not_run_there_either_is_an_error() -> None:
    with pytest.raises(DataError, match="on the model's device, meta"):
        run_on(model, model, (torch.ones(4, 5),), {}, WEIGHT)


@final
class Elsewhere(nn.Module):
    """A model that says by its parameters where it is, before any site is known."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(WEIGHT.clone())

    def forward(self, x: Tensor) -> Tensor:
        return (x + 0 * self.weight[:, 0]) @ self.weight


def test_a_module_is_where_its_parameters_are() -> None:
    net = Elsewhere()
    _, ((moved,), _) = run_on(net, net, (torch.ones(4, 2),), {})
    assert moved.device == ELSEWHERE
