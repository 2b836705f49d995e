"""Compiles Triton kernels for sm_90 as their functions launch them, without a GPU: run by test_triton_compiles.py.

Operands are on the CPU, a driver says that there is an H100, launches are early where they may be, and end with the
compiled code. The interpreter, which the other tests use, takes kernels that the compiler refuses.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import StaticLayer
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from neurons.backends import triton_encode
from neurons.backends.triton_encode_tiles import runs_of
from neurons.modes import ValueRange
from snnllm.attention import SpikingLlamaAttention
from snnllm.config import SpikeConfig
from snnllm.kernels import EncoderSpec, LinearSpec, segments_of
from snnllm.kernels.attention import launch as attention_launch
from snnllm.kernels.attention import store
from snnllm.kernels.attention.backend import TritonAttention
from snnllm.kernels.triton import greedy, norm, rotary, swiglu, vocabulary
from snnllm.kernels.triton.backend import TritonBackend
from snnllm.random_model import Shape, llama_config

compiled: list[str] = []


class Pretended:
    """What the compiler asks a driver for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_stream(self, device: int) -> int:
        return 0

    def is_active(self) -> bool:
        return True


def launch(self: Any, grid: Any) -> Callable[..., Any]:
    def only_compiled(*args: Any, **options: Any) -> None:
        compiled.append(self.fn.__name__)
        code = self.warmup(*args, grid=grid, **options)
        assert code.asm["cubin"]

    return only_compiled


driver.set_active(Pretended())
JITFunction.__getitem__ = launch


def linears() -> None:
    """Products of few and many rows of counts, scaled segment by segment, or merged."""
    backend, two, three = TritonBackend(), (224, 32), (100, 100, 56)
    for bits, sizes, merged in ((2, two, 0), (4, two, 0), (8, two, 0), (4, two, 1), (8, three, 1)):
        capacities = (15, 30, 60)[: len(sizes)]
        spec = LinearSpec(
            encoder=EncoderSpec(
                torch.randperm(256), sizes, capacities, name="linear", commensurate=bool(merged)
            ),
            levels=torch.zeros(64, 256, dtype=torch.int8),
            scale=torch.ones(64, 1),
            zero=torch.zeros(64, 1, dtype=torch.int32),
            bias=torch.zeros(64),
            segments=segments_of(sizes),
            weight_bits=bits,
        )
        layer = backend.prepare(spec)
        for rows in (1, 16, 300):
            backend.linear(torch.randn(rows, 256).bfloat16(), layer)
    backend.accumulate(torch.randn(16, 256), layer)


def encoders() -> None:
    """Encoders alone and behind norm and gate: two groups of neighbours, or three in any order."""
    x, gain = torch.randn(2, 256).bfloat16(), torch.ones(256).bfloat16()
    split, commensurate = ValueRange.SPLIT, ValueRange.COMMENSURATE
    neighbours, mixed = torch.arange(256) // 224, torch.randint(0, 3, (256,))
    for groups, mode in ((neighbours, split), (neighbours, commensurate), (mixed, commensurate)):
        many = int(groups.max()) + 1
        order, segments = triton_encode.stable_layout(groups, many)
        capacities = 15.0 * torch.arange(1, many + 1)
        known = runs_of(order, segments, many, 256)
        layout = (order, segments, capacities, torch.ones(many), mode.code, x[0].float())
        for runs in (known, None):
            triton_encode.encode_rows(x, *layout, runs=runs)
            norm.rms_norm_encode(x, x, gain, 1e-5, *layout, runs=runs)
        for rotation in (None, (224, 32)):
            swiglu.silu_mul_encode(x, x, rotation, *layout, runs=known)


def tables() -> None:
    """Embedding and head in 8 bits: few and many rows, channels that are and are not whole steps."""
    vocabulary._shared_memory = lambda place: 232448
    for dtype, many in ((torch.float32, (1, 300)), (torch.bfloat16, (1, 32, 64, 300))):
        for channels in (576, 33, 256):
            codes, scale = torch.zeros(130, channels, dtype=torch.int8), torch.ones(130)
            vocabulary.embed(torch.arange(3), codes, scale, dtype)
            for rows in many:
                vocabulary.head_logits(torch.randn(rows, channels).to(dtype), codes, scale)


def main() -> None:
    norm.early_launch = lambda place: True
    positions, frequencies = torch.arange(6).view(2, 3), torch.rand(64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rotary.rotary_tables(positions, frequencies.to(dtype), 1.5, dtype)
        x, gain = torch.randn(2, 256, dtype=dtype), torch.ones(256, dtype=dtype)
        norm._rms_norm_op(x, x, gain, 1e-5)
        swiglu._silu_mul_op(x, x)
        table = torch.randn(1, 2, 64, dtype=dtype)
        rotary.rotate_heads(torch.randn(1, 2, 256, dtype=dtype), table, table, 2, 1)
    ids, tokens = torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    ended, pad = torch.zeros(2, dtype=torch.bool), torch.tensor(0)
    for ends in (None, torch.arange(3)):
        greedy.append_greedy(torch.randn(2, 50000), ids, 8, ended, tokens, pad, ends)
    triton_encode.INTERPRETED = True  # takes tensors of the CPU
    linears()
    encoders()
    tables()
    store.early_launch = lambda place: True
    attention_launch._units = lambda place: 132
    attention_launch._prefill_config = lambda *given: (128, 64, 8, 3)
    config, spike = llama_config(Shape(128, 256, 2, 1, 1, 64), 64), SpikeConfig(rotation="groups")
    module = SpikingLlamaAttention(config, 0, spike)
    kernels = TritonAttention.of(
        module.q_encoder, module.k_encoder, module.v_encoder, module.qk_rotation
    )
    layer = StaticLayer(max_cache_len=16)
    layer.lazy_initialization(*(torch.zeros(1, 1, 1, kernels.key_row[0], dtype=torch.uint8),) * 2)
    layer.cumulative_length = torch.zeros(1, dtype=torch.int64)
    for tokens in (1, 9):
        x, table = torch.randn(1, tokens, 256).bfloat16(), torch.randn(1, tokens, 64).bfloat16()
        mask = torch.ones(1, 1, tokens, 16, dtype=torch.bool)
        kernels.attend_stored(x, (table, table), mask, layer, torch.zeros(1).long(), 0.1)
    sys.stdout.write(" ".join(compiled))


sys.exit(main())
