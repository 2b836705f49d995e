"""Rotations inside saliency groups change the basis, not the function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from snnllm.hadamard import OnlineRotation, rotation_blocks
from snnllm.head_rotation import HeadRotation
from snnllm.sources import ModelSource, dense_model, open_source
from snnllm.transforms import (
    RotatedSource,
    SignedOrder,
    group_rotation,
    orthogonal,
    pair_signs,
    power_of_two_factor,
    salient_count,
    sorted_groups,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_groups(channels: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2, (channels,), generator=generator(seed), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("channels", "ratio", "count"),
    [
        (576, 0.1, 64),
        (1536, 0.1, 128),
        (64, 0.1, 8),
        (4096, 0.05, 256),
        (576, 0.0, 0),
        (4, 0.01, 1),
    ],
)
def test_salient_counts_are_powers_of_two(channels: int, ratio: float, count: int) -> None:
    assert salient_count(channels, ratio) == count


@pytest.mark.parametrize("size", [0, 1, 2, 7, 8, 12, 56, 64, 88])
def test_rotations_are_orthogonal_and_spread_every_channel(size: int) -> None:
    rotation = orthogonal(size, generator())
    assert rotation.shape == (size, size)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(size, dtype=torch.float64))
    if power_of_two_factor(max(size, 1)) == size > 1:  # a Hadamard matrix: all entries alike
        torch.testing.assert_close(rotation.abs(), torch.full_like(rotation, size**-0.5))


def test_groups_do_not_mix() -> None:
    group = random_groups(24)
    rotation = group_rotation(group, generator())
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(24, dtype=torch.float64))
    new = sorted_groups(group)
    mixed = group[:, None] != new[None, :]
    assert not rotation[mixed].any()
    assert torch.equal(new.bincount(), group.bincount())


@pytest.mark.parametrize(
    ("sizes", "blocks"),
    [
        ((9984, 1024), (256,) * 43),
        ((1408, 128), (*(256,) * 5, 128, 128)),
        ((11, 4), (8, 2, 1, 4)),
        ((255,), (128, 64, 32, 16, 8, 4, 2, 1)),
    ],
)
def test_groups_are_cut_into_powers_of_two(sizes: tuple[int, ...], blocks: tuple[int, ...]) -> None:
    assert rotation_blocks(sizes) == blocks


@pytest.mark.parametrize("sizes", [(56, 8), (11, 4), (16,), (12, 0), (600, 300)])
def test_an_online_rotation_is_the_matrix_it_says(sizes: tuple[int, ...]) -> None:
    rotation, channels = OnlineRotation(sizes), sum(sizes)
    matrix = rotation.matrix()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(channels))
    x = torch.randn(3, 5, channels, generator=generator(1))
    torch.testing.assert_close(rotation(x), x @ matrix, rtol=1e-5, atol=1e-5)
    block = torch.repeat_interleave(torch.tensor(rotation.blocks))
    for number, p in enumerate(rotation.blocks):  # every channel of a block goes to all of it
        own = matrix[block == number]
        torch.testing.assert_close(own[:, block == number].abs(), torch.full((p, p), p**-0.5))
        assert not own[:, block != number].any()
    assert rotation.half()(x.half()).dtype == torch.float32


def test_a_signed_order_brings_groups_together() -> None:
    group = random_groups(24)
    order, signs = SignedOrder.of_groups(group, generator())
    assert torch.equal(group[order], sorted_groups(group))
    assert torch.equal(order.sort().values, torch.arange(24))
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert torch.equal(SignedOrder.of_groups(group, None).signs, torch.ones(24).double())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_a_rotated_model_is_the_same_function(
    make_llama: Any, token_ids: Tensor, tied: bool, biases: bool
) -> None:
    model = make_llama(tie_word_embeddings=tied, attention_bias=biases, mlp_bias=biases)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    config, rng = model.config, generator()
    residual = group_rotation(random_groups(config.hidden_size), rng)
    heads, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    values = [
        torch.stack([group_rotation(random_groups(dim, seed), rng) for seed in range(heads)])
        for _ in range(config.num_hidden_layers)
    ]
    inner = [
        SignedOrder.of_groups(random_groups(config.intermediate_size, seed), rng)
        for seed in range(config.num_hidden_layers)
    ]
    signs = [pair_signs(heads, dim, rng) for _ in range(config.num_hidden_layers)]
    source = RotatedSource(ModelSource(model, "tiny"), residual, values, inner, signs)
    rotated = dense_model(source)
    assert not rotated.config.tie_word_embeddings
    with torch.no_grad():
        expected, logits = model(token_ids).logits, rotated(token_ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(rotated.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_signs_of_heads_go_past_rope(make_llama: Any, token_ids: Tensor) -> None:
    model, rng = make_llama(attention_bias=True), generator(3)
    heads, dim = model.config.num_key_value_heads, model.model.layers[0].self_attn.head_dim
    signs = pair_signs(heads, dim, rng)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(signs[:, : dim // 2], signs[:, dim // 2 :])
    assert torch.equal(pair_signs(heads, dim, None), torch.ones(heads, dim).double())
    residual = torch.eye(model.config.hidden_size)
    count = model.config.num_hidden_layers
    plain, turned = (
        dense_model(RotatedSource(ModelSource(model, "tiny"), residual, heads=given))
        for given in (None, [signs] * count)
    )
    first, second = (m.model.layers[1].self_attn for m in (plain, turned))
    assert torch.equal(second.k_proj.weight, first.k_proj.weight * signs.view(-1, 1))
    assert torch.equal(second.k_proj.bias, first.k_proj.bias * signs.flatten())
    shared = signs.repeat_interleave(model.config.num_attention_heads // heads, 0)
    assert torch.equal(second.q_proj.weight, first.q_proj.weight * shared.view(-1, 1))
    assert torch.equal(second.v_proj.weight, first.v_proj.weight)
    with torch.no_grad():  # products and sums of the same numbers
        assert torch.equal(plain(token_ids).logits, turned(token_ids).logits)


def test_stories_rotated_is_the_same_function(stories_dir: Any) -> None:
    source = open_source(str(stories_dir))
    residual = group_rotation(random_groups(source.config.hidden_size), generator())
    ids = torch.randint(3, 500, (2, 40), generator=generator())
    with torch.no_grad():
        expected = dense_model(source)(ids).logits
        logits = dense_model(RotatedSource(source, residual))(ids).logits
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.slow  # SmolLM2 is read from its GGUF file
def test_smollm2_with_all_transforms_is_the_same_function(smollm2_gguf: Any) -> None:
    source = open_source(str(smollm2_gguf))
    config, rng = source.config, generator()
    heads, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    residual = group_rotation((torch.arange(config.hidden_size) % 9 == 0).byte(), rng)
    values = [
        torch.stack([group_rotation((torch.arange(dim) % 8 == 3).byte(), rng)] * heads)
        for _ in range(config.num_hidden_layers)
    ]
    salient = torch.arange(config.intermediate_size) % 12 == 5
    inner = [SignedOrder.of_groups(salient, rng) for _ in range(config.num_hidden_layers)]
    ids = torch.randint(3, config.vocab_size, (1, 48), generator=generator())
    signs = [pair_signs(heads, dim, rng) for _ in range(config.num_hidden_layers)]
    rotated = dense_model(RotatedSource(source, residual, values, inner, signs))
    for layer in rotated.model.layers:
        down = layer.mlp.down_proj
        online = OnlineRotation((config.intermediate_size - 128, 128))
        down.weight.data = online(down.weight.data)
        down.register_forward_pre_hook(lambda _, args, online=online: (online(args[0]),))
    with torch.no_grad():
        logits, expected = rotated(ids).logits, dense_model(source)(ids).logits
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("sizes", [(512, 64), (57, 7), (7,), (1, 1), (300, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_online_rotations_in_c_have_the_bits_of_torch(monkeypatch, sizes, dtype):
    rotation, heads = OnlineRotation(sizes), HeadRotation(2, 64, sizes[-1] % 64, "heads")
    generator = torch.Generator().manual_seed(sum(sizes))
    heads.sort(torch.rand(2, 64, generator=generator).argsort(-1))
    x = torch.randn(3, 5, sum(sizes), generator=generator).to(dtype)
    key = torch.randn(2, 5, 4, 64, generator=generator).to(dtype).transpose(1, 2)
    ours = rotation(x), rotation(x[:0]), heads(key), heads(key[:, :, :0])
    assert rotation(x.float().requires_grad_()).requires_grad
    for module in ("hadamard", "head_rotation"):
        monkeypatch.setattr(f"snnllm.{module}.rotates", lambda *_: False)
    theirs = rotation(x), rotation(x[:0]), heads(key), heads(key[:, :, :0])
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a, b)
