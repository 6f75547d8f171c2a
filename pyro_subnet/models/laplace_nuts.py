"""NUTS on a hybrid model, which knows the Laplace posterior."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, final

from jaxtyping import Float
from pyro.infer import NUTS
from pyro.infer.mcmc.adaptation import BlockMassMatrix
from torch import Tensor

from pyro_subnet.models.held_density import HeldDensity
from pyro_subnet.models.subnet_prior import SITE
from pyro_subnet.tracing.trace import Model

# From a call's arguments, which will not change: its density, None if it is not held.
Hold = Callable[[tuple[Any, ...], dict[str, Any]], HeldDensity | None]


@final
class LaplaceNUTS(NUTS):
    """NUTS whose mass matrix is the precision of the Laplace posterior.

    A run's data are those that it was called with. Where a density of them can be held,
    it takes the place of runs of the model.

    Args:
        hybrid: The hybrid model.
        hold: Finds the density of a call.
        covariance: Of the Laplace posterior, shape (S, S).
        options: Of ``pyro.infer.NUTS``.
    """

    def __init__(
        self,
        hybrid: Model,
        hold: Hold,
        covariance: Float[Tensor, "subnet subnet"],
        options: Mapping[str, Any],
    ):
        defaults = {"full_mass": True, "adapt_mass_matrix": False}
        super().__init__(hybrid, **{**defaults, **options})
        self._hold = hold
        self.mass_matrix_adapter = _LaplaceMassMatrix(covariance)

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """See ``NUTS.setup``: a run begins, and holds its data's density."""
        super().setup(warmup_steps, *args, **kwargs)
        held = self._hold(args, kwargs)
        if held is not None:
            self.potential_fn = partial(_potential, held)


def _potential(held: HeldDensity, params: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    return -held(params[SITE])


@final
class _LaplaceMassMatrix(BlockMassMatrix):
    """Starts at the posterior's covariance as inverse mass matrix."""

    def __init__(self, covariance: Tensor):
        super().__init__()
        self._covariance = covariance

    def configure(self, *args: Any, **kwargs: Any) -> None:
        """See ``BlockMassMatrix.configure``."""
        super().configure(*args, **kwargs)
        self.inverse_mass_matrix = {(SITE,): self._covariance}
