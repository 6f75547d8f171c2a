"""Handwritten digits, turned until they are no digits: the MAP against a 5% subnet.

A small network is trained to the MAP and its Laplace approximation is fitted over 5% of
the weights. Both then predict test digits rotated by 0 to 180 degrees. The further a
digit is turned, the less an answer is worth: a calibrated model knows.

    python tutorials/quickstart.py [--seed 0] [--out build/quickstart.png]

Data: scikit-learn's digits, 1,797 images of 8 x 8 pixels (Alpaydin and Kaynak, 1998).
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from pyro.infer import SVI, Predictive, Trace_ELBO
from scipy.ndimage import rotate
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_calibration_error
from tqdm import tqdm

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.exceptions import NoOutputVarianceWarning
from pyro_subnet.nn import bayesianize, init_to_module
from pyro_subnet.selection import LargestVariance

Model = Callable[..., None]
Row = dict[str, float]  # {metric: value} at one rotation

NUM_CLASSES = 10
ROTATIONS = range(0, 181, 15)  # degrees
SHIFTED = range(30, 121, 15)  # the rotations whose mean NLL is compared
TILTS = (-30, -15, 0, 15, 30)  # of the held-out digits that choose the prior
PRIOR_SCALES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
SLACK = 0.001  # nats in distribution; over 360 digits the standard error is 0.03
METRICS = {"accuracy": "accuracy", "nll": "NLL", "entropy": "entropy", "ece": "ECE"}


class Digits(NamedTuple):
    """Images in [0, 1], shape (N, 8, 8), and the digits they show, shape (N,)."""

    images: np.ndarray
    labels: Tensor

    def rotated(self, degrees: float) -> Tensor:
        """The network's inputs, shape (N, 64), turned counterclockwise."""
        options = {"reshape": False, "order": 1, "mode": "grid-constant"}
        turned = rotate(self.images, degrees, axes=(2, 1), **options)
        return torch.from_numpy(turned).flatten(1)


def split_digits(seed: int) -> list[Digits]:
    """Training (60%), held-out (20%) and test digits (20%), classes in proportion."""
    bunch = load_digits()
    images, labels = (bunch.images / 16).astype(np.float32), bunch.target
    rest, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=seed
    )
    train, held_out = train_test_split(
        rest, test_size=0.25, stratify=labels[rest], random_state=seed
    )
    parts = (train, held_out, test)
    return [Digits(images[part], torch.from_numpy(labels[part])) for part in parts]


def make_model(num_hidden: int = 50) -> tuple[Model, nn.Module]:
    """A Pyro model of a two-layer network with N(0, 1) priors, and the network."""
    net = nn.Sequential(
        nn.Linear(64, num_hidden),
        nn.ReLU(),
        nn.Linear(num_hidden, num_hidden),
        nn.ReLU(),
        nn.Linear(num_hidden, NUM_CLASSES),
    )
    bnn = bayesianize(net, prior_scale=1.0)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        logits = bnn(x)
        with pyro.plate("data", len(x)):
            pyro.deterministic("logits", logits, event_dim=1)
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    return model, net


def train_to_map(
    model: Model, net: nn.Module, x: Tensor, y: Tensor, num_steps: int = 1000
) -> AutoSubnetLaplace:
    """A guide at the MAP, found by plain SVI from torch's own initial weights."""
    # The weights that training digits leave uncertain: of pixels that are blank until a
    # digit is turned. A number, 0.05, takes those that keep most variance upright.
    subnet = LargestVariance(0.05)
    guide = AutoSubnetLaplace(model, subnet, init_loc_fn=init_to_module(net))
    decay = 0.05 ** (1 / num_steps)  # the learning rate ends at a twentieth
    optimizer = pyro.optim.ClippedAdam({"lr": 0.02, "lrd": decay})
    svi = SVI(model, guide, optimizer, Trace_ELBO())
    for _ in tqdm(range(num_steps), desc="Train to the MAP"):
        svi.step(x, y)
    return guide


def predict(
    model: Model,
    guide: AutoSubnetLaplace | AutoSubnetMultivariateNormal,
    x: Tensor,
    num_samples: int = 300,
) -> Tensor:
    """Log class probabilities, shape (N, 10): softmax averaged over draws of the guide.

    With ``posterior.linearized_model`` and ``posterior``, this is the linearized
    predictive. The MAP guide always draws the same weights: there one draw is enough.
    """
    pyro.set_rng_seed(0)  # the same draws of the weights at every rotation
    predictive = Predictive(
        model,
        guide=guide,
        num_samples=num_samples,
        parallel=num_samples > 1,
        return_sites=("logits",),
    )
    logits = predictive(x)["logits"]
    return logits.log_softmax(-1).logsumexp(0) - math.log(num_samples)


def score(log_probs: Tensor, labels: Tensor) -> Row:
    """Accuracy, NLL and entropy in nats, and expected calibration error (15 bins)."""
    # Probabilities that pass 1 by round-off would be taken for logits by torchmetrics.
    probs = log_probs.exp().clamp(max=1.0)
    ece = multiclass_calibration_error(probs, labels, NUM_CLASSES, n_bins=15)
    return {
        "accuracy": (probs.argmax(-1) == labels).float().mean().item(),
        "nll": F.nll_loss(log_probs, labels).item(),
        "entropy": -(probs * log_probs).sum(-1).mean().item(),
        "ece": ece.item(),
    }


def choose_prior_scale(
    posterior: AutoSubnetMultivariateNormal, held_out: Digits
) -> float:
    """The scale of least NLL on held-out digits, tilted by up to 30 degrees either way.

    Upright ones cannot choose: the subnet holds the weights that training digits leave
    at their prior, and upright digits hardly use them, whatever the prior's precision.
    """
    x = torch.cat([held_out.rotated(degrees) for degrees in TILTS])
    labels = held_out.labels.repeat(len(TILTS))
    nll = {}
    for scale in tqdm(PRIOR_SCALES, desc="Choose the prior precision"):
        scaled = posterior.with_prior_precision(scale)
        log_probs = predict(scaled.linearized_model, scaled, x)
        nll[scale] = score(log_probs, labels)["nll"]
    return min(nll, key=nll.__getitem__)


def format_table(scores: Mapping[str, Sequence[Row]]) -> str:
    """A line for each rotation; each metric for the MAP, then for the subnet."""
    titles = "".join(f"{title:>18}" for title in METRICS.values())
    names = "".join(f"{name:>9}" for name in scores) * len(METRICS)
    lines = [" " * 8 + titles, "rotation" + names]
    for degrees, *rows in zip(ROTATIONS, *scores.values(), strict=True):
        cells = "".join(f"{row[metric]:9.3f}" for metric in METRICS for row in rows)
        lines.append(f"{degrees:8d}{cells}")
    return "\n".join(lines)


def shifted_nll(rows: Sequence[Row]) -> float:
    """Mean NLL over the rotations from 30 to 120 degrees."""
    nll = {degrees: row["nll"] for degrees, row in zip(ROTATIONS, rows, strict=True)}
    return sum(nll[degrees] for degrees in SHIFTED) / len(SHIFTED)


def draw(scores: Mapping[str, Sequence[Row]], test: Digits, path: Path) -> None:
    """Saves a picture: each metric against rotation, below a digit that turns."""
    figure = Figure(figsize=(8.4, 5.6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    guess = {"accuracy": 0.1, "nll": math.log(10), "entropy": math.log(10)}
    for axes, (metric, title) in zip(panels.flat, METRICS.items(), strict=True):
        if metric in guess:
            axes.axhline(guess[metric], color="0.4", ls=":", label="blind guess")
        for (name, rows), style in zip(scores.items(), ("o--", "s-"), strict=True):
            color = "#D55E00" if name == "MAP" else "#0072B2"  # safe for all eyes
            values = [row[metric] for row in rows]
            axes.plot(ROTATIONS, values, style, color=color, markersize=4.5, label=name)
        unit = " (nats)" if metric in ("nll", "entropy") else ""
        axes.set_title(title[0].upper() + title[1:] + unit, loc="left", fontsize=11)
        axes.set(xticks=ROTATIONS[::2], ylim=(0, None))
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    for axes, digit in zip(panels[0], (4, 2), strict=True):
        for degrees in ROTATIONS[::2]:
            turned = test.rotated(degrees)[test.labels == digit][0].reshape(8, 8)
            image = OffsetImage(turned, zoom=4, cmap="gray_r")
            place = {"xy": (degrees, 1.25), "xycoords": ("data", "axes fraction")}
            axes.add_artist(AnnotationBbox(image, **place, frameon=False))
    for axes in panels[1]:
        axes.set_xlabel("rotation of the test digits (degrees)")
    panels[0, 1].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the comparison; exits with a sentence if the subnet fails it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/quickstart.png"))
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # more would only wait for each other on layers this small
    pyro.set_rng_seed(options.seed)

    train, held_out, test = split_digits(options.seed)
    model, net = make_model()
    x, y = train.rotated(0), train.labels
    guide = train_to_map(model, net, x, y)
    with warnings.catch_warnings():
        # Upright digits hardly see these weights; they are chosen for turned ones.
        warnings.simplefilter("ignore", NoOutputVarianceWarning)
        posterior = guide.laplace_approximation(x, y)
    print(posterior.subnet)

    scale = choose_prior_scale(posterior, held_out)
    posterior = posterior.with_prior_precision(scale)
    print(
        f"Prior precision: {scale:g} times the model's, which has the least NLL on "
        "held-out digits tilted by up to 30 degrees."
    )

    scores: dict[str, list[Row]] = {"MAP": [], "subnet": []}
    for degrees in tqdm(ROTATIONS, desc="Predict rotated test digits"):
        x = test.rotated(degrees)
        at_map = predict(model, guide, x, num_samples=1)
        averaged = predict(posterior.linearized_model, posterior, x)
        scores["MAP"].append(score(at_map, test.labels))
        scores["subnet"].append(score(averaged, test.labels))
    print(format_table(scores))
    draw(scores, test, options.out)
    print(f"Picture: {options.out}")

    upright = [rows[0]["nll"] for rows in scores.values()]
    turned = [shifted_nll(rows) for rows in scores.values()]
    ratio = turned[1] / turned[0]
    print(
        f"Test NLL in distribution: MAP {upright[0]:.3f}, subnet {upright[1]:.3f}; "
        f"mean over 30 to 120 degrees: MAP {turned[0]:.2f}, subnet {turned[1]:.2f}, "
        f"ratio {ratio:.2f} (seed {options.seed})."
    )
    if upright[1] > upright[0] + SLACK or ratio >= 0.5:
        raise SystemExit(
            "The subnet's NLL must be no worse than the MAP's in distribution and less "
            "than half of it from 30 to 120 degrees; see the line above."
        )


if __name__ == "__main__":
    main()
