"""Every test starts from the same state, and hands back the global one untouched."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator

import pyro
import pytest
import torch

SEED = 20220507
DEVICE_VARIABLE = "PYRO_SUBNET_DEVICE"


def pytest_configure(config: pytest.Config) -> None:
    """Gives each process an empty cache, as on a fresh machine, and its own.

    ArviZ, for one, says more at its first import of a day, which it notes there.
    """
    folder = tempfile.TemporaryDirectory(prefix="pyro-subnet-tests-")
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = folder.name

    def restore() -> None:
        os.environ.pop("XDG_CACHE_HOME")
        if before is not None:
            os.environ["XDG_CACHE_HOME"] = before
        folder.cleanup()

    config.add_cleanup(restore)


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Leaves slow tests to those who name them, CUDA tests to those who have one."""
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))
    asked_for = config.option.markexpr or any("::" in arg for arg in config.args)
    if not asked_for:
        slow = [item for item in items if "slow" in item.keywords]
        items[:] = [item for item in items if "slow" not in item.keywords]
        config.hook.pytest_deselected(items=slow)


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Seeds, empties the param store, validates; fails a test that leaks a setting."""
    pyro.clear_param_store()
    pyro.enable_validation(True)
    pyro.set_rng_seed(SEED)
    dtype = torch.get_default_dtype()
    grad = torch.is_grad_enabled()
    yield
    leaked_dtype, leaked_grad = torch.get_default_dtype(), torch.is_grad_enabled()
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)
    if leaked_dtype != dtype:
        pytest.fail(f"The default dtype was left at {leaked_dtype}; it was {dtype}.")
    if leaked_grad != grad:
        pytest.fail(f"Gradient mode was left at {leaked_grad}; it was {grad}.")


@pytest.fixture
def no_guides_of_other_tests() -> None:
    """Those that wait for the collector still own keys of the store."""
    gc.collect()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tests' tensors live: CPU, or what PYRO_SUBNET_DEVICE names."""
    return torch.device(os.environ.get(DEVICE_VARIABLE, "cpu"))


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Both floating point types, one after the other."""
    return request.param
