"""The benchmarks start without arguments, as `make bench` starts them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from snnllm.config import SpikeConfig
from snnllm.conversion import convert


class _Opened(Exception):
    """A benchmark has opened its model."""


def benchmark(repository: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, repository / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_demo_model_is_the_default(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = benchmark(repository, "accuracy")

    def opened(model: str) -> None:
        raise _Opened(model)

    monkeypatch.setattr(module, "open_source", opened)
    with pytest.raises(_Opened, match="^smollm2$"):
        module.main([])


def test_the_accuracy_of_chosen_rows(repository: Path, stories_dir: Path, capsys: Any) -> None:
    module = benchmark(repository, "accuracy")
    arguments = [str(stories_dir), "--window", "24", "--limit", "2", "--calibration-windows", "1"]
    tables, rows = ("issue", "omniquant"), ("no saliency, attention float", "rtn, split")
    arguments += ["--device", "cpu", "--tables", *tables, "--rows", *rows]
    assert module.main(arguments) == 0
    text = capsys.readouterr().out
    assert "token_ppl@24" in text
    assert text.count("| float | - |") == 2
    assert text.count("| no saliency, attention float | W4A4 |") == 1
    assert text.count("| rtn, split | W4A4T2 |") == 1


def test_the_speed_of_encoding(
    repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))  # it shares the clock of another
    module = benchmark(repository, "encode_speed")
    if not torch.cuda.is_available():
        assert module.main([]) == module.SKIPPED
        assert "found no CUDA device" in capsys.readouterr().err
        return
    monkeypatch.setattr(module, "SHAPES", ((64, 384),))
    monkeypatch.setattr(module, "ROTATED_BYTES", 1)
    assert module.main(["--rounds", "2", "--json", str(tmp_path / "out.json")]) == 0
    assert "NO" not in capsys.readouterr().out
    assert (tmp_path / "out.json").is_file()


def test_the_speed_of_neurons(repository: Path, tmp_path: Path, capsys: Any) -> None:
    module = benchmark(repository, "neuron_speed")
    arguments = ["--quick", "--elements", "64", "--steps", "2", "--rounds", "1"]
    assert module.main([*arguments, "--json", str(tmp_path / "out.json")]) == 0
    text = capsys.readouterr().out
    for title in ("share of the measured copy bandwidth", "Beside SpikingJelly", "Small sizes"):
        assert title in text
    assert "NO" not in text
    assert (tmp_path / "out.json").is_file()


def test_the_speed_of_a_head(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))  # it shares the clock of another
    module = benchmark(repository, "head_gpu")
    if not torch.cuda.is_available():
        assert module.main([]) == module.SKIPPED
        assert "there is no CUDA device; skipped" in capsys.readouterr().err
        return
    monkeypatch.setattr(module, "copies_of", lambda size: 2)
    few = ["--tables", "130x96", "--rows", "1", "20"]
    assert module.main(few) == 0
    assert "NO" not in capsys.readouterr().out
    assert module.main([*few, "--sweep"]) == 0
    assert "chosen" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures where there is a GPU")
def test_the_speed_of_linears_needs_a_gpu(repository: Path, capsys: Any) -> None:
    module = benchmark(repository, "linear_gpu")
    assert module.main([]) == module.SKIPPED
    assert "there is no CUDA device; skipped" in capsys.readouterr().err


def test_the_speed_of_a_conversion(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    module = benchmark(repository, "conversion_speed")
    monkeypatch.setitem(module.SHAPES, "1B", module.Shape(64, 128, 4, 2, 10))
    arguments = ["--shape", "1B", "--windows", "2", "--window", "16", "--device", "cpu"]
    assert module.main([*arguments, "--pipeline", "rtn", "rotated"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1] for line in lines[-2:]] == ["rtn", "rotated"]


def test_tokens_of_two_devices(
    repository: Path, stories_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    module = benchmark(repository, "same_tokens")
    checkpoint = tmp_path / "checkpoint"
    windows = torch.randint(3, 512, (2, 64), generator=torch.Generator().manual_seed(0))
    convert(stories_dir, checkpoint, SpikeConfig(), windows, pipeline="rtn")
    arguments = [str(checkpoint), "--devices", "cpu", "cpu", "--tokens", "8"]
    assert module.main([*arguments, "--prompt", "Once upon a time"]) == 0
    assert "| Once upon a time | 8 of 8 | - | - |" in capsys.readouterr().out
    a, b = torch.tensor([1, 2, 0]), torch.tensor([1, 0, 0])
    logits = torch.tensor([[0.0, 1.0, 0.5], [0.25, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert module.first_difference((a, b), (logits, logits)) == (1, (0.75, -0.75))
    assert module.first_difference((a, a), (logits, logits)) is None
