"""Whether a model passes probabilities where its likelihood takes logits."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributions as td

from pyro_subnet.tracing.output_site import OutputSite
from pyro_subnet.tracing.site_distribution import SiteDistribution
from pyro_subnet.tracing.trace import Node

_SQUASH = {"Sigmoid": "sigmoid", "Softmax": "softmax"}
# Operations that leave probabilities what they are.
_SAME_VALUES = frozenset(
    "Squeeze Unsqueeze View UnsafeView Expand Select Slice Index Transpose Permute T "
    "ToCopy Clone Clamp Alias".split()
)
_OF_LOGITS = (td.Bernoulli, td.Categorical, td.OneHotCategorical)


def squashed_logits(
    sites: Iterable[OutputSite], nodes: dict[str, Node]
) -> dict[str, str]:
    """Sites whose logits a sigmoid or a softmax has made, as a graph shows it.

    Args:
        sites: The observed sites.
        nodes: Their nodes in a run with a graph.

    Returns:
        ``{site: "sigmoid" or "softmax"}``.
    """
    found = {}
    for site in sites:
        node = nodes[site.name]
        base = SiteDistribution.of(node["fn"], node["value"]).base
        if not isinstance(base, _OF_LOGITS) or site.family.unreadable is not None:
            continue
        step = base.logits.grad_fn
        is_normalized = not isinstance(base, td.Bernoulli)
        while step is not None:
            name = step.name().rstrip("0123456789").removesuffix("Backward")
            if name in _SQUASH:
                found[site.name] = _SQUASH[name]
            # torch takes logsumexp(f) off the logits f of classes.
            if not (name in _SAME_VALUES or (name == "Sub" and is_normalized)):
                break
            is_normalized = is_normalized and name != "Sub"
            step = step.next_functions[0][0]
    return found
