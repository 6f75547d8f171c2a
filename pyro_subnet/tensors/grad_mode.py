"""Gradient mode: users predict, and some fit, where it is switched off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def differentiable() -> Iterator[None]:
    """Switches gradients on, inside ``no_grad`` and ``inference_mode`` as well.

    Yields:
        Nothing.
    """
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leaves inference mode, and gradient mode as it is.

    ``torch.inference_mode(False)`` alone switches gradients on.

    Yields:
        Nothing.
    """
    enabled = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(enabled):
        yield
