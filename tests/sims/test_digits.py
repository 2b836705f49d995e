"""The training example runs, learns, and counts events."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neurons import ElasticBiSpikingNode, GIFNode
from sims import digits


@pytest.fixture(scope="module")
def data() -> digits.Digits:
    pytest.importorskip("sklearn", reason="needs scikit-learn (pip install scikit-learn)")
    return digits.load_digits()


def test_the_digits_are_split_without_overlap(data: digits.Digits) -> None:
    assert data.images.shape == (1348, 64)
    assert data.test_images.shape == (449, 64)
    assert float(data.images.min()) == 0
    assert float(data.images.max()) == 1
    assert len(data.labels.unique()) == len(data.test_labels.unique()) == 10


def test_a_network_learns(data: digits.Digits) -> None:
    torch.manual_seed(0)
    network = digits.spiking_network(lambda: GIFNode(4, step_mode="m"), 32)
    before, *_ = digits.evaluate(network, data, 2)
    digits.train(network, data, 2, 3, 0)
    accuracy, events, milliseconds = digits.evaluate(network, data, 2)
    assert before < 0.3
    assert accuracy > 0.85
    assert 0 < events < 2 * 32 * 2 * 3  # layers, neurons, steps, largest spike
    assert milliseconds > 0


def test_events_are_spikes_without_amplitude(data: digits.Digits) -> None:
    def spiking() -> nn.Module:
        return ElasticBiSpikingNode(0.5, step_mode="m")

    network, spikes = digits.spiking_network(spiking, 8), []

    def record(node: nn.Module, inputs: Any, output: Tensor) -> None:
        spikes.append(int((output != 0).sum()))

    for number in (1, 3):
        network[number].register_forward_hook(record)
    _, events, _ = digits.evaluate(network, data, 1)
    assert events == pytest.approx(sum(spikes[:2]) / 449)


def test_the_script_writes_a_table_and_a_figure(
    data: digits.Digits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = ["--steps", "1", "2", "--levels", "2", "--epochs", "1", "--seeds", "2", "--hidden", "4"]
    assert digits.main([*tiny, "--output", str(tmp_path)]) == 0
    with (tmp_path / "digits.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 5
    assert {row["steps"] for row in rows} == {"1", "2"}
    assert (tmp_path / "digits.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count("SpikingJelly ILIFNode") == 2


def test_the_same_seed_trains_the_same_network(data: digits.Digits) -> None:
    arguments: Any = ([1], [2], 1, 1, 4)
    first, second = (digits.sweep(*arguments) for _ in range(2))
    assert [(p.accuracy, p.events) for p in first] == [(p.accuracy, p.events) for p in second]


@pytest.mark.parametrize(
    ("option", "message"),
    [("--steps", "steps must be at least 1"), ("--epochs", "hidden must be at least 1, got 0")],
)
def test_numbers_below_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, message: str
) -> None:
    assert digits.main([option, "0", "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_without_scikit_learn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"pip install 'snnllm\[examples\]'"):
        digits.load_digits()
    assert digits.main(["--output", str(tmp_path)]) == 2
    assert "pip install 'snnllm[examples]'" in capsys.readouterr().err
