"""Training data as a sequence of calls of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm import tqdm

from pyro_subnet.exceptions import DataError
from pyro_subnet.tensors.ranks import Ranks
from pyro_subnet.tracing.arguments import is_array

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
        added: Whether they come on top of others, which a plate's size counts too.
        ranks: The processes that each pass over a part of the data; None for this one
            alone.
    """

    batches: Iterable[Any]
    whole: bool
    num_data: int | None = None
    progress: bool = False
    added: bool = False
    ranks: Ranks | None = None

    def __post_init__(self) -> None:
        _check_batches(self.batches)

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
        return cls([(args, dict(kwargs))], whole, added=not whole)

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

    def together(self) -> AbstractContextManager[None]:
        """Ends all ranks if one fails inside; nothing where there is one process.

        Returns:
            A context, in which no rank may wait for another.
        """
        return nullcontext() if self.ranks is None else self.ranks.together()

    def sum_(self, *tensors: Tensor) -> None:
        """Sums tensors over ranks in place; as they are where there is one process.

        Args:
            tensors: Of the same shapes on all ranks.
        """
        if self.ranks is not None:
            self.ranks.sum_(*tensors)

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
        if empty and self.ranks is None:  # another rank may have all
            raise DataError(
                "`batches` must hold at least one batch; got none. Check the loader, "
                "and that an iterator was not used up before."
            )


def is_loader(value: Any) -> bool:
    """Whether a value can only be batches: a loader, or a list of sets of arguments."""
    if isinstance(value, list):
        return bool(value) and all(map(_is_set, value)) and not _is_call(value)
    return isinstance(value, DataLoader) or isinstance(value, Iterator)


def _is_set(item: Any) -> bool:
    """Whether an item of a list is a set of arguments, as loaders give them."""
    if isinstance(item, list):
        return bool(item) and all(isinstance(part, Tensor) for part in item)
    return isinstance(item, tuple | Mapping)


def held_out_data(val: Any) -> Data:
    """Held-out data, in one set of arguments or in the batches of a loader.

    Args:
        val: What the user passes as ``val``.

    Returns:
        The data.

    Raises:
        DataError: If there is none.
    """
    if isinstance(val, tuple | list | Mapping) and not len(val):
        raise DataError(
            f"`val` must hold observations; got an empty {type(val).__name__}. Pass "
            "what training takes, such as `val=(x, y)`."
        )
    return Data(val if is_loader(val) else [val], whole=False)


def _is_call(item: tuple[Any, ...] | list[Any]) -> bool:
    """Whether an item is ``(args, kwargs)``."""
    pair = len(item) == 2  # noqa: PLR2004
    return pair and isinstance(item[0], tuple | list) and isinstance(item[1], Mapping)


def _check_batches(batches: Any) -> None:
    """Refuses what iterates over something other than sets of arguments."""
    kind, found = type(batches).__name__, ""
    if isinstance(batches, Tensor) or is_array(batches):
        found = f"a {kind} of shape {tuple(batches.shape)}, whose items are single rows"
    elif isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
        found = f"a {kind}, whose items are single data"
    elif isinstance(batches, str | Mapping) or not isinstance(batches, Iterable):
        found = f"a {kind}"
    elif isinstance(batches, tuple) and all(isinstance(x, Tensor) for x in batches):
        kinds = {(tensor.shape[1:], tensor.dtype) for tensor in batches}
        found = "a tuple of tensors, which is one batch" if len(kinds) > 1 else ""
    if found:
        raise DataError(
            f"`batches` must be an iterable of batches, each a set of arguments; got "
            f"{found}. Pass a DataLoader, or `[(x, y)]` for one batch; "
            "`laplace_approximation(x, y)` takes all data at once."
        )


def arguments(item: Any) -> Batch:
    """Positional and keyword arguments from one item of :attr:`Data.batches`."""
    if isinstance(item, Tensor) or is_array(item):
        return (item,), {}
    if isinstance(item, Mapping):
        return (), dict(item)
    if isinstance(item, tuple | list):
        if _is_call(item):
            return tuple(item[0]), dict(item[1])
        return tuple(item), {}
    raise DataError(
        "A batch must be `(args, kwargs)`, a tuple of positional arguments, a mapping "
        f"of keyword arguments, or one tensor; got {type(item).__name__}. Wrap it in a "
        "tuple."
    )
