"""Fitting linears to their spikes: means, clip ratios, least squares; and what each part is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from neurons import SpikeEncoder
from snnllm.checkpoint import read_manifest
from snnllm.config import SpikeConfig
from snnllm.conversion import convert
from snnllm.modeling import load
from snnllm.pipelines.fitting import CLIP_RATIOS, Moments, clip_ratios, weighted_mean
from snnllm.pipelines.rotated import RotatedOptions
from snnllm.pipelines.stages import StagedBlock
from snnllm.pipelines.streaming import INPUT_GROUPS, BlockStream, Run, load_block
from snnllm.sources import ModelSource


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_fit_is_a_ridge_regression_around_the_weight() -> None:
    x, weight, better = random(400, 12) + 0.5, random(5, 12, seed=1), random(5, 12, seed=2)
    y = x @ better.T + random(5, seed=3)
    token_weight = torch.rand(400, generator=torch.Generator().manual_seed(4)) + 0.1
    moments = Moments(weight)
    for part in zip(x.split(90), y.split(90), token_weight.split(90), strict=True):
        moments.update(*part)
    torch.testing.assert_close(moments.least_squares(0.0), better, atol=1e-3, rtol=0)
    torch.testing.assert_close(moments.least_squares(1e9), weight, atol=1e-4, rtol=0)
    # The normal equations of the centred, weighted problem.
    w = token_weight / token_weight.sum()
    xc, yc = x - w @ x, y - w @ y
    fitted = moments.least_squares(0.5)
    damping = 0.5 * ((w.unsqueeze(1) * xc).T @ xc).diagonal().mean()
    gradient = (w.unsqueeze(1) * (xc @ fitted.T - yc)).T @ xc + damping * (fitted - weight)
    assert gradient.abs().max() < 1e-4
    mean = w @ (x @ fitted.T) + moments.output_offset(fitted)
    torch.testing.assert_close(mean, w @ y, atol=1e-4, rtol=0)


def test_the_mean_of_weighted_batches() -> None:
    x, w = random(10, 3), torch.arange(1.0, 11.0)
    mean = weighted_mean(zip(x.split(4), w.split(4), strict=True))
    torch.testing.assert_close(mean, (w / w.sum()) @ x)
    with pytest.raises(ValueError, match="No calibration token"):
        weighted_mean([])


@pytest.mark.parametrize("value_range", ["split", "shared", "commensurate"])
def test_clip_ratios_are_the_best_of_the_grid(value_range: str) -> None:
    groups = (torch.arange(96) >= 80).to(torch.uint8)
    encoder = SpikeEncoder(groups, (1, 2), value_range=value_range)
    rows, weight, token_weight = random(300, 96), random(20, 96, seed=1), torch.ones(300)
    found = clip_ratios(encoder, rows, token_weight, weight)
    assert encoder.clip.tolist() == [1.0, 1.0]  # as before
    assert found[0] < 1.0  # 80 Gaussian channels at 4 bits are better clipped
    if value_range == "shared":
        assert found[0] == found[1]

    def loss(clip: Tensor, members: Tensor) -> float:
        encoder.clip.copy_(clip)
        error = (encoder.decode(encoder.encode(rows)) - rows)[:, members]
        return float((error @ weight[:, members].T).square().sum())

    if value_range != "shared":
        for g in (0, 1):
            members = groups == g
            losses = [loss(torch.full((2,), r), members) for r in CLIP_RATIOS]
            assert CLIP_RATIOS[losses.index(min(losses))] == pytest.approx(float(found[g]))


def test_stages_are_the_block(make_llama: Any, token_ids: Tensor) -> None:
    source = ModelSource(make_llama(attention_bias=True, mlp_bias=True), "tiny")
    stream = BlockStream(source, Run(token_ids))
    block = load_block(source, 0, torch.device("cpu"))
    expected = list(stream.run(block))
    staged = StagedBlock(block, stream)
    for paths in INPUT_GROUPS:
        inputs = staged.inputs(paths[0])
        if paths[0] in ("self_attn.o_proj", "mlp.down_proj"):
            staged.write(paths[0], inputs)
    for ours, theirs in zip(staged.residual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


PARTS = ["rotate", "offset", "key_offset", "clip", "segment_scales", "query_groups", "compensate"]


@pytest.mark.parametrize("part", PARTS)
def test_every_part_can_be_left_out(
    make_llama: Any, token_ids: Tensor, tmp_path: Path, part: str
) -> None:
    spike, model = (
        SpikeConfig.preset("W4A2T2"),
        make_llama(),
    )  # few levels: clipping pays in small heads
    logits = {}
    for value in (True, False):
        folder = tmp_path / str(value)
        options = RotatedOptions(**{part: value})
        convert(model, folder, spike, token_ids, pipeline="rotated", options=options)
        logits[value] = load(folder)(token_ids).logits
    assert torch.isfinite(logits[False]).all()
    assert not torch.equal(logits[False], logits[True])


def test_an_offset_of_the_keys_costs_no_range(
    make_llama: Any, token_ids: Tensor, tmp_path: Path
) -> None:
    model = make_llama(attention_bias=True)
    for layer in model.model.layers:
        bias = layer.self_attn.k_proj.bias.data.view(model.config.num_key_value_heads, -1)
        half = bias.shape[1] // 2
        bias[:, half - 1] = 30.0  # turns slowest with the position, so that it stays behind RoPE
    expected, error = model(token_ids).logits.detach(), {}
    kept = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    spike = SpikeConfig(modules_to_not_convert=kept, salient_ratio=0.0)
    for value in (True, False):
        options = RotatedOptions(key_offset=value)
        convert(
            *(model, tmp_path / str(value), spike, token_ids),
            pipeline="rotated",
            options=options,
        )
        logits = load(tmp_path / str(value))(token_ids).logits.detach()
        error[value] = float((logits - expected).square().mean())
    assert error[True] < 0.5 * error[False]


def test_groups_of_q_run_in_c_as_in_torch(
    make_llama: Any, token_ids: Tensor, tmp_path: Path
) -> None:
    convert(make_llama(), tmp_path / "out", SpikeConfig(), token_ids, pipeline="rotated")
    model = load(tmp_path / "out")
    attention = model.model.layers[0].self_attn
    assert attention.q_encoder.steps == attention.k_encoder.steps == (1, 2)
    expected = model(token_ids).logits
    if attention.native() is None:
        pytest.skip("no C compiler")
    for layer in model.model.layers:
        layer.self_attn._native = None
    assert torch.equal(model(token_ids).logits, expected)


def test_what_the_rotated_pipeline_refuses_of_shared_inputs(
    make_llama: Any, token_ids: Tensor, tmp_path: Path
) -> None:
    spike = SpikeConfig(group_steps={"model.layers.0.self_attn.q_proj": (1,)})
    with pytest.raises(ValueError, match="which read one input"):
        convert(make_llama(), tmp_path / "out", spike, token_ids, pipeline="rotated")
    with pytest.raises(ValueError, match="ridge must be finite and >= 0, got -1"):
        RotatedOptions(ridge=-1.0)


def test_the_parts_are_in_the_manifest(make_llama: Any, token_ids: Tensor, tmp_path: Path) -> None:
    options = RotatedOptions(ridge=0.5)
    spike, folder = SpikeConfig(activation_clip=0.9), tmp_path / "out"
    convert(make_llama(), folder, spike, token_ids, pipeline="rotated", options=options)
    assert read_manifest(folder)["provenance"]["options"]["ridge"] == 0.5
    attention = load(folder).model.layers[0].self_attn
    assert attention.k_encoder.clip.tolist() == pytest.approx([0.9, 0.9])
