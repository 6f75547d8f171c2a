"""Estimators of scikit-learn: a network with a subnet's posterior, fitted and tuned.

They need scikit-learn, which the extra ``sklearn`` brings along::

    from pyro_subnet.sklearn import SubnetLaplaceRegressor

    regressor = SubnetLaplaceRegressor(random_state=0).fit(x, y)
    mean, std = regressor.predict(x_test, return_std=True)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from pyro_subnet.exceptions import OptionError, shown
from pyro_subnet.guides.from_evidence import posterior_by_evidence
from pyro_subnet.nn.hidden_layers import network_of
from pyro_subnet.nn.likelihoods import classifier, regressor
from pyro_subnet.options import as_number, is_count

Array = NDArray[Any]
# Rows that predictions take at once.
_PREDICTED_AT_ONCE = 1000
_TWO_CLASSES = 2


class _SubnetLaplace(BaseEstimator, ABC):
    """What both estimators do: scale the data, train by evidence, fit the posterior."""

    def __init__(
        self,
        network: nn.Module | Sequence[int] = (50, 50),
        *,
        subnet: Any = 0.05,
        prior_scale: float | Sequence[float] = (0.3, 1.0),
        num_epochs: int = 500,
        lr: float = 0.01,
        batch_size: int | None = None,
        standardize: bool = True,
        random_state: Any = None,
    ):
        self.network = network
        self.subnet = subnet
        self.prior_scale = prior_scale
        self.num_epochs = num_epochs
        self.lr = lr
        self.batch_size = batch_size
        self.standardize = standardize
        self.random_state = random_state

    @abstractmethod
    def fit(self, X: Any, y: Any) -> Any:
        """Trains the network and fits the posterior."""

    def _inputs(self, x: Array) -> Tensor:
        """Inputs in units of the training inputs' deviation, of the network's type."""
        return torch.as_tensor((x - self._center) / self._scale, dtype=self._dtype)

    def _fit_scale(self, x: Array) -> None:
        self._center, self._scale = np.zeros(x.shape[1]), np.ones(x.shape[1])
        if self.standardize:
            self._center, self._scale = x.mean(0), _deviation(x)

    def _train(
        self,
        model_of: Callable[..., Any],
        batches: list[tuple[Tensor, Tensor]],
        val: Any,
    ) -> None:
        """Trains from each scale of the prior, and keeps what has most evidence."""
        self.posterior_ = posterior_by_evidence(
            model_of,
            self.prior_scale,
            self.subnet,
            batches,
            num_epochs=self.num_epochs,
            lr=self.lr,
            val=val,
        )
        self._model = self.posterior_.user_model

    def _batches(self, x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
        """All data in one batch, or in batches of a seeded order."""
        if self.batch_size is not None and not is_count(self.batch_size):
            raise OptionError(
                "`batch_size` must be at least 1, or None for one batch; got "
                f"{shown(self.batch_size)}. Pass a whole number."
            )
        if self.batch_size is None or self.batch_size >= len(x):
            return [(x, y)]
        order = torch.randperm(len(x)).split(int(self.batch_size))
        return [(x[at], y[at]) for at in order]

    def _predictives(self, X: Any) -> Iterator[Any]:
        """Predictive distributions of some rows after others."""
        check_is_fitted(self)
        x = self._inputs(validate_data(self, X, reset=False, dtype=np.float64))
        return self.posterior_.predictive_distributions_from(
            [(part,) for part in x.split(_PREDICTED_AT_ONCE)]
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A pickled posterior leaves its model behind: it is given back."""
        super().__setstate__(state)
        if "posterior_" in self.__dict__:
            self.posterior_ = self.posterior_.with_model(self._model)


@final
class SubnetLaplaceRegressor(RegressorMixin, _SubnetLaplace):
    """Regression by a network, a few of whose weights have a Gaussian posterior.

    ``fit`` trains the network by the evidence, which sets the precision of its prior,
    with normal noise that held-out data set, and fits the posterior there. Inputs and
    targets may be NumPy arrays or pandas objects; a target may have several columns.

    Args:
        network: Sizes of the hidden layers of a network with tanh, computed in float64;
            or a network, which is copied, and whose training goes on from its weights.
        subnet: As for :class:`pyro_subnet.AutoSubnetLaplace`.
        prior_scale: Standard deviation of the weights' priors, where training begins;
            of several, the training that ends in the highest evidence counts.
        num_epochs: Passes over the data in training.
        lr: Learning rate of Adam, at the start.
        batch_size: Rows in a batch; all of them by default.
        standardize: Whether the network sees inputs and targets in units of their
            standard deviations in the training data.
        validation_fraction: Share of the rows that set the noise, and train nothing; 0
            to set it by the evidence alone.
        random_state: Seed, or NumPy's ``RandomState``, for the network's first weights,
            the split and the order of batches.

    Attributes:
        posterior_: The posterior, of a network that sees standardized data.
        noise_: Standard deviation of the noise, in the target's units, for each column.
        n_features_in_: Number of inputs.
        feature_names_in_: Their names, where they have any.

    Raises:
        OptionError: When fitted, if an option is none of those allowed.
        ValueError: When fitted, if the data are no numbers, or too few.
    """

    def __init__(
        self,
        network: nn.Module | Sequence[int] = (50, 50),
        *,
        subnet: Any = 0.05,
        prior_scale: float | Sequence[float] = (0.3, 1.0),
        num_epochs: int = 500,
        lr: float = 0.01,
        batch_size: int | None = None,
        standardize: bool = True,
        validation_fraction: float = 0.1,
        random_state: Any = None,
    ):
        super().__init__(
            network,
            subnet=subnet,
            prior_scale=prior_scale,
            num_epochs=num_epochs,
            lr=lr,
            batch_size=batch_size,
            standardize=standardize,
            random_state=random_state,
        )
        self.validation_fraction = validation_fraction

    def fit(self, X: Any, y: Any) -> SubnetLaplaceRegressor:
        """Trains the network and fits the posterior.

        Args:
            X: Inputs, shape (N, number of inputs).
            y: Targets, shape (N,) or (N, E).

        Returns:
            The estimator itself.

        Raises:
            OptionError: If an option is none of those allowed.
        """
        x, target = validate_data(
            self,
            X,
            y,
            dtype=np.float64,
            y_numeric=True,
            multi_output=True,
            ensure_min_samples=2,
        )
        target = target.astype(np.float64)
        columns = target.reshape(len(target), -1)
        self._one_column = target.ndim == 1
        share = as_number(self.validation_fraction, "validation_fraction", "0.1")
        if not 0.0 <= share < 1.0:
            raise OptionError(
                "`validation_fraction` must lie in [0, 1); got "
                f"{share}. Pass 0.1 for a tenth."
            )
        self._fit_scale(x)
        self._y_center = np.zeros(columns.shape[1])
        self._y_scale = np.ones(columns.shape[1])
        if self.standardize:
            self._y_center, self._y_scale = columns.mean(0), _deviation(columns)
        with _seeded(self.random_state):
            net = network_of(self.network, x.shape[1], columns.shape[1])
            self._dtype = next(net.parameters()).dtype
            targets = torch.as_tensor(
                (columns - self._y_center) / self._y_scale, dtype=self._dtype
            )
            inputs = self._inputs(x)
            held_out = math.ceil(share * len(x))
            val, train = torch.randperm(len(x)).split([held_out, len(x) - held_out])
            batches = self._batches(inputs[train], targets[train])
            pair = (inputs[val], targets[val]) if held_out else None
            self._train(partial(regressor, net, noise=1.0), batches, pair)
        scale = self.posterior_.noise_factor * self._y_scale
        self.noise_ = scale[0] if self._one_column else scale
        return self

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """The predictive mean at each row, and its standard deviation if asked for.

        Args:
            X: Inputs, shape (N, number of inputs).
            return_std: Whether to return the standard deviation of an observation too,
                with the noise.

        Returns:
            The mean, shape of the targets; a pair of it and the standard deviation.
        """
        found = list(self._predictives(X))
        mean = _joined([p.mean for p in found]) * self._y_scale + self._y_center
        std = _joined([p.variance.sqrt() for p in found]) * self._y_scale
        if self._one_column:
            mean, std = mean[:, 0], std[:, 0]
        return (mean, std) if return_std else mean

    def __sklearn_tags__(self) -> Any:
        """What scikit-learn may expect: targets may have several columns."""
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        tags.target_tags.single_output = True
        return tags


@final
class SubnetLaplaceClassifier(ClassifierMixin, _SubnetLaplace):
    """Classification by a network, a few of whose weights have a Gaussian posterior.

    ``fit`` trains the network by the evidence, which sets the precision of its prior,
    and fits the posterior there. Labels may be of any type that scikit-learn takes.

    Args:
        network: As for :class:`SubnetLaplaceRegressor`; it has one output for two
            classes, else one for each class.
        subnet: As there.
        prior_scale: As there.
        num_epochs: As there.
        lr: As there.
        batch_size: As there.
        standardize: As there, of the inputs.
        random_state: As there.

    Attributes:
        posterior_: The posterior, of a network that sees standardized inputs.
        classes_: The labels, in the order of :meth:`predict_proba`.
        n_features_in_: Number of inputs.
        feature_names_in_: Their names, where they have any.

    Raises:
        OptionError: When fitted, if an option is none of those allowed.
        ValueError: When fitted, if the data are no numbers, or of a single class.
    """

    def fit(self, X: Any, y: Any) -> SubnetLaplaceClassifier:
        """Trains the network and fits the posterior.

        Args:
            X: Inputs, shape (N, number of inputs).
            y: Labels, shape (N,).

        Returns:
            The estimator itself.

        Raises:
            ValueError: If there is a single class.
        """
        x, target = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(target)
        self.classes_, numbers = np.unique(target, return_inverse=True)
        count = len(self.classes_)
        if count < _TWO_CLASSES:
            raise ValueError(
                "A classifier must see at least two classes; got 1 class, "
                f"{self.classes_[0]!r}. Check the labels, and the split of the data."
            )
        self._fit_scale(x)
        with _seeded(self.random_state):
            num_outputs = 1 if count == _TWO_CLASSES else count
            net = network_of(self.network, x.shape[1], num_outputs)
            self._dtype = next(net.parameters()).dtype
            inputs = self._inputs(x)
            _check_outputs(net, inputs, count)
            batches = self._batches(inputs, torch.as_tensor(numbers))
            self._train(partial(classifier, net), batches, None)
        return self

    def predict_proba(self, X: Any) -> Array:
        """The predictive probability of each class, the posterior integrated out.

        Args:
            X: Inputs, shape (N, number of inputs).

        Returns:
            Shape (N, number of classes), rows that sum to one.
        """
        found = _joined([p.probs for p in self._predictives(X)])
        if len(self.classes_) == _TWO_CLASSES and found.shape[1] == 1:
            return np.concatenate([1.0 - found, found], 1)
        return found

    def predict(self, X: Any) -> Array:
        """The most probable class at each row.

        Args:
            X: Inputs, shape (N, number of inputs).

        Returns:
            Labels, shape (N,).
        """
        chosen = self.predict_proba(X).argmax(1)
        return self.classes_[chosen]


def _check_outputs(net: nn.Module, inputs: Tensor, num_classes: int) -> None:
    """Refuses a network of the user's whose outputs are not the classes."""
    with torch.no_grad():
        outputs = deepcopy(net).eval()(inputs[:_TWO_CLASSES])
    found = outputs.shape[1] if outputs.ndim > 1 else 1
    if found != num_classes and (found, num_classes) != (1, _TWO_CLASSES):
        raise OptionError(
            "`network` must have an output for each class, or one for two classes; "
            f"got {found} outputs, and data of {num_classes} classes. Give it as many "
            "outputs, or stratify the split that lost a class."
        )


@contextmanager
def _seeded(random_state: Any) -> Iterator[None]:
    """Torch's random numbers from a seed, and given back as they were."""
    seed = check_random_state(random_state).randint(2**31 - 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _deviation(x: Array) -> Array:
    """Standard deviations of columns; 1 for a column of one value."""
    found = x.std(0)
    return np.where(found > 0, found, 1.0)


def _joined(parts: list[Tensor]) -> Array:
    """Rows of all parts in float64, with one column at least."""
    joined = torch.cat(parts).detach().to(torch.float64).cpu().numpy()
    return joined.reshape(len(joined), -1)
