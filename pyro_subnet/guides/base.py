"""What both guides share: the user's model, its sites at the MAP, and copies.

``AutoGuide.__getstate__`` sets the model of the guide that is being pickled to None;
these guides keep theirs.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor

from pyro_subnet.exceptions import ModelError
from pyro_subnet.options import check_shares
from pyro_subnet.subnet import Layout
from pyro_subnet.tracing.trace import Latents, Model, ModelAtMAP, types_of_sites

Guide = TypeVar("Guide", bound="AutoAtMAP")
# The model may hold anything, and a guide list is held by weak reference.
_LEFT_BEHIND = ("_model", "_user_model", "master")


class AutoAtMAP(AutoContinuous):
    """A guide that knows the user's model, and where its latent sites sit.

    Attributes:
        loc: The MAP, packed, shape (D,), unconstrained.
    """

    loc: Tensor
    _user_model: tuple[Model] | None

    @property
    @abstractmethod
    def _way_back(self) -> str:
        """How an unpickled guide of this kind gets its model back, one sentence."""

    @property
    def user_model(self) -> Model:
        """The model, as the user wrote it.

        Raises:
            ModelError: If the guide was unpickled, which leaves the model behind.
        """
        if self._user_model is None:
            raise ModelError(
                f"`{type(self).__name__}` must know its model for this; got one that "
                f"was unpickled, and a pickle leaves the model behind. {self._way_back}"
            )
        return self._user_model[0]

    @property
    def latents(self) -> Latents:
        """The latent sites at the present ``loc``."""
        return Latents.from_guide(self, self.loc)

    @property
    def at_map(self) -> ModelAtMAP:
        """The user's model at the present ``loc``."""
        return ModelAtMAP(self.user_model, self.latents)

    @property
    def layout(self) -> Layout:
        """Where the latent sites lie in the packed vector."""
        shapes = self._unconstrained_shapes
        return Layout(tuple(shapes), tuple(shapes.values()))

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """Prototype nodes and unconstrained values of sites, each of its own type."""
        own = types_of_sites(self, latent.dtype)
        for site, value in self._unpack_elements(latent):
            yield site, value.to(own[site["name"]])

    def _unpack_elements(self, latent: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """The same in the type of the packed vector."""
        # As `AutoContinuous` does, whose `torch.broadcast_shapes` imports a computer
        # algebra system when it is first called: half a second of a first fit.
        first, batch = 0, latent.shape[:-1]
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            shape = self._unconstrained_shapes[name]
            event_dim = site["fn"].event_dim + len(shape) - site["value"].ndim
            wide = np.broadcast_shapes(shape, batch + (1,) * event_dim)
            last = first + math.prod(shape)
            yield site, latent[..., first:last].view(wide)
            first = last

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The MAP of every latent site, constrained, in tensors of their own.

        Args:
            args: Any; not read.
            kwargs: Any; not read.

        Returns:
            ``{site: value of the site's shape}``.
        """
        return {
            name: value.detach().clone()
            for name, value in super().median(*args, **kwargs).items()
        }

    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Quantiles of every latent site, constrained.

        Args:
            quantiles: Numbers in [0, 1].
            args: Any; not read.
            kwargs: Any; not read.

        Returns:
            ``{site: shape (number of quantiles, *site shape)}``.

        Raises:
            OptionError: If a quantile is no number in [0, 1].
        """
        check_shares(quantiles, "quantiles")
        found: dict[str, Tensor] = super().quantiles(quantiles, *args, **kwargs)
        return found

    def _sharing(self: Guide) -> Guide:
        """A copy that shares tensors, model, and what is known of it."""
        shared = (*self.buffers(), *self.parameters(), self.prototype_trace)
        return self._copied({id(part): part for part in shared})

    def _copied(self: Guide, memo: dict[int, Any]) -> Guide:
        """A deep copy that shares the model, and is a member of no guide list."""
        new: Guide = object.__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        for name in ("_model", "_user_model"):
            new.__dict__[name] = self.__dict__[name]
        return new

    def __getstate__(self) -> dict[str, Any]:
        """State for pickling: without the model, and without touching this guide."""
        # As every PyroModule does: the param store puts weak references there, which
        # no pickle takes, and puts them there again when it is asked next.
        for parameter in self.parameters():
            parameter.__dict__.pop("unconstrained", None)
        left = {name: None for name in _LEFT_BEHIND if name in self.__dict__}
        return {**self.__dict__, **left}

    def __deepcopy__(self: Guide, memo: dict[int, Any]) -> Guide:
        """A copy that shares the model."""
        return self._copied(memo)
