"""The rotated pipeline end to end: same integers in all views, better than rounding, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from snnllm.config import Rotation, SpikeConfig
from snnllm.conversion import ConversionReport, convert
from snnllm.execution import View, use_view
from snnllm.linear import SpikingLinear
from snnllm.modeling import load
from snnllm.operations import count_operations, cross_check
from snnllm.pipelines.inputs import token_weights
from snnllm.sources import dense_model, open_source


def rotate(
    model: Any, folder: Path, ids: Tensor, preset: str = "W4A4T2", **fields: Any
) -> ConversionReport:
    spike = SpikeConfig.preset(preset, **fields)
    return convert(model, folder, spike, ids, pipeline="rotated")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"attention": "float"},
        {"value_range": "shared"},
        {"value_range": "commensurate"},
        {"value_range": "commensurate", "weight_group_size": 16},
    ],
)
def test_views_are_equal_bit_for_bit(
    make_llama: Any, token_ids: Tensor, tmp_path: Path, fields: dict[str, Any]
) -> None:
    rotate(make_llama(), tmp_path / "out", token_ids, **fields)
    model = load(tmp_path / "out")
    assert model.config.spike.rotation is Rotation.GROUPS
    one_sum = fields.get("value_range") == "commensurate" and "weight_group_size" not in fields
    assert model.model.layers[0].mlp.down_proj.spec().merged == one_sum
    with torch.no_grad():
        expected = model(token_ids).logits
        for view in (View.UNROLLED, View.BINARY):
            with use_view(model, view):
                assert torch.equal(model(token_ids).logits, expected)


def test_eight_bits_are_close_to_the_float_model(
    make_llama: Any, token_ids: Tensor, tmp_path: Path, tolerance: Any
) -> None:
    model = make_llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    rotate(model, tmp_path / "out", token_ids, "W8A8", salient_ratio=0.1, salient_steps=1)
    with torch.no_grad():
        expected, logits = model(token_ids).logits, load(tmp_path / "out")(token_ids).logits
    noise = (logits - expected).square().sum() / expected.square().sum()
    assert -10 * torch.log10(noise) > tolerance.sqnr_w8a8_db


def test_generate_is_the_same_with_every_cache(
    make_llama: Any, token_ids: Tensor, tmp_path: Path
) -> None:
    rotate(make_llama(), tmp_path / "out", token_ids)
    model = load(tmp_path / "out")
    prompt, options = token_ids[:1, :5], {"max_new_tokens": 8, "do_sample": False}
    dynamic = model.generate(prompt, **options)
    assert torch.equal(dynamic, model.generate(prompt, cache_implementation="static", **options))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(dynamic, load(tmp_path / "again").generate(prompt, **options))


def test_one_group_has_one_threshold(make_llama: Any, token_ids: Tensor, tmp_path: Path) -> None:
    rotate(make_llama(), tmp_path / "out", token_ids, "W4A4")
    linears = [m for m in load(tmp_path / "out").modules() if isinstance(m, SpikingLinear)]
    assert all(m.encoder.steps == (1,) and not m.encoder.channel_group.any() for m in linears)


def test_rotation_beats_rounding_on_a_trained_model(
    stories_dir: Path, stories_ids: Tensor, tmp_path: Path
) -> None:
    source = open_source(str(stories_dir))
    windows = stories_ids[: 8 * 128].view(8, 128)
    held_out = stories_ids[2048 : 2048 + 512].view(4, 128)
    with torch.no_grad():
        target = dense_model(source)(held_out).logits
        noise = {}
        for pipeline in ("rtn", "rotated"):
            spike = SpikeConfig.preset("W4A4T2")
            convert(source, tmp_path / pipeline, spike, windows, pipeline=pipeline)
            noise[pipeline] = float(
                (load(tmp_path / pipeline)(held_out).logits - target).square().sum()
            )
    assert noise["rotated"] < 0.85 * noise["rtn"]


def test_what_it_refuses(make_llama: Any, token_ids: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rotated pipeline needs spiking activations"):
        rotate(make_llama(), tmp_path / "out", token_ids, weight_bits=4, activation_bits=16)
    steps = {"model.layers.0.mlp.up_proj": torch.ones(32, dtype=torch.int64)}
    with pytest.raises(ValueError, match="explicit allocation maps go with pipeline='rtn'"):
        convert(
            make_llama(),
            tmp_path / "out",
            SpikeConfig(),
            token_ids,
            pipeline="rotated",
            allocation=steps,
        )
    with pytest.raises(ValueError, match="'spinquant' is not a valid Pipeline"):
        convert(make_llama(), tmp_path / "out", SpikeConfig(), token_ids, pipeline="spinquant")
    assert not (tmp_path / "out").exists()


def test_massive_tokens_do_not_decide_what_is_written_to_the_residual_stream() -> None:
    hidden = torch.ones(1, 3, 4)
    hidden[0, 1] *= 1000.0
    ordinary, massive, other = token_weights("mlp.down_proj", hidden).tolist()
    assert ordinary == pytest.approx(other)
    assert massive < 1e-5 * ordinary
    assert torch.equal(token_weights("self_attn.q_proj", hidden), torch.ones(3))


def test_operations_are_counted_behind_the_online_rotation(
    make_llama: Any, token_ids: Tensor, tmp_path: Path
) -> None:
    rotate(make_llama(), tmp_path / "out", token_ids)
    model = load(tmp_path / "out")
    report = count_operations(model, token_ids[:1])
    layer = model.model.layers[0].mlp.down_proj
    captured: list[Tensor] = []
    with layer.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0])):
        model(token_ids[:1])
    rotated = layer.encoder_input(captured[0])  # in one shape: a matmul may round otherwise
    events = int(layer.encoder.centre(layer.encoder.encode(rotated)).abs().sum())
    row = next(r for r in report.rows if r.name == "model.layers.0.mlp.down_proj")
    assert row.spikes.events == events
    assert cross_check(layer, captured[0].reshape(-1, layer.in_features).detach()).agrees
    names = {part.name: part.macs for part in report.float_parts}
    assert names["rotation of down_proj inputs"] > 0
    assert names["rotation of Q and K"] == 2 * 24 * (4 + 2) * (4 * 2 + 2 * 1)  # blocks 4, 2, 1, 1


def test_views_run_with_gradients_on(make_llama: Any, token_ids: Tensor, tmp_path: Path) -> None:
    rotate(make_llama(), tmp_path / "out", token_ids)
    model = load(tmp_path / "out")
    expected = model(token_ids).logits
    for view in (View.UNROLLED, View.BINARY):
        with use_view(model, view):
            assert torch.equal(model(token_ids).logits, expected)
