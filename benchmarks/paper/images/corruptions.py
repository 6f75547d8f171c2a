"""The corruptions that figures are published of, by their published definitions.

Written from the definitions and with the constants of CIFAR-10-C (Hendrycks and
Dietterich 2019, arXiv 1903.12261) for colour, and of MNIST-C (Mu and Gilmer 2019, arXiv
1906.02337) for grey images. What differs from the published sets: the random numbers;
OpenCV's and scikit-image's operations are SciPy's; grey images are blurred along both
axes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter, map_coordinates
from torch import Tensor

# Pixels (N, C, H, W) in [0, 1], the constant of a severity, a random generator.
Corruption = Callable[[np.ndarray, Any, np.random.Generator], np.ndarray]
SEVERITIES = (1, 2, 3, 4, 5)
# That of each corruption at which MNIST-C was released.
RELEASED = {"brightness": 5, "elastic": 1, "gaussian blur": 2, "impulse noise": 4}
_CHUNK = 100


def corrupt(images: Tensor, name: str, severity: int, seed: int = 0) -> Tensor:
    """Corrupted copies of images.

    Args:
        images: Bytes, shape (N, 1 or 3, H, W).
        name: A key of :data:`CORRUPTIONS`.
        severity: 1 to 5; 0 gives the images as they are.
        seed: Of what is random.

    Returns:
        Bytes of the same shape.
    """
    if severity == 0:
        return images.clone()
    corruption, grey, colour = CORRUPTIONS[name]
    constant = (grey if images.shape[1] == 1 else colour)[severity - 1]
    rng = np.random.default_rng([seed, list(CORRUPTIONS).index(name), severity])
    parts = []
    for chunk in images.split(_CHUNK):
        x = corruption(chunk.numpy().astype(np.float64) / 255, constant, rng)
        # Cut, not rounded, as in the published sets; a byte that is kept stays itself.
        parts.append((x.clip(0, 1) * 255 + 1e-6).astype(np.uint8))
    return torch.from_numpy(np.concatenate(parts))


def _impulse_noise(x, amount, rng):
    hit, salt = rng.random(x.shape) < amount, rng.random(x.shape) < 0.5
    return np.where(hit, salt, x)


def _blurred(x, sigma, mode="nearest", truncate=4.0):
    return gaussian_filter(x, sigma, mode=mode, truncate=truncate, axes=(-2, -1))


def _gaussian_blur(x, sigma, rng):
    return _blurred(x, sigma)


def _brightness(x, added, rng):
    """Adds to the value of hue, saturation and value."""
    value = x.max(1, keepdims=True)
    brighter = (value + added).clip(0, 1)
    black = value == 0
    return np.where(black, brighter, x * brighter / np.where(black, 1, value))


def _elastic(x, constant, rng):
    """A random affine map, then displacements that vary smoothly."""
    strength, smoothness, affine = (x.shape[-1] * part for part in constant)
    count, channels, size, _ = x.shape
    middle, third = size // 2, size // 3
    corners = np.array([[third, third], [third, -third], [-third, -third]]) + middle
    moved = corners + rng.uniform(-affine, affine, (count, 3, 2))
    # What is seen at (x, y) comes from A (x, y, 1), with A moved = corners.
    ones = np.ones((count, 3, 1))
    back = np.linalg.solve(np.concatenate([moved, ones], -1), corners[None] + 0 * moved)
    rows, columns = np.mgrid[:size, :size].astype(np.float64)
    source = np.stack([columns, rows, np.ones_like(rows)], -1) @ back[:, None]
    border = "constant" if channels == 1 else "mirror"
    x = _sampled(x, source[..., 1], source[..., 0], border)
    right, down = rng.uniform(-1, 1, (2, count, size, size))
    if smoothness:
        right, down = (
            _blurred(part, smoothness, "reflect", 3.0) for part in (right, down)
        )
    return _sampled(x, rows + strength * down, columns + strength * right, "reflect")


def _sampled(x, rows, columns, border):
    """Images at positions (N, H, W) between their pixels."""
    at = np.broadcast_to(np.arange(len(x))[:, None, None], rows.shape)
    where = np.stack([at, rows, columns])
    found = [
        map_coordinates(channel, where, order=1, mode=border)
        for channel in np.moveaxis(x, 1, 0)
    ]
    return np.stack(found, 1)


# Name: operation, constants of MNIST-C, constants of CIFAR-10-C.
CORRUPTIONS: dict[str, tuple[Corruption, tuple[Any, ...], tuple[Any, ...]]] = {
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5), (0.05, 0.1, 0.15, 0.2, 0.3)),
    "elastic": (
        # strength, smoothness, affine; in sides of the image
        _elastic,
        ((2, 0.7, 0.1), (2, 0.08, 0.2), *((s, 0.01, 0.02) for s in (0.05, 0.07, 0.12))),
        (
            (0, 0, 0.08),
            (0.05, 0.2, 0.07),
            (0.08, 0.06, 0.06),
            (0.1, 0.04, 0.05),
            (0.1, 0.03, 0.03),
        ),
    ),
    "gaussian blur": (_gaussian_blur, (1, 2, 3, 4, 6), (0.4, 0.6, 0.7, 0.8, 1)),
    "impulse noise": (
        _impulse_noise,
        (0.03, 0.06, 0.09, 0.17, 0.27),
        (0.01, 0.02, 0.03, 0.05, 0.07),
    ),
}
