"""Training data as a sequence of calls of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor
from tqdm import tqdm

from pyro_subnet.exceptions import DataError

# Positional and keyword arguments of one call of the model.
Batch = tuple[tuple[Any, ...], Mapping[str, Any]]


@final
@dataclass(frozen=True, eq=False)
class Data:
    """The calls that together show the model all its data.

    Attributes:
        batches: One item for each call: ``(args, kwargs)``, a tuple or list of
            positional arguments, a mapping of keyword arguments, or one tensor.
        whole: Whether all data come in one call, whose plates state their own scale, as
            in ``laplace_approximation``. Minibatches are summed without that scale.
        num_data: Number of data points in all, if the batches hold only a part of them.
        progress: Whether to show a progress bar.
    """

    batches: Iterable[Any]
    whole: bool
    num_data: int | None = None
    progress: bool = False

    @classmethod
    def single(
        cls, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, whole: bool = True
    ) -> Data:
        """Data in one call.

        Args:
            args: Positional arguments of the model.
            kwargs: Its keyword arguments.
            whole: Whether they are all data there are, and not more of them.

        Returns:
            The data.
        """
        return cls([(args, dict(kwargs))], whole)

    @property
    def repeatable(self) -> bool:
        """Whether the batches can be passed over more than once."""
        return iter(self.batches) is not self.batches

    def require_repeatable(self, reader: str) -> None:
        """Refuses batches that one pass would use up.

        Args:
            reader: Who needs another pass.

        Raises:
            DataError: If the batches are a one-shot iterator.
        """
        if not self.repeatable:
            raise DataError(
                f"`batches` must be re-iterable because {reader} passes over the data "
                f"before the fit does; got a one-shot {type(self.batches).__name__}. "
                "Pass a list or a DataLoader."
            )

    def calls(self, description: str) -> Iterator[Batch]:
        """Passes over the batches.

        Args:
            description: What the pass is for, shown on the progress bar.

        Yields:
            Positional and keyword arguments of each call.

        Raises:
            DataError: If there is no batch, or one is no set of arguments.
        """
        empty = True
        for item in tqdm(self.batches, desc=description, disable=not self.progress):
            empty = False
            yield arguments(item)
        if empty:
            raise DataError(
                "`batches` must hold at least one batch; got none. Check the loader, "
                "and that an iterator was not used up before."
            )


def arguments(item: Any) -> Batch:
    """Positional and keyword arguments from one item of :attr:`Data.batches`."""
    if isinstance(item, Tensor):
        return (item,), {}
    if isinstance(item, Mapping):
        return (), dict(item)
    if isinstance(item, tuple | list):
        if (
            len(item) == 2  # noqa: PLR2004 - (args, kwargs)
            and isinstance(item[0], tuple | list)
            and isinstance(item[1], Mapping)
        ):
            return tuple(item[0]), dict(item[1])
        return tuple(item), {}
    raise DataError(
        "A batch must be `(args, kwargs)`, a tuple of positional arguments, a mapping "
        f"of keyword arguments, or one tensor; got {type(item).__name__}. Wrap it in a "
        "tuple."
    )
