"""Selectors side by side, for networks whose full posterior can be held."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
import torch.distributions as td
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.exceptions import OptionError, SelectionError
from pyro_subnet.gaussians.factored import PrecisionGaussian
from pyro_subnet.guides.map import AutoSubnetLaplace
from pyro_subnet.selection.base import resolve_size
from pyro_subnet.selection.output_variance import (
    DenseOutputs,
    Weighting,
    check_weighting,
    reference_data,
)
from pyro_subnet.selection.subspace import WhitenedGradients, full_gaussian
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.memory import check_factor_fits
from pyro_subnet.tensors.modes import full_precision
from pyro_subnet.tracing.data import Data
from pyro_subnet.tracing.output_site import OutputSite
from pyro_subnet.tracing.trace import Latents

Choice = Callable[..., Subnet]
# Factor, L^-1 L^-T, Gram matrix, its eigenvectors, a basis and its products.
_MATRICES = 8.0
_SUBSPACE = "Subspace"
_SOFTMAX = (td.Categorical, td.OneHotCategorical)
_NORMAL = (td.Normal, td.LogNormal)  # of the logarithm, with the same divergence


@dataclass(frozen=True)
class SubnetComparisonRow:
    """One subnet at one set of inputs.

    Attributes:
        selector: Name of the selector.
        size: S, how many weights it has.
        inputs: Name of the inputs.
        kept_variance: Share of the full posterior's linearized predictive variance.
        wasserstein: 2-Wasserstein distance to the full posterior over all weights,
            unconstrained.
        kl: Mean divergence of the predictive from the full posterior's, in nats a
            datum; None for families that have no closed form here.
    """

    selector: str
    size: int
    inputs: str
    kept_variance: float
    wasserstein: float
    kl: float | None


@dataclass(frozen=True)
class SubnetComparison:
    """What :func:`~pyro_subnet.compare_subnets` finds; ``print`` shows the table.

    Attributes:
        rows: By selector, size and inputs, in the order given.
        num_params: D, how many there are in all.
    """

    rows: tuple[SubnetComparisonRow, ...]
    num_params: int

    def table(self) -> str:
        """The rows as plain text.

        Returns:
            A line for the heads, and one for each row.
        """
        cells = [("selector", "S", "inputs", "kept", "W2", "KL")]
        for row in self.rows:
            kl = "-" if row.kl is None else f"{row.kl:.4g}"
            kept, distance = f"{row.kept_variance:.4f}", f"{row.wasserstein:.4g}"
            cells.append((row.selector, str(row.size), row.inputs, kept, distance, kl))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(
                # Words to the left, numbers to the right.
                cell.ljust(width) if column in {0, 2} else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in cells
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        """The table."""
        return self.table()


@torch.inference_mode(False)
@full_precision()
def compare_subnets(
    guide: AutoSubnetLaplace,
    *args: Any,
    selectors: Mapping[str, Choice] | Sequence[Choice],
    sizes: Sequence[int | float] | None = None,
    inputs: Mapping[str, Any] | None = None,
    weighting: Weighting = "equal",
    subspace: bool = True,
    model_kwargs: Mapping[str, Any] | None = None,
) -> SubnetComparison:
    r"""How close subnets come to the full posterior, by selector, size and inputs.

    With :math:`\Sigma = P^{-1}` over all D weights and :math:`\Sigma_S` that of the
    subnet, :math:`P_{SS}^{-1}` with zeros around:

    - the share of linearized predictive variance that is kept,
      :math:`\sum_x \operatorname{tr} J \Sigma_S J^\top / \sum_x \operatorname{tr} J
      \Sigma J^\top`;
    - the 2-Wasserstein distance, whose square is :math:`\operatorname{tr} \Sigma +
      \operatorname{tr} \Sigma_S - 2 \operatorname{tr} (\Sigma^{1/2} \Sigma_S
      \Sigma^{1/2})^{1/2}`: both have the MAP as their mean;
    - :math:`\operatorname{KL}(p_\text{full} \| p_S)` of the predictives at each
      datum, averaged: what is lost, in the full posterior's view, by predicting with
      the subnet. For a normal, over the datum's outputs together, the noise at its
      MAP (its own uncertainty is left out); for classes and Bernoulli, element by
      element under the probit link (MacKay), :math:`\eta / \sqrt{1 + \pi v / 8}`; for
      other families, None. Observed sites are added up; scales and masks are not used.

    All with the model's own prior: tune its precision for each subnet, and judge by
    held-out data, before a choice is made. Holds eight D x D matrices in float64 and
    the Jacobian over all weights, N C D numbers a set of inputs. Costs about 4 D^3
    operations, 4 D^2 S for each subnet, and for each set of inputs 4 D^2 N C and, with
    ``subspace``, the eigenvectors of a matrix of side D or N C, whichever is smaller.

    Args:
        guide: The guide at its MAP.
        args: The training data, as the model takes them.
        selectors: ``{name: selector}``, or a sequence, named by their classes.
        sizes: Counts or shares, for each of which a selector with a field ``size`` is
            made anew; None takes all as they are. Others are taken once.
        inputs: ``{name: inputs}``, each in a form that :class:`PredictiveVariance
            <pyro_subnet.selection.PredictiveVariance>` takes; None for the training
            data alone.
        weighting: Of the outputs in the share kept, as there.
        subspace: Whether to add rows for the best subspace of each size
            (:class:`~pyro_subnet.selection.Subspace`), made for each set of inputs: no
            subnet keeps more.
        model_kwargs: Keyword arguments of the model.

    Returns:
        The rows; ``table()`` or ``print`` shows them.

    Raises:
        OptionError: If there is no selector or no inputs, two share a name, or the
            weighting is unknown.
        MemoryLimitError: If matrices over all weights do not fit.
        SubnetError: One of its kinds: see :mod:`pyro_subnet.exceptions`.

    Source: Daxberger et al. (2021), section 4, arXiv 2010.14689, for the distance;
    Dowson and Landau (1982) for its closed form; MacKay (1992) for the link.
    """
    check_weighting(weighting)
    named = _named(selectors)
    wanted = {"training": None} if inputs is None else dict(inputs)
    if not wanted:
        raise OptionError(
            "`inputs` must name at least one set of inputs; got none. Leave it out for "
            "the training data."
        )
    kwargs = dict(model_kwargs or {})
    if guide.prototype_trace is None:
        guide._setup_prototype(*args, **kwargs)
    latents = Latents.from_guide(guide, guide.loc.detach().clone())
    num_params = latents.layout.num_params
    check_factor_fits(num_params, torch.float64, latents.loc.device, matrices=_MATRICES)
    data = Data.single(args, kwargs)
    chosen = [
        (name, _subnet(choice, guide, data))
        for name, selector in named.items()
        for choice in _resized(selector, sizes)
    ]
    gaussian = full_gaussian(guide.user_model, latents, data)
    full = _Full(gaussian)
    bound = sorted({subnet.size for _, subnet in chosen}) if subspace else []
    if subspace and sizes is not None:
        bound = sorted({resolve_size(size, num_params) for size in sizes} | set(bound))
    found: dict[tuple[str, int], list[SubnetComparisonRow]] = {}
    for name, where in wanted.items():
        batches = reference_data(where, data)
        gradients = WhitenedGradients.read(guide, batches, gaussian, weighting)
        outputs = [
            DenseOutputs.read(guide.user_model, latents, batch)
            for batch in batches.calls("Comparison")
        ]
        view = _Inputs(
            name, gradients, outputs, [gaussian.whiten(o.jac) for o in outputs]
        )
        for index, (selector, subnet) in enumerate(chosen):
            basis = _subset_basis(gaussian, subnet)
            row = _row(full, view, selector, basis)
            found.setdefault((selector, index), []).append(row)
        if bound:
            _, directions = gradients.leading(bound[-1])
            for size in bound:
                row = _row(full, view, _SUBSPACE, directions[:, :size])
                found.setdefault((_SUBSPACE, len(chosen) + size), []).append(row)
    rows = tuple(row for part in found.values() for row in part)
    return SubnetComparison(rows, num_params)


def _named(selectors: Mapping[str, Choice] | Sequence[Choice]) -> dict[str, Choice]:
    if isinstance(selectors, Mapping):
        named = dict(selectors)
    else:
        named = {type(selector).__name__: selector for selector in selectors}
    if not named or len(named) < len(selectors):
        names = [type(selector).__name__ for selector in selectors]
        raise OptionError(
            "`selectors` must be at least one, each with a name of its own; got "
            f"{names}. Pass a mapping from names to selectors."
        )
    return named


def _resized(selector: Any, sizes: Sequence[int | float] | None) -> Iterator[Choice]:
    """The selector at each size, or once if it has none."""
    sized = is_dataclass(selector) and any(f.name == "size" for f in fields(selector))
    if sizes is None or not sized or isinstance(selector, type):
        yield selector
        return
    for size in sizes:
        yield replace(selector, size=size)


def _subnet(choice: Choice, guide: AutoSubnetLaplace, data: Data) -> Subnet:
    subnet = choice(guide, data)
    if not isinstance(subnet, Subnet):
        raise SelectionError(
            f"A selector must return a Subnet; got {type(subnet).__name__}. The best "
            "subspace is added by `subspace=True`."
        )
    return subnet


class _Full:
    r"""The full posterior as far as distances to it need it.

    A Gaussian on the span of B is named by an orthonormal basis U of the columns of
    :math:`L^\top B`: its covariance is :math:`L^{-\top} U U^\top L^{-1}`. With
    :math:`K = L^{-1} L^{-\top}` the traces of the distance are those of K,
    :math:`U^\top K U`, and the singular values of :math:`K U`.
    """

    def __init__(self, gaussian: PrecisionGaussian):
        eye = torch.eye(gaussian.size, dtype=torch.float64, device=gaussian.loc.device)
        inverse = gaussian.whiten(eye)  # row i is L^-1 e_i: L^-T
        self.kernel = inverse.mT @ inverse
        self.trace = float(self.kernel.trace())

    def wasserstein(self, basis: Tensor) -> float:
        product = self.kernel @ basis
        own = float((basis * product).sum())
        cross = float(torch.linalg.svdvals(product).sum())
        return math.sqrt(max(0.0, self.trace + own - 2 * cross))


@dataclass(frozen=True, eq=False)
class _Inputs:
    """What the rows of one set of inputs are made of."""

    name: str
    gradients: WhitenedGradients
    outputs: Sequence[DenseOutputs]
    whitened: Sequence[Tensor]


def _subset_basis(
    gaussian: PrecisionGaussian, subnet: Subnet
) -> Float[Tensor, "params subnet"]:
    """Orthonormal basis of the columns of L^T E_S."""
    basis, _ = torch.linalg.qr(gaussian.precision_tril[subnet.flat].mT)
    return basis


def _row(
    full: _Full, view: _Inputs, selector: str, basis: Tensor
) -> SubnetComparisonRow:
    total: float | None = 0.0
    count = 0
    for outputs, rows in zip(view.outputs, view.whitened, strict=True):
        own = rows @ basis
        found = predictive_divergence(outputs, rows @ rows.mT, own @ own.mT)
        total = None if found is None or total is None else total + float(found.sum())
        count += len(rows)
    return SubnetComparisonRow(
        selector=selector,
        size=basis.shape[1],
        inputs=view.name,
        kept_variance=view.gradients.kept(basis),
        wasserstein=full.wasserstein(basis),
        kl=None if total is None else total / count,
    )


def predictive_divergence(
    outputs: DenseOutputs,
    f_var: Float[Tensor, "batch out out"],
    other_var: Float[Tensor, "batch out out"],
) -> Float[Tensor, " batch"] | None:
    r"""KL(p || p') of predictives at each datum that differ in the outputs' covariance.

    Args:
        outputs: Outputs at the MAP, the mean of both.
        f_var: Their covariance under p, shape (N, C, C).
        other_var: That under p'.

    Returns:
        Shape (N,), nats; None if a site's family has no closed form here.
    """
    total = torch.zeros_like(outputs.loc[:, 0])
    start = 0
    for site in outputs.sites:
        parts = outputs.moved[site.name]
        per_datum = site.num_elements // len(outputs.loc)
        widths = [width * per_datum for width in site.widths(parts)]
        kind = site.family.distribution
        if kind in _NORMAL:
            if "loc" in parts:
                own = slice(start, start + per_datum)  # the loc is the first part
                noise = _noise(site, len(outputs.loc))
                first = f_var[:, own, own] + noise
                total = total + _normal_divergence(
                    first, other_var[:, own, own] + noise
                )
        elif kind in _SOFTMAX or kind is td.Bernoulli:
            own = slice(start, start + widths[0])
            logits = outputs.loc[:, own].unflatten(1, (per_datum, -1))
            scaled = [
                _probit(logits, var.diagonal(dim1=1, dim2=2)[:, own])
                for var in (f_var, other_var)
            ]
            if kind is td.Bernoulli:  # the logit of one against a logit of zero
                scaled = [torch.cat([eta, 0.0 * eta], dim=-1) for eta in scaled]
            both = [eta.log_softmax(-1) for eta in scaled]
            terms = both[0].exp() * (both[0] - both[1])
            total = total + terms.where(both[0].isfinite(), 0.0).sum((1, 2))
        else:
            return None
        start += sum(widths)
    return total


def _noise(site: OutputSite, num_data: int) -> Tensor:
    """Diagonal matrices of a normal's noise variance at the MAP, (N, M / N, M / N)."""
    base: Any = site.distribution.base
    scale = base.scale.detach().to(torch.float64)
    scale = scale.expand(site.distribution.element_shape)
    return scale.square().reshape(num_data, -1).diag_embed()


def _normal_divergence(first: Tensor, second: Tensor) -> Tensor:
    """KL of centred normals, by covariance."""
    factor = torch.linalg.cholesky(second)
    inside = torch.linalg.solve_triangular(
        factor, torch.linalg.cholesky(first), upper=False
    )
    log_ratio = inside.diagonal(dim1=1, dim2=2).log().sum(1)
    return 0.5 * (inside.square().sum((1, 2)) - first.shape[-1]) - log_ratio


def _probit(logits: Tensor, variance: Tensor) -> Tensor:
    """Logits that stand for the mean over a normal of this variance."""
    return logits / (1 + math.pi / 8 * variance.reshape(logits.shape)).sqrt()
