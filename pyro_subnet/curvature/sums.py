"""The interface of a sum of the likelihood's curvature over the calls of a fit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from jaxtyping import Float
from torch import Tensor

from pyro_subnet.curvature.density_term import DensityTerm
from pyro_subnet.curvature.jacobian.output_map import Factors, OutputMap
from pyro_subnet.curvature.prior import PriorPrecision, prior_precision
from pyro_subnet.options import Curvature, FormName, HeldAs
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.ranks import Ranks


@final
@dataclass(frozen=True, eq=False)
class Summed:
    """The likelihood's curvature G, summed over the data."""

    form: FormName
    ggn: Any  # G, as the `of` and `updated` of that form take it
    is_zero: bool  # whether G is 0: no output depends on the subnet


class CurvatureSum(ABC):
    """The likelihood's curvature, summed call by call."""

    form: HeldAs  # "auto" until it is decided

    def read_prior(
        self,
        terms: Sequence[DensityTerm],
        leaves: Mapping[str, Tensor],
        subnet: Subnet,
        budget: int,
    ) -> PriorPrecision:
        """P0, in as much detail as the form holds of it."""
        return prior_precision(terms, leaves, subnet, budget)

    def meet(self, prior: PriorPrecision, kind: Curvature) -> None:  # noqa: B027
        """Settles the form; raises an OptionError if it cannot hold both arguments."""

    @abstractmethod
    def add(
        self,
        outputs: OutputMap,
        factors: Factors,
        weights: Float[Tensor, " data"],
        budget: int,
    ) -> None:
        r"""Adds the curvature of one call.

        Args:
            outputs: The subnet's outputs in this call.
            factors: :math:`\sqrt{w_n} R_n` with :math:`R_n^\top R_n = \Lambda_n`.
            weights: w of each data point, a sum over its elements, float64.
            budget: Bytes of Jacobian and activations that may be held at once.
        """

    @abstractmethod
    def add_terms(
        self,
        terms: Sequence[DensityTerm],
        leaves: Mapping[str, Tensor],
        subnet: Subnet,
        budget: int,
    ) -> None:
        r"""Adds the exact :math:`-\nabla_S^2` of log densities that have no outputs.

        Args:
            terms: Factors of the data in one call, named by their sites.
            leaves: All latent sites' values, in packing order.
            subnet: The chosen elements.
            budget: As in :meth:`add`.

        Raises:
            OptionError: If the form cannot hold it.
        """

    @abstractmethod
    def join(self, ranks: Ranks) -> None:
        """Adds up the sums of all ranks, which end with the same numbers."""

    @abstractmethod
    def finish(self, scale: float) -> Summed:
        """The sum so far times ``scale``; nothing is added to it afterwards."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The state besides ``form``, not copied; OptionError if no file holds it."""

    @abstractmethod
    def restore(self, form: HeldAs, tensors: Mapping[str, Tensor]) -> None:
        """Undoes :meth:`tensors`; ``form`` is what :attr:`form` was then."""
