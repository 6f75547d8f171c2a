"""Scores of methods in distribution and under shift."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from scipy.ndimage import rotate
from torch import Tensor

from benchmarks.harness.task import Score, Settings, Task
from benchmarks.paper.images.baselines import BASELINES, WITH_PRIOR
from benchmarks.paper.images.case import (
    BY_EVIDENCE,
    CURVE,
    ON_SHIFT,
    OWN_PRIOR,
    WITHIN_ERRORS,
    Case,
    Predict,
    at_temperature,
    logits,
)
from benchmarks.paper.images.methods import ENSEMBLES, METHODS, SIZES, fit
from benchmarks.paper.images.readers import ImageSet, Part, read_images, to_unit
from benchmarks.paper.images.setups import Setup, setup_of
from benchmarks.paper.images.training import Networks
from pyro_subnet.diagnostics import (
    brier_score,
    expected_calibration_error,
    out_of_distribution_auroc,
    predictive_entropy,
)

TILTS = (-30, -15, 0, 15, 30)
# Not run unless asked for: the first one's factor fits no network here, and the others
# take as long as all other methods together.
_TOO_LONG = ("full Laplace", "Kronecker Laplace", "VaLLA")
PLAIN = tuple(name for name in METHODS if name not in (*_TOO_LONG, *SIZES, *ENSEMBLES))
# MAP and ensemble have nothing to tune; the other says no more the second time.
_TUNED_ONCE = ("MAP", "deep ensemble", "subnet LargestMagnitude")


@dataclass(frozen=True, eq=False)
class Tests:
    """What a method is judged by.

    Attributes:
        shifts: Images and labels by shift, made one after the other.
        outside: Images of another kind, by name.
    """

    shifts: Iterator[tuple[str, Part]]
    outside: dict[str, Tensor]


MakeTests = Callable[[ImageSet, Setup, Path], Tests]


def image_tasks(
    experiment: str,
    settings: Settings,
    setups: Sequence[str],
    methods: Sequence[str],
    make_tests: MakeTests,
) -> list[Task]:
    """One task a seed and setup, which fits the methods and scores them."""
    chosen = [setup_of(name, settings.scale) for name in setups]
    return [
        Task(
            experiment,
            setup.dataset,
            seed,
            setup.recipe.architecture,
            tuple(methods),
            partial(_run, settings, setup, seed, make_tests),
        )
        for seed in settings.numbers
        for setup in chosen
    ]


def _run(
    settings: Settings,
    setup: Setup,
    seed: int,
    make_tests: MakeTests,
    methods: Sequence[str],
) -> Iterator[tuple[str, list[Score]]]:
    if settings.data_dir is None:
        raise FileNotFoundError("The images' folder must be named: --data-dir.")
    data = read_images(setup.dataset, settings.data_dir)
    case = make_case(data, setup, settings, seed)
    tests = make_tests(data, setup, settings.data_dir)
    shifts = list(tests.shifts)
    net = case.net()
    outputs = [logits(net, to_unit(part.images)) for _, part in shifts]
    at_map = [
        losses(each.log_softmax(1), part)
        for each, (_, part) in zip(outputs, shifts, strict=True)
    ]
    for method in methods:
        found = fit(method, case)
        scores = score(found.predict, shifts, tests.outside, at_map)
        curve = tempered(outputs, shifts) if method == "MAP" else []
        yield method, [*found.scores, *scores, *curve]


def tempered(
    outputs: Sequence[Tensor], shifts: Sequence[tuple[str, Part]]
) -> list[Score]:
    """NLL of the MAP at each temperature: what gain has which price."""
    return [
        Score(shift, at_temperature(t), float(losses(log_probs, part).mean()))
        for each, (shift, part) in zip(outputs, shifts, strict=True)
        for t in CURVE
        for log_probs in [(each / t).log_softmax(1)]
    ]


def losses(log_probs: Tensor, part: Part) -> Tensor:
    """NLL of each image, nats."""
    return -log_probs.gather(1, part.labels.unsqueeze(-1)).squeeze(-1)


def on_shift(methods: Sequence[str]) -> tuple[str, ...]:
    """The same methods, tuned on images that show some shift."""
    return tuple(f"{name}{ON_SHIFT}" for name in methods if name not in _TUNED_ONCE)


def near_own_prior(methods: Sequence[str]) -> tuple[str, ...]:
    """Those of the same that have a prior: with that of the MAP, and tuned near it."""
    ours = [name for name in methods if name not in BASELINES]
    own = [name for name in methods if name not in BASELINES or name in WITH_PRIOR]
    return (
        *(f"{name}{OWN_PRIOR}" for name in own),
        *(f"{name}{end}" for end in (WITHIN_ERRORS, BY_EVIDENCE) for name in ours),
    )


def make_case(data: ImageSet, setup: Setup, settings: Settings, seed: int) -> Case:
    """A case whose held-out images are shown upright, or at five tilts."""
    held_out = data.held_out[: setup.tuned]
    upright = (to_unit(held_out.images), held_out.labels)
    tilted = [
        rotated(part, degrees)
        for part, degrees in zip(held_out.images.tensor_split(5), TILTS, strict=True)
    ]
    shown = {"": upright, ON_SHIFT: (to_unit(torch.cat(tilted)), held_out.labels)}
    networks = Networks(settings.out / "networks", settings.device)
    return Case(data, setup, networks, seed, shown)


def rotated(images: Tensor, degrees: float) -> Tensor:
    """Images turned counterclockwise, linearly interpolated, blank where none was."""
    if not degrees:
        return images
    turned = rotate(
        images.numpy(),
        degrees,
        axes=(3, 2),
        reshape=False,
        order=1,
        mode="grid-constant",
    )
    return torch.from_numpy(turned)


def score(
    predict: Predict,
    shifts: Sequence[tuple[str, Part]],
    outside: dict[str, Tensor],
    at_map: Sequence[Tensor],
) -> list[Score]:
    """Mean scores by shift, errors over images, gains over the MAP's losses.

    AUROC is of entropy, of the first shift against others.
    """
    scores: list[Score] = []
    images = [part.images for _, part in shifts] + list(outside.values())
    found = predict(to_unit(torch.cat(images))).split([len(each) for each in images])
    inside = found[0].exp()
    for (shift, part), log_probs, base in zip(shifts, found, at_map, strict=False):
        probs, labels = log_probs.exp(), part.labels
        wrong = probs.argmax(1) != labels
        nll = losses(log_probs, part)
        values = {
            "nll": nll.mean(),
            "nll_error": _standard_error(nll),
            "gain_error": _standard_error(base - nll),
            "error": wrong.double().mean(),
            "brier": brier_score(probs, labels).mean(),
            "ece": expected_calibration_error(probs, labels),
            "entropy": predictive_entropy(probs).mean(),
        }
        scores += [Score(shift, name, float(value)) for name, value in values.items()]
    for name, log_probs in zip(outside, found[len(shifts) :], strict=True):
        area = out_of_distribution_auroc(inside, log_probs.exp())
        scores.append(Score(f"ood={name}", "auroc", area))
    return scores


def _standard_error(values: Tensor) -> Tensor:
    """Of a mean over images."""
    return values.std() / len(values) ** 0.5


def in_distribution(data: ImageSet, setup: Setup) -> tuple[str, Part]:
    return "", data.test.some(setup.test) if setup.test else data.test
