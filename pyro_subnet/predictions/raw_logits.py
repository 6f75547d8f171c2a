"""Logits as the model gave them, where torch keeps log-probabilities alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributions as td
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_subnet.gaussians.factored import Gaussian
from pyro_subnet.predictions.linearized_outputs import LinearizedOutputs
from pyro_subnet.subnet import Subnet
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.output_site import SiteDistribution

CLASSES = (td.Categorical, td.OneHotCategorical)


def outputs_of(
    call: ModelCall, subnet: Subnet, gaussian: Gaussian
) -> LinearizedOutputs:
    """The outputs that a predictive distribution is made of.

    Args:
        call: A call of the model, with one observed site.
        subnet: The chosen elements.
        gaussian: The posterior over them.

    Returns:
        The outputs; of classes, logits as the model gave them.

    Raises:
        ModelError: If the subnet does not move the site.
    """
    outputs = LinearizedOutputs.read(call, subnet, gaussian)
    (site,) = outputs.sites
    classes = site.family.distribution in CLASSES
    return with_raw_logits(outputs) if classes else outputs


def with_raw_logits(outputs: LinearizedOutputs) -> LinearizedOutputs:
    r"""The same outputs, with raw logits f in place of log-probabilities.

    torch turns ``Categorical(logits=f)`` into :math:`\eta = f - \log\sum e^f`. The
    softmax of both is the same, also to first order; their covariances are not:
    :math:`(I - 1 p^\top) V (I - 1 p^\top)^\top` for the covariance V of f.

    Args:
        outputs: Those of one site of classes.

    Returns:
        The outputs; log-probabilities still where the model gave probabilities.
    """
    call, base = outputs.call, outputs.call.latents.values
    (site,) = outputs.sites

    def of_sites(
        values: Mapping[str, Tensor], rows: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, ...]:
        with _Normalizations() as seen:
            node = call.run({**base, **values}, rows).nodes[site.name]
        taken = SiteDistribution.of(node["fn"], node["value"])
        logits = seen.before(taken.base.logits)  # type: ignore[attr-defined]
        wide = logits.expand(*taken.element_shape, logits.shape[-1])
        return (wide.reshape(-1, wide.shape[-1]),)

    with torch.no_grad():
        reference = of_sites({}, None)
    found = replace(outputs.outputs, of_sites=of_sites, reference=reference)
    return replace(outputs, outputs=found)


class _Normalizations(TorchFunctionMode):
    """Remembers every f - logsumexp(f), and what it was made from."""

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
        elif func is Tensor.expand:
            logits = self.before(args[0])
            if logits is not args[0]:
                wide = logits.expand(result.shape)
                self._normalized.append((result, wide))
        return result

    def before(self, normalized: Tensor) -> Tensor:
        """What a tensor was before it was normalized; itself if it was not."""
        for result, logits in self._normalized:
            if result is normalized:
                return logits
        return normalized
