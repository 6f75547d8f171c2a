"""How many inputs share one joint distribution."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyro_subnet.exceptions import OptionError, shown
from pyro_subnet.options import is_count


def joint_option(joint: Any) -> bool | int:
    """The option with NumPy's truth values as Python's: True is all, 1 is one by one.

    Args:
        joint: As :func:`group_size` has it.

    Returns:
        The same, as a bool or a number.

    Raises:
        OptionError: If it is neither.
    """
    if isinstance(joint, bool | np.bool_):
        return bool(joint)
    if not is_count(joint):
        raise OptionError(
            "`joint` must be a bool, or a number that divides the inputs; got "
            f"{shown(joint)}. Pass the number of inputs in each group."
        )
    return int(joint)


def group_size(joint: bool | int, num_data: int) -> int:
    """The number of successive inputs in one joint distribution.

    Args:
        joint: Whether all of them are; or how many.
        num_data: N, the number of inputs.

    Returns:
        A divisor of N.

    Raises:
        OptionError: If ``joint`` is a number that does not divide N.
    """
    if isinstance(joint, bool):
        return num_data if joint else 1
    if joint < 1 or num_data % joint:
        raise OptionError(
            f"`joint` must be a bool, or a number that divides the {num_data} inputs; "
            f"got {joint}. Pass the number of inputs in each group."
        )
    return joint
