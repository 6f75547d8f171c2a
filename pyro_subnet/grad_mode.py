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
