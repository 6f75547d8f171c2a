r"""What every form of a posterior's curvature can do, and every Gaussian over a subnet.

A form holds the likelihood's curvature G, the prior's precision P0, and what makes the
Gaussian of precision :math:`P = G + s P_0` cheap at one prior factor s.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyro_subnet.curvature.prior import PriorPrecision
from pyro_subnet.curvature.sums import CurvatureSum
from pyro_subnet.exceptions import NonFiniteError, PrecisionError
from pyro_subnet.options import FormName
from pyro_subnet.subnet import Layout
from pyro_subnet.tensors.lower_factor import lower_factor
from pyro_subnet.tensors.memory import check_factor_fits

# What a prior precision is multiplied by: one number for all weights, or one for each.
PriorFactor = float | Float[Tensor, " subnet"]
# A matrix in float64, and LAPACK's room for its eigenvalues.
_EIGENVALUE_MATRICES = 3.0
# Signs of the vector that matrices of a file are compared by; any seed serves.
_SEED = 20_106_896
# How many times the round-off of a random sum a factor may be off.
_DIGITS_LOST = 100
# Rows of a triangle that are multiplied at once.
_ROWS = 512


class Gaussian(ABC):
    r"""A normal distribution :math:`N(\hat\theta, P^{-1})` over S dimensions.

    Attributes:
        loc: Mean, shape (S,).
    """

    loc: Float[Tensor, " subnet"]

    @property
    def size(self) -> int:
        """S, the number of dimensions."""
        return int(self.loc.shape[-1])  # a tensor while torch.jit traces

    @abstractmethod
    def draw(self, noise: Float[Tensor, "*batch subnet"]) -> Float[Tensor, "*batch s"]:
        """Turns standard normal noise into draws of the same shape.

        Differentiable in ``noise`` and ``loc``.
        """

    @abstractmethod
    def log_prob(self, value: Float[Tensor, "*batch subnet"]) -> Float[Tensor, "*b"]:
        """Log density in nats, shape (...), at values of shape (..., S)."""

    @abstractmethod
    def half_log_det(self) -> Float[Tensor, ""]:
        r"""Returns :math:`\tfrac12 \log\det P`."""

    @abstractmethod
    def variance(self) -> Float[Tensor, " subnet"]:
        r"""Marginal variances :math:`\operatorname{diag} P^{-1}`, shape (S,)."""

    @abstractmethod
    def whiten(self, jac: Float[Tensor, "*rows subnet"]) -> Float[Tensor, "*rows s"]:
        r"""Maps rows of J to rows W with :math:`W W^\top = J P^{-1} J^\top`."""

    def row_scales(
        self,
        rows: Float[Tensor, "*rows some"],
        columns: Int[Tensor, " some"] | None = None,
    ) -> Float[Tensor, "*rows"]:
        r"""Standard deviations :math:`\sqrt{j P^{-1} j^\top}` of :math:`j \theta`.

        Args:
            rows: Rows j, all S entries or those at ``columns``.
            columns: Where rows are not zero, distinct; everywhere by default.

        Returns:
            Shape (...). Of few columns their covariance is made, where rows are more.
        """
        if columns is None:
            return torch.linalg.vector_norm(self.whiten(rows), dim=-1)
        flat = rows.reshape(-1, len(columns))
        few = len(columns) < len(flat)
        basis = torch.eye(len(columns)).to(flat) if few else flat
        wide = flat.new_zeros(len(basis), self.size)
        wide[:, columns] = basis
        whitened = self.whiten(wide)
        if few:  # the covariance of the columns is T T^T
            whitened = flat @ lower_factor(whitened)
        return torch.linalg.vector_norm(whitened, dim=-1).reshape(rows.shape[:-1])

    @abstractmethod
    def precision_diagonal(self) -> Float[Tensor, " subnet"]:
        """Diagonal of P, shape (S,), without the matrix."""

    @abstractmethod
    def precision_matrix(self) -> Float[Tensor, "subnet subnet"]:
        """P, shape (S, S)."""

    @abstractmethod
    def covariance_matrix(self) -> Float[Tensor, "subnet subnet"]:
        r"""Returns :math:`P^{-1}`, shape (S, S)."""

    @abstractmethod
    def scale_tril(self) -> Float[Tensor, "subnet subnet"]:
        """Lower Cholesky factor of the covariance, shape (S, S)."""

    def entropy(self) -> Float[Tensor, ""]:
        """Returns the differential entropy in nats."""
        constant = 0.5 * self.size * (1.0 + math.log(2 * math.pi))
        return constant - self.half_log_det()

    def extreme_precisions(self) -> tuple[float, float]:
        """Smallest and largest eigenvalue of P.

        Returns:
            Both.

        Raises:
            MemoryLimitError: If a matrix is needed and does not fit.
        """
        self._check_eigenvalues_fit()
        values = torch.linalg.eigvalsh(self.precision_matrix().double())
        return float(values[0]), float(values[-1])

    def _check_eigenvalues_fit(self) -> None:
        self._check_dense_fits(_EIGENVALUE_MATRICES)

    def _check_dense_fits(self, matrices: float) -> None:
        """Refuses so many S x S matrices in float64 as memory does not hold."""
        check_factor_fits(self.size, torch.float64, self.loc.device, matrices=matrices)

    def _quadratic_log_prob(self, quadratic: Tensor) -> Tensor:
        r"""Returns :math:`\tfrac12 (\log\det P - q - S \log 2\pi)`."""
        constant = 0.5 * self.size * math.log(2 * math.pi)
        return self.half_log_det() - 0.5 * quadratic - constant


class CurvatureForm(ABC):
    """The likelihood's curvature and the prior's, at one prior factor.

    A new form is a file of its own here, and one line in ``registry.py``.

    Attributes:
        name: What it is called in options, buffers and files.
        axes: Lengths of each of its tensors but those of P0, a letter an axis: S of
            the subnet, D of all weights, R of rows, n sites.
        prior: P0, the model's own prior precision, unscaled.
    """

    name: ClassVar[FormName]
    axes: ClassVar[Mapping[str, str]]
    prior: PriorPrecision

    @classmethod
    def axes_of(cls, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Names of the axes of each tensor; axes of one name have one length.

        Args:
            names: Of the tensors of a form of this kind, others among them.

        Returns:
            ``{tensor: names of its axes}``, for all that there should be.
        """
        return {name: tuple(letters) for name, letters in cls.axes.items()}

    @classmethod
    @abstractmethod
    def new_sum(cls, size: int, like: Tensor) -> CurvatureSum:
        """An empty sum of G over the data.

        Args:
            size: S.
            like: A tensor of the form's device and floating point type.
        """

    @classmethod
    @abstractmethod
    def of(cls, ggn: Any, prior: PriorPrecision, layout: Layout) -> CurvatureForm:
        """The form at the model's own prior, s = 1.

        Args:
            ggn: G, as the form's sum gives it; its tensors become the form's.
            prior: P0.
            layout: Where the sites lie in the packed vector.

        Raises:
            NonFiniteError: If the precision is not finite.
            PrecisionError: If it is not positive definite.
        """

    @classmethod
    @abstractmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], layout: Layout
    ) -> CurvatureForm:
        """Undoes :meth:`tensors`; other tensors are not read."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything that the form holds, by name, for buffers and files."""

    @abstractmethod
    def is_consistent(self, prior_factor: PriorFactor) -> bool:
        """Whether its tensors, read from a file, are those of one form.

        Matrices are compared by their product with a random vector: two that agree on
        it are equal with probability one. Costs no more than reading them.

        Args:
            prior_factor: s that the file is said to be under.
        """

    @abstractmethod
    def gaussian(self, loc: Float[Tensor, " subnet"]) -> Gaussian:
        """The Gaussian with this precision and mean ``loc``, shape (S,)."""

    @abstractmethod
    def rescaled(
        self, prior_factor: PriorFactor, likelihood_factor: float = 1.0
    ) -> CurvatureForm:
        """A new form at another prior factor.

        Args:
            prior_factor: s, one number or shape (S,); of the model's own prior, not of
                the present one.
            likelihood_factor: What G is multiplied by.

        Raises:
            PrecisionError: If the precision is not positive definite there.
        """

    @abstractmethod
    def updated(
        self,
        more: Any,
        prior_factor: PriorFactor,
        *,
        forgetting: float = 1.0,
        likelihood_factor: float = 1.0,
    ) -> CurvatureForm:
        r"""The form after more data, :math:`\gamma G + c G'`.

        Args:
            more: G', as the form's sum gives it; written over.
            prior_factor: s, as for :meth:`rescaled`.
            forgetting: γ.
            likelihood_factor: c.

        Raises:
            PrecisionError: If the precision is not positive definite.
        """

    @abstractmethod
    def log_det_function(self, num_factors: int) -> Callable[[Tensor], Tensor]:
        r"""The map from prior factors s to :math:`\log\det (G + s P_0)`.

        Args:
            num_factors: How many will be asked for in all, which decides between one
                eigenvalue decomposition and a factorization for each.

        Returns:
            A function of factors, float64, positive and finite, of any shape, to nats,
            float64, of the same shape. Not differentiable. It raises a
            ``PrecisionError`` where the precision is not positive definite.

        Source: MacKay (1992), "Bayesian interpolation", doi 10.1162/neco.1992.4.3.415,
        for the prior in the eigenvalues of the data's curvature.
        """

    @abstractmethod
    def ggn(self) -> Float[Tensor, "subnet subnet"]:
        """G, shape (S, S), made when asked for."""


def is_factor_of(
    lower: Float[Tensor, "rows rows"],
    product: Callable[[Tensor], Tensor],
    diagonal: Float[Tensor, " rows"],
) -> bool:
    r"""Whether :math:`L L^\top = P`, by one product with a vector of random signs.

    Args:
        lower: L in its lower triangle; what is above is not read.
        product: From a vector, float64, to P times it.
        diagonal: That of P.

    Returns:
        Whether they agree to the round-off of a factorization.
    """
    size = len(lower)
    if not size:
        return True
    positive = bool((lower.diagonal() > 0).all() & (diagonal > 0).all())
    if not positive:
        return False
    stream = torch.Generator().manual_seed(_SEED)
    signs = torch.randint(2, (size,), generator=stream).to(lower.device)
    vector = signs.to(torch.float64) * 2 - 1
    half, found = torch.zeros_like(vector), torch.zeros_like(vector)
    for start in range(0, size, _ROWS):
        rows = lower[start : start + _ROWS].tril(start).to(torch.float64)
        half += rows.mT @ vector[start : start + _ROWS]
    for start in range(0, size, _ROWS):
        rows = lower[start : start + _ROWS].tril(start).to(torch.float64)
        found[start : start + _ROWS] = rows @ half
    # Each entry of the factor's round-off, times sqrt(P_ii P_jj), adds up at random.
    eps = torch.finfo(lower.dtype).eps
    wide = diagonal.to(torch.float64)
    limit = _DIGITS_LOST * eps * math.sqrt(size) * (wide * wide.sum()).sqrt()
    return bool(((found - product(vector)).abs() <= limit).all())


def scaled_diagonal(prior: PriorPrecision, factor: PriorFactor) -> Tensor:
    """Diagonal of s P0, shape (S,), in the dtype of P0."""
    diagonal = prior.diagonal
    # In float64: a plain number would become one of float32.
    s = torch.as_tensor(factor, dtype=torch.float64, device=diagonal.device)
    return (diagonal * s).to(diagonal.dtype)


def refuse_precision(
    size: int,
    found: str,
    factor: float | Tensor | None = None,
    *,
    rounding: bool = False,
) -> NoReturn:
    """Raises the error of a precision that has no Gaussian.

    Args:
        size: S.
        found: What came of it.
        factor: s, where the prior's precision was scaled.
        rounding: Whether more digits would make it positive definite.

    Raises:
        PrecisionError: Always.
    """
    now = ""
    if factor is not None:
        now = f" (now {float(torch.as_tensor(factor).min()):g} times the model's)"
    raise PrecisionError(
        f"Posterior precision at S={size} must be positive definite; got {found}. "
        f"{'Run the model in float64, train' if rounding else 'Train'} "
        f"closer to the MAP, raise the prior's precision{now}, or choose another "
        "subnet: a weight that neither the data nor the prior curve has no Gaussian."
    )


def check_precisions(values: Tensor, size: int, element: Callable[[int], str]) -> None:
    """Refuses diagonal precisions, or eigenvalues of a precision, that are none.

    Args:
        values: The numbers, of any shape.
        size: S.
        element: What the one at a flat position is called.

    Raises:
        NonFiniteError: If one is NaN or infinite.
        PrecisionError: If one is not positive.
    """
    flat = values.detach().flatten()
    bad = (~(flat.isfinite() & (flat > 0))).nonzero().squeeze(-1)
    if not bad.numel():
        return
    not_finite = bad[~flat[bad].isfinite()]
    if not_finite.numel():
        raise NonFiniteError(
            f"The precision must be finite; got {float(flat[not_finite[0]])} at "
            f"{element(int(not_finite[0]))} ({not_finite.numel()} such values). Check "
            "the model's outputs and its prior at the MAP."
        )
    worst = bad[flat[bad].argmin()]
    refuse_precision(
        size,
        f"smallest eigenvalue {float(flat[worst]):.3e} at {element(int(worst))} "
        f"({bad.numel()} such values)",
    )


def standard_normal(
    shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Standard normal noise.

    Args:
        shape: Its shape.
        like: Its dtype and device.
        generator: Source of the random numbers, on any device; torch's own by default.

    Returns:
        The noise.
    """
    device = like.device if generator is None else generator.device
    noise = torch.randn(shape, generator=generator, dtype=like.dtype, device=device)
    return noise.to(like.device)
