"""Selectors side by side, for networks whose full posterior can be held."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, final

import torch
import torch.distributions as td
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.comparison.table import SubnetComparison, SubnetComparisonRow
from pyro_subnet.exceptions import OptionError, SelectionError
from pyro_subnet.gaussians.factored import FactoredGaussian
from pyro_subnet.guides.map import AutoSubnetLaplace
from pyro_subnet.predictions.links.probit import probit
from pyro_subnet.selection.base import resolve_size
from pyro_subnet.selection.output_variance import (
    Weighting,
    check_weighting,
    reference_data,
)
from pyro_subnet.selection.subspace import WhitenedGradients, full_gaussian
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.memory import check_factor_fits
from pyro_subnet.tensors.modes import full_precision
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.data import Batch, Data
from pyro_subnet.tracing.linearized_outputs import LinearizedOutputs
from pyro_subnet.tracing.output_site import OutputSite
from pyro_subnet.tracing.trace import Latents, ModelAtMAP

Choice = Callable[..., Subnet]
# D x D matrices held at once: L, L^-1 L^-T, Gram matrix, its eigenvectors, a basis and
# its products.
_MATRICES = 8.0
_SUBSPACE = "Subspace"
_SOFTMAX = (td.Categorical, td.OneHotCategorical)
_NORMAL = (td.Normal, td.LogNormal)  # that of the logarithm has the same divergence


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

    With :math:`\Sigma = P^{-1}` over all D weights, and :math:`\Sigma_S` the subnet's
    :math:`P_{SS}^{-1}` with zeros around it, a row holds

    - the share of linearized predictive variance that the subnet keeps,
      :math:`\sum_x \operatorname{tr} J \Sigma_S J^\top / \sum_x \operatorname{tr} J
      \Sigma J^\top`;
    - the 2-Wasserstein distance, whose square is :math:`\operatorname{tr} \Sigma +
      \operatorname{tr} \Sigma_S - 2 \operatorname{tr} (\Sigma^{1/2} \Sigma_S
      \Sigma^{1/2})^{1/2}`, since both have the MAP as their mean;
    - the divergence :math:`\operatorname{KL}(p_\text{full} \| p_S)` of the predictives,
      averaged over data points: what predicting with the subnet loses, if the full
      posterior is right. For a normal it is taken over a data point's outputs together,
      with the noise at its MAP (the noise's own uncertainty is left out); for classes
      and Bernoulli, element by element under MacKay's probit link,
      :math:`\eta / \sqrt{1 + \pi v / 8}`; for other families it is None. Observed sites
      add up. Scales and masks are not used.

    The prior is the model's own. Before choosing a subnet, tune the prior precision for
    each candidate and compare on held-out data. The call holds eight D x D matrices in
    float64, and for each set of inputs the Jacobian over all weights, N C D numbers. It
    costs about 4 D^3 operations, 4 D^2 S for each subnet, and for each set of inputs
    4 D^2 N C and, with ``subspace``, the eigenvectors of a matrix of side D or N C,
    whichever is smaller.

    Args:
        guide: The guide at its MAP.
        args: The training data, as the model takes them.
        selectors: ``{name: selector}``, or a sequence, named by their classes.
        sizes: Counts or shares; a selector with a field ``size`` is made anew for each
            of them, and others are used once. None uses all as they are.
        inputs: ``{name: inputs}``, each in a form that :class:`PredictiveVariance
            <pyro_subnet.selection.PredictiveVariance>` takes; None for the training
            data alone.
        weighting: Of the outputs in the share kept, as for ``PredictiveVariance``.
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
        SubnetError: If the model or a selector fails (:mod:`pyro_subnet.exceptions`).

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
    at_map = replace(guide.at_map, latents=latents)
    gaussian = full_gaussian(at_map, data)
    full = _Full(gaussian)
    bound = sorted({subnet.size for _, subnet in chosen}) if subspace else []
    if subspace and sizes is not None:
        bound = sorted({resolve_size(size, num_params) for size in sizes} | set(bound))
    found: dict[tuple[str, int], list[SubnetComparisonRow]] = {}
    for name, where in wanted.items():
        batches = reference_data(where, data)
        gradients = WhitenedGradients.read(at_map, batches, gaussian, weighting)
        outputs = [
            _DenseOutputs.read(at_map, batch) for batch in batches.calls("Comparison")
        ]
        view = _Inputs(
            name, gradients, outputs, [gaussian.whiten(o.jac) for o in outputs]
        )
        for index, (selector, subnet) in enumerate(chosen):
            # Columns of L^T E_S.
            basis, _ = torch.linalg.qr(gaussian.precision_tril[subnet.flat].mT)
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
    """The selector at each size, or once if it has no field ``size``."""
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


@final
class _Full:
    r"""The full posterior, as distances to it need it.

    A Gaussian on the span of B is given by an orthonormal basis U of the columns of
    :math:`L^\top B`: its covariance is :math:`L^{-\top} U U^\top L^{-1}`.
    """

    def __init__(self, gaussian: FactoredGaussian):
        eye = torch.eye(gaussian.size, dtype=torch.float64, device=gaussian.loc.device)
        inverse = gaussian.whiten(eye)  # row i is L^-1 e_i: L^-T
        self.kernel = inverse.mT @ inverse
        self.trace = float(self.kernel.trace())

    def wasserstein(self, basis: Tensor) -> float:
        # With K = L^-1 L^-T the traces of the distance are those of K and U^T K U, and
        # the sum of the singular values of K U.
        product = self.kernel @ basis
        own = float((basis * product).sum())
        cross = float(torch.linalg.svdvals(product).sum())
        return math.sqrt(max(0.0, self.trace + own - 2 * cross))


@final
@dataclass(frozen=True, eq=False)
class _DenseOutputs:
    """Outputs of one call: loc (N, C) and Jacobian over all weights, in float64."""

    outputs: LinearizedOutputs
    loc: Float[Tensor, "batch out"]
    jac: Float[Tensor, "batch out params"]

    @classmethod
    def read(cls, at_map: ModelAtMAP, batch: Batch) -> _DenseOutputs:
        call = ModelCall.read(at_map, *batch)
        with torch.no_grad():
            outputs = LinearizedOutputs.read(call, at_map.latents.everything)
            like = at_map.latents.loc.to(torch.float64)
            jac = torch.cat(list(outputs.rows(like)))
            return cls(outputs, outputs.loc(like), jac)


@final
@dataclass(frozen=True, eq=False)
class _Inputs:
    """What the rows of one set of inputs are computed from."""

    name: str
    gradients: WhitenedGradients
    outputs: Sequence[_DenseOutputs]
    whitened: Sequence[Tensor]


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
    outputs: _DenseOutputs,
    f_var: Float[Tensor, "batch out out"],
    other_var: Float[Tensor, "batch out out"],
) -> Float[Tensor, " batch"] | None:
    r"""KL(p || p') of predictives with one mean, (N,), nats; None: no closed form."""
    total = torch.zeros_like(outputs.loc[:, 0])
    start = 0
    for site in outputs.outputs.sites:
        parts = outputs.outputs.subnet_call.moved[site.name]
        per_datum = site.num_elements // len(outputs.loc)
        widths = [width * per_datum for width in site.widths(parts)]
        kind = site.family.distribution
        if kind in _NORMAL:
            if "loc" in parts:
                own = slice(start, start + per_datum)  # the loc is the first part
                noise = _noise(site, len(outputs.loc))
                both = [var[:, own, own] + noise for var in (f_var, other_var)]
                total = total + _normal_divergence(*both)
        elif kind in _SOFTMAX or kind is td.Bernoulli:
            own = slice(start, start + widths[0])
            logits = outputs.loc[:, own].unflatten(1, (per_datum, -1))
            variances = [v.diagonal(dim1=1, dim2=2)[:, own] for v in (f_var, other_var)]
            scaled = [probit(logits, var.reshape(logits.shape)) for var in variances]
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
    """A normal's noise variances at the MAP as diagonal matrices, a data point each."""
    base: Any = site.distribution.base
    scale = base.scale.detach().to(torch.float64)
    scale = scale.expand(site.distribution.element_shape)
    return scale.square().reshape(num_data, -1).diag_embed()


def _normal_divergence(first: Tensor, second: Tensor) -> Tensor:
    """KL of centred normals with these covariances."""
    factor = torch.linalg.cholesky(second)
    inside = torch.linalg.solve_triangular(
        factor, torch.linalg.cholesky(first), upper=False
    )
    log_ratio = inside.diagonal(dim1=1, dim2=2).log().sum(1)
    return 0.5 * (inside.square().sum((1, 2)) - first.shape[-1]) - log_ratio
