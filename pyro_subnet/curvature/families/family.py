r"""What a family of observed distributions is: its outputs η and their information."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution, Transform, constraints

from pyro_subnet.curvature.families.information import (
    Information,
    Matrix,
    Root,
    Unknown,
)
from pyro_subnet.exceptions import (
    NonFiniteError,
    OptionError,
    UnsupportedLikelihoodError,
)

Output = Float[Tensor, "*batch width"]


@final
class LowerTriangle(Transform):
    """Packs a Cholesky factor: rows of its lower triangle, the diagonal in logs."""

    domain = constraints.real_vector
    codomain = constraints.lower_cholesky
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LowerTriangle)

    def __hash__(self) -> int:
        return hash(LowerTriangle)

    def _call(self, x: Tensor) -> Tensor:
        size = (math.isqrt(8 * x.shape[-1] + 1) - 1) // 2
        rows, columns = torch.tril_indices(size, size, device=x.device)
        place = torch.zeros(size, size, dtype=torch.long, device=x.device)
        place[rows, columns] = torch.arange(x.shape[-1], device=x.device)
        # Gathering, not writing in place, keeps `vmap` and forward mode at work.
        full = x[..., place].tril()
        return full.tril(-1) + full.diagonal(dim1=-2, dim2=-1).exp().diag_embed()

    def _inverse(self, y: Tensor) -> Tensor:
        full = y.tril(-1) + y.diagonal(dim1=-2, dim2=-1).log().diag_embed()
        rows, columns = torch.tril_indices(*y.shape[-2:], device=y.device)
        return full[..., rows, columns]

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        """Shape of the factors packed in vectors of ``shape``."""
        size = (math.isqrt(8 * shape[-1] + 1) - 1) // 2
        return torch.Size((*shape[:-1], size, size))

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        """Shape of the vectors that pack factors of ``shape``."""
        return torch.Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))


@final
@dataclass(frozen=True)
class Part:
    """One parameter of a family in its unconstrained space, a part of η."""

    name: str  # its name in that space, such as "log_scale"
    argument: str  # the constructor's name for it, such as "scale"
    transform: Transform  # from unconstrained values to the constructor's

    def output(self, d: Distribution) -> Output:
        """The part of η at every batch element, differentiable."""
        # A part is one vector a batch element: events flat, scalars of width 1.
        value = self.transform.inv(getattr(d, self.argument))
        dims = self.transform.domain.event_dim
        flat = value.flatten(-dims) if dims else value.unsqueeze(-1)
        return flat.expand(d.batch_shape + flat.shape[-1:])

    def value(self, d: Distribution, output: Output) -> Tensor:
        """The constructor's argument at an output, whose leading axes are kept."""
        dims = self.transform.domain.event_dim
        shape = self.transform.inverse_shape(getattr(d, self.argument).shape)
        flat = output.unflatten(-1, shape[-dims:]) if dims else output.squeeze(-1)
        return self.transform(flat)


@final
@dataclass(frozen=True)
class Coordinates:
    """The map between a distribution and η."""

    distribution: type[Distribution]
    parts: tuple[Part, ...]
    constants: tuple[str, ...] = ()  # moved by no latent, as "total_count"

    def outputs(self, d: Distribution, names: Sequence[str]) -> dict[str, Tensor]:
        """η of the named parts, as :meth:`Part.output` gives them."""
        return {part.name: part.output(d) for part in self.parts if part.name in names}

    def arguments(
        self, d: Distribution, outputs: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """Arguments at η; constants, and parts not in ``outputs``, are those of d."""
        values = {name: getattr(d, name) for name in self.constants}
        for part in self.parts:
            output = outputs.get(part.name)
            values[part.argument] = (
                getattr(d, part.argument) if output is None else part.value(d, output)
            )
        return values


@final
@dataclass(frozen=True)
class Family:
    """A family of distributions p(y | η): its outputs η and their information Λ.

    Source: Martens (2020), sections 8 and 9, arXiv 1412.1193, on Λ as the Hessian of
    the generalized Gauss-Newton matrix.
    """

    coordinates: Coordinates
    information: Information
    exact: bool = True  # False where Λ is a Monte Carlo estimate

    @property
    def distribution(self) -> type[Distribution]:
        """The class that :meth:`parameters` are arguments of."""
        return self.coordinates.distribution

    @property
    def unreadable(self) -> UnsupportedLikelihoodError | None:
        """Why there is neither η nor Λ, but a density alone; None where there are."""
        found = self.information
        return found.error if isinstance(found, Unknown) else None

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of the parts of η, in the order of rows and columns of Λ."""
        return tuple(part.name for part in self.coordinates.parts)

    def outputs(
        self, d: Distribution, parts: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """η by part, each (*batch_shape, width); all parts by default."""
        names = self.part_names if parts is None else self._ordered(parts)
        return self.coordinates.outputs(d, names)

    def parameters(
        self, d: Distribution, outputs: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """Arguments of :attr:`distribution` at η; missing parts are those of d."""
        if outputs:
            self._ordered(tuple(outputs))
        return self.coordinates.arguments(d, outputs)

    @torch.no_grad()
    def fisher(self, d: Distribution, parts: Sequence[str]) -> Matrix:
        """Λ in the named parts in the order of :attr:`part_names`, others held."""
        return self._checked(d, self.information.fisher(d, self._ordered(parts)))

    @torch.no_grad()
    def root(self, d: Distribution, parts: Sequence[str]) -> Root:
        r"""R with :math:`R^\top R = \Lambda`, no more rows than columns."""
        return self._checked(d, self.information.root(d, self._ordered(parts)))

    def _ordered(self, parts: Sequence[str]) -> tuple[str, ...]:
        """The named parts in the order of :attr:`part_names`."""
        unknown = sorted(set(parts) - set(self.part_names))
        if unknown or not parts:
            raise OptionError(
                f"`parts` must name parts of {self.distribution.__name__}, of which it "
                f"has {', '.join(self.part_names)}; got {list(parts)}. Leave out what "
                "it does not have."
            )
        return tuple(name for name in self.part_names if name in parts)

    def _checked(self, d: Distribution, matrix: Tensor) -> Tensor:
        """Λ or R in the dtype and batch shape of ``d``, if it is finite."""
        dtype = self._dtype(d)
        matrix = matrix.to(dtype).expand(d.batch_shape + matrix.shape[-2:])
        finite = matrix.isfinite()
        if not bool(finite.all()):
            bad = (~finite).flatten(-2).any(-1)
            first = tuple(bad.nonzero()[0].tolist())
            raise NonFiniteError(
                f"The Fisher information of {type(d).__name__} must be finite; got "
                f"{int(bad.sum())} non-finite matrices of {bad.numel()} in {dtype} "
                f"(first at batch index {first}). Check the parameters that the model "
                "gives it there, or fit in float64."
            )
        return matrix

    def _dtype(self, d: Distribution) -> torch.dtype:
        """The widest dtype among the arguments; the default one for whole numbers."""
        arguments = (getattr(d, part.argument) for part in self.coordinates.parts)
        widest = functools.reduce(torch.promote_types, (a.dtype for a in arguments))
        return widest if widest.is_floating_point else torch.get_default_dtype()
