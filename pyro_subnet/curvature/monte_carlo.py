"""Fisher information of a family without a closed form, from scores of drawn labels.

The expectation over labels is a sum over the support where that is small, else a
mean over draws. The distribution is rebuilt from the arguments of its constructor at
copies of η, one a draw, so that one backward pass gives every score.
"""

from __future__ import annotations

import inspect
import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, final

import numpy as np
import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    Transform,
    biject_to,
    constraints,
    transform_to,
)
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import ExpTransform

from pyro_subnet.curvature.families.closed_forms import CLOSED_FORMS
from pyro_subnet.curvature.families.family import (
    Coordinates,
    Family,
    LowerTriangle,
    Part,
)
from pyro_subnet.curvature.families.information import (
    Information,
    Matrix,
    Root,
    psd_root,
)
from pyro_subnet.exceptions import (
    MonteCarloFisherWarning,
    UnsupportedLikelihoodError,
    warn,
)

NUM_DRAWS = 4096
"""Draws per data point: Λ errs by about sqrt(2 / 4096) = 2% with normal scores."""

_MAX_SUPPORT = 4096  # a support of this size costs as much as the draws
_MAX_REDRAWS = 8
_MAX_SCORES = 2**22  # held at once, 32 MiB in float64
# Of arguments that say the same, the first is taken: it is real, or closest to it.
_SYNONYMS = (
    ("logits", "probs"),
    ("gate_logits", "gate"),
    ("scale_tril", "covariance_matrix", "precision_matrix"),
)
# A score's mean counts as nonzero beyond 8 standard errors and what events may add that
# are too rare to be seen in the draws.
_MEAN_ERRORS, _UNSEEN = 8.0, 0.01


def sampled_family(d: Distribution) -> Family:
    """The family whose η are the constructor's arguments, unconstrained."""
    # Nothing is drawn here, so this works inside of `torch.func` transforms. Arguments
    # are refused that cannot be read, or may depend on latents without η showing it.
    if math.prod(d.event_shape) == 0:
        _refuse(d, "whose values are empty")
    parts, constants = [], []
    known = _constraints(d)
    for name, value in _arguments(d).items():
        constraint = known.get(name, constraints.real)
        if _is_constant(value, constraint):
            constants.append(name)
        elif isinstance(value, Tensor):
            parts.append(_part(d, name, value, constraint))
        else:
            _refuse(d, f"whose argument `{name}` is a {type(value).__name__}")
    if not parts:
        _refuse(d, "whose constructor takes no tensor of parameters")
    coordinates = Coordinates(type(d), tuple(parts), tuple(constants))
    exact = _support_size(d) <= _MAX_SUPPORT
    return Family(coordinates, Sampled(coordinates, exact), exact)


@final
@dataclass(frozen=True)
class Sampled(Information):
    """Λ as a weighted mean of outer products of scores."""

    coordinates: Coordinates
    exact: bool  # whether to sum over the support instead of draws

    def root(self, d: Distribution, parts: tuple[str, ...]) -> Root:
        """See :meth:`Information.root`."""
        return psd_root(self.fisher(d, parts))

    def fisher(self, d: Distribution, parts: tuple[str, ...]) -> Matrix:
        """See :meth:`Information.fisher`."""
        moments = _Moments.zero(self.coordinates.outputs(d, parts))
        at_once = max(1, _MAX_SCORES // max(1, moments.first.numel()))
        if self.exact:
            for values in d.enumerate_support(expand=True).split(at_once):
                scores, log_prob = self._scores(d, values, parts)
                moments = moments.add(scores, log_prob.double().exp())
            return moments.second
        with _own_stream(moments.outputs):
            for start in range(0, NUM_DRAWS, at_once):
                values = _draw(d, min(at_once, NUM_DRAWS - start))
                scores, log_prob = self._scores(d, values, parts)
                weights = torch.full_like(log_prob, 1 / NUM_DRAWS)
                moments = moments.add(scores, weights)
        moments.check_regular(d)
        warn(
            f"The Fisher information of {type(d).__name__} has no closed form here: it "
            f"is a mean over {NUM_DRAWS} draws per observation, with a relative error "
            f"of about {moments.relative_error():.1%} for each. Observe one of the "
            "known families to have it exactly.",
            MonteCarloFisherWarning,
        )
        return moments.second

    def _scores(
        self, d: Distribution, values: Tensor, parts: tuple[str, ...]
    ) -> tuple[Tensor, Tensor]:
        """Scores (n, *batch, c) and log densities (n, *batch) at n labels each."""
        copies = values.shape[:1]
        with torch.enable_grad():
            outputs = {
                name: output.detach().expand(copies + output.shape).requires_grad_()
                for name, output in self.coordinates.outputs(d, parts).items()
            }
            log_prob = self._log_prob(d, values, outputs)
            # Each copy of η enters one log density, so this gives all scores at once.
            found = torch.autograd.grad(
                log_prob.sum(), list(outputs.values()), materialize_grads=True
            )
        return torch.cat(found, dim=-1), log_prob.detach()

    def _log_prob(
        self, d: Distribution, values: Tensor, outputs: Mapping[str, Tensor]
    ) -> Tensor:
        """Log density at copies of η, checked against that of ``d`` itself."""
        try:
            arguments = self.coordinates.arguments(d, outputs)
            log_prob = self.coordinates.distribution(**arguments).log_prob(values)
            own = d.log_prob(values).detach()
        except (LookupError, RuntimeError, TypeError, ValueError) as err:
            _refuse(d, f"which cannot be built and scored ({err})", err)
        # Round-off on the way to η and back is far below what a wrong argument costs.
        rounding = torch.finfo(own.dtype).eps ** (1 / 3)
        agrees = log_prob.shape == own.shape and torch.allclose(
            log_prob.detach(), own, rtol=rounding, atol=rounding, equal_nan=True
        )
        if not agrees:
            _refuse(d, "which its constructor's arguments do not describe")
        return log_prob


@final
@dataclass(frozen=True)
class _Moments:
    """Weighted sums over the scores s of each data point, in float64."""

    outputs: Tensor  # η, shape (*batch, c)
    first: Tensor  # of s, shape (*batch, c)
    second: Tensor  # of s sᵀ, shape (*batch, c, c)
    fourth: Tensor  # of s⁴ by element, shape (*batch, c)

    @classmethod
    def zero(cls, outputs: Mapping[str, Tensor]) -> _Moments:
        flat = torch.cat(list(outputs.values()), dim=-1).detach().double()
        zero = torch.zeros_like(flat)
        return cls(flat, zero, zero.diag_embed(), zero)

    def add(self, scores: Tensor, weights: Tensor) -> _Moments:
        s, w = scores.double(), weights.double().unsqueeze(-1)
        return _Moments(
            self.outputs,
            self.first + (w * s).sum(0),
            self.second + torch.einsum("n...i,n...j->...ij", w * s, s),
            self.fourth + (w * s**4).sum(0),
        )

    def check_regular(self, d: Distribution) -> None:
        """Refuses scores whose mean is not zero: Λ is then no curvature."""
        square = self.second.diagonal(dim1=-2, dim2=-1)
        deviation = (square - self.first**2).clamp(min=0.0).sqrt()
        bound = _UNSEEN + _MEAN_ERRORS * deviation / math.sqrt(NUM_DRAWS)
        excess = self.first.abs() > bound
        if bool(excess.any()):
            _refuse(
                d,
                f"whose score has the mean {float(self.first[excess][0]):.3g} instead "
                "of 0, as where the support moves with the parameters",
            )

    def relative_error(self) -> float:
        """Standard error of the diagonal of Λ over itself, root mean square."""
        square = self.second.diagonal(dim1=-2, dim2=-1)
        informed = square > 0
        if not bool(informed.any()):
            return 0.0
        relative = self.fourth[informed] / square[informed] ** 2 - 1
        # A score of constant size has no error, up to round-off.
        return math.sqrt(max(float(relative.mean()), 0.0) / NUM_DRAWS)


def _refuse(d: Distribution, reason: str, cause: Exception | None = None) -> NoReturn:
    """Raises the error about a distribution that has no usable information."""
    known = ", ".join(sorted(kind.__name__ for kind in CLOSED_FORMS))
    kind = type(d)
    raise UnsupportedLikelihoodError(
        f"An observed distribution must be one of {known}, or be built from the "
        "tensors named in its `arg_constraints`, sampled and scored; got "
        f"{kind.__module__}.{kind.__name__}, {reason}. Observe one of these instead. "
        "Its density alone serves `curvature='hessian'`, 'ggn-mc' and 'ef', and "
        "`Predictive(model, guide=posterior)`."
    ) from cause


def _draw(d: Distribution, count: int) -> Tensor:
    """Draws labels; infinite ones have probability zero and are drawn again."""
    # Samplers by inversion give an infinity once in 2^24 draws in float32.
    dims = tuple(range(-len(d.event_shape), 0))
    try:
        values = d.sample(torch.Size((count,)))
        for _ in range(_MAX_REDRAWS):
            infinite = values.isinf()
            if not bool(infinite.any()):
                break
            again = infinite.any(dims, keepdim=True) if dims else infinite
            values = torch.where(again, d.sample(torch.Size((count,))), values)
    except (RuntimeError, TypeError, ValueError) as err:
        _refuse(d, f"which cannot be sampled ({err})", err)
    return values


@contextmanager
def _own_stream(state: Tensor) -> Iterator[None]:
    """Seeds the draws by η, and gives the global random state back afterwards."""
    # The same distribution gives the same Λ; other minibatches get other draws, so that
    # their errors average out.
    seed = zlib.crc32(state.cpu().numpy().tobytes())
    on_gpu = state.device.type == "cuda"
    with torch.random.fork_rng(devices=[state.device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(state.device):
                torch.cuda.manual_seed(seed)
        yield


def _arguments(d: Distribution) -> dict[str, Any]:
    """Arguments of the constructor by name, without synonyms."""
    signature = inspect.signature(type(d).__init__)
    found: dict[str, Any] = {}
    for name, parameter in list(signature.parameters.items())[1:]:
        kinds = {parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY}
        if name == "validate_args" or parameter.kind not in kinds:
            continue
        try:
            found[name] = getattr(d, name)
        except (AttributeError, NotImplementedError) as err:
            if parameter.default is parameter.empty:
                _refuse(d, f"whose argument `{name}` cannot be read back", err)
    for synonyms in _SYNONYMS:
        for name in [name for name in synonyms if name in found][1:]:
            del found[name]
    return found


def _constraints(d: Distribution) -> Mapping[str, Constraint]:
    """Constraints of the arguments; none where the class does not say."""
    try:
        return d.arg_constraints
    except NotImplementedError:
        return {}


def _is_constant(value: Any, constraint: Constraint) -> bool:
    """Whether an argument cannot follow latents: a count, a number, an option."""
    if not isinstance(value, Tensor):
        return isinstance(value, bool | int | float | str | torch.Size | None)
    if not value.is_floating_point():
        return True
    return not constraints.is_dependent(constraint) and constraint.is_discrete


def _part(d: Distribution, name: str, value: Tensor, constraint: Constraint) -> Part:
    """The part of η for one tensor of parameters."""
    transform = _transform(d, name, constraint)
    batch = value.shape[: value.ndim - transform.codomain.event_dim]
    try:
        fits = np.broadcast_shapes(batch, d.batch_shape) == d.batch_shape
    except ValueError:
        fits = False
    if not fits:
        shape = tuple(value.shape)
        _refuse(d, f"whose argument `{name}` of shape {shape} is no {constraint}")
    is_log = isinstance(transform, ExpTransform)
    return Part(f"log_{name}" if is_log else name, name, transform)


def _transform(d: Distribution, name: str, constraint: Constraint) -> Transform:
    if constraint is constraints.lower_cholesky:
        return LowerTriangle()
    if constraint in (constraints.positive, constraints.nonnegative):
        # The registry would shift the exponential by zero.
        return ExpTransform()
    for registry in (biject_to, transform_to):
        try:
            return registry(constraint)
        except NotImplementedError:
            continue
    _refuse(d, f"whose argument `{name}` has no unconstrained space")


def _support_size(d: Distribution) -> float:
    """Number of values that a label may have; infinite if they cannot be listed."""
    if not d.has_enumerate_support:
        return math.inf
    try:
        return float(len(d.enumerate_support(expand=False)))
    except (RuntimeError, TypeError, ValueError):
        return math.inf
