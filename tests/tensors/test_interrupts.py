"""An interrupt leaves torch's and Pyro's switches as they were, wherever it comes.

Python delivers one where a function starts, and where one of C's has returned. A
profiler sees each of these places, and raises there; `__exit__` and what it calls are
left out, as nothing undoes what was not undone there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.overrides import _get_current_function_mode_stack
from torch.testing import assert_close

import pyro_subnet
from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.nn import bayesianize, init_to_module

PACKAGE = pyro_subnet.__path__[0]
Place = tuple[str, int, str]  # the package's file and line, and what it calls
LEAVING = {"__exit__", "_leave", "close"}


def next_dimension() -> int:
    """Where a plate goes: further left if others are open."""
    plate = pyro.plate("another", 2)
    with plate:
        return int(plate.dim)


def switches() -> dict[str, Any]:
    backends: Any = torch.backends
    return {
        "stack": list(_PYRO_STACK),
        "plates": next_dimension(),
        "params": set(pyro.get_param_store().keys()),
        "validation": Distribution._validate_args,
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "modes": list(_get_current_function_mode_stack()),
        "attention": backends.mha.get_fastpath_enabled(),
        "flash": backends.cuda.flash_sdp_enabled(),
        "precision": backends.mkldnn.matmul.fp32_precision,
        "autocast": torch.is_autocast_enabled("cpu"),
    }


class Interrupt:
    """Interrupts a run at one place, or notes all there are."""

    def __init__(self, at: Place | None = None) -> None:
        self.at, self.seen, self.happened = at, dict[Place, int](), False

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        if event not in {"call", "c_return"} or self.happened:
            return
        name = frame.f_code.co_name if event == "call" else getattr(arg, "__name__", "")
        place, one = None, frame
        while one is not None:
            if one.f_code.co_name in LEAVING:
                return
            if place is None and one.f_code.co_filename.startswith(PACKAGE):
                place = one.f_code.co_filename, one.f_lineno, f"{event} {name}"
            one = one.f_back
        if place is None:
            return
        self.seen[place] = 1
        if place == self.at:
            self.happened = True
            raise KeyboardInterrupt("here")

    def run(self, function: Callable[[], Any]) -> None:
        sys.setprofile(self)
        try:
            function()
        finally:
            sys.setprofile(None)


def posterior_and_inputs() -> tuple[Any, Tensor]:
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    bnn = bayesianize(net)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        mean = bnn(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    guide = AutoSubnetLaplace(model, init_loc_fn=init_to_module(net))
    x = torch.randn(3, 2, dtype=torch.float64)
    return guide.laplace_approximation(x, x[:, 0]), x


# Where switches are set: the other files hold none.
FILES = ("trace.py", "modes.py", "plain_calls.py", "weight_site.py", "one_thread.py")


def test_switches_are_given_back_wherever_an_interrupt_comes() -> None:
    posterior, x = posterior_and_inputs()

    def predict() -> Tensor:
        return posterior.predictive_distribution(x).stddev

    expected, before = predict(), switches()
    notes = Interrupt()
    notes.run(predict)
    # The last of C's calls in each line, after which a switch is set.
    found = [place for place in notes.seen if place[0].endswith(FILES)]
    found = [place for place in found if place[2].startswith("c_return")]
    places = {(file, line): (file, line, call) for file, line, call in found}
    assert len(places) > 30
    left = {}
    for place in places.values():
        state = torch.get_rng_state()
        interrupt = Interrupt(place)
        with pytest.raises(KeyboardInterrupt, match="here"):
            interrupt.run(predict)
        after = switches()
        if after != before:
            left[place] = {k: v for k, v in after.items() if v != before[k]}
            _PYRO_STACK[:] = before["stack"]
        if not torch.equal(torch.get_rng_state(), state):
            left[place] = "rng"
    assert not left
    assert_close(predict(), expected)
    # No hook is left that would look at the mode of a network in training.
    nn.Dropout()(x)
