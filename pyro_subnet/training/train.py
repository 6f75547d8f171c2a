"""Trains a guide's MAP while the evidence learns its prior and its noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Protocol, final, runtime_checkable

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_subnet.exceptions import NonFiniteError, OptionError, shown
from pyro_subnet.options import ModelFactors, as_number, is_count
from pyro_subnet.tensors.modes import differentiable, full_precision
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.data import Batch, Data
from pyro_subnet.tracing.data_values import check_data
from pyro_subnet.tracing.trace import ModelAtMAP
from pyro_subnet.training.evidence import (
    Evidence,
    EvidenceStep,
    residual_noise,
    rows_of,
)
from pyro_subnet.training.loss import negative_log_joint

# Looks at the evidence in one training, by default, and the share of it before them.
_LOOKS, _BURN_IN = 25, 6
# The learning rate ends at this share of where it begins.
_DECAY = 0.01
# Of the model's own noise, below which it does not follow residuals in the burn-in.
_LEAST_NOISE = 1e-3


@runtime_checkable
class Trainee(Protocol):
    """A guide that is trained: where it stands, and under which factors."""

    loc: Any
    factors: ModelFactors

    @property
    def at_map(self) -> ModelAtMAP:
        """The model under the present factors, at the present ``loc``."""


@final
@dataclass(frozen=True)
class Schedule:
    """How long to train, and when to look at the evidence; counts are of epochs.

    Attributes:
        num_epochs: Passes over the data.
        lr: Of Adam at the start; it falls to a hundredth, by the same factor a step.
        burn_in: Before the first look; None for a sixth.
        every: Between looks; None for 25 of them.
    """

    num_epochs: int
    lr: float = 0.01
    burn_in: int | None = None
    every: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_epochs", "burn_in", "every"):
            value = getattr(self, name)
            if value is None and name != "num_epochs":
                continue
            if not (is_count(value) or (name == "burn_in" and value == 0)):
                raise OptionError(
                    f"`{name}` must be a whole number of at least 1; got "
                    f"{shown(value)}. Pass a number of passes over the data."
                )
        if not as_number(self.lr, "lr", "0.01") > 0:
            raise OptionError(f"`lr` must be positive; got {self.lr}. Pass 0.01, say.")
        if self.burn_in is not None and self.burn_in >= self.num_epochs:
            raise OptionError(
                f"`burn_in` must be below num_epochs={self.num_epochs}; got "
                f"{self.burn_in}. Train longer, or leave it out for a sixth."
            )

    def looks_after(self, num_batches: int) -> Iterator[int]:
        """After how many epochs the evidence is looked at; the last one is the end."""
        first = self.num_epochs // _BURN_IN if self.burn_in is None else self.burn_in
        every = self.every
        if every is None:
            # Of batches a look costs four epochs, and shall not outweigh the training.
            least = 1 if num_batches == 1 else 6
            every = max(least, (self.num_epochs - first) // _LOOKS)
        yield from range(max(first, 1), self.num_epochs, every)

    def is_late(self, epoch: int) -> bool:
        """Whether the learning rate has fallen to a tenth of what it was."""
        return 2 * epoch >= self.num_epochs


@final
class Trainer:
    """Trains a guide's ``loc`` by Adam, and its factors by the evidence.

    Args:
        trainee: The guide, which was set up.
        data: The batches of an epoch.
        evidence: How factors are learned.
        history: Looks at the evidence are added here.
    """

    def __init__(
        self,
        trainee: Trainee,
        data: Data,
        evidence: Evidence,
        history: list[EvidenceStep],
    ):
        self._trainee, self._data = trainee, data
        self._evidence, self._history = evidence, history

    @torch.inference_mode(False)
    def train(self, schedule: Schedule, *, progress: bool = False) -> None:
        """Descends on the log joint; ends where the evidence was highest, late on.

        Where training is interrupted before, it ends where it was highest so far.

        Args:
            schedule: For how long.
            progress: Whether to show a progress bar.

        Raises:
            NonFiniteError: If the log joint is not finite.
        """
        loc, num_batches = self._trainee.loc, self._evidence.num_batches
        optimizer = torch.optim.Adam([loc], lr=schedule.lr)
        decay = _DECAY ** (1 / (schedule.num_epochs * num_batches))
        falling = torch.optim.lr_scheduler.ExponentialLR(optimizer, decay)
        looks, best = list(schedule.looks_after(num_batches)), _Best(self._trainee)
        first = looks[0] if looks else 0
        epochs = tqdm(range(schedule.num_epochs), "Training", disable=not progress)
        try:
            for epoch in epochs:
                if epoch in looks:
                    best.see(self.look(epoch).log_evidence, schedule.is_late(epoch))
                squares = []
                for loss, square in self._losses():
                    squares.append(square)
                    if not bool(loss.isfinite()):
                        raise NonFiniteError(
                            "The log joint must be finite in training; got "
                            f"{float(loss)} in epoch {epoch}. Lower "
                            f"lr={schedule.lr:g}, or scale inputs and targets."
                        )
                    optimizer.step()
                    falling.step()
                if epoch < first:
                    self._follow_residuals(statistics.fmean(squares))
            last = self.look(schedule.num_epochs, moves=False)
            best.see(last.log_evidence, late=True)
        finally:
            best.restore()
            loc.grad = None

    def _follow_residuals(self, mean_square: float) -> None:
        """Sets the noise to the residuals on the training data.

        In the burn-in alone: a network that starts under too large a noise fits a
        smooth function, whose residuals then keep the noise too large for good.
        """
        if self._evidence.learnable.has_noise and mean_square > 0:
            now = self._trainee.factors
            noise = max(now.noise * math.sqrt(mean_square), _LEAST_NOISE)
            self._trainee.factors = replace(now, noise=noise)

    def residual_noise(self) -> float:
        """The noise's factor that residuals on the training data have."""
        return residual_noise(self._trainee.at_map, self._data)

    def _losses(self) -> Iterator[tuple[Tensor, float]]:
        """Each batch's mean loss, whose gradient ``loc`` holds; mean square."""
        at_map, loc = self._trainee.at_map, self._trainee.loc
        num_data, several = self._evidence.num_data, self._evidence.num_batches > 1
        for batch in self._data.calls("Epoch"):
            weight = num_data / rows_of(batch) if several else 1.0
            loc.grad = None
            with differentiable(), _explaining(at_map, batch):
                loss, square = negative_log_joint(at_map, loc, batch, weight)
                loss = loss / num_data
                loss.backward()
            yield loss.detach(), square

    @torch.inference_mode(False)
    @full_precision()
    def look(self, epoch: int | None = None, *, moves: bool = True) -> EvidenceStep:
        """Looks at the evidence once, and writes down what it found.

        Args:
            epoch: After how many epochs.
            moves: Whether the factors are moved.

        Returns:
            What it found.
        """
        trainee, turn, began = self._trainee, len(self._history), perf_counter()
        if moves:
            trainee.factors, found = self._evidence.step(trainee.at_map, turn)
        else:
            found = self._evidence.log_evidence(trainee.at_map, turn)
        told = self._evidence.learnable.told(trainee.factors)
        noise, seconds = trainee.factors.noise, perf_counter() - began
        self._history.append(EvidenceStep(epoch, found, told, noise, seconds))
        return self._history[-1]


@contextmanager
def _explaining(at_map: ModelAtMAP, batch: Batch) -> Iterator[None]:
    """Where a step fails, says so if the data are what the likelihood forbids."""
    try:
        yield
    except Exception:
        for site in ModelCall.read(at_map, *batch).sites:
            check_data(site)
        raise


@final
class _Best:
    """The state of highest evidence so far; the present one before any look.

    Laplace's evidence is that of a mode. Early states are none, and often have more.
    """

    def __init__(self, trainee: Trainee):
        self._trainee, self._factors = trainee, trainee.factors
        self._log_evidence, self._is_late = -math.inf, False
        self._loc: Tensor | None = None

    def see(self, log_evidence: float, late: bool) -> None:
        """Keeps the present state if its evidence is the highest, early ones aside."""
        if late and not self._is_late:
            self._log_evidence, self._is_late = -math.inf, True
        if log_evidence >= self._log_evidence:
            self._log_evidence = log_evidence
            self._loc = self._trainee.loc.detach().clone()
            self._factors = self._trainee.factors

    def restore(self) -> None:
        """Puts the guide back where it was best."""
        if self._loc is not None:
            self._trainee.loc.data.copy_(self._loc)
            self._trainee.factors = self._factors
