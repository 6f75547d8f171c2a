"""Errors and warnings that the package raises, each also a builtin type.

``except SubnetError`` catches everything that the package raises on purpose; the
second base lets code that knows only ``ValueError`` and its kin catch it as well.
"""

import sys
import warnings
from types import FrameType
from typing import final


class SubnetError(Exception):
    """Base of every error that the package raises on purpose."""


@final
class SelectionError(SubnetError, ValueError):
    """Raised when a subnet cannot be picked: bad site, mask, positions or size."""


@final
class ModelError(SubnetError, ValueError):
    """Raised when the model is unfit: discrete, random or changing sites, no data."""


@final
class DataError(SubnetError, ValueError):
    """Raised when batches are empty, malformed or disagree with ``num_data``."""


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
    """Raised when the S x S factor would not fit in the memory there is."""


@final
class RouteError(SubnetError, RuntimeError):
    """Raised when two ways to the same Jacobian disagree, where that is checked."""


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
    """Given when the model observes nothing, so that the prior is all there is."""


@final
class NoOutputVarianceWarning(SubnetWarning):
    """Given when the subnet moves no output at any reference input."""


@final
class NoKroneckerFactorsWarning(SubnetWarning):
    """Given when no weight has Kronecker factors, so that all have a diagonal alone."""


# Ours, and those whose decorators stand on our functions.
_BETWEEN = ("pyro_subnet", "contextlib", "torch", "jaxtyping", "beartype")


def warn(message: str, category: type[SubnetWarning]) -> None:
    """Warns at the line of the user's that led here.

    Args:
        message: The rule, what came, the way out.
        category: Which warning.
    """
    level, frame = 1, sys._getframe(0)
    while _package_of(frame) in _BETWEEN and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _package_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
