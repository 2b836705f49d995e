"""Attention over the encoded KV cache on a GPU beside torch's in bf16 on a bf16 cache, batch 1.

    python benchmarks/attention_gpu.py

Times in us, medians of CUDA graphs that are replayed in turn and walk through copies of their cache, more
than 4 times the L2 cache in all. `attention` takes float queries and the cache, so it includes the encoding
of Q; `write` encodes the new K and V. Decoding: one query. "static" has 128 tokens in a cache for as many
as the row says, the rest hidden by the mask. Before it is timed, every case is compared with the torch
path. Without a GPU the exit status is 77 (skipped).

A second table has the rotation of Q and K of a rotated model: encoding without it and with it (one kernel
each), what that adds beside a bf16 linear of the same width, and the rotation in a kernel of its own, in
front of decoding and where the attention kernels are off.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from linear_gpu import SKIPPED, Contender, copies_of, graph_of, medians
from torch import Tensor
from transformers import LlamaConfig

from snnllm.attention import SpikingLlamaAttention, spiking_attention
from snnllm.cache import to_payload
from snnllm.config import SpikeConfig
from snnllm.head_rotation import HeadRotation
from snnllm.kernels.attention.backend import TritonAttention
from snnllm.kernels.triton.backend import TritonBackend
from snnllm.transforms import salient_count, sorted_groups

SHAPES = {"LLaMA-7B": (32, 32, 128), "SmolLM2-135M": (9, 3, 64)}
KEYS = (128, 2048, 8192)
PROMPTS = (2048,)
ROTATED_TOKENS = (4096, 1)


class Case(NamedTuple):
    """What is measured: tokens of the query, slots of the cache, and those that are used."""

    queries: int
    keys: int
    used: int


def block(heads: int, kv_heads: int, dim: int, **spike: Any) -> SpikingLlamaAttention:
    """An attention block with 10 % salient channels of K and V, T = 2."""
    config = LlamaConfig(
        hidden_size=heads * dim, num_attention_heads=heads, num_key_value_heads=kv_heads
    )
    module = SpikingLlamaAttention(config, 0, SpikeConfig(**spike)).eval().cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    draw = torch.rand(2, kv_heads * dim, generator=generator, device="cuda")
    few = draw.topk(kv_heads * dim // 10, dim=1).indices
    masks = torch.zeros_like(draw).scatter_(1, few, 1).to(torch.uint8).view(2, kv_heads, dim)
    module.set_channel_groups(masks[0], masks[1])
    return module


def mask_of(case: Case) -> Tensor:
    """The mask of transformers: float, causal, unused slots hidden."""
    seen = torch.ones(case.queries, case.keys, dtype=torch.bool, device="cuda")
    seen = seen.tril(case.used - case.queries)[None, None]
    lowest = torch.finfo(torch.bfloat16).min
    return torch.zeros(seen.shape, dtype=torch.bfloat16, device="cuda").masked_fill(~seen, lowest)


def dense(query: Tensor, key: Tensor, value: Tensor, case: Case) -> Contender:
    """The graph of scaled_dot_product_attention over the used part of a bf16 cache."""
    caches = [
        (key[:, :, : case.used].clone(), value[:, :, : case.used].clone())
        for _ in range(copies_of(4 * key[:, :, : case.used].numel()))
    ]
    attention = partial(
        torch.nn.functional.scaled_dot_product_attention,
        is_causal=case.queries > 1,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return graph_of([partial(attention, query, *cache) for cache in caches])


def measure(shape: tuple[int, int, int], case: Case) -> list[str]:
    """Cells of a row of the table."""
    heads, kv_heads, dim = shape
    module = block(*shape)
    kernels = TritonAttention.of(module.q_encoder, module.k_encoder, module.v_encoder)
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = ((heads, case.queries), (kv_heads, case.keys), (kv_heads, case.keys))
    query, key, value = (
        torch.randn(1, *size, dim, generator=generator, device="cuda", dtype=torch.bfloat16)
        for size in sizes
    )
    key[..., ::10] *= 8
    mask = mask_of(case)
    payloads = kernels.encode(key, value)
    for payload in payloads:
        payload[:, :, case.used :] = 0
    copies = copies_of(2 * payloads[0].numel())
    caches = [tuple(p.clone() for p in payloads) for _ in range(copies)]
    attend: Callable[..., Any] = kernels.attend
    calls = [partial(attend, query, *cache, mask, dim**-0.5, torch.bfloat16) for cache in caches]
    out = calls[0]().float()
    module._kernels = None
    expected = spiking_attention(module, query, *payloads, mask, dim**-0.5)[0].float()
    error = float((out - expected).norm() / expected.norm())
    new = [x[:, :, : case.queries] for x in (key, value)]
    graphs = {
        "bf16": dense(query, key, value, case),
        "attention": graph_of(calls),
        "write": graph_of([partial(kernels.encode, *new)] * 20),
    }
    graphs["last"] = graphs["bf16"]
    time = medians(graphs)
    base = (time["bf16"] + time["last"]) / 2
    total = time["attention"] + time["write"]
    share = payloads[0].nbytes / key.nbytes
    return [
        *(f"{base:.1f}", f"{time['attention']:.1f} ({base / time['attention']:.2f}x)"),
        *(f"{time['write']:.1f}", f"{total:.1f} ({base / total:.2f}x)"),
        *(f"{share:.3f}", f"{error:.1e}", f"{100 * abs(time['bf16'] / time['last'] - 1):.0f} %"),
    ]


def rotated_block(shape: tuple[int, int, int]) -> SpikingLlamaAttention:
    """The same behind a rotation, in an order of its own for each head, and with an offset of K."""
    _, kv_heads, dim = shape
    module = block(*shape, rotation="groups", query_groups=True, key_offset=True)
    draw = torch.rand(2, kv_heads, dim, generator=torch.Generator().manual_seed(1))
    groups = (draw.argsort(-1) < salient_count(dim, SpikeConfig().salient_ratio)).to(torch.uint8)
    assert module.qk_rotation is not None
    module.qk_rotation.sort(groups[0])
    key, value = sorted_groups(groups).cuda()
    module.set_channel_groups(key, value)
    module.get_buffer("offset_key").copy_(draw[0])
    return module


def in_torch(rotation: HeadRotation, x: Tensor) -> Tensor:
    """What torch rotates, on the CPU: on a GPU the module runs the kernel."""
    rotated: Tensor = copy.deepcopy(rotation).cpu()(x.cpu())
    return rotated.to(x.device)


def measure_rotation(shape: tuple[int, int, int], tokens: int) -> list[str]:
    """Cells of a row of the second table."""
    from snnllm.kernels.attention.launch import encode  # these need Triton
    from snnllm.kernels.attention.rotation import rotate_operand

    heads, kv_heads, dim = shape
    module = rotated_block(shape)
    encoders, rotation = (module.q_encoder, module.k_encoder, module.v_encoder), module.qk_rotation
    assert rotation is not None
    offset = module.get_buffer("offset_key")
    rotated, plain = TritonAttention.of(*encoders, rotation, offset), TritonAttention.of(*encoders)
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value, x = (
        torch.randn(1, tokens, n, dim, generator=generator, device="cuda", dtype=torch.bfloat16)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    operand = ((query, rotated.query_slot, rotated.query_clip, rotated.query_row[:2]),)
    planes = rotated.query_row[2]
    sizes = (rotated.query_capacity, rotated.shared, planes, rotated.slots if planes else 0)
    weight = torch.randn(heads * dim, heads * dim, device="cuda", dtype=torch.bfloat16)
    calls: dict[str, Callable[..., Any]] = {
        "linear": partial(torch.nn.functional.linear, x.flatten(2), weight),
        "Q": partial(encode, operand, *sizes),
        "Q rotated": partial(encode, operand, *sizes, rotation.order, rotation.blocks),
        "K, V": partial(plain.encode, key, value),
        "K rotated, V": partial(rotated.encode, key, value),
        "Q alone": partial(rotate_operand, query, rotation.order, rotation.blocks),
    }
    with torch.no_grad():
        turned = in_torch(rotation, query)
        currents = (
            (module.q_encoder, turned),
            (module.k_encoder, in_torch(rotation, key) - offset[:, None]),
        )
        expected = [to_payload(e.encode(current), e.layout) for e, current in currents]
    for ours, theirs in (
        (calls["Q rotated"]()[0], expected[0]),
        (calls["K rotated, V"]()[0], expected[1]),
        (calls["Q alone"](), turned),
    ):
        if not torch.equal(ours, theirs):
            raise AssertionError(f"{shape}: what the kernels rotate is not what torch rotates")
    time = medians({name: graph_of([call] * 20) for name, call in calls.items()})
    cells = [f"{time['linear']:.1f}"]
    for before, after in (("Q", "Q rotated"), ("K, V", "K rotated, V")):
        share = (time[after] - time[before]) / time["linear"]
        cells.append(f"{time[before]:.1f} -> {time[after]:.1f} ({100 * share:+.1f} %)")
    return [*cells, f"{time['Q alone']:.1f}"]


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", nargs="+", type=int, default=list(KEYS), help="cached tokens")
    parser.add_argument("--prompts", nargs="*", type=int, default=list(PROMPTS))
    args = parser.parse_args(argv)
    reason = TritonBackend().available()
    if reason is not None or not torch.cuda.is_available():
        cause = reason or "there is no CUDA device"
        print(f"attention_gpu measures Triton kernels on a GPU: {cause}; skipped.", file=sys.stderr)
        return SKIPPED
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    print(
        "| shape | queries | cache | bf16 | attention | write | both | cache bytes / bf16 | "
        "relative difference | baseline drift |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    cases = [Case(1, keys, keys) for keys in args.keys]
    cases += [Case(1, max(args.keys), 128)]
    cases += [Case(prompt, prompt, prompt) for prompt in args.prompts]
    for name, shape in SHAPES.items():
        for case in cases:
            slots = f"{case.keys}" + (" static" if case.used < case.keys else "")
            cells = measure(shape, case)
            print(f"| {name} | {case.queries} | {slots} | {' | '.join(cells)} |", flush=True)
    print(
        "\n| shape | tokens | bf16 linear | Q: encoded -> rotated too (of the linear) | "
        "K and V: likewise | Q rotated alone |\n|---|---|---|---|---|---|"
    )
    for name, shape in SHAPES.items():
        for tokens in ROTATED_TOKENS:
            print(
                f"| {name} | {tokens} | {' | '.join(measure_rotation(shape, tokens))} |", flush=True
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
