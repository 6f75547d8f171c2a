"""Which of a model's priors and noise have a factor that the evidence can learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from pyro_subnet.exceptions import ModelError
from pyro_subnet.options import ModelFactors
from pyro_subnet.subnet import Layout
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.scaled_model import (
    has_normal_noise,
    is_joint,
    is_scalable,
)


@final
@dataclass(frozen=True)
class Learnable:
    """What is learned of a model, and what is left alone.

    Attributes:
        groups: Latent sites whose prior precisions share a factor.
        has_noise: Whether all data have normal noise that no latent site moves.
        left_alone: Why other latent sites keep their prior, and data their noise.
        is_diagonal: Whether all priors are normal, and no two weights depend.
        num_outputs: C, parameters of the observed distributions that weights move,
            per observation.
    """

    groups: tuple[tuple[str, ...], ...]
    has_noise: bool
    left_alone: Mapping[str, str]
    is_diagonal: bool
    num_outputs: int

    @classmethod
    def read(cls, call: ModelCall, *, per_site: bool) -> Learnable:
        """Looks at one call of the model.

        Args:
            call: The call.
            per_site: Whether each site has a factor of its own.

        Returns:
            What can be learned.

        Raises:
            ModelError: If nothing can be.
        """
        graph = call.graph()
        parents = call.latent_parents()
        of_others = frozenset[str]().union(*parents.values())
        left, normal = dict[str, str](), list[str]()
        for name in call.latents.layout.names:
            if not is_scalable(call.trace.nodes[name]["fn"]):
                left[name] = "its prior is not normal"
            elif name in parents:
                left[name] = f"its prior depends on {sorted(parents[name])}"
            elif name in of_others:
                left[name] = "other priors depend on it"
            else:
                normal.append(name)
        moved = call.moved_parts(graph, call.latents.everything)
        plain = bool(call.sites) and not call.factors
        for site in call.sites:
            if not has_normal_noise(site.node["fn"]):
                plain = False
                if is_joint(site.node["fn"]):
                    left[site.name] = "its noise is joint over several elements"
            elif "log_scale" in moved[site.name]:
                plain, left[site.name] = False, "latent sites move its noise"
        for site in call.sites if not plain else ():
            if has_normal_noise(site.node["fn"]):  # one factor is for all data
                left.setdefault(site.name, "not all data have normal noise to learn")
        shown = max(call.num_data, 1)
        outputs = sum(
            site.outputs(site.node, moved[site.name]).numel()
            for site in call.sites
            if moved[site.name]
        )
        if not normal and not plain:
            reasons = "; ".join(f"{name!r}: {why}" for name, why in left.items())
            raise ModelError(
                "The evidence must have a normal prior or normal noise to learn; got "
                f"none ({reasons}). Give weights normal priors of fixed scale, or "
                "train with SVI."
            )
        one_by_one = len(normal) == len(call.latents.layout.names) and not any(
            is_joint(call.trace.nodes[name]["fn"]) for name in normal
        )
        groups = tuple((name,) for name in normal) if per_site else (tuple(normal),)
        num_outputs = -(-outputs // shown)
        return cls(groups if normal else (), plain, left, one_by_one, num_outputs)

    def positions(self, layout: Layout, device: torch.device) -> Sequence[Tensor]:
        """Positions of each group in the packed vector."""
        sizes = dict(zip(layout.names, layout.sizes, strict=True))
        return [
            torch.cat(
                [
                    torch.arange(sizes[name], device=device) + layout.offsets[name]
                    for name in group
                ]
            )
            for group in self.groups
        ]

    def of_groups(self, factors: ModelFactors) -> Tensor:
        """The factor of each group, shape (groups,), float64."""
        each = [factors.prior.get(group[0], 1.0) for group in self.groups]
        return torch.tensor(each, dtype=torch.float64)

    def told(self, factors: ModelFactors) -> float | dict[str, float]:
        """The prior's factor, or that of each site where they differ."""
        names = [name for group in self.groups for name in group]
        return factors.over(names) if names else 1.0

    def factors(self, prior: Tensor, noise: float) -> ModelFactors:
        """Factors of sites from those of groups."""
        pairs = zip(self.groups, prior.tolist(), strict=True)
        by_site = {name: factor for group, factor in pairs for name in group}
        return ModelFactors(by_site, noise)
