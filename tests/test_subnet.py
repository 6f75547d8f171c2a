"""The subnet: positions, masks, names and counts, each by hand or by a loop."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from pyro_subnet import Subnet
from pyro_subnet.exceptions import SelectionError
from pyro_subnet.subnet import Layout

EQUAL = {"rtol": 0, "atol": 0}
# A matrix, a scalar, a vector, a tensor of three dimensions: D = 6 + 1 + 4 + 12 = 23.
LAYOUT = Layout(
    ("fc1.weight", "noise", "bias", "conv"),
    (torch.Size([2, 3]), torch.Size([]), torch.Size([4]), torch.Size([2, 3, 2])),
)
# In no order; the third site holds none.
POSITIONS = [22, 0, 6, 5, 11, 13]


@pytest.fixture
def subnet() -> Subnet:
    return Subnet.from_positions(LAYOUT, torch.tensor(POSITIONS))


def slow_names() -> list[str]:
    """Every element's name, by walking the sites' indices in row-major order."""
    names = []
    for site, shape in zip(LAYOUT.names, LAYOUT.shapes, strict=True):
        for index in itertools.product(*map(range, shape)):
            inside = ", ".join(map(str, index))
            names.append(f"{site}[{inside}]" if shape else site)
    return names


def test_layout() -> None:
    assert LAYOUT.sizes == (6, 1, 4, 12)
    assert LAYOUT.num_params == 23
    assert LAYOUT.offsets == {"fc1.weight": 0, "noise": 6, "bias": 7, "conv": 11}
    assert LAYOUT.shape("conv") == (2, 3, 2)


def test_layout_unpacks_in_order() -> None:
    packed = torch.arange(2 * 23.0).reshape(2, 23)
    values = LAYOUT.unpack(packed)
    assert list(values) == list(LAYOUT.names)
    assert {site: tuple(v.shape) for site, v in values.items()} == {
        "fc1.weight": (2, 2, 3),
        "noise": (2,),
        "bias": (2, 4),
        "conv": (2, 2, 3, 2),
    }
    joined = torch.cat([value.reshape(2, -1) for value in values.values()], -1)
    assert_close(joined, packed, **EQUAL)


def test_numbers(subnet: Subnet) -> None:
    assert subnet.size == 6
    assert subnet.num_params == 23
    assert subnet.fraction == 6 / 23
    assert subnet.explained_variance is None
    assert subnet.counts == {"fc1.weight": 2, "noise": 1, "bias": 0, "conv": 3}
    assert list(subnet.counts) == list(LAYOUT.names)


def test_flat_is_ascending_int64(subnet: Subnet) -> None:
    assert_close(subnet.flat, torch.tensor(sorted(POSITIONS)), **EQUAL)
    assert subnet.flat.dtype == torch.int64


def test_indices_are_within_sites_and_leave_empty_sites_out(subnet: Subnet) -> None:
    expected = {"fc1.weight": [0, 5], "noise": [0], "conv": [0, 2, 11]}
    assert {site: at.tolist() for site, at in subnet.indices.items()} == expected
    assert list(subnet.indices) == list(expected)
    assert {at.dtype for at in subnet.indices.values()} == {torch.int64}


def test_names(subnet: Subnet) -> None:
    assert subnet.names == [
        "fc1.weight[0, 0]",
        "fc1.weight[1, 2]",
        "noise",
        "conv[0, 0, 0]",
        "conv[0, 1, 0]",
        "conv[1, 2, 1]",
    ]
    everything = Subnet.from_positions(LAYOUT, torch.arange(23))
    assert everything.names == slow_names()


def test_masks(subnet: Subnet) -> None:
    joined = []
    for site, shape in zip(LAYOUT.names, LAYOUT.shapes, strict=True):
        mask = subnet.mask(site)
        assert mask.shape == shape
        assert mask.dtype == torch.bool
        joined.append(mask.flatten())
    assert torch.cat(joined).nonzero().flatten().tolist() == sorted(POSITIONS)


def test_gather(subnet: Subnet) -> None:
    packed = torch.randn(3, 2, 23)
    expected = torch.stack([packed[..., i] for i in sorted(POSITIONS)], -1)
    assert_close(subnet.gather(packed), expected, **EQUAL)
    not_contiguous = torch.randn(23, 4).mT
    found = subnet.gather(not_contiguous)
    assert_close(found, not_contiguous.contiguous()[:, sorted(POSITIONS)], **EQUAL)


def test_repr(subnet: Subnet) -> None:
    assert repr(subnet).splitlines() == [
        "Subnet: 6 of 23 weights (26.09%)",
        "  fc1.weight  2 of 6",
        "  noise       1 of 1",
        "  conv        3 of 12",
    ]
    explained = Subnet.from_positions(LAYOUT, torch.tensor([3]), 0.1234)
    assert repr(explained).startswith(
        "Subnet: 1 of 23 weights (4.35%), 12.34% of the output variance on the "
        "training inputs"
    )


def test_it_is_frozen(subnet: Subnet) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign"):
        subnet.flat = torch.arange(2)  # type: ignore[misc]


def test_it_works_on_any_device(subnet: Subnet, device: torch.device) -> None:
    other = Subnet(subnet.layout, subnet.flat.to(device), 0.5)
    assert other.flat.device.type == device.type
    assert other.names == subnet.names
    assert other.counts == subnet.counts
    assert other.explained_variance == 0.5
    assert other.layout is subnet.layout
    for site in LAYOUT.names:
        assert_close(other.mask(site).cpu(), subnet.mask(site), **EQUAL)


def test_whole_holds_every_element(device: torch.device) -> None:
    everything = Subnet.whole(LAYOUT, device)
    assert everything.flat.device.type == device.type
    assert everything.flat.dtype == torch.int64
    assert everything.flat.tolist() == list(range(23))
    assert everything.names == slow_names()
    assert everything.fraction == 1
    assert everything.explained_variance is None
    assert Subnet.whole(LAYOUT).flat.device.type == "cpu"


def test_split_cuts_values_by_site(subnet: Subnet) -> None:
    packed = torch.randn(3, 2, 23)
    pieces = subnet.split(subnet.gather(packed))
    assert list(pieces) == list(subnet.indices)  # a site without any is left out
    whole = {site: v.reshape(3, 2, -1) for site, v in LAYOUT.unpack(packed).items()}
    for site, within in subnet.indices.items():
        assert_close(pieces[site], whole[site][..., within], **EQUAL)


def test_every_element_has_its_name() -> None:
    assert [LAYOUT.element(position) for position in range(23)] == slow_names()


# ----------------------------------------------------------------------------------
# From masks and positions.


def as_masks(subnet: Subnet) -> dict[str, Tensor]:
    return {site: subnet.mask(site) for site in LAYOUT.names}


def test_masks_and_positions_build_the_same(subnet: Subnet) -> None:
    for chosen in (
        as_masks(subnet),
        subnet.indices,
        {site: at.flip(0) for site, at in reversed(subnet.indices.items())},
        {**as_masks(subnet), "conv": torch.tensor([2, 11, 0])},
    ):
        assert_close(Subnet.from_sites(LAYOUT, chosen).flat, subnet.flat, **EQUAL)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8]
)
def test_any_integer_type_names_positions(dtype: torch.dtype) -> None:
    found = Subnet.from_sites(LAYOUT, {"conv": torch.tensor([7, 1], dtype=dtype)})
    assert found.flat.tolist() == [12, 18]
    found = Subnet.from_positions(LAYOUT, torch.tensor([7, 1], dtype=dtype))
    assert found.flat.tolist() == [1, 7]


def test_sites_may_choose_nothing_if_others_do() -> None:
    empty = torch.tensor([], dtype=torch.int64)
    chosen = {"conv": empty, "bias": torch.zeros(4, dtype=torch.bool), "noise": [0]}
    found = Subnet.from_sites(
        LAYOUT, {site: torch.as_tensor(at) for site, at in chosen.items()}
    )
    assert found.names == ["noise"]
    assert found.counts == {"fc1.weight": 0, "noise": 1, "bias": 0, "conv": 0}


def test_a_scalar_site_takes_a_scalar_mask() -> None:
    assert Subnet.from_sites(LAYOUT, {"noise": torch.tensor(True)}).names == ["noise"]


def test_strided_positions_and_masks() -> None:
    positions = torch.arange(20)[::4]
    assert not positions.is_contiguous()
    found = Subnet.from_positions(LAYOUT, positions)
    assert found.flat.tolist() == [0, 4, 8, 12, 16]
    mask = torch.tensor([[True, False], [False, True], [False, False]]).mT
    assert not mask.is_contiguous()
    found = Subnet.from_sites(LAYOUT, {"fc1.weight": mask})
    assert found.names == ["fc1.weight[0, 0]", "fc1.weight[1, 1]"]


def test_positions_are_not_shared_with_the_user() -> None:
    positions = torch.tensor([1, 2, 3])
    found = Subnet.from_positions(LAYOUT, positions)
    positions.zero_()
    assert found.flat.tolist() == [1, 2, 3]


# ----------------------------------------------------------------------------------
# Mistakes.


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([], r"must hold at least one element; got none\. Choose"),
        ([1, 3, 1, 3, 3], r"must be unique; got 3 duplicates \(first 1\)\. Pass `pos"),
        ([0, 23], r"must lie in \[0, 23\); got 1 outside \(first 23\)\. Positions"),
        ([4, -1, 99], r"must lie in \[0, 23\); got 2 outside \(first -1\)\. Positions"),
    ],
)
def test_bad_positions(positions: list[int], message: str) -> None:
    with pytest.raises(SelectionError, match=f"`positions` {message}"):
        Subnet.from_positions(LAYOUT, torch.tensor(positions, dtype=torch.int64))


@pytest.mark.parametrize(
    "positions",
    [
        torch.tensor([1.0, 2.0]),
        torch.tensor([[1, 2]]),
        torch.tensor(1),
        torch.tensor([1 + 0j]),
        torch.tensor([True] * 23),
    ],
    ids=["float", "2-D", "0-D", "complex", "bool"],
)
def test_positions_of_the_wrong_kind(positions: Tensor) -> None:
    """A bool tensor over all D elements is a mask, not positions 0 and 1."""
    shape = ", ".join(map(str, positions.shape))
    message = (
        rf"`positions` must be a 1-D integer tensor; got {positions.dtype} of shape "
        rf"\({shape},?\)\. Pass a LongTensor"
    )
    with pytest.raises(SelectionError, match=message):
        Subnet.from_positions(LAYOUT, positions)


@pytest.mark.parametrize(
    ("site", "choice", "message"),
    [
        (
            "fc2.weight",
            torch.tensor([0]),
            r"`site` must be a latent site .*\['fc1\.weight', 'noise', 'bias', 'conv'\]"
            r"; got 'fc2\.weight'\. Check the spelling",
        ),
        (
            "fc1.weight",
            torch.ones(3, 2, dtype=torch.bool),
            r"mask of site 'fc1\.weight' must have .* shape \(2, 3\); got \(3, 2\)\. "
            r"Build it with `torch\.zeros\(\(2, 3\), dtype=torch\.bool\)`",
        ),
        (
            "fc1.weight",
            torch.ones(6, dtype=torch.bool),
            r"mask of site 'fc1\.weight' must have .* \(2, 3\); got \(6,\)",
        ),
        (
            "bias",
            torch.tensor([0, 4]),
            r"`positions of site 'bias'` must lie in \[0, 4\); got 1 outside "
            r"\(first 4\)",
        ),
        (
            "bias",
            torch.tensor([-1]),
            r"`positions of site 'bias'` must lie in \[0, 4\); got 1 .*\(first -1\)",
        ),
        (
            "conv",
            torch.tensor([5, 5]),
            r"`positions of site 'conv'` must be unique; got 1 duplicates \(first 5\)",
        ),
        (
            "conv",
            torch.tensor([0.0, 1.0]),
            r"`positions of site 'conv'` must be a 1-D integer tensor; got torch.float",
        ),
        (
            "conv",
            torch.tensor([[0, 1]]),
            r"`positions of site 'conv'` must be a 1-D integer .* shape \(1, 2\)",
        ),
        (
            "bias",
            torch.zeros(4, dtype=torch.bool),
            r"`subnet` must hold at least one element; got an empty selection over "
            r"sites \['bias'\]\. Choose",
        ),
    ],
)
def test_bad_choices(site: str, choice: Tensor, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        Subnet.from_sites(LAYOUT, {site: choice})


def test_an_empty_mapping() -> None:
    with pytest.raises(SelectionError, match=r"at least one element; got an empty"):
        Subnet.from_sites(LAYOUT, {})


def test_mask_of_an_unknown_site(subnet: Subnet) -> None:
    with pytest.raises(SelectionError, match=r"`site` must be .*; got 'x'\. Check"):
        subnet.mask("x")


# ----------------------------------------------------------------------------------
# Any layout.

SHAPES = st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=4)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(shapes=SHAPES, data=st.data())
def test_views_of_a_subnet_agree(shapes: list[list[int]], data: st.DataObject) -> None:
    """Masks, indices, names, counts and positions are one subset, said five ways."""
    names = tuple(f"site{i}" for i in range(len(shapes)))
    layout = Layout(names, tuple(torch.Size(shape) for shape in shapes))
    total = sum(math.prod(shape) for shape in shapes)
    positions = data.draw(st.lists(st.integers(0, total - 1), min_size=1, unique=True))
    subnet = Subnet.from_positions(layout, torch.tensor(positions))
    assert subnet.flat.tolist() == sorted(positions)
    masks = {site: subnet.mask(site) for site in names}
    assert_close(Subnet.from_sites(layout, masks).flat, subnet.flat, **EQUAL)
    assert_close(Subnet.from_sites(layout, subnet.indices).flat, subnet.flat, **EQUAL)
    assert {site: int(mask.sum()) for site, mask in masks.items()} == subnet.counts
    assert sum(subnet.counts.values()) == subnet.size == len(subnet.names)
    assert len(set(subnet.names)) == subnet.size
    packed = torch.arange(total)
    assert_close(subnet.gather(packed.float()), subnet.flat.float(), **EQUAL)
