"""Subnetwork Laplace inference for Pyro models.

Train to the MAP, give a well-chosen few percent of the weights a Gaussian of full
covariance, and predict with the network linearized there (Daxberger et al., 2021,
arXiv 2010.14689).
"""

from __future__ import annotations

import dis
from importlib import import_module
from types import FrameType
from typing import TYPE_CHECKING, Any

from pyro_subnet import diagnostics, exceptions, nn, plotting, selection
from pyro_subnet._version import __version__
from pyro_subnet.comparison.compare import compare_subnets
from pyro_subnet.curvature.jacobian.route import compare_routes
from pyro_subnet.exceptions import users_frame
from pyro_subnet.guides.map import AutoSubnetLaplace
from pyro_subnet.guides.posterior import AutoSubnetMultivariateNormal
from pyro_subnet.subnet import Subnet

if TYPE_CHECKING:
    from pyro_subnet.export.inference_data import from_hybrid_mcmc as from_hybrid_mcmc
    from pyro_subnet.export.inference_data import to_inference_data as to_inference_data

__all__ = [
    "AutoSubnetLaplace",
    "AutoSubnetMultivariateNormal",
    "Subnet",
    "__version__",
    "compare_routes",
    "compare_subnets",
    "diagnostics",
    "exceptions",
    "nn",
    "plotting",
    "selection",
]

# Where else public names live.
_HOMES = (nn, selection, diagnostics, exceptions, plotting)
_IMPORT_FROM = dis.opmap["IMPORT_FROM"]
# Names that need ArviZ. Not in `__all__`: a star import must do without it.
_NEEDS_ARVIZ = ("from_hybrid_mcmc", "to_inference_data")


def __getattr__(name: str) -> Any:
    """Imports what needs ArviZ when it is first asked for; says where others live."""
    if name not in _NEEDS_ARVIZ:
        raise _missing(name, users_frame())
    try:
        module = import_module("pyro_subnet.export.inference_data")
    except ModuleNotFoundError as error:
        if error.name not in {"arviz", "xarray"}:
            raise
        raise ImportError(
            f"`{name}` needs ArviZ, which is not installed. Run `pip install arviz`."
        ) from error
    return getattr(module, name)


def _missing(name: str, caller: FrameType) -> Exception:
    """The error of a name that is not here, which says where it is."""
    home = next((m for m in _HOMES if name in getattr(m, "__all__", dir(m))), None)
    message = f"module {__name__!r} has no attribute {name!r}"
    if home is None or name.startswith("_"):
        return AttributeError(message)
    message += f"; it is in `{home.__name__}`. Import it from there."
    # `from package import name` drops what an AttributeError says.
    imports = caller.f_code.co_code[caller.f_lasti] == _IMPORT_FROM
    return ImportError(message) if imports else AttributeError(message)


def __dir__() -> list[str]:
    return sorted([*globals(), *_NEEDS_ARVIZ])
