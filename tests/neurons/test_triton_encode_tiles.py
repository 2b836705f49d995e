"""Rows held in registers have the integers of `SpikeEncoder`; which layouts may be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="needs triton (pip install triton)")

from neurons.backends.triton_encode import stable_layout
from neurons.backends.triton_encode_tiles import runs_of, tiles_of
from tests.neurons.test_triton_encode import DEVICE, FLOATS, KINDS, RANGES, Case, assert_same, split

FAST = st.builds(
    Case,
    st.sampled_from(KINDS),
    st.integers(1, 3),
    st.sampled_from([64, 130, 300, 1100]),
    st.sampled_from([(1, 2), (1, 2, 3), (1, 1, 2, 3)]),
    st.sampled_from([1, 4, 6]),
    st.sampled_from(RANGES),
    st.sampled_from(FLOATS),
    # All groups have channels, no segment is split.
    st.integers(1, 2**12).map(lambda i: 60 * i + 11),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=FAST)
def test_a_row_in_registers_equals_the_encoder(case):
    assert case.fast().runs[3::4] == [-1] * len(case.capacities)
    assert_same(case.encoded(), case.expected())


@pytest.mark.parametrize("many", [4, 64, 100, 296])
@pytest.mark.parametrize("offset", [False, True])
def test_neighbours_need_no_gather(many, offset):
    value_range = "commensurate" if offset else "split"
    case = Case("normal", 2, 300, (1, 2), 4, value_range, torch.bfloat16, 2 + offset)
    case.salient_first(many).fast()
    assert case.runs[3::4] == [many, 0]
    assert_same(case.encoded(), case.expected())
    case.salient_first(many + 1).fast()  # no vectors begin there
    assert case.runs[3::4] == [-1, 0]
    assert_same(case.encoded(), case.expected())


def test_padding_may_be_longer_than_a_tile():
    case = Case("normal", 2, 70, (1, 2), 4, "commensurate", torch.float32, 3)
    starts = (0, 320)
    order = torch.full((640,), -1, dtype=torch.int32)
    for group, start in enumerate(starts):
        own = torch.nonzero(case.encoder.channel_group.cpu() == group).flatten()
        order[start : start + len(own)] = own.int()
    case.order = order.to(DEVICE)
    case.segments = torch.tensor([[0, 320, 0], [320, 640, 1]], dtype=torch.int32, device=DEVICE)
    assert case.fast().runs is not None
    assert_same(case.encoded(), case.expected())


def test_layouts_without_a_fast_kernel():
    def runs(group: list[int], groups: int, change=lambda order, segments: None):
        order, segments = stable_layout(torch.tensor(group), groups)
        change(order, segments)
        return runs_of(order, segments, groups, len(group))

    assert runs([0, 1, 0], 2) == [0, 64, 2, -1, 64, 128, 1, -1]
    assert runs([0, 0, 0, 0, 1], 2) == [0, 64, 4, 0, 64, 128, 1, 4]
    assert runs([0, 1, 2, 3, 4], 5) is None  # too many groups
    assert runs([0, 2], 3) is None  # a group without channels
    assert runs([0] * 65, 1, lambda order, segments: order[3].fill_(-1)) is None  # a hole
    assert runs([0, 1], 2, lambda order, segments: order[64:].fill_(-1)) is None  # only padding
    assert runs([0] * 40000, 1) is None  # too long
    order, segments = stable_layout(torch.zeros(100, dtype=torch.uint8), 1)
    assert runs_of(order, split(segments), 1, 100) is None
    assert runs_of(None, segments, 1, 100) == [0, 128, 100, 0]


def test_a_thread_has_work_and_registers():
    for positions in (64, 576, 4160, 11072, 32768):
        for gather in (False, True):
            tile, warps = tiles_of(4096, positions, gather)
            assert positions <= 64 * 32 * warps
            assert tile == 32 * warps * (2 if gather else 4)
            assert tiles_of(1, positions, gather)[1] >= warps
