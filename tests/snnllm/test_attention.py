"""Spiking attention: Q K products in all views, K and V encoded once, causality, padding, caches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, StaticCache
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.llama.modeling_llama import repeat_kv

from snnllm.attention import (
    SPIKING_ATTENTION,
    SpikingLlamaAttention,
    register_attention,
    spiking_attention,
)
from snnllm.attention_products import query_key_accumulators
from snnllm.block import CACHE_ARGUMENT, ProjectedAttention
from snnllm.cache import EncodeOnWrite, from_payload, to_payload
from snnllm.config import SpikeConfig
from snnllm.execution import View, use_view
from snnllm.float_attention import CALIBRATION_ATTENTION, calibration_attention
from snnllm.kernels import get_backend
from snnllm.kernels.products import integer_product
from snnllm.modeling import load


def make_attention(
    heads: int = 4, kv_heads: int = 2, dim: int = 8, seed: int = 0, **spike: Any
) -> SpikingLlamaAttention:
    config = LlamaConfig(
        hidden_size=heads * dim, num_attention_heads=heads, num_key_value_heads=kv_heads
    )
    values = {"salient_ratio": 0.3, **spike}
    module = SpikingLlamaAttention(config, 0, SpikeConfig(**values)).eval()
    groups = len(module.k_encoder.steps)
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(0, groups, (2, kv_heads, dim), generator=generator, dtype=torch.uint8)
    module.set_channel_groups(masks[0], masks[1])
    return module


def operands(
    module: SpikingLlamaAttention, seed: int, batch: int = 2, q_len: int = 3, k_len: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    kv_heads, dim = module.k_encoder.channel_group.shape
    heads = kv_heads * module.num_key_value_groups
    query = torch.randn(batch, heads, q_len, dim, generator=generator)
    key = torch.randn(batch, kv_heads, k_len, dim, generator=generator)
    value = torch.randn(batch, kv_heads, k_len, dim, generator=generator)
    key[..., 0] *= 20
    return query, key, value


@settings(max_examples=60, derandomize=True)
@given(
    bits=st.sampled_from([1, 2, 4, 6, 8]),
    ratio=st.sampled_from([0.0, 0.3, 1.0]),
    steps=st.sampled_from([2, 4]),
    value_range=st.sampled_from(["split", "shared", "commensurate"]),
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1)]),
    dim=st.sampled_from([4, 8, 10]),
    seed=st.integers(0, 2**16),
)
def test_query_key_products_are_equal_in_all_views(
    bits, ratio, steps, value_range, heads, dim, seed
):
    assume(value_range != "commensurate" or bits < 6)  # what the linears can have
    module = make_attention(
        *heads,
        dim,
        seed,
        activation_bits=bits,
        salient_ratio=ratio,
        kv_salient_steps=steps,
        value_range=value_range,
    )
    expected_range = "shared" if value_range == "shared" else "split"
    assert module.q_encoder.value_range == module.k_encoder.value_range == expected_range
    query, key, value = operands(module, seed)
    encoded_q, encoded_k = module.q_encoder.encode(query), module.k_encoder.encode(key)
    q = module.q_encoder.centre(encoded_q).long()
    k = repeat_kv(module.k_encoder.centre(encoded_k), heads[0] // heads[1]).long()
    group = module.k_encoder.channel_group.repeat_interleave(heads[0] // heads[1], 0)[:, None]
    expected = [q @ (k * (group == g)).mT for g in range(len(module.k_encoder.steps))]
    mask = torch.full((3, 5), -1e9).triu(3)
    stored = [
        to_payload(encoder.encode(x), encoder.layout)
        for encoder, x in ((module.k_encoder, key), (module.v_encoder, value))
    ]
    outputs = []
    for view in View:
        module.view = view
        products = query_key_accumulators(module, encoded_q, encoded_k)
        for product, exact in zip(products, expected, strict=True):
            assert product.dtype == torch.int32
            assert torch.equal(product.view_as(exact).long(), exact), view
        encoded = module._encode_key_value(key, value)
        for ours, payload in zip(encoded, stored, strict=True):
            assert torch.equal(ours, payload), view
        outputs.append(spiking_attention(module, query, *stored, mask, dim**-0.5))
    for out, probability in outputs[1:]:
        assert torch.equal(out, outputs[0][0])
        assert torch.equal(probability, outputs[0][1])


def test_the_output_is_attention_over_the_decoded_operands(tolerance):
    module = make_attention()
    query, key, value = operands(module, 1)
    decoded = [
        encoder.decode(encoder.encode(x))
        for encoder, x in (
            (module.q_encoder, query),
            (module.k_encoder, key),
            (module.v_encoder, value),
        )
    ]
    mask = torch.full((3, 5), -1e9).triu(3)
    probability = (decoded[0] @ repeat_kv(decoded[1], 2).mT * 0.5 + mask).softmax(-1)
    expected = (probability @ repeat_kv(decoded[2], 2)).transpose(1, 2)
    key_payload, value_payload = module._encode_key_value(key, value)
    out, ours = spiking_attention(module, query, key_payload, value_payload, mask, 0.5)
    torch.testing.assert_close(ours, probability, rtol=0, atol=tolerance.reordered_sum)
    torch.testing.assert_close(out, expected, rtol=0, atol=10 * tolerance.reordered_sum)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_in_its_dtype(dtype):
    module = make_attention()
    query, key, value = (x.to(dtype) for x in operands(module, 2))
    outputs = []
    for view in View:
        module.view = view
        stored = module._encode_key_value(key, value)
        outputs.append(spiking_attention(module, query, *stored, None, 0.5)[0])
        assert outputs[-1].dtype == dtype
        assert torch.equal(outputs[-1], outputs[0])


@pytest.mark.parametrize(("bound_a", "bound_b"), [(15, 30), (127, 127), (255, 510), (255, 4000)])
@pytest.mark.parametrize("autocast", [False, True])
def test_integer_products_are_exact(bound_a, bound_b, autocast):
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-bound_a, bound_a + 1, (2, 3, 5, 64), generator=generator)
    b = torch.randint(-bound_b, bound_b + 1, (2, 3, 7, 64), generator=generator)
    a[0, 0, 0], b[0, 0, 0] = bound_a, bound_b
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        product = integer_product(a.short(), b.short(), bound_a, bound_b)
    assert product.dtype == torch.int32
    assert torch.equal(product.long(), a @ b.mT)


# -- the payload -------------------------------------------------------------------------------------


@settings(max_examples=80, derandomize=True)
@given(
    bits=st.sampled_from([1, 3, 4, 5, 8]),
    steps=st.sampled_from([2, 3, 4]),
    ratio=st.sampled_from([0.0, 0.3]),
    query_groups=st.booleans(),
    dim=st.sampled_from([2, 8, 40, 66]),
    seed=st.integers(0, 2**16),
)
def test_a_payload_is_an_encoding_in_bytes(bits, steps, ratio, query_groups, dim, seed):
    module = make_attention(
        dim=dim,
        seed=seed,
        activation_bits=bits,
        kv_salient_steps=steps,
        salient_ratio=ratio,
        query_groups=query_groups and ratio > 0,
    )
    query, key, _ = operands(module, seed)
    for encoder, x in ((module.q_encoder, query), (module.k_encoder, key)):
        encoding, layout = encoder.encode(x), encoder.layout
        payload = to_payload(encoding, layout)
        assert payload.dtype == torch.uint8
        assert payload.shape == (*x.shape[:-1], layout.width)
        assert torch.equal(module.encode_payload(encoder, x), payload)  # in C where it can be built
        assert encoding.multiple is from_payload(payload, layout).multiple is None
        for ours, theirs in zip(from_payload(payload, layout)[:3], encoding[:3], strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
        sliced = from_payload(payload[:, :, 1::2], layout)
        assert torch.equal(sliced.count, encoding.count[:, :, 1::2])
        empty = from_payload(torch.zeros_like(payload), layout)
        assert not encoder.decode(empty).any()  # an unwritten slot


@pytest.mark.parametrize("steps", [2, 4])
@pytest.mark.parametrize("dim", [64, 128])
def test_the_cache_takes_at_most_0_4_of_bf16(dim, steps):
    heads = 4
    module = make_attention(heads, heads, dim, kv_salient_steps=steps)
    groups = torch.zeros(heads, dim, dtype=torch.uint8)
    groups[:, 0] = 1  # 10 % of all channels: one in every head, the rest in the first
    groups[0, : heads * dim // 10 - heads + 1] = 1
    module.set_channel_groups(groups, groups.flip(1))
    key = torch.randn(1, heads, 3, dim, generator=torch.Generator().manual_seed(0))
    for payload in module._encode_key_value(key, key):
        assert payload.nbytes <= 0.4 * key.bfloat16().nbytes


def test_new_channel_groups_change_the_rows():
    module = make_attention(dim=64)
    _, key, value = operands(module, 0)
    before = module._encode_key_value(key, value)[0]
    groups = torch.zeros_like(module.k_encoder.channel_group)
    groups[0, 1:] = 1
    module.set_channel_groups(groups, groups)
    payload = module._encode_key_value(key, value)[0]
    assert payload.shape[-1] > before.shape[-1]
    for copied in (module, copy.deepcopy(module)):
        encoder = copied.k_encoder
        count = from_payload(payload, encoder.layout).count
        assert torch.equal(count, encoder.encode(key).count)


def test_without_a_cache_the_stand_in_only_encodes():
    key, value = EncodeOnWrite(None, lambda k, v: (k + 1, v + 2)).update(
        torch.zeros(1), torch.zeros(1), 0
    )
    assert (key.item(), value.item()) == (1, 2)


def test_channel_groups_that_do_not_exist_are_refused():
    module = make_attention()
    good = module.k_encoder.channel_group.clone()
    bad = torch.full_like(good, 2)
    with pytest.raises(ValueError, match=r"self_attn\.k: channel_group must lie in 0\.\.1"):
        module.set_channel_groups(bad, good)
    with pytest.raises(ValueError, match=r"self_attn\.v: channel_group must lie in 0\.\.1"):
        module.set_channel_groups(good, bad)
    with pytest.raises(ValueError, match=r"shape \(2, 8\), got \(8,\)"):
        module.set_channel_groups(good[0], good)
    module.k_encoder.channel_group = bad  # past every check: the C functions must not see it
    module._apply(lambda t: t)
    if get_backend("auto").name == "native":
        with pytest.raises(ValueError, match=r"self_attn\.k: channel_group must lie in"):
            module.native()


# -- inside the model ---------------------------------------------------------------------------------


def payloads(cache: Any, length: int) -> list[tuple[Tensor, Tensor]]:
    """Key and value payloads of the first tokens, a layer each."""
    return [(c.keys[:, :, :length], c.values[:, :, :length]) for c in cache.layers]


def run(model: Any, ids: Tensor, cache: Any) -> Tensor:
    logits: Tensor = model(ids, **{CACHE_ARGUMENT: cache}).logits
    return logits


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return load(tiny_checkpoint)


def make_cache(kind: str, model: Any, length: int) -> Any:
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=length + 4)


@torch.no_grad()
@pytest.mark.parametrize("view", list(View))
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("chunks", [[1] * 8, [4, 3, 1], [7, 1]])
def test_decoding_equals_prefill(model, token_ids, tolerance, kind, chunks, view):
    ids = token_ids[:2, :8]
    with use_view(model, view):
        whole = DynamicCache(config=model.config)
        expected = run(model, ids, whole)
        cache = make_cache(kind, model, 8)
        logits = torch.cat([run(model, part, cache) for part in ids.split(chunks, dim=1)], 1)
    bound = tolerance.reordered_sum * float(expected.abs().max())
    torch.testing.assert_close(logits, expected, rtol=0, atol=bound)
    first, second = zip(payloads(cache, 8), payloads(whole, 8), strict=True)
    for ours, theirs in zip(*first, strict=True):
        assert ours.dtype == torch.uint8
        assert torch.equal(ours, theirs)  # what block 0 encodes depends on the token alone
    attention = model.model.layers[1].self_attn
    encoders = (attention.k_encoder, attention.v_encoder)
    for ours, theirs, encoder in zip(*second, encoders, strict=True):
        # What block 1 encodes went through the float product P V of block 0.
        ours, theirs = (from_payload(x, encoder.layout) for x in (ours, theirs))
        assert torch.equal(ours.count, theirs.count)
        assert torch.equal(ours.zero_point, theirs.zero_point)
        relative = (ours.threshold / theirs.threshold - 1).abs().max()
        assert relative < tolerance.reordered_sum


@torch.no_grad()
def test_keys_and_values_are_encoded_once_a_token(model, token_ids, monkeypatch):
    rows = []
    attention = model.model.layers[1].self_attn
    encode = attention._encode_key_value

    def counting(key, value):
        rows.append(key.shape[-2])
        return encode(key, value)

    monkeypatch.setattr(attention, "_encode_key_value", counting)
    cache = DynamicCache(config=model.config)
    for part in token_ids[:1, :8].split([5, 1, 1, 1], dim=1):
        run(model, part, cache)
    assert rows == [5, 1, 1, 1]


@torch.no_grad()
@pytest.mark.parametrize("view", list(View))
def test_later_tokens_do_not_change_earlier_outputs(model, token_ids, view):
    ids = token_ids[:2, :16].clone()
    with use_view(model, view):
        before = model(ids).logits
        ids[:, 10:] = ids[:, 10:].flip(1)
        after = model(ids).logits
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.equal(before[:, 10:], after[:, 10:])


@torch.no_grad()
@pytest.mark.parametrize("view", list(View))
def test_a_bool_mask_masks(model, token_ids, view):
    ids = token_ids[:2, :9]
    seen = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    with use_view(model, view):
        assert torch.equal(model(ids, attention_mask=seen).logits, model(ids).logits)


def test_a_row_without_keys_is_no_nan():
    module = make_attention()
    query, key, value = operands(module, 1)
    seen = torch.ones(1, 1, 3, 5, dtype=torch.bool).tril(1)
    seen[..., 0, :] = False
    blocked = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    stored = module._encode_key_value(key, value)
    ours, theirs = (
        spiking_attention(module, query, *stored, mask, 0.5)[1] for mask in (seen, blocked)
    )
    assert torch.isfinite(ours).all()
    assert torch.equal(ours[:, :, 1:], theirs[:, :, 1:])
    assert torch.equal(ours[:, :, 1:] > 0, seen[:, :, 1:].expand(2, 4, 2, 5))
    ours, theirs = (
        calibration_attention(module, query, key, value, mask, 0.5)[1] for mask in (seen, blocked)
    )
    assert torch.equal(ours[:, :, 1:], theirs[:, :, 1:])


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("attention", ["encoded", "float"])
def test_left_padding_changes_nothing(convert_tiny, token_ids, tolerance, attention, kv_heads):
    folder = convert_tiny(overrides={"attention": attention}, num_key_value_heads=kv_heads)[1]
    model = load(folder)
    short, long = token_ids[:1, :7], token_ids[1:2, :12]
    ids = torch.cat([torch.nn.functional.pad(short, (5, 0)), long])
    mask = torch.tensor([[0] * 5 + [1] * 7, [1] * 12])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    for ours, alone in ((logits[0, 5:], short), (logits[1], long)):
        expected = model(alone).logits[0]
        bound = tolerance.reordered_sum * float(expected.abs().max())
        torch.testing.assert_close(ours, expected, rtol=0, atol=bound)
    assert torch.isfinite(logits).all()


@torch.no_grad()
def test_attention_left_in_float(convert_tiny, token_ids):
    model = load(convert_tiny(overrides={"attention": "float"})[1])
    assert model.config._attn_implementation == "sdpa"
    assert type(model.model.layers[0].self_attn) is ProjectedAttention
    outputs = []
    for view in View:
        with use_view(model, view):
            outputs.append(model(token_ids[:2]).logits)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@torch.no_grad()
def test_beams_reorder_the_encoded_cache(model, token_ids):
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    out = model.generate(token_ids[:2, :8], **options)
    assert torch.equal(out, model.generate(token_ids[:2, :8], use_cache=False, **options))


def test_power_of_two_capacity_is_refused_by_name():
    module = make_attention(capacity="power_of_two")
    module.check_view(View.COLLAPSED)
    for view in (View.UNROLLED, View.BINARY):
        with pytest.raises(
            ValueError, match=r"model\.layers\.0\.self_attn: capacity='power_of_two'"
        ):
            module.check_view(view)


# -- calibration ----------------------------------------------------------------------------------------


def test_calibration_attention_is_float_attention_with_an_observer(tolerance):
    module = make_attention()
    query, key, value = operands(module, 5)
    seen = []
    module.attention_observer = lambda *tensors: seen.extend(tensors)
    mask = torch.full((3, 5), -1e9).triu(3)
    out, probability = calibration_attention(module, query, key, value, mask, 0.5)
    expected = (query @ repeat_kv(key, 2).mT * 0.5 + mask).softmax(-1)
    torch.testing.assert_close(probability, expected, rtol=0, atol=tolerance.reordered_sum)
    torch.testing.assert_close(out, (expected @ repeat_kv(value, 2)).transpose(1, 2))
    for ours, theirs in zip(seen, (query, key, value, probability), strict=True):
        assert torch.equal(ours, theirs)
    del module.attention_observer
    assert torch.equal(calibration_attention(module, query, key, value, mask, 0.5)[0], out)


@pytest.mark.parametrize("name", [SPIKING_ATTENTION, CALIBRATION_ATTENTION])
def test_registered_with_a_mask(name):
    register_attention()
    assert name in AttentionMaskInterface()  # otherwise transformers passes no mask at all
