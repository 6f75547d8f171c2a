"""The methods: from trained networks to class probabilities."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from benchmarks.paper.images.readers import ImageSet, Part, to_unit
from benchmarks.paper.images.setups import Setup
from benchmarks.paper.images.swag import swag, with_weights
from benchmarks.paper.images.training import Networks
from benchmarks.paper.task import Score
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

# From images in [0, 1], (N, C, H, W), to log-probabilities (N, classes).
Predict = Callable[[Tensor], Tensor]

# What the baselines choose from on the images that priors are tuned on.
DROPOUT_RATES = (0.05, 0.1, 0.25, 0.5)
SWAG_SCALES = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
TEMPERATURES = tuple(2 ** (step / 4) for step in range(-6, 17))
# Tuned on images that show some of the shift, in place of images like those trained on.
ON_SHIFT = ", tuned on shift"


class Fitted(NamedTuple):
    """A method on one data set.

    Attributes:
        predict: Its predictions.
        scores: What is known of the fit: its scale, its size, seconds.
    """

    predict: Predict
    scores: list[Score]


@dataclass(frozen=True, eq=False)
class Case:
    """One data set, one seed.

    Attributes:
        data: The set.
        setup: How much is done.
        networks: Trained ones.
        seed: Of the networks and of all that is random in the methods.
        tune: Images and labels that scales and rates are chosen on, by what they show:
            ``""``, or :data:`ON_SHIFT`.
    """

    data: ImageSet
    setup: Setup
    networks: Networks
    seed: int
    tune: dict[str, tuple[Tensor, Tensor]]

    def net(self, member: int = 0, dropout: float = 0.0) -> nn.Module:
        return self.networks.get(
            self.data, self.setup.recipe, self.seed, member=member, dropout=dropout
        )

    def file(self, folder: str, name: str) -> Path:
        """Of something fitted to this case, named by all that it depends on."""
        setup, recipe = self.setup, self.setup.recipe
        parts = [self.data.name, recipe.architecture, f"seed{self.seed}", name]
        parts += [f"epochs{recipe.epochs}", recipe.augment, f"size{setup.num_subnet}"]
        parts += [f"fitted{setup.fitted}", f"tuned{setup.tuned}"]
        parts += [f"most{recipe.most}"] if recipe.most else []
        place = self.networks.folder.parent / folder
        place.mkdir(parents=True, exist_ok=True)
        words = "-".join(parts).replace(",", "").replace(" ", "-")
        return place / f"{words}.safetensors"


def fit(name: str, case: Case) -> Fitted:
    """A method by name, fitted and tuned."""
    shown = ON_SHIFT if name.endswith(ON_SHIFT) else ""
    base = name.removesuffix(ON_SHIFT)
    start = time.process_time()
    if base in _POSTERIORS:
        predict, scores = _posterior(base, case, shown)
    else:
        predict, scores = _OTHERS[base](case, shown)
    return Fitted(predict, [*scores, Score("", "seconds_fit", _since(start))])


def _since(start: float) -> float:
    return time.process_time() - start


def nll(predict: Predict, pairs: tuple[Tensor, Tensor]) -> float:
    """Mean negative log-probability of the labels."""
    x, y = pairs
    return -float(predict(x).gather(1, y.unsqueeze(-1)).mean())


def mixture(parts: Iterator[Tensor] | list[Tensor]) -> Tensor:
    """Log of the mean of probabilities."""
    found = torch.stack(list(parts))
    return found.logsumexp(0) - math.log(len(found))


# --- One network, and sets of networks


@torch.no_grad()
def logits(net: nn.Module, x: Tensor, batch_size: int = 500) -> Tensor:
    device = next(net.parameters()).device
    parts = [net(part.to(device)) for part in x.split(batch_size)]
    return torch.cat(parts).double().cpu()


def _map(case: Case, shown: str) -> Fitted:
    net = case.net()
    return Fitted(lambda x: logits(net, x).log_softmax(1), [])


def _temperature(case: Case, shown: str) -> Fitted:
    """One temperature for all logits.

    Source: Guo et al. (2017), section 4.2, arXiv 1706.04599.
    """
    net = case.net()
    x, y = case.tune[shown]
    found = logits(net, x)
    best = min(
        TEMPERATURES, key=lambda t: nll(lambda _: (found / t).log_softmax(1), (x, y))
    )
    return Fitted(
        lambda x: (logits(net, x) / best).log_softmax(1), [Score("", "scale", best)]
    )


def _ensemble(case: Case, shown: str) -> Fitted:
    """Source: Lakshminarayanan et al. (2017), arXiv 1612.01474."""
    nets = [case.net(member) for member in range(case.setup.members)]
    return Fitted(
        lambda x: mixture([logits(net, x).log_softmax(1) for net in nets]), []
    )


def _dropout(case: Case, shown: str) -> Fitted:
    """The rate is chosen at the first seed, for all seeds.

    Source: Gal and Ghahramani (2016), arXiv 1506.02142.
    """
    rates = {}
    for rate in DROPOUT_RATES:
        net = case.networks.get(case.data, case.setup.recipe, 0, dropout=rate)
        rates[rate] = nll(_dropped(net, case), case.tune[shown])
    best = min(rates, key=rates.__getitem__)
    predict = _dropped(case.net(dropout=best), case)
    return Fitted(predict, [Score("", "scale", best)])


def _dropped(net: nn.Module, case: Case) -> Predict:
    for module in net.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.train()

    def predict(x: Tensor) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(case.seed)
            return mixture(
                logits(net, x).log_softmax(1) for _ in range(case.setup.passes)
            )

    return predict


def _swag(case: Case, shown: str) -> Fitted:
    found = _gaussian_of_iterates(case)

    def predict(scale: float) -> Predict:
        generator = torch.Generator().manual_seed(case.seed)
        count = case.setup.passes if scale else 1
        nets = [
            with_weights(case.net(), found.draw(scale, generator), case.data.train)
            for _ in range(count)
        ]
        return lambda x: mixture([logits(net, x).log_softmax(1) for net in nets])

    best = min(SWAG_SCALES, key=lambda scale: nll(predict(scale), case.tune[shown]))
    return Fitted(predict(best), [Score("", "scale", best)])


def _gaussian_of_iterates(case: Case) -> Any:
    recipe = case.setup.recipe
    return swag(
        case.net(),
        recipe.training_part(case.data),
        recipe,
        epochs=case.setup.swag_epochs,
        seed=case.seed,
        path=case.file("swag", "swag"),
    )


_OTHERS: dict[str, Callable[[Case, str], Fitted]] = {
    "MAP": _map,
    "MAP with temperature": _temperature,
    "deep ensemble": _ensemble,
    "MC dropout": _dropout,
    "SWAG": _swag,
}

# --- Laplace posteriors


class Posterior(NamedTuple):
    """A posterior that the library fits.

    Attributes:
        subnet: The guide's option, from the case, and what the tuning images show.
        covariance: The guide's option.
        ensemble: Whether there is one for each member of the ensemble.
    """

    subnet: Callable[[Case, str], Any]
    covariance: str = "full"
    ensemble: bool = False


def _of_size(make: Callable[[int, Case], Any]) -> Posterior:
    return Posterior(lambda case, shown: make(case.setup.num_subnet, case))


_POSTERIORS: dict[str, Posterior] = {
    "subnet LargestVariance": _of_size(lambda size, case: LargestVariance(size)),
    "subnet LargestVariance (SWAG)": _of_size(
        lambda size, case: LargestVariance(
            size, "swag", moments=_gaussian_of_iterates(case).moments()
        )
    ),
    "subnet LargestVariance (alive)": _of_size(
        lambda size, case: LargestVariance(size, keep_dead=False)
    ),
    "subnet RandomSubnet": _of_size(lambda size, case: RandomSubnet(size, case.seed)),
    "subnet LargestMagnitude": _of_size(lambda size, case: LargestMagnitude(size)),
    "subnet LastLayer": Posterior(lambda case, shown: LastLayer()),
    "subnet PredictiveVariance": Posterior(
        lambda case, shown: PredictiveVariance(
            case.setup.num_subnet, (case.tune[shown][0],)
        )
    ),
    "diagonal Laplace": Posterior(lambda case, shown: None, "diag"),
    "Kronecker Laplace": Posterior(lambda case, shown: None, "kron"),
    "full Laplace": Posterior(lambda case, shown: None),
    "ensemble of subnets": Posterior(
        lambda case, shown: LargestVariance(case.setup.num_subnet), ensemble=True
    ),
}
METHODS = (*_OTHERS, *_POSTERIORS)


def _posterior(name: str, case: Case, shown: str) -> Fitted:
    members = case.setup.members if _POSTERIORS[name].ensemble else 1
    found = [_tuned(name, case, shown, member) for member in range(members)]
    first = found[0]
    scores = [
        Score("", "S", first.subnet.size),
        Score("", "D", first.subnet.num_params),
        Score("", "scale", float(first.prior_scale)),
    ]
    batch_size = case.setup.batch_size
    if _POSTERIORS[name].covariance != "full":
        batch_size = max(1, batch_size // 5)  # rows of the Jacobian of all weights

    def predict(x: Tensor) -> Tensor:
        return mixture([_log_probs(each, x, batch_size) for each in found])

    return Fitted(predict, scores)


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
) -> AutoSubnetMultivariateNormal:
    """A member's posterior with its prior tuned; kept in a file, as is the untuned."""
    net = case.net(member)
    precision = case.setup.recipe.prior_precision(case.data)
    model = classifier(net, precision)
    x, y = case.tune[shown]
    # A subnet may depend on the images that tune it; it is chosen again then.
    own = shown if name == "subnet PredictiveVariance" else ""
    name = "subnet LargestVariance" if _POSTERIORS[name].ensemble else name
    raw = case.file("posteriors", f"{name}{own} member{member}")
    if not raw.exists():
        _fit(name, case, shown, net, model).save(raw)
    tuned = case.file("posteriors", f"{name}{shown} member{member} tuned")
    if not tuned.exists():
        posterior = AutoSubnetMultivariateNormal.load(raw, model, x[:2], y[:2])
        posterior.tune_prior_precision("nll", val=(x, y)).save(tuned)
    return AutoSubnetMultivariateNormal.load(tuned, model, x[:2], y[:2])


def _fit(
    name: str, case: Case, shown: str, net: nn.Module, model: Any
) -> AutoSubnetMultivariateNormal:
    kind, setup = _POSTERIORS[name], case.setup
    everything = setup.recipe.training_part(case.data)
    order = torch.randperm(
        len(everything), generator=torch.Generator().manual_seed(case.seed)
    )
    part = everything[order[: setup.fitted]]
    device = next(net.parameters()).device
    loader = _Batches(part, setup.batch_size, device)
    guide = AutoSubnetLaplace(
        model,
        kind.subnet(case, shown),
        init_loc_fn=init_to_module(net),
        covariance=kind.covariance,
    )
    with warnings.catch_warnings():
        # That a subnet moves no training output is a result here.
        warnings.simplefilter("ignore", NoOutputVarianceWarning)
        return guide.laplace_approximation_from(loader, num_data=len(everything))


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
