"""Which family an observed distribution is of: its outputs η and information Λ."""

from __future__ import annotations

from torch.distributions import Distribution, TransformedDistribution

from pyro_subnet.curvature.families.closed_forms import CLOSED_FORMS
from pyro_subnet.curvature.families.family import Coordinates, Family
from pyro_subnet.curvature.families.information import Unknown
from pyro_subnet.curvature.monte_carlo import sampled_family
from pyro_subnet.exceptions import UnsupportedLikelihoodError

__all__ = ["Family", "find_family", "readable_or_not"]

# Packages whose classes keep the density of the torch class they extend: Pyro rewrites
# some `log_prob` for speed.
_TRUSTED = ("torch.distributions.", "pyro.distributions.")


def find_family(d: Distribution) -> Family:
    """Returns the family of a distribution without wrappers, reading no values.

    So it may be called under ``torch.func`` transforms. Without a closed form, its
    information is summed over the support or a Monte Carlo estimate (not ``exact``).

    Raises:
        UnsupportedLikelihoodError: If the distribution cannot be taken apart.

    Example:
        >>> import torch
        >>> d = torch.distributions.Poisson(torch.tensor([1.0, 4.0]))
        >>> family = find_family(d)
        >>> family.outputs(d)["log_rate"].shape
        torch.Size([2, 1])
        >>> family.fisher(d, ["log_rate"]).flatten()
        tensor([1., 4.])
    """
    for known, family in CLOSED_FORMS.items():
        if isinstance(d, known) and _keeps_density(type(d), known):
            return family
    return sampled_family(d)


def readable_or_not(d: Distribution) -> Family:
    """The same, or a family that says why it cannot be taken apart."""
    # It has a log density, which is all that some curvatures ask for.
    try:
        return find_family(d)
    except UnsupportedLikelihoodError as error:
        return Family(Coordinates(type(d), ()), Unknown(error))


def _keeps_density(kind: type[Distribution], known: type[Distribution]) -> bool:
    """Whether a subclass has the density of the class that it extends."""
    if _is_trusted(kind) or kind is known:
        return True
    # A user's subclass of a transformed distribution may add transforms instead.
    if issubclass(known, TransformedDistribution):
        return False
    # The first class in the order of resolution that defines `log_prob` decides.
    owner = next(parent for parent in kind.__mro__ if "log_prob" in vars(parent))
    return owner in known.__mro__ or _is_trusted(owner)


def _is_trusted(kind: type) -> bool:
    return f"{kind.__module__}.".startswith(_TRUSTED)
