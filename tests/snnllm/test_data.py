"""Texts and windows of tokens."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from snnllm.data import DATA_VARIABLE, load_text, random_windows, token_windows, tokenize
from snnllm.texts import check_text

RAW = " = Title = \n \n Some words . \n"
JOINED = " = Title = \n\n\n\n\n Some words . \n"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_text_file_is_taken_as_it_is(tmp_path: Path) -> None:
    assert load_text(write(tmp_path / "a.txt", RAW)) == RAW


def test_a_raw_file_is_joined_as_in_the_gptq_protocol(tmp_path: Path) -> None:
    assert load_text(write(tmp_path / "a.raw", RAW)) == JOINED


def test_wikitext_has_the_published_number_of_bytes(wikitext_test: Path) -> None:
    assert len(load_text(wikitext_test).encode()) == 1_296_370


def test_a_jsonl_file_gives_its_text_fields(tmp_path: Path) -> None:
    rows = [{"text": "one"}, {"text": "two", "body": "zwei"}]
    path = write(tmp_path / "a.jsonl", "\n\n".join(json.dumps(row) for row in rows) + "\n")
    assert load_text(path) == "one\n\ntwo"


def test_another_jsonl_field_can_be_named(tmp_path: Path) -> None:
    assert load_text(write(tmp_path / "a.jsonl", '{"body": "zwei"}'), field="body") == "zwei"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x"}', r"line 2: .*'text', found: body"),
        ('{"text": 3}', r"line 2: .*string field 'text', found: text"),
        ("[1]", r"line 2: .*found: list"),
        ("{}", r"line 2: .*found: no fields"),
        ("{", r"line 2: not JSON"),
    ],
)
def test_a_bad_jsonl_row_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "a.jsonl", f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        load_text(path)


def test_missing_file() -> None:
    with pytest.raises(FileNotFoundError, match=r"no text file .*missing\.txt"):
        load_text("folder/missing.txt")


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder"):
        load_text(tmp_path)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"Unknown text 'c4'.*pydoc, wikitext2"):
        load_text("c4")


@pytest.mark.parametrize("name", ["pydoc:dev", "wikitext2:dev"])
def test_unknown_split_lists_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=r"Unknown split 'dev'.*:train"):
        load_text(name)


@pytest.mark.parametrize("content", ["", " \n\t\n"])
def test_empty_text(tmp_path: Path, content: str) -> None:
    with pytest.raises(ValueError, match="holds no text"):
        load_text(write(tmp_path / "a.txt", content))


def test_text_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("Gr\xfc\xdfe".encode("latin-1"))
    with pytest.raises(ValueError, match=r"no UTF-8 text \(byte 2"):
        load_text(path)


def test_pydoc_halves_are_long_stable_and_disjoint() -> None:
    train, test = load_text("pydoc:train"), load_text("pydoc:test")
    assert load_text("pydoc") == test == load_text("pydoc:test")
    assert min(len(train), len(test)) > 100_000
    halves = [{" ".join(p.split()) for p in text.split("\n\n")} for text in (train, test)]
    assert not halves[0] & halves[1]


def test_wikitext2_comes_from_the_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "wikitext2").mkdir()
    write(tmp_path / "wikitext2" / "wiki.test.raw", RAW)
    write(tmp_path / "wikitext2" / "wiki.train.part.raw", "train\n")
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    assert load_text("wikitext2") == load_text("wikitext2:test") == JOINED
    assert not caplog.text
    assert load_text("wikitext2:train") == load_text("wikitext2:train") == "train\n"
    assert caplog.text.count("wiki.train.part.raw") == 1


def test_wikitext2_comes_from_datasets_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*args: Any, split: str) -> dict[str, list[str]]:
        calls.append((*args, split))
        return {"text": [" = Title = \n", "", " Some words . \n"]}

    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    config = SimpleNamespace(HF_HUB_OFFLINE=True)
    datasets = SimpleNamespace(load_dataset=load_dataset, config=config)
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    assert load_text("wikitext2:valid") == JOINED
    assert calls == [("Salesforce/wikitext", "wikitext-2-raw-v1", "validation")]


def test_wikitext2_absent_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FileNotFoundError, match=f"set {DATA_VARIABLE} to a folder"):
        load_text("wikitext2")


@pytest.mark.parametrize("source", ["pydoc:train", "wikitext2", "wikitext2:valid", __file__])
def test_a_text_that_may_be_there_is_not_read_by_a_check(source: str) -> None:
    check_text(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("folder/missing.txt", "no text file"),
        ("c4", "Unknown text 'c4'"),
        ("wikitext2:dev", "known: wikitext2:test, wikitext2:train, wikitext2:valid"),
        (".", "is a folder"),
    ],
)
def test_a_check_refuses_what_cannot_be_loaded(source: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check_text(source)


def test_tokenize_gives_the_tokenizers_ids(stories_tokenizer: Any) -> None:
    text = "Once upon a time there was a dog. " * 400  # longer than the model's context
    ids = tokenize(text, stories_tokenizer)
    assert ids.dtype == torch.int64
    assert ids.tolist() == stories_tokenizer(text)["input_ids"]


def test_tokenize_of_nothing() -> None:
    with pytest.raises(ValueError, match="gave no tokens"):
        tokenize("", lambda text, verbose: {"input_ids": []})


def test_smollm2_tokens_of_wikitext(wikitext_test: Path, smollm2_tokenizer: Any) -> None:
    ids = tokenize(load_text(wikitext_test), smollm2_tokenizer)
    assert len(ids) == 304_986
    assert token_windows(ids, 2048).shape == (148, 2048)


def test_smollm2_splits_digits(smollm2_tokenizer: Any) -> None:
    assert smollm2_tokenizer("In 1984").tokens() == ["In", "Ġ", "1", "9", "8", "4"]


@given(
    length=st.integers(2, 300),
    window=st.integers(2, 50),
    limit=st.none() | st.integers(1, 200),
)
def test_windows_are_disjoint_in_order_and_spread(
    length: int, window: int, limit: int | None
) -> None:
    ids = torch.arange(length)
    if length < window:
        with pytest.raises(ValueError, match="fewer than one window"):
            token_windows(ids, window, limit)
        return
    available = length // window
    windows = token_windows(ids, window, limit)
    assert windows.shape == (min(available, limit or available), window)
    assert torch.equal(windows, windows[:, :1] + torch.arange(window))
    starts = windows[:, 0]
    assert torch.all(starts % window == 0)
    assert torch.all(starts.diff() > 0)
    assert starts[0] == 0
    gaps = starts.diff() // window
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_limit_spreads_windows_evenly_from_the_first() -> None:
    assert token_windows(torch.arange(20), 2, 4)[:, 0].tolist() == [0, 4, 10, 14]


def test_random_windows_are_slices_and_repeat_with_the_seed() -> None:
    ids = torch.arange(100)
    windows = random_windows(ids, 10, 64, seed=3)
    assert windows.shape == (64, 10)
    assert torch.equal(windows, windows[:, :1] + torch.arange(10))
    assert torch.equal(windows, random_windows(ids, 10, 64, seed=3))
    assert not torch.equal(windows, random_windows(ids, 10, 64, seed=4))


def test_random_windows_reach_both_ends() -> None:
    starts = random_windows(torch.arange(12), 10, 64, seed=0)[:, 0]
    assert set(starts.tolist()) == {0, 1, 2}


def test_text_shorter_than_a_window_says_how_many_tokens_came() -> None:
    ids = torch.arange(7)
    for cut in (lambda: token_windows(ids, 8), lambda: random_windows(ids, 8, 1, seed=0)):
        with pytest.raises(ValueError, match=r"has 7 tokens.*window of 8.*at most 7"):
            cut()


@pytest.mark.parametrize(
    ("ids", "window", "limit", "message"),
    [
        (torch.zeros(2, 3), 2, None, r"one axis \[N\], got shape \[2, 3\]"),
        (torch.zeros(9), 1, None, "at least 2 tokens"),
        (torch.zeros(9), 2, 0, "limit must be at least 1"),
    ],
)
def test_bad_window_arguments(
    ids: torch.Tensor, window: int, limit: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        token_windows(ids, window, limit)


def test_bad_window_count() -> None:
    with pytest.raises(ValueError, match="number of windows must be at least 1"):
        random_windows(torch.zeros(9), 2, 0, seed=0)
