"""What entries of the Jacobian are counted to make."""

from __future__ import annotations

import torch

from pyro_subnet.curvature.jacobian.structured.entries import Channelwise


def test_a_bias_of_channels_counts_what_it_picks() -> None:
    """It has no factor, and picks its channels' positions from the gradient."""
    channels, delta = torch.tensor([0, 3]), torch.randn(2, 4, 5).double()
    bias = Channelwise(2, 1, channels, 5, None)
    assert bias.held_bytes == 0
    assert bias.nbytes >= delta[:, channels].nbytes
    scale = Channelwise(2, 1, channels, 5, delta[:, channels])
    assert scale.nbytes == 2 * scale.held_bytes == 2 * delta[:, channels].nbytes
