"""How a fit's curvature is summed, held, added to, and named in files."""

from __future__ import annotations

import torch

from pyro_subnet.curvature.prior import PriorPrecision
from pyro_subnet.exceptions import OptionError
from pyro_subnet.files.resume import FitCheckpoint
from pyro_subnet.fit.kronecker import KroneckerCurvature, kronecker_curvature
from pyro_subnet.fit.sums import SubnetCurvature, subnet_curvature
from pyro_subnet.gaussians.base import CurvatureForm, Maker, PriorScale
from pyro_subnet.gaussians.diagonal import DiagonalForm
from pyro_subnet.gaussians.dual import DualForm
from pyro_subnet.gaussians.dual_curvature import dual_pays
from pyro_subnet.gaussians.kronecker import KroneckerForm
from pyro_subnet.gaussians.primal import PrimalForm
from pyro_subnet.options import FitOptions
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.memory import check_factor_fits
from pyro_subnet.tensors.modes import at_least_float32
from pyro_subnet.tensors.triangular import add_gram_
from pyro_subnet.tracing.data import Data
from pyro_subnet.tracing.trace import Latents, Model

FitCurvature = SubnetCurvature | KroneckerCurvature
_NAMES: dict[type[CurvatureForm], str] = {
    PrimalForm: "primal",
    DualForm: "dual",
    DiagonalForm: "diagonal",
    KroneckerForm: "kronecker",
}
# Makes a form of what its `tensors` gave, and the layout of the packed vector.
FORM_MAKERS: dict[str, Maker] = {
    "primal": PrimalForm.from_tensors,
    "dual": DualForm.from_tensors,
    "diagonal": DiagonalForm.from_tensors,
    "kronecker": KroneckerForm.from_tensors,
}


def form_name(form: CurvatureForm) -> str:
    """The name of a form's kind in :data:`FORM_MAKERS`.

    Args:
        form: Any form.

    Returns:
        Its name.
    """
    return _NAMES[type(form)]


def curvature_of(
    model: Model,
    latents: Latents,
    subnet: Subnet,
    data: Data,
    options: FitOptions,
    *,
    checkpoint: FitCheckpoint | None = None,
) -> FitCurvature:
    """One pass over the data for the curvature that the options ask for.

    Args:
        model: The user's model.
        latents: Its latent sites at the MAP.
        subnet: The chosen elements; all of them for Kronecker factors.
        data: The data.
        options: What is wanted.
        checkpoint: The file that holds the sums meanwhile, if any.

    Returns:
        The curvature.

    Raises:
        OptionError: If a file is to hold Kronecker factors, which is not provided for.
    """
    if options.covariance == "kron":
        if checkpoint is not None:
            raise OptionError(
                "`checkpoint` must be left out with covariance='kron', whose sums no "
                "file holds; got one. Leave it out, or choose another covariance."
            )
        kind = options.kind_of_rows
        return kronecker_curvature(model, latents, data, kind=kind)
    return subnet_curvature(
        model, latents, subnet, data, options, checkpoint=checkpoint
    )


def form_of(curvature: FitCurvature, latents: Latents) -> CurvatureForm:
    """The form of a curvature as it was summed, at the model's own prior.

    Args:
        curvature: Of likelihood and prior; its tensors become the form's.
        latents: The latent sites.

    Returns:
        The form.

    Raises:
        PrecisionError: If the precision is not positive definite.
        NonFiniteError: If it is not finite.
    """
    if isinstance(curvature, KroneckerCurvature):
        dtype = at_least_float32(latents.loc.dtype)
        diagonal = curvature.prior.to(dtype, copy=True)  # a buffer of its own
        nothing = torch.empty(0, dtype=torch.long, device=diagonal.device)
        prior = PriorPrecision(diagonal, nothing, diagonal.new_empty(len(diagonal), 0))
        return KroneckerForm.decomposed(curvature, prior, latents.layout)
    if curvature.held == "rows":
        return DualForm.factored(curvature.ggn, curvature.prior, 1.0)
    if curvature.held == "diagonal":
        return DiagonalForm.summed(curvature.ggn, curvature.prior, 1.0)
    return PrimalForm.factored_(curvature.ggn, curvature.prior, 1.0)


def updated_form(
    form: CurvatureForm,
    more: FitCurvature,
    forgetting: float,
    prior_scale: PriorScale,
    likelihood_scale: float,
    *,
    may_change: bool,
) -> CurvatureForm:
    """A form after more data.

    Args:
        form: What is known.
        more: The new data's curvature, at the model's own noise; written over.
        forgetting: What the old data's curvature is multiplied by.
        prior_scale: Of the precision.
        likelihood_scale: What that is multiplied by first, for the noise of ``form``.
        may_change: Whether a dual form becomes primal once that costs less.

    Returns:
        A new form.

    Raises:
        PrecisionError: If the precision is not positive definite.
    """
    if isinstance(more, KroneckerCurvature):
        scaled = more.likelihood_scaled(likelihood_scale)
        return form.updated(scaled, forgetting, prior_scale)
    scale = likelihood_scale**0.5 if more.held == "rows" else likelihood_scale
    new = more.ggn if scale == 1.0 else more.ggn.mul_(scale)
    updated = form.updated(new, forgetting, prior_scale)
    if may_change and isinstance(updated, DualForm):
        rows = updated.curvature.rows
        if not dual_pays(rows.shape[0], rows.shape[1], more.prior.diagonal.dtype):
            return _primal(updated, prior_scale)
    return updated


def _primal(form: DualForm, prior_scale: PriorScale) -> PrimalForm:
    rows = form.curvature.rows.to(form.prior.diagonal)
    size = rows.shape[1]
    check_factor_fits(size, rows.dtype, rows.device)
    ggn = rows.new_zeros(size, size)
    add_gram_(ggn, rows)
    return PrimalForm.factored_(ggn, form.prior, prior_scale)
