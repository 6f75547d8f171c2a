"""The methods: from trained networks to class probabilities."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from benchmarks.harness.task import Score
from benchmarks.paper.images.baselines import BASELINES, gaussian_of_iterates
from benchmarks.paper.images.case import (
    BY_EVIDENCE,
    NUM_ERRORS,
    ON_SHIFT,
    OWN_PRIOR,
    WITHIN_ERRORS,
    Case,
    Fitted,
    mixture,
)
from benchmarks.paper.images.readers import Part, to_unit
from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.exceptions import NoOutputVarianceWarning
from pyro_subnet.nn import bayesianize, init_to_module
from pyro_subnet.selection import (
    LargestMagnitude,
    LargestVariance,
    LastLayer,
    PredictiveVariance,
    RandomSubnet,
)


def fit(name: str, case: Case) -> Fitted:
    """A method by name, fitted and tuned as its name ends."""
    base, comma, words = name.rpartition(",")
    shown = comma + words
    if shown not in (ON_SHIFT, OWN_PRIOR, WITHIN_ERRORS, BY_EVIDENCE):
        base, shown = name, ""
    start, earlier = time.process_time(), 0.0
    if base not in BASELINES:
        (predict, scores), earlier = _posterior(base, case, shown)
    else:
        predict, scores = BASELINES[base](case, shown)
    seconds = earlier + _since(start)
    return Fitted(predict, [*scores, Score("", "seconds_fit", seconds)])


def _since(start: float) -> float:
    return time.process_time() - start


class Posterior(NamedTuple):
    """A posterior that the library fits.

    Attributes:
        subnet: The guide's option, of a size, from the case and what the tuning images
            show.
        covariance: The guide's option.
        times: Weights of the subnet, in units of the setup's.
        looks: Whether the subnet is chosen by the tuning images.
    """

    subnet: Callable[[int, Case, str], Any]
    covariance: str = "full"
    times: float = 1.0
    looks: bool = False


# What `AutoSubnetLaplace(model, default)` gives.
DEFAULT = "subnet by default"
_POSTERIORS: dict[str, Posterior] = {
    DEFAULT: Posterior(lambda size, case, shown: case.setup.default),
    "subnet LargestVariance": Posterior(
        lambda size, case, shown: LargestVariance(size)
    ),
    "subnet LargestVariance (SWAG)": Posterior(
        lambda size, case, shown: LargestVariance(
            size, "swag", moments=gaussian_of_iterates(case).moments()
        )
    ),
    "subnet LargestVariance (alive)": Posterior(
        lambda size, case, shown: LargestVariance(size, keep_dead=False)
    ),
    "subnet RandomSubnet": Posterior(
        lambda size, case, shown: RandomSubnet(size, case.seed)
    ),
    "subnet LargestMagnitude": Posterior(
        lambda size, case, shown: LargestMagnitude(size)
    ),
    "subnet LastLayer": Posterior(lambda size, case, shown: LastLayer()),
    "subnet PredictiveVariance": Posterior(
        lambda size, case, shown: PredictiveVariance(
            size, (case.tune[shown][0],), weighting="equal"
        ),
        looks=True,
    ),
    "subnet PredictiveVariance, greedy": Posterior(
        lambda size, case, shown: PredictiveVariance(
            size, (case.tune[shown][0],), method="greedy", weighting="equal"
        ),
        looks=True,
    ),
    "diagonal Laplace": Posterior(lambda size, case, shown: None, "diag"),
    "Kronecker Laplace": Posterior(lambda size, case, shown: None, "kron"),
    "full Laplace": Posterior(lambda size, case, shown: None),
}
# The same with fewer and more weights.
SIZED = (
    "subnet RandomSubnet",
    "subnet PredictiveVariance",
)
SIZES = {
    f"{name}, {words}": _POSTERIORS[name]._replace(times=times)
    for words, times in (("S / 4", 0.25), ("5 S", 5.0))
    for name in SIZED
}
_POSTERIORS |= SIZES
# Mixtures of the members' posteriors, each tuned by itself.
ENSEMBLES = {
    "ensemble of subnets": "subnet LargestVariance",
    "ensemble of subnets (PredictiveVariance)": "subnet PredictiveVariance",
}
METHODS = (*BASELINES, *_POSTERIORS, *ENSEMBLES)


def _posterior(name: str, case: Case, shown: str) -> tuple[Fitted, float]:
    """Also the seconds of a fit that an earlier call kept."""
    members = case.setup.members if name in ENSEMBLES else 1
    name = ENSEMBLES.get(name, name)
    fits = [_tuned(name, case, shown, member) for member in range(members)]
    found, earlier = [each for each, _ in fits], sum(spent for _, spent in fits)
    first = found[0]
    scores = [
        Score("", "S", first.subnet.size),
        Score("", "D", first.subnet.num_params),
        Score("", "scale", float(first.prior_factor)),
    ]
    batch_size = case.setup.batch_size
    if _POSTERIORS[name].covariance != "full":
        batch_size = max(1, batch_size // 5)  # rows of the Jacobian of all weights

    def predict(x: Tensor) -> Tensor:
        return mixture([_log_probs(each, x, batch_size) for each in found])

    return Fitted(predict, scores), earlier


@torch.no_grad()
def _log_probs(
    posterior: AutoSubnetMultivariateNormal, x: Tensor, batch_size: int
) -> Tensor:
    """The closed-form probit prediction."""
    device = posterior.latents.loc.device
    parts = [
        posterior.predictive_distribution(part.to(device)).logits
        for part in x.split(batch_size)
    ]
    return torch.cat(parts).double().log_softmax(1).cpu()


def _tuned(
    name: str, case: Case, shown: str, member: int
) -> tuple[AutoSubnetMultivariateNormal, float]:
    """A member's posterior with its prior tuned; kept in a file, as is the untuned.

    Also the seconds that its fit took, if it was kept.
    """
    images = shown if shown in case.tune else ""
    x, y = case.tune[images]
    net = case.net(member)
    precision = case.setup.recipe.prior_precision(case.data)
    model = classifier(net, precision)
    own = images if _POSTERIORS[name].looks else ""
    raw = case.file("posteriors", f"{name}{own} member{member}")
    clock, earlier = raw.with_suffix(".seconds"), 0.0
    if raw.exists():
        earlier = float(clock.read_text())
    else:
        start = time.process_time()
        fitted = _fit(name, case, images, net, model)
        clock.write_text(f"{_since(start):.3f}")
        fitted.save(raw)
    if shown == OWN_PRIOR:
        return AutoSubnetMultivariateNormal.load(raw, model, x[:2], y[:2]), earlier
    tuned = case.file("posteriors", f"{name}{shown} member{member} tuned")
    if not tuned.exists():
        posterior = AutoSubnetMultivariateNormal.load(raw, model, x[:2], y[:2])
        if shown == BY_EVIDENCE:
            found = posterior.tune_prior_precision()
        else:
            errors = NUM_ERRORS if shown == WITHIN_ERRORS else 0.0
            found = posterior.tune_prior_precision(
                "nll", val=(x, y), standard_errors=errors
            )
        found.save(tuned)
    return AutoSubnetMultivariateNormal.load(tuned, model, x[:2], y[:2]), earlier


def _fit(
    name: str, case: Case, shown: str, net: nn.Module, model: Any
) -> AutoSubnetMultivariateNormal:
    kind, setup = _POSTERIORS[name], case.setup
    num_data = len(setup.recipe.training_part(case.data))
    device = next(net.parameters()).device
    loader = _Batches(case.fitted_part(), setup.batch_size, device)
    size = max(1, round(kind.times * setup.num_subnet))
    guide = AutoSubnetLaplace(
        model,
        kind.subnet(size, case, shown),
        init_loc_fn=init_to_module(net),
        covariance=kind.covariance,
    )
    with warnings.catch_warnings():
        # That a subnet moves no training output is a result here.
        warnings.simplefilter("ignore", NoOutputVarianceWarning)
        return guide.laplace_approximation_from(loader, num_data=num_data)


@dataclass(frozen=True, eq=False)
class _Batches:
    """Minibatches that can be passed over again."""

    part: Part
    size: int
    device: torch.device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for at in range(0, len(self.part), self.size):
            batch = self.part[at : at + self.size]
            yield to_unit(batch.images).to(self.device), batch.labels.to(self.device)


def classifier(net: nn.Module, prior_precision: float) -> Callable[..., Any]:
    """A network as a Pyro model of classes."""
    bnn = bayesianize(net, prior_scale=prior_precision**-0.5)

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        found = bnn(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Categorical(logits=found), obs=y)

    return model
