"""Each error is the package's and a builtin's; each says when it is raised."""

import inspect

import numpy as np
import pytest
import torch

from pyro_subnet import exceptions

CLASSES = [
    member
    for _, member in inspect.getmembers(exceptions, inspect.isclass)
    if member.__module__ == exceptions.__name__
]
BUILTINS = (ValueError, TypeError, RuntimeError)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_is_an_error_or_a_warning_of_the_package(cls: type) -> None:
    assert issubclass(cls, exceptions.SubnetError | exceptions.SubnetWarning)
    assert cls.__doc__


@pytest.mark.parametrize(
    "cls",
    [
        cls
        for cls in CLASSES
        if issubclass(cls, exceptions.SubnetError) and cls is not exceptions.SubnetError
    ],
)
def test_every_error_is_also_a_builtin(cls: type) -> None:
    assert sum(issubclass(cls, builtin) for builtin in BUILTINS) == 1


def test_large_values_are_told_by_their_class_and_not_written_out() -> None:
    class Unwritten(dict[str, torch.Tensor]):
        def __repr__(self) -> str:
            raise AssertionError

    few = torch.arange(3)
    assert exceptions.shown(few) == repr(few)
    for large in (torch.arange(61), torch.eye(9).to_sparse(), np.zeros(61)):
        assert exceptions.shown(large) == f"a {type(large).__name__}"
    assert exceptions.shown(Unwritten(w=torch.arange(61))) == "an Unwritten"
    # A shape may be anything, of what is no array.
    assert exceptions.shown(Shaped()) == "<shaped>"


class Shaped:
    def shape(self) -> None:
        """No size."""

    def __repr__(self) -> str:
        return "<shaped>"
