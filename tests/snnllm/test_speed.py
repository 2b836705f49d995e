"""Timing of several models side by side."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from snnllm import speed
from snnllm.cli import bench
from snnllm.speed import Contender, Timing, time_contenders

IDS = torch.zeros(1, 4, dtype=torch.int64)


class Model(str):
    """A name that says how many seconds a call takes, and where."""

    device = torch.device("cpu")


class OnGPU(Model):
    """Likewise."""

    device = torch.device("cuda")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """A clock that moves on by as many seconds as a model is called; what was timed."""
    now, seen = [0.0], []

    def timed(kind: str) -> Any:
        def run(model: Any, _: Any, *tokens: int) -> float:
            seen.append((model, " ".join([kind, *map(str, tokens)])))
            now[0] += float(model)
            return float(model)

        return run

    monkeypatch.setattr(speed, "prefill", timed("prefill"))
    monkeypatch.setattr(speed, "decode", timed("decode"))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    return seen


@pytest.mark.parametrize(
    ("asked", "groups"),
    [
        (["eager", "collapsed", "compiled"], [["eager", "compiled"], ["collapsed"]]),
        (["collapsed", "eager", "unrolled"], [["collapsed", "unrolled"], ["eager"]]),
        (["collapsed"], [["collapsed"]]),
    ],
)
def test_the_model_asked_for_first_is_timed_first(
    asked: list[str], groups: list[list[str]]
) -> None:
    assert bench._groups(asked, torch.device("cuda")) == groups
    assert bench._groups(asked, torch.device("cpu")) == [asked]


def test_who_is_slow_is_not_repeated(clock: list[tuple[str, str]]) -> None:
    contenders = {name: Contender(Model(name)) for name in ("1", "4", "30")}
    timings = time_contenders(contenders, IDS, IDS, 8, 5, patience=20)
    assert timings == {"1": Timing(1, 1, 5), "4": Timing(4, 4, 2), "30": Timing(30, 30, 1)}
    assert len(clock) == 2 * (6 + 3 + 2)
    # Who is slow from the beginning is timed over fewer tokens, after the kernels have been compiled.
    assert [kind for model, kind in clock if model == "30"][1::2] == ["decode 8", "decode 2"]


def test_without_a_limit_all_are_repeated_alike(clock: list[tuple[str, str]]) -> None:
    timings = time_contenders({n: Contender(Model(n)) for n in ("1", "30")}, IDS, IDS, 2, 3)
    assert [timing.repetitions for timing in timings.values()] == [3, 3]
    assert clock[:4] == [("1", "prefill"), ("1", "decode 2"), ("30", "prefill"), ("30", "decode 2")]


def test_what_is_recorded_meanwhile_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, graphs = iter([90, 40, 3, 4, 5]), iter([90, 40, 6, 7, 8])
    monkeypatch.setattr(speed, "prefill", lambda *_: next(kernels))
    monkeypatch.setattr(speed, "decode", lambda *_: next(graphs))
    timings = time_contenders({"1": Contender(OnGPU("1"))}, IDS, IDS, 2, 3)
    assert timings == {"1": Timing(4, 7, 3)}
    kernels, graphs = iter([90, 3, 4, 5]), iter([90, 6, 7, 8])
    timings = time_contenders({"1": Contender(Model("1"))}, IDS, IDS, 2, 3)
    assert timings == {"1": Timing(4, 7, 3)}


@pytest.mark.parametrize(("tokens", "repeat"), [(0, 1), (1, 0)])
def test_nothing_to_time_is_refused(tokens: int, repeat: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        time_contenders({}, IDS, IDS, tokens, repeat)
