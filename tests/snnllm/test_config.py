"""SpikeConfig: validation, presets, serialisation; the views and their switch."""

from __future__ import annotations

import dataclasses
import json

import pytest
from torch import nn

from snnllm.config import PRESETS, SCHEMA_VERSION, Operands, Score, SpikeConfig
from snnllm.execution import View, set_view, spiking_modules, use_view


@pytest.mark.parametrize(
    ("name", "weight", "activation", "ratio", "steps"),
    [
        ("W4A4T2", 4, 4, 0.10, 2),
        ("W4A4T4", 4, 4, 0.05, 4),
        ("W4A4T3", 4, 4, 0.10, 3),
        ("W4A4", 4, 4, 0.0, 1),
        ("W4A8", 4, 8, 0.0, 1),
        ("W2A8", 2, 8, 0.0, 1),
        ("W8A8", 8, 8, 0.0, 1),
        ("A4", 16, 4, 0.0, 1),
        ("A4T2", 16, 4, 0.10, 2),
        ("W4A16", 4, 16, 0.0, 1),
        (" w4a4t2 ", 4, 4, 0.10, 2),
    ],
)
def test_presets_follow_the_method(name, weight, activation, ratio, steps):
    spike = SpikeConfig.preset(name)
    assert (spike.weight_bits, spike.activation_bits) == (weight, activation)
    assert (spike.salient_ratio, spike.salient_steps) == (ratio, steps)


@pytest.mark.parametrize("name", PRESETS)
def test_a_label_names_its_preset(name):
    assert SpikeConfig.preset(name).label == name


def test_overrides_replace_single_fields():
    spike = SpikeConfig.preset("W4A4T2", salient_ratio=0.3, score="abs", attention="float")
    assert spike.salient_ratio == 0.3
    assert spike.score is Score.ABS
    assert spike.attention is Operands.FLOAT
    assert not spike.encodes_attention


@pytest.mark.parametrize("name", ["", "W4", "4A4", "W4A4T", "W4A4T2x", "int4", "W-4A4"])
def test_an_unknown_preset_shows_examples(name):
    with pytest.raises(ValueError, match=r"Unknown preset .* look like W<bits>A<bits>T<steps>"):
        SpikeConfig.preset(name)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight_bits": 1}, r"weight_bits must be in 2\.\.8 or 16 \(float\), got 1"),
        ({"weight_bits": 9}, r"weight_bits must be in 2\.\.8 or 16"),
        ({"activation_bits": 0}, r"activation_bits must be in 1\.\.8 or 16"),
        ({"salient_steps": 0}, r"salient_steps must be in 1\.\.64, got 0"),
        ({"kv_salient_steps": 65}, r"kv_salient_steps must be in 1\.\.64"),
        ({"salient_ratio": 1.5}, r"salient_ratio is a fraction of the channels in \[0, 1\]"),
        ({"salient_ratio": -0.1}, r"salient_ratio is a fraction"),
        ({"salient_ratio": float("nan")}, r"salient_ratio is a fraction"),
        ({"weight_group_size": 4}, r"weight_group_size must be in 8\.\."),
        ({"weight_bits": 16, "activation_bits": 16}, r"leaves the model dense"),
        ({"group_steps": {"a": ()}}, r"group_steps\['a'\] must hold steps >= 1"),
        ({"group_steps": {"a": (1, 0)}}, r"group_steps\['a'\] must hold steps >= 1"),
        (
            {"group_steps": {"a": (1,) * 65}},
            r"group_steps\['a'\] must hold at most 64 groups, got 65",
        ),
        ({"activation_clip": 0.0}, r"activation_clip must lie in \(0, 1\], got 0\.0"),
        ({"activation_clip": 1.5}, r"activation_clip must lie in \(0, 1\], got 1\.5"),
        ({"capacity": "power_of_two", "salient_steps": 3}, r"1, 2, 4, \.\.\., got salient_steps=3"),
        ({"capacity": "power_of_two", "kv_salient_steps": 6}, r"got kv_salient_steps=6; use"),
        (
            {"capacity": "power_of_two", "group_steps": {"a": (1, 5)}},
            r"got group_steps\['a'\]=5; use capacity='steps'",
        ),
        (
            {"value_range": "both"},
            r"value_range must be one of \['split', 'shared', 'commensurate'\]",
        ),
        (
            {"value_range": "commensurate", "activation_bits": 8},
            r"linears: .* capacities of at most 63, got \(255, 510\); use fewer bits",
        ),
        (
            {"value_range": "commensurate", "group_steps": {"a": (2, 1)}},
            "a: .* the largest capacity in the last channel group",
        ),
        (
            {"value_range": "commensurate", "weight_bits": 2, "mean_steps": 1.4},
            "needs weight levels with one sum per linear; ternary",
        ),
        ({"score": "third_order"}, r"score must be one of"),
        ({"attention": True}, r"attention must be one of"),
    ],
)
def test_values_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        SpikeConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight_bits": 4.0}, r"weight_bits must be an int, got 4\.0"),
        ({"salient_steps": True}, r"salient_steps must be an int, got True"),
        ({"weight_group_size": "32"}, r"weight_group_size must be an int"),
        ({"activation_clip": True}, r"activation_clip must be a number, got True"),
        ({"salient_ratio": "x"}, r"salient_ratio must be a number, got 'x'"),
        ({"salient_ratio": None}, r"salient_ratio must be a number, got None"),
        ({"modules_to_not_convert": "q_proj"}, r"modules_to_not_convert must be a sequence"),
    ],
)
def test_values_of_the_wrong_type(values, message):
    with pytest.raises(TypeError, match=message):
        SpikeConfig(**values)


def test_steps_of_float_activations():
    with pytest.raises(ValueError, match=r"'W4A16T2' asks for 2 time steps of float activations"):
        SpikeConfig.preset("W4A16T2")
    assert SpikeConfig.preset("W4A16").salient_ratio == 0.0


def test_one_group_of_any_bits_is_commensurate():
    spike = SpikeConfig.preset("W8A8", value_range="commensurate")
    assert SpikeConfig.from_dict(json.loads(json.dumps(spike.to_dict()))) == spike
    assert spike.attention_range == "split"
    assert SpikeConfig(value_range="shared").attention_range == "shared"


def test_equal_configs_are_equal_keys():
    first, second = (
        SpikeConfig(salient_ratio=ratio, group_steps=dict(steps))
        for ratio, steps in (
            (1, [("a", [1, 2]), ("b", (1, 4))]),
            (1.0, [("b", (1, 4)), ("a", (1, 2))]),
        )
    )
    assert first == second
    assert len({first, second, SpikeConfig()}) == 2


def test_zero_steps_in_a_preset():
    with pytest.raises(ValueError, match=r"T \(salient steps\) must be in 1\.\.64, got 0"):
        SpikeConfig.preset("W4A4T0")


def test_the_dictionary_form_is_json_and_comes_back():
    spike = SpikeConfig(
        weight_group_size=32,
        score="gauss_newton",
        modules_to_not_convert=["down_proj"],
        group_steps={"model.layers.0.mlp.down_proj": [1, 2, 4]},
    )
    data = json.loads(json.dumps(spike.to_dict()))
    assert data["quant_method"] == "spikellm"
    assert data["schema_version"] == SCHEMA_VERSION
    assert SpikeConfig.from_dict(data) == spike


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, r"quant_method 'spikellm' expected, got 'gptq'"),
        ({"schema_version": 99}, r"schema version 99; this snnllm reads version 4"),
        ({"salient": 1, "Bits": 2}, r"Unknown spiking config keys: Bits, salient"),
    ],
)
def test_foreign_dictionaries_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SpikeConfig.from_dict({**SpikeConfig().to_dict(), **change})


def test_steps_of_a_module():
    spike = SpikeConfig(salient_steps=4, kv_salient_steps=2, group_steps={"a": (1, 3, 5)})
    assert spike.steps_of("a") == (1, 3, 5)
    assert spike.steps_of("b") == (1, 4)
    assert spike.kv_steps == (1, 2)
    plain = SpikeConfig(salient_ratio=0.0)
    assert plain.steps_of("b") == plain.kv_steps == (1,)


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SpikeConfig().weight_bits = 8


# -- views ------------------------------------------------------------------------------------------


def test_views_are_chosen_and_restored(make_linear):
    model = nn.Sequential(make_linear(name="a"), nn.ReLU(), make_linear(10, 4, name="b"))
    assert [m.view for _, m in spiking_modules(model)] == [View.COLLAPSED] * 2
    set_view(model, "unrolled")
    model[2].view = View.BINARY
    with use_view(model, View.COLLAPSED):
        assert [m.view for _, m in spiking_modules(model)] == [View.COLLAPSED] * 2
    assert [m.view for _, m in spiking_modules(model)] == [View.UNROLLED, View.BINARY]
    with pytest.raises(RuntimeError, match="from inside"), use_view(model, "binary"):
        raise RuntimeError("from inside")
    assert [m.view for _, m in spiking_modules(model)] == [View.UNROLLED, View.BINARY]


def test_an_unknown_view_lists_the_known():
    with pytest.raises(ValueError, match="Unknown view 'rolled'; the views are binary, unrolled"):
        set_view(nn.Linear(2, 2), "rolled")


def test_a_dense_model_has_no_views():
    with pytest.raises(ValueError, match="no spiking modules"):
        set_view(nn.Linear(2, 2), "unrolled")


def test_a_refused_view_changes_no_module(make_linear):
    model = nn.Sequential(
        make_linear(name="good"), make_linear(10, 4, capacity="power_of_two", name="bad")
    )
    with pytest.raises(ValueError, match=r"bad: capacity='power_of_two' has counts"):
        set_view(model, "unrolled")
    assert [m.view for _, m in spiking_modules(model)] == [View.COLLAPSED] * 2
