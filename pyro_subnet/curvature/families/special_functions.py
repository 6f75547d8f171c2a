"""Functions that closed-form informations need, to full precision in float64.

Differences of polygamma and Bessel functions lose all digits for large arguments;
here they are summed as series or integrals of positive terms instead.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

Values = Float[Tensor, "*batch"]

# From here on series are used: here the exact difference has lost as many digits as the
# series still lacks, and both are good to 1e-12.
_LARGE_DF = 30.0
_LARGE_CONCENTRATION = 30.0
_NUM_BESSEL_TERMS = 20


def trigamma(x: Values) -> Values:
    r"""The trigamma function :math:`\psi'(x) = \zeta(2, x)` at positive x."""
    # `torch.polygamma(1, x)` is good to 5e-10 only, which differences would magnify.
    return torch.special.zeta(2, x)


def student_t_log_df_information(df: Values) -> Values:
    r"""Returns the information of Student's t in log ν.

    .. math:: \nu^2 \left(\tfrac14 \psi'(\tfrac\nu2) - \tfrac14 \psi'(\tfrac{\nu+1}2)
        - \frac{\nu+5}{2\nu(\nu+1)(\nu+3)}\right)

    For large ν the difference of trigammas is :math:`\sum_k (-1)^k (\nu+k)^{-2}`, whose
    Boole expansion :math:`\frac12 \nu^{-2} + \frac12 \nu^{-3} - \frac12 \nu^{-5} +
    \frac32 \nu^{-7} - \dots` starts with what the fraction takes away.

    Source: Lange, Little and Taylor (1989), J. Amer. Statist. Assoc. 84, in log ν here.
    """
    fraction = (df + 5) / (2 * df * (df + 1) * (df + 3))
    difference = (trigamma(df / 2) - trigamma((df + 1) / 2)) / 4
    u = 1 / df
    # 1/(2v^2) + 1/(2v^3) - fraction, over v^-4
    leading = (7 + 3 * u) / (2 * (1 + u) * (1 + 3 * u))
    tail = -0.5 * u + 1.5 * u**3 - 8.5 * u**5 + 77.5 * u**7 - 1036.5 * u**9
    series = u**2 * (leading + tail)
    return torch.where(df < _LARGE_DF, df**2 * (difference - fraction), series)


def bessel_ratio(concentration: Values) -> Values:
    r"""The mean resultant length :math:`A(\kappa) = I_1(\kappa) / I_0(\kappa)`."""
    return torch.special.i1e(concentration) / torch.special.i0e(concentration)


def von_mises_log_concentration_information(concentration: Values) -> Values:
    r"""Returns the information of the von Mises in log κ: :math:`\kappa^2 A'(\kappa)`.

    .. math:: A' = 1 - A^2 - A / \kappa

    which cancels for large κ. There :math:`A = \sum_m a_m \kappa^{-m}`, and the
    differential equation gives :math:`a_0 = 1`, :math:`a_1 = -\frac12` and
    :math:`2 a_m = (m - 2) a_{m-1} - \sum_{i=1}^{m-1} a_i a_{m-i}`.

    Source: Mardia and Jupp (2000), Directional Statistics, chapter 5, in log κ here.
    """
    ratio = bessel_ratio(concentration)
    exact = concentration * (concentration * (1 - ratio**2) - ratio)
    coefficients = [1.0, -0.5]
    for m in range(2, _NUM_BESSEL_TERMS):
        products = sum(coefficients[i] * coefficients[m - i] for i in range(1, m))
        coefficients.append(((m - 2) * coefficients[m - 1] - products) / 2)
    # kappa^2 A'(kappa) = -sum_m m a_m kappa^(1-m)
    series = sum(
        (-m * a * concentration ** (1 - m) for m, a in enumerate(coefficients)),
        start=torch.zeros_like(concentration),
    )
    return torch.where(concentration < _LARGE_CONCENTRATION, exact, series)


def negative_binomial_log_count_information(
    total_count: Values, logits: Values
) -> Values:
    r"""Returns the information of the negative binomial in log r, with l its logits.

    .. math:: r^2 \sum_{j \ge 0} \frac{P(X > j)}{(r + j)^2}
        = r^2 \operatorname{E}[\psi'(r) - \psi'(r + X)]

    The sum has as many terms as counts are likely, so the expectation is taken inside
    :math:`\psi'(z) = \int_0^\infty t e^{-zt} / (1 - e^{-t})\, dt`. With
    :math:`t = x / r`, :math:`x = e^v` and the generating function of X,

    .. math:: r \int_{-\infty}^\infty x e^{-x} \frac{t}{1 - e^{-t}}
        \left[1 - \left(1 + e^l (1 - e^{-t})\right)^{-r}\right] dv.

    The integrand is positive and analytic for :math:`|\operatorname{Im} v| < \pi/2`,
    so the trapezoidal rule at step h errs by :math:`e^{-\pi^2 / h}`, relative, at any
    r and l; outside of [-40, 4] nothing is left in double precision.

    Source: Fisher (1941), Annals of Eugenics 11, for the sum; its integral is our own.
    """
    step = 0.2
    total = torch.zeros_like(total_count)
    for v in torch.arange(-40.0, 4.0, step, dtype=torch.float64).tolist():
        x = torch.full_like(total_count, v).exp()
        t = x / total_count
        odds = logits.exp() * -torch.expm1(-t)
        bracket = -torch.expm1(-total_count * torch.log1p(odds))
        total = total + x * (-x).exp() * (t / -torch.expm1(-t)) * bracket
    return total_count * total * step
