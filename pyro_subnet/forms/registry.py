"""Which form a curvature is held in, and how forms are named in files."""

from __future__ import annotations

from torch import Tensor

from pyro_subnet.forms.base import CurvatureForm, Maker, PriorScale
from pyro_subnet.forms.dual import DualForm
from pyro_subnet.forms.primal import PrimalForm
from pyro_subnet.laplace import SubnetCurvature

# Makes a form of what its `tensors` gave.
FORM_MAKERS: dict[str, Maker] = {
    "primal": PrimalForm.from_tensors,
    "dual": DualForm.from_tensors,
}


def form_name(form: CurvatureForm) -> str:
    """The name of a form's kind in :data:`FORM_MAKERS`.

    Args:
        form: Any form.

    Returns:
        Its name.
    """
    return {PrimalForm: "primal", DualForm: "dual"}[type(form)]


def form_of(curvature: SubnetCurvature) -> CurvatureForm:
    """The form of a curvature as it was summed, at the model's own prior.

    Args:
        curvature: Of likelihood and prior; its tensors become the form's.

    Returns:
        The form.

    Raises:
        PrecisionError: If the precision is not positive definite.
        NonFiniteError: If it is not finite.
    """
    if curvature.held == "rows":
        return DualForm.factored(curvature.ggn, curvature.prior, 1.0)
    return PrimalForm.factored_(curvature.ggn, curvature.prior, 1.0)


def updated_form(
    form: CurvatureForm,
    more: SubnetCurvature,
    forgetting: float,
    prior_scale: PriorScale,
    noise_scale: float,
) -> CurvatureForm:
    """A form after more data.

    Args:
        form: What is known.
        more: The new data's curvature, at the model's own noise; written over.
        forgetting: What the old data's curvature is multiplied by.
        prior_scale: Of the precision.
        noise_scale: What the model's noise is multiplied by in ``form``.

    Returns:
        A new form.

    Raises:
        PrecisionError: If the precision is not positive definite.
    """
    scale = noise_scale**-1 if more.held == "rows" else noise_scale**-2
    new: Tensor = more.ggn if scale == 1.0 else more.ggn.mul_(scale)
    return form.updated(new, forgetting, prior_scale)
