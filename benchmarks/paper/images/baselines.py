"""The methods that are not ours, each with its one number tuned.

Every search has as many values as the library's search of the prior precision: 45, or
44 where they are four trained networks times eleven.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module

import torch
from torch import Tensor, nn

from benchmarks.harness.task import Score
from benchmarks.paper.images.case import Case, Fitted, Predict, logits, mixture, nll
from benchmarks.paper.images.swag import Swag, swag, with_weights

TEMPERATURES = tuple(2 ** (step / 8) for step in range(-12, 33))
DROPOUT_RATES = (0.05, 0.1, 0.25, 0.5)  # in training
DROPOUT_FACTORS = tuple(2 ** (step / 2) for step in range(-5, 6))  # in prediction
_HIGHEST_RATE = 0.9


def swag_scales(count: int) -> tuple[float, ...]:
    """Scales of SWAG's deviations: its mean alone, and from 8 down to 1 / 18."""
    steps = count - 1
    return (0.0, *(8 * 2 ** (-7.2 * step / max(1, steps - 1)) for step in range(steps)))


def _best(values: Iterable[float], loss: Callable[[float], float]) -> float:
    return min(values, key=loss)


def _map(case: Case, shown: str) -> Fitted:
    net = case.net()
    return Fitted(lambda x: logits(net, x).log_softmax(1), [])


def _temperature(case: Case, shown: str) -> Fitted:
    """One temperature for all logits.

    Source: Guo et al. (2017), section 4.2, arXiv 1706.04599.
    """
    net = case.net()
    return _tempered(lambda x: logits(net, x), case, shown)


def _tempered(outputs: Callable[[Tensor], Tensor], case: Case, shown: str) -> Fitted:
    """Outputs, unnormalized log-probabilities, over the temperature that fits best."""
    x, y = case.tune[shown]
    found = outputs(x)
    best = _best(
        TEMPERATURES, lambda t: nll(lambda _: (found / t).log_softmax(1), (x, y))
    )
    return Fitted(
        lambda x: (outputs(x) / best).log_softmax(1), [Score("", "scale", best)]
    )


def _ensemble(case: Case, shown: str) -> Fitted:
    """Source: Lakshminarayanan et al. (2017), arXiv 1612.01474."""
    nets = [case.net(member) for member in range(case.setup.members)]
    return Fitted(
        lambda x: mixture([logits(net, x).log_softmax(1) for net in nets]), []
    )


def _tempered_ensemble(case: Case, shown: str) -> Fitted:
    """One temperature for the mixture's log-probabilities.

    Source: Rahaman and Thiery (2021), "pool-then-calibrate", arXiv 2007.08792.
    """
    return _tempered(_ensemble(case, shown).predict, case, shown)


def _dropout(case: Case, shown: str) -> Fitted:
    """The rate in training and that in prediction are chosen together.

    Source: Gal and Ghahramani (2016), arXiv 1506.02142.
    """
    losses = {}
    for rate in DROPOUT_RATES:
        net = case.net(dropout=rate)
        for factor in DROPOUT_FACTORS:
            used = min(rate * factor, _HIGHEST_RATE)
            losses[rate, used] = nll(_dropped(net, used, case), case.tune[shown])
    trained, used = min(losses, key=losses.__getitem__)
    predict = _dropped(case.net(dropout=trained), used, case)
    return Fitted(predict, [Score("", "rate", trained), Score("", "scale", used)])


def _dropped(net: nn.Module, rate: float, case: Case) -> Predict:
    """The mean of passes with units dropped, the same at every call."""
    layers = [each for each in net.modules() if isinstance(each, _DROPOUTS)]

    def predict(x: Tensor) -> Tensor:
        for layer in layers:
            layer.p = rate
            layer.train()
        with torch.random.fork_rng():
            torch.manual_seed(case.seed)
            return mixture(
                logits(net, x).log_softmax(1) for _ in range(case.setup.passes)
            )

    return predict


_DROPOUTS = (nn.Dropout, nn.Dropout2d)


def _swag(case: Case, shown: str) -> Fitted:
    found = gaussian_of_iterates(case)

    def predict(scale: float) -> Predict:
        generator = torch.Generator().manual_seed(case.seed)
        count = case.setup.passes if scale else 1
        nets = [
            with_weights(case.net(), found.draw(scale, generator), case.data.train)
            for _ in range(count)
        ]
        return lambda x: mixture([logits(net, x).log_softmax(1) for net in nets])

    best = _best(
        swag_scales(case.setup.swag_tries),
        lambda scale: nll(predict(scale), case.tune[shown]),
    )
    return Fitted(predict(best), [Score("", "scale", best)])


def gaussian_of_iterates(case: Case) -> Swag:
    """SWAG's, around the MAP that all methods share."""
    recipe = case.setup.recipe
    return swag(
        case.net(),
        recipe.training_part(case.data),
        recipe,
        epochs=case.setup.swag_epochs,
        seed=case.seed,
        path=case.file("swag", "swag"),
    )


def _of_laplace_torch(name: str) -> Callable[[Case, str], Fitted]:
    """Imported when it is run: other experiments do without that library."""

    def fit(case: Case, shown: str) -> Fitted:
        rivals = import_module("benchmarks.paper.images.rivals")
        found: Fitted = getattr(rivals, name)(case, shown)
        return found

    return fit


BASELINES: dict[str, Callable[[Case, str], Fitted]] = {
    "MAP": _map,
    "MAP with temperature": _temperature,
    "deep ensemble": _ensemble,
    "deep ensemble with temperature": _tempered_ensemble,
    "MC dropout": _dropout,
    "SWAG": _swag,
    "ELLA": _of_laplace_torch("ella"),
    "VaLLA": _of_laplace_torch("valla"),
    "last layer, Kronecker (laplace-torch)": _of_laplace_torch("last_layer_kron"),
}
# Those that may keep the prior of the MAP.
WITH_PRIOR = ("ELLA", "last layer, Kronecker (laplace-torch)")
