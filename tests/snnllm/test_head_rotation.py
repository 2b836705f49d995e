"""The rotation of Q and K: their product stays the same number, kernels have the bits of torch."""

from __future__ import annotations

import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama import modeling_llama

from snnllm.config import SpikeConfig
from snnllm.conversion import convert
from snnllm.hadamard import hadamard_transform
from snnllm.head_rotation import HeadRotation, fits_kernel
from snnllm.kernels.triton.backend import TritonBackend
from snnllm.modeling import load
from snnllm.transforms import salient_count

NO_TRITON = TritonBackend().available()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = (8, 64, 80, 96, 128)


def make(kv_heads: int, channels: int, ratio: float = 0.1, seed: int = 0) -> HeadRotation:
    """A rotation whose heads have salient channels of their own."""
    salient = salient_count(channels, ratio)
    rotation = HeadRotation(kv_heads, channels, salient, "model.layers.0.self_attn.qk_rotation")
    draw = torch.rand(kv_heads, channels, generator=torch.Generator().manual_seed(seed))
    rotation.sort((draw.argsort(-1) < salient).to(torch.uint8))
    return rotation


def operand(heads: int, channels: int, seed: int, tokens: int = 3, batch: int = 2) -> Tensor:
    """Q or K as projections give it: heads behind tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, heads, channels, generator=generator).transpose(1, 2)


@pytest.mark.parametrize("channels", SIZES)
@pytest.mark.parametrize("ratio", [0.0, 0.05, 0.1])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_products_of_queries_and_keys_stay_the_same(channels, ratio, heads, kv_heads):
    rotation = make(kv_heads, channels, ratio)
    query, key = operand(heads, channels, 1), operand(kv_heads, channels, 2)
    rotated_query, rotated_key = rotation(query), rotation(key)
    assert rotated_query.shape == query.shape
    assert not torch.allclose(rotated_key, key)
    share = heads // kv_heads
    expected = query @ key.repeat_interleave(share, 1).mT
    product = rotated_query @ rotated_key.repeat_interleave(share, 1).mT
    torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-4)


def test_groups_do_not_mix_and_blocks_are_butterflies_of_the_order():
    rotation = make(2, 64, 0.1)
    assert rotation.blocks == (32, 16, 8, 8)
    assert rotation.macs == 32 * 5 + 16 * 4 + 16 * 3
    key = operand(2, 64, 0)
    out = rotation(key)
    for head in range(2):
        ordered = key[:, head, :, rotation.order[head].long()]
        first = 0
        for p in rotation.blocks:
            block = hadamard_transform(ordered[..., first : first + p])
            assert torch.equal(out[:, head, :, first : first + p], block)
            first += p
    assert out.dtype == rotation(key.half()).dtype == torch.float32


def test_a_float_model_is_the_same_function(make_llama, token_ids, monkeypatch):
    model = make_llama()
    config = model.config
    rotation = make(config.num_key_value_heads, config.hidden_size // config.num_attention_heads)
    with torch.no_grad():
        expected = model(token_ids).logits
        turn, calls = modeling_llama.apply_rotary_pos_emb, []

        def rotated(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            calls.append(args)
            query, key = turn(*args, **kwargs)
            return rotation(query), rotation(key)

        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotated)
        logits = model(token_ids).logits
    assert len(calls) == config.num_hidden_layers
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_gradients_are_those_of_the_matrix():
    rotation = make(2, 8)
    x = operand(4, 8, 0).requires_grad_()
    weight = operand(4, 8, 1)
    (rotation(x) * weight).sum().backward()
    unit = torch.eye(8).expand(1, 2, 8, 8)
    matrix = rotation(unit)[0].repeat_interleave(2, 0)
    torch.testing.assert_close(x.grad, weight @ matrix.mT)


def test_an_order_that_is_none_is_refused():
    rotation, x = make(2, 8), operand(2, 8, 0)
    expected = rotation(x)
    with pytest.raises(ValueError, match=r"expected channel groups \(2, 8\), got \(2, 4\)"):
        rotation.sort(torch.zeros(2, 4))
    copies = deepcopy(rotation), pickle.loads(pickle.dumps(rotation))
    rotation.order[1, 2] = 200
    with pytest.raises(ValueError, match=r"qk_rotation: the order .* every channel 0\.\.7 once"):
        rotation(x)
    rotation.order[1, 2] = rotation.order[1, 3]
    with pytest.raises(ValueError, match=r"in each of 2 heads"):
        rotation(x)
    for copy in copies:
        assert torch.equal(copy(x), expected)
    with pytest.raises(ValueError, match="at most 256 channels, got 512"):
        HeadRotation(1, 512, 0, "q")


def test_an_order_on_meta_is_not_checked():
    make(2, 8).to("meta").check_order()  # as transformers has offloaded buffers


def test_wide_heads_are_refused_before_any_work(make_llama, token_ids, tmp_path):
    model = make_llama(head_dim=512)
    with pytest.raises(ValueError, match="heads of 512 channels; Q and K are rotated up to 256"):
        convert(model, tmp_path / "out", SpikeConfig(), token_ids, pipeline="rotated")


def test_a_damaged_order_is_refused_on_loading(make_llama, token_ids, tmp_path):
    spike = SpikeConfig(salient_ratio=0.25)
    convert(make_llama(), tmp_path / "out", spike, token_ids[:2], pipeline="rotated")
    model = load(tmp_path / "out")
    model.model.layers[1].self_attn.qk_rotation.order[0] = 3
    model.save_pretrained(tmp_path / "damaged")
    with pytest.raises(
        ValueError, match=r"layers\.1\.self_attn\.qk_rotation: the order of Q and K"
    ):
        load(tmp_path / "damaged")


@pytest.mark.parametrize(
    ("blocks", "fits"),
    [
        ((64, 32, 16, 16), True),
        ((4, 2, 1, 1), True),
        ((4, 2, 2), True),
        ((64, 16, 8, 4, 8), False),
        ((4, 2), False),
        ((32, 8, 2, 1), False),
    ],
)
def test_blocks_that_kernels_take(blocks, fits):
    assert fits_kernel(blocks) == fits


# -- kernels ------------------------------------------------------------------------------------------

triton_only = pytest.mark.skipif(NO_TRITON is not None, reason=f"triton kernels: {NO_TRITON}")


@triton_only
@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    channels=st.sampled_from([8, 12, 20, 64, 80, 96, 128, 256]),
    ratio=st.sampled_from([0.0, 0.05, 0.1, 0.3, 1.0]),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    tokens=st.integers(0, 3),
    scale=st.sampled_from([0.0, 1e-30, 1.0, 1e30]),
    seed=st.integers(0, 2**16),
)
def test_the_kernel_has_the_bits_of_torch(channels, ratio, heads, dtype, tokens, scale, seed):
    from snnllm.kernels.attention.rotation import rotate_operand

    rotation = make(heads[1], channels, ratio, seed).to(DEVICE)
    if not fits_kernel(rotation.blocks):
        return
    x = (operand(heads[0], channels, seed, tokens) * scale).to(dtype)
    got = rotate_operand(x.to(DEVICE), rotation.order, rotation.blocks)
    assert got.is_contiguous()
    # A half that overflowed is infinite here, and NaN where two of them meet.
    torch.testing.assert_close(got.cpu(), rotation.cpu()(x), rtol=0, atol=0, equal_nan=True)


@triton_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_module_runs_the_kernel_where_kernels_run(monkeypatch, dtype):
    from snnllm.kernels.attention import rotation as head_rotation_triton

    rotation, calls = make(2, 64), []
    x = operand(4, 64, 0).to(dtype)
    expected = rotation(x)
    kernel = head_rotation_triton.rotate_operand
    monkeypatch.setattr(
        head_rotation_triton, "rotate_operand", lambda *args: (calls.append(1), kernel(*args))[1]
    )
    monkeypatch.setattr("snnllm.shared_input.kernels_run_on", lambda _: True)
    rotation, x = rotation.to(DEVICE), x.to(DEVICE)
    assert torch.equal(rotation(x).cpu(), expected)
    assert calls == [1]
    assert rotation(x.requires_grad_()).requires_grad  # torch: the kernel has no gradient
    assert rotation(x.detach().double()).dtype == torch.float32
    assert calls == [1]


@triton_only
@pytest.mark.parametrize("kernels", [False, True])
def test_it_is_one_graph_for_the_compiler(monkeypatch, kernels):
    rotation, x = make(2, 64).to(DEVICE), operand(4, 64, 0).to(DEVICE)
    expected = rotation(x)
    monkeypatch.setattr("snnllm.shared_input.kernels_run_on", lambda _: kernels)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(rotation, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), expected)


@triton_only
def test_the_operator_keeps_its_promises():
    rotation = make(2, 64).to(DEVICE)
    x = operand(4, 64, 0).to(DEVICE)
    torch.library.opcheck(
        torch.ops.snnllm.rotate_operand.default,
        (x, rotation.order, list(rotation.blocks)),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("channels", SIZES)
@pytest.mark.parametrize("tokens", [1, 700])
def test_many_rows_on_a_gpu_have_the_bits_of_the_cpu(channels, tokens):
    rotation, x = make(2, channels), operand(8, channels, 0, tokens)
    expected = rotation(x)
    with torch.no_grad():
        assert torch.equal(rotation.to(DEVICE)(x.to(DEVICE)).cpu(), expected)
