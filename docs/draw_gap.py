"""Draws docs/gap.png: the README's first example beside the MAP and all weights.

`python docs/draw_gap.py` runs the example as it stands in README.md, fits all weights
at the same MAP, prints the standard deviations of the three, and writes the picture.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import init_to_value

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.plotting import plot_regression

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "gap.png"
PLACES = {"on the data": 0.75, "in the gap": -0.1, "beyond": 1.6}


def example() -> dict[str, Any]:
    """What the README's first block of code leaves behind."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)[:1]
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


def main() -> None:
    """Runs, fits, draws and prints."""
    names = example()
    guide, posterior, x, y, train = (
        names[name] for name in ("guide", "posterior", "x", "y", "train")
    )
    start = init_to_value(values=guide.median())
    every = AutoSubnetLaplace(guide.user_model, init_loc_fn=start)
    whole = every.laplace_approximation(x[train], y[train])
    whole = whole.with_prior_precision(guide.prior_factor)
    whole = whole.with_noise_scale(guide.noise_factor)
    at = torch.linspace(-1.9, 1.9, 191).unsqueeze(-1)
    own, full = (each.output_distribution(at) for each in (posterior, whole))
    alone = dist.Normal(own.mean.squeeze(-1), 1e-3)
    figure, axes = plt.subplots(
        1, 3, figsize=(10, 3.2), sharex=True, sharey=True, layout="constrained"
    )
    titles = ("MAP", "5% of the weights", "all weights")
    for ax, title, found in zip(axes, titles, (alone, own, full), strict=True):
        plot_regression(at, found, data=(x, y.squeeze(-1)), ax=ax)
        ax.plot(at, torch.cos(4 * at + 0.8), color="0.45", lw=1, ls=":", label="truth")
        ax.set(title=title, ylim=(-6, 6))
        ax.label_outer()
    for ax in axes[1:]:
        ax.get_legend().remove()
    axes[0].legend(frameon=False, fontsize=8, ncols=2, loc="upper center")
    figure.savefig(PICTURE, dpi=200)
    for place, where in PLACES.items():
        point = torch.tensor([[where]])
        subnet, every = (
            each.output_distribution(point).stddev.item() for each in (posterior, whole)
        )
        print(f"{place:12s} MAP 0, subnet {subnet:.2f}, all weights {every:.2f}")


if __name__ == "__main__":
    main()
