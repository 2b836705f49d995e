"""The tables of the paper: rows, resume, failures, published values, what is written."""

from __future__ import annotations

import csv
import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from snnllm.cli import build_parser, main, reproduce, reproduction
from snnllm.config import SpikeConfig
from snnllm.conversion import convert
from snnllm.data import load_text
from snnllm.paper import measures, parallel
from snnllm.paper import runner as paper_runner
from snnllm.paper.jobs import jobs_of
from snnllm.paper.lines import efficiency_lines, find, speed_lines
from snnllm.paper.measures import stated_steps
from snnllm.paper.recipes import Baseline, Conversion, Measure, Row, Table, Training, spikellm
from snnllm.paper.report import markdown
from snnllm.paper.tables import TABLES
from snnllm.pipelines import Pipeline
from snnllm.pipelines.omniquant_options import OmniQuantOptions
from snnllm.sources import dense_model
from snnllm.zeroshot import ZERO_SHOT_TASKS

SMALL = [
    *("--window", "24", "--limit", "2", "--sample-limit", "1", "--nsamples", "2", "--seqlen", "24"),
    *("--prompt-tokens", "6", "--speed-prompt", "8", "--no-tasks", "--quick"),
]


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that name a short evaluation text and another calibration text."""
    folder = tmp_path_factory.mktemp("texts")
    for name in ("train", "test"):
        (folder / f"{name}.txt").write_text(load_text(f"pydoc:{name}")[:3000])
    return ["--text", str(folder / "test.txt"), "--calibration", str(folder / "train.txt")]


@pytest.fixture
def command(stories_dir: Path, texts: list[str]) -> Callable[..., list[str]]:
    """The arguments of a small run into a folder."""

    def build(output: Path, *more: str) -> list[str]:
        tables = [m for m in more if m in TABLES or m == "all"] or ["main"]
        rest = [m for m in more if m not in tables]
        model = ["--model", str(stories_dir), "--output", str(output)]
        return ["reproduce", *tables, *model, *texts, *SMALL, *rest]

    return build


def untimed(output: Path) -> dict[str, Any]:
    """Everything measured in a run, without times, memory and paths."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            kept = {
                k: v for k, v in value.items() if not any(w in k for w in ("second", "mib", "_ms"))
            }
            return {k: strip(v) for k, v in kept.items()}
        return [strip(v) for v in value] if isinstance(value, list) else value

    return {p.stem: strip(json.loads(p.read_text())) for p in (output / "rows").glob("*.json")}


# -- the zoo -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_rows_are_distinct_and_have_a_short_run(name):
    table = TABLES[name](Training())
    titles = [row.title for row in table.rows]
    assert len(set(titles)) == len(titles)
    assert len({row.name for row in table.rows}) == len(titles)
    assert 0 < len(table.chosen(True, []).rows) < len(titles)
    assert table.note
    assert table.name == name


def test_the_main_table_has_the_rows_of_the_paper():
    rows = TABLES["main"](Training()).rows
    methods = {
        bits: {r.published for r in rows if r.bits == bits} for bits in ("W4A4", "W2A8", "W2A16")
    }
    assert {"OmniQuant", "SpikeLLM T=2", "SpikeLLM T=4"} < methods["W4A4"]
    assert {"OmniQuant", "SpikeLLM T=2"} < methods["W2A8"]
    assert "OmniQuant" in methods["W2A16"]
    narrow = next(r for r in rows if r.bits == "W2A8" and r.published == "SpikeLLM T=2")
    assert narrow.conversion is not None
    assert narrow.conversion.spike.salient_ratio == 0.05


def test_models_are_shared_between_tables_and_the_training_is_part_of_their_name():
    tables = [TABLES[name](Training()) for name in ("main", "efficiency", "speed")]
    jobs = jobs_of(tables)
    assert len(jobs) == len({row.name for table in tables for row in table.rows})
    assert len(jobs) < sum(len(table.rows) for table in tables)
    shared = next(j for j in jobs if j.row.published == "SpikeLLM T=2" and j.row.bits == "W4A4")
    assert set(shared.measures) >= {Measure.PERPLEXITY, Measure.OPERATIONS, Measure.SPEED}
    short, published = spikellm("W4A4T2", Training(epochs=1)), spikellm("W4A4T2", Training())
    assert short.name != published.name
    assert isinstance(published.options, OmniQuantOptions)
    assert (published.options.epochs, published.options.rotate) == (20, False)
    assert str(published.spike.value_range) == "shared"


def test_defaults_of_a_pipeline_have_one_name():
    given = Conversion(Pipeline.OMNIQUANT, SpikeConfig.preset("W4A4"), OmniQuantOptions())
    assert dataclasses.replace(given, options=None).name == given.name


def test_mean_steps_are_those_of_the_masks(tiny_pair, convert_tiny):
    from snnllm.modeling import load

    steps = stated_steps(load(tiny_pair[1]))  # 20 % of 32 channels is 6, of 64 it is 13
    assert steps["mean_steps"] == pytest.approx(1 + (6 * 6 + 13) / (6 * 32 + 64), abs=0.01)
    assert steps["spiking_modules"] == 16
    assert stated_steps(load(convert_tiny("W2A16")[1]))["mean_steps"] is None


# -- running ------------------------------------------------------------------------------------------------


def test_all_tables_on_a_small_model(command, tmp_path, capsys):
    assert main(command(tmp_path, "all")) == 0
    text = (tmp_path / "results.md").read_text()
    for name in TABLES:
        assert f"## {TABLES[name](Training()).title}" in text
        assert json.loads((tmp_path / f"{name}.json").read_text())["lines"]
    assert "FAILED" not in text
    with (tmp_path / "main.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["method"] for r in rows] == [
        row.label for row in TABLES["main"](Training()).chosen(True, []).rows
    ]
    assert all(float(r["test.txt token_ppl@24"]) > 1 for r in rows)
    (view,) = json.loads((tmp_path / "equivalence.json").read_text())["lines"]
    assert view["views agree"] == "yes"
    assert view["compared"] > 0 == view["differing"]
    drawn = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert drawn >= {
        *("pareto", "pareto_saliency", "spike_rate", "sqnr", "energy"),
        *("saliency_q_proj", "saliency_down_proj", "raster_q_proj", "membrane_down_proj"),
    }
    for name in drawn:
        assert f"figures/{name}.png" in text
    stated = json.loads((tmp_path / "manifest.json").read_text())
    assert stated["settings"]["limit"] == 2
    assert stated["versions"]["torch"] == metadata.version("torch")
    assert str(tmp_path) not in text
    assert not list((tmp_path / "checkpoints").iterdir())


def test_published_values_stand_beside_measured_ones(command, tmp_path, monkeypatch, capsys):
    from snnllm.paper import report

    monkeypatch.setattr(report, "recognise", lambda config, name: "LLaMA-2-7B")
    assert main(command(tmp_path, "--rows", "float model", "SpikeLLM")) == 0
    text = (tmp_path / "results.md").read_text()
    assert "published wikitext2" in text
    assert "11.36 / 11.93" in text
    assert "## Published values of LLaMA-2-7B" in text
    assert "Epochs of the rows that are trained: 1; in the paper 20, on 128 windows" in text
    assert "Only rows whose name contains 'float model' or 'SpikeLLM'." in text
    assert "more rows lie" not in text
    assert main(command(tmp_path, "--rows", "float model")) == 0
    text = (tmp_path / "results.md").read_text()
    assert "Epochs of" not in text
    assert re.search("[1-9] more rows lie in this folder", text)


def test_a_finished_run_is_not_repeated_and_other_settings_are_refused(
    command, tmp_path, monkeypatch, capsys
):
    arguments = command(tmp_path, "--rows", "float", "rtn")
    assert main(arguments) == 0
    before = untimed(tmp_path)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        for name in ("convert", "load", "dense_model"):
            patch.setattr(paper_runner, name, never)
        assert main(arguments) == 0
    assert untimed(tmp_path) == before
    assert main([*arguments, "--seed", "1"]) == 2
    assert "seed was 0 and is now 1" in capsys.readouterr().err
    assert untimed(tmp_path) == before
    assert main([*arguments, "--seed", "1", "--restart", "--rows", "float"]) == 0
    assert list(untimed(tmp_path)) == ["float"]


def test_a_failing_row_is_reported_and_the_others_stay(command, tmp_path, monkeypatch, capsys):
    original = paper_runner.convert

    def convert(source: Any, folder: Any, spike: SpikeConfig, *rest: Any, **more: Any) -> Any:
        if more["pipeline"] is Pipeline.RTN:
            raise FloatingPointError("the loss of block 1 is nan")
        return original(source, folder, spike, *rest, **more)

    arguments = command(tmp_path, "--rows", "float", "rtn", "rotated")
    with monkeypatch.context() as patch:
        patch.setattr(paper_runner, "convert", convert)
        assert main(arguments) == 1
    out = capsys.readouterr().out
    assert "rtn, W4A4, conversion: FAILED: FloatingPointError: the loss of block 1 is nan" in out
    lines = json.loads((tmp_path / "main.json").read_text())["lines"]
    measured = {line["method"]: line.get("test.txt token_ppl@24") for line in lines}
    assert measured.pop("rtn") is None
    assert len(measured) == 2
    assert all(value > 1 for value in measured.values())
    assert main(arguments) == 0  # tries the failed one again
    assert "FAILED" not in (tmp_path / "results.md").read_text()


def test_a_failing_measure_keeps_the_others(command, tmp_path, monkeypatch):
    def broken(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(measures, "count_operations", broken)
        assert main(command(tmp_path, "efficiency", "--rows", "rotated")) == 1
    (record,) = untimed(tmp_path).values()
    assert record["errors"] == {"operations": "RuntimeError: out of memory"}
    assert set(record["measures"]) == {"sample", "raster"}
    assert list((tmp_path / "checkpoints").iterdir())  # for the next try


def kill_after_first_row(arguments: list[str], output: Path) -> int:
    """SIGKILL for a run as soon as it has measured the float model; gives the number of its process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "snnllm", *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    first = output / "rows" / "float.json"
    deadline = time.monotonic() + 240
    while not first.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert first.exists()
    return process.pid


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_an_output_that_is_a_file_is_refused(command, tmp_path, capsys, more):
    output = tmp_path / "file"
    output.write_text("mine")
    assert main(command(output, *more)) != 0
    assert f"{output} is a file; choose another output folder" in capsys.readouterr().err
    assert output.read_text() == "mine"


def test_a_killed_run_continues(command, tmp_path):
    """What it measured stays, and the end is that of a whole run."""
    rows = ("--rows", "float", "rtn")
    arguments = command(tmp_path / "killed", *rows)
    kill_after_first_row(arguments, tmp_path / "killed")
    assert not (tmp_path / "killed" / "results.md").exists()
    first = tmp_path / "killed" / "rows" / "float.json"
    written = first.stat().st_mtime_ns
    assert main(arguments) == 0
    assert first.stat().st_mtime_ns == written
    assert main(command(tmp_path / "whole", *rows)) == 0
    assert untimed(tmp_path / "killed") == untimed(tmp_path / "whole")


def test_rows_at_once_give_the_same_results(command, tmp_path, monkeypatch):
    """And speed is measured by the leader, on the checkpoint that a worker has made."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    rows = ("main", "speed", "--rows", "float", "rotated (ours), T = 2")
    leader = os.getpid()
    alone: list[bool] = []
    timed = measures.time_contenders

    def time_contenders(*given: Any) -> Any:
        alone.append(os.getpid() == leader and not multiprocessing.active_children())
        return timed(*given)

    monkeypatch.setattr(measures, "time_contenders", time_contenders)
    converted = []
    monkeypatch.setattr(
        paper_runner, "convert", lambda *a, **k: converted.append(a) or convert(*a, **k)
    )
    assert main([*command(tmp_path / "two", *rows), "--jobs", "2"]) == 0
    assert alone == [True]
    assert not converted
    assert not list((tmp_path / "two" / "checkpoints").iterdir())
    assert main(command(tmp_path / "one", *rows)) == 0
    two, one = untimed(tmp_path / "two"), untimed(tmp_path / "one")
    assert {record.pop("at_once") for record in two.values()} == {2}
    assert {record.pop("at_once") for record in one.values()} == {1}
    for record in (*two.values(), *one.values()):
        record["measures"].pop("speed", None)
    assert two == one
    assert "2 rows ran at once" in (tmp_path / "two" / "results.md").read_text()


def test_what_had_no_memory_beside_others_is_tried_again_alone(command, tmp_path, capsys):
    args = build_parser().parse_args(command(tmp_path, "--rows", "float", "rtn"))
    runner, tables = reproduction._opened(args, reproduction.open_source(args.model))
    jobs = jobs_of(tables)

    class Failing:
        count = 2

        def run(self, todo: Any) -> Any:
            for job, message in zip(
                todo, ("AcceleratorError: CUDA error: out of memory", "ValueError: no"), strict=True
            ):
                yield job, {"measures": {}, "seconds": {}, "errors": {"perplexity": message}}

    assert not runner.execute(jobs, Failing())
    runner.close()
    first, second = (runner.record(job.row) for job in jobs)
    assert (set(first["measures"]), first["errors"]) == ({"perplexity"}, {})
    assert (second["measures"], second["errors"]) == ({}, {"perplexity": "ValueError: no"})


@pytest.mark.parametrize("earlier", [{}, {"speed": "ValueError: of an earlier call"}])
@pytest.mark.parametrize(
    ("failed", "timed"), [("perplexity", True), ("conversion", False), ("worker", False)]
)
def test_speed_is_measured_whatever_else_failed(
    command, tmp_path, monkeypatch, earlier, failed, timed
):
    """Unless there is no model; what an earlier call has left hinders nobody."""
    rows = ("main", "speed", "--rows", "rtn", "rotated")
    args = build_parser().parse_args(command(tmp_path, *rows))
    runner, tables = reproduction._opened(args, reproduction.open_source(args.model))
    jobs, worked = jobs_of(tables), []
    (speedy,) = [job for job in jobs if Measure.SPEED in job.measures]
    errors = {**earlier, failed: "ValueError: no"}

    class Failing:
        count = 2

        def run(self, todo: Any) -> Any:
            for job in todo:
                yield job, {"measures": {}, "seconds": {}, "errors": dict(errors)}

    def measure(job: Any, _: Path, wanted: Any) -> None:
        worked.append((job.row.name, wanted))

    monkeypatch.setattr(runner, "_measure", measure)
    assert not runner.execute(jobs, Failing())
    assert worked == ([(speedy.row.name, [Measure.SPEED])] if timed else [])
    kept = {failed: "ValueError: no"}
    assert runner.record(speedy.row)["errors"] == (kept if timed else errors)
    runner.execute(jobs)  # without workers: all that is missing, whatever has failed before
    runner.close()
    assert worked[-len(jobs) :] == [(job.row.name, list(job.measures)) for job in jobs]
    assert runner.record(speedy.row)["errors"] == {}


def test_workers_take_the_gpus_in_turn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(reproduction.device_of("cuda", n)) for n in (0, 1, 2)] == [
        "cuda:0",
        "cuda:1",
        "cuda:0",
    ]
    assert str(reproduction.device_of("cuda:1", 0)) == "cuda:1"
    assert str(reproduction.device_of("cuda", None)) == "cuda"
    assert str(reproduction.device_of("cpu", 1)) == "cpu"


def test_a_worker_that_dies_is_a_failed_row(command, tmp_path, monkeypatch, capsys):
    def killed(self: Any, jobs: Any) -> Any:
        yield from ((job, parallel._ending(-signal.SIGKILL)) for job in jobs)

    monkeypatch.setattr(parallel.Workers, "run", killed)
    arguments = [*command(tmp_path, "--rows", "float", "rtn"), "--jobs", "2"]
    assert main(arguments) == 1
    assert "some rows failed" in capsys.readouterr().out
    record = json.loads((tmp_path / "rows" / "float.json").read_text())
    assert "ended by SIGKILL, as the system does when memory" in record["errors"]["worker"]
    monkeypatch.undo()
    assert main(arguments[:-2]) == 0


def test_a_worker_that_dies_loses_no_measurement(command, tmp_path):
    """What it has written is newer than what the leader read in the beginning."""
    args = build_parser().parse_args(command(tmp_path, "--rows", "float", "rtn"))
    runner, tables = reproduction._opened(args, reproduction.open_source(args.model))
    jobs = jobs_of(tables)

    class Dying:
        count = 2

        def run(self, todo: Any) -> Any:
            for job in todo:
                record = {"measures": {"sample": 1}, "seconds": {}, "errors": {}}
                written = {**record, "conversion": {}}
                (tmp_path / "rows" / f"{job.row.name}.json").write_text(json.dumps(written))
                yield job, "killed"

    assert not runner.execute(jobs, Dying())
    runner.close()
    for job in jobs:
        record = json.loads((tmp_path / "rows" / f"{job.row.name}.json").read_text())
        assert record["measures"] == {"sample": 1}
        assert record["conversion"] == {}
        assert record["errors"] == {"worker": "killed"}


def test_a_worker_that_dies_takes_no_other_row_with_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))  # of the worker processes, too
    from mortal_rows import job, opened

    names = ["killed", "raises", "last"]
    workers = parallel.Workers(2, partial(opened, tmp_path, names))
    results = {done.row.name: result for done, result in workers.run(list(map(job, names)))}
    assert "ended by SIGKILL" in results.pop("killed")
    assert results.pop("raises") == "ValueError: no context is left on the device"
    assert results == {"last": {"name": "last"}}
    assert {name: (tmp_path / name).read_text() for name in names} == dict.fromkeys(
        names, "begun\n"
    )
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("code", "message"), [(-signal.SIGSEGV, "was ended by SIGSEGV"), (3, "ended with exit code 3")]
)
def test_how_a_worker_ended(code, message):
    assert parallel._ending(code) == f"its process {message}"


@pytest.mark.slow
def test_an_interrupted_run_ends_its_workers(command, tmp_path, monkeypatch):
    """Ctrl-C: nobody works on the rows that are left."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))

    class Interrupting(dict[Any, Any]):
        def __setitem__(self, name: Any, record: Any) -> None:
            raise KeyboardInterrupt

    args = build_parser().parse_args([*command(tmp_path), "--jobs", "2"])
    source, path = reproduction.open_source(args.model), tmp_path / "source.pt"
    torch.save(source, path)
    runner, tables = reproduction._opened(args, source)
    runner.records = Interrupting()
    jobs = [job for job in jobs_of(tables) if Measure.SPEED not in job.measures]
    assert len(jobs) > 3
    with pytest.raises(KeyboardInterrupt):
        runner.execute(jobs, parallel.Workers(2, partial(reproduction._worker, args, path)))
    runner.close()
    assert not multiprocessing.active_children()
    assert len(list((tmp_path / "rows").glob("*.json"))) < len(jobs)


def ended(group: int) -> bool:
    """Whether no process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.slow
def test_workers_end_with_a_killed_run(command, tmp_path):
    """SIGKILL of the leader: its workers stop, too, and the folder can be continued at once."""
    arguments = [*command(tmp_path, "--rows", "float", "rtn", "SpikeLLM"), "--jobs", "2"]
    group = kill_after_first_row(arguments, tmp_path)
    deadline = time.monotonic() + 60  # they look twice a second, but the machine may be busy
    while not ended(group) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ended(group)
    assert main(arguments) == 0


def test_a_baseline_needs_no_checkpoint(command, tmp_path, monkeypatch):
    """A table of one's own: a float model with rounded weights beside the dense one."""

    def build(source: Any, windows: torch.Tensor, seed: int, device: torch.device) -> Any:
        assert windows.shape == (2, 24)
        model = dense_model(source)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.down_proj.weight.mul_(8).round_().div_(8)
        return model, {"mean_steps": 1.4, "bits": 2.0}

    def table(training: Training) -> Table:
        made = Baseline("rounded", {"method": "rounded to eighths"}, build)
        rows = (Row("float model", "FP", None, True), Row("rounded", "W4", made, True))
        return dataclasses.replace(TABLES["main"](training), name="own", rows=rows)

    monkeypatch.setitem(reproduction.TABLES, "saliency", table)
    arguments = command(tmp_path)
    arguments[1] = "saliency"
    assert main(arguments) == 0
    dense, rounded = json.loads((tmp_path / "own.json").read_text())["lines"]
    assert rounded["test.txt token_ppl@24"] != dense["test.txt token_ppl@24"]
    assert rounded["mean steps"] == 1.4
    assert untimed(tmp_path)["rounded"]["recipe"] == {"method": "rounded to eighths"}


def test_the_table_of_ternary_weights(command, tmp_path):
    rows = ["no saliency", "PB-LLM 90", "BiLLM, as published", "GPTQ 3 bits"]
    arguments = [a for a in command(tmp_path, "--rows", *rows) if a != "--quick"]
    arguments[1] = "gptq"
    assert main(arguments) == 0
    lines = {x["method"]: x for x in json.loads((tmp_path / "gptq.json").read_text())["lines"]}
    assert lines["PB-LLM 90 %"]["additive MACs %"] == pytest.approx(90)
    assert lines["PB-LLM 90 %"]["steps"] == pytest.approx(1.7)
    ternary = lines["ternary, no saliency"]
    assert ternary["steps"] == 1
    assert 1.6 < ternary["stored bits"] < 4  # tiny layers: scales and orders weigh much
    assert ternary["additive MACs %"] == lines["BiLLM, as published"]["additive MACs %"] == 100
    assert lines["GPTQ 3 bits, groups of 128"]["additive MACs %"] == 0
    assert all(line["seconds"] > 0 for line in lines.values())


def test_two_runs_do_not_share_a_folder(command, tmp_path, capsys):
    from snnllm.work import locked

    lock = locked(tmp_path, "taken")
    assert main(command(tmp_path)) == 2
    assert "another process reproduces into it" in capsys.readouterr().err
    lock.close()


def test_a_dry_run_changes_nothing(command, tmp_path, capsys):
    assert main(command(tmp_path, "--rows", "float")) == 0
    rows = sorted(p.name for p in (tmp_path / "rows").iterdir())
    assert main(command(tmp_path, "--dry-run", "--restart")) == 2
    assert "--dry-run changes nothing" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "rows").iterdir()) == rows
    capsys.readouterr()
    fresh = tmp_path / "fresh"
    assert main(command(fresh, "--dry-run")) == 0
    assert not fresh.exists()
    out = capsys.readouterr().out
    assert "float model, FP: perplexity to do\n" in out
    assert re.search(r"rtn, W4A4: conversion to do, about [\d.]+ s, perplexity to do\n", out)
    assert re.search(r"counted once: to do: [\d.]+ s and \d+ steps never timed yet\n", out)


def test_estimates_of_conversions_are_those_of_a_cpu(command, tmp_path):
    args = build_parser().parse_args(command(tmp_path, "--rows", "rtn", "SpikeLLM"))
    runner, tables = reproduction._opened(args, reproduction.open_source(args.model))
    rtn, trained, *_ = jobs_of(tables)
    expected = runner.timing.expected_seconds
    assert 0 < expected(rtn, "conversion") < expected(trained, "conversion")
    assert expected(rtn, "conversion") == expected(rtn, "conversion")  # however busy the machine is
    on_gpu = dataclasses.replace(runner.timing, device=torch.device("cuda"))
    assert on_gpu.expected_seconds(rtn, "conversion") is None
    runner.close()


def test_a_rival_with_other_settings_is_another_model():
    names = {row.name for row in TABLES["gptq"](Training()).rows}
    plain = {row.name for row in TABLES["gptq"](Training()).rows if "PB-LLM 94.3" in row.label}
    assert len(plain) == 2
    assert plain < names
    assert all(len(name.rsplit("-", 1)[1]) == 10 for name in plain)


def test_a_dry_run_lists_rows_and_measures_nothing(command, tmp_path, capsys):
    assert main(command(tmp_path, "--rows", "float", "rtn")) == 0
    capsys.readouterr()
    assert main(command(tmp_path, "--dry-run")) == 0
    out = capsys.readouterr().out
    assert "rtn, W4A4: conversion done in" in out
    assert "SpikeLLM, T = 2, W4A4: conversion to do, about" in out
    assert "main: Perplexity and zero-shot accuracy; to do: " in out
    assert "counted once: to do: " in out.splitlines()[-1]
    assert len(untimed(tmp_path)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "nonesuch"], "No row of main contains 'nonesuch'"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--limit", "0"], "limit must be at least 1"),
        (["--calibration", "TEXT"], "is the calibration text, too"),
        (["--text", "TEXT", "TEXT"], "Two evaluation texts are called"),
    ],
)
def test_bad_options(command, texts, tmp_path, capsys, options, message, monkeypatch):
    if options[0] == "--rows":
        monkeypatch.setattr(reproduction, "open_source", lambda name: pytest.fail("opens a model"))
    options = [texts[1] if o == "TEXT" else o for o in options]
    assert main([*command(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err


def test_tasks_without_the_harness_are_refused_before_anything_runs(
    command, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(reproduction, "find_spec", lambda name: None)
    arguments = [a for a in command(tmp_path) if a != "--no-tasks"]
    assert main(arguments) == 2
    assert "--no-tasks" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm_eval (snnllm[eval])")
def test_zero_shot_tasks_stand_in_the_table_and_other_rows_are_refused(
    command, tmp_path, task_data, capsys
):
    arguments = [a for a in command(tmp_path, "--rows", "float") if a != "--no-tasks"]
    arguments += ["--task-data", str(task_data), "--task-limit", "1"]
    assert main(arguments) == 0
    (line,) = json.loads((tmp_path / "main.json").read_text())["lines"]
    scores = [line[f"{task} acc"] for task in ZERO_SHOT_TASKS]
    assert set(scores) <= {0.0, 100.0}
    assert line["mean acc"] == pytest.approx(sum(scores) / 6)
    assert line["mean acc_norm"] is not None
    text = (tmp_path / "results.md").read_text()
    assert "the first 1 samples of piqa" in text
    assert "Standard error of an accuracy: up to 50.0 points, of their mean 20.4." in text
    others = shutil.copytree(task_data, tmp_path / "others")
    (others / "piqa_val.jsonl").write_text((task_data / "boolq_val.jsonl").read_text())
    arguments[arguments.index("--task-data") + 1] = str(others)
    assert main(arguments) == 2
    assert "task_rows_sha256 was" in capsys.readouterr().err


def test_missing_rows_of_tasks_are_said_at_once(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reproduction, "run", lambda _: pytest.fail("it began"))
    assert main(command(tmp_path / "out", "--task-data", str(tmp_path / "none"))) == 2
    assert "none is no folder; --task-data" in capsys.readouterr().err


def test_measures_that_nobody_takes_are_refused(stories_dir, texts, tmp_path):
    from snnllm.sources import open_source

    args = build_parser().parse_args(
        ["reproduce", "equivalence", "--model", str(stories_dir), *texts, *SMALL]
    )
    source = open_source(stories_dir)
    settings = reproduce.settings_of(args, source)
    silent = paper_runner.Reporter(lambda _: None, lambda _: None, lambda *_: lambda _: None)
    runner = paper_runner.Runner(source, settings, {}, tmp_path, torch.device("cpu"), silent)
    with pytest.raises(ValueError, match="Nothing here measures equivalence"):
        runner.execute(jobs_of(reproduction.chosen_tables(args)))
    runner.close()


# -- lines --------------------------------------------------------------------------------------------------


def test_lines_of_rows_without_measurements():
    row = Row("a", "W4A4", None)
    empty: dict[str, Any] = {"measures": {}}
    for name in TABLES:
        lines = TABLES[name](Training()).lines([(row, empty)])
        assert [line["method"] for line in lines] == ["a"]
    assert efficiency_lines([]) == speed_lines([]) == []
    assert find({"a": {"b": 1}}, "a", "b") == 1
    assert find({"a": 1}, "a", "b") is None


def test_markdown_of_numbers_text_and_gaps():
    lines = [{"name": "x", "value": 1.23456, "empty": None}, {"name": "y", "count": 3}]
    assert markdown(lines, {"value": ".2f"}) == [
        "| name | value | count |",
        "|---|--:|--:|",
        "| x | 1.23 | - |",
        "| y | - | 3 |",
    ]
    assert markdown([], {}) == ["(no rows)"]
