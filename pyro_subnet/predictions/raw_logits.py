"""Logits as the model gave them, where torch keeps log-probabilities alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, final

from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_subnet.predictions.links.likelihood import CLASSES
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.linearized_outputs import LinearizedOutputs
from pyro_subnet.tracing.site_distribution import SiteDistribution


def with_raw_logits(linearized: LinearizedOutputs) -> LinearizedOutputs:
    r"""Returns the outputs of a site of classes with raw logits f; others unchanged.

    torch turns ``Categorical(logits=f)`` into :math:`\eta = f - \log\sum e^f`. The
    softmax of both is the same, also to first order, but their covariances differ:
    :math:`(I - 1 p^\top) V (I - 1 p^\top)^\top` for the covariance V of f. A model that
    gives probabilities has no raw logits, and keeps log-probabilities.
    """
    call = linearized.subnet_call.call
    (site,) = linearized.sites
    if site.family.distribution not in CLASSES:
        return linearized
    return linearized.at_outputs(partial(_raw_logits, call, site.name))


def _raw_logits(
    call: ModelCall,
    site: str,
    values: Mapping[str, Tensor],
    rows: tuple[Tensor, ...] | None,
) -> tuple[Tensor, ...]:
    with _Normalizations() as seen:
        node = call.run({**call.latents.values, **values}, rows).nodes[site]
    taken = SiteDistribution.of(node["fn"], node["value"])
    logits = seen.before(taken.base.logits)  # type: ignore[attr-defined]
    wide = logits.expand(*taken.element_shape, logits.shape[-1])
    return (wide.reshape(-1, wide.shape[-1]),)


@final
class _Normalizations(TorchFunctionMode):
    """Remembers every f - logsumexp(f), and f."""

    def __init__(self) -> None:
        super().__init__()
        self._sums: list[tuple[Tensor, Tensor]] = []
        self._normalized: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is Tensor.logsumexp:
            self._sums.append((args[0], result))
        elif func is Tensor.sub and any(
            args[0] is logits and args[1] is total for logits, total in self._sums
        ):
            self._normalized.append((result, args[0]))
        # `Categorical.expand` expands logits that are normalized already.
        elif func is Tensor.expand:
            logits = self.before(args[0])
            if logits is not args[0]:
                wide = logits.expand(result.shape)
                self._normalized.append((result, wide))
        return result

    def before(self, normalized: Tensor) -> Tensor:
        """A tensor before it was normalized; itself if it was not."""
        for result, logits in self._normalized:
            if result is normalized:
                return logits
        return normalized
