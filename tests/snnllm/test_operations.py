"""Operation counts: against loops, against SpikingJelly's SynOpCounter, and over whole models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from spikingjelly.activation_based.op_counter import DispatchCounterMode, SynOpCounter
from torch import Tensor

from neurons import SpikeEncoder
from neurons.functional import signed_events
from snnllm.config import SpikeConfig
from snnllm.conversion import convert
from snnllm.execution import use_view
from snnllm.layout import LinearLayout
from snnllm.linear import SpikingLinear
from snnllm.modeling import SpikingLlamaForCausalLM, load
from snnllm.operation_rows import AttentionCall
from snnllm.operations import Kind, OperationReport, count_operations, cross_check, linear_row
from snnllm.weights import QuantizedWeight


def spiking_linear(
    k: int = 40,
    n: int = 12,
    weight_bits: int = 4,
    activation_bits: int = 4,
    steps: tuple[int, ...] = (1, 2),
    group_size: int | None = None,
    salient: int = 4,
    value_range: str = "split",
) -> SpikingLinear:
    """A linear with random codes, whose last `salient` channels are in the last group."""
    generator = torch.Generator().manual_seed(0)
    layout = LinearLayout(weight_bits, activation_bits, steps, value_range, "steps", group_size)
    module = SpikingLinear(k, n, False, layout, name="layer")
    group = torch.zeros(k, dtype=torch.uint8)
    if len(steps) > 1:
        group[k - salient :] = len(steps) - 1
    module.set_channel_group(group)
    if weight_bits == 16:
        module.set_float_weight(torch.randn(n, k, generator=generator))
        return module
    groups = 1 if group_size is None else -(-k // group_size)
    codes = torch.randint(0, 2**weight_bits, (n, k), generator=generator, dtype=torch.uint8)
    zero = torch.randint(0, 2**weight_bits, (n, groups), generator=generator, dtype=torch.uint8)
    module.set_weight(QuantizedWeight(codes, torch.ones(n, groups), zero))
    return module


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory, stories_dir: Path) -> SpikingLlamaForCausalLM:
    folder = tmp_path_factory.mktemp("stories") / "W4A4T2"
    windows = torch.randint(3, 500, (2, 32), generator=torch.Generator().manual_seed(0))
    convert(stories_dir, folder, SpikeConfig.preset("W4A4T2"), windows, pipeline="rtn")
    return load(folder)


@pytest.fixture(scope="module")
def prompt() -> Tensor:
    return torch.randint(3, 500, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def report(stories: SpikingLlamaForCausalLM, prompt: Tensor) -> OperationReport:
    return count_operations(stories, prompt)


# -- one linear ------------------------------------------------------------------------------------


def test_linear_counts_equal_loops() -> None:
    module, x = spiking_linear(), torch.randn(5, 40)
    row = linear_row("layer", module, x)
    encoding = module.encoder.encode(x)
    centred = module.encoder.centre(encoding).tolist()
    events = sum(abs(value) for token in centred for value in token)
    silent = sum(value == 0 for token in centred for value in token)
    assert row.spikes is not None
    assert (row.spikes.events, row.spikes.silent) == (events, silent)
    assert row.spikes.slots == 5 * (36 * 15 + 4 * 30)
    assert row.spikes.rate == events / row.spikes.slots
    assert row.spikes.spikes_per_neuron == events / 200
    assert row.spikes.silent_fraction == silent / 200
    assert row.synaptic_operations == events * 12
    assert row.unary_operations == int(encoding.count.sum()) * 12
    assert row.macs == 5 * 40 * 12
    assert row.effective_macs == row.macs - silent * 12


def test_ace_of_w4a4_with_ten_percent_at_two_steps() -> None:
    row = linear_row("layer", spiking_linear(k=40, salient=4), torch.randn(3, 40))
    assert row.ace_ratio == 0.06875
    report = OperationReport("W4A4T2", 1, 3, (row,), (), 0)
    assert "| ACE over fp16, linears | 6.875 % |" in report.to_markdown()


@pytest.mark.parametrize(
    ("weight_bits", "activation_bits", "steps", "group_size"),
    [(4, 4, (1, 2), None), (2, 8, (1,), None), (8, 4, (1, 4), None), (4, 2, (1, 2), 8)],
)
@pytest.mark.parametrize("value_range", ["split", "commensurate"])
def test_spikingjelly_counts_the_same(
    weight_bits: int,
    activation_bits: int,
    steps: tuple[int, ...],
    group_size: int | None,
    value_range: str,
) -> None:
    fields = {"group_size": group_size, "value_range": value_range}
    module = spiking_linear(40, 12, weight_bits, activation_bits, steps, **fields)
    check = cross_check(module, torch.randn(6, 40) + 0.3)
    assert check.unary_counted == check.unary > 0
    assert check.signed_counted == check.signed > 0
    assert check.sums_agree
    assert check.agrees
    assert module.view == "collapsed"


def test_a_merged_sum_is_scaled_once() -> None:
    x = torch.randn(6, 40)
    for value_range, a_sum in (("split", 2 * 3), ("commensurate", 2 * 2 + 2)):
        row = linear_row("layer", spiking_linear(value_range=value_range), x)
        assert row.scale_operations == 6 * (40 + 12 * a_sum)
    # Several scales, no merged sum.
    module = spiking_linear(value_range="commensurate", group_size=16)
    sums = len(module.spec().segments)
    assert linear_row("layer", module, x).scale_operations == 6 * (40 + 12 * 4 * sums)


@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(16, 4), (4, 16)])
def test_cross_check_refuses_float_operands(weight_bits: int, activation_bits: int) -> None:
    module = spiking_linear(weight_bits=weight_bits, activation_bits=activation_bits)
    with pytest.raises(ValueError, match="layer: a float operand"):
        cross_check(module, torch.randn(2, 40))


def test_a_float_input_has_macs_but_no_synaptic_operations() -> None:
    row = linear_row("layer", spiking_linear(activation_bits=16), torch.randn(2, 40))
    assert row.spikes is None
    assert (row.synaptic_operations, row.macs, row.ace_ratio) == (0, 960, 4 * 16 / 256)


def test_a_float_weight_is_added_by_events() -> None:
    row = linear_row("layer", spiking_linear(weight_bits=16), torch.randn(2, 40))
    assert row.synaptic_operations > 0
    assert row.weight_bits == 16
    assert row.ace_ratio == 1.1 * 4 * 16 / 256


def test_zeros_are_silent() -> None:
    row = linear_row("layer", spiking_linear(), torch.zeros(2, 40))
    assert row.spikes is not None
    assert (row.spikes.events, row.spikes.silent_fraction, row.effective_macs) == (0, 1.0, 0)


# -- attention -------------------------------------------------------------------------------------


def attention_call() -> tuple[AttentionCall, Any]:
    """Random operands: 2 sequences, 4 query heads on 2 KV heads, 6 tokens, 8 channels."""

    class Module:
        q_encoder = SpikeEncoder(torch.zeros(8, dtype=torch.uint8))
        k_encoder = SpikeEncoder((torch.arange(16).view(2, 8) % 5 == 0).to(torch.uint8), (1, 2))
        v_encoder = SpikeEncoder((torch.arange(16).view(2, 8) % 7 == 0).to(torch.uint8), (1, 2))

    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, heads, 6, 8, generator=generator) for heads in (4, 2, 2))
    keep = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]).bool()
    visible = torch.ones(6, 6).tril().bool() & keep[:, :, None] & keep[:, None]
    encodings = (Module.q_encoder.encode(q), Module.k_encoder.encode(k), Module.v_encoder.encode(v))
    return AttentionCall("attn", *encodings, visible, keep), Module


def test_attention_counts_equal_loops() -> None:
    call, module = attention_call()
    qk, pv = call.rows(module)
    for row, encoder, encoding in (
        (qk, module.k_encoder, call.key),
        (pv, module.v_encoder, call.value),
    ):
        centred = encoder.centre(encoding)
        synops = macs = effective = 0
        for b, i, j in call.visible.nonzero().tolist():
            for head in range(4):
                events = centred[b, head // 2, j].abs()
                synops += int(events.sum())
                effective += int((events > 0).sum())
                macs += 8
            assert i >= j
        assert (row.synaptic_operations, row.macs, row.effective_macs) == (synops, macs, effective)
        assert row.spikes is not None
        assert (row.spikes.tokens, row.spikes.neurons) == (10, 16)
    assert (qk.name, qk.kind, pv.name, pv.kind) == ("attn.qk", Kind.QK, "attn.pv", Kind.PV)
    assert qk.query is not None
    assert (qk.query.neurons, qk.query.tokens) == (32, 10)
    steps = 1 + int(module.k_encoder.channel_group.sum()) / 16
    assert qk.ace_ratio == pytest.approx(steps * 4 * 4 / 256)
    assert pv.ace_ratio == pytest.approx((1 + 3 / 16) * 4 * 16 / 256)


def test_spikingjelly_counts_the_same_for_keys() -> None:
    call, module = attention_call()
    counter = SynOpCounter()
    q = module.q_encoder.centre(call.query).float()
    trains = signed_events(module.k_encoder.centre(call.key), 30)
    with DispatchCounterMode([counter]):
        for b, i in call.keep.nonzero().tolist():
            seen = call.visible[b, i]
            for head in range(4):
                for train in trains:
                    events = train[:, b, head // 2, seen].float().flatten(0, 1)
                    torch.mm(events, q[b, head, i][:, None])
    assert counter.get_total() == call.rows(module)[0].synaptic_operations


# -- whole models ----------------------------------------------------------------------------------


def test_every_spiking_matmul_has_a_row(report: OperationReport) -> None:
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(report.rows) == 5 * 9
    assert {row.role for row in report.rows} == {*linears, "qk", "pv"}
    assert (report.tokens, report.sequences, report.label) == (18, 2, "W4A4T2")


def test_attention_is_counted_causally(report: OperationReport) -> None:
    pairs = 2 * 9 * 10 // 2
    assert {row.macs for row in report.rows if row.kind is not Kind.LINEAR} == {pairs * 8 * 8}
    softmax = next(part for part in report.float_parts if part.name == "softmax")
    assert softmax.macs == 3 * 5 * 8 * pairs


def test_head_is_listed(report: OperationReport) -> None:
    head = next(part for part in report.float_parts if part.name == "lm_head")
    assert head.macs == 18 * 64 * 512


def test_views_count_the_same(
    stories: SpikingLlamaForCausalLM, prompt: Tensor, report: OperationReport
) -> None:
    with use_view(stories, "unrolled"):
        assert count_operations(stories, prompt).rows == report.rows


def test_counting_leaves_the_model_as_it_was(
    stories: SpikingLlamaForCausalLM, prompt: Tensor
) -> None:
    stories.train()
    count_operations(stories, prompt[0, :3])
    assert stories.training
    stories.eval()
    for module in stories.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not hasattr(module, "attention_observer")
    assert stories.config._attn_implementation == "spiking"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_counted(
    stories: SpikingLlamaForCausalLM, prompt: Tensor, side: str
) -> None:
    short = prompt[1, :6]
    pad = torch.zeros(3, dtype=torch.long)
    padded = torch.cat([pad, short] if side == "left" else [short, pad])
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, : 3 if side == "left" else None] = 0
    mask[1] = (padded != 0).long()
    both = count_operations(stories, torch.stack([prompt[0], padded]), mask)
    apart = [count_operations(stories, prompt[0]), count_operations(stories, short)]
    assert both.tokens == 15
    for name in ("macs", "ace", "scale_operations"):
        assert both.total(name) == sum(single.total(name) for single in apart)
    assert [p.macs for p in both.float_parts] == [
        sum(p) for p in zip(*([f.macs for f in a.float_parts] for a in apart), strict=True)
    ]
    # Counts may differ where a batch rounds a softmax differently, in few neurons.
    synops = sum(single.total("synaptic_operations") for single in apart)
    assert both.total("synaptic_operations") == pytest.approx(synops, rel=0.01)


def test_signed_events_are_sparser_than_unary_ones(report: OperationReport) -> None:
    assert report.total("synaptic_operations") < 0.6 * report.total("unary_operations")


def test_report_as_json_and_markdown(report: OperationReport) -> None:
    values = json.loads(json.dumps(report.to_dict()))
    assert set(values["neurobench"]) == {"SynapticOperations", "ActivationSparsity", "Footprint"}
    operations = values["neurobench"]["SynapticOperations"]
    assert operations["Effective_ACs"] == report.total("synaptic_operations") / 2
    assert operations["Effective_MACs"] < operations["Dense"]
    assert values["totals"]["synaptic_operations"] == report.total("synaptic_operations")
    assert len(values["rows"]) == 45
    text = report.to_markdown()
    for heading in (
        "By projection",
        "Dense parts",
        "Energy estimates",
        "Every module",
        "Definitions",
    ):
        assert f"### {heading}" in text
    assert text.count("| model.layers.") == 45
    assert "Horowitz" in text
    assert "| dense fp16 |" in text


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("W4A4T2", {"attention": "float", "modules_to_not_convert": ("lm_head", "down_proj")}),
        ("A4T2", {}),
        ("W4A16", {}),
        ("W4A4T2", {"capacity": "power_of_two"}),
    ],
)
def test_other_configurations(
    tiny_llama: Any, tmp_path: Path, preset: str, overrides: dict[str, Any]
) -> None:
    windows = torch.randint(3, 120, (2, 16), generator=torch.Generator().manual_seed(0))
    convert(
        tiny_llama,
        tmp_path / "model",
        SpikeConfig.preset(preset, **overrides),
        windows,
        pipeline="rtn",
    )
    report = count_operations(load(tmp_path / "model"), windows)
    products = [row for row in report.rows if row.kind is not Kind.LINEAR]
    assert {row.macs for row in products} == {2 * (16 * 17 // 2) * 32}
    dense = [part for part in report.float_parts if part.name.endswith("down_proj")]
    assert len(dense) == (2 if "attention" in overrides else 0)
    assert (report.total("synaptic_operations") > 0) is (preset != "W4A16")
    assert "### Energy estimates" in report.to_markdown()


def test_a_dense_model_is_refused(tiny_llama: Any) -> None:
    with pytest.raises(ValueError, match="no spiking modules"):
        count_operations(tiny_llama, torch.ones(1, 3, dtype=torch.long))


@pytest.mark.parametrize(
    "ids", [torch.ones(1, 2, 3).long(), torch.ones(0).long(), torch.ones(1, 3)]
)
def test_bad_ids_are_refused(stories: SpikingLlamaForCausalLM, ids: Tensor) -> None:
    with pytest.raises(ValueError, match="input_ids must be token ids"):
        count_operations(stories, ids)


def test_bad_masks_are_refused(stories: SpikingLlamaForCausalLM, prompt: Tensor) -> None:
    with pytest.raises(ValueError, match="attention_mask must be"):
        count_operations(stories, prompt, torch.ones(1, 9))
    with pytest.raises(ValueError, match="with a token in every row"):
        count_operations(stories, prompt, torch.zeros(2, 9))
    with pytest.raises(ValueError, match="attention_mask must be"):
        count_operations(stories, prompt, torch.ones(2, 5))
