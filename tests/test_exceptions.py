"""Each error is the package's and a builtin's; each says when it is raised."""

import inspect

import pytest

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
