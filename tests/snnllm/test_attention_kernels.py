"""Attention in Triton: payloads bit for bit, outputs of the torch path up to rounding, hidden keys unread.

Without a GPU the kernels run in Triton's interpreter, so the sizes are small.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, StaticCache

from snnllm.attention import SpikingLlamaAttention, spiking_attention
from snnllm.block import CACHE_ARGUMENT
from snnllm.cache import RowEncoder, from_payload, to_payload
from snnllm.config import SpikeConfig
from snnllm.execution import View, use_view
from snnllm.head_rotation import HeadRotation
from snnllm.kernels.attention.backend import TritonAttention
from snnllm.kernels.triton.backend import TritonBackend
from snnllm.modeling import load
from tests.snnllm.random_attention import kernels_of, random_attention

pytest.importorskip("triton", reason="the package triton is not installed")
from snnllm.kernels.attention import launch as attention_launch
from snnllm.kernels.attention import operators as attention_ops

REASON = TritonBackend().available()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"triton kernels: {REASON}")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
BLOCK = 64  # of keys, at most


def make(
    heads: int = 4, kv_heads: int = 2, dim: int = 8, seed: int = 0, **spike: Any
) -> tuple[SpikingLlamaAttention, TritonAttention]:
    """A block whose heads have different numbers of salient channels, and its kernels."""
    values = {"salient_ratio": 0.3, **spike}
    module, _ = random_attention(heads, kv_heads, dim, seed=seed, device=DEVICE, **values)
    return module, kernels_of(module)


def operands(
    module: SpikingLlamaAttention, seed: int, batch: int, q_len: int, k_len: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K and V with an outlier channel, as projections give them: heads behind tokens."""
    generator = torch.Generator().manual_seed(seed)
    kv_heads, dim = module.k_encoder.channel_group.shape
    heads = kv_heads * module.num_key_value_groups
    shapes = ((q_len, heads), (k_len, kv_heads), (k_len, kv_heads))
    query, key, value = (torch.randn(batch, *s, dim, generator=generator) for s in shapes)
    key[..., 0] *= 20
    return tuple(x.to(DEVICE).transpose(1, 2) for x in (query, key, value))  # type: ignore[return-value]


def mask_of(kind: str, batch: int, q_len: int, k_len: int) -> Tensor | None:
    """A mask as transformers makes it: causal, from the left padded, for a cache with empty slots."""
    if kind == "none":
        return None
    used = k_len if "empty" not in kind else max(k_len // 2, 1)
    seen = torch.ones(batch, 1, q_len, k_len, dtype=torch.bool).tril(used - q_len)
    if "pad" in kind:
        seen[0, ..., : k_len // 3] = False
    if kind.endswith("bool"):
        return seen.to(DEVICE)
    dtype = torch.float16 if kind.endswith("half") else torch.float32
    return (
        torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min).to(DEVICE)
    )


def reference(
    module: SpikingLlamaAttention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor:
    """Output of the torch path."""
    module._kernels = None
    dim = module.k_encoder.channel_group.shape[-1]
    return spiking_attention(module, query, key, value, mask, dim**-0.5)[0]


def check(
    module: SpikingLlamaAttention,
    kernels: TritonAttention,
    x: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    bound: float,
) -> None:
    """The kernels give the torch path's output, and zeros where a query sees no key."""
    key, value = kernels.encode(x[1], x[2])
    out = kernels.attend(x[0], key, value, mask, x[0].shape[-1] ** -0.5, x[0].dtype)
    expected = reference(module, x[0], key, value, mask)
    assert out.shape == expected.shape
    assert out.dtype == expected.dtype
    if mask is not None:
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
        blind = ~seen.any(-1)[:, 0].expand(out.shape[:2])
        assert not out[blind].any()
        expected = expected.masked_fill(blind[..., None, None], 0)
    atol = bound * float(x[2].abs().max())
    torch.testing.assert_close(out.float(), expected.float(), rtol=0, atol=atol)


@settings(max_examples=15 if INTERPRETED else 40, derandomize=True, deadline=None)
@given(
    bits=st.sampled_from([1, 3, 4]),
    steps=st.sampled_from([2, 3, 4]),
    ratio=st.sampled_from([0.0, 0.3]),
    shared=st.booleans(),
    dim=st.sampled_from([2, 8, 20, 66]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    scale=st.sampled_from([0.0, 1e-7, 1.0, 1e3]),
    seed=st.integers(0, 2**16),
)
def test_payloads_are_those_of_the_encoder(bits, steps, ratio, shared, dim, dtype, scale, seed):
    module, kernels = make(
        *(4, 2, dim, seed),
        activation_bits=bits,
        kv_salient_steps=steps,
        salient_ratio=ratio,
        value_range="shared" if shared else "split",
        activation_clip=0.9,
    )
    _, key, value = operands(module, seed, 2, 1, 3)
    key = (key * scale).to(dtype)  # that of V may differ: a rotated K is float32
    for ours, x, encoder in zip(
        kernels.encode(key, value), (key, value), (module.k_encoder, module.v_encoder), strict=True
    ):
        assert torch.equal(ours, to_payload(encoder.encode(x), encoder.layout))


@settings(max_examples=12 if INTERPRETED else 40, derandomize=True, deadline=None)
@given(
    heads=st.sampled_from([(2, 2), (3, 1)]),
    dim=st.sampled_from([8, 24, 64, 80, 128]),  # powers of two: rotated in the encoder's kernel
    ratio=st.sampled_from([0.0, 0.1, 0.25]),
    shared=st.booleans(),
    rotation=st.sampled_from(["groups", "groups", "none"]),
    offset=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([0.0, 1e-7, 1.0, 1e3]),
    tokens=st.integers(0, 2),
    seed=st.integers(0, 2**16),
)
def test_payloads_are_those_of_the_encoder_behind_rotation_and_offset(
    heads, dim, ratio, shared, rotation, offset, dtype, scale, tokens, seed
):
    spike = {"salient_ratio": ratio, "value_range": "shared" if shared else "split"}
    module, kernels = make(*heads, dim, seed, rotation=rotation, key_offset=offset, **spike)
    _, key, value = operands(module, seed, 1, 1, tokens)
    key = (key * scale).to(dtype)
    payloads = kernels.encode(key, value)
    currents = (module.k_encoder, module.key_current(key)), (module.v_encoder, value)
    for ours, (encoder, x) in zip(payloads, currents, strict=True):
        assert torch.equal(ours, to_payload(encoder.encode(x), encoder.layout))


@pytest.mark.parametrize("query_groups", [False, True])
@pytest.mark.parametrize("steps", [2, 4])
def test_unpacked_counts_are_those_of_the_encoder(query_groups, steps):
    module, kernels = make(6, 2, 10, kv_salient_steps=steps, query_groups=query_groups)
    query, key, _ = operands(module, 3, 2, 5, 7)
    group = module.k_encoder.channel_group
    for encoder, x in ((module.q_encoder, query), (module.k_encoder, key)):
        layout, encoding = encoder.layout, encoder.encode(x)
        code, scale = attention_launch.unpack(
            *(to_payload(encoding, layout), kernels.key_slot, kernels.member, None, 16),
            *(layout.groups, 2, layout.planes, layout.plane_bytes),
        )
        centred = encoder.centre(encoding).flatten(0, 1)
        for pair, rows in enumerate(centred):
            salient = group[pair % x.shape[1] // (x.shape[1] // 2)] == 1
            few = int(salient.sum())
            ours = code[pair, : rows.shape[0]].short()
            assert torch.equal(ours[:, :10][:, ~salient], rows[:, ~salient])
            assert not ours[:, :10][:, salient].any()
            assert torch.equal(ours[:, 32 : 32 + few], rows[:, salient])
            assert not ours[:, 32 + few :].any()
        threshold = encoding.threshold.flatten(0, 1).mT
        assert torch.equal(scale[..., : threshold.shape[-1]], threshold)


@settings(max_examples=5 if INTERPRETED else 25, derandomize=True, deadline=None)
@given(
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    dim=st.sampled_from([8, 24]),
    lengths=st.sampled_from([(1, 1), (1, 40), (2, 37), (18, 37), (20, 20)]),
    kind=st.sampled_from(["none", "causal", "pad", "pad bool", "pad empty half", "empty bool"]),
    ratio=st.sampled_from([0.0, 0.3]),
    steps=st.sampled_from([2, 4]),
    query_groups=st.booleans(),
    shared=st.booleans(),
    rotation=st.sampled_from(["none", "groups"]),
    offset=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_outputs_are_those_of_the_torch_path(
    tolerance, heads, dim, lengths, kind, ratio, steps, query_groups, shared, rotation, offset, seed
):
    module, kernels = make(
        *(*heads, dim, seed),
        salient_ratio=ratio,
        kv_salient_steps=steps,
        query_groups=query_groups and ratio > 0,
        value_range="shared" if shared else "split",
        rotation=rotation,
        key_offset=offset,
    )
    batch = 2 if "pad" in kind else 1  # the first entry is padded
    x = operands(module, seed, batch, *lengths)
    check(module, kernels, x, mask_of(kind, batch, *lengths), tolerance.two_terms)


@settings(max_examples=4 if INTERPRETED else 25, derandomize=True, deadline=None)
@given(
    heads=st.sampled_from([(2, 2), (10, 1)] if INTERPRETED else [(2, 2), (18, 2)]),
    lengths=st.sampled_from([(9, 9), (9, 17)] if INTERPRETED else [(9, 9), (17, 137)]),
    kind=st.sampled_from(["none", "causal", "pad bool"]),
    steps=st.sampled_from([2, 4]),
    ratio=st.sampled_from([0.0, 0.3]),
    query_groups=st.booleans(),
    rotation=st.sampled_from(["none", "groups"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_views_have_the_same_outputs(
    heads, lengths, kind, steps, ratio, query_groups, rotation, dtype, seed
):
    """Bit for bit: the float sums are those of one kernel, whatever view has made the integers."""
    module, kernels = make(
        *(*heads, 8, seed),
        salient_ratio=ratio,
        kv_salient_steps=steps,
        query_groups=query_groups and ratio > 0,
        rotation=rotation,
        key_offset=True,
    )
    module._kernels = kernels
    batch = 2 if "pad" in kind else 1  # the first entry is padded
    query, key, value = (t.to(dtype) for t in operands(module, seed, batch, *lengths))
    mask, outputs = mask_of(kind, batch, *lengths), []
    for view, recorded in ((View.COLLAPSED, True), *((view, False) for view in View)):
        hooks = []
        if recorded:  # whoever looks at the neurons sees them run
            encoders = (module.q_encoder, module.k_encoder, module.v_encoder)
            hooks = [e.node.register_forward_hook(lambda *_: None) for e in encoders]
            assert module.kernels() is None
        with use_view(module, view), torch.no_grad():
            payloads = module._encode_key_value(key, value)
            outputs.append(spiking_attention(module, query, *payloads, mask, 8**-0.5)[0])
        for hook in hooks:
            hook.remove()
    assert bool(outputs[0].isfinite().all())
    assert all(torch.equal(out, outputs[0]) for out in outputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [(1, 20), (20, 20)])
def test_half_precision_stays_within_its_rounding(tolerance, dtype, lengths):
    module, kernels = make(4, 2, 16)
    x = operands(module, 1, 1, *lengths)
    halves = tuple(t.to(dtype) for t in x)
    mask = mask_of("causal", 1, *lengths)
    check(module, kernels, halves, mask, tolerance.half_precision)  # type: ignore[arg-type]


@pytest.mark.parametrize("q_len", [1, 12])
def test_keys_behind_the_mask_are_not_read(q_len):
    module, kernels = make()
    query, key, value = operands(module, 0, 1, q_len, 16)
    cache = [torch.nn.functional.pad(p, (0, 0, 0, 3 * BLOCK)) for p in kernels.encode(key, value)]
    mask = torch.zeros(1, 1, q_len, 16 + 3 * BLOCK, dtype=torch.bool, device=DEVICE)
    mask[..., :16] = torch.ones(q_len, 16, device=DEVICE).tril(16 - q_len) > 0
    empty = kernels.attend(query, *cache, mask, 0.3, query.dtype)
    for payload in cache:
        payload[:, :, BLOCK:] = 255  # thresholds that are NaN
    assert torch.equal(kernels.attend(query, *cache, mask, 0.3, query.dtype), empty)
    alone = kernels.attend(query, *(p[:, :, :16] for p in cache), mask[..., :16], 0.3, query.dtype)
    torch.testing.assert_close(alone, empty, rtol=0, atol=1e-4)


def test_a_bias_is_added(tolerance):
    module, kernels = make()
    x = operands(module, 0, 1, 12, 20)
    bias = torch.randn(1, 1, 12, 20, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    check(module, kernels, x, bias, tolerance.two_terms)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_masks_are_broadcast_and_fit(tolerance, kind):
    module, kernels = make()
    x = operands(module, 0, 1, 12, 20)
    seen = (torch.arange(20, device=DEVICE) % 3 > 0).view(1, 1, 1, 20)
    mask = (
        seen if kind == torch.bool else torch.zeros(seen.shape).to(DEVICE).masked_fill(~seen, -9.0)
    )
    check(module, kernels, x, mask.expand(1, 1, 12, 20).contiguous(), tolerance.two_terms)
    payloads = kernels.encode(*x[1:])
    wide = kernels.attend(x[0], *payloads, mask.expand(1, 1, 12, 20).contiguous(), 0.3, x[0].dtype)
    assert torch.equal(kernels.attend(x[0], *payloads, mask, 0.3, x[0].dtype), wide)
    with pytest.raises(RuntimeError, match="size"):
        kernels.attend(x[0], *payloads, mask[..., :15], 0.3, x[0].dtype)


def test_no_rows_and_no_keys():
    module, kernels = make()
    query, key, value = operands(module, 0, 2, 3, 0)
    payloads = kernels.encode(key, value)
    assert payloads[0].shape == (2, 2, 0, module.k_encoder.layout.width)
    assert not kernels.attend(query, *payloads, None, 0.3, query.dtype).any()
    assert kernels.attend(query[:, :, :0], *payloads, None, 0.3, query.dtype).shape == (2, 0, 4, 8)


def test_a_hole_of_whole_blocks_is_not_read(tolerance, monkeypatch):
    module, kernels = make()
    x = operands(module, 0, 1, 12, 3 * BLOCK)
    mask = torch.ones(1, 1, 12, 3 * BLOCK, dtype=torch.bool, device=DEVICE)
    mask[..., 10 : 2 * BLOCK + 5] = False
    empty = Tensor.new_empty

    def full_of_nan(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = empty(self, *args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else 77)

    monkeypatch.setattr(Tensor, "new_empty", full_of_nan)
    check(module, kernels, x, mask, tolerance.two_terms)


@pytest.mark.parametrize("q_len", [1, 12])
@pytest.mark.parametrize("rotation", ["none", "groups"])
def test_the_operators_keep_their_promises(q_len, rotation):
    module, kernels = make(query_groups=True, rotation=rotation, key_offset=True)
    query, key, value = operands(module, 0, 1, q_len, 16)
    calls: list[tuple[Any, tuple[Any, ...]]] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("encode_key_value", "attend"):
            operator = getattr(attention_ops, name)

            def call(*args: Any, operator: Any = operator, name: str = name) -> Any:
                calls.append((getattr(torch.ops.snnllm, name).default, args))
                return operator(*args)

            patch.setattr(attention_ops, name, call)
        payloads = kernels.encode(key, value)
        kernels.attend(query, *payloads, mask_of("causal", 1, q_len, 16), 0.3, query.dtype)
    assert len(calls) == 2
    for operator, args in calls:
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("spike", "reason"),
    [
        ({"activation_bits": 8}, "beyond 4 bits"),
        ({"activation_bits": 5}, "beyond 4 bits"),
        ({"kv_salient_steps": 5}, "of salient channels beyond 6"),
    ],
)
def test_what_the_kernels_refuse(spike, reason):
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    module = SpikingLlamaAttention(config, 0, SpikeConfig(**spike)).to(DEVICE)
    refused = TritonAttention.refusal(module.q_encoder, module.k_encoder, module.v_encoder)
    assert reason in str(refused)
    wide = LlamaConfig(hidden_size=512, num_attention_heads=2, num_key_value_heads=2)
    module = SpikingLlamaAttention(wide, 0, SpikeConfig()).to(DEVICE)
    encoders = (module.q_encoder, module.k_encoder, module.v_encoder)
    assert "heads of more than 128 channels" in str(TritonAttention.refusal(*encoders))
    four, two = (HeadRotation(2, channels, 0, "q") for channels in (4, 8))
    encoders = tuple(RowEncoder(torch.zeros(2, 4, dtype=torch.uint8)) for _ in range(3))
    assert TritonAttention.refusal(*encoders) is None
    assert "in blocks of (4,) channels" in str(TritonAttention.refusal(*encoders, four))
    assert TritonAttention.refusal(*encoders, two) is None


def test_what_the_kernels_leave_to_torch():
    _, kernels = make()
    x = torch.zeros(2, 4, 3, 8)
    assert kernels.takes(x, None)
    assert kernels.takes(x.bfloat16(), torch.zeros(2, 1, 3, 5))
    assert not kernels.takes(x.double(), None)
    assert not kernels.takes(x, torch.zeros(2, 4, 3, 5))  # a mask of every head
    assert not kernels.takes(x, torch.zeros(2, 1, 3, 5, dtype=torch.float64))


# -- inside the model ---------------------------------------------------------------------------------


@pytest.fixture
def model(tiny_checkpoint, monkeypatch):
    """The tiny model on the kernels, also in the interpreter."""
    monkeypatch.setattr(SpikingLlamaAttention, "_prepare_kernels", kernels_of)
    return load(tiny_checkpoint).to(DEVICE)


def without(model: Any) -> Any:
    for block in model.model.layers:
        block.self_attn._kernels = None
    return model


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_a_model_decodes_on_the_kernels(model, token_ids, tolerance, monkeypatch, static):
    ids = token_ids[:2, :9].to(DEVICE)
    calls = []
    attend = TritonAttention.attend
    monkeypatch.setattr(
        TritonAttention, "attend", lambda *args: (calls.append(args[1].shape[2]), attend(*args))[1]
    )
    cache: Any = DynamicCache(config=model.config)
    if static:
        cache = StaticCache(config=model.config, max_cache_len=24)
    logits = [model(p, **{CACHE_ARGUMENT: cache}).logits for p in ids.split([7, 1, 1], 1)]
    assert calls == [7, 7, 1, 1, 1, 1]
    expected = without(model)(ids).logits
    bound = 100 * tolerance.two_terms * float(expected.abs().max())
    # The weights of the model are wide: a count of the next block may differ by one.
    assert (torch.cat(logits, 1) - expected).abs().median() < bound
    first = model.model.layers[0].self_attn
    for stored, encoder in (
        (cache.layers[0].keys, first.k_encoder),
        (cache.layers[0].values, first.v_encoder),
    ):
        assert stored.shape[-1] == encoder.layout.width
        assert from_payload(stored, encoder.layout).count.shape[-1] == 8


def test_kernels_run_on_a_gpu_only(tiny_checkpoint):
    attention: Any = load(tiny_checkpoint).to(DEVICE).model.layers[0].self_attn
    assert (attention.kernels() is None) == (DEVICE == "cpu")


@torch.no_grad()
def test_views_have_the_same_logits(model, token_ids):
    ids = token_ids[:1, :5].to(DEVICE)
    logits = []
    for view in (View.COLLAPSED, View.UNROLLED) if INTERPRETED else View:
        with use_view(model, view):
            logits.append(model(ids).logits)
    assert all(torch.equal(other, logits[0]) for other in logits)


@torch.no_grad()
def test_few_queries_of_other_views_and_asked_probabilities_run_on_torch(
    model, token_ids, monkeypatch
):
    ids = token_ids[:1, :6].to(DEVICE)

    def forbidden(*_: Any) -> Any:
        raise AssertionError("the kernels have no P")

    monkeypatch.setattr(TritonAttention, "attend", forbidden)
    monkeypatch.setattr(TritonAttention, "attend_steps", forbidden)
    out = model(ids, output_attentions=True)
    assert [p.shape for p in out.attentions] == [(1, 4, 6, 6)] * 2
    with use_view(model, View.UNROLLED):
        model(ids[:, :1])  # few queries
        model(ids, output_attentions=True)
        with pytest.raises(AssertionError, match="no P"):
            model(ids)
    with pytest.raises(AssertionError, match="no P"):
        model(ids)


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_one_graph_for_the_compiler(model, token_ids, static):
    ids = token_ids[:1, :8].to(DEVICE)
    arguments: dict[str, Any] = {"use_cache": static}
    if static:
        arguments[CACHE_ARGUMENT] = StaticCache(config=model.config, max_cache_len=24)
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = "reference" if hasattr(module, "weight_codes") else module.backend
    expected = model(ids).logits  # prepares the weights
    graphs = []

    def keep(graph: Any, _: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    logits = torch.compile(model, fullgraph=True, backend=keep)(ids, **arguments).logits
    # With a cache for more tokens there are more blocks of keys, hidden ones.
    torch.testing.assert_close(logits, expected)
    assert len(graphs) == 1
    assert graphs[0].count("snnllm.attend") == graphs[0].count("snnllm.encode_key_value") == 2


def test_operands_have_no_commensurate_thresholds() -> None:
    with pytest.raises(ValueError, match="operands of attention"):
        RowEncoder(torch.zeros(2, 4, dtype=torch.uint8), (1, 2), 4, value_range="commensurate")
