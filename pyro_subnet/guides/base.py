"""The Pyro side of the posterior: from values of the subnet to those of all sites."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, TypeVar

from pyro.infer.autoguide import AutoContinuous
from torch import Tensor

from pyro_subnet.exceptions import ModelError
from pyro_subnet.gaussians.factored import Gaussian
from pyro_subnet.guides.copies import copied, portable_state, sharing
from pyro_subnet.models.subnet_normal import SubnetNormal
from pyro_subnet.subnet import Layout, Subnet, place_elements
from pyro_subnet.tracing.trace import Latents, Model

# What the guide's own set-up found out about the model's sites.
_PROTOTYPE = (
    "prototype_trace",
    "_prototype_frames",
    "_unconstrained_shapes",
    "_cond_indep_stacks",
    "latent_dim",
)
Posterior = TypeVar("Posterior", bound="SubnetGuide")


class SubnetGuide(AutoContinuous):
    """A guide whose auxiliary site is the subnet: other elements sit at the MAP.

    Subclasses say what the Gaussian is.

    Attributes:
        loc: The MAP, packed, shape (D,), unconstrained.
        subnet_positions: The chosen elements' positions in it, shape (S,).
        explained_variance: As in :class:`~pyro_subnet.subnet.Subnet`.
    """

    loc: Tensor
    subnet_positions: Tensor
    explained_variance: float | None

    def __init__(self, model: Model, prototype: AutoContinuous):
        super().__init__(model)
        self._user_model = (model,)
        for name in _PROTOTYPE:
            setattr(self, name, getattr(prototype, name))

    @property
    @abstractmethod
    def gaussian(self) -> Gaussian:
        """The Gaussian over the subnet, without Pyro's interface."""

    @property
    def user_model(self) -> Model:
        """The model, as the user wrote it.

        Raises:
            ModelError: If the guide was unpickled, which leaves the model behind.
        """
        if self._user_model is None:
            raise ModelError(
                "A posterior must know its model for this; got one that was unpickled, "
                "and a pickle leaves the model behind. Give it back with "
                "`posterior.with_model(model)`."
            )
        return self._user_model[0]

    def with_model(self: Posterior, model: Model) -> Posterior:
        """The same posterior with a model, which a pickle leaves behind.

        Args:
            model: The model that the posterior was fitted to.

        Returns:
            A new guide that shares this one's tensors.
        """
        new = sharing(self)
        new.__dict__.update(_model=(model,), _user_model=(model,))
        return new

    @property
    def latents(self) -> Latents:
        """The latent sites at the MAP."""
        return Latents.from_guide(self, self.loc)

    @property
    def layout(self) -> Layout:
        """Where the latent sites lie in the packed vector."""
        shapes = self._unconstrained_shapes
        return Layout(tuple(shapes), tuple(shapes.values()))

    @property
    def subnet(self) -> Subnet:
        """The chosen elements."""
        return Subnet(self.layout, self.subnet_positions, self.explained_variance)

    def get_posterior(self, *args: Any, **kwargs: Any) -> SubnetNormal:
        """The posterior over the subnet, unconstrained.

        Args:
            args: Not used; as in every Pyro guide.
            kwargs: Not used.

        Returns:
            A normal distribution over (S,).
        """
        return SubnetNormal(self.gaussian)

    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        gaussian = self.gaussian
        return gaussian.loc, gaussian.variance().sqrt()

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The MAP of every latent site, constrained, in tensors of their own.

        Args:
            args: Not used; as in every Pyro guide.
            kwargs: Not used.

        Returns:
            ``{site: value of the site's shape}``.
        """
        return {name: v.clone() for name, v in super().median(*args, **kwargs).items()}

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """Sites with their unconstrained values, from values of the subnet.

        A site without chosen elements keeps its own shape: plates broadcast it without
        copying it for every draw.

        Yields:
            Prototype nodes and unconstrained values.
        """
        chosen = self.subnet.indices
        counts = [within.numel() for within in chosen.values()]
        pieces = dict(zip(chosen, latent.split(counts, dim=-1), strict=True))
        base = self.latents.values
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            value = base[name]
            if name in chosen:
                event_dim = site["fn"].event_dim + value.ndim - site["value"].ndim
                piece = pieces[name]
                value = place_elements(value, chosen[name], piece, event_dim)
            yield site, value

    def __getstate__(self) -> dict[str, Any]:
        """State for pickling: without the model, and without touching this guide."""
        return portable_state(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> SubnetGuide:
        """A copy that shares the model."""
        return copied(self, memo)
