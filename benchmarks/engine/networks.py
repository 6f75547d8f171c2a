"""The networks that are measured, untrained: what they cost is not what they know.

Each activation and pool is a module of its own, used once, as laplace-torch's hooks
need it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]
Activation = Callable[[Tensor], Tensor]

NUM_CLASSES = 10


def toy() -> nn.Module:
    """D = 59: to try the benchmark itself."""
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3))


def mlp_regression() -> nn.Module:
    """D = 2,701."""
    return nn.Sequential(
        nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1)
    )


def mlp_classes(width: int = 256) -> nn.Module:
    """D = 269,322 at the default width."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, NUM_CLASSES),
    )


def lenet() -> nn.Module:
    """LeNet-5 with ReLU and max pooling: D = 61,706."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, NUM_CLASSES),
    )


def cnn(num_outputs: int = NUM_CLASSES) -> nn.Module:
    """Two 5 x 5 convolutions and two dense layers: D = 366,806."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(3136, 100),
        nn.ReLU(),
        nn.Linear(100, num_outputs),
    )


class Block(nn.Module):
    """Two 3 x 3 convolutions around which the input is led."""

    def __init__(self, channels_in: int, channels: int, stride: int, norm: Norm):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False),
            norm(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            norm(channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), norm(channels)
            )
        self.last = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x) + self.shortcut(x))


def _resnet18(norm: Norm) -> nn.Module:
    """ResNet-18 for 32 x 32 images (He et al., 2016; no pooling at the stem)."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 3, 1, 1, bias=False),
        norm(64),
        nn.ReLU(),
    ]
    channels_in = 64
    for channels, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers.append(Block(channels_in, channels, stride, norm))
        layers.append(Block(channels, channels, 1, norm))
        channels_in = channels
    layers += [nn.AvgPool2d(4), nn.Flatten(), nn.Linear(512, NUM_CLASSES)]
    return nn.Sequential(*layers)


def resnet18_batchnorm() -> nn.Module:
    """D = 11,173,962."""
    return _resnet18(nn.BatchNorm2d)


def resnet18_groupnorm() -> nn.Module:
    """D = 11,173,962."""
    return _resnet18(lambda channels: nn.GroupNorm(32, channels))


class MeanOfTokens(nn.Module):
    """What layers make of a sequence, averaged over its positions, to classes."""

    def __init__(self, layers: nn.Module, width: int):
        super().__init__()
        self.layers, self.head = layers, nn.Linear(width, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(x).mean(1))
        return logits


class LastOfSequence(nn.Module):
    """A recurrent network's output at the last position, to classes."""

    def __init__(self, layers: nn.RNNBase):
        super().__init__()
        self.layers, self.head = layers, nn.Linear(layers.hidden_size, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(x)[0][:, -1])
        return logits


def _encoder(
    width: int, num_heads: int, depth: int, activation: Activation = F.gelu
) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        width, num_heads, 4 * width, activation=activation, batch_first=True
    )
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)


def transformer() -> nn.Module:
    """Four encoder layers of 128, on embedded tokens: D = 794,378."""
    return MeanOfTokens(_encoder(128, 4, 4), 128)


def lstm() -> nn.Module:
    """Two layers of 128 on 64 features: D = 232,714."""
    return LastOfSequence(nn.LSTM(64, 128, num_layers=2, batch_first=True))


def vit_small(activation: Activation = F.gelu) -> nn.Module:
    """Twelve encoder layers of 384, on 8 x 8 patches of 4 x 4: D = 21,316,234."""
    patches = nn.Conv2d(3, 384, 4, stride=4)
    tokens = nn.Sequential(patches, nn.Flatten(2), Transposed())
    return MeanOfTokens(nn.Sequential(tokens, _encoder(384, 6, 12, activation)), 384)


class Adapter(nn.Module):
    """A frozen layer beside which a square of weights is trained.

    Source: Balazy et al. (2024), LoRA-XS, arXiv 2405.17604: the square stands between
    the layer's leading singular vectors.
    """

    def __init__(self, layer: nn.Linear, rank: int):
        super().__init__()
        left, values, right = torch.linalg.svd(layer.weight.detach(), False)
        self.layer = layer.requires_grad_(False)
        self.register_buffer("up", left[:, :rank] * values[:rank])
        self.register_buffer("down", right[:rank])
        self.square = nn.Linear(rank, rank, bias=False)

    @property
    def weight(self) -> Tensor:
        """The frozen layer's, which torch's encoder asks for."""
        return self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        adapted: Tensor = self.square(x @ self.down.mT) @ self.up.mT
        return self.layer(x) + adapted


def vit_adapters() -> nn.Module:
    """The same, frozen, with 24 adapters of 16 x 16: D = 6,144 of 21,322,378."""
    # With its activation torch's fast path would leave the adapters out.
    net = vit_small(F.silu).requires_grad_(False)
    for layer in net.modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            layer.linear1 = Adapter(layer.linear1, 16)
            layer.linear2 = Adapter(layer.linear2, 16)
    return net


class Transposed(nn.Module):
    """Swaps channels and positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)
