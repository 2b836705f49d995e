"""The spiking LLaMA inside transformers: structure, Auto classes, generate, save and load, casts."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

from snnllm.checkpoint import MANIFEST, SHIM
from snnllm.config import SpikeConfig
from snnllm.conversion import convert
from snnllm.execution import View, spiking_modules, use_view
from snnllm.hf_quantizer import SpikeHfQuantizer, SpikeQuantizationConfig
from snnllm.linear import SpikingLinear
from snnllm.modeling import (
    LINEARS,
    SpikingLlamaConfig,
    SpikingLlamaForCausalLM,
    load,
    register,
    spiking_config,
)
from snnllm.precision import FLOAT32_BUFFERS

ROPE = {"rope_theta": 10000.0}
STRUCTURES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "multi_head": {"num_key_value_heads": 4},
    "multi_query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "head_dim": {"head_dim": 12},
    "rope_linear": {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 4.0}},
    "rope_llama3": {
        "rope_parameters": {
            **ROPE,
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}


@torch.no_grad()
def sqnr_db(target: Tensor, actual: Tensor) -> float:
    noise = (target - actual).double().square().sum()
    return float(10 * (target.double().square().sum() / noise).log10())


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    out: Tensor = model(ids).logits
    return out


def same_state(first: Any, second: Any) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return load(tiny_checkpoint)


# -- structure -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRUCTURES)
def test_eight_bits_stay_close_to_the_float_model(convert_tiny, token_ids, tolerance, name):
    dense, folder = convert_tiny("W8A8", **STRUCTURES[name])
    spiking = load(folder)
    expected = logits(dense, token_ids)
    assert sqnr_db(expected, logits(spiking, token_ids)) > tolerance.sqnr_w8a8_db
    names = {n for n, _ in dense.named_modules()}
    assert names <= {n for n, _ in spiking.named_modules()}
    for index in range(2):
        for path in LINEARS:
            ours = spiking.get_submodule(f"model.layers.{index}.{path}")
            theirs = dense.get_submodule(f"model.layers.{index}.{path}")
            assert isinstance(ours, SpikingLinear)
            assert (ours.bias is None) == (theirs.bias is None)
            assert sqnr_db(theirs.weight, ours.dequantized_weight()) > tolerance.sqnr_w8a8_db
    shared = spiking.lm_head.weight is spiking.model.embed_tokens.weight
    assert shared == dense.config.tie_word_embeddings
    for key in ("hidden_size", "head_dim", "rope_parameters", "tie_word_embeddings"):
        assert getattr(spiking.config, key) == getattr(dense.config, key)


def test_fewer_bits_are_worse(convert_tiny, token_ids):
    quality = []
    for preset in ("W2A2", "W4A4", "W8A8"):
        dense, folder = convert_tiny(preset)
        quality.append(sqnr_db(logits(dense, token_ids), logits(load(folder), token_ids)))
    assert quality == sorted(quality)


@pytest.mark.parametrize("pipeline", ["rtn", "rotated"])
@pytest.mark.parametrize("skipped", ["down_proj", "model.layers.1.self_attn.q_proj"])
def test_modules_to_not_convert_stay_dense(make_llama, token_ids, tmp_path, skipped, pipeline):
    dense = make_llama()
    spike = SpikeConfig.preset("W8A8", modules_to_not_convert=(skipped,))
    convert(dense, tmp_path / "out", spike, token_ids[:2], pipeline=pipeline)
    spiking = load(tmp_path / "out")
    for name, module in dense.named_modules():
        if isinstance(module, torch.nn.Linear):
            ours = spiking.get_submodule(name)
            stays = name.endswith(skipped) or name == "lm_head"
            assert isinstance(ours, torch.nn.Linear) == stays, name
            if stays and pipeline == "rtn":  # the other one moves its weights into a new basis
                assert torch.equal(ours.weight, module.weight)
    assert sqnr_db(logits(dense, token_ids), logits(spiking, token_ids)) > 20


# -- Auto classes -----------------------------------------------------------------------------------------


def test_the_auto_classes_know_the_architecture(tiny_checkpoint, model, token_ids):
    register()  # again: it is idempotent
    config = AutoConfig.from_pretrained(tiny_checkpoint)
    assert type(config) is SpikingLlamaConfig
    assert config.spike == SpikeConfig.preset("W4A4T2", salient_ratio=0.2)
    auto = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    assert type(auto) is SpikingLlamaForCausalLM
    assert torch.equal(logits(auto, token_ids), logits(model, token_ids))
    assert isinstance(auto.hf_quantizer, SpikeHfQuantizer)
    assert auto.hf_quantizer.is_serializable()
    assert not auto.hf_quantizer.is_compileable  # see the property: generate must not try
    assert not auto.hf_quantizer.is_trainable
    assert type(AutoModelForCausalLM.from_config(config)) is SpikingLlamaForCausalLM


def test_a_config_without_spikes_says_how_to_make_one():
    with pytest.raises(ValueError, match="has no quantization_config. Make checkpoints with"):
        SpikingLlamaForCausalLM(SpikingLlamaConfig(hidden_size=8, num_attention_heads=2))


def test_the_quantizer_refuses_a_dense_architecture(tiny_checkpoint):
    with pytest.raises(ValueError, match="belongs to spiking_llama checkpoints, but the model has"):
        LlamaForCausalLM.from_pretrained(tiny_checkpoint)


def test_the_quantization_config_is_the_spike_config():
    spike = SpikeConfig(salient_ratio=0.3)
    config = SpikeQuantizationConfig(**spike.to_dict())
    assert config.spike == spike
    assert config.to_dict() == spike.to_dict()
    assert spiking_config(LlamaConfig(), spike).spike == spike


WITHOUT_THE_PACKAGE = """
import sys, torch
from transformers import AutoModelForCausalLM
assert "snnllm" not in sys.modules
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise SystemExit("loaded without the package")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert type(model).__module__ == "snnllm.modeling", type(model)
model.save_pretrained(sys.argv[2])
with torch.no_grad():
    logits = model(torch.arange(3, 20)[None]).logits
torch.save(logits, sys.argv[3])
"""


def test_transformers_alone_fails_loudly_and_works_through_the_shim(
    tiny_checkpoint, model, tmp_path
):
    arguments = [str(tiny_checkpoint), str(tmp_path / "again"), str(tmp_path / "logits.pt")]
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, *arguments],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    ids = torch.arange(3, 20)[None]
    expected = logits(model, ids)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)
    assert torch.equal(logits(load(tmp_path / "again"), ids), expected)
    python = {p.name for p in (tmp_path / "again").glob("*.py")}
    assert python == {SHIM}  # the shim is all the code that a checkpoint carries


def test_the_shim_without_the_package_says_what_to_install(tiny_checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "snnllm.modeling", None)
    code = compile((tiny_checkpoint / SHIM).read_text(), SHIM, "exec")
    with pytest.raises(ImportError, match="needs the package snnllm. Run `pip install snnllm`"):
        exec(code, types.ModuleType("shim").__dict__)


@pytest.mark.parametrize("name", ["eager", "sdpa", "flash_attention_2"])
def test_another_attention_cannot_read_spikes(tiny_checkpoint, model, token_ids, name):
    message = f"attn_implementation='{name}' cannot read the spikes of Q, K and V"
    for auto in (SpikingLlamaForCausalLM, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=message):
            auto.from_pretrained(tiny_checkpoint, attn_implementation=name)
        loaded = auto.from_pretrained(tiny_checkpoint, attn_implementation="spiking")
        assert torch.equal(logits(loaded, token_ids), logits(model, token_ids))
    for request in (name, {"": name}):
        with pytest.raises(ValueError, match=message):
            model.set_attn_implementation(request)
    model.set_attn_implementation("spiking")
    assert model.config._attn_implementation == "spiking"


def test_attention_in_float_has_the_choice_of_transformers(convert_tiny, token_ids):
    folder = convert_tiny(overrides={"attention": "float"})[1]
    default = load(folder)
    assert default.config._attn_implementation == "sdpa"
    loaded = SpikingLlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert loaded.config._attn_implementation == "eager"
    assert sqnr_db(logits(default, token_ids), logits(loaded, token_ids)) > 20
    with pytest.raises(
        ValueError, match="is for encoded Q, K and V, but this model leaves them in"
    ):
        default.set_attn_implementation("spiking")
    default.set_attn_implementation("eager")
    assert torch.equal(logits(default, token_ids), logits(loaded, token_ids))


# -- save and load -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_save_and_load_change_no_bit(convert_tiny, token_ids, tmp_path, shard, tied):
    first = load(convert_tiny(tie_word_embeddings=tied)[1])
    first.save_pretrained(tmp_path / "again", max_shard_size=shard)
    shards = list((tmp_path / "again").glob("*.safetensors"))
    assert (len(shards) > 1) == (shard == "20KB")
    listed = json.loads((tmp_path / "again" / MANIFEST).read_text())["files"]
    assert set(listed) == {p.name for p in shards}
    second = load(tmp_path / "again")
    same_state(first, second)
    assert torch.equal(logits(first, token_ids), logits(second, token_ids))
    assert second.config.spike == first.config.spike


def test_saving_over_a_checkpoint_keeps_its_provenance(checkpoint_copy):
    before = json.loads((checkpoint_copy / MANIFEST).read_text())["provenance"]
    assert before["pipeline"] == "rtn"
    load(checkpoint_copy).save_pretrained(checkpoint_copy, max_shard_size="20KB")
    assert json.loads((checkpoint_copy / MANIFEST).read_text())["provenance"] == before
    load(checkpoint_copy)


def test_saving_elsewhere_carries_the_provenance(checkpoint_copy, model, tmp_path):
    before = json.loads((checkpoint_copy / MANIFEST).read_text())["provenance"]
    loaded, _ = SpikingLlamaForCausalLM.from_pretrained(checkpoint_copy, output_loading_info=True)
    copy.deepcopy(loaded).save_pretrained(tmp_path / "new")
    assert json.loads((tmp_path / "new" / MANIFEST).read_text())["provenance"] == before
    assert load(tmp_path / "new").provenance == before
    # A model of unknown origin does not take over what another one left in the folder.
    built = SpikingLlamaForCausalLM(spiking_config(model.config, model.config.spike))
    built.save_pretrained(checkpoint_copy)
    assert json.loads((checkpoint_copy / MANIFEST).read_text())["provenance"] == {}


def test_a_state_dict_makes_the_same_model(model, token_ids):
    config = spiking_config(model.config, model.config.spike)
    other = SpikingLlamaForCausalLM(config).eval()
    assert not torch.equal(logits(other, token_ids), logits(model, token_ids))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, token_ids), logits(model, token_ids))


def test_deepcopy_is_independent(model, token_ids):
    expected = logits(model, token_ids)  # the copy must not share what this run prepared
    other = copy.deepcopy(model)
    assert torch.equal(logits(other, token_ids), expected)
    for _, module in spiking_modules(other):
        if isinstance(module, SpikingLinear):
            module.weight_codes.zero_()
            module.invalidate()
    assert not torch.equal(logits(other, token_ids), expected)
    assert torch.equal(logits(model, token_ids), expected)


# -- dtypes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", ["rtn", "rotated"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_integers_and_scales(make_llama, token_ids, dtype, pipeline, tmp_path):
    spike = SpikeConfig(salient_ratio=0.25)
    convert(make_llama(), tmp_path / "first", spike, token_ids[:2], pipeline=pipeline)
    model, half = load(tmp_path / "first"), load(tmp_path / "first", dtype)
    for name, tensor in half.state_dict().items():
        kept = (*FLOAT32_BUFFERS, "weight_", "channel_group", "order", "signs")
        if name.rpartition(".")[2].startswith(kept):
            assert tensor.dtype == model.state_dict()[name].dtype, name
            assert torch.equal(tensor, model.state_dict()[name]), name
        else:
            assert tensor.dtype == dtype, name
    out = logits(half, token_ids)
    assert out.dtype == dtype
    assert sqnr_db(logits(model, token_ids), out.float()) > 10
    half.save_pretrained(tmp_path / "half")
    again = load(tmp_path / "half")
    same_state(half, again)
    assert torch.equal(logits(again, token_ids), out)


@pytest.mark.parametrize("attention", ["encoded", "float"])
def test_double_precision_runs_equally_in_all_views(convert_tiny, token_ids, attention):
    model = load(convert_tiny(overrides={"attention": attention})[1], torch.float64)
    out = {}
    for view in View:
        with use_view(model, view):
            out[view] = logits(model, token_ids)
        assert out[view].dtype == torch.float64
        assert torch.equal(out[view], out[View.BINARY])


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_round_no_scales_and_keep_the_order_of_heads(make_llama, token_ids, tmp_path, cast):
    spike = SpikeConfig(salient_ratio=0.25)
    convert(make_llama(), tmp_path / "out", spike, token_ids[:2], pipeline="rotated")
    loaded = load(tmp_path / "out")
    built = SpikingLlamaForCausalLM(spiking_config(loaded.config, loaded.config.spike)).eval()
    built.load_state_dict(loaded.state_dict())
    built.to(cast)
    ends = ("scale", "offset_key", "offset_input", "qk_rotation.order")
    kept = [n for n, _ in built.named_buffers() if n.endswith(ends)]
    assert len(kept) == 2 * (7 + 1 + 7 + 1)
    for name in kept:
        dtype = torch.uint8 if name.endswith("order") else torch.float32
        assert built.get_buffer(name).dtype == dtype, name
        assert torch.equal(built.get_buffer(name), loaded.get_buffer(name)), name
    assert logits(built, token_ids).dtype == cast


def test_casts(tiny_checkpoint, model, token_ids):
    with pytest.raises(ValueError, match=r"half.* is not supported for quantized model"):
        load(tiny_checkpoint).half()  # transformers' own rule for what from_pretrained has loaded
    config = spiking_config(model.config, model.config.spike)
    built = SpikingLlamaForCausalLM(config).eval()
    built.load_state_dict(model.state_dict())
    built.half()
    ours, theirs = built.model.layers[0].mlp.down_proj, model.model.layers[0].mlp.down_proj
    assert torch.equal(ours.weight_scale, theirs.weight_scale)
    assert logits(built, token_ids).dtype == torch.float16
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).half()
    assert torch.equal(ours(x), theirs(x))


# -- generate ---------------------------------------------------------------------------------------------------


def generate(model: Any, ids: Tensor, **options: Any) -> Tensor:
    config = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0, **options)
    out: Tensor = model.generate(ids, generation_config=config)
    return out


def test_generate_is_the_same_after_reloading_and_with_either_cache(model, token_ids, tmp_path):
    ids = token_ids[:2, :8]
    expected = generate(model, ids)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    for candidate in (model, again):
        for options in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
            assert torch.equal(generate(candidate, ids, **options), expected)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_batched_with_left_padding_equals_alone(model, token_ids, cache):
    prompts = [token_ids[0, :5], token_ids[1, :9], token_ids[2, :2]]
    ids = torch.stack([torch.nn.functional.pad(p, (9 - len(p), 0)) for p in prompts])
    mask = (ids != 0).long()
    config = GenerationConfig(
        max_new_tokens=12, do_sample=False, pad_token_id=0, cache_implementation=cache
    )
    batch = model.generate(ids, attention_mask=mask, generation_config=config)
    for row, prompt in zip(batch, prompts, strict=True):
        alone = generate(model, prompt[None])[0, len(prompt) :]
        ours = row[9 : 9 + len(alone)]
        assert torch.equal(ours, alone)


# -- torch.compile ------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_compile_fullgraph(tiny_checkpoint, token_ids, static):
    model = load(tiny_checkpoint)
    for module in model.modules():
        if isinstance(module, SpikingLinear):
            module.backend = "reference"
    expected = logits(model, token_ids)  # prepares the weights
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    cache = StaticCache(config=model.config, max_cache_len=64) if static else None
    out = compiled(token_ids, past_key_values=cache, use_cache=static)
    assert torch.equal(out.logits, expected)
