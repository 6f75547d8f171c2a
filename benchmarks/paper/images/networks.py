"""The networks: three that train on a CPU, and the paper's ResNet-18."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Architecture = Literal["cnn", "conv-bn-5", "resnet9", "resnet18"]
NUM_CLASSES = 10
# Of CIFAR-10's training images. The sets of one channel are left as they are, so that a
# blank pixel is zero.
_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Normalize(nn.Module):
    """Channels in units of their standard deviation."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(_STD).view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Eighth(nn.Module):
    """Outputs divided by 8, as Page (2018) scales them."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 8


class ResidualBlock(nn.Module):
    """Two convolutions beside a way past them.

    Source: He et al. (2016), figure 2 and section 3.3 (option B), arXiv 1512.03385.
    """

    def __init__(self, num_in: int, num_out: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(num_in, num_out, stride),
            nn.ReLU(),
            *_convolution(num_out, num_out, 1),
        )
        past = stride == 1 and num_in == num_out
        self.past = (
            nn.Identity()
            if past
            else nn.Sequential(*_convolution(num_in, num_out, stride, kernel=1))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.past(x))


def make_network(
    architecture: Architecture, seed: int, *, channels: int = 1, dropout: float = 0.0
) -> nn.Sequential:
    """A network for images in [0, 1], with fresh weights.

    Args:
        architecture: ``"cnn"``: two convolutions of 5 x 5 at a stride of 2 and two
            linear layers, without norms, D = 29,994 for 28 x 28 pixels.
            ``"conv-bn-5"``: five convolutions of 3 x 3 with batch norm.
            ``"resnet9"``: eight such convolutions, four of them in two residual blocks,
            and outputs divided by 8; of Page (2018), "How to train your ResNet", with
            the second block at 8 x 8 pixels, where a CPU is faster than at 4 x 4.
            ``"resnet18"``: with a first convolution of 3 x 3, as is usual for small
            images.
        seed: Of the weights.
        channels: 1, or 3 which are normalized.
        dropout: Rate, after each pooling or stage, and before the last layer; of
            ``"cnn"`` and the like entries, of others whole channels.

    Returns:
        The network.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = [Normalize()] if channels == 3 else []
        return nn.Sequential(*layers, *_LAYERS[architecture](channels, dropout))


def num_params(net: nn.Module) -> int:
    return sum(value.numel() for value in net.parameters())


def _dropout(rate: float, whole: bool = True) -> list[nn.Module]:
    if not rate:
        return []
    return [nn.Dropout2d(rate) if whole else nn.Dropout(rate)]


def _convolution(
    num_in: int, num_out: int, stride: int = 1, kernel: int = 3
) -> list[nn.Module]:
    """A convolution with batch norm."""
    padding = kernel // 2
    return [
        nn.Conv2d(num_in, num_out, kernel, stride, padding, bias=False),
        nn.BatchNorm2d(num_out),
    ]


def _cnn(channels: int, dropout: float) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, 16, 5, stride=2),
        nn.ReLU(),
        *_dropout(dropout),
        nn.Conv2d(16, 32, 5, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        *_dropout(dropout, whole=False),
        nn.Linear(32 * 4 * 4, 32),
        nn.ReLU(),
        *_dropout(dropout, whole=False),
        nn.Linear(32, NUM_CLASSES),
    ]


def _conv_bn_5(channels: int, dropout: float) -> list[nn.Module]:
    layers: list[nn.Module] = []
    before = channels
    for stage, widths in enumerate(((32,), (64, 64), (128, 128))):
        if stage:
            layers += [nn.MaxPool2d(2), *_dropout(dropout)]
        for width in widths:
            layers += [*_convolution(before, width), nn.ReLU()]
            before = width
    return [
        *layers,
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        *_dropout(dropout, whole=False),
        nn.Linear(before, NUM_CLASSES),
    ]


def _resnet9(channels: int, dropout: float) -> list[nn.Module]:
    layers = [*_convolution(channels, 64), nn.ReLU()]
    before = 64
    for width in (128, 256, 512):
        convolution, norm = _convolution(before, width)
        layers += [convolution, nn.MaxPool2d(2), norm, nn.ReLU()]
        layers += [ResidualBlock(width, width, 1)] if width < 512 else []
        layers += _dropout(dropout)
        before = width
    return [
        *layers,
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(before, NUM_CLASSES),
        Eighth(),
    ]


def _resnet18(channels: int, dropout: float) -> list[nn.Module]:
    layers = [*_convolution(channels, 64), nn.ReLU()]
    before = 64
    for width in (64, 128, 256, 512):
        stride = 1 if width == 64 else 2
        layers += [ResidualBlock(before, width, stride), ResidualBlock(width, width, 1)]
        layers += _dropout(dropout)
        before = width
    return [
        *layers,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(before, NUM_CLASSES),
    ]


_LAYERS = {
    "cnn": _cnn,
    "conv-bn-5": _conv_bn_5,
    "resnet9": _resnet9,
    "resnet18": _resnet18,
}
