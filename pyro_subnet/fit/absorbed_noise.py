"""Whether a network has absorbed the noise of its data, which leaves it too small."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, final

import torch
import torch.distributions as td
from torch import Tensor

from pyro_subnet.exceptions import AbsorbedNoiseWarning, OptionError, warn
from pyro_subnet.fit.sums import SubnetCurvature, subnet_curvature
from pyro_subnet.gaussians.registry import form_of
from pyro_subnet.options import FitOptions
from pyro_subnet.subnet import Subnet
from pyro_subnet.tracing.call import Graph, ModelCall
from pyro_subnet.tracing.data import Data
from pyro_subnet.tracing.trace import ModelAtMAP

_LOC, _SCALE = "loc", "log_scale"
_NORMALS = (td.Normal, td.LogNormal)
# How many times too small the noise may be by this measure. In benchmarks/selectors it
# is 2.2 to 12 where held-out data find 1.5 to 14 times the learned noise, 1.0 to 1.1 in
# two toys where they find no more, and 1.9 to 2.1 on yacht, where they find less.
_MOST = 2.0
# Operations of the kernel, R^2 D of R rows, that a fit may add to its own.
_OPERATIONS = 2e9


@final
@dataclass(frozen=True)
class AbsorbedNoise:
    r"""How many weights the data determine, and what that makes of the noise.

    Attributes:
        num_data: N, the observed elements.
        effective_parameters: :math:`\gamma = \operatorname{tr} K (K + I)^{-1}` with
            :math:`K = J P_0^{-1} J^\top / \sigma^2` over all weights of the network.

    Source: MacKay (1992), "Bayesian interpolation", doi 10.1162/neco.1992.4.3.415.
    """

    num_data: int
    effective_parameters: float

    @property
    def factor(self) -> float:
        r""":math:`\sqrt{N / (N - \gamma)}`: what a residual's scale is too small by."""
        rest = self.num_data - self.effective_parameters
        return math.sqrt(self.num_data / rest) if rest > 0 else math.inf


def measure(at_map: ModelAtMAP, network: Subnet, data: Data) -> AbsorbedNoise:
    """Measures it by another pass: R D numbers, and R^2 D operations.

    R rows are N data times their outputs.

    Args:
        at_map: The model at its MAP.
        network: The weights that move the outputs' locations.
        data: All training data.

    Returns:
        The number of data and of effective parameters.

    Raises:
        OptionError: If the prior couples weights, or does not curve.
    """
    found = subnet_curvature(at_map, network, data, FitOptions(form="dual"))
    form = form_of(found.likelihood, found.prior, network.layout)
    # In its dual form the Gaussian holds K + I = C C^T, and gamma = R - |C^-1|^2.
    gaussian: Any = form.gaussian(at_map.latents.loc[network.flat])
    kernel: Tensor = gaussian.kernel_tril
    eye = torch.eye(len(kernel)).to(kernel)
    inverse = torch.linalg.solve_triangular(kernel.tril(), eye, upper=False)
    return AbsorbedNoise(len(kernel), len(kernel) - float(inverse.square().sum()))


def warn_of_absorbed_noise(
    at_map: ModelAtMAP, data: Data, curvature: SubnetCurvature
) -> None:
    """Says where a noise that was learned with the weights is likely too small."""
    num_seen, size = curvature.num_seen, len(at_map.latents.loc)
    if not curvature.has_outputs or not num_seen or not data.repeatable:
        return
    if not _may_be_told(num_seen, size):
        return
    args, kwargs = next(replace(data, progress=False).calls("Noise"))
    call = ModelCall.read(at_map, args, kwargs)
    if not _is_normal(call):
        return
    graph = call.graph(with_prior=False)
    network = network_of(call, graph) if _is_noise_learned(call, graph) else None
    if network is None:
        return
    (site,) = call.sites
    num_outputs = math.ceil(site.own(site.node)[_LOC].numel() / max(call.num_seen, 1))
    if not _may_be_told(num_seen * num_outputs, network.size):
        return
    try:
        found = measure(at_map, network, data)
    except OptionError:  # of a prior for which there is no kernel
        return
    if found.factor > _MOST:
        warn(
            "The noise was learned with the weights, and is likely far too small: the "
            f"network has {found.effective_parameters:.0f} effective parameters for "
            f"{found.num_data} data, which makes residuals {found.factor:.2g} times "
            "smaller than the noise. Set it on held-out data, by "
            "`posterior.tune(val=(x_val, y_val))`, or train under a noise so set.",
            AbsorbedNoiseWarning,
        )


def _may_be_told(num_rows: int, size: int) -> bool:
    """Whether so many weights may absorb the noise, at a price that a fit may pay."""
    # The factor is at most sqrt(R / (R - D)).
    may_be = size > (1 - _MOST**-2) * num_rows
    return may_be and num_rows**2 * size <= _OPERATIONS


def _is_noise_learned(call: ModelCall, graph: Graph) -> bool:
    """Whether the scale of the only site is one number, and was learned."""
    site = call.sites[0]
    scale = site.own(site.node)[_SCALE]
    # Of a latent site or a parameter the graph knows.
    learned = site.own(graph.trace.nodes[site.name])[_SCALE].requires_grad
    return learned and bool(scale.min() == scale.max())


def _is_normal(call: ModelCall) -> bool:
    """Whether there is one site, and it is normal."""
    return [site.family.distribution in _NORMALS for site in call.sites] == [True]


def network_of(call: ModelCall, graph: Graph) -> Subnet | None:
    """The latent sites that move the location of the only site; None without one."""
    if not _is_normal(call):
        return None
    layout = call.latents.layout
    chosen = {}
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        whole = torch.ones(shape, dtype=torch.bool)
        (moved,) = call.moved_parts(
            graph, Subnet.from_sites(layout, {name: whole})
        ).values()
        if _LOC in moved:
            chosen[name] = whole
    return Subnet.from_sites(layout, chosen) if chosen else None
