"""Interrupted conversions: they resume with the same bits, refuse what has changed, and lose nothing."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from snnllm import work
from snnllm.config import SpikeConfig
from snnllm.conversion import convert
from snnllm.pipelines import Pipeline
from snnllm.pipelines.omniquant_options import OmniQuantOptions
from snnllm.pipelines.rotated import RotatedOptions
from snnllm.work import WorkFolder, differences

CONVERTER = """
import json, os, signal, sys, time, torch
from snnllm.config import SpikeConfig
from snnllm.conversion import convert
from snnllm.pipelines.omniquant_options import OmniQuantOptions
torch.set_num_threads(1)
source, pipeline, windows = sys.argv[1:]
options = OmniQuantOptions(epochs=1, batch=2) if pipeline == "omniquant" else None
ids = torch.tensor(json.loads(windows))
preset = "TW1.4A4T2" if pipeline == "gptq" else "W4A4T2"
spike = SpikeConfig.preset(preset, score="random")
for line in sys.stdin:
    output, seconds = json.loads(line)
    begin, child = time.perf_counter(), os.fork()
    if not child:
        try:
            convert(source, output, spike, ids, pipeline=pipeline, options=options)
        except FileExistsError:
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([code, time.perf_counter() - begin]), flush=True)
"""
"""Converts into the output of a line, in a process of its own, which it kills after so many seconds."""


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("pipeline", list(Pipeline))
def test_killed_at_any_moment_it_resumes_with_the_same_bits(
    stories_dir, stories_ids, tmp_path, pipeline
):
    ids = stories_ids[: 4 * 64].view(4, 64)
    arguments = [str(stories_dir), pipeline, json.dumps(ids.tolist())]
    converter = subprocess.Popen(
        [sys.executable, "-c", CONVERTER, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(output: Path, seconds: float | None) -> tuple[int, float]:
        """Convert; SIGKILL `seconds` after the start. Exit code and duration."""
        assert converter.stdin is not None
        assert converter.stdout is not None
        print(json.dumps([str(output), seconds]), file=converter.stdin, flush=True)
        code, duration = json.loads(converter.stdout.readline())
        return code, duration

    with converter:
        code, whole = run(tmp_path / "whole", None)
        assert code == 0
        dice, kills, killed = random.Random(str(pipeline)), 0, tmp_path / "killed"
        while kills < 4 and not killed.exists():
            code, _ = run(killed, dice.uniform(0.0, 0.8 * whole))
            assert code in (0, -signal.SIGKILL)
            kills += code == -signal.SIGKILL
            if not kills:  # it was through: the machine was busier when the time was taken
                shutil.rmtree(killed)
                whole /= 2
        published = killed.exists()
        code, _ = run(killed, None)
        assert (code != 0) == published  # a finished output is refused, and tidied up beside
        assert files(tmp_path / "whole") == files(killed)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["killed", "whole"]


class Interrupt(Exception):
    """Stands for whatever ends a conversion."""


def interrupted(model: Any, output: Path, ids: Any, after: int = 0, **arguments: Any) -> None:
    def stop(report: Any) -> None:
        if report.index == after:
            raise Interrupt

    with pytest.raises(Interrupt):
        convert(
            model, output, SpikeConfig(), ids, on_block=stop, **{"pipeline": "rtn", **arguments}
        )
    assert (output.parent / f"{output.name}.work" / f"block-{after:05d}.safetensors").is_file()


PIPELINES: list[tuple[str, Any]] = [
    ("rtn", None),
    ("rotated", RotatedOptions()),
    ("omniquant", OmniQuantOptions(epochs=1, batch=2, second_loss=0.5, rotate=False)),
    ("omniquant", OmniQuantOptions(epochs=1, batch=2)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("pipeline", "options"), PIPELINES)
def test_every_pipeline_resumes(make_llama, token_ids, tmp_path, caplog, pipeline, options, dtype):
    model = make_llama(num_hidden_layers=3, attention_bias=True).to(dtype)
    arguments = {"pipeline": pipeline, "options": options}
    convert(model, tmp_path / "whole", SpikeConfig(), token_ids, **arguments)
    interrupted(model, tmp_path / "out", token_ids, after=0, **arguments)
    interrupted(model, tmp_path / "out", token_ids, after=1, **arguments)
    seen: list[int] = []
    start = time.perf_counter()
    report = convert(
        *(model, tmp_path / "out", SpikeConfig(), token_ids),
        on_block=lambda report: seen.append(report.index),
        **arguments,
    )
    here = time.perf_counter() - start
    assert seen == [0, 1, 2]
    kept = sum(block.seconds for block in report.blocks[:2])
    assert kept < report.seconds < here + kept + 0.01
    assert report.seconds > here  # and what the interrupted calls did
    assert "resuming in" in caplog.text
    assert "after block 1" in caplog.text
    assert files(tmp_path / "whole") == files(tmp_path / "out")
    assert not (tmp_path / "out.work").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"spike": SpikeConfig(salient_ratio=0.2)}, "spike.salient_ratio was 0.1 and is now 0.2"),
        ({"ids": slice(0, 3)}, "calibration.windows was 2 and is now 3"),
        ({"ids": slice(1, 3)}, "calibration.sha256 was"),
        ({"model": 1.01}, "model was"),
        ({"pipeline": "rotated"}, "pipeline was 'rtn' and is now 'rotated'"),
        ({"allocation": 2}, "allocation.model.layers.0.mlp.up_proj was None"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_has_changed_is_said(make_llama, token_ids, tmp_path, change, message):
    output = tmp_path / "out"
    interrupted(make_llama(), output, token_ids[:2])
    before = files(tmp_path / "out.work")
    model = make_llama()
    if "model" in change:
        model.model.norm.weight.data *= change["model"]
    ids, spike = token_ids[change.get("ids", slice(0, 2))], change.get("spike", SpikeConfig())
    arguments: dict[str, Any] = {"pipeline": "rtn"}
    arguments |= {k: change[k] for k in ("seed", "pipeline") if k in change}
    if "allocation" in change:
        steps = torch.full((32,), change["allocation"])
        arguments["allocation"] = {"model.layers.0.mlp.up_proj": steps}
    with pytest.raises(ValueError, match=message) as error:
        convert(model, output, spike, ids, **arguments)
    assert "--restart" in str(error.value)
    assert files(tmp_path / "out.work") == before
    convert(model, output, spike, ids, restart=True, **arguments)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_options_that_have_changed_are_said(make_llama, token_ids, tmp_path):
    def run(epochs: int) -> None:
        interrupted(
            *(make_llama(), tmp_path / "out", token_ids),
            pipeline="omniquant",
            options=OmniQuantOptions(epochs=epochs),
        )

    run(1)
    with pytest.raises(ValueError, match="options.epochs was 1 and is now 2"):
        run(2)


def test_differences_are_named():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == [
        "a.c was 2 and is now 3",
        "d was None and is now 4",
    ]


@pytest.mark.parametrize("kind", ["safetensors", "fsync"])
def test_a_full_disk_loses_no_block(make_llama, token_ids, tmp_path, monkeypatch, kind):
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_as_safetensors_says(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half a file")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    model, output = make_llama(), tmp_path / "out"

    def fill(report: Any) -> None:
        if kind == "fsync":
            monkeypatch.setattr(work.os, "fsync", full)
        else:
            monkeypatch.setattr("safetensors.torch.save_file", full_as_safetensors_says)

    with pytest.raises(OSError, match="No space left .*; free some space .* resumes at block 1"):
        convert(model, output, SpikeConfig(), token_ids, on_block=fill, pipeline="rtn")
    monkeypatch.undo()
    assert sorted(files(tmp_path / "out.work")) == ["block-00000.safetensors", "job.json", "lock"]
    convert(model, output, SpikeConfig(), token_ids, pipeline="rtn")
    convert(model, tmp_path / "whole", SpikeConfig(), token_ids, pipeline="rtn")
    assert files(output) == files(tmp_path / "whole")


def test_a_damaged_block_is_named(make_llama, token_ids, tmp_path):
    output = tmp_path / "out"
    interrupted(make_llama(), output, token_ids)
    path = tmp_path / "out.work" / "block-00000.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"block-00000\.safetensors is damaged .*; remove it to"):
        convert(make_llama(), output, SpikeConfig(), token_ids, pipeline="rtn")
    path.unlink()
    convert(make_llama(), output, SpikeConfig(), token_ids, pipeline="rtn")


def test_two_processes_do_not_share_a_work_folder(tmp_path):
    first = WorkFolder(tmp_path / "out", {"a": 1})
    with pytest.raises(BlockingIOError, match="another process converts into the same output"):
        WorkFolder(tmp_path / "out", {"a": 1})
    first.close(remove=False)
    WorkFolder(tmp_path / "out", {"a": 1}).close(remove=True)
    assert not list(tmp_path.iterdir())


def test_blocks_without_a_job_are_not_trusted(make_llama, token_ids, tmp_path):
    interrupted(make_llama(), tmp_path / "out", token_ids)
    (tmp_path / "out.work" / "job.json").unlink()
    (tmp_path / "out.work" / "folder").mkdir()
    folder = WorkFolder(tmp_path / "out", {"a": 1})
    assert folder.count == 0
    assert folder.load(0) is None
    folder.close(remove=True)


def killed_after_publication(model: Any, output: Path, ids: Any, monkeypatch: Any) -> None:
    """A finished checkpoint beside its work folder, as a process killed in between leaves them."""
    with monkeypatch.context() as patch:
        patch.setattr(work.shutil, "rmtree", lambda *args, **kwargs: None)
        convert(model, output, SpikeConfig(), ids, pipeline="rtn")
    assert (output.parent / f"{output.name}.work" / "block-00000.safetensors").is_file()


def test_killed_after_publication_the_work_folder_goes(
    make_llama, token_ids, tmp_path, monkeypatch, caplog
):
    output = tmp_path / "out"
    killed_after_publication(make_llama(), output, token_ids, monkeypatch)
    before = files(output)
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        convert(make_llama(), output, SpikeConfig(), token_ids, pipeline="rtn")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert files(output) == before
    assert "removed" in caplog.text


@pytest.mark.parametrize(
    "kind", ["other model", "in use", "no checkpoint", "old checkpoint", "torn"]
)
def test_other_work_folders_stay_beside_an_output(
    make_llama, token_ids, tmp_path, monkeypatch, kind
):
    output, folder = tmp_path / "out", tmp_path / "out.work"
    killed_after_publication(make_llama(), output, token_ids, monkeypatch)
    holder = None
    job, manifest = folder / "job.json", output / "spikellm_manifest.json"
    if kind == "other model":  # of the same name, with the same options
        job.write_text(json.dumps({**json.loads(job.read_text()), "model": "0"}))
    elif kind == "in use":
        holder = work.locked(folder, "")
    elif kind == "no checkpoint":
        manifest.unlink()
    elif kind == "old checkpoint":  # without provenance
        manifest.write_text(json.dumps({"schema_version": 1, "provenance": {}}))
    else:
        job.write_text(job.read_text()[:10])
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        convert(make_llama(), output, SpikeConfig(), token_ids, pipeline="rtn")
    assert (folder / "block-00000.safetensors").is_file()
    if holder is not None:
        holder.close()


def test_leftovers_of_a_killed_run_are_removed(make_llama, token_ids, tmp_path):
    interrupted(make_llama(), tmp_path / "out", token_ids)
    folder = tmp_path / "out.work"
    (folder / "block-00001.tmp").write_bytes(b"half")
    (folder / "out.partial-x").mkdir()
    shutil.copy(folder / "job.json", folder / "out.partial-x")
    convert(make_llama(), tmp_path / "out", SpikeConfig(), token_ids, pipeline="rtn")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
