"""Whether tensors that were stored have the names, shapes and numbers they should."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from pyro_subnet.exceptions import CheckpointError

# Rows of a matrix that are looked through at once.
_ROWS = 512


def check_stored(
    tensors: Mapping[str, Tensor],
    axes: Mapping[str, Sequence[str]],
    dtypes: Mapping[str, torch.dtype | None],
    lengths: Mapping[str, int],
    unbounded: Collection[str] = (),
) -> dict[str, int]:
    """Refuses tensors whose names, shapes, types or numbers are not what they must be.

    Args:
        tensors: What was stored.
        axes: Names of the axes of every tensor that there must be; axes of one name
            have one length.
        dtypes: Their types; None, as for those left out, for any of floating point.
        lengths: Known lengths of axes.
        unbounded: Tensors whose numbers may be infinite, though not NaN.

    Returns:
        Lengths of all axes.

    Raises:
        CheckpointError: If a tensor is missing, unknown, or of another shape or type,
            or a number is NaN or infinite.
    """
    if set(tensors) != set(axes):
        raise CheckpointError(
            f"The file must hold the tensors {sorted(axes)}; got {sorted(tensors)}. "
            "Take another copy of it."
        )
    found = dict(lengths)
    for name, letters in axes.items():
        tensor, dtype = tensors[name], dtypes.get(name)
        fits = tensor.ndim == len(letters) and all(
            found.setdefault(letter, length) == length
            for letter, length in zip(letters, tensor.shape, strict=True)
        )
        typed = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
        if not fits or not typed:
            wanted = ", ".join(str(found.get(letter, letter)) for letter in letters)
            kind = "floating point" if dtype is None else _NAMES.get(dtype, str(dtype))
            raise CheckpointError(
                f"The file's tensor {name!r} must have shape ({wanted}) of {kind}; got "
                f"{tuple(tensor.shape)} of {tensor.dtype}. Take another copy of it."
            )
        if not _are_numbers(tensor, finite=name not in unbounded):
            raise CheckpointError(
                f"The file's tensor {name!r} must be finite; got NaN or inf. Take "
                "another copy of it."
            )
    return found


_NAMES = {torch.int64: "integers"}


def _are_numbers(tensor: Tensor, *, finite: bool) -> bool:
    if not tensor.is_floating_point():
        return True
    parts = tensor.split(_ROWS) if tensor.ndim else (tensor,)
    if finite:
        return all(bool(part.isfinite().all()) for part in parts)
    return not any(bool(part.isnan().any()) for part in parts)
