"""What a user may ask for, in one vocabulary, and the checks of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, final, get_args

from torch import Tensor

from pyro_subnet.exceptions import OptionError, shown

# Curvatures of the likelihood. All but the Hessian are sums over rows of the Jacobian.
Curvature = Literal["ggn", "ggn-mc", "ef", "hessian"]
Covariance = Literal["full", "diag", "kron"]
FullForm = Literal["auto", "primal", "dual"]
# How a posterior's curvature is held: names of the forms in `gaussians/`.
FormName = Literal["primal", "dual", "diagonal", "kronecker"]
HeldAs = Literal[FormName, "auto"]  # "auto" until a sum has seen how many rows it has
# The one form of each covariance that is not full.
_FORMS: dict[Covariance, FormName] = {"diag": "diagonal", "kron": "kronecker"}


@final
@dataclass(frozen=True)
class FitOptions:
    """The curvature that a posterior is asked to have.

    Attributes:
        curvature: Which curvature of the likelihood.
        covariance: Whether the Gaussian's covariance is full, or that of a diagonal or
            a Kronecker-factored precision, to compare with.
        form: How a full one is held; ``"auto"`` takes the cheaper.

    Raises:
        OptionError: If an option is unknown, or two exclude each other.
    """

    curvature: Curvature = "ggn"
    covariance: Covariance = "full"
    form: FullForm = "auto"

    def __post_init__(self) -> None:
        for name, allowed, default in (
            ("curvature", get_args(Curvature), "the GGN"),
            ("covariance", get_args(Covariance), "a full one"),
            ("form", get_args(FullForm), "the cheaper one"),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise OptionError(
                    f"`{name}` must be one of {', '.join(map(repr, allowed))}; got "
                    f"{value!r}. Leave it out for {default}."
                )
        if self.covariance != "full" and self.form != "auto":
            raise OptionError(
                f"`form` must be left out unless the covariance is full; got "
                f"form={self.form!r} with covariance={self.covariance!r}. Leave it out."
            )
        if self.covariance != "full" and self.curvature == "hessian":
            raise OptionError(
                f"`covariance={self.covariance!r}` must have a curvature summed from "
                "rows of the Jacobian; got curvature='hessian'. Pass curvature='ggn'."
            )

    def may_need_matrix(self, whole: bool) -> bool:
        """Whether an S x S matrix is sure to be needed, or may be.

        Args:
            whole: Whether all data come in one call. Then it is soon known how many
                rows there are, and what ``"auto"`` chooses checks the memory itself.

        Returns:
            Whether it is.
        """
        return self.held_as == "primal" or (self.held_as == "auto" and not whole)

    @property
    def noise_power(self) -> int:
        """Power of a normal noise scale by which the curvature is divided.

        It is 2, but 4 for ``"ef"``: the empirical Fisher squares the data's own
        residuals over the variance, whose expectation no longer cancels one of the two
        variances.
        """
        return 4 if self.curvature == "ef" else 2

    @property
    def held_as(self) -> HeldAs:
        """The form asked for; ``"auto"`` is the cheaper of primal and dual."""
        return _FORMS.get(self.covariance, self.form)


def check_positive(values: Tensor, name: str, default: str) -> None:
    """Refuses factors that are not positive and finite; 1.0 stands for ``default``."""
    flat = values.detach().flatten()
    bad = (~(flat.isfinite() & (flat > 0))).nonzero().flatten()
    if bad.numel():
        found = [float(value) for value in flat[bad[:3]]]
        raise OptionError(
            f"`{name}` must be positive and finite; got "
            f"{found[0] if len(flat) == 1 else found}. Pass 1.0 for {default}."
        )


def as_number(value: Any, name: str, default: str) -> float:
    """A value as a float; an error unless it is one number, of whatever library."""
    one = isinstance(value, Real) or getattr(value, "shape", None) == ()
    if not one or isinstance(value, bool):
        raise OptionError(
            f"`{name}` must be a number; got {shown(value)}. Pass {default}."
        )
    return float(value)


def check_shares(values: Any, name: str) -> None:
    """Refuses what is no list of numbers in [0, 1]."""
    shares = (
        []
        if isinstance(values, str) or not isinstance(values, Iterable)
        else [
            as_number(value, name, "numbers such as [0.05, 0.95]") for value in values
        ]
    )
    if not shares or not all(0.0 <= share <= 1.0 for share in shares):
        raise OptionError(
            f"`{name}` must be a list of numbers in [0, 1]; got {shown(values)}. Pass "
            "[0.05, 0.95], say."
        )


def is_count(value: Any) -> bool:
    """Whether a value is a whole number of at least 1, NumPy's among them."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    return whole and int(value) >= 1


def check_num_samples(num_samples: Any) -> None:
    """Refuses a number of draws below 1, and what is no whole number."""
    if not is_count(num_samples):
        raise OptionError(
            f"`num_samples` must be at least 1; got {shown(num_samples)}. Pass a whole "
            "number, 1000 or so."
        )


def check_forgetting(forgetting: Any) -> None:
    """Refuses a factor of the old data's log likelihood outside (0, 1]."""
    if not 0.0 < as_number(forgetting, "forgetting", "1.0") <= 1.0:
        raise OptionError(
            f"`forgetting` must be in (0, 1]; got {forgetting}. Pass 1.0 to keep all "
            "that was known."
        )


def check_num_data(num_data: Any) -> None:
    """Refuses a number of data points below 1, and what is no whole number."""
    if num_data is not None and not is_count(num_data):
        raise OptionError(
            f"`num_data` must be a positive count; got {shown(num_data)}. Leave it "
            "out if the batches hold all the data."
        )


@final
@dataclass(frozen=True)
class ModelFactors:
    """What a model's own priors and normal noise are multiplied by.

    Attributes:
        prior: For each latent site, what the precision of its prior is multiplied by;
            sites that are left out keep their own.
        noise: What the standard deviation of normal observed sites is multiplied by.
    """

    prior: Mapping[str, float] = field(default_factory=dict)
    noise: float = 1.0

    @property
    def are_own(self) -> bool:
        """Whether they leave the model as it is."""
        return self.noise == 1.0 and all(each == 1.0 for each in self.prior.values())

    def over(self, sites: Iterable[str]) -> float | dict[str, float]:
        """The prior's factors: one number where all sites share it, else by site."""
        by_site = {site: self.prior.get(site, 1.0) for site in sites}
        one, *others = set(by_site.values())
        return by_site if others else one
