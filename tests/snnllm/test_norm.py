"""RMSNorm in a defined order: transformers' values, and the same bits in torch and Triton."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from neurons.modes import ValueRange
from snnllm.kernels.epilogue import kernel_threshold
from snnllm.norm import rms_norm

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 5, 64, 130, 1500, 2600]


def rows(count: int, channels: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, channels, generator=generator) * scale
    x[:, :: max(1, channels // 4)] *= 30
    return x.to(dtype).to(DEVICE)


def close(ours: Tensor, theirs: Tensor) -> None:
    """Another order of the sum moves the scale by an ulp, and the value with it."""
    tolerance = 4 * torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0.0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", SIZES)
def test_it_is_the_norm_of_transformers(channels, dtype):
    x = rows(3, channels, dtype, channels)
    norm = LlamaRMSNorm(channels, eps=1e-5).to(DEVICE, dtype)
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    with torch.no_grad():
        close(rms_norm(x, norm.weight, 1e-5), norm(x))
        norm.weight.fill_(1.0)
        close(rms_norm(x, None, 1e-5), norm(x))


def test_the_sum_is_that_of_the_definition():
    x = rows(1, 2049, torch.float32, 0).cpu()
    lanes = [0.0] * 1024
    for channel, value in enumerate((x * x)[0]):
        lanes[channel % 1024] = value + lanes[channel % 1024]
    while len(lanes) > 1:
        lanes = [a + b for a, b in zip(lanes[::2], lanes[1::2], strict=True)]
    mean = lanes[0] / torch.tensor(2049.0)
    scale = torch.tensor(1.0) / torch.tensor(np.sqrt((mean + 1e-6).numpy()))
    assert torch.equal(rms_norm(x, None, 1e-6), x * scale)


def test_gains_of_another_dtype_or_size_are_refused():
    x = rows(2, 8, torch.bfloat16, 0)
    with pytest.raises(TypeError, match=r"weight must be torch\.bfloat16 as x is"):
        rms_norm(x, torch.ones(8), 1e-6)
    with pytest.raises(ValueError, match=r"weight must be \[8\]"):
        rms_norm(x, torch.ones(9, dtype=x.dtype), 1e-6)


class TestTriton:
    """The kernels, alone and fused with the residual and the encoder."""

    @pytest.fixture(autouse=True)
    def _needs_triton(self) -> None:
        pytest.importorskip("triton", reason="needs triton (pip install triton)")

    @settings(max_examples=16, deadline=None, derandomize=True)
    @given(
        channels=st.sampled_from(SIZES),
        dtype=st.sampled_from(FLOATS),
        residual=st.booleans(),
        gain=st.booleans(),
        scale=st.sampled_from([1e-6, 1.0, 100.0]),
        seed=st.integers(0, 2**16),
    )
    def test_the_kernel_gives_the_bits_of_torch(self, channels, dtype, residual, gain, scale, seed):
        from snnllm.kernels.triton.norm import rms_norm as kernel

        x = rows(2, channels, dtype, seed, scale)
        added = rows(2, channels, dtype, seed + 1, scale) if residual else None
        weight = (rows(1, channels, dtype, seed + 2)[0] * 0.1 + 1) if gain else None
        got, stream = kernel(x, weight, 1e-5, added)
        expected = x if added is None else x + added
        assert torch.equal(stream, expected)
        assert torch.equal(got, rms_norm(expected, weight, 1e-5))

    @settings(max_examples=10, deadline=None, derandomize=True)
    @given(
        channels=st.sampled_from([5, 64, 130]),
        steps=st.sampled_from([(1,), (1, 2), (1, 2, 3)]),
        dtype=st.sampled_from(FLOATS),
        value_range=st.sampled_from(list(ValueRange)),
        residual=st.booleans(),
        gain=st.booleans(),
        seed=st.integers(0, 2**16),
    )
    def test_fused_is_norm_then_encoder(
        self, channels, steps, dtype, value_range, residual, gain, seed
    ):
        self.check_fused(2, channels, steps, dtype, value_range, residual, gain, seed)

    @pytest.mark.parametrize("steps", [(1, 2), (1, 2, 3)])
    def test_fused_with_commensurate_thresholds(self, steps):
        commensurate = ValueRange.COMMENSURATE
        self.check_fused(2, 130, steps, torch.bfloat16, commensurate, True, True, 1)

    @pytest.mark.gpu
    @pytest.mark.parametrize("channels", [576, 4096, 8192, 20000])
    @pytest.mark.parametrize("count", [1, 300])
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_fused_is_norm_then_encoder_at_size(self, count, channels, dtype):
        split, commensurate = ValueRange.SPLIT, ValueRange.COMMENSURATE
        self.check_fused(count, channels, (1, 2), dtype, split, True, True, channels)
        self.check_fused(count, channels, (1, 2), dtype, commensurate, True, True, channels)
        self.check_fused(count, channels, (1,), dtype, split, False, False, channels + 1)

    def check_fused(self, count, channels, steps, dtype, value_range, residual, gain, seed) -> None:
        from neurons import SpikeEncoder
        from neurons.backends.triton_encode import encode_rows, stable_layout
        from neurons.backends.triton_encode_tiles import runs_of
        from snnllm.kernels.triton.norm import rms_norm_encode

        generator = torch.Generator().manual_seed(seed)
        x = rows(count, channels, dtype, seed)
        added = rows(count, channels, dtype, seed + 1) if residual else None
        weight = (rows(1, channels, dtype, seed + 2)[0] * 0.1 + 1) if gain else None
        group = torch.randint(0, len(steps), (channels,), generator=generator).to(torch.uint8)
        encoder = SpikeEncoder(group, steps, 4, value_range, clip=0.9)
        encoder = encoder.to(DEVICE)
        offset = torch.randn(channels, generator=generator).to(DEVICE) if seed % 2 else None
        order, segments = stable_layout(encoder.channel_group, len(steps))
        capacities = torch.tensor(encoder.capacities, dtype=torch.float32, device=DEVICE)
        layout = (order, segments, capacities, encoder.clip, value_range.code, offset)
        with_row = bool(seed % 3)
        got = rms_norm_encode(x, added, weight, 1e-5, *layout, with_row=with_row)
        runs = runs_of(order, segments, len(steps), channels)
        fast = rms_norm_encode(x, added, weight, 1e-5, *layout, with_row=with_row, runs=runs)
        for ours, theirs in zip(fast, got, strict=True):
            assert torch.equal(ours, theirs)

        stream = x if added is None else x + added
        row = rms_norm(stream, weight, 1e-5)
        assert torch.equal(got.residual, stream)
        if seed % 3:
            assert torch.equal(got.row, row)
        else:
            assert got.row.numel() == 0
        for ours, theirs in zip(got[:4], encode_rows(row, *layout), strict=True):
            assert torch.equal(ours, theirs)
        encoding = encoder.encode(row if offset is None else row.float() - offset)
        multiple = 1 if encoding.multiple is None else encoding.multiple
        assert torch.equal(got.threshold, kernel_threshold(encoding))
        assert torch.equal(got.zero_point, encoding.zero_point * multiple)

    def test_opcheck_and_compilation(self):
        from snnllm.kernels.triton import norm as norm_triton

        x, residual = rows(2, 70, torch.float32, 0), rows(2, 70, torch.float32, 1)
        segments = torch.tensor([[0, 128, 0]], dtype=torch.int32, device=DEVICE)
        capacity, clip = torch.full((1,), 15.0, device=DEVICE), torch.ones(1, device=DEVICE)
        layout = (None, segments, capacity, clip, 0, None)
        for added in (None, residual):
            torch.library.opcheck(torch.ops.snnllm.rms_norm.default, (x, added, None, 1e-5))
            torch.library.opcheck(
                torch.ops.snnllm.rms_norm_encode.default,
                (x, added, x[0].contiguous(), 1e-5, *layout, True, 128),
            )
        torch.compiler.reset()
        compiled = torch.compile(
            lambda x, r: norm_triton.rms_norm_encode(x * 2, r, None, 1e-5, *layout),
            fullgraph=True,
            backend="inductor" if CUDA else "aot_eager",
        )
        expected = norm_triton.rms_norm_encode(x * 2, residual, None, 1e-5, *layout)
        for ours, theirs in zip(compiled(x, residual), expected, strict=True):
            assert torch.equal(ours, theirs)

    def test_no_rows(self):
        from snnllm.kernels.triton.norm import rms_norm as kernel

        row, stream = kernel(rows(2, 8, torch.float32, 0)[:0], None, 1e-5)
        assert row.shape == stream.shape == (0, 8)

    def test_a_residual_of_another_kind_is_refused(self):
        from snnllm.kernels.triton.norm import rms_norm as kernel

        x = rows(2, 8, torch.float32, 0)
        with pytest.raises(ValueError, match="residual must be"):
            kernel(x, None, 1e-5, x.half())
        with pytest.raises(ValueError, match="residual must be"):
            kernel(x, None, 1e-5, x[:1])
