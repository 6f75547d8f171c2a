"""A model of BoTorch's, for Bayesian optimization: a network with a subnet's posterior.

It needs BoTorch, which the extra ``botorch`` brings along::

    from pyro_subnet.botorch import SubnetLaplaceModel

    model = SubnetLaplaceModel.fit(train_X, train_Y)
    acquisition = LogExpectedImprovement(model, best_f=train_Y.max())
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
from botorch.acquisition.objective import PosteriorTransform
from botorch.models.model import Model
from botorch.models.transforms.input import InputStandardize, InputTransform
from botorch.models.transforms.outcome import OutcomeTransform, Standardize
from botorch.posteriors import GPyTorchPosterior, Posterior
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from linear_operator.operators import CholLinearOperator, TriangularLinearOperator
from torch import Tensor, nn
from torch.distributions import MultivariateNormal as TorchNormal

from pyro_subnet.exceptions import DataError, OptionError
from pyro_subnet.guides.from_evidence import posterior_by_evidence
from pyro_subnet.guides.posterior import AutoSubnetMultivariateNormal
from pyro_subnet.nn.hidden_layers import network_of
from pyro_subnet.nn.likelihoods import regressor
from pyro_subnet.tensors.lower_factor import lower_factor

# Axes of a set of points, (q, d).
_SET = 2


@final
class SubnetLaplaceModel(Model):
    r"""BoTorch's ``Model`` of a regression whose network has a subnet's posterior.

    At each t-batch of q points the posterior is the joint closed form over their
    linearized outputs, :math:`N(f(X; \hat\theta), J P^{-1} J^\top)`, differentiable
    (once) in the points. Acquisition functions that take a model's ``posterior`` run on
    it, analytic and by draws.

    Args:
        posterior: Of a Pyro model that takes inputs (N, d) and then targets, with
            normal noise whose scale no chosen weight moves.
        train_X: The inputs that it was fitted to, shape (N, d), before any transform.
        input_transform: What the network's inputs went through: BoTorch's, trained.
        outcome_transform: What its targets went through, likewise.

    Attributes:
        subnet_posterior: The posterior guide, of transformed inputs and outcomes.
        train_inputs: A tuple of ``train_X``, as BoTorch's own models have it.

    Raises:
        DataError: If ``train_X`` is no matrix.
        OptionError: If the noise is not normal, or a chosen weight moves its scale.
    """

    def __init__(
        self,
        posterior: AutoSubnetMultivariateNormal,
        train_X: Tensor,
        *,
        input_transform: InputTransform | None = None,
        outcome_transform: OutcomeTransform | None = None,
    ):
        super().__init__()
        if train_X.ndim != _SET or not len(train_X):
            raise DataError(
                "`train_X` must have shape (N, d) with N of at least 1; got "
                f"{tuple(train_X.shape)}. Pass the inputs of the fit."
            )
        self.subnet_posterior = posterior
        self.train_inputs = (train_X,)
        if input_transform is not None:
            self.input_transform = input_transform
        if outcome_transform is not None:
            self.outcome_transform = outcome_transform
        self._user_model = (posterior.user_model,)  # no submodule: its mode is its own
        self._seen: _Seen | None = None
        self.eval()
        # Refuses other models at once.
        one = self.transform_inputs(train_X[:1]).to(posterior.loc)
        found = posterior.predictive_distribution(one, joint=1)
        if not isinstance(found, TorchNormal):
            raise OptionError(
                "The posterior must be of a model with normal noise; got "
                f"{type(found).__name__} for y. Take the logarithm of the targets, by "
                "BoTorch's `Log`, say."
            )
        self._width = found.event_shape[-1]
        self._columns = list(range(self._width))

    @classmethod
    def fit(
        cls,
        train_X: Tensor,
        train_Y: Tensor,
        *,
        network: nn.Module | Sequence[int] = (50, 50),
        activation: str = "silu",
        subnet: Any = None,
        prior_scale: float | Sequence[float] = 1.0,
        num_epochs: int = 500,
        lr: float = 0.01,
        input_transform: InputTransform | None = None,
        outcome_transform: OutcomeTransform | None = None,
    ) -> SubnetLaplaceModel:
        """Trains a network by the evidence, and fits the posterior.

        The evidence sets the precision of the prior and the noise, as in
        :class:`pyro_subnet.sklearn.SubnetLaplaceRegressor`; no data are held out, since
        where they are chosen one by one they are few. New weights are drawn by torch's
        own generator.

        Args:
            train_X: Inputs, shape (N, d).
            train_Y: Outcomes, shape (N, m).
            network: Sizes of the hidden layers of a network, computed in float64; or a
                network, which is copied, and whose training goes on from its weights.
            activation: After the hidden layers, where ``network`` is sizes: ``"silu"``,
                or ``"tanh"``, which fits few data of smooth functions less well.
            subnet: As for :class:`pyro_subnet.AutoSubnetLaplace`; by default all
                weights.
            prior_scale: Standard deviation of the weights' priors, where training
                begins; of several, the training that ends in the highest evidence
                counts. One by default: from a narrow one, few data are all noise.
            num_epochs: Passes over the data, which are one batch.
            lr: Learning rate of Adam, at the start.
            input_transform: As in BoTorch's models; by default ``InputStandardize``.
            outcome_transform: Likewise; by default ``Standardize``.

        Returns:
            The model.

        Raises:
            DataError: If the data are no matrices of as many rows.
            OptionError: If an option is none of those allowed.
        """
        if not train_X.ndim == train_Y.ndim == _SET or len(train_X) != len(train_Y):
            raise DataError(
                "`train_X` and `train_Y` must have shapes (N, d) and (N, m); got "
                f"{tuple(train_X.shape)} and {tuple(train_Y.shape)}. Give a single "
                "outcome a column of its own, and batches a model each."
            )
        num_inputs, num_outputs = train_X.shape[1], train_Y.shape[1]
        transforms = (
            input_transform or InputStandardize(d=num_inputs),
            outcome_transform or Standardize(m=num_outputs),
        )
        for transform in transforms:  # in training mode they learn from what they see
            transform.to(train_X).train()
        net = network_of(network, num_inputs, num_outputs, activation)
        like = next(net.parameters())
        batch = (
            transforms[0](train_X).detach().to(like),
            transforms[1](train_Y)[0].detach().to(like),
        )
        posterior = posterior_by_evidence(
            partial(regressor, net, noise=1.0),
            prior_scale,
            subnet,
            [batch],
            num_epochs=num_epochs,
            lr=lr,
        )
        return cls(
            posterior,
            train_X,
            input_transform=transforms[0],
            outcome_transform=transforms[1],
        )

    # What BoTorch asks of a model

    @property
    def num_outputs(self) -> int:
        """The number of outcomes, m."""
        return len(self._columns)

    @property
    def batch_shape(self) -> torch.Size:
        """Of a model conditioned on several draws of outcomes; else empty."""
        return torch.Size() if self._seen is None else self._seen.weights.shape[:-1]

    def train(self, mode: bool = True) -> SubnetLaplaceModel:
        """Sets the mode. The training inputs stay as they are: nothing reads them.

        Args:
            mode: Whether to train. Predictions turn it off.

        Returns:
            The model itself.
        """
        return nn.Module.train(self, mode)

    def eval(self) -> SubnetLaplaceModel:
        """Turns training off.

        Returns:
            The model itself.
        """
        return self.train(False)

    def posterior(
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: PosteriorTransform | None = None,
    ) -> Posterior:
        r"""The joint posterior over each t-batch of points.

        Args:
            X: Points, shape (..., q, d), differentiable.
            output_indices: Outcomes to keep; all by default.
            observation_noise: Whether the noise is in it; a tensor of variances that
                broadcasts to (..., q, m) is added in place of the model's own, in the
                transformed units.
            posterior_transform: BoTorch's, of the posterior that comes out.

        Returns:
            A ``GPyTorchPosterior``, joint over q points and m outcomes. Draws are exact
            where the covariance is singular, as of more points than chosen weights.
            Outcomes transformed other than linearly have a ``TransformedPosterior``.

        Raises:
            DataError: If ``X`` is no batch of sets of points, or the noise does not
                fit.
        """
        if output_indices is not None:
            kept = self.subset_output(output_indices)
            return kept.posterior(X, None, observation_noise, posterior_transform)
        if X.ndim < _SET:
            raise DataError(
                f"`X` must have shape (..., q, d); got {tuple(X.shape)}. Pass a point "
                "as (1, d)."
            )
        self.eval()
        loc, factor = self._moments(self.transform_inputs(X), observation_noise)
        found: Posterior = GPyTorchPosterior(_normal(loc, factor))
        if hasattr(self, "outcome_transform"):
            found = self.outcome_transform.untransform_posterior(found, X=X)
        return found if posterior_transform is None else posterior_transform(found)

    def subset_output(self, idcs: list[int]) -> SubnetLaplaceModel:
        """The model of some of the outcomes.

        Args:
            idcs: Which ones, in order.

        Returns:
            A new model, of the same posterior.

        Raises:
            OptionError: If there are no such outcomes.
        """
        if not idcs or not set(idcs) <= set(range(self.num_outputs)):
            raise OptionError(
                f"`idcs` must name some of {self.num_outputs} outcomes; got {idcs}. "
                "Count from 0."
            )
        new = self._copied()
        new._columns = [self._columns[at] for at in idcs]
        if hasattr(self, "outcome_transform"):
            new.outcome_transform = self.outcome_transform.subset_output(idcs)
        return new

    def condition_on_observations(
        self, X: Tensor, Y: Tensor, **kwargs: Any
    ) -> SubnetLaplaceModel:
        r"""The model after more data, by ``subnet_posterior.update``, without training.

        Exact for the linearized model: the covariance of the chosen weights is that of
        a fit to all data, and their mean moves to :math:`\hat\theta + P^{-1} J^\top
        \Lambda (y - f(X; \hat\theta))` as regards predictions here. What stays at the
        MAP is the point about which the network is linearized and
        ``subnet_posterior.loc``, all weights that were not chosen, the prior's
        precision and the noise: after many new data, train anew.

        Args:
            X: One set of points, shape (n, d); leading axes of length 1 may be there.
            Y: Their outcomes, shape (..., n, m): several draws at the same points make
                a model with that batch shape.
            kwargs: None: a noise of the new data's own is not supported.

        Returns:
            A new model.

        Raises:
            DataError: If shapes do not fit, or points differ between batches.
            OptionError: If the noise is given, an outcome was left out, or draws are
                several and the curvature depends on them.
        """
        if kwargs:
            raise OptionError(
                "`condition_on_observations` takes X and Y; got "
                f"{', '.join(map(repr, kwargs))}. New data have the model's own noise."
            )
        if not self._is_whole:
            raise OptionError(
                "Conditioning must see all outcomes; got a model of outcomes "
                f"{self._columns} of {self._width}. Condition before `subset_output`."
            )
        if X.ndim < _SET or X.shape[:-2].numel() != 1:
            raise DataError(
                "`X` must be one set of points, (n, d), for all draws of outcomes; got "
                f"{tuple(X.shape)}. Condition a model on each set."
            )
        count = X.shape[-2]
        if Y.shape[-2:] != (count, self._width):
            raise DataError(
                f"`Y` must have shape (..., {count}, {self._width}) at these points; "
                f"got {tuple(Y.shape)}. Give a single outcome a column of its own."
            )
        self.eval()
        posterior, seen = self.subnet_posterior, self._seen
        x = self.transform_inputs(X).detach().reshape(count, -1).to(posterior.loc)
        y = Y.detach()
        if hasattr(self, "outcome_transform"):
            y = self.outcome_transform(y)[0]
        y = y.to(posterior.loc)
        if y.shape[:-2].numel() > 1 and posterior.options.curvature != "ggn":
            raise OptionError(
                "Draws of outcomes at the same points must share their curvature; got "
                f"{posterior.options.curvature!r}. Fit with curvature='ggn'."
            )
        new = self._copied()
        first = y.reshape(-1, count, self._width)[0]
        new.subnet_posterior = posterior.update(x, first)
        new._seen = _Seen.of(posterior, x, y) if seen is None else seen.with_data(x, y)
        return new

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A pickled posterior leaves its model behind: it is given back."""
        super().__setstate__(state)
        (model,) = self._user_model
        self.subnet_posterior = self.subnet_posterior.with_model(model)
        if self._seen is not None:
            posterior = self._seen.posterior.with_model(model)
            self._seen = replace(self._seen, posterior=posterior)

    def _copied(self) -> SubnetLaplaceModel:
        """A copy that shares all parts, in which they can be replaced."""
        new = object.__new__(SubnetLaplaceModel)
        new.__dict__.update(self.__dict__)
        new.__dict__["_modules"] = dict(self._modules)
        return new

    @property
    def _is_whole(self) -> bool:
        """Whether the outcomes are all of the network's, in their order."""
        return self._columns == list(range(self._width))

    def _moments(
        self, x: Tensor, observation_noise: bool | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean (..., q, m) and lower factor (..., q m, q m), before untransforming."""
        posterior, (*batch, num_points, _) = self.subnet_posterior, x.shape
        points = x.to(posterior.loc).flatten(0, -2)
        found: Any = (
            posterior.predictive_distribution(points, joint=num_points)
            if observation_noise is True
            else posterior.output_distribution(points, joint=num_points)
        )
        size = num_points * self._width
        loc = found.loc.reshape(*batch, num_points, self._width)
        factor = found.scale_tril.reshape(*batch, size, size)
        if self._seen is not None:
            loc = loc + self._seen.shift(x.to(posterior.loc))
        if not self._is_whole or isinstance(observation_noise, Tensor):
            loc = loc[..., self._columns]
            rows = factor.unflatten(-2, (num_points, self._width))
            rows = rows[..., self._columns, :].flatten(-3, -2)
            if isinstance(observation_noise, Tensor):
                variances = _expanded(observation_noise.to(loc), loc.shape)
                noise = variances.flatten(-2).sqrt().diag_embed()
                rows = rows.expand(*noise.shape[:-2], *rows.shape[-2:])
                rows = torch.cat([rows, noise], dim=-1)
            factor = lower_factor(rows)
        factor = factor.expand(*loc.shape[:-2], *factor.shape[-2:])
        return loc.to(x), factor.to(x)


@final
@dataclass(frozen=True, eq=False)
class _Seen:
    r"""Data that came after the fit, and how they move the mean of the outputs.

    .. math:: f(X) \leftarrow f(X) + K(X, X_n)\, (K(X_n, X_n) + \sigma^2)^{-1}
        (y_n - f(X_n)), \qquad K(X, X') = J(X)\, P^{-1} J(X')^\top

    with P of the fit: the same as moving the weights by :math:`P_n^{-1} J_n^\top
    \Lambda_n (y_n - f(X_n))` after it.

    Attributes:
        posterior: The one before them.
        x: Inputs of the network, (n, d).
        y: Its targets, (..., n, m).
        weights: What K(X, X_n) is multiplied with, (..., n m).
    """

    posterior: AutoSubnetMultivariateNormal
    x: Tensor
    y: Tensor
    weights: Tensor

    @classmethod
    def of(cls, posterior: AutoSubnetMultivariateNormal, x: Tensor, y: Tensor) -> _Seen:
        """The first data after a fit."""
        found: Any = posterior.predictive_distribution(x, joint=True)
        residuals = (y.flatten(-2) - found.loc).unsqueeze(-1)
        weights = torch.cholesky_solve(residuals, found.scale_tril).squeeze(-1)
        return cls(posterior, x, y, weights.detach())

    def with_data(self, x: Tensor, y: Tensor) -> _Seen:
        """More data; batches of targets are broadcast against those before."""
        batch = torch.broadcast_shapes(self.y.shape[:-2], y.shape[:-2])
        both = [part.expand(*batch, *part.shape[-2:]) for part in (self.y, y)]
        return _Seen.of(self.posterior, torch.cat([self.x, x]), torch.cat(both, dim=-2))

    def shift(self, x: Tensor) -> Tensor:
        """What the mean at points (..., q, d) moves by, (..., q, m)."""
        *batch, num_points, num_inputs = x.shape
        seen = self.x.expand(*batch, *self.x.shape)
        points = torch.cat([x, seen], dim=-2)
        found = self.posterior.output_distribution(
            points.reshape(-1, num_inputs), joint=points.shape[-2]
        )
        size, width = num_points * self.y.shape[-1], found.loc.shape[-1]
        factor = found.scale_tril.reshape(*batch, width, width)
        cross = factor[..., :size, :] @ factor[..., size:, :].mT
        moved = (cross @ self.weights.unsqueeze(-1)).squeeze(-1)
        return moved.unflatten(-1, (num_points, -1))


def _expanded(noise: Tensor, shape: torch.Size) -> Tensor:
    """Variances of the noise at every point and outcome."""
    try:
        return noise.expand(shape)
    except RuntimeError as err:
        raise DataError(
            "`observation_noise` must be a bool, or variances that broadcast to the "
            f"outcomes' shape {tuple(shape)}; got shape {tuple(noise.shape)}. Give a "
            "single outcome an axis of its own."
        ) from err


def _normal(loc: Tensor, factor: Tensor) -> MultivariateNormal:
    """GPyTorch's normal over (..., q, m), which keeps the factor for draws."""
    covariance = CholLinearOperator(TriangularLinearOperator(factor))
    if loc.shape[-1] > 1:
        found = MultitaskMultivariateNormal(loc, covariance)
    else:
        found = MultivariateNormal(loc.squeeze(-1), covariance)
    # Once it is known, BoTorch's `Standardize` scales it, where it would else multiply
    # out the covariance, which may be singular, and factor that.
    _ = found.scale_tril
    return found
