"""What chosen weights leave to gain at each input of a site of classes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributions import Categorical, OneHotCategorical

from pyro_subnet.curvature.jacobian.output_map import OutputMap, identity_factors
from pyro_subnet.curvature.jacobian.route import jacobian_blocks
from pyro_subnet.selection.greedy import lower_factor
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.memory import DEFAULT_BUDGET
from pyro_subnet.tracing.output_site import OutputSite


def is_of_classes(site: OutputSite) -> bool:
    """Whether a site's outputs are the log-probabilities of classes."""
    return site.family.distribution in (Categorical, OneHotCategorical)


@final
@dataclass(frozen=True, eq=False)
class Chosen:
    """Weights that are chosen, and how well the data determine them.

    Attributes:
        subnet: The weights T.
        precision_tril: Lower Cholesky factor of their precision P_TT, (T, T), float64.
    """

    subnet: Subnet
    precision_tril: Float[Tensor, "subnet subnet"]

    @classmethod
    def of(
        cls,
        pool: Subnet,
        precision: Float[Tensor, "pool pool"],
        at: Int[Tensor, " chosen"],
    ) -> Chosen:
        """Weights at positions within a pool, with the precision over it."""
        at = at.sort().values
        subnet = Subnet.from_positions(pool.layout, pool.flat[at])
        return cls(subnet, lower_factor(precision[at][:, at]))

    def left_to_gain(
        self, sites: Sequence[OutputSite], outputs: OutputMap
    ) -> dict[str, Float[Tensor, "elements classes classes"]]:
        """Symmetric roots of what a further variance adds at each element.

        Args:
            sites: Those that a call over the chosen weights alone moves.
            outputs: Of that call, or of some of its data.

        Returns:
            By site of classes, :math:`(I + V)^{-1}`, with V the covariance that the
            chosen weights give the log-probabilities. The trace of
            :math:`V (I + V)^{-1}` rises with dV by that of dV between two such factors.
        """
        # Costs T^2 operations a row of J.
        found = defaultdict[str, list[Tensor]](list)
        for block in jacobian_blocks(
            outputs, identity_factors(outputs), DEFAULT_BUDGET
        ):
            site = sites[block.site]
            if is_of_classes(site):
                found[site.name].append(self._factor(block.rows))
        return {name: torch.cat(parts) for name, parts in found.items()}

    def _factor(self, rows: Float[Tensor, "elements classes subnet"]) -> Tensor:
        tril = self.precision_tril
        white = torch.linalg.solve_triangular(
            tril, rows.to(tril).flatten(0, 1).mT, upper=False
        )
        roots = white.mT.unflatten(0, rows.shape[:2])  # V = Q Q^T
        total = roots @ roots.mT
        total.diagonal(dim1=-2, dim2=-1).add_(1.0)
        return torch.linalg.inv(total).to(rows)
