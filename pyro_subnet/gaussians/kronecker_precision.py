r"""The precision :math:`G + s P_0` with G in Kronecker factors, for any prior scale s.

With :math:`B = Q_B \Lambda_B Q_B^\top` and :math:`A = Q_A \Lambda_A Q_A^\top` the block
of a weight matrix with prior precision p is

.. math:: B \otimes A + s p I = (Q_B \otimes Q_A)
    (\Lambda_B \otimes \Lambda_A + s p I) (Q_B \otimes Q_A)^\top

so that the two decompositions, made once, serve every s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyro_subnet.curvature.kronecker import KroneckerBlock
from pyro_subnet.exceptions import (
    ModelError,
    NonFiniteError,
    OptionError,
    PrecisionError,
)
from pyro_subnet.gaussians.diagonal_gaussian import check_positive, site_scales
from pyro_subnet.gaussians.kronecker_gaussian import EigenBlock, KroneckerGaussian
from pyro_subnet.subnet import Layout


@dataclass(frozen=True, eq=False)
class ScaledBlock:
    """A block of the curvature in eigenvectors, without the prior.

    Attributes:
        positions: Where its elements lie in the packed vector, shape (P, Q).
        output_vectors: Q_B, shape (P, P).
        output_values: Eigenvalues of B, non-negative, shape (P,).
        input_vectors: Q_A, shape (Q, Q).
        input_values: Eigenvalues of A, non-negative, shape (Q,).
        weight: Sum of the weights that A is a mean under, a scalar.
        prior: p of its elements, at scale 1, a scalar in float64.
        site: Number of its site in the layout, a scalar.
    """

    positions: Int[Tensor, "out in"]
    output_vectors: Float[Tensor, "out out"]
    output_values: Float[Tensor, " out"]
    input_vectors: Float[Tensor, "in in"]
    input_values: Float[Tensor, " in"]
    weight: Float[Tensor, ""]
    prior: Float[Tensor, ""]
    site: Int[Tensor, ""]

    def factors(self, layout: Layout, forgetting: float) -> KroneckerBlock:
        """The factors, of data whose weights are multiplied by a number."""
        output = (self.output_vectors * self.output_values) @ self.output_vectors.mT
        return KroneckerBlock(
            layout.names[int(self.site)],
            self.positions,
            output * forgetting,
            (self.input_vectors * self.input_values) @ self.input_vectors.mT,
            self.weight * forgetting,
        )

    def values(self, scales: Tensor, layout: Layout) -> Tensor:
        """Eigenvalues of the precision, (P, Q), float64, under prior scales."""
        ggn = self.output_values.double().outer(self.input_values.double())
        values = ggn + scales.index_select(0, self.site.reshape(1)) * self.prior
        check_positive(values, self.positions, layout)
        return values


@dataclass(frozen=True, eq=False)
class KroneckerPrecision:
    r"""The precision :math:`G + s P_0` in Kronecker factors, for any prior scale s.

    Attributes:
        layout: Where the sites lie in the packed vector.
        blocks: Factors, decomposed.
        ggn: Diagonal of G at elements in no block, 0 at the others, (D,), float64.
        prior: Diagonal of P0, shape (D,), float64.
    """

    layout: Layout
    blocks: tuple[ScaledBlock, ...]
    ggn: Float[Tensor, " params"]
    prior: Float[Tensor, " params"]

    @classmethod
    def decompose(
        cls,
        blocks: Sequence[KroneckerBlock],
        diagonal: Float[Tensor, " params"],
        prior: Float[Tensor, " params"],
        layout: Layout,
    ) -> KroneckerPrecision:
        r"""Eigendecompositions of all factors, each in float64, once.

        Costs about :math:`9 (P^3 + Q^3)` operations a block. An eigenvalue no further
        from zero than :math:`P \epsilon \lambda_{\max}`, the round-off of the factor's
        type, counts as 0: otherwise the sign of that round-off would decide whether a
        direction that neither the data nor the prior curve has a variance.

        Args:
            blocks: Kronecker factors of the likelihood's curvature.
            diagonal: Its diagonal at the other elements, shape (D,).
            prior: Diagonal of P0, shape (D,).
            layout: Where the sites lie in the packed vector.

        Returns:
            The precision.

        Raises:
            ModelError: If the prior's precision differs within a block.
            NonFiniteError: If a factor has NaN or infinite entries.
            PrecisionError: If a factor has a negative eigenvalue.
        """
        wide = prior.to(torch.float64)
        decomposed = tuple(_decomposed(block, wide, layout) for block in blocks)
        return cls(layout, decomposed, diagonal.to(torch.float64), wide)

    def gaussian(
        self, loc: Float[Tensor, " params"], prior_scale: float | Tensor = 1.0
    ) -> KroneckerGaussian:
        """The Gaussian at a prior scale, in the type of ``loc``.

        Args:
            loc: Its mean, shape (D,).
            prior_scale: s, what P0 is multiplied by: a number, or one a site in the
                order of the layout, shape (num sites,). Differentiable.

        Returns:
            The Gaussian.

        Raises:
            OptionError: If a scale is not a positive finite number.
            NonFiniteError: If a precision is NaN or infinite.
            PrecisionError: If the precision is not positive definite.
        """
        scales = site_scales(prior_scale, self.layout, self.ggn)
        blocks = tuple(
            EigenBlock(
                block.positions,
                block.output_vectors.to(loc),
                block.input_vectors.to(loc),
                block.values(scales, self.layout).to(loc),
            )
            for block in self.blocks
        )
        rest = self._rest()
        return KroneckerGaussian(
            loc, blocks, rest, self._rest_precision(rest, scales).to(loc)
        )

    def log_det_precision(
        self, prior_scales: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """Log determinant at each of some prior scales, D logarithms each.

        Args:
            prior_scales: s, positive and finite, of any shape.

        Returns:
            Shape of ``prior_scales``, float64, in nats. Differentiable.

        Raises:
            OptionError: If a scale is not a positive finite number.
            NonFiniteError: If a precision is NaN or infinite.
            PrecisionError: If the precision is not positive definite.
        """
        rest, found = self._rest(), []
        for scale in prior_scales.flatten():
            scales = site_scales(scale, self.layout, self.ggn)
            parts = [block.values(scales, self.layout) for block in self.blocks]
            parts.append(self._rest_precision(rest, scales))
            found.append(torch.stack([part.log().sum() for part in parts]).sum())
        return torch.stack(found).reshape(prior_scales.shape)

    def updated(
        self,
        blocks: Sequence[KroneckerBlock],
        diagonal: Float[Tensor, " params"],
        forgetting: float = 1.0,
    ) -> KroneckerPrecision:
        """More data seen at the same MAP: what one pass over all of them gives.

        Costs new eigendecompositions.

        Args:
            blocks: Kronecker factors of the new data alone.
            diagonal: Their diagonal at the other elements, shape (D,).
            forgetting: What the weights of the data so far are multiplied by.

        Returns:
            The precision, with the same prior.

        Raises:
            ModelError: If the new data's blocks are not the same.
        """
        if len(blocks) != len(self.blocks):
            raise ModelError(
                f"New data must have the same {len(self.blocks)} Kronecker blocks; "
                f"got {len(blocks)}. Pass data that take the same way through the "
                "layers."
            )
        both = [
            block.factors(self.layout, forgetting).plus(more)
            for block, more in zip(self.blocks, blocks, strict=True)
        ]
        ggn = forgetting * self.ggn + diagonal.to(self.ggn)
        return KroneckerPrecision.decompose(both, ggn, self.prior, self.layout)

    def with_likelihood_scaled(self, scale: float) -> KroneckerPrecision:
        """The precision of the same data with G multiplied by a number.

        Args:
            scale: The number, positive.

        Returns:
            The precision, with the same prior.
        """
        blocks = tuple(
            replace(block, output_values=block.output_values * scale)
            for block in self.blocks
        )
        return KroneckerPrecision(self.layout, blocks, self.ggn * scale, self.prior)

    def description(self) -> dict[str, int]:
        """What :meth:`from_tensors` needs besides tensors, fit for JSON."""
        return {"num_blocks": len(self.blocks)}

    def tensors(self) -> dict[str, Tensor]:
        """What :meth:`from_tensors` reads, under names that buffers may have."""
        found = {"ggn": self.ggn, "prior": self.prior}
        for k, block in enumerate(self.blocks):
            for part in _PARTS:
                found[f"block_{k}_{part}"] = getattr(block, part)
        return found

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        description: Mapping[str, int],
        layout: Layout,
    ) -> KroneckerPrecision:
        """Puts it together again.

        Args:
            tensors: What :meth:`tensors` gave.
            description: What :meth:`description` gave.
            layout: Where the sites lie in the packed vector.

        Returns:
            The same.

        Raises:
            OptionError: If tensors are missing, too many, or of other sizes.
        """
        count = description["num_blocks"]
        expected = {f"block_{k}_{part}" for k in range(count) for part in _PARTS}
        expected |= {"ggn", "prior"}
        if set(tensors) != expected:
            wrong = sorted(set(tensors) ^ expected)
            raise OptionError(
                f"`tensors` must be those of {count} blocks; got {wrong[:3]} missing "
                f"or too many ({len(wrong)} names). Pass what `tensors()` gave."
            )
        blocks = []
        for k in range(count):
            parts = {part: tensors[f"block_{k}_{part}"] for part in _PARTS}
            _check_sizes(k, parts)
            blocks.append(ScaledBlock(**parts))
        for name in ("ggn", "prior"):
            if tensors[name].shape != (layout.num_params,):
                raise OptionError(
                    f"`tensors[{name!r}]` must have shape ({layout.num_params},), as "
                    f"the model's sites have; got {tuple(tensors[name].shape)}. Pass "
                    "what `tensors()` gave for the same model."
                )
        return cls(layout, tuple(blocks), tensors["ggn"], tensors["prior"])

    def _rest(self) -> Tensor:
        """Positions of the elements in no block."""
        free = torch.ones_like(self.ggn, dtype=torch.bool)
        for block in self.blocks:
            free[block.positions] = False
        return free.nonzero().squeeze(-1)

    def _rest_precision(self, rest: Tensor, scales: Tensor) -> Tensor:
        sizes = torch.tensor(self.layout.sizes, device=scales.device)
        own = scales.repeat_interleave(sizes)[rest]
        precision = self.ggn[rest] + own * self.prior[rest]
        check_positive(precision, rest, self.layout)
        return precision


_PARTS = (
    "positions",
    "output_vectors",
    "output_values",
    "input_vectors",
    "input_values",
    "weight",
    "prior",
    "site",
)


def _check_sizes(k: int, parts: Mapping[str, Tensor]) -> None:
    p, q = parts["output_values"].numel(), parts["input_values"].numel()
    expected = ((p, q), (p, p), (p,), (q, q), (q,), (), (), ())
    for part, shape in zip(_PARTS, expected, strict=True):
        found = tuple(parts[part].shape)
        if found != shape:
            raise OptionError(
                f"`tensors['block_{k}_{part}']` must have shape {shape}; got {found}. "
                "Pass what `tensors()` gave."
            )


def _decomposed(block: KroneckerBlock, prior: Tensor, layout: Layout) -> ScaledBlock:
    own = prior[block.positions]
    low, high = float(own.min()), float(own.max())
    if not high - low <= torch.finfo(block.output.dtype).eps ** 0.75 * abs(high):
        raise ModelError(
            f"A prior must have one precision within a site for Kronecker factors; got "
            f"{low:.6g} to {high:.6g} at site {block.site!r}. Give the site's elements "
            "one prior scale, or choose a diagonal or full covariance."
        )
    outputs = _eigen(block.output, block.site)
    inputs = _eigen(block.input, block.site)
    number = torch.tensor(layout.names.index(block.site), device=own.device)
    return ScaledBlock(
        block.positions,
        *outputs[::-1],
        *inputs[::-1],
        block.weight,
        own.mean(),
        number,
    )


def _eigen(factor: Tensor, site: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors; what round-off alone could have made is 0."""
    if not bool(factor.isfinite().all()):
        raise NonFiniteError(
            f"Kronecker factors must be finite; got NaN or inf at site {site!r}. Check "
            "the model's outputs and inputs at the MAP."
        )
    values, vectors = torch.linalg.eigh(factor.to(torch.float64))
    round_off = len(factor) * torch.finfo(factor.dtype).eps * float(values[-1])
    if float(values[0]) < -round_off:
        raise PrecisionError(
            f"A Kronecker factor must be positive semidefinite; got smallest "
            f"eigenvalue {float(values[0]):.3e} at site {site!r}, the largest being "
            f"{float(values[-1]):.3e}. Run the model in float64."
        )
    # Row-major, as a file gives them back: products round by the layout.
    values = values.where(values > round_off, 0.0)
    return values.to(factor), vectors.to(factor).contiguous()
