"""A ResNet-18 on FashionMNIST with the paper's S = 42,438, in a few minutes of a card.

Trained on random crops in mixed precision, until its share of the minutes is spent; the
network of the last epoch stands in the folder, and the same call goes on from it::

    python -m benchmarks.gpu.images --data DATA --out OUT --minutes 4 --device cuda
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.engine.machine import description
from benchmarks.engine.networks import resnet18_batchnorm
from benchmarks.paper.images.methods import classifier
from benchmarks.paper.images.readers import ImageSet, Part, read_images, to_unit
from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.nn import init_to_module
from pyro_subnet.selection import LargestVariance

PAPER_SUBNET = 42_438
# Of the minutes, for training; the rest is for the posterior and its predictions.
_TRAINING = 0.5
_BATCH_SIZE, _PREDICT_SIZE = 128, 250
_SIZE, _PADDING = 32, 4
_LEARNING_RATE = 0.1
_TILT = 30.0  # degrees, of the shifted test images


@dataclass(frozen=True)
class Settings:
    """What may be asked for.

    Attributes:
        out: Where the network and the table go.
        minutes: In all.
        device: Where everything is computed.
        subnet: S.
        num_fit: Training images that the posterior is fitted to; they stand for all.
        num_epochs: Passes that training takes at most.
    """

    out: Path
    minutes: float
    device: torch.device
    subnet: int = PAPER_SUBNET
    num_fit: int = 5000
    num_epochs: int = 30


def inputs(images: Tensor, device: torch.device) -> Tensor:
    """The network's inputs, (N, 3, 32, 32), centred."""
    x = to_unit(images.to(device)) - 0.5
    missing = _SIZE - x.shape[-1]
    x = F.pad(x, [missing // 2, missing - missing // 2] * 2, value=-0.5)
    return x.expand(-1, 3, -1, -1)


def cropped(x: Tensor) -> Tensor:
    """The same images, each moved by up to four pixels, half of them mirrored."""
    wide = F.pad(x, [_PADDING] * 4, value=-0.5)
    right, down = torch.randint(2 * _PADDING + 1, (2, len(x)), device=x.device)
    steps = torch.arange(_SIZE, device=x.device)
    rows = (down[:, None] + steps)[:, None, :, None]
    columns = (right[:, None] + steps)[:, None, None, :]
    at = torch.arange(len(x), device=x.device)[:, None, None, None]
    channels = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
    moved = wide[at, channels, rows, columns]
    flips = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
    return moved.where(~flips, moved.flip(-1))


def tilted(x: Tensor) -> Tensor:
    """The same images, turned."""
    angle = torch.tensor(_TILT).deg2rad()
    sine, cosine = angle.sin().item(), angle.cos().item()
    matrix = x.new_tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0]])
    shape = list(x.shape)
    grid = F.affine_grid(matrix.expand(len(x), 2, 3), shape, align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def train(net: nn.Module, part: Part, settings: Settings, stop: float) -> int:
    """Trains until the clock says ``stop``, from where the folder's file stands."""
    path = settings.out / "network.pt"
    done = 0
    if path.exists():
        state = torch.load(path, map_location=settings.device)
        done = state["epochs"]
        net.load_state_dict(state["net"])
    optimizer = torch.optim.SGD(
        net.parameters(), _LEARNING_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    x, y = inputs(part.images, settings.device), part.labels.to(settings.device)
    net.train()
    started = time.perf_counter()
    while done < settings.num_epochs and time.perf_counter() < stop:
        # The rate falls to nothing as the minutes are spent, or the epochs.
        spent = (time.perf_counter() - started) / (stop - started)
        share = max(spent, done / settings.num_epochs)
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * (1 - share)
        for at in torch.randperm(len(y), device=settings.device).split(_BATCH_SIZE):
            optimizer.zero_grad()
            with torch.autocast(settings.device.type, torch.bfloat16):
                loss = F.cross_entropy(net(cropped(x[at])), y[at])
            loss.backward()
            optimizer.step()
        done += 1
        torch.save({"net": net.state_dict(), "epochs": done}, path)
    net.eval()
    return done


def judged(log_probs: Tensor, labels: Tensor) -> str:
    """Negative log likelihood with its standard error, and accuracy."""
    nats = -log_probs.gather(1, labels[:, None]).squeeze(1).double()
    error = float(nats.std()) / len(nats) ** 0.5
    right = float((log_probs.argmax(1) == labels).double().mean())
    return f"{float(nats.mean()):.4f} +- {error:.4f} nats, {right:.2%} right"


def run(images: ImageSet, settings: Settings) -> list[str]:
    """Trains, fits and predicts; writes each line when it is known."""
    settings.out.mkdir(parents=True, exist_ok=True)
    table, said = settings.out / "images.txt", list[str]()

    def say(line: str) -> None:
        said.append(line)
        with table.open("a") as stream:
            print(line, file=stream)
        print(line, flush=True)

    start = time.perf_counter()

    def seconds() -> str:
        return f"{time.perf_counter() - start:.0f} s"

    torch.manual_seed(0)
    device = settings.device
    say(f"{description(device)}; ResNet-18 on {images.name}, S = {settings.subnet:,}")
    net = resnet18_batchnorm().to(device)
    stop = start + 60 * settings.minutes * _TRAINING
    epochs = train(net, images.train, settings, stop)
    say(f"trained for {epochs} epochs ({seconds()})")
    few = torch.randperm(len(images.train))[: settings.num_fit]
    batches = [
        (inputs(images.train.images[at], device), images.train.labels[at].to(device))
        for at in few.split(_BATCH_SIZE)
    ]
    guide = AutoSubnetLaplace(
        classifier(net, prior_precision=1.0),
        LargestVariance(settings.subnet),
        init_loc_fn=init_to_module(net),
    )
    posterior = guide.laplace_approximation_from(batches, num_data=len(images.train))
    say(f"fitted to {len(few)} images ({seconds()})")
    posterior = posterior.tune_prior_precision()
    say(f"prior precision times {posterior.prior_factor:.3g} ({seconds()})")
    labels = images.test.labels.to(device)
    shifts: dict[str, Callable[[Tensor], Tensor]] = {
        "test": lambda x: x,
        "turned by 30 degrees": tilted,
    }
    for name, shift in shifts.items():
        parts = images.test.images.split(_PREDICT_SIZE)
        moved = [shift(inputs(part, device)) for part in parts]
        with torch.no_grad():
            of_map = torch.cat([net(x).log_softmax(1) for x in moved])
        found = posterior.predictive_distributions_from(moved)
        of_subnet = torch.cat([predictive.logits for predictive in found])
        say(f"{name}: MAP {judged(of_map, labels)}")
        say(f"{name}: subnet {judged(of_subnet.log_softmax(1), labels)} ({seconds()})")
    return said


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.images")
    parser.add_argument("--data", type=Path, required=True, help="holds fashion-mnist")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--subnet", type=int, default=PAPER_SUBNET)
    options: Any = parser.parse_args(arguments)
    settings = Settings(options.out, options.minutes, options.device, options.subnet)
    run(read_images("fashion", options.data), settings)


if __name__ == "__main__":
    main()
