"""Checkpoints that are damaged, foreign or unfinished are refused, with the reason."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from snnllm import checkpoint, writer
from snnllm.checkpoint import MANIFEST, CheckpointError, published, read_manifest, verify
from snnllm.config import SpikeConfig
from snnllm.conversion import convert
from snnllm.modeling import SpikingLlamaForCausalLM, load
from snnllm.pipelines import rtn
from snnllm.writer import ShardWriter


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def alter(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated": (truncate, r"model\.safetensors has \d+ bytes instead of \d+: it is truncated"),
    "altered": (alter, r"model\.safetensors was altered .* SHA-256"),
    "no_shard": (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors is missing"),
    "no_manifest": (lambda f: (f / MANIFEST).unlink(), r"has no spikellm_manifest\.json"),
    "no_config": (lambda f: (f / "config.json").unlink(), r"has no config\.json"),
    "config_no_json": (lambda f: (f / "config.json").write_text("{"), r"config\.json is not valid"),
    "manifest_no_json": (lambda f: (f / MANIFEST).write_text("{x"), r"manifest\.json is not valid"),
    "manifest_no_object": (lambda f: (f / MANIFEST).write_text("[]"), r"holds no JSON object"),
    "schema": (
        lambda f: change_json(f / MANIFEST, schema_version=99),
        r"checkpoint schema 99, this snnllm reads schema 4",
    ),
    "no_files": (lambda f: change_json(f / MANIFEST, files={}), r"lists no weight files"),
    "dense": (
        lambda f: change_json(f / "config.json", model_type="llama"),
        r"holds a 'llama' model, not a spiking LLaMA. Convert it first: snnllm convert",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(checkpoint_copy, damage):
    verify(checkpoint_copy)
    change, message = DAMAGE[damage]
    change(checkpoint_copy)
    for read in (verify, load, SpikingLlamaForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=message):
            read(checkpoint_copy)


def test_a_config_of_another_schema_is_refused(checkpoint_copy):
    path = checkpoint_copy / "config.json"
    spike = json.loads(path.read_text())["quantization_config"]
    change_json(path, quantization_config={**spike, "schema_version": 3})
    with pytest.raises(ValueError, match="spiking schema version 3; this snnllm reads version 4"):
        load(checkpoint_copy)


def test_one_shard_of_many_is_missing(checkpoint_copy, tmp_path):
    load(checkpoint_copy).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    next((tmp_path / "shards").glob("model-00002-*")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-\d+\.safetensors is missing"):
        load(tmp_path / "shards")


def test_a_dense_folder_is_refused(make_llama, tmp_path):
    make_llama().save_pretrained(tmp_path / "dense")
    with pytest.raises(CheckpointError, match="not a spiking LLaMA"):
        load(tmp_path / "dense")


@pytest.mark.parametrize("name", ["mlp.up_proj.encoder", "self_attn.k_encoder"])
def test_channel_groups_out_of_range_are_refused_on_loading(checkpoint_copy, name):
    path, key = checkpoint_copy / "model.safetensors", f"model.layers.1.{name}.channel_group"
    tensors = load_file(path)
    tensors[key].view(-1)[3] = 7
    save_file(tensors, path, {"format": "pt"})
    manifest = read_manifest(checkpoint_copy)["files"]
    manifest[path.name] = {
        "bytes": path.stat().st_size,
        "sha256": checkpoint.file_digest(path),
    }
    change_json(checkpoint_copy / MANIFEST, files=manifest)
    with pytest.raises(ValueError, match=r"layers\.1\..*channel_group must lie in 0\.\.1 .*got 7"):
        load(checkpoint_copy)


# -- all or nothing --------------------------------------------------------------------------------------


def contents(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_the_folder_appears_at_the_end(tmp_path):
    output = tmp_path / "new" / "out"
    with published(output) as work:
        (work / "file").write_text("x")
        assert not output.exists()
    assert contents(output) == ["file"]
    assert contents(tmp_path / "new") == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_nothing(tmp_path, error):
    def write_and_fail() -> None:
        with published(tmp_path / "out") as work:
            (work / "file").write_text("x")
            raise error

    with pytest.raises(error):
        write_and_fail()
    assert contents(tmp_path) == []


def test_an_empty_output_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    with published(tmp_path / "out") as work:
        assert contents(work) == []
        (work / "file").write_text("x")
    assert contents(tmp_path / "out") == ["file"]
    assert contents(tmp_path) == ["out"]


def test_two_at_a_time_do_not_touch_each_other(tmp_path):
    output = tmp_path / "out"

    def write_second(first: Path) -> None:
        with published(output) as second:
            (second / "file").write_text("second")
            assert contents(first) == ["file"]

    def write_both() -> None:
        with published(output) as first:
            (first / "file").write_text("first")
            write_second(first)

    with pytest.raises(FileExistsError, match="exists and is not empty"):
        write_both()
    assert (output / "file").read_text() == "second"
    assert contents(tmp_path) == ["out"]


def test_what_is_not_ours_beside_the_output_stays(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "precious").write_text("x")
    with published(tmp_path / "out") as work:
        (work / "file").write_text("x")
    assert contents(tmp_path / "out.partial") == ["precious"]


def test_others_may_read_a_checkpoint(tmp_path):
    (tmp_path / "plain").mkdir()
    with published(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_output_that_is_in_use_is_not_touched(make_llama, token_ids, tmp_path, kind):
    output = tmp_path / "out"
    if kind == "folder":
        output.mkdir()
    precious = output / "precious" if kind == "folder" else output
    precious.write_text("x")
    with pytest.raises(FileExistsError, match="exists and is not empty; choose another output"):
        convert(make_llama(), output, SpikeConfig(), token_ids[:1], pipeline="rtn")
    assert precious.read_text() == "x"
    assert contents(tmp_path) == ["out"]


def test_a_file_in_the_path_of_the_output(make_llama, token_ids, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        convert(
            make_llama(), tmp_path / "file" / "out", SpikeConfig(), token_ids[:1], pipeline="rtn"
        )
    assert contents(tmp_path) == ["file"]


@pytest.mark.parametrize("failing", ["shard", "manifest"])
def test_a_full_disk_at_the_end_loses_nothing(
    make_llama, token_ids, tmp_path, monkeypatch, failing
):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_as_safetensors_says(*args: object, **kwargs: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    if failing == "shard":
        monkeypatch.setattr(writer, "save_file", full_as_safetensors_says)
    else:
        monkeypatch.setattr(checkpoint, "file_digest", full)
    with pytest.raises(OSError, match="No space left on device"):
        convert(make_llama(), tmp_path / "out", SpikeConfig(), token_ids[:1], pipeline="rtn")
    assert contents(tmp_path) == ["out.work"]
    monkeypatch.undo()
    seen: list[int] = []
    monkeypatch.setattr(rtn, "fill_block", lambda *_: seen.append(1))  # no block is converted again
    convert(make_llama(), tmp_path / "out", SpikeConfig(), token_ids[:1], pipeline="rtn")
    assert contents(tmp_path) == ["out"]
    assert not seen


KILLED = """
import os, signal, sys, torch
from snnllm.config import SpikeConfig
from snnllm.conversion import convert
from transformers import LlamaForCausalLM
model = LlamaForCausalLM.from_pretrained(sys.argv[1])
def die(report):
    if report.index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
convert(model, sys.argv[2], SpikeConfig(), torch.ones(1, 8, dtype=torch.long), on_block=die)
"""


def test_a_killed_conversion_leaves_nothing_that_loads(
    make_llama, tiny_checkpoint, token_ids, tmp_path
):
    make_llama().save_pretrained(tmp_path / "dense")
    output = tmp_path / "out"
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "dense"), str(output)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == -signal.SIGKILL, run.stderr[-2000:]
    assert not output.exists()
    work = tmp_path / "out.work"
    assert sorted(p.name for p in work.glob("block*")) == [
        "block-00000.safetensors",
        "block-00001.safetensors",
    ]
    # Not even with the config, the last file before the manifest, beside it.
    shutil.copy(tiny_checkpoint / "config.json", work)
    with pytest.raises(CheckpointError, match="not a finished spiking checkpoint"):
        load(work)
    shutil.rmtree(work)
    convert(
        make_llama(), output, SpikeConfig(), token_ids[:1], pipeline="rtn"
    )  # the next try succeeds
    assert contents(tmp_path) == ["dense", "out"]
    load(output)


# -- the writer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [1, 500, 1 << 30])
def test_shards_hold_every_tensor_once(tmp_path, shard_bytes):
    tensors = {f"t{i}": torch.full((25,), float(i)) for i in range(7)}
    shards = ShardWriter(tmp_path, shard_bytes)
    for name, tensor in tensors.items():
        shards.add({name: tensor})
    shards.close()
    assert shards.total_bytes == 700
    files = sorted(tmp_path.glob("*.safetensors"))
    loaded = {k: v for f in files for k, v in load_file(f).items()}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[k], v) for k, v in tensors.items())
    index = tmp_path / "model.safetensors.index.json"
    if len(files) == 1:
        assert files[0].name == "model.safetensors"
        assert not index.exists()
    else:
        values = json.loads(index.read_text())
        assert values["metadata"]["total_size"] == 700
        assert values["weight_map"].keys() == tensors.keys()
        for name, file in values["weight_map"].items():
            assert name in load_file(tmp_path / file)


def test_the_manifest_lists_size_and_digest_of_every_shard(tiny_checkpoint):
    files = read_manifest(tiny_checkpoint)["files"]
    path = tiny_checkpoint / "model.safetensors"
    assert files == {
        path.name: {"bytes": path.stat().st_size, "sha256": checkpoint.file_digest(path)}
    }


def test_an_altered_spiking_config_is_refused(checkpoint_copy):
    path = checkpoint_copy / "config.json"
    values = json.loads(path.read_text())
    values["bos_token_id"] = 3  # not ours to guard
    path.write_text(json.dumps(values))
    verify(checkpoint_copy)
    values["quantization_config"]["salient_steps"] = 4
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="quantization_config was altered"):
        verify(checkpoint_copy)
