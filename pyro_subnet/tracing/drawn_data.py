"""Outputs that move with data which nobody gave."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_subnet.exceptions import ModelError
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.output_site import OutputSite
from pyro_subnet.tracing.site_distribution import SiteDistribution
from pyro_subnet.tracing.trace import (
    Node,
    is_output,
    other_random_numbers,
    run_model,
)

# Draws of few values, such as one label, may be the same in two runs.
_MOST_RUNS = 8


def check_data_are_given(call: ModelCall) -> None:
    """Refuses outputs that depend on another observed site's data, where it has none.

    Pyro draws what is not given. An output that is a function of one such draw has no
    closed form: its mean and variance would be those given the draw, which differ from
    call to call.

    Args:
        call: The call; its outputs must be known to be the same in every run.

    Raises:
        ModelError: If one depends on a draw.
    """
    nodes = call.trace.nodes
    drawn, before = list[str](), dict[str, list[str]]()
    for name, node in nodes.items():
        if is_output(name, node, call.latents):
            before[name] = list(drawn)  # a site depends on those before it alone
            if not node["is_observed"]:
                drawn.append(name)
    later = [site for site in call.sites if before[site.name]]
    if not later:
        return
    fixed = {name: value for name, value in call.fixed.items() if name not in drawn}
    values = call.latents.constrain(call.latents.values)
    for turn in range(_MOST_RUNS):
        with torch.no_grad(), other_random_numbers(turn):
            again = run_model(
                call.at_map.program, call.args, call.kwargs, values, fixed
            ).nodes
        for site in later:
            if _differs(site, again.get(site.name)):
                raise ModelError(
                    "Outputs in closed form must not depend on data that are not "
                    f"given; got site {site.name!r}, which differs with the draws of "
                    f"{before[site.name]}. Pass those data, or draw all: "
                    "`Predictive(posterior.linearized_model, guide=posterior, "
                    "num_samples=1000)`."
                )
        if all(_has_other_value(nodes[name], again.get(name)) for name in drawn):
            return


def _differs(site: OutputSite, again: Node | None) -> bool:
    """Whether a site has another distribution in another run, or is not there."""
    if again is None:
        return True
    own = _numbers(site, site.node)
    try:
        found = _numbers(site, {**again, "value": site.node["value"]})
    except ValueError:  # the value has no density there, as more hits than trials
        return True
    return any(
        tensor.shape != found[part].shape
        or not torch.allclose(
            tensor,
            found[part],
            rtol=torch.finfo(tensor.dtype).eps ** 0.5,
            atol=torch.finfo(tensor.dtype).eps ** 0.5,
            equal_nan=True,
        )
        for part, tensor in own.items()
    )


def _numbers(site: OutputSite, node: Node) -> dict[str, Tensor]:
    """A site's parameters, and for what is none of them, as trials, its density."""
    taken = SiteDistribution.of(node["fn"], node["value"])
    return {**site.own(node), "density": taken.base.log_prob(site.value)}


def _has_other_value(node: Node, again: Node | None) -> bool:
    return again is None or not torch.equal(node["value"], again["value"])
