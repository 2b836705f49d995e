"""The `gptq` pipeline: ternary checkpoints, equal views, budgets, what it refuses, its rivals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from snnllm.additive import AdditiveWork
from snnllm.cli.convert import summary
from snnllm.config import SpikeConfig
from snnllm.conversion import convert
from snnllm.execution import View, use_view
from snnllm.inspection import matmuls
from snnllm.modeling import SpikingLlamaForCausalLM, load
from snnllm.operations import count_operations
from snnllm.pipelines.gptq import GptqOptions, convert_blocks
from snnllm.pipelines.streaming import Run
from snnllm.sources import ModelSource
from snnllm.step_allocation import StepClass
from snnllm.ternary_linear import TernaryLinear

LINEARS = 14


def ternary_modules(model: nn.Module) -> list[TernaryLinear]:
    return [m for m in model.modules() if isinstance(m, TernaryLinear)]


@pytest.fixture(scope="module")
def tiny(make_llama, token_ids, tmp_path_factory) -> Any:
    """Convert a tiny LLaMA: `(preset, options, **fields)` -> (dense, model, report)."""

    def run(preset: str, options: GptqOptions | None = None, **fields: Any) -> Any:
        dense = make_llama()
        folder = tmp_path_factory.mktemp("gptq") / "out"
        spike = SpikeConfig.preset(preset, **fields)
        report = convert(dense, folder, spike, token_ids, pipeline="gptq", options=options)
        return dense, load(folder), report

    return run


@pytest.mark.parametrize("preset", ["TW1.4A16", "TW1.4A4T2", "TW2A8"])
def test_a_checkpoint_is_ternary_and_its_views_agree(tiny, token_ids, preset, tolerance) -> None:
    _, model, report = tiny(preset)
    modules = ternary_modules(model)
    assert len(modules) == LINEARS
    assert len(model.config.spike.weight_columns) == LINEARS
    ids = token_ids[:2, :12]
    logits = {}
    for view in View:
        with use_view(model, view), torch.no_grad():
            logits[view] = model(ids).logits
    assert torch.equal(logits[View.BINARY], logits[View.UNROLLED])
    if preset != "TW1.4A16":
        assert torch.equal(logits[View.BINARY], logits[View.COLLAPSED])
    torch.testing.assert_close(
        logits[View.COLLAPSED],
        logits[View.BINARY],
        rtol=tolerance.reordered_sum,
        atol=10 * tolerance.reordered_sum,
    )
    x = torch.randn(3, 32)
    for module in modules[:7]:
        if module.in_features != 32:
            continue
        sums = []
        for view in View:
            with use_view(module, view):
                sums.append(module.accumulators(x).long())
        assert torch.equal(sums[0], sums[1])
        assert torch.equal(sums[0], sums[2])
    for block in report.blocks:  # nothing spikes where linears have float inputs
        assert (block.spike_rate is None) == (preset == "TW1.4A16")
        assert ("spike rate" in str(block)) == (preset != "TW1.4A16")
    assert ("spike rate, mean of blocks" in summary(report)) == (preset != "TW1.4A16")
    assert report.to_dict()["bytes_per_weight"] < 0.75  # tiny groups; float16 thresholds included


@pytest.mark.parametrize("mean", [1.0, 1.4, 3.0])
def test_the_budget_is_spent(tiny, mean) -> None:
    _, model, report = tiny(f"TW{mean}A16")
    for name, classes in report.spike.weight_columns.items():
        steps = sum(t * n for t, n in classes)
        columns = sum(n for _, n in classes)
        assert abs(steps - mean * columns) <= 0.5, name
    assert model.config.spike.weight_columns == report.spike.weight_columns
    assert model.config.spike.label == f"TW{mean:g}A16"


def test_the_weights_follow_the_float_model(make_llama, token_ids, tmp_path) -> None:
    sqnr = []
    for mean in (1.0, 2.0, 4.0):
        spike = SpikeConfig.preset(f"TW{mean}A16")
        report = convert(make_llama(), tmp_path / str(mean), spike, token_ids, pipeline="gptq")
        sqnr.append(report.blocks[0].sqnr_db)
    assert sqnr == sorted(sqnr)
    assert sqnr[2] > 10.0


def test_explicit_maps_decide(tiny) -> None:
    name = "model.layers.1.mlp.up_proj"
    steps = (3, *[1] * 30, 2)
    _, model, report = tiny("TW1.4A16", GptqOptions(steps={name: steps}))
    module = model.get_submodule(name)
    assert module.layout.classes == (StepClass(1, 30), StepClass(2, 1), StepClass(3, 1))
    assert module.weight_order[-2:].tolist() == [31, 0]
    assert report.provenance["options"]["steps"] == {name: steps}


def test_two_classes(tiny) -> None:
    _, model, _ = tiny("TW1.4A16", GptqOptions(salient_steps=5))
    assert {m.layout.classes for m in ternary_modules(model)} == {
        (StepClass(1, 29), StepClass(5, 3)),
        (StepClass(1, 58), StepClass(5, 6)),
    }


def test_linears_may_stay_dense(tiny) -> None:
    _, model, _ = tiny("TW1.4A16", modules_to_not_convert=("lm_head", "down_proj"))
    assert len(ternary_modules(model)) == LINEARS - 2
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear


def test_biases_are_kept(make_llama, token_ids, tmp_path) -> None:
    dense = make_llama(attention_bias=True)
    options = GptqOptions(ridge=0.01)
    for layer in dense.model.layers:  # large ones, which the weights must not take over
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            layer.self_attn.get_submodule(name).bias.data.mul_(50.0)
    spike = SpikeConfig.preset("TW7A16")
    convert(dense, tmp_path / "out", spike, token_ids, pipeline="gptq", options=options)
    model = load(tmp_path / "out")
    for name in ("q_proj", "o_proj"):
        module = model.model.layers[0].self_attn.get_submodule(name)
        linear = dense.model.layers[0].self_attn.get_submodule(name)
        assert torch.equal(module.bias, linear.bias)
        error = (module.dequantized_weight() - linear.weight).square().mean()
        assert error < 0.05 * linear.weight.square().mean()


def test_saving_again_gives_the_same_model(tiny, token_ids, tmp_path) -> None:
    _, model, _ = tiny("TW1.4A4T2")
    model.save_pretrained(tmp_path / "again")
    again = SpikingLlamaForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(token_ids).logits, model(token_ids).logits)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["quantization_config"]["mean_steps"] == 1.4


def test_a_whole_block_only_adds(tiny, token_ids) -> None:
    _, model, _ = tiny("TW1.4A16")
    ids = token_ids[:1]
    work = AdditiveWork()
    block = ternary_modules(model.model.layers[1])
    for module in block:
        module.additive_work = work
    with use_view(model, View.BINARY), torch.no_grad():
        model(ids)
    spikes = sum(int(m.levels().long().abs().sum()) for m in block)
    assert work.synaptic_operations == ids.numel() * spikes
    assert work.scalings == ids.numel() * sum(m.weight_threshold.numel() for m in block)
    report = count_operations(model, ids)
    rows = [r for r in report.rows if r.name.startswith("model.layers.1.") and r.weights]
    assert len(rows) == 7
    assert sum(r.synaptic_operations for r in rows) == work.synaptic_operations
    assert sum(r.scale_operations for r in rows) == work.scalings
    assert report.neurobench()["SynapticOperations"]["Effective_ACs"] == report.total(
        "synaptic_operations"
    )
    assert all(0 < r.ace_ratio < 0.25 for r in rows)
    energy = {r.network: r for r in report.energy.rows[:8]}
    spiking = next(r for n, r in energy.items() if "signed events" in n)
    dense = next(r for n, r in energy.items() if n == "dense fp16")
    assert spiking.matmul_pj < dense.matmul_pj
    assert "TW1.4A16" in report.to_markdown()


def test_spiking_inputs_count_what_reaches_a_weight_spike(tiny, token_ids) -> None:
    _, model, _ = tiny("TW1.4A4T2")
    work = AdditiveWork()
    for module in ternary_modules(model):
        module.additive_work = work
    with use_view(model, View.BINARY), torch.no_grad():
        model(token_ids[:1])
    report = count_operations(model, token_ids[:1])
    rows = [r for r in report.rows if r.weights]
    assert sum(r.synaptic_operations for r in rows) == work.synaptic_operations


def test_inspect_shows_ternary_weights(tiny) -> None:
    _, model, _ = tiny("TW1.4A16")
    rows = [r for r in matmuls(model) if r.name.endswith("proj")]
    assert all(r.spiking and r.coding == "float x ternary spikes" for r in rows)
    assert all("T=1 on" in r.steps for r in rows)


def test_what_it_cannot_do_is_refused(make_llama, token_ids, tmp_path) -> None:
    dense, output = make_llama(), tmp_path / "out"
    spike = SpikeConfig.preset("TW1.4A16")

    def run(spike: SpikeConfig, options: Any = None, pipeline: str = "gptq") -> None:
        convert(dense, output, spike, token_ids, pipeline=pipeline, options=options)

    with pytest.raises(ValueError, match="gptq pipeline makes ternary weights"):
        run(SpikeConfig())
    for pipeline in ("rtn", "rotated", "omniquant"):
        with pytest.raises(ValueError, match=f"the pipeline {pipeline} makes integer levels"):
            run(spike, pipeline=pipeline)
    with pytest.raises(ValueError, match=r"mean_steps must be in 1\.\.7"):
        run(SpikeConfig.preset("TW9A16"))
    with pytest.raises(ValueError, match="cannot average 3"):
        run(SpikeConfig.preset("TW3A16"), GptqOptions(salient_steps=2))
    with pytest.raises(ValueError, match="steps names 'up_proj', which is no linear"):
        run(spike, GptqOptions(steps={"up_proj": (1,)}))
    with pytest.raises(ValueError, match="needs one step count for each of 32 channels, got 3"):
        run(spike, GptqOptions(steps={"model.layers.0.mlp.up_proj": (1, 2, 1)}))
    maps = {"model.layers.0.mlp.up_proj": torch.ones(32, dtype=torch.int64)}
    with pytest.raises(ValueError, match="allocation gives steps to the channels of activations"):
        convert(dense, output, spike, token_ids, pipeline="gptq", allocation=maps)
    with pytest.raises(ValueError, match="rotation: only the rotated pipeline"):
        run(SpikeConfig.preset("TW1.4A4", rotation="groups"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"score": "max_abs"}, "score of weight columns must be one of"),
        ({"damping": 0.0}, "damping must be finite and > 0"),
        ({"ridge": -1.0}, "ridge must be finite and >= 0"),
        ({"refinements": -1}, "refinements must be >= 0"),
        ({"salient_steps": 1}, r"salient_steps of weight columns must be in 2\.\.127, got 1"),
        ({"salient_steps": 128}, r"salient_steps of weight columns must be in 2\.\.127, got 128"),
    ],
)
def test_options_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GptqOptions(**values)


def test_a_broken_weight_is_named(make_llama, token_ids, tmp_path) -> None:
    dense = make_llama()
    dense.model.layers[1].mlp.down_proj.weight.data[0, 0] = 1e6
    spike = SpikeConfig.preset("TW1.4A16")
    options = GptqOptions(compensate=False)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj: weights beyond 65504"):
        convert(dense, tmp_path / "out", spike, token_ids, pipeline="gptq", options=options)


def test_other_quantisers_run_in_the_same_loop(make_llama, token_ids) -> None:
    dense, seen = make_llama(), []
    before = {k: v.clone() for k, v in dense.state_dict().items()}

    def encode(name: str, linear: nn.Linear, wanted: Any, hessian: Any) -> nn.Module:
        seen.append(name)
        assert hessian.shape == (linear.in_features, linear.in_features)
        linear.weight = nn.Parameter(torch.zeros_like(wanted), requires_grad=False)
        return linear

    source, spike = ModelSource(dense, "tiny"), SpikeConfig.preset("TW1A16")
    blocks = list(convert_blocks(source, spike, Run(token_ids), GptqOptions(), encode=encode))
    assert len(seen) == LINEARS
    assert not blocks[0][0].mlp.up_proj.weight.any()
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())


def test_the_estimate_of_the_disk(make_llama, token_ids, tmp_path) -> None:
    from snnllm.memory import estimate

    dense = make_llama(hidden_size=256, intermediate_size=512, vocab_size=256)
    spike = SpikeConfig.preset("TW1.4A16")
    need = estimate(ModelSource(dense, "tiny"), spike, 6, 24, "gptq")
    report = convert(dense, Path(tmp_path) / "out", spike, token_ids, pipeline="gptq")
    assert need.disk_mib == pytest.approx(report.weight_bytes / 2**20, rel=0.25)
