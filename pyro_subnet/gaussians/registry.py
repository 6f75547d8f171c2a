"""The forms there are: a new one is a file beside this one, and a line in it."""

from __future__ import annotations

from torch import Tensor

from pyro_subnet.curvature.ggn import GGNSum, dual_pays
from pyro_subnet.curvature.prior import PriorPrecision
from pyro_subnet.curvature.sums import CurvatureSum, Summed
from pyro_subnet.gaussians.base import CurvatureForm, PriorFactor
from pyro_subnet.gaussians.diagonal import DiagonalForm
from pyro_subnet.gaussians.dual import DualForm
from pyro_subnet.gaussians.kronecker import KroneckerForm
from pyro_subnet.gaussians.primal import PrimalForm
from pyro_subnet.options import FormName, HeldAs
from pyro_subnet.subnet import Layout
from pyro_subnet.tensors.memory import check_factor_fits
from pyro_subnet.tensors.triangular import add_gram_

FORMS: dict[FormName, type[CurvatureForm]] = {
    form.name: form
    for form in (
        PrimalForm,
        DualForm,
        DiagonalForm,
        KroneckerForm,
    )
}


def new_sum(held_as: HeldAs, size: int, like: Tensor) -> CurvatureSum:
    """An empty sum of G for a form.

    Args:
        held_as: The form's name; ``"auto"``: primal or dual, as the rows decide.
        size: S.
        like: A tensor of the form's device and floating point type.

    Returns:
        The sum.
    """
    if held_as == "auto":
        return GGNSum(size, like, "auto")
    return FORMS[held_as].new_sum(size, like)


def form_of(summed: Summed, prior: PriorPrecision, layout: Layout) -> CurvatureForm:
    """The form of a sum, at the model's own prior.

    Args:
        summed: G; its tensors become the form's.
        prior: P0.
        layout: Where the sites lie in the packed vector.

    Returns:
        The form.

    Raises:
        NonFiniteError: If the precision is not finite.
        PrecisionError: If it is not positive definite.
    """
    return FORMS[summed.form].of(summed.ggn, prior, layout)


def as_it_pays(form: CurvatureForm, prior_factor: PriorFactor) -> CurvatureForm:
    """A dual form whose rows have come to cost more than a matrix, as a primal one.

    Args:
        form: Any form, at this prior factor.
        prior_factor: s.

    Returns:
        The form, or its primal one.

    Raises:
        MemoryLimitError: If the matrix does not fit.
    """
    if not isinstance(form, DualForm):
        return form
    rows = form.rows.to(form.prior.diagonal)
    num_rows, size = rows.shape
    if dual_pays(num_rows, size, rows.dtype):
        return form
    check_factor_fits(size, rows.dtype, rows.device)
    ggn = rows.new_zeros(size, size)
    add_gram_(ggn, rows)
    return PrimalForm.factored_(ggn, form.prior, prior_factor)
