"""Corrupted images by the published definitions, severities 1 to 5.

Written from the definitions and with the constants of CIFAR-10-C (Hendrycks and
Dietterich 2019, arXiv 1903.12261) for colour, and of MNIST-C (Mu and Gilmer 2019, arXiv
1906.02337) for grey images, at all of its severities. What differs from the published
sets: the random numbers; OpenCV's and scikit-image's operations are SciPy's; the motion
blur follows ImageMagick's rule, written anew; grey images are blurred along both axes.
Left out are frost, which overlays photographs, snow, spatter, and MNIST-C's lines,
stripes, edges and affine maps.
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import (
    correlate,
    correlate1d,
    gaussian_filter,
    map_coordinates,
    zoom,
)
from torch import Tensor

# Pixels (N, C, H, W) in [0, 1], the constant of a severity, a random generator.
Corruption = Callable[[np.ndarray, Any, np.random.Generator], np.ndarray]
SEVERITIES = (1, 2, 3, 4, 5)
_CHUNK = 100
_GREY = np.array([0.2125, 0.7154, 0.0721])  # weights of a luminance


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


def _gaussian_noise(x, scale, rng):
    return x + rng.normal(scale=scale, size=x.shape)


def _shot_noise(x, rate, rng):
    return rng.poisson(x * rate) / rate


def _impulse_noise(x, amount, rng):
    hit, salt = rng.random(x.shape) < amount, rng.random(x.shape) < 0.5
    return np.where(hit, salt, x)


def _speckle_noise(x, scale, rng):
    return x + x * rng.normal(scale=scale, size=x.shape)


def _blurred(x, sigma, mode="nearest", truncate=4.0):
    return gaussian_filter(x, sigma, mode=mode, truncate=truncate, axes=(-2, -1))


def _gaussian_blur(x, sigma, rng):
    return _blurred(x, sigma)


def _glass_blur(x, constant, rng):
    """Blurs, moves pixels about by up to ``most``, and blurs again."""
    sigma, most, rounds, share = constant
    x = np.floor(_blurred(x, sigma) * 255) / 255
    size, at = x.shape[-1], np.arange(len(x))
    for _ in range(rounds):
        for h in range(size - most, most, -1):
            for w in range(size - most, most, -1):
                dx, dy = rng.integers(-most, most, (2, len(x)))
                moved = rng.random(len(x)) < share
                rows, columns = np.where(moved, h + dy, h), np.where(moved, w + dx, w)
                here, there = x[at, :, h, w], x[at, :, rows, columns]
                x[at, :, h, w] = there
                # The published code exchanges grey pixels; of colours, whose views
                # alias, it copies one onto the other.
                if x.shape[1] == 1:
                    x[at, :, rows, columns] = here
    return _blurred(x, sigma)


def _disk(radius, alias):
    """A disk of ones, softened at its edge, of sum 1."""
    reach = 8 if radius <= 8 else radius
    steps = np.arange(-reach, reach + 1)
    disk = (steps[:, None] ** 2 + steps**2 <= radius**2).astype(np.float64)
    half = 1 if radius <= 8 else 2
    weights = np.exp(-0.5 * (np.arange(-half, half + 1) / alias) ** 2)
    disk /= disk.sum()
    for axis in (0, 1):
        disk = correlate1d(disk, weights / weights.sum(), axis, mode="mirror")
    return disk


def _defocus_blur(x, constant, rng):
    return correlate(x, _disk(*constant)[None, None], mode="mirror")


def _motion_blur(x, constant, rng):
    """Half a Gaussian along a line, of an angle of up to 45 degrees."""
    radius, sigma = constant
    size, steps = x.shape[-1], np.arange(2 * radius + 1)
    weights = np.exp(-0.5 * (steps / sigma) ** 2)
    angle = np.deg2rad(rng.uniform(-45, 45, len(x)))
    down, right = (
        np.ceil(steps * part[:, None] - 0.5).astype(int)
        for part in (np.sin(angle), np.cos(angle))
    )
    found, at = np.zeros_like(x), np.arange(len(x))[:, None, None, None]
    channels, pixels = np.arange(x.shape[1])[None, :, None, None], np.arange(size)
    for step, weight in enumerate(weights / weights.sum()):
        rows = (pixels + down[:, step, None]).clip(0, size - 1)[:, None, :, None]
        columns = (pixels + right[:, step, None]).clip(0, size - 1)[:, None, None, :]
        found += weight * x[at, channels, rows, columns]
    return found


def _zoomed(x, factor):
    """The middle, enlarged to the whole."""
    size = x.shape[-1]
    kept = int(np.ceil(size / factor))
    first = (size - kept) // 2
    middle = x[..., first : first + kept, first : first + kept]
    large = zoom(middle, (1, 1, factor, factor), order=1)
    first = (large.shape[-1] - size) // 2
    return large[..., first : first + size, first : first + size]


def _zoom_blur(x, constant, rng):
    factors = np.arange(1, *constant)
    return (x + sum(_zoomed(x, factor) for factor in factors)) / (len(factors) + 1)


def _plasma(count, size, decay, rng):
    """Height maps in [0, 1] by the diamond-square algorithm, on a torus."""
    heights = np.zeros((count, size, size))
    step, wobble = size, 100.0

    def noisy(total):
        return total / 4 + wobble * rng.uniform(-wobble, wobble, total.shape)

    while step >= 2:
        half = step // 2
        corners = heights[:, ::step, ::step]
        rows = corners + np.roll(corners, -1, 1)
        heights[:, half::step, half::step] = noisy(rows + np.roll(rows, -1, 2))
        middles = heights[:, half::step, half::step]
        above = middles + np.roll(middles, 1, 1)
        beside = middles + np.roll(middles, 1, 2)
        across, along = (corners + np.roll(corners, -1, axis) for axis in (2, 1))
        heights[:, ::step, half::step] = noisy(above + across)
        heights[:, half::step, ::step] = noisy(beside + along)
        step, wobble = half, wobble / decay
    heights -= heights.min((1, 2), keepdims=True)
    return heights / heights.max((1, 2), keepdims=True)


def _fog(x, constant, rng):
    thickness, decay = constant
    size = x.shape[-1]
    whole = 256 if x.shape[1] == 1 else 32
    layer = _plasma(len(x), max(whole, size), decay, rng)[:, None, :size, :size]
    most = x.max((1, 2, 3), keepdims=True)
    return (x + thickness * layer) * most / (most + thickness)


def _contrast(x, factor, rng):
    means = x.mean((2, 3), keepdims=True)
    return (x - means) * factor + means


def _brightness(x, added, rng):
    """Adds to the value of hue, saturation and value."""
    value = x.max(1, keepdims=True)
    brighter = (value + added).clip(0, 1)
    black = value == 0
    return np.where(black, brighter, x * brighter / np.where(black, 1, value))


def _saturate(x, constant, rng):
    factor, added = constant
    if x.shape[1] == 1:
        # As published, hue, saturation and value are changed alike, from (0, 0, value).
        hue = np.clip(2 - np.abs(6 * added - np.array([0, 2, 4])), 0, 1)
        hue[0] = np.clip(np.abs(6 * added - 3) - 1, 0, 1)
        luminance = _GREY @ (1 - added * (1 - hue))
        return (x * factor + added).clip(0, 1) * luminance
    value = x.max(1, keepdims=True)
    depth = value - x
    most = depth.max(1, keepdims=True)
    grey = most == 0
    saturation = most / np.where(value == 0, 1, value)
    wanted = (saturation * factor + added).clip(0, 1)
    # What has no hue counts as red.
    red = np.where(np.arange(3)[:, None, None] == 0, 0.0, 1.0)
    share = np.where(grey, red, depth / np.where(grey, 1, most))
    return value * (1 - wanted * share)


def _by_pillow(x, change):
    """Applies a function of Pillow's images to each."""
    pixels = np.floor(x * 255 + 1e-6).astype(np.uint8).transpose(0, 2, 3, 1)
    if x.shape[1] == 1:
        pixels = pixels[..., 0]
    changed = np.stack([np.asarray(change(Image.fromarray(each))) for each in pixels])
    return changed.reshape(*changed.shape[:3], -1).transpose(0, 3, 1, 2) / 255


def _jpeg(x, quality, rng):
    def change(image):
        stream = BytesIO()
        image.save(stream, "JPEG", quality=quality)
        return Image.open(stream)

    return _by_pillow(x, change)


def _pixelate(x, share, rng):
    size = x.shape[-1]
    small = int(size * share)

    def change(image):
        fewer = image.resize((small, small), Image.Resampling.BOX)
        return fewer.resize((size, size), Image.Resampling.BOX)

    return _by_pillow(x, change)


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
    "gaussian noise": (
        _gaussian_noise,
        (0.08, 0.12, 0.18, 0.26, 0.38),
        (0.04, 0.06, 0.08, 0.09, 0.10),
    ),
    "shot noise": (_shot_noise, (60, 25, 12, 5, 3), (500, 250, 100, 75, 50)),
    "speckle noise": (
        _speckle_noise,
        (0.15, 0.2, 0.35, 0.45, 0.6),
        (0.06, 0.1, 0.12, 0.16, 0.2),
    ),
    "defocus blur": (
        # radius, softness
        _defocus_blur,
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    ),
    "glass blur": (
        # sigma, farthest move, rounds, share of pixels moved
        _glass_blur,
        (
            (0.7, 1, 2, 0.5),
            (0.9, 2, 1, 0.5),
            (1, 2, 3, 0.5),
            (1.1, 3, 2, 0.5),
            (1.5, 4, 2, 0.5),
        ),
        (
            (0.05, 1, 1, 1),
            (0.25, 1, 1, 1),
            (0.4, 1, 1, 1),
            (0.25, 1, 2, 1),
            (0.4, 1, 2, 1),
        ),
    ),
    "motion blur": (
        # radius, sigma
        _motion_blur,
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    ),
    "zoom blur": (
        # end and step of the factors
        _zoom_blur,
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    ),
    "fog": (
        # thickness, decay of the roughness
        _fog,
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    ),
    "contrast": (_contrast, (0.4, 0.3, 0.2, 0.1, 0.05), (0.75, 0.5, 0.4, 0.3, 0.15)),
    "saturate": (
        # factor, and what is added
        _saturate,
        ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
        ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
    ),
    "jpeg": (_jpeg, (25, 18, 15, 10, 7), (80, 65, 58, 50, 40)),
    "pixelate": (
        _pixelate,
        (0.6, 0.5, 0.4, 0.3, 0.25),
        (0.95, 0.9, 0.85, 0.75, 0.65),
    ),
}
