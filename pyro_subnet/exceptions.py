"""Errors and warnings, each also a builtin's.

``except SubnetError`` catches every error that the package raises on purpose. The
second base class lets code that knows only ``ValueError`` and the like catch it too.
"""

import inspect
import math
import sys
import warnings
from collections.abc import Mapping
from types import FrameType
from typing import Any, final


class SubnetError(Exception):
    """Base of every error that the package raises on purpose."""


@final
class SelectionError(SubnetError, ValueError):
    """Raised when a subnet cannot be chosen: bad site, mask, positions or size."""


@final
class ModelError(SubnetError, ValueError):
    """Raised when the model is unfit: discrete, random or changing sites, no data."""


@final
class DataError(SubnetError, ValueError):
    """Raised when batches are empty or malformed, or data are none that could be."""


@final
class UnsupportedLikelihoodError(SubnetError, TypeError):
    """Raised when an observed family has no usable information matrix."""


@final
class NonFiniteError(SubnetError, ValueError):
    """Raised when NaN or infinity appears at the MAP or in the curvature."""


@final
class PrecisionError(SubnetError, RuntimeError):
    """Raised when the posterior precision is not positive definite."""


@final
class MemoryLimitError(SubnetError, RuntimeError):
    """Raised when what a call needs would not fit in memory."""


@final
class RouteError(SubnetError, RuntimeError):
    """Raised when two ways to the same Jacobian disagree, where that is checked."""


@final
class RankError(SubnetError, RuntimeError):
    """Raised on the other ranks of a distributed fit when one fails or is gone."""


@final
class OptionError(SubnetError, ValueError):
    """Raised when an option has a value outside of those it allows."""


@final
class CheckpointError(SubnetError, ValueError):
    """Raised when a file is damaged, of another model or fit, or cannot be written."""


class SubnetWarning(UserWarning):
    """Base of every warning that the package gives."""


@final
class MonteCarloFisherWarning(SubnetWarning):
    """Given when a family without a closed form falls back on sampled labels."""


@final
class NoObservedSiteWarning(SubnetWarning):
    """Given when the model observes nothing, so that only the prior curves."""


@final
class NoOutputVarianceWarning(SubnetWarning):
    """Given when the subnet moves no output, or outputs less than others would."""


@final
class DataCountWarning(SubnetWarning):
    """Given when data seem to be left out, repeated, or scaled up twice."""


@final
class SquashedLogitsWarning(SubnetWarning):
    """Given when the logits of a likelihood seem to be probabilities."""


@final
class UntrainedWarning(SubnetWarning):
    """Given when the weights seem not to be trained on the data."""


@final
class ChoiceWarning(SubnetWarning):
    """Given when a choice may be right, and more often is a slip."""


@final
class TuningWarning(SubnetWarning):
    """Given when tuning ends at a bound, or leaves nothing of the posterior."""


@final
class AbsorbedNoiseWarning(SubnetWarning):
    """Given when a noise that was learned with the weights is likely too small."""


@final
class RoundingWarning(SubnetWarning):
    """Given when float32 hardly resolves the posterior precision."""


@final
class NoKroneckerFactorsWarning(SubnetWarning):
    """Given when no weight has Kronecker factors, so that all have only a diagonal."""


# The package itself, and those that call it for the user or wrap its functions.
_BETWEEN = ("pyro_subnet", "pyro", "contextlib", "torch", "jaxtyping", "beartype")


_LONG = 60  # characters of a value that a message shows


def warn(message: str, category: type[SubnetWarning]) -> None:
    """Warns at the line of the user's code that led here."""
    level, frame, user = 1, sys._getframe(0), users_frame()
    while frame is not user and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def users_frame() -> FrameType:
    """The frame of the user's code that led here."""
    frame = sys._getframe(0)
    while _package_of(frame) in _BETWEEN and frame.f_back is not None:
        frame = frame.f_back
    return frame


def shown(value: Any) -> str:
    """A value as a message shows it: what is long by its class."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if inspect.isroutine(value):
        return f"the function {value.__name__}"
    text = "" if _holds_large(value) else repr(value)
    is_short = text and len(text) <= _LONG and "\n" not in text
    kind = type(value).__name__
    return text if is_short else f"{'an' if kind[0] in 'AEIOU' else 'a'} {kind}"


def _holds_large(value: Any) -> bool:
    """Whether it is or maps to a tensor of many numbers: torch writes it in 1 ms."""
    if isinstance(value, Mapping):
        return any(map(_holds_large, value.values()))
    shape = getattr(value, "shape", None)  # of other objects it may be anything
    return isinstance(shape, tuple) and math.prod(shape) > _LONG


def _package_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
