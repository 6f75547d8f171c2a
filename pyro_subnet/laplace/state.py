"""A Laplace posterior in numbers: what the guide holds, and how it changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.curvature.sums import Summed
from pyro_subnet.exceptions import OptionError, TuningWarning, warn
from pyro_subnet.gaussians.base import CurvatureForm, Gaussian, PriorFactor
from pyro_subnet.gaussians.registry import FORMS, as_it_pays
from pyro_subnet.laplace.evidence import (
    log_evidence,
    prior_traces,
    scaled_log_likelihood,
    unscaled_summary,
)
from pyro_subnet.laplace.search import Tuning
from pyro_subnet.laplace.summary import FitSummary
from pyro_subnet.laplace.tuning import tune_noise, tune_prior, tune_site_priors
from pyro_subnet.options import (
    FitOptions,
    FormName,
    ModelFactors,
    as_number,
    check_positive,
)
from pyro_subnet.subnet import Layout, Subnet

# What a prior precision may be multiplied by: one number for all sites, or one a site.
SiteFactors = float | Tensor | Mapping[str, float | Tensor]
# Share of the outputs' variance below which nothing is left of it. A prior precision
# times s leaves 1 / s of it at least.
_NOTHING = 1e-3
_ROUND_OFF = 1e-12
_OWN_PRIOR = "the model's own prior precision"
_BY = {"evidence": "evidence", "nll": "held-out nll"}


@final
@dataclass(frozen=True)
class PosteriorFacts:
    """What a posterior holds beside its tensors; see :class:`PosteriorState`."""

    form: FormName
    options: FitOptions
    prior_factor: float | dict[str, float]
    noise_factor: float
    explained_variance: float | None
    tunings: dict[str, Tuning]
    chosen_by: str | None = None
    num_seen: int | None = None


@final
@dataclass(frozen=True, eq=False)
class PosteriorState:
    """The Gaussian over a subnet, the curvature behind it, and the factors it is under.

    Attributes:
        loc: The MAP, packed, shape (D,), unconstrained.
        subnet: The chosen elements.
        form: Curvature of likelihood and prior, at the present factors.
        summary: The log joint density of the training data at the MAP.
        options: How the curvature was asked for.
        prior_factor: What the model's prior precision is multiplied by, over the
            subnet: a number, or one for each site named.
        noise_factor: What the scale of the model's normal noise is multiplied by.
        tunings: How factors were chosen, if by tuning, the last one last: of the
            ``"prior"``, of the ``"noise"``.
        chosen_by: What chose the subnet, for people; None where that is not known.
        num_seen: Number of data points that were seen; None where plates do not tell.
    """

    loc: Float[Tensor, " params"]
    subnet: Subnet
    form: CurvatureForm
    summary: FitSummary
    options: FitOptions = field(default_factory=FitOptions)
    prior_factor: float | dict[str, float] = 1.0
    noise_factor: float = 1.0
    tunings: dict[str, Tuning] = field(default_factory=dict)
    chosen_by: str | None = None
    num_seen: int | None = None

    def __str__(self) -> str:
        how = {name: f" (by {_BY[each.method]})" for name, each in self.tunings.items()}
        factors = f"prior precision times {_shown(self.prior_factor)}"
        factors += how.get("prior", "")
        factors += f", noise times {_shown(self.noise_factor)}{how.get('noise', '')}"
        options = self.options
        curvature = (
            f"curvature {options.curvature!r}, covariance {options.covariance!r}, "
            f"held in {self.form.name} form"
        )
        # A file of an earlier version tells neither of these.
        chosen = None if self.chosen_by is None else f"subnet: {self.chosen_by}"
        seen = None if self.num_seen is None else f"data seen: {self.num_seen}"
        lines = (chosen, curvature, factors, seen)
        return "\n  ".join([str(self.subnet), *filter(None, lines)])

    @property
    def facts(self) -> PosteriorFacts:
        """What it holds beside its tensors."""
        return PosteriorFacts(
            self.form.name,
            self.options,
            self.prior_factor,
            self.noise_factor,
            self.subnet.explained_variance,
            self.tunings,
            self.chosen_by,
            self.num_seen,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name: all that :attr:`facts` and the layout do not hold."""
        return {
            "loc": self.loc,
            "subnet_positions": self.subnet.flat,
            **self.form.tensors(),
            **self.summary.tensors(),
        }

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], facts: PosteriorFacts, layout: Layout
    ) -> PosteriorState:
        """Undoes :meth:`tensors`; the state shares the tensors."""
        positions = tensors["subnet_positions"]
        return cls(
            tensors["loc"],
            Subnet(layout, positions, facts.explained_variance),
            FORMS[facts.form].from_tensors(tensors, layout),
            FitSummary.from_tensors(tensors),
            facts.options,
            facts.prior_factor,
            facts.noise_factor,
            facts.tunings,
            facts.chosen_by,
            facts.num_seen,
        )

    @property
    def tuning(self) -> Tuning | None:
        """How the factor was chosen that was tuned last."""
        return next(reversed(self.tunings.values()), None)

    @property
    def gaussian(self) -> Gaussian:
        """The Gaussian over the subnet."""
        return self.form.gaussian(self.loc.index_select(0, self.subnet.flat))

    @property
    def prior_factors(self) -> Float[Tensor, "..."]:
        """What each weight's prior precision is multiplied by, () or (S,), float64."""
        return factor_of_each(self.prior_factor, self.subnet)

    @property
    def factors(self) -> ModelFactors:
        """What the model's own priors and noise are multiplied by, site by site."""
        by_site = self.prior_factor
        if not isinstance(by_site, Mapping):
            by_site = dict.fromkeys(self.subnet.layout.names, float(by_site))
        return ModelFactors(by_site, self.noise_factor)

    @property
    def factor_for_form(self) -> PriorFactor:
        """The same as its form takes it: a number, or one a weight on its device."""
        return self._for_form(self.prior_factors)

    @property
    def options_to_add(self) -> FitOptions:
        """How more data's curvature must be summed to be added to this one."""
        if self.options.covariance != "full":
            return self.options
        held: Any = self.form.name
        return replace(self.options, form=held)

    def with_prior_factor(
        self, factor: float | Mapping[str, float], tuning: Tuning | None = None
    ) -> PosteriorState:
        """The posterior under ``factor`` times the model's own prior precision."""
        each = factor_of_each(factor, self.subnet, "scale")
        given = dict(factor) if isinstance(factor, Mapping) else float(factor)
        form = self.form.rescaled(self._for_form(each))
        tunings = self._recorded("prior", tuning)
        return replace(self, form=form, prior_factor=given, tunings=tunings)

    def with_noise_factor(
        self, factor: float, tuning: Tuning | None = None
    ) -> PosteriorState:
        """The posterior under normal noise, ``factor`` times the model's own scale."""
        factor = as_number(factor, "scale", "1.0 for the model's own noise")
        checked = torch.tensor(factor, dtype=torch.float64)
        check_positive(checked, "scale", "the model's own noise")
        scaled_log_likelihood(self.summary, checked)
        form = self.form.rescaled(
            self._for_form(self.prior_factors), self._likelihood_factor(factor)
        )
        tunings = self._recorded("noise", tuning)
        return replace(self, form=form, noise_factor=factor, tunings=tunings)

    def of_own_model(self, factors: ModelFactors) -> PosteriorState:
        """The same posterior, fitted under factors, told in terms of the model's own.

        Args:
            factors: Those that the model was under.

        Returns:
            The posterior at these factors. Of elements outside the subnet, the log
            prior is under them for good.
        """
        if factors.are_own:
            return self
        given = factors.over(self.subnet.layout.names)
        each = factor_of_each(given, self.subnet)
        prior = self.form.prior.scaled(1 / self._for_form(each))
        tensors = {**self.form.tensors(), **prior.tensors()}
        form = type(self.form).from_tensors(tensors, self.subnet.layout)
        return replace(
            self,
            form=form.rescaled(self._for_form(each)),
            summary=unscaled_summary(self.summary, prior, each, factors.noise),
            prior_factor=given,
            noise_factor=factors.noise,
        )

    def with_data(
        self,
        more: Summed,
        summary: FitSummary,
        forgetting: float,
        num_seen: int | None = None,
    ) -> PosteriorState:
        r"""The posterior of :math:`\gamma G + G' + s P_0`; ``more`` is overwritten."""
        prior_factor = self._for_form(self.prior_factors)
        form = self.form.updated(
            more.ggn,
            prior_factor,
            forgetting=forgetting,
            # G' was summed at the model's own noise.
            likelihood_factor=self.noise_factor**-self.options.noise_power,
        )
        if self.options.form == "auto":
            form = as_it_pays(form, prior_factor)
        summed = self.summary.plus(summary, forgetting)
        known = self.num_seen is not None and num_seen is not None
        seen = (self.num_seen or 0) + (num_seen or 0) if known else None
        return replace(self, form=form, summary=summed, tunings={}, num_seen=seen)

    def log_marginal_likelihood(
        self,
        prior_factor: SiteFactors | None = None,
        noise_factor: float | Tensor | None = None,
    ) -> Float[Tensor, ""]:
        """Log evidence in nats, differentiable once in factors, by default its own."""
        prior = self.prior_factor if prior_factor is None else prior_factor
        noise = self.noise_factor if noise_factor is None else noise_factor
        noise = torch.as_tensor(noise, dtype=torch.float64)
        check_positive(noise, "noise_factor", "the model's own noise")
        each = factor_of_each(prior, self.subnet)
        return log_evidence(
            self.form, self.summary, each, noise, self._likelihood_factor(noise)
        )

    def tuned_prior(
        self, bounds: tuple[float, float], *, per_site: bool
    ) -> PosteriorState:
        """The posterior under the prior precision of highest evidence."""
        if per_site:
            tuning = tune_site_priors(
                self.form, self.summary, self.subnet, self.noise_factor, bounds
            )
        else:
            tuning = tune_prior(self.form, self.summary, self.noise_factor, bounds)
        return self.with_prior_factor(tuning.by_site or tuning.best, tuning)

    def tuned_noise(self, bounds: tuple[float, float]) -> PosteriorState:
        """The posterior under the normal noise of highest evidence."""
        tuning = tune_noise(
            self.form, self.summary, self.prior_factors, self._likelihood_factor, bounds
        )
        return self.with_noise_factor(tuning.best, tuning)

    def warn_of_tuning(self) -> None:
        """Says where the factor that was tuned last is no choice."""
        if not self.tunings:
            return
        of, tuning = next(reversed(self.tunings.items()))
        if of == "prior" and self.is_deleted:
            warn(
                f"The prior precision that was chosen leaves less than {_NOTHING} of "
                "the variance that outputs have under the model's own: predictions are "
                "the MAP's. Keep the model's own, or tune by 'evidence'; held-out data "
                "tell only where they show the shift. If the noise is in doubt, set it "
                "first: `posterior.tune(val=...)`.",
                TuningWarning,
            )
        # Where nothing moves the objective, the bound next to the own one is meant.
        elif tuning.at_bound and not tuning.is_flat:
            warn(
                f"Tuning the {of} by {_BY[tuning.method]} ended at one of its bounds, "
                f"{_shown(tuning.by_site or tuning.best)} times the model's own: the "
                "best may lie outside. Pass wider `bounds`, or keep the model's own.",
                TuningWarning,
            )

    @property
    def is_deleted(self) -> bool:
        """Whether nothing is left of the variance under the model's own prior."""
        factor = self.prior_factor
        if isinstance(factor, Mapping) or factor * _NOTHING <= 1:
            return False
        own = self.with_prior_factor(1.0)._determined()  # judged by training's outputs
        # Weights that move no output are determined by no data, but for round-off.
        return self._determined() <= max(_NOTHING * own, _ROUND_OFF * self.subnet.size)

    def _determined(self) -> float:
        r"""Returns :math:`\operatorname{tr}(P^{-1} G)`, over the noise's variance."""
        traces = prior_traces(self.gaussian, self.form.prior)
        return max(float((1 - self.prior_factors * traces).sum()), 0.0)

    def _recorded(self, of: str, tuning: Tuning | None) -> dict[str, Tuning]:
        """The records, with that of one factor replaced."""
        others = {name: each for name, each in self.tunings.items() if name != of}
        return others if tuning is None else {**others, of: tuning}

    def _likelihood_factor(self, noise_factor: Any) -> Any:
        """What the present G is multiplied by under another noise."""
        # G falls with r^-2, the empirical Fisher with r^-4.
        return (self.noise_factor / noise_factor) ** self.options.noise_power

    def _for_form(self, each: Tensor) -> PriorFactor:
        return each.to(self.loc.device) if each.ndim else float(each)


def factor_of_each(
    prior_factor: SiteFactors, subnet: Subnet, name: str = "prior_factor"
) -> Float[Tensor, "..."]:
    """What each weight's prior precision is multiplied by, () or (S,), float64."""
    if not isinstance(prior_factor, Mapping):
        factor = _as_tensor(prior_factor, name)
        _check_number(factor, name)
        return factor
    for site, value in prior_factor.items():
        subnet.layout.shape(site)
        label = f"{name}[{site!r}]"
        _check_number(_as_tensor(value, label), label)
    # A site that is left out keeps the model's own prior precision.
    parts = [
        torch.as_tensor(prior_factor.get(site, 1.0), dtype=torch.float64).expand(count)
        for site, count in subnet.counts.items()
    ]
    return torch.cat(parts)


def _as_tensor(value: Any, name: str) -> Tensor:
    # Lists are told by their shape.
    if not isinstance(value, Tensor | list):
        value = as_number(value, name, f"1.0 for {_OWN_PRIOR}")
    return torch.as_tensor(value, dtype=torch.float64)


def _check_number(factor: Tensor, name: str) -> None:
    if factor.ndim:
        raise OptionError(
            f"`{name}` must be one number; got shape {tuple(factor.shape)}. Pass 1.0 "
            f"for {_OWN_PRIOR}, or a mapping from sites to numbers."
        )
    check_positive(factor, name, _OWN_PRIOR)


def _shown(factor: float | Mapping[str, float]) -> str:
    """A factor, or one for each site, for people."""
    if isinstance(factor, Mapping):
        return ", ".join(f"{number:.4g} at {site}" for site, number in factor.items())
    return f"{factor:.4g}"
