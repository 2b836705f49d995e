"""From projections into a static cache in one kernel: the bits of the operators one after the other."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import StaticCache

from snnllm import modeling, shared_input
from snnllm.attention import SpikingLlamaAttention
from snnllm.block import CACHE_ARGUMENT, prepare
from snnllm.config import SpikeConfig
from snnllm.execution import View
from snnllm.kernels.attention.backend import TritonAttention
from snnllm.kernels.cuda import attention as cuda_attention
from snnllm.kernels.triton.backend import TritonBackend
from snnllm.linear import SpikingLinear
from snnllm.pipelines.rotated import RotatedOptions, rotated_config
from snnllm.random_model import Shape, llama_config, random_spiking
from tests.snnllm.random_attention import kernels_of, random_attention

pytest.importorskip("triton", reason="the package triton is not installed")
from snnllm.kernels.attention import operators as attention_ops
from snnllm.kernels.attention import store
from snnllm.kernels.attention.rotation import fuses, rotate_operand
from snnllm.kernels.triton.rotary import rotate_heads

REASON = TritonBackend().available()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"triton kernels: {REASON}")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def make(
    heads: int, kv_heads: int, dim: int, seed: int, **spike: Any
) -> tuple[Any, TritonAttention]:
    """A block with random groups, order and offset, and its kernels."""
    module, _ = random_attention(heads, kv_heads, dim, seed=seed, device=DEVICE, **spike)
    return module, kernels_of(module)


def operands(
    module: Any, batch: int, tokens: int, dtype: torch.dtype, shared: bool, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Projections with an outlier channel, cos and sin."""
    kv_heads, dim = module.k_encoder.channel_group.shape
    heads = module.config.num_attention_heads
    generator = torch.Generator().manual_seed(seed)
    projected = torch.randn(batch, tokens, (heads + 2 * kv_heads) * dim, generator=generator)
    projected[..., dim // 2 :: dim] *= 20
    cos, sin = torch.randn(2, 1 if shared else batch, tokens, dim, generator=generator)
    return projected.to(DEVICE, dtype), cos.to(DEVICE, dtype), sin.to(DEVICE, dtype)


def cache_of(module: Any, kernels: TritonAttention, batch: int, slots: int, used: int) -> Any:
    """A cache of zeros, its layer initialised, that counts some tokens."""
    kv_heads, dim = module.k_encoder.channel_group.shape
    cache = StaticCache(config=module.config, max_cache_len=slots)
    empty = torch.zeros(batch, kv_heads, used, dim, device=DEVICE)
    cache.update(*kernels.encode(empty, empty), 0)
    return cache


def one_after_the_other(
    module: Any, kernels: TritonAttention, x: tuple[Tensor, Tensor, Tensor], cache: Any
) -> Tensor:
    """Queries behind the rotary embedding; K and V are encoded and written to the cache."""
    kv_heads, dim = module.k_encoder.channel_group.shape
    heads = module.config.num_attention_heads
    query, key = rotate_heads(*x, heads, kv_heads)
    value = x[0].unflatten(-1, (-1, dim))[:, :, heads + kv_heads :].transpose(1, 2)
    cache.update(*kernels.encode(key, value), 0)
    return query


def stored(
    kernels: TritonAttention,
    x: tuple[Tensor, Tensor, Tensor],
    layer: Any,
    position: Tensor | None,
) -> Tensor:
    """Queries of the one kernel, as attention sees them."""
    seen: list[Tensor] = []

    def attend(self: Any, query: Tensor, *args: Any, rotated: bool) -> Tensor:
        seen.append(query)
        return query

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TritonAttention, "attend", attend)
        patch.setattr(cuda_attention, "unsuitable", lambda *args: "two kernels")
        kernels.attend_stored(x[0], x[1:], None, layer, position, 1.0)
    return seen[0]


@settings(max_examples=6 if INTERPRETED else 60, derandomize=True, deadline=None)
@given(
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    dim=st.sampled_from([8, 16, 64]),
    batch=st.integers(1, 2),
    tokens=st.sampled_from([1, 1, 2, 9]),
    spare=st.integers(0, 2),
    used=st.integers(1, 3),
    ratio=st.sampled_from([0.0, 0.1, 0.25]),
    steps=st.sampled_from([2, 3, 4]),
    value_range=st.sampled_from(["split", "shared"]),
    rotation=st.sampled_from(["groups", "groups", "none"]),
    offset=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    shared=st.booleans(),
    positioned=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_the_bits_are_those_of_the_operators_one_after_the_other(
    heads,
    dim,
    batch,
    tokens,
    spare,
    used,
    ratio,
    steps,
    value_range,
    rotation,
    offset,
    dtype,
    shared,
    positioned,
    seed,
):
    module, kernels = make(
        *(*heads, dim, seed),
        salient_ratio=ratio,
        kv_salient_steps=steps,
        value_range=value_range,
        rotation=rotation,
        key_offset=offset,
    )
    assert kernels.stores
    x = operands(module, batch, tokens, dtype, shared, seed)
    expected, ours = (
        cache_of(module, kernels, batch, used + tokens + spare, used) for _ in range(2)
    )
    query = one_after_the_other(module, kernels, x, expected)
    if kernels.order is not None and heads[0] // heads[1] * tokens <= attention_ops.DECODE_ROWS:
        query = rotate_operand(query, kernels.order, kernels.blocks)
    layer = ours.layers[0]
    position = layer.cumulative_length.view(1).clone() if positioned else None
    got = stored(kernels, x, layer, position)
    assert got.dtype == query.dtype
    assert torch.equal(got, query)
    for name in ("keys", "values", "cumulative_length"):
        assert torch.equal(getattr(layer, name), getattr(expected.layers[0], name)), name


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("dim", [20, 128])
def test_heads_of_other_sizes(dim, tokens):
    module, kernels = make(2, 1, dim, 0, salient_ratio=0.3, key_offset=True)
    x = operands(module, 2, tokens, torch.bfloat16, True, 0)
    expected, ours = (cache_of(module, kernels, 2, 12, 2) for _ in range(2))
    query = one_after_the_other(module, kernels, x, expected)
    layer = ours.layers[0]
    assert torch.equal(stored(kernels, x, layer, None), query)
    assert torch.equal(layer.keys, expected.layers[0].keys)
    assert torch.equal(layer.values, expected.layers[0].values)


def test_rotations_of_other_sizes_run_one_by_one():
    _, kernels = make(2, 1, 24, 0, rotation="groups", salient_ratio=0.25)
    assert not fuses(kernels.blocks)
    assert not kernels.stores


@pytest.mark.parametrize("rotation", ["none", "groups"])
@pytest.mark.parametrize(
    ("dim", "tokens"), [(16, 1), (64, 9)] if INTERPRETED else [(16, 1), (16, 9), (64, 1), (64, 9)]
)
@pytest.mark.parametrize("positioned", [False, True])  # in one kernel on Hopper
def test_attention_to_what_is_stored(positioned, dim, tokens, rotation):
    module, kernels = make(4, 2, dim, 0, rotation=rotation, salient_ratio=0.25, key_offset=True)
    x = operands(module, 2, tokens, torch.bfloat16, True, 0)
    expected, ours = (cache_of(module, kernels, 2, 12, 2) for _ in range(2))
    query = one_after_the_other(module, kernels, x, expected)
    seen = torch.ones(1, 1, tokens, 12, dtype=torch.bool, device=DEVICE).tril(2)
    layer, own = expected.layers[0], ours.layers[0]
    out = kernels.attend(query, layer.keys, layer.values, seen, 0.3, torch.bfloat16)
    position = own.cumulative_length.view(1).clone() if positioned else None
    assert torch.equal(kernels.attend_stored(x[0], x[1:], seen, own, position, 0.3), out)
    for name in ("keys", "values", "cumulative_length"):
        assert torch.equal(getattr(layer, name), getattr(own, name)), name


def test_tokens_beyond_a_cache():
    module, kernels = make(2, 1, 8, 0)
    x = operands(module, 1, 3, torch.float32, True, 0)
    # The cache is a part of a larger memory, of which nothing else may change.
    layer = cache_of(module, kernels, 1, 4, 2).layers[0]
    memory = torch.full((2, 8, layer.keys.shape[-1]), 77, dtype=torch.uint8, device=DEVICE)
    layer.keys, layer.values = (part[2:6].view(1, 1, 4, -1) for part in memory)
    position = torch.full((1,), 2, device=DEVICE)
    stored(kernels, x, layer, position)
    changed = (memory != 77).any(-1)
    assert changed.tolist() == [[i in (4, 5) for i in range(8)]] * 2
    assert int(layer.cumulative_length) == 5


@pytest.mark.skipif(not INTERPRETED, reason="a device does not recover from a failed kernel")
def test_a_full_cache_fails(monkeypatch):
    from triton.runtime.errors import InterpreterError
    from triton.runtime.interpreter import interpreter_builder

    # Kernels are launched with this option; the interpreter does not read it from the launch.
    options = dataclasses.replace(interpreter_builder.options, debug=True, sanitize_overflow=False)
    monkeypatch.setattr(interpreter_builder, "options", options)
    module, kernels = make(2, 1, 8, 0)
    x = operands(module, 1, 3, torch.float32, True, 0)
    layer = cache_of(module, kernels, 1, 4, 1).layers[0]
    stored(kernels, x, layer, None)
    assert int(layer.cumulative_length) == 4
    with pytest.raises(InterpreterError, match="the static cache is full"):
        stored(kernels, x, layer, None)


def test_caches_that_do_not_fit_are_refused():
    module, kernels = make(2, 1, 8, 0)
    x = operands(module, 2, 3, torch.float32, True, 0)
    layer = cache_of(module, kernels, 2, 4, 1).layers[0]
    keys, values = layer.keys, layer.values

    def refused(kind: type[Exception], reason: str, keys: Tensor, values: Tensor) -> None:
        layer.keys, layer.values = keys, values
        with pytest.raises(kind, match=reason):
            stored(kernels, x, layer, None)

    width = keys.shape[-1]
    refused(
        TypeError,
        r"values must be payloads, torch\.uint8, got torch\.float32",
        keys,
        values.float(),
    )
    refused(ValueError, rf"keys must be \[2, 1, 4, {width}\]", keys[:1], values)
    refused(ValueError, rf"values must be \[2, 1, 4, {width}\]", keys, values[:, :, :3])
    refused(ValueError, "keys must be contiguous", keys.mT.contiguous().mT, values)
    refused(
        ValueError,
        "3 tokens do not fit a static cache of 2",
        keys[:, :, :2].clone(),
        values[:, :, :2].clone(),
    )


def test_no_tokens():
    module, kernels = make(2, 1, 8, 0, rotation="groups")
    x = operands(module, 1, 0, torch.float32, True, 0)
    layer = cache_of(module, kernels, 1, 4, 1).layers[0]
    assert stored(kernels, x, layer, None).shape == (1, 2, 0, 8)
    assert int(layer.cumulative_length) == 1


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("positioned", [False, True])
def test_the_operator_is_sound(tokens, positioned, monkeypatch):
    module, kernels = make(2, 1, 8, 0, rotation="groups", key_offset=True)
    x = operands(module, 1, tokens, torch.bfloat16, True, 0)
    layer = cache_of(module, kernels, 1, 64, 1).layers[0]  # opcheck writes to it several times
    calls: list[tuple[Any, ...]] = []
    operator = store.store_heads
    monkeypatch.setattr(
        store, "store_heads", lambda *args: (calls.append(args), operator(*args))[1]
    )
    stored(kernels, x, layer, layer.cumulative_length.clone() if positioned else None)
    torch.library.opcheck(
        torch.ops.snnllm.store_heads.default,
        calls[0],
        test_utils=("test_schema", "test_faketensor"),
    )


# -- inside the model ---------------------------------------------------------------------------------


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A small model on the kernels, also in the interpreter, that decodes as on a GPU."""
    monkeypatch.setattr(shared_input, "kernels_run_on", lambda device_type: True)
    monkeypatch.setattr(SpikingLlamaAttention, "_prepare_kernels", kernels_of)
    monkeypatch.setattr(modeling, "records_on", lambda device: True)
    spike = rotated_config(SpikeConfig.preset("W4A4T2"), RotatedOptions())
    made = random_spiking(
        llama_config(Shape(32, 48, 2, 1, 1, 64), 64), spike, DEVICE, torch.float32
    )
    for module in made.modules():
        if isinstance(module, SpikingLinear):
            module.backend = "triton"
            module.invalidate()
    return made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Tokens of every call of the kernel, and whether it was told where they belong."""
    found: list[tuple[int, bool]] = []
    original = TritonAttention.attend_stored

    def attend_stored(self: Any, projected: Tensor, *args: Any) -> Tensor:
        found.append((projected.shape[1], args[3] is not None))
        return original(self, projected, *args)

    monkeypatch.setattr(TritonAttention, "attend_stored", attend_stored)
    return found


def generate(model: Any, ids: Tensor, new: int = 3) -> Tensor:
    mask = torch.ones_like(ids)
    mask[-1, :1] = 0
    with torch.no_grad():
        made: Tensor = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            cache_implementation="static",
        )
    return made


@pytest.mark.slow  # a minute, for what the logits below say too
def test_tokens_are_those_of_the_operators_one_after_the_other(model, calls, monkeypatch):
    ids = torch.randint(3, 64, (2, 3), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with monkeypatch.context() as patch:
        patch.setattr(TritonAttention, "stores", False)
        expected = generate(model, ids)
        assert not calls
    model._steps = None
    assert torch.equal(generate(model, ids), expected)
    if INTERPRETED:
        assert calls == [(1, True)] * 2  # the prefill makes the cache


@torch.no_grad()
def test_logits_are_those_of_the_operators_one_after_the_other(model, calls, monkeypatch):
    ids = torch.randint(3, 64, (1, 11), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    caches, outputs = [], []
    for stores in (False, True):
        monkeypatch.setattr(TritonAttention, "stores", stores)
        cache = StaticCache(config=model.config, max_cache_len=14)
        parts = ids.split([1, 9, 1], 1)
        outputs.append([model(part, **{CACHE_ARGUMENT: cache}).logits for part in parts])
        caches.append(cache)
    assert calls == [(9, False), (1, False)]
    assert torch.equal(*(torch.cat(logits, 1) for logits in outputs))
    for old, new in zip(*(cache.layers for cache in caches), strict=True):
        for name in ("keys", "values", "cumulative_length"):
            assert torch.equal(getattr(old, name), getattr(new, name)), name


@torch.no_grad()
def test_neurons_of_another_view_run_one_by_one(model, calls):
    """Whatever the view of the linears is, and however many queries there are."""
    attention = model.model.layers[0].self_attn
    attention.view = View.UNROLLED
    cache = StaticCache(config=model.config, max_cache_len=24)
    ids = torch.arange(3, 14, device=DEVICE)[None]
    for part in ids.split([1, 9, 1], 1):
        model(part, **{CACHE_ARGUMENT: cache})
    assert not calls


@torch.no_grad()
def test_asked_probabilities_and_dynamic_caches_run_one_by_one(model, calls):
    ids = torch.arange(3, 6, device=DEVICE)[None]
    cache = StaticCache(config=model.config, max_cache_len=8)
    model(ids, **{CACHE_ARGUMENT: cache})
    out = model(ids[:, :1], output_attentions=True, **{CACHE_ARGUMENT: cache})
    assert [p.shape for p in out.attentions] == [(1, 2, 1, 8)]
    dynamic = model(ids, use_cache=True)
    model(ids[:, :1], **{CACHE_ARGUMENT: dynamic.past_key_values})
    assert not calls


@torch.no_grad()
def test_one_graph_for_the_compiler(model):
    prepare(model)
    ids = torch.arange(3, 6, device=DEVICE)[None]
    caches = [StaticCache(config=model.config, max_cache_len=8) for _ in range(2)]
    for cache in caches:
        model(ids, **{CACHE_ARGUMENT: cache})
    expected = model(ids[:, :1], **{CACHE_ARGUMENT: caches[0]}).logits
    graphs = []

    def keep(graph: Any, _: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=keep)
    assert torch.equal(compiled(ids[:, :1], **{CACHE_ARGUMENT: caches[1]}).logits, expected)
    assert len(graphs) == 1
    assert graphs[0].count("snnllm.store_heads") == 1
    assert "encode_key_value" not in graphs[0]
    assert torch.equal(caches[1].layers[0].keys, caches[0].layers[0].keys)
