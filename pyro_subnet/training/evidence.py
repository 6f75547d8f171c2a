"""One look at the evidence: a pass over the data, and the factors it asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, final

import torch
from torch.utils._pytree import tree_flatten

from pyro_subnet.exceptions import OptionError, TuningWarning, shown, warn
from pyro_subnet.fit.passes import DataPass
from pyro_subnet.fit.sums import subnet_curvature
from pyro_subnet.gaussians.registry import form_of
from pyro_subnet.laplace.factors import EvidenceOfFactors
from pyro_subnet.options import FitOptions, ModelFactors
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.data import Batch, Data, held_out_data
from pyro_subnet.tracing.trace import ModelAtMAP, other_random_numbers
from pyro_subnet.training.learnable import Learnable

Structure = Literal["auto", "full", "kron", "diag"]
# Rows of the kernel, or weights, up to which the evidence is that of a full GGN.
_MOST_ROWS = 2000
_MOST_NUMBERS = 2**27  # of the kernel's rows times weights, 1 GiB
_LEAST = 1e-24  # of residuals, over the noise's variance
# How far factors may move in one step, in logarithms: the weights must follow.
_STRIDE = 1.0


@final
@dataclass(frozen=True)
class EvidenceStep:
    """What one step of learning by the evidence found.

    Attributes:
        epoch: After how many epochs; None in a loop of the user's own.
        log_evidence: Laplace's, of all weights under the new factors, nats.
        prior_factor: What the model's prior precision is multiplied by: one number, or
            one for each site.
        noise_factor: What the scale of its normal noise is multiplied by.
        seconds: How long the look took.
    """

    epoch: int | None
    log_evidence: float
    prior_factor: float | Mapping[str, float]
    noise_factor: float
    seconds: float = field(compare=False)


@final
@dataclass(frozen=True, eq=False)
class Evidence:
    """How the evidence of a model is measured, and what of it may be learned.

    Attributes:
        data: All training data.
        learnable: Priors and noise that have factors.
        structure: Of the curvature over all weights.
        val: Held-out data, which set the noise; None leaves it to the evidence.
        is_wide: Whether there are fewer rows of the Jacobian than weights.
        num_data: N, the data of an epoch.
        num_batches: Of an epoch.
    """

    data: Data
    learnable: Learnable
    structure: Literal["full", "kron", "diag"]
    val: Data | None
    is_wide: bool
    num_data: int
    num_batches: int

    @classmethod
    @torch.inference_mode(False)
    def of(
        cls,
        at_map: ModelAtMAP,
        data: Data,
        *,
        structure: Structure = "auto",
        per_site: bool = False,
        val: Any = None,
    ) -> Evidence:
        """Looks at the model's first call, and refuses what cannot be learned."""
        if structure not in ("auto", "full", "kron", "diag"):
            raise OptionError(
                "`covariance` must be 'auto', 'full', 'kron' or 'diag'; got "
                f"{shown(structure)}. Leave it out for the exact one where that fits."
            )
        if val is not None:
            val = held_out_data(val)
        rows = [rows_of(batch) for batch in data.calls("Count")]
        args, kwargs = next(data.calls("Set-up"))
        call = ModelCall.read(at_map, args, kwargs)
        learnable = Learnable.read(call, per_site=per_site)
        if val is not None and not learnable.has_noise:
            raise OptionError(
                "`val` must be for a model all of whose data have normal noise that no "
                "latent site moves, which is all that it sets; got another. Leave "
                "`val` out."
            )
        if val is not None:
            residual_noise(at_map, val)  # what cannot be read is told at once
        if learnable.left_alone:
            left = learnable.left_alone.items()
            warn(
                "The evidence learns factors of normal priors of fixed scale, and of "
                "normal noise; left as they are: "
                + "; ".join(f"{name!r}, as {why}" for name, why in left)
                + ".",
                TuningWarning,
            )
        num_rows = sum(rows) * learnable.num_outputs
        num_params = at_map.latents.layout.num_params
        fits = min(num_rows, num_params) <= _MOST_ROWS
        if structure == "auto":
            few = num_rows * num_params <= _MOST_NUMBERS or num_params <= _MOST_ROWS
            structure = "full" if fits and few else "kron"
        is_wide = num_rows < num_params
        return cls(data, learnable, structure, val, is_wide, sum(rows), len(rows))

    def step(self, at_map: ModelAtMAP, turn: int = 0) -> tuple[ModelFactors, float]:
        """Factors that the evidence, and held-out data, ask for at a MAP.

        Args:
            at_map: The model, at its present factors.
            turn: Which step it is, which seeds labels that are drawn.

        Returns:
            The factors, and the log evidence under them.
        """
        now, learnable = at_map.factors, self.learnable
        evidence = self._measured(at_map, turn)
        noise = None
        if self.val is not None:
            noise = residual_noise(at_map, self.val) / now.noise
        present = learnable.of_groups(now)
        found = evidence.best(noise=noise)
        moved = found.prior.log().clamp(-_STRIDE, _STRIDE).exp()
        noise = math.exp(min(max(math.log(found.noise), -_STRIDE), _STRIDE))
        log_evidence = evidence.at(moved, noise).log_evidence
        return learnable.factors(present * moved, now.noise * noise), log_evidence

    def log_evidence(self, at_map: ModelAtMAP, turn: int = 0) -> float:
        """The evidence at the present factors, nats."""
        evidence = self._measured(at_map, turn)
        ones = torch.ones(len(self.learnable.groups), dtype=torch.float64)
        return evidence.at(ones, 1.0).log_evidence

    def _measured(self, at_map: ModelAtMAP, turn: int) -> EvidenceOfFactors:
        latents, options = at_map.latents, self._options()
        with other_random_numbers(turn):
            found = subnet_curvature(at_map, latents.everything, self.data, options)
        form = form_of(found.likelihood, found.prior, latents.layout)
        groups = self.learnable.positions(latents.layout, latents.loc.device)
        noise = self.learnable.has_noise
        return EvidenceOfFactors(form, found.summary, groups, noise)

    def _options(self) -> FitOptions:
        if self.structure == "full":
            # The kernel of the rows needs a prior that treats weights one by one.
            by_rows = self.learnable.is_diagonal and self.is_wide
            return FitOptions(form="dual" if by_rows else "primal")
        # Labels drawn from the model take one backward pass in place of one a class.
        many = self.structure == "kron" and self.learnable.num_outputs > 1
        return FitOptions("ggn-mc" if many else "ggn", self.structure)


def residual_noise(at_map: ModelAtMAP, data: Data) -> float:
    """What the model's own noise must be multiplied by, to be that of the residuals."""
    own = replace(at_map, factors=replace(at_map.factors, noise=1.0))
    passed = DataPass(own, at_map.latents.everything, data, _nothing, _ignore)
    for _ in passed.calls(data.calls("Residuals")):
        pass
    _, weight, energy = passed.numbers.tolist()
    return math.sqrt(max(energy / weight, _LEAST))


def rows_of(batch: Batch) -> int:
    """Length of the first axis of a batch's first argument that has one."""
    for leaf in tree_flatten(batch)[0]:
        if getattr(leaf, "ndim", 0) and len(leaf):
            return len(leaf)
    return 1


def _nothing(*_: Any) -> float:
    return 0.0


def _ignore(*_: Any) -> None:
    return
