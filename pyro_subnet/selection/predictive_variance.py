"""The weights that keep most of the predictive variance at given inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from jaxtyping import Int
from torch import Tensor

from pyro_subnet.exceptions import OptionError
from pyro_subnet.fit.sums import diagonal_curvature
from pyro_subnet.selection.base import (
    GuideAtMAP,
    Selector,
    check_size,
    largest,
    resolve_size,
)
from pyro_subnet.selection.diagonal import explained_variance, marginal_variance
from pyro_subnet.selection.greedy import (
    add_in_blocks,
    check_pool,
    check_pool_fits,
    matrices_to_add,
    pool_size,
    relative_noise,
)
from pyro_subnet.selection.held_gram import HeldGram
from pyro_subnet.selection.output_variance import (
    Weighting,
    check_inputs,
    dense_precision,
    held_rows,
    reference_data,
    squared_gradients,
)
from pyro_subnet.subnet import Subnet
from pyro_subnet.tracing.data import Data
from pyro_subnet.tracing.trace import ModelAtMAP

# Default candidates per chosen weight, for large subnets.
_CANDIDATES = 4.0
# Most candidates at which "auto" is greedy. It does not ask how much memory is free: a
# subnet that depends on that could not be chosen again.
_MOST_CANDIDATES = 8192
# By default a greedy choice is made in about this many steps.
_STEPS = 64
# Rows of J that a choice reads for each candidate (for the precision twice as many),
# but where M^2 operations for each row are no more than these, about a second.
_ROWS, _QUICK = 2, 2**37
# Candidates below which it is not operations that count, but 512 MiB of float64.
_SMALL = 2048
# Shares of S after which what is left to gain is read anew, for classes.
_ROUNDS = (1 / 8, 1 / 4, 1 / 2, 3 / 4)


@final
@dataclass(frozen=True, eq=False)
class PredictiveVariance(Selector):
    r"""Keeps the weights that keep most linearized predictive variance at given inputs.

    .. math:: f(S) = \sum_x \operatorname{tr} J_S(x)\, P_{SS}^{-1} J_S(x)^\top

    with P the GGN of the training data plus the prior's precision, as in the posterior.

    ``"diagonal"`` takes P to be diagonal, and keeps the weights with the largest
    :math:`\sum_{x,c} J_{cj}(x)^2 / (G_{jj} + P_{0,jj})`. It costs one pass over the
    training data and one over the inputs, and memory linear in D. With ``inputs=None``
    and ``weighting="fisher"`` the score is what ``explained_variance`` sums, so no
    other subnet of that size explains more.

    ``"greedy"`` counts correlations among the M = ``pool`` x S best of those. Weights
    enter a block at a time, those that add most to f given all blocks before, by Schur
    complements; ``block_size=1`` is the forward greedy algorithm. It costs a further
    pass of each kind, M^2 operations a row of J, and memory for 2 M^2 + 3 M S numbers
    in float64 and 2 M^2 of J. Of training data that can be taken apart it reads no more
    than a random part, the same every time: about 2 M rows of J at the inputs, and 4 M
    for P, or as many as take a second (of ``inputs`` that are given the same, but P of
    all data; over ranks each draws from its own data). Weights that add nothing go by
    position. Where many weights of large variance are nearly alike, a small pool holds
    little else, and most of the gain is lost.

    Sites of classes (categorical) are bounded at each input: in place of the trace of
    the covariance V_S(x) of their log-probabilities, a greedy choice adds up

    .. math:: \operatorname{tr} V_S(x)\, (I + V_S(x))^{-1} \le C,

    about the number of directions in which the classes of an input are left uncertain.
    Of a sum of variances the weights of a few classes that data tell apart at a glance,
    and hence do not determine, take all: the others stay as certain as at the MAP. What
    is left to gain is read anew after 1/8, 1/4, 1/2 and 3/4 of the weights.

    ``"auto"`` is greedy where that chooses among at most 8,192 candidates, 1.9 GiB, as
    by default it does up to S = 2,048, and diagonal above.

    ``explained_variance`` is that of a diagonal posterior on the training inputs,
    Fisher-weighted, whatever ``inputs``, ``method`` and ``weighting`` are.

    Neither finds the best subset, which no known algorithm of reasonable cost does;
    :class:`Subspace` bounds it from above.

    Attributes:
        size: A count (int) or a share in (0, 1] (float).
        inputs: Where predictions will be wanted: a tensor, a tuple of arguments, a
            mapping of keyword arguments, ``(args, kwargs)``, or a list of such batches;
            None for the training data. They need no labels if the model needs none.
        method: ``"auto"``, ``"greedy"`` or ``"diagonal"``.
        weighting: Over the unconstrained parameters of all observed distributions that
            a latent site moves, ``"equal"`` sums their variances as they are (for
            classes, those of the log-probabilities). A noise scale that all data share
            is left out, so that it stays a point estimate, which
            ``posterior.tune`` can set. ``"bounded"`` is the same but for classes, as
            above; diagonal scores, which know of no other weight, are those of
            ``"equal"``. ``"fisher"`` sums
            :math:`\operatorname{tr} \Lambda \operatorname{Var} \eta`, to second order
            twice the expected divergence of p(y | η) from that at the MAP: nats,
            whatever the parameters' units, with each site's scale and mask.
        pool: Candidates of ``"greedy"`` per chosen weight, at least 1; None for 4, but
            at least 2,048 candidates in all.
        block_size: Weights per step of ``"greedy"``; None for S / 64, at least 1.

    Raises:
        SelectionError: If ``size`` is neither a count nor a share; when called, if no
            weight moves an output at the inputs.
        OptionError: If another option has a value outside those it allows.
        PrecisionError: When called, if a precision is not positive.
        MemoryLimitError: When called, if the candidates' matrices do not fit.

    Source: the diagonal score and the greedy rule are ours; that f(S) never exceeds
    the full posterior's variance and rises with S is proved by Raha, Khare and Patra
    (2026), arXiv 2605.09075.
    """

    size: int | float
    inputs: Any = None
    method: Literal["auto", "greedy", "diagonal"] = "auto"
    weighting: Literal["bounded", "equal", "fisher"] = "bounded"
    pool: int | float | None = None
    block_size: int | None = None

    passes_over_data = True

    def __post_init__(self) -> None:
        check_size(self.size)
        check_inputs(self.inputs)
        if self.weighting not in ("bounded", "equal", "fisher"):
            raise OptionError(
                "`weighting` must be 'bounded', 'equal' or 'fisher'; got "
                f"{self.weighting!r}. Leave it out for 'bounded'."
            )
        check_pool(self.pool)
        if self.method not in ("auto", "greedy", "diagonal"):
            raise OptionError(
                "`method` must be 'auto', 'greedy' or 'diagonal'; got "
                f"{self.method!r}. Leave it out for 'auto'."
            )
        if self.block_size is not None and self.block_size < 1:
            raise OptionError(
                f"`block_size` must be at least 1; got {self.block_size}. Leave it out "
                "for S / 64."
            )

    def __call__(self, guide: GuideAtMAP, data: Data) -> Subnet:
        """See :meth:`Selector.__call__`."""
        at_map = guide.at_map
        latents, layout = at_map.latents, at_map.latents.layout
        size = resolve_size(self.size, layout.num_params)
        num_candidates = pool_size(self.pool, size, layout.num_params, _CANDIDATES)
        few = self.method == "greedy" or num_candidates <= _MOST_CANDIDATES
        # With no more candidates than places, all rules choose alike.
        is_greedy = self.method != "diagonal" and few and num_candidates > size
        if is_greedy:
            dtype = latents.loc.dtype
            matrices = matrices_to_add(num_candidates, size, dtype)
            check_pool_fits(num_candidates, matrices, latents.loc.device)
        inputs = reference_data(self.inputs, data)
        curvature = diagonal_curvature(at_map, data)
        variance = marginal_variance(curvature, layout)
        squares = squared_gradients(at_map, inputs, self._at_once)
        noise = torch.finfo(latents.loc.dtype).eps ** 0.75
        scores = squares.total * variance
        if not is_greedy:
            positions = largest(scores, size, noise)
        else:
            # Noise that all data share is no candidate.
            others = max(size, int((scores > -torch.inf).sum()))
            best = largest(scores, min(num_candidates, others), noise)
            pool = Subnet.from_positions(layout, best)
            share = share_read(squares.num_rows, pool.size)
            chosen = self._chosen(at_map, pool, data, inputs, size, share=share)
            positions = pool.flat[chosen]
        explained = explained_variance(curvature, variance, positions)
        return Subnet.from_positions(layout, positions, explained)

    @property
    def _at_once(self) -> Weighting:
        """The weighting where nothing is chosen yet."""
        return "equal" if self.weighting == "bounded" else self.weighting

    def _chosen(
        self,
        at_map: ModelAtMAP,
        pool: Subnet,
        data: Data,
        inputs: Data,
        size: int,
        *,
        share: float,
    ) -> Int[Tensor, " chosen"]:
        """Positions of the weights within the pool, by their interactions."""
        of_data = min(1.0, 2 * share) if self.inputs is None else 1.0
        precision = dense_precision(at_map, pool, data, share=of_data)
        held = held_rows(
            at_map,
            pool,
            inputs,
            self._at_once,
            is_bounded=self.weighting == "bounded",
            share=share,
        )
        gram = HeldGram(held, precision, inputs.sum_, is_whole=share == 1.0)
        rounds = {round(part * size) for part in _ROUNDS if gram.is_bounded} - {0}
        at = pool.flat.new_empty(0)
        for end in sorted(rounds | {size}):
            if len(at):
                gram.choose(at)
            at = add_in_blocks(
                precision,
                gram,
                end,
                block_size=self.block_size or max(1, size // _STEPS),
                noise=relative_noise(at_map.latents.loc.dtype),
                start=at,
            )
        return at


def share_read(num_rows: int, num_candidates: int) -> float:
    """Which share of so many rows of J a greedy choice reads."""
    quick = _QUICK / (num_candidates * max(num_candidates, _SMALL))
    enough = max(_ROWS * num_candidates, quick)
    return min(1.0, enough / num_rows)
