"""Zero-shot tasks: the harness's own figures, its prompts from local rows, both conventions."""

from __future__ import annotations

import builtins
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from snnllm.cli import main
from snnllm.harness import TaskScore, evaluate_tasks, mean_accuracy
from snnllm.modeling import load
from snnllm.zeroshot import DEFINITIONS, ZERO_SHOT_TASKS

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval (pip install 'snnllm[eval]')"
)


def lm_eval(folder: Path, model: str, output: Path, task_data: Path, *more: str) -> dict[str, Any]:
    """Run the harness's own command in a process of its own; gives its results by task."""
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"),
        *("--model_args", f"pretrained={folder},{model}", "--batch_size", "4"),
        *("--include_path", str(DEFINITIONS), "--output_path", str(output)),
        *("--tasks", ",".join(f"{name}_local" for name in ZERO_SHOT_TASKS)),
        *("--metadata", json.dumps({"folder": str(task_data)})),
        *more,
    ]
    environment = {**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = output.rglob("results_*.json")
    results: dict[str, Any] = json.loads(path.read_text())["results"]
    return {name.removesuffix("_local"): values for name, values in results.items()}


def figures(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {
        task: {m: values[f"{m},none"] for m in ("acc", "acc_norm") if f"{m},none" in values}
        for task, values in results.items()
    }


@needs_harness
def test_the_float_model_scores_as_in_the_harness(stories_dir, task_data, tmp_path):
    output = tmp_path / "ours.json"
    options = ["--tasks", ",".join(ZERO_SHOT_TASKS), "--task-data", str(task_data)]
    assert (
        main(["eval", str(stories_dir), *options, "--batch-size", "4", "--json", str(output)]) == 0
    )
    ours = json.loads(output.read_text())["tasks"]
    assert [s["task"] for s in ours["scores"]] == list(ZERO_SHOT_TASKS)
    assert {s["rows"] for s in ours["scores"]} == {"local"}
    theirs = lm_eval(stories_dir, "dtype=float32", tmp_path / "theirs", task_data)
    assert {s["task"]: s["metrics"] for s in ours["scores"]} == figures(theirs)


@needs_harness
def test_the_harness_loads_a_converted_checkpoint(
    stories_checkpoint, stories_tokenizer, task_data, tmp_path
):
    theirs = lm_eval(
        stories_checkpoint, "trust_remote_code=True", tmp_path / "out", task_data, "--limit", "1"
    )
    ours = evaluate_tasks(
        load(stories_checkpoint),
        stories_tokenizer,
        ZERO_SHOT_TASKS,
        task_data=task_data,
        limit=1,
        batch_size=4,
    )
    assert {s.samples for s in ours.scores} == {1}
    assert {s.available for s in ours.scores} == {2}
    assert {s.task: dict(s.metrics) for s in ours.scores} == figures(theirs)


@needs_harness
def test_padding_in_a_batch_changes_nothing(stories_checkpoint, stories_tokenizer, task_data):
    """Shorter requests of a batch are padded; their spikes must not depend on that."""
    model = load(stories_checkpoint)
    scores = [
        evaluate_tasks(
            model, stories_tokenizer, ZERO_SHOT_TASKS, task_data=task_data, batch_size=size
        ).scores
        for size in (1, 8)
    ]
    assert scores[0] == scores[1]


@needs_harness
@pytest.mark.parametrize("task", ZERO_SHOT_TASKS)
def test_local_definitions_have_the_prompts_of_the_harness(task, task_data):
    """Same rows through both definitions: contexts, continuations, answers and metrics."""
    import lm_eval as package
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    local = TaskManager(
        include_path=str(DEFINITIONS),
        include_defaults=False,
        metadata={"folder": str(task_data)},
    ).load([f"{task}_local"])["tasks"][f"{task}_local"]
    folder = Path(package.__file__).parent / "tasks"
    where = {
        "arc_easy": "arc/arc_easy.yaml",
        "arc_challenge": "arc/arc_challenge.yaml",
        "boolq": "super_glue/boolq/default.yaml",
        "winogrande": "winogrande/default.yaml",
    }.get(task, f"{task}/{task}.yaml")
    config = load_yaml(folder / where, resolve_func=True)
    for key in ("training_split", "test_split", "dataset_path", "dataset_name", "tag"):
        config.pop(key, None)
    if task == "hellaswag":  # the rows are processed already
        config.pop("process_docs")
    rows = local.dataset
    theirs = ConfigurableTask(
        config={**config, "validation_split": "validation", "custom_dataset": lambda **_: rows}
    )
    for mine in (local, theirs):
        mine.build_all_requests(rank=0, world_size=1)
    assert [i.args for i in local.instances] == [i.args for i in theirs.instances]
    assert [local.doc_to_target(d) for d in rows["validation"]] == [
        theirs.doc_to_target(d) for d in rows["validation"]
    ]
    assert local.VERSION == theirs.VERSION
    assert local.aggregation().keys() == theirs.aggregation().keys()


@needs_harness
@pytest.mark.slow
def test_names_of_the_harness_ask_it_for_the_rows(
    stories_model, stories_tokenizer, task_data, monkeypatch
):
    """The harness's own definition of a task, whose data set stands in for the hub."""
    import datasets

    from snnllm.zeroshot.rows import read

    asked = []

    def load_dataset(path: str, name: str | None = None, **_: Any) -> Any:
        asked.append(path)
        rows = read("piqa_val.jsonl", str(task_data))
        return {**rows, "train": rows["validation"]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    theirs = evaluate_tasks(stories_model, stories_tokenizer, ["piqa"]).scores
    ours = evaluate_tasks(stories_model, stories_tokenizer, ["piqa"], task_data=task_data).scores
    assert asked == ["baber/piqa"]
    assert (theirs[0].rows, ours[0].rows) == ("harness", "local")
    assert theirs[0].metrics == ours[0].metrics


@needs_harness
def test_what_the_command_prints(stories_checkpoint, task_data, capsys):
    options = ["--tasks", "boolq,piqa", "--task-data", str(task_data), "--limit", "2"]
    assert main(["eval", str(stories_checkpoint), *options, "--view", "unrolled"]) == 0
    out = capsys.readouterr().out
    assert "| task | samples | acc | acc_norm |" in out
    assert "| boolq | 2 of 2, local |" in out
    assert "token_ppl" not in out
    assert out.index("| boolq") < out.index("| piqa") < out.index("| mean |")


@needs_harness
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ["no_such_task"]}, "knows no task 'no_such_task'"),
        ({"tasks": []}, "at least one task"),
        ({"tasks": ["piqa", "piqa"]}, "named twice"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"num_fewshot": -1}, "num_fewshot must be at least 0"),
        ({"num_fewshot": 1}, "none to show as examples"),
    ],
)
def test_bad_arguments(tiny_llama, task_data, change, message, monkeypatch):
    # The harness's own index is not needed to refuse these, and takes many seconds to read.
    import lm_eval.tasks

    index = lm_eval.tasks.TaskManager

    def manager(include_defaults: bool, **rest: Any) -> Any:
        return index(include_defaults=False, **rest)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    arguments: dict[str, Any] = {"tasks": ["piqa"], "task_data": task_data, **change}
    with pytest.raises(ValueError, match=message):
        evaluate_tasks(tiny_llama, None, arguments.pop("tasks"), **arguments)


@needs_harness
def test_missing_and_broken_rows(stories_model, stories_tokenizer, tmp_path):
    def score() -> Any:
        return evaluate_tasks(stories_model, stories_tokenizer, ["piqa"], task_data=tmp_path)

    with pytest.raises(FileNotFoundError, match="piqa_val.jsonl is missing"):
        score()
    (tmp_path / "piqa_val.jsonl").write_text("{]\n")
    with pytest.raises(ValueError, match="line 1: not JSON"):
        score()
    (tmp_path / "piqa_val.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no rows"):
        score()


def test_task_options_need_tasks_and_a_folder(stories_dir, tmp_path, capsys):
    assert main(["eval", str(stories_dir), "--task-data", str(tmp_path)]) == 2
    assert "name some with --tasks" in capsys.readouterr().err
    options = ["--tasks", "piqa", "--task-data", str(tmp_path / "none")]
    assert main(["eval", str(stories_dir), *options]) == 2
    assert "is no folder" in capsys.readouterr().err


def test_a_missing_harness_says_how_to_install_it(tiny_llama, tmp_path, monkeypatch):
    original = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "lm_eval":
            raise ModuleNotFoundError("No module named 'lm_eval'")
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'snnllm\[eval\]'"):
        evaluate_tasks(tiny_llama, None, ["piqa"], task_data=tmp_path)


def test_the_mean_takes_each_convention():
    def score(**metrics: float) -> TaskScore:
        return TaskScore("t", "local", 2, 2, "1", metrics, {})

    scores = [score(acc=0.2, acc_norm=0.4), score(acc=0.6)]
    assert mean_accuracy(scores, normalised=False) == pytest.approx(0.4)
    assert mean_accuracy(scores, normalised=True) == pytest.approx(0.5)
    assert mean_accuracy([score(f1=0.1)], normalised=True) is None
    assert mean_accuracy([], normalised=True) is None
