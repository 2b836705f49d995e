"""Bit packing of weight codes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snnllm.packing import pack, packed_width, unpack


def random_codes(rows: int, channels: int, bits: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, channels), generator=generator).to(torch.uint8)


@settings(max_examples=60, derandomize=True)
@given(
    bits=st.integers(1, 8),
    rows=st.integers(1, 5),
    channels=st.integers(1, 40),
    seed=st.integers(0, 2**16),
)
def test_packing_loses_nothing_and_takes_no_more_bits(bits, rows, channels, seed):
    codes = random_codes(rows, channels, bits, seed)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_width(channels, bits))
    assert packed.shape[1] * 8 - channels * bits < 8
    unpacked = unpack(packed, channels, bits)
    assert unpacked.is_contiguous()
    assert torch.equal(unpacked, codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_stream_is_little_endian(bits):
    codes = random_codes(3, 11, bits, bits)
    for row, packed in zip(codes.tolist(), pack(codes, bits).tolist(), strict=True):
        stream = sum(code << (bits * i) for i, code in enumerate(row))
        assert int.from_bytes(bytes(packed), "little") == stream


def test_four_bits_put_the_even_code_in_the_low_nibble():
    assert pack(torch.tensor([[0x3, 0xA]], dtype=torch.uint8), 4).tolist() == [[0xA3]]


def test_packing_copies():
    codes = random_codes(2, 3, 8, 0)
    packed = pack(codes, 8)
    restored = unpack(packed, 3, 8)
    codes.zero_()
    assert packed.any()
    packed.zero_()
    assert restored.any()


def test_a_row_of_another_width_is_refused():
    with pytest.raises(ValueError, match="10 codes of 4 bits take 5 bytes a row, got 6"):
        unpack(torch.zeros(2, 6, dtype=torch.uint8), 10, 4)
