"""Every command through `snnllm.cli.main`: what it prints, its exit code, and its messages."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import snnllm
from snnllm import checkpoint, locate
from snnllm.cli import bench as cli_bench
from snnllm.cli import build_parser, main
from snnllm.cli import convert as cli_convert
from snnllm.cli import options as cli_options
from snnllm.cli.demo import recorded_layers
from snnllm.cli.generate import prompt_ids
from snnllm.config import SpikeConfig
from snnllm.data import load_text
from snnllm.pipelines import Pipeline
from snnllm.pipelines.omniquant_options import OmniQuantOptions
from snnllm.random_model import Shape

COMMANDS = ["convert", "eval", "generate", "simulate", "inspect", "bench", "reproduce", "demo"]
CALIBRATION = ["--nsamples", "2", "--seqlen", "48"]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(load_text("pydoc:test")[:6000])
    return path


@pytest.fixture
def failing(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command that must fail with exit code 2; gives its message."""

    def run(*arguments: object) -> str:
        assert main([str(a) for a in arguments]) == 2
        error = capsys.readouterr().err
        assert f"snnllm {arguments[0]}: error: " in error
        assert "Traceback" not in error
        return error

    return run


def run(*arguments: object) -> None:
    assert main([str(a) for a in arguments]) == 0


# -- help and version -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], *([c] for c in COMMANDS)], ids=str)
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: snnllm")
    if not command:
        assert all(name in text for name in COMMANDS)
        assert "exit codes: 0 done" in text


@pytest.mark.parametrize(
    "arguments", [[], ["nothing"], ["eval"], ["convert", "a", "b", "--score", "x"]]
)
def test_bad_usage_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: snnllm" in capsys.readouterr().err


def test_python_m_snnllm():
    run = subprocess.run(
        [sys.executable, "-m", "snnllm", "--version"], capture_output=True, text=True, check=True
    )
    assert run.stdout == f"snnllm {snnllm.__version__}\n"


# -- convert -----------------------------------------------------------------------------------------------


def test_convert_reports_and_writes_a_card(stories_dir, text_file, tmp_path, capsys):
    output, other = tmp_path / "out", tmp_path / "other.txt"
    other.write_text(text_file.read_text()[::-1])
    options = ["--calibration", text_file, *CALIBRATION, "--preset", "W4A4T2", "--ratio", "0.2"]
    run("convert", stories_dir, output, *options, "--eval", other, "--limit", "3")
    text = capsys.readouterr().out
    for what in ("spiking modules", "bits per converted weight", "block SQNR", "peak memory"):
        assert what in text
    assert "perplexity, dense" in text
    assert "perplexity, spiking (token_ppl@48" in text
    values = json.loads((output / "conversion.json").read_text())
    assert values["spike"]["salient_ratio"] == 0.2
    card = (output / "README.md").read_text()
    assert "20% salient channels with T = 2" in card
    assert "perplexity, spiking" in card
    run("inspect", output)
    assert "of 46 matmuls are spiking" in capsys.readouterr().out


# Fields of SpikeConfig that no option of their own sets, and where they come from.
NO_OPTION = {
    *("weight_bits", "activation_bits", "group_steps"),
    *("rotation", "input_offset", "key_offset"),  # set by a pipeline, as are the next
    *("segment_scales", "query_groups"),
    "weight_columns",
    "mean_steps",  # has one, for presets with ternary or without weights: tested below
}
OPTIONS = {
    "--ratio": (0.3, "salient_ratio", 0.3),
    "--steps": (3, "salient_steps", 3),
    "--kv-steps": (4, "kv_salient_steps", 4),
    "--range": ("shared", "value_range", "shared"),
    "--capacity": ("power_of_two", "capacity", "power_of_two"),
    "--score": ("abs", "score", "abs"),
    "--mask-scope": ("input", "mask_scope", "input"),
    "--attention": ("float", "attention", "float"),
    "--weight-range": ("minmax", "weight_range", "minmax"),
    "--group-size": (32, "weight_group_size", 32),
    "--activation-clip": (0.9, "activation_clip", 0.9),
    "--embedding-bits": (8, "embedding_bits", 8),
    "--modules-to-not-convert": ("up_proj", "modules_to_not_convert", ("lm_head", "up_proj")),
}


def test_every_field_of_the_config_has_an_option():
    fields = {f.name for f in dataclasses.fields(SpikeConfig)}
    assert {field for _, field, _ in OPTIONS.values()} | NO_OPTION == fields
    default = SpikeConfig.preset("W4A4T2")
    for option, (given, field, value) in OPTIONS.items():
        args = build_parser().parse_args(["convert", "in", "out", option, str(given)])
        assert getattr(cli_options.spike_config(args), field) == value != getattr(default, field)


def test_a_dry_run_writes_nothing(stories_dir, text_file, tmp_path, capsys):
    run(
        "convert",
        stories_dir,
        tmp_path / "out",
        "--dry-run",
        "--calibration",
        text_file,
        *CALIBRATION,
    )
    text = capsys.readouterr().out
    assert all(f"estimated {what}" in text for what in ("time", "memory", "disk"))
    assert re.search(r"activations +\d+ MiB, in memory", text)
    assert re.search(
        r"estimated time +[1-9][.0-9]* (s|min) on|estimated time +0\.[0-9]+ s on", text
    )
    assert not list(tmp_path.iterdir())


def test_convert_trains_and_says_so(stories_dir, text_file, tmp_path, capsys):
    output = tmp_path / "out"
    common = ["--calibration", text_file, *CALIBRATION, "--pipeline", "omniquant"]
    training = ["--recipe", "paper", "--epochs", "1", "--batch", "2", "--second-loss", "0.5"]
    run("convert", stories_dir, output, *common, *training, "--max-memory", "100000")
    text = capsys.readouterr().out
    assert "time of a training step" in text
    assert re.search(r"peak memory +\d+ MiB \(estimated \d+ MiB\)", text)
    values = json.loads((output / "conversion.json").read_text())
    assert values["spike"]["value_range"] == "shared"
    options = values["provenance"]["options"]
    assert (options["epochs"], options["batch"], options["second_loss"]) == (1, 2, 0.5)
    assert all(b["loss_after"] > 0 and b["step_ms"] > 0 for b in values["blocks"])


def test_convert_makes_ternary_weights(stories_dir, text_file, tmp_path, capsys):
    output = tmp_path / "out"
    common = ["--calibration", text_file, *CALIBRATION, "--pipeline", "gptq"]
    given = ["--mean-steps", "2", "--group-size", "64", "--column-score", "gauss_newton"]
    given += ["--refinements", "1", "--damping", "0.02", "--no-compensate", "--ridge", "1"]
    given += ["--salient-column-steps", "4", "--max-memory", "100000"]
    run("convert", stories_dir, output, *common, *given)
    text = capsys.readouterr().out
    assert "bits per converted weight" in text
    assert re.search(r"time steps of a weight +(2\.0\d\d|1\.9\d\d)\n", text)
    values = json.loads((output / "conversion.json").read_text())
    assert values["spike"]["mean_steps"] == 2.0
    assert values["spike"]["weight_group_size"] == 64
    assert values["provenance"]["options"] == {
        "score": "gauss_newton",
        "salient_steps": 4,
        "damping": 0.02,
        "refinements": 1,
        "compensate": False,
        "ridge": 1.0,
        "steps": {},
    }
    assert "ternary spike trains of 2 steps" in (output / "README.md").read_text()
    run("inspect", output)
    assert "float x ternary spikes" in capsys.readouterr().out
    run("generate", output, "Once", "--view", "unrolled", "--max-new-tokens", "2")
    run("convert", stories_dir, tmp_path / "dry", *common, "--dry-run")
    assert "TW1.4A16" in capsys.readouterr().out


@pytest.mark.parametrize("preset", ["A8", "TW1.2A8"])
def test_the_mean_steps_may_be_changed(preset):
    given = ["convert", "in", "out", "--pipeline", "gptq", "--preset", preset, "--mean-steps", "3"]
    spike = cli_options.spike_config(build_parser().parse_args(given))
    assert (spike.label, spike.weight_bits, spike.weight_group_size) == ("TW3A8", 2, 128)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], "rotated"),
        (["--preset", "W8A8"], "rotated"),
        (["--preset", "W2A16"], "rtn"),
        (["--preset", "TW1.2A8"], "gptq"),
        (["--mean-steps", "2"], "gptq"),
        (["--pipeline", "omniquant"], "omniquant"),
    ],
)
def test_the_default_pipeline_is_what_the_configuration_needs(given, expected):
    args = build_parser().parse_args(["convert", "in", "out", *given])
    assert cli_options.chosen_pipeline(args, cli_options.spike_config(args)) == expected


def test_help_says_that_an_option_wins_over_the_recipe(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "such as --range split, wins over the recipe" in text
    assert "wins over what --preset and --recipe say" in text


def test_the_recipe_may_be_changed_in_single_fields():
    given = ["convert", "in", "out", "--pipeline", "omniquant", "--recipe", "paper"]
    args = build_parser().parse_args([*given, "--range", "split", "--execution", "compiled"])
    spike, options = (
        cli_options.spike_config(args),
        cli_options.training_options(args, Pipeline.OMNIQUANT),
    )
    assert (spike.value_range, spike.weight_range) == ("split", "minmax")
    assert options == OmniQuantOptions.recipe("paper", execution="compiled")


def test_an_interrupted_conversion_resumes_or_restarts(
    stories_dir, text_file, tmp_path, monkeypatch, capsys, caplog
):
    common = ["--calibration", text_file, *CALIBRATION]
    blocks = cli_convert.ConversionBar.update

    def interrupt(bar, count=1):
        blocks(bar, count)
        if bar.n == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(cli_convert.ConversionBar, "update", interrupt)
    arguments = ["convert", stories_dir, tmp_path / "out", *common]
    assert main([str(a) for a in arguments]) == 130
    monkeypatch.undo()
    assert main([str(a) for a in [*arguments, "--seed", "1"]]) == 2
    assert "seed was 0 and is now 1" in capsys.readouterr().err
    run(*arguments)
    assert "resuming in" in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(cli_convert.ConversionBar, "update", interrupt)
    assert main([str(a) for a in arguments]) == 130
    monkeypatch.undo()
    run(*arguments, "--seed", "1", "--restart")


CONVERT_ERRORS = {
    "unknown_preset": (["--preset", "int4"], "Unknown preset 'int4'. Presets look like W<bits>"),
    "training": (["--epochs", "3"], "epochs: nothing is trained by the pipeline rotated"),
    "recipe": (["--recipe", "paper"], "recipe: nothing is trained by the pipeline rotated"),
    "no_columns": (
        ["--damping", "0.1"],
        "damping: this is for ternary weights, which the pipeline",
    ),
    "levels": (
        ["--preset", "W4A4T2", "--mean-steps", "2"],
        "mean_steps makes the weights ternary spike trains",
    ),
    "pipeline": (
        ["--pipeline", "rtn", "--preset", "TW1.4A16"],
        "the pipeline rtn makes integer levels",
    ),
    "no_budget": (
        ["--pipeline", "gptq", "--preset", "W4A4"],
        "gptq pipeline makes ternary weights",
    ),
    "budget": (["--pipeline", "gptq", "--mean-steps", "8"], "mean_steps must be in 1..7, got 8"),
    "refinements": (["--pipeline", "gptq", "--refinements", "-1"], "refinements must be >= 0"),
    "memory": (["--max-memory", "5"], "max_memory is 5 MiB, but about"),
    "no_steps": (["--preset", "W4A4T0"], "T (salient steps) must be in 1..64, got 0"),
    "ratio": (["--ratio", "1.5"], "salient_ratio is a fraction of the channels in [0, 1], got 1.5"),
    "dense_preset": (["--preset", "W16A16"], "leaves the model dense"),
    "windows": (["--nsamples", "0"], "--nsamples must be at least 1, got 0"),
    "short_text": (["--seqlen", "999999"], "fewer than one window of 999999"),
    "device": (["--device", "nothing"], "Unknown device 'nothing'; use cpu or cuda"),
    "short_eval": (["--eval", "SHORT"], "fewer than one window of 48; give a longer text"),
    "empty_eval": (["--eval", "EMPTY"], "holds no text"),
    "same_text": (["--eval", "CALIBRATION"], "is the text of --calibration"),
    "context": (["--seqlen", "600", "--nsamples", "1", "--dry-run"], "longer than the context"),
    "no_eval": (["--eval", "no/such/file.txt"], "There is no text file no/such/file.txt"),
}


@pytest.mark.parametrize("case", CONVERT_ERRORS)
def test_convert_refuses_bad_options(stories_dir, text_file, tmp_path, failing, case):
    arguments, message = CONVERT_ERRORS[case]
    short, empty = tmp_path / "short.txt", tmp_path / "empty.txt"
    short.write_text("Too short.")
    empty.write_text(" \n")
    texts = {"SHORT": short, "EMPTY": empty, "CALIBRATION": text_file}
    arguments = [texts.get(a, a) for a in arguments]
    common = ["--calibration", text_file, *CALIBRATION]
    assert message in failing("convert", stories_dir, tmp_path / "out", *common, *arguments)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("out.partial*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu(tiny_checkpoint, failing):
    assert "no CUDA GPU" in failing("eval", tiny_checkpoint, "--device", "cuda")


@pytest.mark.parametrize("name", ["no/such/folder/here", "someone/model"])
def test_a_missing_model(tmp_path, text_file, failing, name):
    assert name in failing("convert", name, tmp_path / "out", "--calibration", text_file)
    assert name in failing("eval", name, "--text", text_file)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--mean-steps", "99"], "mean_steps must be in 1..7, got 99.0; more, up to 127, go with"),
        (["--preset", "TW99A16"], "mean_steps must be in 1..7, got 99.0; more, up to 127, go with"),
        (["--mean-steps", "200"], "mean_steps must be in 1..7, or up to 127 with two classes"),
        (["--mean-steps", "9", "--salient-column-steps", "8"], "cannot average 9.0"),
        (["--salient-column-steps", "128"], "weight columns must be in 2..127, got 128"),
        (["--pipeline", "rtn", "--mean-steps", "2"], "the pipeline rtn makes integer levels"),
        (["--pipeline", "rotated", "--preset", "W4A16"], "rotated pipeline needs spiking"),
    ],
)
def test_a_budget_of_steps_is_checked_before_the_model(tmp_path, failing, given, message):
    if "--pipeline" not in given:
        given = ["--pipeline", "gptq", *given]
    assert message in failing("convert", "no/such/folder/here", tmp_path / "out", *given)
    if "rtn" in given:
        assert message in failing("demo", "--output", tmp_path / "out", *given)


def test_the_demo_checks_its_pipeline_before_the_model(tmp_path, failing):
    given = ["demo", "--model", "no/such/folder/here", "--output", tmp_path / "out"]
    assert "epochs: nothing is trained" in failing(*given, "--pipeline", "rtn", "--epochs", "2")


def test_help_states_ranges(capsys):
    for command, *texts in (
        ("convert", "on average, 1..7, with two classes", "this many steps (2..127) and one"),
        ("reproduce", "name contains one of the texts"),
    ):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert all(expected in text for expected in texts)


def test_another_architecture(tmp_path, text_file, failing):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    for arguments in (["convert", tmp_path, tmp_path / "out"], ["inspect", tmp_path]):
        assert "is a 'gpt2' model. Supported: LLaMA" in failing(*arguments)


def test_an_output_in_use(stories_dir, text_file, tmp_path, failing):
    (tmp_path / "file").write_text("x")
    error = failing("convert", stories_dir, tmp_path, "--calibration", text_file, *CALIBRATION)
    assert "exists and is not empty; choose another output" in error
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_spiking_checkpoint_is_not_converted_again(stories_checkpoint, tmp_path, failing):
    error = failing("convert", stories_checkpoint, tmp_path / "out")
    assert "is a spiking LLaMA already" in error


# -- eval --------------------------------------------------------------------------------------------------------


def test_eval_is_the_same_in_every_view(
    stories_checkpoint, stories_dir, text_file, tmp_path, capsys
):
    options = ["--text", text_file, "--window", "32", "--limit", "2", "--json", tmp_path / "r.json"]
    values = []
    for view in ("binary", "unrolled", "collapsed"):
        run("eval", stories_checkpoint, *options, "--view", view)
        assert capsys.readouterr().out.startswith("token_ppl@32 ")
        values.append(json.loads((tmp_path / "r.json").read_text()))
    assert values[0]["window_nll"] == values[1]["window_nll"] == values[2]["window_nll"]
    assert values[0]["windows"] == 2
    run("eval", stories_dir, *options, "--batch-size", "2")
    dense = json.loads((tmp_path / "r.json").read_text())
    assert 1 < dense["perplexity"] < values[0]["perplexity"] * 2


EVAL_ERRORS = {
    "short": (["--text", "SHORT"], "fewer than one window of 512; give a longer text"),
    "empty": (["--text", "EMPTY"], "holds no text"),
    "missing": (["--text", "no/file.txt"], "There is no text file"),
    "unknown": (["--text", "tales"], "Unknown text 'tales'"),
    "split": (["--text", "pydoc:dev"], "Unknown split 'dev' of pydoc"),
    "limit": (["--limit", "0"], "limit must be at least 1"),
    "batch": (
        ["--window", "64", "--limit", "1", "--batch-size", "0"],
        "--batch-size must be at least 1, got 0",
    ),
    "context": (["--window", "513"], "use a smaller --window, at most 512"),
    "window": (["--window", "1"], "A window needs at least 2 tokens"),
}


@pytest.mark.parametrize("case", EVAL_ERRORS)
def test_eval_refuses_bad_options(stories_checkpoint, tmp_path, failing, case):
    arguments, message = EVAL_ERRORS[case]
    short, empty = tmp_path / "short.txt", tmp_path / "empty.txt"
    short.write_text("Too short.")
    empty.write_text("")
    arguments = [{"SHORT": short, "EMPTY": empty}.get(a, a) for a in arguments]
    assert message in failing("eval", stories_checkpoint, *arguments)


def test_a_view_needs_spikes(stories_dir, text_file, failing, monkeypatch):
    monkeypatch.setattr("snnllm.sources.open_source", lambda name: pytest.fail("opens the model"))
    error = failing("eval", stories_dir, "--text", text_file, "--view", "unrolled")
    assert "--view unrolled needs a spiking checkpoint" in error
    assert "is dense; convert it first" in failing("simulate", stories_dir, "Once upon a time")


def test_logits_that_are_not_finite(stories_model, stories_tokenizer, text_file, tmp_path, failing):
    stories_model.model.norm.weight.data[3] = float("nan")
    stories_model.save_pretrained(tmp_path / "nan")
    stories_tokenizer.save_pretrained(tmp_path / "nan")
    error = failing("eval", tmp_path / "nan", "--text", text_file, "--window", "64")
    assert "The loss of window 0" in error


def test_a_damaged_checkpoint(checkpoint_copy, text_file, failing):
    path = checkpoint_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "it is truncated or was replaced" in failing(
        "eval", checkpoint_copy, "--text", text_file
    )


def test_verbose_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        main(["-v", "inspect", str(tmp_path / "nothing" / "here" / "at" / "all")])


def test_interrupted(monkeypatch, capsys):
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("snnllm.cli.inspect.open_model", interrupt)
    assert main(["inspect", "model"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_an_interrupted_conversion_says_how_to_go_on(monkeypatch, capsys):
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("snnllm.cli.convert.run", interrupt)
    assert main(["convert", "model", "out"]) == 130
    assert "the same command continues" in capsys.readouterr().err


def test_bars_move_seldom_in_a_log(tmp_path):
    code = f"""
from snnllm.cli import main
try:
    main(["inspect", {str(tmp_path / "nothing")!r}])
except (OSError, ValueError):
    pass
from tqdm import tqdm
print(tqdm(range(3)).mininterval)
"""
    command = [sys.executable, "-c", code]
    env = {k: v for k, v in os.environ.items() if k != "TQDM_MININTERVAL"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert float(done.stdout) == 30


def test_an_interrupted_demo_says_how_to_go_on(stories_dir, tmp_path, monkeypatch, capsys):
    def interrupt(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    command = ["demo", "--model", str(stories_dir), "--output", str(tmp_path / "demo")]
    monkeypatch.setattr("snnllm.cli.demo._measure", interrupt)
    assert main(command) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    monkeypatch.setattr("snnllm.cli.demo._measure", lambda *_: None)
    monkeypatch.setattr("snnllm.cli.demo._convert", interrupt)
    assert main(command) == 130
    assert "the same command continues" in capsys.readouterr().err


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is downloaded, and there is no WikiText-2."""
    monkeypatch.setattr("snnllm.locate._download", lambda name: pytest.fail(f"downloads {name}"))
    monkeypatch.setenv("SNNLLM_DATA", str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)


@pytest.mark.usefixtures("no_download")
@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "someone/model", "--text", "wikitext2:test"],
        ["convert", "someone/model", "OUT", "--calibration", "wikitext2:train"],
        ["convert", "someone/model", "OUT", "--eval", "wikitext2:test"],
        ["demo", "--model", "someone/model", "--output", "OUT", "--text", "wikitext2:test"],
    ],
    ids=" ".join,
)
def test_texts_are_read_before_a_model_is_downloaded(tmp_path, failing, arguments):
    error = failing(*[tmp_path / "out" if a == "OUT" else a for a in arguments])
    assert f"WikiText-2 ({arguments[-1][10:]}) is not here" in error


@pytest.mark.usefixtures("no_download")
def test_tasks_are_checked_before_a_model_is_downloaded(tmp_path, failing, monkeypatch):
    tasks = ["eval", "someone/model", "--tasks", "piqa"]
    assert "no folder; --task-data" in failing(*tasks, "--task-data", tmp_path / "none")
    assert "num_fewshot must be at least 0" in failing(*tasks, "--num-fewshot", "-1")
    monkeypatch.setattr("snnllm.harness.find_spec", lambda name: None)
    assert "lm-evaluation-harness is not installed" in failing(*tasks)


# -- bench ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ([], "W4A4T2"),
        (["--range", "commensurate"], "W4A4T2 commensurate"),
        (["--embedding-bits", 8], "W4A4T2, embedding and head of 8 bits"),
        (["--embedding-bits", 16], "W4A4T2"),
    ],
)
def test_bench_of_a_shape(monkeypatch, tmp_path, capsys, options, label):
    monkeypatch.setitem(cli_bench.SHAPES, "7B", Shape(32, 64, 2, 1, 3, 64))
    few = ("--device", "cpu", "--tokens", 2, "--repeat", 1)
    rows = tmp_path / "rows.json"
    run(
        "bench",
        "--shape",
        "7B",
        "--blocks",
        1,
        "--batch",
        1,
        2,
        "--prompt",
        4,
        *few,
        "--json",
        rows,
        *options,
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f"7B (1 of 3 blocks) with random weights, {label}")
    cells = [[cell.strip() for cell in line.split("|")[1:4]] for line in lines[3:]]
    assert cells == [[name, b, "4"] for b in "12" for name in ("eager", "collapsed")]
    written = json.loads(rows.read_text())
    assert [row["contender"] for row in written] == ["eager", "collapsed"] * 2
    assert all(row["first_ms"] > 0 and row["peak_gb"] is None for row in written)


@pytest.mark.parametrize("converted", [False, True])
def test_bench_of_a_model(stories_dir, stories_checkpoint, capsys, converted):
    checkpoint = ("--checkpoint", stories_checkpoint) if converted else ("--preset", "W8A8")
    few = ("--device", "cpu", "--tokens", 2, "--repeat", 1, "--prompt", 8)
    contenders = ("--contenders", "eager", "unrolled")
    run("bench", "--model", stories_dir, *checkpoint, *few, *contenders)
    head, *_, dense, unrolled = capsys.readouterr().out.splitlines()
    assert head.endswith("W4A4T2" if converted else "W8A8")
    assert dense.startswith("| eager | 1 | 8 |")
    assert unrolled.startswith("| unrolled | 1 | 8 |")


def test_bench_of_a_model_with_tables_of_8_bits(stories_dir, tmp_path, capsys):
    weights = {}
    for bits in (8, 16):
        few = ("--device", "cpu", "--tokens", 1, "--repeat", 1, "--prompt", 8, "--json")
        rows = tmp_path / f"{bits}.json"
        given = ("--embedding-bits", bits, "--contenders", "collapsed")
        run("bench", "--model", stories_dir, *few, rows, *given)
        weights[bits] = json.loads(rows.read_text())[0]["weights_gb"]
    vocabulary, hidden = 512, 64  # one table, tied
    saved = vocabulary * (4 * hidden - (hidden + 4))
    assert weights[16] - weights[8] == pytest.approx(saved / 1e9)
    assert "embedding and head of 8 bits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens must be at least 1"),
        (["--batch", "1", "0"], "--batch must be at least 1"),
        (["--checkpoint", "out"], "--checkpoint needs --model"),
        (["--model", "m", "--checkpoint", "out", "--preset", "W4A4"], "--preset goes without"),
        (["--model", "m", "--checkpoint", "out", "--range", "shared"], "--range goes without"),
        (
            ["--model", "m", "--checkpoint", "out", "--embedding-bits", "8"],
            "--embedding-bits goes without --checkpoint, which has one of its own",
        ),
        (
            ["--range", "commensurate", "--preset", "W4A8T2"],
            "capacities of at most 63, got (255, 5",
        ),
        (["--blocks", "31"], "--blocks must be at most 30, those of smollm2"),
        (["--json", "nowhere/rows.json"], "there is no folder nowhere"),
        (["--model", "smollm2", "--blocks", "2"], "--blocks and --attention go with --shape"),
        (["--preset", "A4T2", "--blocks", "1", "--device", "cpu"], "random models have integer"),
    ],
)
def test_bench_refuses(failing, arguments, message):
    assert message in failing("bench", *arguments)


# -- generate ------------------------------------------------------------------------------------------------------


def test_generate_with_either_cache(stories_checkpoint, stories_dir, capsys):
    texts = []
    for cache in ("dynamic", "static"):
        run(
            "generate",
            stories_checkpoint,
            "Once upon a time",
            "--max-new-tokens",
            "8",
            "--cache",
            cache,
        )
        text, _, speed = capsys.readouterr().out.rstrip().rpartition("\n")
        assert speed.startswith("[8 tokens, ")
        texts.append(text)
    assert texts[0] == texts[1]
    assert "Once upon a time" in texts[0]
    sampled = []
    for _ in range(2):
        options = ("--max-new-tokens", "4", "--sample", "--seed", "1")
        run("generate", stories_dir, "Once upon a time", *options)
        sampled.append(capsys.readouterr().out.partition("[")[0])
    assert sampled[0] == sampled[1]


def test_generate_refuses(stories_checkpoint, failing):
    assert "The prompt is empty" in failing("generate", stories_checkpoint, "  ")
    error = failing("generate", stories_checkpoint, "Hello", "--chat")
    assert "tokenizer of this model has no chat template" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "no/model", "Once", "--temperature", "0"], "--temperature must be above 0"),
        (["generate", "no/model", " "], "The prompt is empty"),
        (["simulate", "no/model", " "], "The prompt is empty"),
        (["demo", "--model", "no/model", "--output", "no", "--prompt", ""], "The prompt is empty"),
    ],
)
def test_prompts_and_sampling_are_checked_before_the_model(failing, arguments, message):
    assert message in failing(*arguments)


def test_a_chat_prompt_is_wrapped_by_the_template(stories_tokenizer):
    stories_tokenizer.chat_template = "user: {{ messages[0]['content'] }} bot:"
    try:
        ids = prompt_ids(stories_tokenizer, "Hello", chat=True)
    finally:
        stories_tokenizer.chat_template = None
    assert stories_tokenizer.decode(ids[0]).strip() == "user: Hello bot:"


# -- inspect, simulate, demo ----------------------------------------------------------------------------------------


def test_inspect_prints_a_table_or_json(stories_checkpoint, stories_dir, capsys):
    run("inspect", stories_checkpoint)
    assert "45 of 46 matmuls are spiking" in capsys.readouterr().out
    run("inspect", stories_checkpoint, "--json")
    rows = json.loads(capsys.readouterr().out)
    assert sum(r["spiking"] for r in rows) == 45
    run("inspect", stories_dir)
    assert "0 of 46 matmuls are spiking" in capsys.readouterr().out


def test_a_spiking_checkpoint_on_the_hub(stories_checkpoint, tmp_path, monkeypatch, capsys):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for pattern in locate._HUB_PATTERNS:
        for path in stories_checkpoint.glob(pattern):
            shutil.copy(path, snapshot)
    monkeypatch.setattr(locate, "_download", lambda name: snapshot)
    run("inspect", "someone/spiking")
    assert "45 of 46 matmuls are spiking" in capsys.readouterr().out
    run("generate", "someone/spiking", "Once", "--view", "unrolled", "--max-new-tokens", "2")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders of the checkpoints that are verified, which reads them whole."""
    seen, verify = [], checkpoint.verify
    monkeypatch.setattr(checkpoint, "verify", lambda folder: (seen.append(folder), verify(folder)))
    return seen


def test_simulate_loads_the_checkpoint_once(stories_checkpoint, tmp_path, loads):
    run("simulate", stories_checkpoint, "Once upon", "--output", tmp_path / "rec")
    assert loads == [stories_checkpoint]


@pytest.mark.parametrize("blocks", [1, 2, 4, 30])
def test_layers_of_the_demo_are_there(blocks):
    spike = SpikeConfig.preset("W4A4T2")
    names = recorded_layers(None, blocks, spike)
    prefix = f"model.layers.{min(3, blocks - 1)}"
    assert names == [f"{prefix}.self_attn.q_proj", f"{prefix}.mlp.down_proj"]
    assert recorded_layers(["*.0.self_attn.k_encoder"], blocks, spike)
    with pytest.raises(
        ValueError, match=f"model of {blocks} blocks matches '\\*.layers.{blocks}.*'"
    ):
        recorded_layers([f"*.layers.{blocks}.*"], blocks, spike)
    kept = dataclasses.replace(spike, modules_to_not_convert=("q_proj",), attention="float")
    assert recorded_layers(None, blocks, kept) == [f"{prefix}.mlp.down_proj"]
    with pytest.raises(ValueError, match="no spiking layer"):
        recorded_layers(["*.q_proj"], blocks, kept)
    with pytest.raises(ValueError, match="no spiking layer"):
        recorded_layers(["*encoder"], blocks, kept)
    with pytest.raises(ValueError, match="W4A16 leaves no spiking activations to record"):
        recorded_layers(None, blocks, SpikeConfig.preset("W4A16"))


def test_the_demo_refuses_unknown_layers_before_it_works(stories_dir, tmp_path, failing):
    arguments = ["--model", stories_dir, "--output", tmp_path / "demo", "--layers", "*.9.*"]
    assert "no spiking layer of a model of 5 blocks matches '*.9.*'" in failing("demo", *arguments)
    assert not list(tmp_path.iterdir())


def test_simulate_writes_recordings_and_operations(stories_checkpoint, tmp_path, capsys):
    layers = ["--layers", "model.layers.0.self_attn.q_proj"]
    run("simulate", stories_checkpoint, "Once upon", "--output", tmp_path / "rec", *layers)
    out = capsys.readouterr().out
    assert "| synaptic operations (additions) |" in out
    lines = [line for line in out.splitlines() if line.startswith("wrote ")]
    files = [Path(line.removeprefix("wrote ")) for line in lines]
    assert all(p.is_file() for p in files)
    assert {p.suffix for p in files} >= {".npz", ".png", ".json", ".md"}
    assert json.loads((tmp_path / "rec" / "operations.json").read_text())


def test_simulate_refuses_before_it_writes(stories_checkpoint, tmp_path, failing):
    output = ["--output", tmp_path / "out"]
    for option, value, message in (
        ("--layers", "model.layers.99.*", "model.layers.99"),
        ("--tokens", "99", "has no token 99"),
        ("--channels", "999", "has no channel 999"),
        ("--memory-limit", "0.002", "more than the memory limit"),  # enough for the membranes
    ):
        assert message in failing("simulate", stories_checkpoint, "Hi", option, value, *output)
        assert not (tmp_path / "out").exists()


def test_demo_on_a_small_model(stories_dir, text_file, tmp_path, capsys, loads):
    output = tmp_path / "demo"
    arguments = ["--model", stories_dir, "--output", output, "--text", text_file, "--limit", "2"]
    run("demo", *arguments, *CALIBRATION, "--calibration", text_file)
    text = capsys.readouterr().out
    assert loads == [output / "checkpoint"]
    assert "5/5 recording membranes" in text
    assert "dense    perplexity" in text
    assert "spiking  perplexity" in text
    names = {p.name for p in output.iterdir()}
    assert names >= {"checkpoint", "simulation", "report.json", "report.md"}
    report = (output / "report.md").read_text()
    figures = [line for line in report.split("\n") if line.startswith("![")]
    assert figures
    for line in figures:
        assert (output / line.partition("](")[2].rstrip(")")).is_file()
    values = json.loads((output / "report.json").read_text())
    dense, spiking = (values["perplexity"][k]["perplexity"] for k in ("dense", "spiking"))
    assert spiking != dense
    assert 0.7 < spiking / dense < 1.5  # calibrated on the text that it reads here
    assert all((output / name).is_file() for name in values["files"])
    assert main(["demo", *map(str, arguments)]) == 2
    assert f"remove {output} or choose another --output" in capsys.readouterr().err


def test_the_progress_bar_passes_items_on():
    assert list(cli_options.progress("label")([1, 2, 3])) == [1, 2, 3]


def test_output_that_nobody_reads_is_no_error(stories_dir: Path) -> None:
    command = f"{sys.executable} -m snnllm inspect '{stories_dir}' | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in {"0", "141"}  # 0 where the pipe took it all
    assert "error" not in done.stderr
