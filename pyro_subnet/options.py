"""What a user may ask of the fit, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pyro_subnet.curvature.ggn import Form
from pyro_subnet.exceptions import OptionError
from pyro_subnet.tracing.data import Data

Curvature = Literal["ggn", "ggn-mc", "ef", "hessian"]
Covariance = Literal["full", "diag", "kron"]
CURVATURES: tuple[str, ...] = get_args(Curvature)
_COVARIANCES: tuple[str, ...] = get_args(Covariance)
_FORMS = ("auto", "primal", "dual")


@dataclass(frozen=True)
class FitOptions:
    """How a posterior's curvature is asked for.

    Attributes:
        curvature: Which curvature of the likelihood.
        covariance: Whether the Gaussian's covariance is full, or the reference one of a
            diagonal or Kronecker-factored precision.
        form: How a full one is held; ``"auto"``: as costs less.

    Raises:
        OptionError: If one is not known, or they do not go together.
    """

    curvature: Curvature = "ggn"
    covariance: Covariance = "full"
    form: Literal["auto", "primal", "dual"] = "auto"

    def __post_init__(self) -> None:
        """Checks the options."""
        for name, allowed, default in (
            ("curvature", CURVATURES, "the GGN"),
            ("covariance", _COVARIANCES, "a full one"),
            ("form", _FORMS, "the cheaper one"),
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

    @property
    def kind_of_rows(self) -> Literal["ggn", "ggn-mc", "ef"]:
        """The curvature, where it is one that sums over rows of the Jacobian."""
        return "ggn" if self.curvature == "hessian" else self.curvature

    @property
    def noise_power(self) -> int:
        """The power of a normal noise scale that the curvature falls with.

        The empirical Fisher squares the data's own residuals over the variance, whose
        expectation no longer cancels one of the two.
        """
        return 4 if self.curvature == "ef" else 2

    @property
    def held_as(self) -> Form:
        """How the sum over the data is to be held."""
        return "diagonal" if self.covariance == "diag" else self.form

    def needs_matrix(self, data: Data) -> bool:
        """Whether an S x S matrix is sure to be needed, or may be.

        Of a single call it is soon known how many rows there are: what ``"auto"`` then
        chooses checks the memory itself.

        Args:
            data: The training data.

        Returns:
            Whether its memory must be checked beforehand.
        """
        if self.covariance != "full" or self.form == "dual":
            return False
        return self.form == "primal" or not data.whole
