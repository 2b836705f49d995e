"""Rotary embedding in one kernel: the bits of transformers' function, and of its static cache."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, StaticCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

pytest.importorskip("triton", reason="needs triton (pip install triton)")

from snnllm import shared_input
from snnllm.block import fuse_rotary
from snnllm.kernels.triton import rotary
from snnllm.kernels.triton.rotary import rotary_tables, rotate_and_store, rotate_heads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def operands(batch, tokens, heads, kv_heads, dim, dtype, shared, seed):
    """Projections, cos and sin, and what transformers makes of them."""
    generator = torch.Generator().manual_seed(seed)
    width = (heads + 2 * kv_heads) * dim
    projected = torch.randn(batch, tokens, width, generator=generator).to(DEVICE, dtype)
    table = (2, 1 if shared else batch, tokens, dim)
    cos, sin = torch.randn(table, generator=generator).to(DEVICE, dtype)
    parts = projected.unflatten(-1, (-1, dim)).transpose(1, 2)
    query, key, value = parts.split((heads, kv_heads, kv_heads), dim=1)
    return projected, cos, sin, *apply_rotary_pos_emb(query, key, cos, sin), value


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    tokens=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    shared_heads=st.integers(1, 2),
    dim=st.sampled_from([2, 6, 16]),
    dtype=st.sampled_from(FLOATS),
    shared=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_the_bits_are_those_of_transformers(
    batch, tokens, kv_heads, shared_heads, dim, dtype, shared, seed
):
    heads = kv_heads * shared_heads
    projected, cos, sin, query, key, value = operands(
        batch, tokens, heads, kv_heads, dim, dtype, shared, seed
    )
    got = rotate_heads(projected, cos, sin, heads, kv_heads)
    assert torch.equal(got[0], query)
    assert torch.equal(got[1], key)

    config = LlamaConfig(
        hidden_size=heads * dim,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=1,
    )
    expected, written = (StaticCache(config=config, max_cache_len=tokens + 4) for _ in range(2))
    for cache in (expected, written):
        cache.update(key[:, :, :1] * 2, value[:, :, :1] * 3, 0)
    expected.update(key, value, 0)
    layer = written.layers[0]
    position = layer.cumulative_length.view(1).clone()
    query_too = rotate_and_store(
        *(projected, cos, sin, heads, layer.keys, layer.values),
        *(layer.cumulative_length, position),
    )
    assert torch.equal(query_too, query)
    for name in ("keys", "values", "cumulative_length"):
        assert torch.equal(getattr(layer, name), getattr(expected.layers[0], name)), name


def test_bad_operands_are_refused():
    projected, cos, sin, *_ = operands(1, 2, 2, 1, 4, torch.float32, True, 0)
    with pytest.raises(ValueError, match="projected must be contiguous"):
        rotate_heads(projected, cos, sin, 3, 1)
    with pytest.raises(ValueError, match="projected must be contiguous"):
        rotate_heads(projected[:, :, ::2], cos, sin, 1, 1)
    with pytest.raises(TypeError, match=r"cos must be torch\.float32"):
        rotate_heads(projected, cos.half(), sin, 2, 1)
    with pytest.raises(ValueError, match=r"sin must be \[B or 1, 2, 4\]"):
        rotate_heads(projected, cos, sin[:, :1], 2, 1)


def test_caches_that_do_not_fit_are_refused():
    projected, cos, sin, *_ = operands(2, 1, 2, 1, 4, torch.float32, True, 0)
    keys, length = torch.zeros(2, 1, 3, 4, device=DEVICE), torch.zeros(1, dtype=int, device=DEVICE)

    def store(keys, values):
        rotate_and_store(projected, cos, sin, 2, keys, values, length, length.clone())

    with pytest.raises(TypeError, match=r"values must be torch\.float32"):
        store(keys, keys.half())
    for wrong in (keys[:1], keys[..., :2]):
        with pytest.raises(ValueError, match=r"keys must be \[2, 1, L, 4\]"):
            store(wrong, keys)
    for wrong in (keys[:, :, :2], torch.zeros(2, 1, 4, 3, device=DEVICE).mT):
        with pytest.raises(ValueError, match="contiguous and of one shape"):
            store(keys, wrong)


def test_tokens_beyond_a_cache_are_not_stored():
    projected, cos, sin, *_ = operands(1, 3, 2, 1, 4, torch.float32, True, 0)
    # The cache is a part of a larger memory, of which nothing else may change.
    memory = torch.full((2, 8, 4), -1.0, device=DEVICE)
    keys, values = (part[2:4].view(1, 1, 2, 4) for part in memory)
    length = torch.zeros(1, dtype=int, device=DEVICE)
    rotate_and_store(projected, cos, sin, 2, keys, values, length, length.clone() + 1)
    changed = (memory != -1).any(-1)
    assert changed.tolist() == [[i == 3 for i in range(8)]] * 2


def test_the_operators_are_sound():
    projected, cos, sin, *_ = operands(1, 2, 2, 1, 4, torch.float32, True, 0)
    keys, length = torch.zeros(1, 1, 4, 4, device=DEVICE), torch.zeros(1, dtype=int, device=DEVICE)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.snnllm.rotate_heads.default, (projected, cos, sin, 2, 1), test_utils=checks
    )
    torch.library.opcheck(
        torch.ops.snnllm.rotate_and_store.default,
        (projected, cos, sin, 2, keys, keys.clone(), length, length.clone()),
        test_utils=checks,
    )


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},  # scales the tables
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ROPES)
def test_tables_are_those_of_transformers(monkeypatch, kind, dtype):
    """Their bits on a GPU; the interpreter has another cosine."""
    config = LlamaConfig(
        hidden_size=48,
        num_attention_heads=2,
        max_position_embeddings=64,
        rope_parameters=ROPES[kind],
    )
    embedding = LlamaRotaryEmbedding(config).to(DEVICE, dtype).eval()
    positions = torch.tensor([[0, 1, 63], [4000, 5, 7]], device=DEVICE)
    x = torch.zeros(2, 3, 48, device=DEVICE, dtype=dtype)
    expected = embedding(x, positions)
    calls = []
    monkeypatch.setattr(shared_input, "kernels_run_on", lambda kind: True)
    monkeypatch.setattr(
        rotary, "rotary_tables", lambda *given: (calls.append(1), rotary_tables(*given))[1]
    )
    fuse_rotary(embedding)
    for mine, theirs in zip(embedding(x, positions), expected, strict=True):
        assert mine.dtype == dtype
        if DEVICE == "cuda":
            assert torch.equal(mine, theirs)
        torch.testing.assert_close(mine, theirs)
    assert len(calls) == (kind != "dynamic")
