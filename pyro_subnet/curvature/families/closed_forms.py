"""The families whose Fisher information is known in closed form.

Each function below is one family's Λ in its unconstrained parameters η, where a score
in log σ is σ times the score in σ. Functions for :class:`Orthogonal` return the root of
the diagonal, those for :class:`Coupled` the entries in float64. The table at the end
says which parameters η has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.transforms import (
    ExpTransform,
    IndependentTransform,
    identity_transform,
)

from pyro_subnet.curvature.families.family import (
    Coordinates,
    Family,
    LowerTriangle,
    Part,
)
from pyro_subnet.curvature.families.information import (
    Coupled,
    Information,
    Matrix,
    Orthogonal,
    Root,
    psd_root,
)
from pyro_subnet.curvature.families.special_functions import (
    bessel_ratio,
    negative_binomial_log_count_information,
    student_t_log_df_information,
    trigamma,
    von_mises_log_concentration_information,
)

Scales = Mapping[str, Tensor]
Entries = Mapping[tuple[str, str], Tensor]

_EULER_GAMMA = 0.5772156649015329
# Mean square score of a Gumbel distribution in the log of its scale.
_GUMBEL_LOG_SCALE = math.pi**2 / 6 + (1 - _EULER_GAMMA) ** 2


def _normal(d: td.Normal | td.LogNormal) -> Scales:
    r"""Λ = diag(1/σ², 2) in (μ, log σ)."""
    return {"loc": 1 / d.scale, "log_scale": torch.full_like(d.scale, math.sqrt(2))}


def _half_normal(d: td.HalfNormal) -> Scales:
    r"""Λ = 2 in log σ."""
    return {"log_scale": torch.full_like(d.scale, math.sqrt(2))}


def _laplace(d: td.Laplace) -> Scales:
    r"""Λ = diag(1/b², 1) in (μ, log b)."""
    return {"loc": 1 / d.scale, "log_scale": torch.ones_like(d.scale)}


def _cauchy(d: td.Cauchy) -> Scales:
    r"""Λ = diag(1/(2γ²), 1/2) in (μ, log γ)."""
    half = torch.full_like(d.scale, math.sqrt(0.5))
    return {"loc": half / d.scale, "log_scale": half}


def _half_cauchy(d: td.HalfCauchy) -> Scales:
    r"""Λ = 1/2 in log γ."""
    return {"log_scale": torch.full_like(d.scale, math.sqrt(0.5))}


def _exponential(d: td.Exponential) -> Scales:
    r"""Λ = 1 in log λ."""
    return {"log_rate": torch.ones_like(d.rate)}


def _poisson(d: td.Poisson) -> Scales:
    r"""Λ = λ in log λ."""
    return {"log_rate": d.rate.sqrt()}


def _bernoulli(d: td.Bernoulli) -> Scales:
    r"""Λ = p (1 - p) in the logit of p; both factors keep their digits."""
    return {"logits": (d.logits.sigmoid() * (-d.logits).sigmoid()).sqrt()}


def _binomial(d: td.Binomial) -> Scales:
    r"""Λ = n p (1 - p) in the logit of p."""
    variance = d.logits.sigmoid() * (-d.logits).sigmoid()
    return {"logits": (d.total_count * variance).sqrt()}


def _geometric(d: td.Geometric) -> Scales:
    r"""Λ = 1 - p in the logit of p, y counting failures before the first success."""
    return {"logits": (-d.logits).sigmoid().sqrt()}


def _von_mises(d: td.VonMises) -> Scales:
    r"""Λ = diag(κ A(κ), κ² A'(κ)) in (μ, log κ), A = I₁/I₀."""
    kappa = d.concentration.double()
    return {
        "loc": (kappa * bessel_ratio(kappa)).sqrt(),
        "log_concentration": von_mises_log_concentration_information(kappa).sqrt(),
    }


def _gamma(d: td.Gamma | td.InverseGamma, parts: tuple[str, ...]) -> Entries:
    r"""Λ = [[α² ψ'(α), -α], [-α, α]] in (log α, log β); of 1/y as well."""
    alpha = d.concentration.double()
    return {
        ("log_concentration", "log_concentration"): alpha**2 * trigamma(alpha),
        ("log_concentration", "log_rate"): -alpha,
        ("log_rate", "log_rate"): alpha,
    }


def _beta(d: td.Beta, parts: tuple[str, ...]) -> Entries:
    r"""Λ = diag(a² ψ'(a), b² ψ'(b)) - ψ'(a + b) (a, b) (a, b)ᵀ in (log a, log b)."""
    a, b = d.concentration1.double(), d.concentration0.double()
    both = trigamma(a + b)
    one, zero = "log_concentration1", "log_concentration0"
    return {
        (one, one): a**2 * (trigamma(a) - both),
        (one, zero): -a * b * both,
        (zero, zero): b**2 * (trigamma(b) - both),
    }


def _negative_binomial(d: td.NegativeBinomial, parts: tuple[str, ...]) -> Entries:
    r"""Λ = [[r² E[ψ'(r) - ψ'(r + y)], r p], [r p, r p]] in (log r, logit of p)."""
    count, logits = d.total_count.double(), d.logits.double()
    entries = {("logits", "logits"): count * logits.sigmoid()}
    if "log_total_count" in parts:
        entries["log_total_count", "logits"] = entries["logits", "logits"]
        entries["log_total_count", "log_total_count"] = (
            negative_binomial_log_count_information(count, logits)
        )
    return entries


def _student_t(d: td.StudentT, parts: tuple[str, ...]) -> Entries:
    r"""Returns Λ in (log ν, μ, log σ); :func:`student_t_log_df_information` has log ν.

    .. math:: \Lambda_{\mu\mu} = \frac{\nu+1}{(\nu+3)\sigma^2},\quad
        \Lambda_{\log\sigma\log\sigma} = \frac{2\nu}{\nu+3},\quad
        \Lambda_{\log\nu\log\sigma} = -\frac{2\nu}{(\nu+1)(\nu+3)}

    Source: Lange, Little and Taylor (1989), J. Amer. Statist. Assoc. 84, in logs here.
    """
    df, scale = d.df.double(), d.scale.double()
    return {
        ("log_df", "log_df"): student_t_log_df_information(df),
        ("log_df", "log_scale"): -2 * df / (df + 1) / (df + 3),
        ("loc", "loc"): (df + 1) / (df + 3) / scale**2,
        ("log_scale", "log_scale"): 2 * df / (df + 3),
    }


def _gumbel(d: td.Gumbel, parts: tuple[str, ...]) -> Entries:
    r"""Λ = [[1/β², (γ-1)/β], [., π²/6 + (1-γ)²]] in (μ, log β), γ Euler's constant."""
    scale = d.scale.double()
    return {
        ("loc", "loc"): scale**-2,
        ("loc", "log_scale"): (_EULER_GAMMA - 1) / scale,
        ("log_scale", "log_scale"): torch.full_like(scale, _GUMBEL_LOG_SCALE),
    }


def _weibull(d: td.Weibull, parts: tuple[str, ...]) -> Entries:
    r"""Λ = [[k², (γ-1) k], [., π²/6 + (1-γ)²]] in (log λ, log k): -log y is Gumbel."""
    shape = d.concentration.double()
    return {
        ("log_scale", "log_scale"): shape**2,
        ("log_scale", "log_concentration"): (_EULER_GAMMA - 1) * shape,
        ("log_concentration", "log_concentration"): torch.full_like(
            shape, _GUMBEL_LOG_SCALE
        ),
    }


@final
@dataclass(frozen=True)
class DirichletInformation(Information):
    r"""Λ = diag(a² ψ'(a)) - ψ'(Σa) a aᵀ in log a."""

    def fisher(self, d: Distribution, parts: tuple[str, ...]) -> Matrix:
        """See :meth:`Information.fisher`."""
        a = d.concentration.double()  # type: ignore[attr-defined]
        both = trigamma(a.sum(-1))[..., None, None]
        own = (a**2 * trigamma(a)).diag_embed()
        return own - both * a.unsqueeze(-1) * a.unsqueeze(-2)

    def root(self, d: Distribution, parts: tuple[str, ...]) -> Root:
        """See :meth:`Information.root`."""
        return psd_root(self.fisher(d, parts))


@final
@dataclass(frozen=True)
class CategoricalInformation(Information):
    r"""Λ = n (diag p - p pᵀ) in the logits of K classes; n is 1 or a Multinomial's.

    Its exact Cholesky factor spares the Jacobian one row of K. With
    :math:`q_j = \sum_{i > j} p_i`,

    .. math:: R_{jj} = \sqrt{n p_j q_j / q_{j-1}},\qquad
        R_{ji} = -p_i \sqrt{n p_j / (q_j q_{j-1})}\quad (i > j).

    Source: Tanabe and Sagae (1992), J. R. Statist. Soc. B 54.
    """

    def fisher(self, d: Distribution, parts: tuple[str, ...]) -> Matrix:
        """See :meth:`Information.fisher`."""
        # Not diag p - p pᵀ, which loses a class that is all but certain.
        root = self.root(d, parts)
        return root.mT @ root

    def root(self, d: Distribution, parts: tuple[str, ...]) -> Root:
        """See :meth:`Information.root`."""
        p = d.logits.softmax(-1)  # type: ignore[attr-defined]
        here = p.flip(-1).cumsum(-1).flip(-1)  # q_{j-1}
        after = torch.cat([here[..., 1:], torch.zeros_like(p[..., :1])], dim=-1)  # q_j
        # R_jj and R_ji share the factor sqrt(n p_j / q_{j-1}). Where q is zero, its
        # numerator is zero too.
        share = p / torch.where(here > 0, here, 1.0)
        rest = torch.where(after > 0, after, 1.0)
        row = (getattr(d, "total_count", 1) * share).sqrt()
        off = p.unsqueeze(-2) / rest.sqrt().unsqueeze(-1)
        root = row.unsqueeze(-1) * (after.sqrt().diag_embed() - off.triu(1))
        # The last row is zero; a single class keeps it, as there is no other.
        return root[..., : max(p.shape[-1] - 1, 1), :]


@final
@dataclass(frozen=True)
class GaussianInformation(Information):
    r"""Λ of a multivariate normal in μ and the packed Cholesky factor L of Σ.

    .. math:: \Lambda[d\mu] = |L^{-1} d\mu|^2,\qquad
        \Lambda[dL] = \tfrac12 |W + W^\top|_F^2,\quad W = L^{-1} dL,

    with W lower triangular, so that row (i, j) of R is :math:`W_{ij}`, times
    :math:`\sqrt2` where i = j. The two do not correlate.

    Source: Magnus and Neudecker (2019), Matrix Differential Calculus, chapter 15,
    with :math:`d\Sigma = dL\, L^\top + L\, dL^\top`.
    """

    def fisher(self, d: Distribution, parts: tuple[str, ...]) -> Matrix:
        """See :meth:`Information.fisher`."""
        root = self.root(d, parts)
        return root.mT @ root

    def root(self, d: Distribution, parts: tuple[str, ...]) -> Root:
        """See :meth:`Information.root`."""
        scale_tril: Tensor = d.scale_tril  # type: ignore[attr-defined]
        eye = torch.eye(
            scale_tril.shape[-1], dtype=scale_tril.dtype, device=scale_tril.device
        )
        inverse = torch.linalg.solve_triangular(
            scale_tril, eye.expand_as(scale_tril), upper=False
        )
        # (dmu)^T Sigma^-1 dmu = |L^-1 dmu|^2, so R of mu is L^-1
        if parts == ("loc",):
            return inverse
        scale_root = _scale_tril_root(scale_tril, inverse)
        if parts == ("scale_tril",):
            return scale_root
        return _block_diagonal(inverse, scale_root)


def _scale_tril_root(scale_tril: Tensor, inverse: Tensor) -> Tensor:
    """R of the packed factor: column (a, b) moves L_ab, or its log where a = b."""
    rows, columns = torch.tril_indices(*scale_tril.shape[-2:], device=scale_tril.device)
    on_diagonal = (rows == columns).to(scale_tril)
    # W_ij of a unit dL_ab is L^-1_ia where j = b; d log L_aa is dL_aa / L_aa
    unit = inverse[..., rows[:, None], rows] * (columns[:, None] == columns)
    scale = scale_tril[..., rows, columns] * on_diagonal + (1 - on_diagonal)
    double = 1 + (math.sqrt(2) - 1) * on_diagonal
    return double.unsqueeze(-1) * unit * scale.unsqueeze(-2)


def _block_diagonal(first: Tensor, second: Tensor) -> Tensor:
    """Two square blocks on the diagonal of a batch of matrices."""
    size, other = first.shape[-1], second.shape[-1]
    upper = torch.nn.functional.pad(first, (0, other))
    lower = torch.nn.functional.pad(second, (size, 0))
    return torch.cat([upper, lower], dim=-2)


def _real(name: str) -> Part:
    return Part(name, name, identity_transform)


def _log(name: str) -> Part:
    return Part(f"log_{name}", name, ExpTransform())


_LOC_SCALE = (_real("loc"), _log("scale"))
_LOGITS = (_real("logits"),)
_VECTOR = IndependentTransform(identity_transform, 1)
_CLASS_LOGITS = (Part("logits", "logits", _VECTOR),)
_SHAPE_RATE = (_log("concentration"), _log("rate"))
_TRIALS = ("total_count",)
_DIRICHLET = Part(
    "log_concentration", "concentration", IndependentTransform(ExpTransform(), 1)
)
_GAUSSIAN = (
    Part("loc", "loc", _VECTOR),
    Part("scale_tril", "scale_tril", LowerTriangle()),
)

_FAMILIES = (
    Family(Coordinates(td.Normal, _LOC_SCALE), Orthogonal(_normal)),
    Family(Coordinates(td.LogNormal, _LOC_SCALE), Orthogonal(_normal)),
    Family(Coordinates(td.Laplace, _LOC_SCALE), Orthogonal(_laplace)),
    Family(Coordinates(td.Cauchy, _LOC_SCALE), Orthogonal(_cauchy)),
    Family(Coordinates(td.Gumbel, _LOC_SCALE), Coupled(_gumbel)),
    Family(Coordinates(td.StudentT, (_log("df"), *_LOC_SCALE)), Coupled(_student_t)),
    Family(
        Coordinates(td.VonMises, (_real("loc"), _log("concentration"))),
        Orthogonal(_von_mises),
    ),
    Family(Coordinates(td.MultivariateNormal, _GAUSSIAN), GaussianInformation()),
    Family(Coordinates(td.HalfNormal, (_log("scale"),)), Orthogonal(_half_normal)),
    Family(Coordinates(td.HalfCauchy, (_log("scale"),)), Orthogonal(_half_cauchy)),
    Family(Coordinates(td.Exponential, (_log("rate"),)), Orthogonal(_exponential)),
    Family(Coordinates(td.Gamma, _SHAPE_RATE), Coupled(_gamma)),
    Family(Coordinates(td.InverseGamma, _SHAPE_RATE), Coupled(_gamma)),
    Family(
        Coordinates(td.Weibull, (_log("scale"), _log("concentration"))),
        Coupled(_weibull),
    ),
    Family(
        Coordinates(td.Beta, (_log("concentration1"), _log("concentration0"))),
        Coupled(_beta),
    ),
    Family(Coordinates(td.Dirichlet, (_DIRICHLET,)), DirichletInformation()),
    Family(Coordinates(td.Bernoulli, _LOGITS), Orthogonal(_bernoulli)),
    Family(Coordinates(td.Binomial, _LOGITS, _TRIALS), Orthogonal(_binomial)),
    Family(Coordinates(td.Geometric, _LOGITS), Orthogonal(_geometric)),
    Family(
        Coordinates(td.NegativeBinomial, (_log("total_count"), *_LOGITS)),
        Coupled(_negative_binomial),
    ),
    Family(Coordinates(td.Poisson, (_log("rate"),)), Orthogonal(_poisson)),
    Family(Coordinates(td.Categorical, _CLASS_LOGITS), CategoricalInformation()),
    Family(Coordinates(td.OneHotCategorical, _CLASS_LOGITS), CategoricalInformation()),
    Family(
        Coordinates(td.Multinomial, _CLASS_LOGITS, _TRIALS), CategoricalInformation()
    ),
)

_BY_CLASS = {family.distribution: family for family in _FAMILIES}

CLOSED_FORMS: Mapping[type[Distribution], Family] = {
    **_BY_CLASS,
    # It has a `scale_tril`, and so everything that a multivariate normal is asked for.
    td.LowRankMultivariateNormal: _BY_CLASS[td.MultivariateNormal],
}
"""The family of each torch class; its subclasses that keep its density share it."""
