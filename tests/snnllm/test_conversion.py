"""Conversion end to end: report, size, provenance, determinism, maps, presets, refusals."""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import pytest
import torch

from snnllm.card import write_card
from snnllm.checkpoint import read_manifest
from snnllm.checks import check_windows
from snnllm.cli.options import ConversionBar
from snnllm.config import MaskScope, Score, SpikeConfig
from snnllm.conversion import as_source, convert, estimate, with_allocation, write_report
from snnllm.data import random_windows
from snnllm.evaluate import token_perplexity
from snnllm.execution import View, set_view, use_view
from snnllm.inspection import matmuls, table
from snnllm.linear import SpikingLinear
from snnllm.modeling import load
from snnllm.pipelines import Pipeline
from snnllm.pipelines.omniquant_options import OmniQuantOptions
from snnllm.pipelines.report import BlockReport, sqnr_db
from snnllm.pipelines.rotated import RotatedOptions
from snnllm.pipelines.rtn import fill_linear
from snnllm.sources import ModelSource, dense_model, open_source

INPUTS = ("q_proj, k_proj, v_proj", "o_proj", "gate_proj, up_proj", "down_proj")


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = model(ids).logits
    return out


@pytest.fixture(scope="module")
def dense(make_llama):
    return make_llama()


@pytest.mark.parametrize(
    ("preset", "arguments", "stages"),
    [
        ("W4A4T2", {"pipeline": "rtn"}, ["block 0", "block 1"]),
        (
            "W4A4T2",
            {"pipeline": "rotated"},
            ["scores of block 0", "scores of block 1"]
            + [f"block {i}: {names}" for i in (0, 1) for names in INPUTS],
        ),
        ("TW1.4A16", {}, [f"block {i}: {names}" for i in (0, 1) for names in INPUTS]),
        (
            "W4A4T2",
            {"pipeline": "omniquant", "options": OmniQuantOptions(epochs=2, rotate=False)},
            [f"block {i}: {s}" for i in (0, 1) for s in ("inputs", "epoch 1 of 2", "epoch 2 of 2")],
        ),
    ],
    ids=["rtn", "rotated", "gptq", "omniquant"],
)
def test_a_conversion_says_what_comes_next(dense, token_ids, tmp_path, preset, arguments, stages):
    seen: list[str] = []
    spike = SpikeConfig.preset(preset)
    convert(dense, tmp_path / "out", spike, token_ids[:2], on_stage=seen.append, **arguments)
    assert seen == stages


def test_a_bar_shows_what_was_measured_and_what_comes_next(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(written, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", written)
    with ConversionBar(2) as bar:
        bar.on_stage("block 0: o_proj")
        bar.on_block(BlockReport(0, 21.04, 0.5, 1.0, 10.0, loss_after=0.0123))
        bar.on_stage("block 1: o_proj")
    text = written.getvalue()
    assert "block 0: o_proj" in text
    assert "loss 0.0123, SQNR 21.0 dB, block 1: o_proj" in text
    assert "1/2" in text


def test_the_report_tells_what_was_done(dense, token_ids, tmp_path):
    seen = []
    output, spike = tmp_path / "out", SpikeConfig.preset("W4A4T2")
    report = convert(
        dense, output, spike, token_ids[:2], seed=3, on_block=seen.append, pipeline="rtn"
    )
    assert report.output == output
    assert report.spike == spike
    assert tuple(seen) == report.blocks
    assert [b.index for b in report.blocks] == [0, 1]
    for block in report.blocks:
        assert 5 < block.sqnr_db < 60
        assert 0 < block.spike_rate < 1
        assert block.seconds > 0
        assert block.peak_mib > 10
    assert report.spiking_modules == 2 * (7 + 1)
    assert report.linear_weights == 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert report.weight_bytes == (output / "model.safetensors").stat().st_size
    assert report.seconds > 0
    assert report.peak_mib > 10
    path = tmp_path / "report.json"
    write_report(report, path)
    values = json.loads(path.read_text())
    assert values["bytes_per_weight"] == report.linear_bytes / report.linear_weights
    assert SpikeConfig.from_dict(values["spike"]) == spike
    assert len(values["blocks"]) == 2
    provenance = read_manifest(output)["provenance"]
    assert provenance == json.loads(json.dumps(dict(report.provenance)))
    assert provenance["pipeline"] == "rtn"
    assert provenance["seed"] == 3
    assert provenance["preset"] == "W4A4T2"
    assert provenance["calibration"]["windows"] == 2
    assert len(provenance["calibration"]["sha256"]) == 64
    assert {"snnllm", "torch", "transformers", "spikingjelly"} <= provenance["versions"].keys()


@pytest.mark.parametrize(
    ("bits", "group_size", "limit"), [(4, None, 0.6), (2, None, 0.35), (4, 64, 0.6)]
)
def test_weights_are_stored_at_their_bit_width(
    make_llama, token_ids, tmp_path, bits, group_size, limit
):
    model = make_llama(
        hidden_size=128, intermediate_size=256, num_key_value_heads=4, num_hidden_layers=1
    )
    spike = SpikeConfig(weight_bits=bits, weight_group_size=group_size)
    report = convert(model, tmp_path / "out", spike, token_ids[:1], pipeline="rtn")
    assert report.linear_bytes / report.linear_weights <= limit
    # On disk: the linears, the embedding, the head, and little else.
    tables = 2 * 128 * 128 * 4
    assert report.weight_bytes - tables - report.linear_bytes < 0.1 * report.weight_bytes


@pytest.mark.parametrize("score", list(Score))
def test_the_same_seed_gives_the_same_files(dense, token_ids, tmp_path, score):
    spike = SpikeConfig(score=score, salient_ratio=0.25)
    for name in ("a", "b"):
        convert(dense, tmp_path / name, spike, token_ids[:2], seed=5, pipeline="rtn")
    convert(dense, tmp_path / "c", spike, token_ids[:2], seed=6, pipeline="rtn")
    files = {p.name for p in (tmp_path / "a").iterdir()}
    assert files == {p.name for p in (tmp_path / "b").iterdir()}
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("a", "c")]
    assert (weights[0] != weights[1]) == (score is Score.RANDOM)


def test_the_source_is_not_changed(make_llama, token_ids, tmp_path):
    model = make_llama()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    convert(model, tmp_path / "out", SpikeConfig(), token_ids[:1], pipeline="rtn")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear


@pytest.mark.parametrize("pipeline", list(Pipeline))
def test_a_source_stays_dense(make_llama, token_ids, tmp_path, pipeline, spike_for):
    model = make_llama()
    model.save_pretrained(tmp_path / "dense")
    source = open_source(tmp_path / "dense")
    spike = spike_for(pipeline, salient_ratio=0.25)
    convert(source, tmp_path / "out", spike, token_ids[:1], pipeline=pipeline)
    assert source.config.model_type == "llama"
    assert torch.equal(logits(dense_model(source), token_ids), logits(model, token_ids))


def test_the_rotated_pipeline_refuses_what_it_cannot_do(dense, token_ids, tmp_path):
    maps = {"model.layers.0.mlp.down_proj": torch.ones(64, dtype=torch.int64)}
    output, windows = tmp_path / "out", token_ids[:1]
    with pytest.raises(ValueError, match="explicit allocation maps go with pipeline='rtn'"):
        convert(dense, output, SpikeConfig(), windows, pipeline="rotated", allocation=maps)
    with pytest.raises(ValueError, match="rotated pipeline needs spiking activations"):
        convert(dense, output, SpikeConfig.preset("W4A16"), windows, pipeline="rotated")
    with pytest.raises(ValueError, match="'spinquant' is not a valid Pipeline"):
        convert(dense, output, SpikeConfig(), windows, pipeline="spinquant")
    assert not list(tmp_path.iterdir())


PRESETS = ["W4A4T2", "W4A4T4", "W4A8", "W2A8", "W8A8", "A4", "A4T2", "W4A16", "W3A5T3", "W5A1"]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_converts_and_runs_equally_in_all_views(convert_tiny, token_ids, preset):
    model = load(convert_tiny(preset)[1])
    expected = logits(model, token_ids[:1, :12])
    assert torch.isfinite(expected).all()
    for view in (View.UNROLLED, View.BINARY):
        with use_view(model, view):
            assert torch.equal(logits(model, token_ids[:1, :12]), expected)


@pytest.mark.parametrize("pipeline", ["rtn", "rotated"])
def test_counts_beyond_eight_bits_convert_and_run_unrolled(
    make_llama, token_ids, tmp_path, caplog, pipeline
):
    dense, spike = make_llama(), SpikeConfig.preset("W8A8T2", salient_ratio=0.3)
    convert(dense, tmp_path / "out", spike, token_ids, pipeline=pipeline)
    model = load(tmp_path / "out")
    assert "counts beyond 255" in caplog.text
    noise = (logits(model, token_ids) - dense(token_ids).logits).square().sum()
    assert noise < 0.01 * dense(token_ids).logits.square().sum()
    with pytest.raises(ValueError, match=r"counts up to 510 .* or the unrolled view"):
        set_view(model, "collapsed")


@pytest.mark.parametrize(
    "fields", [{"rotation": "groups"}, {"input_offset": True}, {"query_groups": True}]
)
def test_rtn_refuses_what_only_the_rotated_pipeline_fills(make_llama, token_ids, tmp_path, fields):
    with pytest.raises(ValueError, match="only the rotated pipeline makes use of this"):
        convert(make_llama(), tmp_path / "out", SpikeConfig(**fields), token_ids, pipeline="rtn")


@pytest.mark.parametrize(
    ("pipeline", "options"),
    [("rtn", RotatedOptions()), ("omniquant", RotatedOptions()), ("rotated", OmniQuantOptions())],
)
def test_options_go_with_their_pipeline(make_llama, token_ids, tmp_path, pipeline, options):
    with pytest.raises(ValueError, match=f"belongs to another pipeline than {pipeline}"):
        convert(
            *(make_llama(), tmp_path / "out", SpikeConfig(), token_ids),
            pipeline=pipeline,
            options=options,
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "overrides",
    [
        {"value_range": "shared"},
        {"value_range": "commensurate", "activation_bits": 5},
        {"capacity": "power_of_two"},
        {"weight_range": "clip"},
        {"weight_group_size": 16},
        {"attention": "float"},
        {"kv_salient_steps": 4},
        {"salient_ratio": 0.0},
        {"salient_ratio": 1.0},
    ],
    ids=str,
)
def test_options_convert_and_run(convert_tiny, token_ids, overrides):
    dense, folder = convert_tiny("W4A6T2", overrides)
    model = load(folder)
    for key, value in overrides.items():
        assert getattr(model.config.spike, key) == value
    expected = logits(dense, token_ids)
    assert sqnr_db([expected], [logits(model, token_ids)]) > 5


@pytest.mark.parametrize("attention", ["encoded", "float"])
@pytest.mark.parametrize("head_dim", [8, 12])
def test_the_masks_have_their_ratio(convert_tiny, attention, head_dim):
    overrides = {"salient_ratio": 0.25, "attention": attention}
    model = load(convert_tiny("W4A4T2", overrides, head_dim=head_dim)[1])
    for name, buffer in model.named_buffers():
        if name.endswith("q_encoder.channel_group"):
            assert not buffer.any()
        elif name.endswith("channel_group"):
            assert int(buffer.sum()) == round(0.25 * buffer.numel()), name


@pytest.mark.parametrize("scope", list(MaskScope))
def test_mask_scope(convert_tiny, scope):
    model = load(convert_tiny("W4A4T2", {"salient_ratio": 0.25, "mask_scope": scope})[1])
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    for first, second in (
        (attention.q_proj, attention.v_proj),
        (attention.q_proj, attention.k_proj),
        (mlp.gate_proj, mlp.up_proj),
    ):
        same = torch.equal(first.encoder.channel_group, second.encoder.channel_group)
        assert same or scope is MaskScope.LINEAR


# -- explicit maps ---------------------------------------------------------------------------------------


def test_explicit_maps_are_followed(dense, token_ids, tmp_path):
    name = "model.layers.1.mlp.down_proj"
    steps = torch.ones(64, dtype=torch.int64)
    steps[[3, 10]], steps[[0, 63]] = 4, 2
    spike = SpikeConfig.preset("W4A4T2")
    report = convert(
        dense, tmp_path / "out", spike, token_ids[:2], allocation={name: steps}, pipeline="rtn"
    )
    assert report.spike.group_steps == {name: (1, 2, 4)}
    model = load(tmp_path / "out")
    module = model.get_submodule(name)
    assert isinstance(module, SpikingLinear)
    assert module.layout.steps == (1, 2, 4)
    spread = torch.tensor(module.encoder.steps)[module.encoder.channel_group.long()]
    assert torch.equal(spread, steps)
    other = model.get_submodule("model.layers.0.mlp.down_proj")
    assert other.layout.steps == (1, 2)
    with torch.no_grad():
        expected = logits(model, token_ids[:1])
        with use_view(model, "unrolled"):
            assert torch.equal(logits(model, token_ids[:1]), expected)


@pytest.mark.parametrize(
    ("name", "steps", "message"),
    [
        (
            "model.layers.9.mlp.down_proj",
            torch.ones(64).long(),
            r"which is no linear of this model",
        ),
        (
            "lm_head",
            torch.ones(32).long(),
            r"names look like 'model\.layers\.0\.self_attn\.q_proj'",
        ),
        ("model.layers.0.mlp.down_proj", torch.ones(32).long(), r"each of 64 channels, got shape"),
        ("model.layers.0.mlp.down_proj", torch.zeros(64).long(), r"at least one time step"),
    ],
)
def test_maps_that_do_not_fit(dense, name, steps, message):
    with pytest.raises(ValueError, match=message):
        with_allocation(ModelSource(dense, "mine"), SpikeConfig(), {name: steps})


@pytest.mark.parametrize(
    ("group_steps", "message"),
    [
        (
            {"model.layers.0.mlp.down": (1, 2)},
            r"group_steps names 'model\.layers\.0\.mlp\.down', whi",
        ),
        ({"mlp.down_proj": (1, 2)}, r"names look like 'model\.layers\.0\.self_attn\.q_proj'"),
        ({"model.layers.2.mlp.down_proj": (1, 2)}, r"which is no linear of LlamaForCausalLM"),
        ({"model.layers.0.mlp.down_proj": (1, 2, 4)}, r"has 3 groups, but scores fill two"),
    ],
)
def test_group_steps_that_nothing_fills(dense, token_ids, tmp_path, group_steps, message):
    spike = SpikeConfig(group_steps=group_steps)
    with pytest.raises(ValueError, match=message):
        convert(dense, tmp_path / "out", spike, token_ids[:1], pipeline="rtn")
    assert not list(tmp_path.iterdir())


# -- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (torch.ones(8, dtype=torch.long), r"windows must be token ids \[n, S\].*shape \(8,\)"),
        (torch.ones(0, 8, dtype=torch.long), r"windows must be token ids .*shape \(0, 8\)"),
        (torch.ones(1, 8), r"windows must be token ids .*torch\.float32"),
        (torch.full((1, 8), 128), r"token id 128, but the model has 128 tokens; tokenise"),
        (torch.full((1, 8), -1), r"token id -1"),
    ],
)
def test_windows_that_the_model_cannot_read(dense, tmp_path, windows, message):
    with pytest.raises(ValueError, match=message):
        convert(dense, tmp_path / "out", SpikeConfig(), windows, pipeline="rtn")
    assert not list(tmp_path.iterdir())


def test_windows_beyond_the_context_are_refused(dense):
    source = ModelSource(dense, "mine")
    check_windows(torch.ones(1, 128, dtype=torch.long), source)
    with pytest.raises(ValueError, match=r"129 tokens are longer than the context of mine \(128\)"):
        check_windows(torch.ones(1, 129, dtype=torch.long), source)


def test_nothing_converted_is_an_error(dense, token_ids, tmp_path):
    spike = SpikeConfig(modules_to_not_convert=("_proj",), attention="float")
    with pytest.raises(
        ValueError, match="Nothing was converted: every linear is in modules_to_not"
    ):
        convert(dense, tmp_path / "out", spike, token_ids[:1], pipeline="rtn")
    assert not list(tmp_path.iterdir())


def test_a_linear_that_is_not_finite_is_named(make_linear):
    dense = torch.nn.Linear(24, 10)
    dense.weight.data[1, 2] = float("nan")
    group = torch.zeros(24, dtype=torch.uint8)
    with pytest.raises(ValueError, match="q_proj: The weight holds NaN or infinite values"):
        fill_linear(make_linear(name="q_proj"), dense, group)


def test_steps_beyond_the_counts_are_refused(dense, token_ids, tmp_path):
    name = "model.layers.0.mlp.down_proj"
    allocation = {name: torch.full((64,), 3000)}
    with pytest.raises(ValueError, match="capacity 45000 exceeds 32767; use fewer steps or bits"):
        convert(
            dense,
            tmp_path / "out",
            SpikeConfig(),
            token_ids[:1],
            allocation=allocation,
            pipeline="rtn",
        )
    assert not list(tmp_path.iterdir())


# -- estimate, card, inspection --------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["W4A4T2", "A4"])
def test_the_estimate_is_near(make_llama, token_ids, tmp_path, preset):
    model = make_llama(hidden_size=64, intermediate_size=256, head_dim=32)
    spike = SpikeConfig.preset(preset)
    need = estimate(as_source(model), spike, 2, 24)
    report = convert(model, tmp_path / "out", spike, token_ids[:2], pipeline="rtn")
    assert 0.7 < need.disk_mib / (report.weight_bytes / 2**20) < 1.3
    assert need.seconds > 0
    assert need.memory_mib > 10


@pytest.mark.parametrize(("preset", "text"), [("W4A4T2", "4-bit integer levels"), ("A4", "float")])
def test_the_card_tells_what_was_measured(convert_tiny, preset, text):
    folder = convert_tiny(preset)[1]
    spike = SpikeConfig.preset(preset)
    write_card(folder, spike, {"perplexity": "12.3"})
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "base_model: LlamaForCausalLM" in card
    assert "| perplexity | 12.3 |" in card
    assert f"Weights: {text}" in card
    assert "sha256" in card
    write_card(folder, spike, {})
    assert "Nothing yet." in (folder / "README.md").read_text()


def test_every_matmul_is_listed(convert_tiny):
    overrides = {"salient_ratio": 0.25, "modules_to_not_convert": ("up_proj",)}
    rows = {r.name: r for r in matmuls(load(convert_tiny("W4A4T2", overrides)[1]))}
    assert len(rows) == 2 * (7 + 2) + 1
    q_proj = rows["model.layers.0.self_attn.q_proj"]
    assert q_proj.spiking
    assert q_proj.coding == "4-bit spikes (split) x int4 levels"
    assert q_proj.steps == "T=1 on 75 %, T=2 on 25 %"
    assert q_proj.shape == "32x32"
    assert q_proj.bytes == 32 * 16 + 32 * 4 + 32 + 32 + 2 * 4
    assert rows["model.layers.1.self_attn.qk"].steps == "Q T=1 on 100 %; K T=1 on 75 %, T=2 on 25 %"
    assert rows["model.layers.1.self_attn.pv"].coding == "float x 4-bit spikes (split)"
    assert not rows["model.layers.0.mlp.up_proj"].spiking
    assert not rows["lm_head"].spiking
    text = table(list(rows.values())).splitlines()
    assert text[0].split() == ["matmul", "spiking", "operands", "steps", "shape", "bytes"]
    assert text[-1].startswith("16 of 19 matmuls are spiking")


def test_a_dense_model_has_no_spiking_matmul(dense):
    assert not any(r.spiking for r in matmuls(dense))


# -- stories260K -------------------------------------------------------------------------------------------


def test_a_trained_model_keeps_its_perplexity(
    stories_dir, stories_ids, stories_model, stories_checkpoint, tmp_path
):
    windows = random_windows(stories_ids, 128, 4, seed=1)
    before = token_perplexity(stories_model, windows).perplexity
    quality = [token_perplexity(load(stories_checkpoint), windows).perplexity]
    convert(stories_dir, tmp_path / "w8", SpikeConfig.preset("W8A8"), windows[:2], pipeline="rtn")
    quality.append(token_perplexity(load(tmp_path / "w8"), windows).perplexity)
    assert abs(quality[1] / before - 1) < 0.02
    assert quality[0] / before < 2
    names = {p.name for p in stories_checkpoint.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names


def test_a_name_that_matches_no_linear_is_refused(make_llama, token_ids, tmp_path):
    spike = SpikeConfig(modules_to_not_convert=("lm_head", "dwon_proj"))
    with pytest.raises(ValueError, match="names 'dwon_proj', but no linear"):
        convert(make_llama(), tmp_path / "out", spike, token_ids, pipeline="rtn")
