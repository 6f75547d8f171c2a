"""How much is done at each scale."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.harness.task import Scale
from benchmarks.paper.images.training import Recipe


@dataclass(frozen=True)
class Setup:
    """One network on one data set.

    Attributes:
        dataset: See :mod:`~benchmarks.paper.images.readers`.
        recipe: How its networks are trained.
        default: Weights of the subnet that the library chooses by default: a share, or
            a count where 5% are too many.
        num_subnet: Weights of other subnets.
        fitted: Training images that the curvature is summed over, a random choice; the
            sum is scaled up to all. None for all.
        tuned: Held-out images that scales and rates are chosen on.
        test: Test images in distribution; None for all.
        shifted: Test images of each shift, a random choice, the same in every run.
        members: Networks of an ensemble.
        passes: Networks drawn for MC dropout and SWAG.
        swag_epochs: Passes over the training data from the MAP on.
        swag_tries: Scales of SWAG that are tried.
        valla: Inducing inputs of VaLLA, and steps of its optimizer, of which a hundred
            is its library's default.
        batch_size: Images whose Jacobian is held at once.
    """

    dataset: str
    recipe: Recipe
    default: int | float = 0.05
    num_subnet: int = 600
    fitted: int | None = 10_000
    tuned: int = 1000
    test: int | None = None
    shifted: int = 500
    members: int = 5
    passes: int = 30
    swag_epochs: int = 1
    swag_tries: int = 45
    valla: tuple[int, int] = (100, 100)
    batch_size: int = 250


_RESNET = Recipe("resnet18", 30, 0.1, augment="flip", bfloat16=True)
_NUM_SUBNET = 42_438  # of the paper's ResNet-18
_SMALL = {
    "mnist": Setup("mnist", Recipe("cnn", 3, 0.1)),
    "fashion": Setup("fashion", Recipe("cnn", 4, 0.1)),
    "fashion best": Setup(
        "fashion",
        Recipe("conv-bn-5", 8, 0.1, augment="mirror", bfloat16=True),
        default=2000,
        fitted=2000,
    ),
    "cifar10": Setup(
        "cifar10",
        Recipe("resnet9", 28, 0.1, augment="cut", bfloat16=True),
        default=2000,
        fitted=2000,
        tuned=500,
        passes=10,
        swag_tries=9,
    ),
    # The paper's network and subnet on few images, where there is no GPU.
    "resnet18": Setup(
        "cifar10",
        replace(_RESNET, epochs=10),
        default=2000,
        num_subnet=_NUM_SUBNET,
        fitted=2000,
        tuned=500,
        test=2000,
        shifted=250,
        passes=10,
        swag_tries=9,
        batch_size=50,
    ),
}


def setup_of(name: str, scale: Scale) -> Setup:
    """What is run of one network at one scale.

    At ``"paper"`` every network is a ResNet-18, and its subnet of the paper's size.
    """
    small = _SMALL[name]
    if scale == "small":
        return small
    if scale == "smoke":
        return replace(
            small,
            recipe=replace(small.recipe, epochs=1, most=256),
            default=min(small.default, 20),
            num_subnet=20,
            fitted=64,
            tuned=20,
            test=50,
            shifted=10,
            members=2,
            passes=2,
            swag_tries=3,
            valla=(3, 2),
            batch_size=25,
        )
    return Setup(
        small.dataset,
        replace(_RESNET, augment="shift" if small.dataset == "mnist" else "flip"),
        default=2000,
        num_subnet=_NUM_SUBNET,
        fitted=None,
        tuned=2000,
        shifted=10_000,
        batch_size=50,
    )
